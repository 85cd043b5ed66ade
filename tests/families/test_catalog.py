"""What is said of families: sizes against the code, `kinema models`, and the pages of the documentation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from report_table import merged, outcomes, read, table, write

from kinema.config.load import load_config
from kinema.config.schema import ModelConfig
from kinema.families.catalog import SIZES, catalog, entry, gigabytes
from kinema.families.download import part_files
from kinema.families.pages import blocks, fill, known
from kinema.families.registry import BUILT_IN, family_class, open_family
from kinema.families.sizes import part_sizes

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = {name: DOCS / "guides" / f"{name}.md" for name in ("image", "video", "edit")}
EXAMPLES = [
    pytest.param(name, number, text, id=f"{name}-{number}")
    for name, path in GUIDES.items()
    for number, text in enumerate(re.findall(r"```toml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_every_part_of_every_variant_is_counted() -> None:
    sizes = json.loads(SIZES.read_text())
    assert sorted(sizes) == sorted(BUILT_IN), "run `make docs`"
    for family in BUILT_IN:
        variants = family_class(family).variants
        assert list(sizes[family]) == list(variants), "run `make docs`"
        for name, variant in variants.items():
            bound = open_family(ModelConfig(family=family, variant=name))
            with_weights = [part for part in variant.parts if bound.spec(part).model]  # type: ignore[attr-defined]
            assert sorted(sizes[family][name]) == sorted(with_weights), f"{family} {name}: run `make docs`"
            networks = [count for part, count in sizes[family][name].items() if part.startswith("network")]
            assert set(networks) == {variant.parameters}, f"{family} {name}"


@pytest.mark.parametrize("family", sorted(BUILT_IN))
def test_the_smallest_variant_is_counted_anew(family: str) -> None:
    smallest = min(family_class(family).variants.values(), key=lambda variant: variant.parameters).name
    assert part_sizes(family, smallest) == json.loads(SIZES.read_text())[family][smallest], "run `make docs`"


# -- kinema models ---------------------------------------------------------------------------------------------------


def run(*arguments: str, cwd: Path, **environment: str) -> tuple[str, float]:
    """What a command prints, and its processor time."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=cwd, env={**own, **environment}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return text, usage.ru_utime + usage.ru_stime


