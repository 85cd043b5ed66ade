"""WebDataset shards, and how the type of a source is told."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from media_files import shared_clips
from test_folder import touch

from kinema.config.data import CaptionConfig, SourceConfig
from kinema.data.files import open_binary
from kinema.data.records import Record
from kinema.data.sources import tar
from kinema.data.sources.base import MediaColumns
from kinema.data.sources.open import open_source, source_name
from kinema.data.sources.tar import TarSource, open_tar
from kinema.errors import UserError

ACCOUNTED = ("image", "video", "caption", "mask", "control", "sidecar", "hidden", "left out")


def write_tar(path: Path, members: list[tuple[str, bytes | str | dict[str, Any]]]) -> Path:
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            text = json.dumps(content) if isinstance(content, dict) else content
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def scan(path: Path | str, name: str = "data", *, captions: dict[str, Any] | None = None, **keys: Any) -> TarSource:
    return open_tar(SourceConfig(path=str(path), captions=CaptionConfig(**(captions or {})), **keys), name)


def records(found: TarSource) -> list[Record]:
    return [found.record(row) for row in range(len(found))]


def names(found: TarSource) -> list[str]:
    return [record.path.partition("::")[2] for record in records(found)]


def accounted(found: TarSource) -> bool:
    return found.counts["files"] == sum(found.counts[key] for key in ACCOUNTED)


def test_samples_of_a_tar(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        [
            ("b.jpg", b"1"), ("b.txt", "a ball\n"), ("b.cls", b"7"),
            ("sub/b.mp4", b"2"), ("sub/b.json", {"caption": ["one", "two"], "motion": 4, "url": "there"}),
            ("./a.1.PNG", b"3"), ("./a.TXT", "  an apple"), ("a.mask.png", b"m"),
            ("c.png", b"4"), ("c.txt", "edit"), ("c.control1.png", b"k"), ("c.control.jpg", b"k"),
            ("._b.jpg", b"mac"), ("__MACOSX/b.jpg", b"mac"), ("noextension", b"?"),
        ],
    )  # fmt: skip
    found = scan(tar)
    assert [
        (name, r.captions, r.kind, dict(r.scores), dict(r.extras), r.source)
        for name, r in zip(names(found), records(found), strict=True)
    ] == [
        ("./a.1.PNG", ("an apple",), "image", {}, {}, "data"),
        ("b.jpg", ("a ball",), "image", {}, {}, "data"),
        ("c.png", ("edit",), "image", {}, {}, "data"),
        ("sub/b.mp4", ("one", "two"), "video", {"motion": 4.0}, {"url": "there"}, "data"),
    ]  # fmt: skip
    assert [r.mask for r in records(found)] == [f"{tar}::a.mask.png", None, None, None]
    assert records(found)[2].controls == (f"{tar}::c.control.jpg", f"{tar}::c.control1.png")
    (entry,) = found.left_out
    assert entry.path == f"{tar}::noextension" and entry.code == "no media"
    assert dict(found.counts) == {
        "files": 15, "image": 3, "video": 1, "caption": 4, "mask": 1, "control": 2, "sidecar": 1, "hidden": 2,
        "left out": 1,
    }  # fmt: skip
    assert found.columns() is None and accounted(found)


def test_every_member_is_accounted_for(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", b"thumbnail"), ("a.mp4", b"video"), ("a.txt", "x"), ("a.TXT", "y"),
            ("b.png", b"1"), ("b.mask.png", b"m"), ("b.mask.jpg", b"m"), ("b.txt", "b"),
            ("c.txt", "alone"), ("c.npy", b"alone"),
            ("d.png", b"1"),
            ("e.png", b"1"), ("e.txt", "\u00fc".encode("latin-1")),
            ("f.png", b"1"), ("f.json", "{"),
            ("g.png", b"1"), ("g.json", "[1]"),
            ("h.png", b"1"), ("h.json", {"caption": 7}),
            ("i.png", b"1"), ("i.txt", "i"), ("i.control1.png", b"k"),
            ("j.png", b"1"), ("j.txt", "j"), ("j.control.png", b"k"), ("j.control0.png", b"k"),
            ("k.png", b"old"), ("k.txt", "k"), ("k.png", b"new"),
            ("l.png", b"1"), ("l.txt", ""),
            ("m.mp4", b"1"), ("m.json", {"caption": "m", "start": 3, "end": 2}),
            ("n.png", b"1"), ("n.json", {"caption": "n", "crop": [0, 0, 0, 9]}),
            ("o.png", b"1"), ("o.json", {"text": ""}),
        ],
    )  # fmt: skip
    found = scan(tar, captions={"empty": "leave_out"})
    assert names(found) == ["a.mp4", "b.png", "j.png", "k.png"]
    assert [(e.path.partition("::")[2], e.code) for e in found.left_out] == [
        ("a.TXT", "second caption"), ("a.jpg", "second media"), ("b.mask.jpg", "second mask"),
        ("c.txt", "no media"), ("d.png", "no caption"), ("e.png", "unreadable caption"),
        ("f.png", "unreadable caption"), ("g.png", "unreadable caption"), ("h.png", "unreadable caption"),
        ("i.png", "no control picture"), ("j.control0.png", "second control"), ("k.png", "replaced member"),
        ("l.png", "empty caption"), ("m.mp4", "bad cut"), ("n.png", "bad crop"), ("o.png", "empty caption"),
    ]  # fmt: skip
    reasons = {e.path.partition("::")[2]: e.reason for e in found.left_out}
    assert "sample of a.mp4" in reasons["a.jpg"] and "c.txt, c.npy" in reasons["c.txt"]
    assert "expected d.txt in the tar" in reasons["d.png"] and "not UTF-8" in reasons["e.png"]
    assert "no JSON" in reasons["f.png"] and "got a list" in reasons["g.png"] and "'caption'" in reasons["h.png"]
    assert "[1] and none with the number 0" in reasons["i.png"]
    assert "from 3 s to 2 s" in reasons["m.mp4"] and "[0, 0, 0, 9]" in reasons["n.png"]
    assert accounted(found) and found.counts["files"] == 37
    with open_binary(records(found)[3].path) as file:
        assert file.read() == b"new"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("\udcff.png", b"1"), ("\u00fc.png", b"1"), ("\u00fc.txt", "x")])
    found = scan(path)
    assert names(found) == ["\u00fc.png"]
    (entry,) = found.left_out
    assert entry.code == "bad name" and entry.path.encode() and accounted(found)
    with open_binary(found.record(0).path) as file:
        assert file.read() == b"1"


def test_missing_and_empty_captions_can_be_used(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.png", b"1"), ("b.png", b"1"), ("b.txt", " ")])
    found = scan(tar, captions={"missing": "empty"})
    assert [r.captions for r in records(found)] == [("",), ("",)] and not found.left_out
    assert found.counts["missing caption"] == 1 and found.counts["empty caption"] == 1


def test_a_text_goes_before_a_caption_in_the_json(tmp_path: Path) -> None:
    """img2dataset writes both; where they differ it is counted."""
    tar = write_tar(
        tmp_path / "x.tar",
        [("a.png", b"1"), ("a.txt", "same"), ("a.json", {"caption": "same "}), ("b.png", b"1"), ("b.txt", "new"),
         ("b.json", {"caption": "old"})],
    )  # fmt: skip
    found = scan(tar)
    assert [r.captions for r in records(found)] == [("same",), ("new",)]
    assert found.counts["other caption in .json"] == 1


def test_what_the_json_says_of_the_media(tmp_path: Path) -> None:
    base = {"caption": "x", "width": 640, "height": 480}
    tar = write_tar(
        tmp_path / "x.tar",
        [
            ("a.png", b"1"), ("a.json", base | {"crop": [40, 80, 600, 400]}),
            ("b.mp4", b"1"), ("b.json", base | {"num_frames": 120, "fps": "24", "score_vmafmotion": 2.5}),
            ("c.mp4", b"1"), ("c.json", base | {"num_frames": 120}),
            ("d.mp4", b"1"), ("d.json", base | {"num_frames": 120, "fps": 24, "start": 1, "end": 3}),
            ("e.png", b"1"), ("e.json", {"caption": "x", "width": float("nan"), "height": 3}),
        ],
    )  # fmt: skip
    found = scan(tar)
    columns = found.columns()
    assert columns is not None
    assert columns.known.tolist() == [True, True, False, True, False]
    assert columns.width[[0, 1, 3]].tolist() == [560, 640, 640] and columns.height[[0, 1]].tolist() == [320, 480]
    assert columns.frames[[0, 1, 3]].tolist() == [1, 120, 48] and columns.fps[[0, 1, 3]].tolist() == [0, 24, 24]
    assert columns.duration[[1, 3]].tolist() == [5, 2] and columns.offset.tolist() == [0, 0, 0, 1, 0]
    assert columns.video.tolist() == [False, True, False, True, False]
    assert records(found)[0].crop == (40, 80, 600, 400) and records(found)[3].cut == (1.0, 3.0)
    assert dict(records(found)[1].scores) == {"motion": 2.5, "fps": 24.0}


def test_columns_follow_the_records_that_are_kept(tmp_path: Path) -> None:
    """Those left out for the lack of a mask leave no row behind."""
    members: list[tuple[str, Any]] = []
    for n in range(4):
        members += [(f"{n}.png", b"1"), (f"{n}.json", {"caption": "x", "width": 100 + n, "height": 50})]
    touch(tmp_path / "masks", "1.png", "3.png", "9.png")
    found = scan(write_tar(tmp_path / "x.tar", members), masks=str(tmp_path / "masks"))
    columns = found.columns()
    assert columns is not None and columns.width.tolist() == [101, 103] and names(found) == ["1.png", "3.png"]
    assert [record.mask for record in records(found)] == [f"{tmp_path}/masks/{n}.png" for n in (1, 3)]
    assert Counter(entry.code for entry in found.left_out) == {"no mask": 2} and found.counts["mask without media"] == 1
    assert accounted(found)


def test_a_truncated_tar_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    """And listed once; other tars are used whole."""
    members: list[tuple[str, Any]] = []
    for n in range(6):
        members += [(f"{n}.png", b"x" * 3000), (f"{n}.txt", f"caption {n}")]
    write_tar(tmp_path / "b.tar", members)
    whole = write_tar(tmp_path / "a.tar", members).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 - 3000])
    (tmp_path / "c.tar").write_bytes(b"this is no tar" * 100)
    (tmp_path / "d.tar").write_bytes(b"")
    found = scan(tmp_path)
    damaged = [entry for entry in found.left_out if entry.code == "damaged tar"]
    assert [entry.path for entry in damaged] == [str(tmp_path / f"{n}.tar") for n in "acd"]
    assert "ends within" in damaged[0].reason and "no tar file" in damaged[1].reason
    used = [record.path for record in records(found)]
    assert [path for path in used if "b.tar" in path] == [f"{tmp_path}/b.tar::{n}.png" for n in range(6)]
    first = [path for path in used if "a.tar" in path]
    assert first == [f"{tmp_path}/a.tar::{n}.png" for n in range(len(first))] and 1 <= len(first) <= 3
    for record in records(found):
        with open_binary(record.path) as file:
            assert len(file.read()) == 3000


def test_shards_by_folder_and_pattern(tmp_path: Path) -> None:
    """Order depends on names alone, not on the order within the tars."""
    for shard, order in (("s-02", "ba"), ("s-00", "ab"), ("sub/s-01", "ba")):
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / f"{shard}.tar", [m for n in order for m in ((f"{n}.png", b"1"), (f"{n}.txt", n))])
    touch(tmp_path, "s-00.json", ".hidden", "stray.png", "sizes.txt")
    found = scan(tmp_path)
    assert [r.path.removeprefix(f"{tmp_path}/") for r in records(found)] == [
        f"{shard}.tar::{n}.png" for shard in ("s-00", "s-02", "sub/s-01") for n in "ab"
    ]
    (stray,) = found.left_out
    assert stray.path == f"{tmp_path}/stray.png" and "no tar file" in stray.reason
    assert accounted(found) and found.counts["sidecar"] == 2 and found.counts["hidden"] == 1
    assert len(scan(f"{tmp_path}/s-{{00,02}}.tar")) == 4 and len(scan(f"{tmp_path}/**/*.tar")) == 6
    found = scan(f"{tmp_path}/s-{{00..02}}.tar")
    assert len(found) == 4 and [(e.path, e.code) for e in found.left_out] == [(f"{tmp_path}/s-01.tar", "missing")]
    for wrong, words in ((f"{tmp_path}/x*.tar", "no file"), (f"{tmp_path}/sub/none", "does not exist")):
        with pytest.raises(UserError, match=words):
            open_source(SourceConfig(path=wrong, type="tar"), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tar file in the folder"):
        scan(tmp_path / "empty")


def test_remote_shards_give_the_same_records(tmp_path: Path) -> None:
    picture = b"p" * 5000
    for shard in range(3):
        members = [m for n in range(4) for m in ((f"{n}.jpg", picture), (f"{n}.json", {"text": f"{shard} {n}"}))]
        write_tar(tmp_path / f"{shard}.tar", members)
    storage, remote = fsspec.filesystem("memory"), "memory://kinema-shards"
    for path in tmp_path.glob("*.tar"):
        storage.pipe(f"{remote}/{path.name}", path.read_bytes())
    try:
        here, there = scan(tmp_path), scan(remote)
        assert [(r.path.replace(remote, str(tmp_path)), r.captions) for r in records(there)] == [
            (r.path, r.captions) for r in records(here)
        ]
        assert len(there) == 12 and there.counts == here.counts
        with open_binary(records(there)[7].path) as file:
            assert file.read() == picture
        assert len(scan(f"{remote}/{{0..1}}.tar")) == 8
    finally:
        storage.rm(remote, recursive=True)


def test_what_was_read_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar that did not change is not opened again; one that did, or is new, is; results equal those without."""
    base = {"width": 8, "height": 9, "motion": 2, "k": [1, {"x": None}]}
    (tmp_path / "tars").mkdir()
    for shard in "abc":
        members: list[tuple[str, Any]] = [(f"{shard}.png", b"1"), (f"{shard}.json", base | {"caption": [shard, "x"]})]
        write_tar(tmp_path / "tars" / f"{shard}.tar", [*members, ("n.png", b"1")])
    (tmp_path / "tars" / "c.tar").write_bytes(b"no tar")
    touch(tmp_path / "masks", "a.png", "n.png")
    read: list[str] = []
    original = tar.read_tar

    def spy(location: str, config: CaptionConfig) -> Any:
        read.append(location[-5:])
        return original(location, config)

    monkeypatch.setattr(tar, "read_tar", spy)

    def check(expected: list[str], **keys: Any) -> None:
        read.clear()
        config = SourceConfig(path=str(tmp_path / "tars"), captions=CaptionConfig(**keys.pop("captions", {})), **keys)
        found = open_tar(config, "data", tmp_path / "store")
        assert read == expected
        plain = open_tar(config, "data")
        assert records(found) == records(plain) and [r.extras for r in records(found)] == [
            r.extras for r in records(plain)
        ]
        assert found.left_out == plain.left_out and found.counts == plain.counts
        ours, theirs = found.columns(), plain.columns()
        for one in dataclasses.fields(MediaColumns):
            assert np.array_equal(getattr(ours, one.name), getattr(theirs, one.name))

    check(["a.tar", "b.tar", "c.tar"])
    check(["c.tar"])  # what could not be read is tried again
    check(["c.tar"], masks=str(tmp_path / "masks"))
    write_tar(tmp_path / "tars" / "c.tar", [("c.png", b"1"), ("c.txt", "now whole")])
    check(["c.tar"])
    check([])
    check([], masks=str(tmp_path / "masks"), default_mask=str(tmp_path / "masks" / "a.png"))
    check(["a.tar", "b.tar", "c.tar"], captions={"missing": "empty"})
    write_tar(tmp_path / "tars" / "d.tar", [("d.png", b"1"), ("d.txt", "new")])
    (tmp_path / "tars" / "a.tar").unlink()
    check(["d.tar"])
    for file in (tmp_path / "store").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    check(["b.tar", "c.tar", "d.tar"])


