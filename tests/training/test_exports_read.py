"""The exports of a run, found and read back: foreign names, many steps, descriptions that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinema.errors import UserError
from kinema.runs.exports import list_exports, read_export, step_of
from kinema.runs.newest import newest
from kinema.ui.runfiles import read_run

FACTS = {"step": 7, "weights": {}, "adapters": {}, "model": {"family": "wan"}}


def described(place: Path, text: str = json.dumps(FACTS)) -> Path:
    place.mkdir(parents=True)
    (place / "kinema.json").write_text(text)
    return place


def test_steps_are_sorted_as_numbers_and_copies_are_no_steps(tmp_path: Path) -> None:
    names = ["step-99999999", "step-100000000", "step-00000007"]
    for name in (*names, "step-00000007-best", "step-best", "step-00000008-1"):
        described(tmp_path / "exports" / name)
    (tmp_path / "exports" / "step-00000009").mkdir()  # not complete
    found = list_exports(tmp_path / "exports")
    assert [path.name for path in found] == ["step-00000007", "step-99999999", "step-100000000"]
    assert list(map(step_of, found)) == [7, 99999999, 100000000]
    assert newest(tmp_path) == found[-1]
    assert read_run(tmp_path).exports == [path.name for path in found]
    assert read_export(tmp_path / "exports" / "step-00000007-best").step == 7, "a copy is read where it is asked for"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('"text"', "indices"),
        (json.dumps({"name": "of another tool"}), "it has no 'model'"),
        (json.dumps(FACTS | {"weights": ["network"]}), "no attribute 'items'"),
        (json.dumps(FACTS | {"step": None}), "NoneType"),
        (json.dumps(FACTS | {"model": {"family": "wan", "unheard_of": 1}}), "unheard_of"),
        ("\udcff", "utf-8"),
    ],
)
def test_a_damaged_description_is_named(tmp_path: Path, text: str, what: str) -> None:
    place = tmp_path / "export"
    place.mkdir()
    (place / "kinema.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"does not describe an export that this kinema reads.*Copy the export") as got:
        read_export(place)
    assert what in str(got.value) and str(place) in str(got.value) and "\n" not in str(got.value)
