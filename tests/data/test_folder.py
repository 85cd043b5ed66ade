from __future__ import annotations

import os
from pathlib import Path

import pytest

from kinema.data.folder import scan, with_controls
from kinema.data.records import count_reasons
from kinema.errors import UserError

ACCOUNTED = ("image", "video", "caption", "hidden", "sidecar", "left out")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    for name in (
        "b.jpg",
        "A.PNG",
        "sub/clip.mp4",
        "nocaption.webp",
        "latin.png",
        "utf16.png",
        "blank.png",
        "data.xyz",
    ):
        (root / name).write_bytes(b"x")
    for name in (".hidden.png", "meta.json", "Thumbs.db", "noextension"):
        (root / name).write_bytes(b"x")
    (root / "b.txt").write_bytes(b"\xef\xbb\xbfa red ball\r\n")
    (root / "A.txt").write_text("ein Hund \u00fcber dem Zaun", encoding="utf-8")
    (root / "sub/clip.TXT").write_text("two lines\nof caption\n")
    (root / "latin.txt").write_bytes("\u00fcber".encode("latin-1"))
    (root / "utf16.txt").write_bytes("hello".encode("utf-16"))
    (root / "blank.txt").write_text(" \n")
    (root / "stray.txt").write_text("no picture")
    return root


def test_every_file_is_accounted_for(folder: Path) -> None:
    records, left_out, counts = scan(folder)
    assert [(r.path.relative_to(folder).as_posix(), r.kind, r.caption) for r in records] == [
        ("A.PNG", "image", "ein Hund \u00fcber dem Zaun"),
        ("b.jpg", "image", "a red ball"),
        ("blank.png", "image", ""),
        ("sub/clip.mp4", "video", "two lines\nof caption"),
    ]
    reasons = {entry.path.name: entry.reason for entry in left_out}
    assert set(reasons) == {
        "data.xyz",
        "noextension",
        "nocaption.webp",
        "latin.png",
        "utf16.png",
        "stray.txt",
    }
    assert "expected nocaption.txt beside it" in reasons["nocaption.webp"]
    assert "latin.txt is not UTF-8 (byte 0xfc at position 0)" in reasons["latin.png"]
    assert "looks like UTF-16" in reasons["utf16.png"]
    assert "no picture or video is named stray" in reasons["stray.txt"]
    assert ".xyz is no known" in reasons["data.xyz"]
    assert counts["empty caption"] == 1
    assert counts["hidden"] == 3  # a file, a folder, Thumbs.db
    on_disk = sum(len(files) for base, _, files in os.walk(folder) if ".git" not in base) + 1
    assert counts["files"] == on_disk == sum(counts.get(key, 0) for key in ACCOUNTED)
    assert count_reasons(left_out) == {
        "unknown extension": 2, "unreadable caption": 2, "caption without media": 1, "no caption": 1,
    }  # fmt: skip


def test_missing_captions_can_be_empty(folder: Path) -> None:
    records, left_out, counts = scan(folder, missing_caption="empty")
    assert next(r for r in records if r.path.name == "nocaption.webp").caption == ""
    assert counts["missing caption"] == 1
    assert "no caption" not in count_reasons(left_out)


def test_not_recursive_and_named(folder: Path) -> None:
    records, _, _ = scan(folder, source="mine", recursive=False)
    assert {r.path.name for r in records} == {"A.PNG", "b.jpg", "blank.png"}
    assert {r.source for r in records} == {"mine"}


def test_link_cycles_end(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    assert len(scan(folder)[0]) == 4


def test_scanning_reads_no_media(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Path.read_bytes

    def spy(path: Path) -> bytes:
        read.append(path.suffix.lower())
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", spy)
    scan(folder)
    assert set(read) == {".txt"}


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        scan(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        scan(tmp_path / "file")


def test_control_pictures_are_found_by_name(tmp_path: Path) -> None:
    """Under the same path below each folder of controls, whatever the extension; who lacks one is listed."""
    root, first, second = tmp_path / "target", tmp_path / "control", tmp_path / "control2"
    for folder, names in ((root, ("a.png", "sub/b.jpg", "c.png")), (first, ("a.jpg", "sub/b.png", "c.webp"))):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
            (folder / name).with_suffix(".txt").write_text("x")
    second.mkdir()
    for name in ("a.png", "c.png", "b.png"):
        (second / name).touch()
    records, _, _ = scan(root)
    kept, left_out = with_controls(records, root, (first, second))
    assert [(r.path.name, [c.relative_to(tmp_path).as_posix() for c in r.controls]) for r in kept] == [
        ("a.png", ["control/a.jpg", "control2/a.png"]),
        ("c.png", ["control/c.webp", "control2/c.png"]),
    ]
    (missing,) = left_out
    assert missing.path.name == "b.jpg" and missing.code == "no control picture" and "control2" in missing.reason
    with pytest.raises(UserError, match="nowhere"):
        with_controls(records, root, (tmp_path / "nowhere",))
