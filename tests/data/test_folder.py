from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kinema.config.data import CaptionConfig, SourceConfig
from kinema.data.sources import caption_files
from kinema.data.sources.base import RecordList
from kinema.data.sources.folder import open_folder
from kinema.errors import UserError

ACCOUNTED = ("image", "video", "caption", "hidden", "sidecar", "left out")


def scan(folder: Path | str, name: str = "data", *, captions: dict[str, Any] | None = None, **keys: Any) -> RecordList:
    config = SourceConfig(path=str(folder), captions=CaptionConfig(**(captions or {})), **keys)
    return open_folder(config, name)


def inside(folder: Path, location: str) -> str:
    return Path(location).relative_to(folder).as_posix()


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
    (root / "sub/clip.TXT").write_text("two lines\nof  caption\n")
    (root / "latin.txt").write_bytes("\u00fcber".encode("latin-1"))
    (root / "utf16.txt").write_bytes("hello".encode("utf-16"))
    (root / "blank.txt").write_text(" \n")
    (root / "stray.txt").write_text("no picture")
    return root


def test_every_file_is_accounted_for(folder: Path) -> None:
    found = scan(folder)
    assert [(inside(folder, r.path), r.kind, r.captions) for r in found.records] == [
        ("A.PNG", "image", ("ein Hund \u00fcber dem Zaun",)),
        ("b.jpg", "image", ("a red ball",)),
        ("blank.png", "image", ("",)),
        ("sub/clip.mp4", "video", ("two lines\nof  caption",)),
    ]
    assert len(found) == 4 and found.record(1) == found.records[1] and found.columns() is None
    reasons = {Path(entry.path).name: entry.reason for entry in found.left_out}
    assert set(reasons) == {
        "data.xyz",
        "noextension",
        "nocaption.webp",
        "latin.png",
        "utf16.png",
        "stray.txt",
    }
    assert "expected nocaption.txt beside it" in reasons["nocaption.webp"]
    assert 'captions.missing = "empty"' in reasons["nocaption.webp"]
    assert "latin.txt is not UTF-8 (byte 0xfc at position 0)" in reasons["latin.png"]
    assert "looks like UTF-16" in reasons["utf16.png"]
    assert "no picture or video is named stray" in reasons["stray.txt"]
    assert ".xyz is no known" in reasons["data.xyz"]
    assert {entry.source for entry in found.left_out} == {"data"}
    assert found.counts["empty caption"] == 1
    assert found.counts["hidden"] == 3  # a file, a folder, Thumbs.db
    on_disk = sum(len(files) for base, _, files in os.walk(folder) if ".git" not in base) + 1
    assert found.counts["files"] == on_disk == sum(found.counts[key] for key in ACCOUNTED)
    assert Counter(entry.code for entry in found.left_out) == {
        "unknown extension": 2, "unreadable caption": 2, "caption without media": 1, "no caption": 1,
    }  # fmt: skip


def test_missing_captions_can_be_empty(folder: Path) -> None:
    found = scan(folder, captions={"missing": "empty"})
    assert next(r for r in found.records if r.path.endswith("nocaption.webp")).captions == ("",)
    assert found.counts["missing caption"] == 1
    assert "no caption" not in Counter(entry.code for entry in found.left_out)


def test_empty_captions_can_be_left_out(folder: Path) -> None:
    found = scan(folder, captions={"empty": "leave_out"})
    assert not any(r.path.endswith("blank.png") for r in found.records)
    (entry,) = (entry for entry in found.left_out if entry.code == "empty caption")
    assert entry.path.endswith("blank.png") and 'captions.empty = "keep"' in entry.reason
    assert "empty caption" not in found.counts


def test_the_order_depends_on_names_alone(folder: Path, tmp_path: Path) -> None:
    """The same names, made in another order elsewhere, give the same order."""
    other = tmp_path / "other"
    for path in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True):
        (other / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(folder)).write_bytes(path.read_bytes())
    first, second = scan(folder), scan(other)
    assert [inside(folder, r.path) for r in first.records] == [inside(other, r.path) for r in second.records]
    assert [inside(folder, e.path) for e in first.left_out] == [inside(other, e.path) for e in second.left_out]


