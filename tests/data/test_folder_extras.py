"""Captions from captions.json, and folders behind an address."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from test_folder import ACCOUNTED, inside, scan, touch

from kinema.errors import UserError


def test_captions_json(tmp_path: Path) -> None:
    """Names are paths from the folder of the file; a value is a caption or several."""
    touch(tmp_path, "a.png", "b.png", "sub/c.mp4", "sub/d.png", "e.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": " a dog\n", "./sub/c.mp4": ["one", "two"]}))
    (tmp_path / "sub" / "captions.json").write_text(json.dumps({"d.png": "d", "../b.png": "b"}))
    found = scan(tmp_path)
    assert [(inside(tmp_path, r.path), r.captions) for r in found.records] == [
        ("a.png", ("a dog",)), ("b.png", ("b",)), ("sub/c.mp4", ("one", "two")), ("sub/d.png", ("d",)),
    ]  # fmt: skip
    (entry,) = found.left_out
    assert (inside(tmp_path, entry.path), entry.code) == ("e.png", "no caption")
    assert found.counts["caption"] == 2
    assert found.counts["files"] == 7 == sum(found.counts[key] for key in ACCOUNTED)


def test_names_that_are_no_file_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "sub/b.png", "notes.md")
    names = {"a.png": "a", "b.png": "b", "gone.png": "c", "notes.md": "d"}
    (tmp_path / "captions.json").write_text(json.dumps(names))
    found = scan(tmp_path)
    reasons = {inside(tmp_path, e.path): e.reason for e in found.left_out if e.code == "caption without media"}
    assert set(reasons) == {"b.png", "gone.png", "notes.md"}
    assert "there is sub/b.png" in reasons["b.png"]
    assert "does not exist" in reasons["gone.png"]
    assert "no picture or video" in reasons["notes.md"]
    assert found.counts["caption without file"] == 3
    assert found.counts["files"] == 4 == sum(found.counts[key] for key in ACCOUNTED)


def test_two_captions_for_a_file_are_an_error_of_that_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", caption="by text")
    touch(tmp_path, "b.png", "sub/c.png", "d.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "x", "b.png": "y", "sub/c.png": "z", "d.png": "d"}))
    (tmp_path / "sub" / "captions.json").write_text(json.dumps({"c.png": "z"}))
    found = scan(tmp_path)
    assert [inside(tmp_path, r.path) for r in found.records] == ["b.png", "d.png"]
    assert {inside(tmp_path, e.path): e.reason for e in found.left_out if e.code == "two captions"} == {
        "a.png": "has its caption in a.txt and in captions.json: keep one of them",
        "sub/c.png": "has its caption in captions.json and in sub/captions.json: keep one of them",
    }
    assert found.counts["files"] == 7 == sum(found.counts[key] for key in ACCOUNTED)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n "a.png": "x",\n "b.png": \n}', "line 4: Expecting value"),
        ("[1]", "line 1: expected .*got a list"),
        ('{\n"a.png": 3}', "line 2: 'a.png': expected"),
        ('{"a.png": ["x", 3]}', "line 1: 'a.png': expected"),
        ('{"a.png": "x",\n"b.png": "y",\n"a.png": "z"}', "line 3: 'a.png' is given twice"),
        (b'{"a.png":\n"\xe9"}', "line 2: not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_captions_json_names_its_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "captions.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"captions\.json.*{words}"):
        scan(tmp_path)


def test_empty_ones_among_several_captions(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": ["x", ""], "b.png": ["", ""], "c.png": []}))
    found = scan(tmp_path)
    assert [r.captions for r in found.records] == [("x", ""), ("",)]
    assert found.counts["empty caption"] == 2
    assert [(inside(tmp_path, e.path), e.code) for e in found.left_out] == [("c.png", "no caption")]
    found = scan(tmp_path, captions={"empty": "leave_out"})
    assert [r.captions for r in found.records] == [("x",)]
    assert found.counts["empty among others"] == 1 and "empty caption" not in found.counts
    assert {inside(tmp_path, e.path): e.code for e in found.left_out} == {
        "b.png": "empty caption",
        "c.png": "no caption",
    }


def test_tars_among_media_are_not_lost(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", caption="x")
    touch(tmp_path, "shard.tar")
    (entry,) = scan(tmp_path).left_out
    assert entry.path.endswith("shard.tar") and "source of its own" in entry.reason


def test_a_folder_behind_an_address_is_scanned_alike(tmp_path: Path) -> None:
    """The same files, on disk and in fsspec's memory, give the same records, reasons and counts."""
    touch(tmp_path, "b.png", "sub/a.mp4", "c.jpg", caption="a caption")
    touch(tmp_path, "d.png", "e.xyz", ".hidden", ".git/config", "masks/b.png", "sub/deep/f.png")
    (tmp_path / "captions.json").write_text('{"d.png": ["x", "y"], "gone.png": ""}')
    remote = "memory://kinema-folder"
    storage = fsspec.filesystem("memory")
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        storage.pipe(f"{remote}/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    try:
        here = scan(tmp_path, masks=str(tmp_path / "masks"), captions={"missing": "empty"})
        there = scan(remote, masks=f"{remote}/masks", captions={"missing": "empty"})
    finally:
        storage.rm(remote, recursive=True)
    assert len(here) == 1 and here.records[0].mask == str(tmp_path / "masks/b.png")
    assert there.records[0].path == f"{remote}/b.png"

    def moved(location: str | None) -> str | None:
        return location and location.replace(remote, str(tmp_path))

    assert [(moved(r.path), r.captions, r.kind, moved(r.mask)) for r in there.records] == [
        (r.path, r.captions, r.kind, r.mask) for r in here.records
    ]
    assert [(moved(e.path), e.reason.replace(remote, str(tmp_path)), e.code) for e in there.left_out] == [
        (e.path, e.reason, e.code) for e in here.left_out
    ]
    assert there.counts == here.counts