def test_the_list_for_programs(tmp_path: Path) -> None:
    cache = {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}  # of an installed package it is there
    results = [run("-m", "kinema", "models", "--json", cwd=tmp_path, **cache) for _ in range(2)]
    starts = []  # what every command takes: of a machine that is slow, or has other work, longer
    while min(seconds for _, seconds in results) >= max(0.6, 5 * min(starts, default=0)):
        assert len(results) < 10, [seconds for _, seconds in results]
        results.append(run("-m", "kinema", "models", "--json", cwd=tmp_path, **cache))
        starts.append(run("-c", "import typer, pydantic", cwd=tmp_path, **cache)[1])
    rows = json.loads(results[0][0])
    assert {row["name"] for row in rows} >= set(BUILT_IN)
    wan = next(row for row in rows if (row["name"], row["variant"]) == ("wan", "i2v-a14b"))
    assert wan["parameters"] == 14_288_901_184 and wan["modality"] == "video"
    assert {"full", "lora", "dora", "lokr", "ia3", "fp8", "compile", "experts", "first_frame"} <= set(wan["supports"])
    assert not {"controls", "last_frame", "text_encoders"} & set(wan["supports"])
    parts = {part["part"]: part for part in wan["parts"]}
    assert parts["network_2"]["parameters"] == parts["network"]["parameters"] == wan["parameters"]
    assert parts["tokenizer"]["parameters"] == 0 and parts["network_2"]["folder"] == "transformer_2"
    assert wan["bytes_bf16"] == sum(part["bytes_bf16"] for part in wan["parts"])


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from kinema.families.catalog import *; catalog(); terminal_table(catalog()); print(*sys.modules)"
    )
    loaded = set(run("-c", code, cwd=tmp_path)[0].split())
    assert not loaded & {"torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "numpy"}


def test_the_table_fits_100_columns(tmp_path: Path) -> None:
    text, _ = run("-m", "kinema", "models", cwd=tmp_path, COLUMNS="100")
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100 and "…" not in text
    for one in catalog():
        assert any(one.variant.name in line.split() for line in lines), one.variant.name


def test_supports_is_read_from_the_classes() -> None:
    assert "text_encoders" in entry("sdxl", "base-eps").supports
    assert "text_encoders" not in entry("flux", "dev").supports
    assert {"first_frame", "last_frame"} <= set(entry("wan", "flf2v-14b-720p").supports)
    assert "controls" in entry("flux", "kontext-dev").supports and "experts" not in entry("wan", "t2v-14b").supports
    assert entry("flux", "dev").options == ("guidance", "bypass_guidance")


def test_every_part_can_be_found_by_the_names_of_a_diffusers_repository() -> None:
    """What `kinema download` looks for, in a repository that has a folder for every part."""
    for one in catalog(sorted(BUILT_IN)):
        bound = open_family(ModelConfig(family=one.family, variant=one.variant.name))
        for part in one.variant.parts:
            spec = bound.spec(part)  # type: ignore[attr-defined]
            files = [f"{spec.folder}/{spec.config_file}"]
            files += [f"{spec.folder}/diffusion_pytorch_model.safetensors"] if spec.model else []
            assert sorted(part_files(spec, files)) == sorted(files), (one.family, part)


# -- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [DOCS / "families.md", *GUIDES.values(), DOCS.parent / "README.md"], ids=lambda p: p.stem
)
def test_pages_are_up_to_date(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert blocks(page) and fill(page) == page, "run `make docs`"


def test_the_guides_have_every_family_once() -> None:
    wanted = {(one.group, one.family) for one in known()}
    found = [tuple(name.split()[1:]) for path in GUIDES.values() for name in blocks(path.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(("name", "number", "text"), EXAMPLES)
def test_examples_load_and_suit_their_family(
    name: str, number: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing lies at their paths
    assert len(text.splitlines()) < 15
    path = tmp_path / "c.toml"
    path.write_text(text)
    config = load_config(path)
    family = open_family(config.model)
    family.validate(config)
    one = entry(config.model.family, family.variant.name)
    assert one.group == name
    assert config.model.path == f"models/{one.family}-{one.variant.name}"  # what `kinema download` prints


def test_every_guide_has_an_example_of_each_of_its_families() -> None:
    for name, path in GUIDES.items():
        text = path.read_text(encoding="utf-8")
        for family in {one.family for one in known() if one.group == name}:
            assert f'family = "{family}"' in text, (name, family)


def test_the_arithmetic_of_the_guides() -> None:
    (row,) = [line for line in GUIDES["image"].read_text().splitlines() if "--variant base-eps" in line]
    network = 2_567_463_684
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (
        cells[2:5]
        == [gigabytes(2 * network), gigabytes(network), gigabytes(16 * network)]
        == ["5.1 GB", "2.6 GB", "41 GB"]
    )
    assert gigabytes(9.94e9) == "9.9 GB" and gigabytes(9.96e9) == "10 GB"


def test_the_table_of_proofs(tmp_path: Path) -> None:
    node = "tests/families/test_zoo.py::test_"
    found = outcomes(
        [
            (f"{node}a_parity[flux-dev]", "passed"),
            (f"{node}e_lora[flux-dev-comfyui]", "skipped"),
            (f"{node}e_lora[flux-dev-diffusers]", "passed"),
            (f"{node}e_lora[flux-dev-kohya]", "skipped"),
            (f"{node}g_single[flux-dev]", "skipped"),
            (f"{node}h_compiled[flux-dev]", "failed"),
            (f"{node}h_checkpointing[flux-dev]", "passed"),
            ("tests/families/test_flux.py::test_a_thing[flux-dev]", "failed"),
        ]
    )
    assert found == {"flux-dev": {"a": "passed", "e": "passed", "g": "skipped", "h": "failed"}}
    page = tmp_path / "families.md"
    page.write_text((DOCS / "families.md").read_text(encoding="utf-8"), encoding="utf-8")
    before = blocks(page.read_text(encoding="utf-8"))
    write(page, table(found, sorted(found)))
    text = page.read_text(encoding="utf-8")
    assert "| flux | dev | ✓ |  |  |  | ✓ |  | – | ✗ |" in text and blocks(text) == before
    assert read(page) == found
    again = merged(read(page), {"flux-dev": {"b": "passed", "h": "passed"}, "wan-t2v-1.3b": {"a": "skipped"}})
    assert again == {
        "flux-dev": {"a": "passed", "b": "passed", "e": "passed", "g": "skipped", "h": "passed"},
        "wan-t2v-1.3b": {"a": "skipped"},
    }
    write(page, table(again, sorted(again)))
    assert read(page) == again


def test_a_wrong_example_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(EXAMPLES[0].values[2].replace("steps", "stebs"))  # type: ignore[union-attr]
    with pytest.raises((ValueError, ValidationError), match="stebs"):
        load_config(path)
