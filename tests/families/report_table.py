"""The table of docs/families.md from the reports of a run: one row a variant, one column a proof."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

COLUMNS = {
    "a": "parity with diffusers' pipeline",
    "b": "x_0 recovered over the time range",
    "c": "the right weights move",
    "d": "30 steps bring the loss down",
    "e": "LoRA export and import",
    "f": "full weights there and back",
    "g": "single file, original layout",
    "h": "checkpointing, compile, float8",
}
BEGIN, END = "<!-- proofs: begin -->", "<!-- proofs: end -->"
_SIGNS = {"passed": "✓", "failed": "✗", "skipped": "–"}
_WEIGHT = {"skipped": 0, "passed": 1, "failed": 2}
_TEST = re.compile(r"test_zoo\.py::test_([a-h])_\w+\[([\w.-]+?)(?:-(?:diffusers|comfyui|kohya))?\](?:@.*)?$")


def outcomes(reports: Iterable[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """(node id, outcome) of every test -> variant -> column -> outcome; one failure fails a column, one skipped
    test (where others pass) is not counted."""
    found: dict[str, dict[str, str]] = {}
    for node, outcome in reports:
        if match := _TEST.search(node):
            column, case = match.groups()
            row = found.setdefault(case, {})
            row[column] = max(row.get(column, outcome), outcome, key=_WEIGHT.__getitem__)
    return found


def table(found: Mapping[str, Mapping[str, str]], order: Iterable[str]) -> str:
    """Markdown, in the order of the suite."""
    head = "| family | variant | " + " | ".join(COLUMNS) + " |"
    lines = [head, "|" + "---|" * (2 + len(COLUMNS))]
    for case in order:
        if case not in found:
            continue
        family, variant = case.split("-", 1)
        cells = [_SIGNS.get(found[case].get(column, ""), "") for column in COLUMNS]
        lines.append(f"| {family} | {variant} | " + " | ".join(cells) + " |")
    legend = "; ".join(f"**{letter}** {what}" for letter, what in COLUMNS.items())
    return "\n".join([*lines, "", legend + "."])


def read(page: Path) -> dict[str, dict[str, str]]:
    """The outcomes that a page's table shows, as `outcomes` gives them."""
    content = page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    names = {sign: outcome for outcome, sign in _SIGNS.items()}
    found: dict[str, dict[str, str]] = {}
    for line in content.splitlines()[2:]:
        if line.startswith("| "):
            family, variant, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[f"{family}-{variant}"] = {c: names[sign] for c, sign in zip(COLUMNS, cells, strict=True) if sign}
    return found


def merged(known: Mapping[str, Mapping[str, str]], found: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """What a run of some of the tests ``found``, over what was ``known`` of the others."""
    return {case: {**known.get(case, {}), **found.get(case, {})} for case in {**known, **found}}


def write(page: Path, text: str) -> None:
    """Put the table between the page's marks."""
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