def test_link_cycles_end(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    assert len(scan(folder)) == 4


def test_strange_names_and_links_do_not_stop_the_scan(folder: Path) -> None:
    (folder / "self.png").symlink_to("self.png")
    (folder / "self.txt").write_text("x")
    with open(os.fsencode(folder) + b"/\xff\xfe.png", "wb"):
        pass
    found = scan(folder)
    (entry,) = (entry for entry in found.left_out if entry.code == "bad name")
    assert entry.path.encode() and entry.path.endswith(".png") and "not UTF-8" in entry.reason
    assert inside(folder, found.records[3].path) == "self.png"  # opening it will say what is wrong


def test_scanning_reads_no_media(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = caption_files.read_bytes

    def spy(location: str) -> bytes:
        read.append(Path(location).suffix.lower())
        return original(location)

    monkeypatch.setattr(caption_files, "read_bytes", spy)
    scan(folder)
    assert set(read) == {".txt"}


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        scan(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        scan(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every folder")
def test_a_folder_that_may_not_be_read_is_listed(folder: Path) -> None:
    (folder / "sub").chmod(0)
    try:
        found = scan(folder)
    finally:
        (folder / "sub").chmod(0o755)
    (entry,) = (entry for entry in found.left_out if entry.code == "unreadable folder")
    assert inside(folder, entry.path) == "sub" and "permissions" in entry.reason


def touch(root: Path, *names: str, caption: str = "") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
        if caption:
            (root / name).with_suffix(".txt").write_text(caption)


def test_control_pictures_are_found_by_name(tmp_path: Path) -> None:
    """Under the same path below each folder of controls, whatever the extension; who lacks one is listed."""
    root, first, second = tmp_path / "target", tmp_path / "control", tmp_path / "control2"
    touch(root, "a.png", "sub/b.jpg", "c.png", caption="x")
    touch(first, "a.jpg", "sub/b.png", "c.webp", "alone.png", "video.mp4")
    touch(second, "a.png", "c.png", "b.png")
    found = scan(root, controls=(str(first), str(second)))
    assert [(inside(root, r.path), [inside(tmp_path, c) for c in r.controls]) for r in found.records] == [
        ("a.png", ["control/a.jpg", "control2/a.png"]),
        ("c.png", ["control/c.webp", "control2/c.png"]),
    ]
    (missing,) = found.left_out
    assert missing.path.endswith("b.jpg") and missing.code == "no control picture"
    assert "expected sub/b" in missing.reason and "control2" in missing.reason
    assert found.counts["control picture without media"] == 2  # alone.png, and b.png that is not in sub
    assert found.counts["files"] == 6 == sum(found.counts[key] for key in ACCOUNTED)
    with pytest.raises(UserError, match="nowhere"):
        scan(root, controls=(str(tmp_path / "nowhere"),))
    with pytest.raises(UserError, match="folder of the media"):
        scan(root, controls=(f"{root}/",))


def test_of_two_control_pictures_that_of_the_same_extension_is_used(tmp_path: Path) -> None:
    root, controls = tmp_path / "target", tmp_path / "control"
    touch(root, "a.png", "b.gif", caption="x")
    touch(controls, "a.png", "a.jpg", "b.png", "b.jpg")
    found = scan(root, controls=(str(controls),))
    assert [inside(tmp_path, r.controls[0]) for r in found.records] == ["control/a.png"]
    (entry,) = found.left_out
    assert entry.code == "two control pictures" and "b.jpg and b.png" in entry.reason


def test_masks(tmp_path: Path) -> None:
    root, masks = tmp_path / "media", tmp_path / "masks"
    touch(root, "a.png", "b.mp4", "c.png", caption="x")
    touch(masks, "a.jpg", "b.mkv", "unused.png")
    found = scan(root, masks=str(masks))
    assert [(inside(root, r.path), r.mask and inside(masks, r.mask)) for r in found.records] == [
        ("a.png", "a.jpg"),
        ("b.mp4", "b.mkv"),
    ]
    (entry,) = found.left_out
    assert entry.code == "no mask" and entry.path.endswith("c.png")
    assert "expected c " in entry.reason and "default_mask" in entry.reason
    assert found.counts["mask without media"] == 1
    assert found.records[0].files == (found.records[0].path, found.records[0].mask)

    default = tmp_path / "white.png"
    default.touch()
    found = scan(root, masks=str(masks), default_mask=str(default))
    assert found.records[2].mask == str(default) and not found.left_out
    assert {r.mask for r in scan(root, default_mask=str(default)).records} == {str(default)}
    with pytest.raises(UserError, match=r"default_mask.*nothing\.png"):
        scan(root, default_mask=str(tmp_path / "nothing.png"))
    with pytest.raises(UserError, match="masks: there is no folder"):
        scan(root, masks=str(tmp_path / "nowhere"))


def test_masks_within_the_folder_are_no_media(tmp_path: Path) -> None:
    """Else they would be trained on, where missing captions are allowed."""
    touch(tmp_path, "a.png", "masks/a.png", "masks/sub/b.png", "controls/a.png", "all.png")
    found = scan(
        tmp_path, captions={"missing": "empty"}, masks=str(tmp_path / "masks"), controls=(str(tmp_path / "controls"),),
        default_mask=str(tmp_path / "all.png"),
    )  # fmt: skip
    (record,) = found.records
    assert inside(tmp_path, record.path) == "a.png" and record.mask == str(tmp_path / "masks/a.png")
    assert found.counts["files"] == 1
