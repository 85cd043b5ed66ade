"""The JSON schema and the reference page say what the models say."""

import tomllib
from pathlib import Path
from typing import Any

from kinema.config.expect import all_keys
from kinema.config.load import load_config, to_toml
from kinema.config.reference import json_schema, reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_the_page_has_every_table_and_key() -> None:
    page = reference()
    for path in all_keys():
        dotted = ".".join(path)
        lines = [f"\n## `[{dotted}]`", f"\n## `[[{dotted}]]`", f"| `{path[-1]}` |"]
        if path[:3] == ("evaluation", "sets", "sources"):  # described where the sources of the training are
            lines.append(f"\n## `[{'.'.join(('data', *path[2:]))}]`")
        assert any(line in page for line in lines), dotted


def test_the_example_of_the_page_loads(tmp_path: Path) -> None:
    example = reference().split("```toml\n")[1].split("```")[0]
    path = tmp_path / "c.toml"
    path.write_text(example)
    assert load_config(path).training.steps == 2000


def test_every_key_is_documented() -> None:
    schema = json_schema()
    for name, table in {**schema["$defs"], "Config": schema}.items():
        for key, values in table["properties"].items():
            assert values.get("description"), f"{name}.{key}"


def test_the_schema_describes_what_a_file_may_hold(tmp_path: Path) -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert all(table["additionalProperties"] is False for table in schema["$defs"].values())
    table = schema["$defs"]["OptimizerConfig"]["properties"]
    assert table["type"]["examples"][:3] == ["adamw", "adamw8bit", "muon"]  # other packages may add more
    assert table["lr"]["exclusiveMinimum"] == 0
    assert table["lr"]["description"].startswith("Peak learning rate.")
    assert {"const": "none"} in schema["$defs"]["TrainingConfig"]["properties"]["clip_norm"]["anyOf"]
    assert '"null"' not in str(schema).replace("'", '"')

    path = tmp_path / "c.toml"
    path.write_text('[model]\nfamily = "some"\n[[data.sources]]\npath = "x"\n[training]\nepochs = 1\n')
    known = {".".join(key) for key in all_keys()}

    def check(value: Any, key: tuple[str, ...], node: dict[str, Any]) -> None:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        if isinstance(value, dict) and "properties" not in node:
            assert not value and node["additionalProperties"]  # its keys are the user's
        elif isinstance(value, dict):
            assert set(value) <= set(node["properties"])
            assert set(node.get("required", ())) <= set(value)
            for name, inner in value.items():
                assert ".".join((*key, name)) in known
                check(inner, (*key, name), node["properties"][name])

    check(tomllib.loads(to_toml(load_config(path))), (), schema)
