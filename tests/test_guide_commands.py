"""Every `kinema` command of the README and the guides is one that the command line takes. None is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kinema.cli import app
from kinema.errors import UserError

ROOT = Path(__file__).parents[1]
UsageError: Any = typer.BadParameter.__mro__[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """(what follows `kinema`, whether it stands in a block, and so is whole)."""
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            if match := re.match(r"(?:\$ )?(?:\w+=\S+ )*(?:torchrun .*-m )?kinema (.*)", line.strip()):
                yield match[1], True
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for code in re.findall(r"`kinema ([^`]+)`", prose):
        yield code.replace("\n", " "), False


@pytest.fixture(scope="module")
def program() -> Any:
    """The command line, whose commands do nothing."""
    program: Any = typer.main.get_command(app)
    waiting = [program]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        if not hasattr(command, "commands"):
            command.callback = lambda **options: None
    return program


def problem(program: Any, command: str, whole: bool) -> str | None:
    """What the command line says to it, if it refuses it."""
    words = [word for word in shlex.split(re.split(r" [>|] ", command)[0], comments=True) if word != "..."]
    try:
        program.main(words, "kinema", standalone_mode=False)
    except UsageError as error:
        said = error.format_message()
        return None if not whole and re.search("Missing|requires an argument", said) else said
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_known(page: Path, program: Any) -> None:
    found = {one: problem(program, *one) for one in commands(page.read_text(encoding="utf-8"))}
    assert {one: why for one, why in found.items() if why is not None} == {}


def test_what_is_wrong_is_found(program: Any) -> None:
    """Else the test above could pass by reading nothing."""
    text = "`kinema download open_sora v2` and\n```bash\nkinema sample --lst x \\\n  y\nkinema tain c.toml\n```\n"
    assert [*commands(text)] == [("sample --lst x y", True), ("tain c.toml", True), ("download open_sora v2", False)]
    said = [problem(program, *one) for one in commands(text)]
    begin = ("No such option: --lst", "No such command 'tain'.", "Got unexpected extra argument")
    assert all(str(one).startswith(expected) for one, expected in zip(said, begin, strict=True)), said
    assert sum(whole for _, whole in commands((ROOT / "docs" / "guides" / "sampling.md").read_text())) >= 5