def test_a_source_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    found = scan(write_tar(tmp_path / "x.tar", [("a.png", b"1"), ("a.json", {"caption": "x", "motion": 1, "k": "v"})]))
    assert records(pickle.loads(pickle.dumps(found))) == records(found)


def test_real_clips_in_a_tar_decode_as_from_the_disk(tmp_path: Path) -> None:
    import av

    clips = sorted(shared_clips().glob("*.m[kp]*"))[:3]
    members: list[tuple[str, Any]] = []
    for clip in clips:
        members += [(clip.name, clip.read_bytes()), (f"{clip.stem}.txt", clip.stem)]
    found = scan(write_tar(tmp_path / "clips.tar", members))
    assert [record.captions[0] for record in records(found)] == [clip.stem for clip in clips]
    for clip, record in zip(clips, records(found), strict=True):
        with open_binary(record.path) as file, av.open(file) as ours, av.open(str(clip)) as reference:
            for _, first, second in zip(range(5), ours.decode(video=0), reference.decode(video=0), strict=False):
                assert np.array_equal(first.to_ndarray(), second.to_ndarray())


# ----------------------------------------------------------------------------------- what lies at a path


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def source_at(path: Path | str, **keys: Any) -> Any:
    return open_source(SourceConfig(path=str(path), captions=CaptionConfig(), **keys), 1)


