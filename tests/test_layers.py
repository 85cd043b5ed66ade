"""The layers of docs/architecture.md hold in every file, and every import of ours names something that is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "kinema"

LAYERS = (
    {"__init__"},
    {"dtypes", "errors", "machine", "randomness", "sizes", "suggest"},
    {"pinned", "plugins"},
    {"config"},
    {"data", "networks", "optim", "runs"},
    {"families", "prompts"},
    {"adapters", "objectives"},
    {"memory"},
    {"parallel"},
    {"sampling", "ui"},
    {"training"},
    {"shapes"},
    {"cli"},
    {"__main__"},
)
"""From the ground up. What stands in one row knows itself and the rows below it, none beside it and none above. The
modules ``cli_*.py`` and ``cli.py`` are one thing."""

_FROM = re.compile(r"^[ >]*from (kinema[\w.]*) import (?:\(([^)]*)\)|([^\n#(]*))", re.MULTILINE)
_RUN = re.compile(r"-m (kinema(?:\.\w+)*)")


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = ("kinema", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def package(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to."""
    name = module.split(".")[1] if "." in module else "__init__"
    return "cli" if name.startswith("cli_") else name


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) for every import in a file, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kinema":
            assert node.level == 0 and node.module is not None
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield node.lineno, inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] == "kinema")


def slips(path: Path, module: str) -> list[str]:
    """Imports of a module that its layer may not have."""
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    own, found = package(module), []
    for line, other in imports(path):
        known = package(other)
        if known != own and level[known] >= level[own]:
            found.append(f"{path.name}:{line}: {own} may not import {other}")
    return found


def test_every_package_has_its_layer() -> None:
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed))
    assert set(listed) == {package(module) for module in MODULES}


def test_imports_point_down() -> None:
    assert [slip for module, path in MODULES.items() for slip in slips(path, module)] == []


@pytest.mark.parametrize(
    ("module", "line", "other"),
    [
        ("kinema.sampling.made_up", "    from kinema.training.export import export_weights", "kinema.training.export"),
        ("kinema.config.made_up", "from kinema.families import registry", "kinema.families.registry"),
        ("kinema.data.made_up", "import kinema.runs.exports", "kinema.runs.exports"),
    ],
)
def test_a_slip_is_found(tmp_path: Path, module: str, line: str, other: str) -> None:
    path = tmp_path / "made_up.py"
    path.write_text(f"if True:\n    pass\n{'def f():' if line[0] == ' ' else ''}\n{line}\n")
    assert slips(path, module) == [f"made_up.py:4: {package(module)} may not import {other}"]


@cache
def defined(module: str) -> set[str]:
    """Names that can be imported from a module: what it assigns, defines or imports itself, and its submodules."""
    names = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == module}
    waiting: list[ast.stmt] = list(ast.parse(MODULES[module].read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            waiting += [one for one in ast.iter_child_nodes(node) if isinstance(one, ast.stmt)]
            waiting += [one for handler in getattr(node, "handlers", []) for one in handler.body]
        else:
            names |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    return names


def dangling(text: str) -> list[str]:
    """Imports of ours in a text (code, code in strings, code in pages) that name what is not there."""
    found = []
    for module, several, one in _FROM.findall(text):
        if module not in MODULES:
            found.append(module)
            continue
        lines = [line.partition("#")[0] for line in (several or one).splitlines()]
        asked = [name.split(" as ")[0].strip() for name in ",".join(lines).split(",")]
        known = defined(module)
        found += [f"{module}.{name}" for name in asked if name and name != "*" and name not in known]
    started = (name for name in _RUN.findall(text) if name not in MODULES)
    return found + list(started)


def test_every_name_that_is_imported_is_there() -> None:
    """Where nothing runs it as well: in benchmarks, scripts, pages, and in code that tests hand to other processes."""
    folders = ("src", "tests", "bench", "scripts", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md"}]
    paths = [path for path in paths if path != Path(__file__).resolve()]
    paths += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    assert len(paths) > 300
    wrong = {str(path.relative_to(ROOT)): dangling(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_a_name_that_moved_is_found() -> None:
    text = """
        from kinema.errors import UserError, Gone
        from kinema.training.gone import anything
        from kinema.runs.exports import (
            Export,  # stays
            vanished as here,
        )
        python -m kinema.config.init
    """
    expected = ["kinema.errors.Gone", "kinema.training.gone", "kinema.runs.exports.vanished", "kinema.config.init"]
    assert dangling(text) == expected


def test_the_map_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_0-9]+/(?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`", page)
    assert len(named) > 15
    assert [name for name in named if not any((root / name).exists() for root in (SOURCE, ROOT))] == []