def test_the_type_is_told_by_what_lies_there(tmp_path: Path) -> None:
    touch(tmp_path / "media", "sub/a.png", caption="x")
    tar = write_tar(tmp_path / "x.tar", [("a.png", b"1"), ("a.txt", "x")])
    (tmp_path / "shards" / "deep").mkdir(parents=True)
    (tmp_path / "shards" / "deep" / "y.tar").write_bytes(tar.read_bytes())
    (tmp_path / "shards" / "y.json").write_text("{}")
    (tmp_path / "t.csv").write_text("path,text\nmedia/sub/a.png,x\n")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "t.csv").write_text("path,text\n../media/sub/a.png,x\n")
    (tmp_path / "nothing").mkdir()
    kinds = {
        name: type(source_at(tmp_path / name)).__name__
        for name in ("media", "x.tar", "shards", "nothing", "t.csv", "?.tar", "*.csv", "shards/*/*", "csv")
    }
    assert kinds["media"] == kinds["nothing"] == "RecordList"
    assert kinds["x.tar"] == kinds["shards"] == kinds["?.tar"] == kinds["shards/*/*"] == "TarSource"
    assert kinds["t.csv"] == kinds["*.csv"] == kinds["csv"] and kinds["t.csv"] not in ("RecordList", "TarSource")
    for name in ("media", "shards", "t.csv"):
        assert len(source_at(tmp_path / name)) == 1
    touch(tmp_path / "shards", "deep/a.png", caption="x")
    assert [e.path for e in source_at(tmp_path / "shards").left_out] == [str(tmp_path / "shards/deep/y.tar")]
    assert isinstance(source_at(tmp_path / "shards", type="tar"), TarSource)


def test_what_is_no_source_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "tables", "sub/b.csv")
    touch(tmp_path, "file.xyz", "a.png", "x.tar.gz")
    (tmp_path / "sub").mkdir()
    for path, words in {
        "nowhere": r"number 2: the folder .*nowhere does not exist", "nowhere.tar": "nowhere.tar does not exist",
        "nowhere.csv": "does not exist", "file.xyz": "is a file, not a folder", "x.tar.gz": "unpack it",
        "tables": r"give .*/tables/\*\*/\*\.csv", "*.png": "each folder of media", "s*": "each folder of media",
        "none*": "nothing matches",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            source_at(tmp_path / path)


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_name("/data/cats/") == "cats" and source_name("s3://b/x.tar") == "x.tar"
    assert source_name(".") == tmp_path.name and source_name("a/{0..3}.tar") == "{0..3}.tar"
    touch(tmp_path / "cats", "a.png", caption="x")
    assert source_at("cats").name == source_at("cats").record(0).source == "cats"
    assert source_at("cats", name="mine").name == "mine"
