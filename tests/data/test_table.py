"""The table source: what a csv, tsv, parquet or jsonl file says, read back row by row and as columns."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinema.config.data import DataConfig, SourceConfig
from kinema.data.records import LeftOut, MediaError, MediaInfo, Record
from kinema.data.sources.base import MediaColumns, columns_of
from kinema.data.sources.table import Table, open_table
from kinema.errors import UserError

OPEN_SORA = ["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"]


def settled(path: Path | str, **given: Any) -> SourceConfig:
    return DataConfig(sources=(SourceConfig(path=str(path), **given),)).sources[0]


def opened(path: Path | str, store: Path, **given: Any) -> Table:
    table = open_table(settled(path, **given), "clips", store)
    assert isinstance(table, Table)
    return table


def write_csv(path: Path, rows: list[list[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_any(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows in the format of the path's extension; None: not given."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix in (".csv", ".tsv"):
        cells = [["" if row.get(name) is None else row[name] for name in names] for row in rows]
        write_csv(path, [names, *cells], "\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def records(table: Table) -> list[Record]:
    return [table.record(row) for row in range(len(table))]


def refused(path: Path | str, store: Path, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, store, **given)
    assert not list(store.glob("*.part")), "an unfinished store was left"
    return str(caught.value)


KINDS = [".csv", ".tsv", ".parquet", ".jsonl", ".json"]


@pytest.mark.parametrize("kind", KINDS)
def test_open_soras_table_is_read_whole(tmp_path: Path, kind: str) -> None:
    rows = [
        {"path": "a/one.mp4", "text": 'a "quoted", long\ncaption', "num_frames": 51, "height": 720, "width": 1280,
         "aspect_ratio": 0.5625, "resolution": 921600, "fps": 23.976, "score_vmafmotion": 4.5, "ref": "r1.png;r2.png",
         "name": "hills", "neg": "blur"},
        {"path": "/data/two.PNG", "text": "eine Straße, 東京", "num_frames": 1, "height": 48, "width": 64,
         "aspect_ratio": 0.75, "resolution": 3072, "fps": 120.0, "score_vmafmotion": None, "ref": None, "name": None,
         "neg": None},
        {"path": "s3://bucket/three.webm", "text": "", "num_frames": None, "height": 9, "width": 16,
         "aspect_ratio": None, "resolution": None, "fps": None, "score_vmafmotion": None, "ref": None, "name": None,
         "neg": None},
    ]  # fmt: skip
    table = opened(write_any(tmp_path / f"clips{kind}", rows), tmp_path / "store")
    one, two, three = records(table)
    assert one == Record(
        path=str(tmp_path / "a/one.mp4"),
        captions=('a "quoted", long\ncaption',),
        kind="video",
        source="clips",
        scores={"motion": 4.5, "fps": 23.976},
    )
    assert dict(one.extras) == {"ref": "r1.png;r2.png", "name": "hills", "neg": "blur"}
    assert two == Record(path="/data/two.PNG", captions=("eine Straße, 東京",), kind="image", source="clips")
    assert three == Record(path="s3://bucket/three.webm", captions=("",), kind="video", source="clips")
    assert dict(three.extras) == {}
    assert table.counts == {"video": 2, "image": 1, "empty caption": 1}
    assert len(table.left_out) == 0 and list(table.left_out) == []
    columns = table.columns()
    assert columns is not None
    assert columns.known.tolist() == [True, True, False]
    assert columns.video.tolist() == [True, False, True]
    assert columns.frames.tolist() == [51, 1, 0]
    assert columns.fps.tolist() == [23.976, 0, 0]
    assert columns.duration.tolist() == [51 / 23.976, 0, 0]
    assert columns.width.tolist() == [1280, 64, 0] and columns.height.tolist() == [720, 48, 0]
    assert [columns.width.dtype, columns.fps.dtype, columns.known.dtype] == [np.int32, np.float64, np.bool_]


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".json", ".csv"])
def test_our_own_columns(tmp_path: Path, kind: str) -> None:
    listed = kind != ".csv"
    rows = [
        {"path": "one.mp4", "text": ["first", " second "] if listed else "first",
         "crop": [10, 20, 110, 220] if listed else "10, 20,110,220",
         "start": 1.5, "end": 3.0, "controls": ["c0.png", "/c/1.png"] if listed else "c0.png; /c/1.png",
         "mask": "m.png", "motion": 3, "aesthetic": 5.5, "shot": 7},
        {"path": "two.jpg", "text": ["only"] if listed else "only", "crop": None, "start": None, "end": 2.0,
         "controls": [] if listed else "", "mask": None, "motion": None, "aesthetic": float("nan"), "shot": 8},
        {"path": "three.mp4", "text": ["third"] if listed else "third", "crop": None, "start": 2.0, "end": None,
         "controls": None, "mask": "", "motion": None, "aesthetic": None, "shot": None},
        {"path": "four.mp4", "text": ["fourth"] if listed else "fourth", "crop": None, "start": None, "end": 4.0,
         "controls": None, "mask": "nan", "motion": None, "aesthetic": None, "shot": None},
    ]  # fmt: skip
    table = opened(write_any(tmp_path / f"own{kind}", rows), tmp_path / "store", root="/root/of/media")
    one, two, three, four = records(table)
    assert one.captions == (("first", "second") if listed else ("first",))
    assert one.crop == (10, 20, 110, 220) and all(type(edge) is int for edge in one.crop)
    assert one.cut == (1.5, 3.0) and two.cut is None and three.cut == (2.0, None) and four.cut == (0.0, 4.0)
    assert one.controls == ("/root/of/media/c0.png", "/c/1.png") and two.controls == () == three.controls
    assert one.mask == "/root/of/media/m.png" and two.mask is None and three.mask is None and four.mask is None
    assert dict(one.scores) == {"motion": 3.0, "aesthetic": 5.5} and dict(two.scores) == {}
    assert {name: int(value) for name, value in one.extras.items()} == {"shot": 7} and "shot" not in three.extras
    assert table.columns() is None, "a table that says nothing of sizes has no columns"


def test_a_default_mask_stands_in(tmp_path: Path) -> None:
    mask = tmp_path / "white.png"
    mask.write_bytes(b"stands for a picture")
    rows = [{"path": "a.mp4", "text": "x", "mask": "m.png"}, {"path": "b.mp4", "text": "y", "mask": None}]
    table = opened(write_any(tmp_path / "t.jsonl", rows), tmp_path / "store", default_mask=str(mask))
    assert [record.mask for record in records(table)] == [str(tmp_path / "m.png"), str(mask)]
    with pytest.raises(MediaError, match="none\\.png"):
        opened(tmp_path / "t.jsonl", tmp_path / "store", default_mask=str(tmp_path / "none.png"))


def test_folders_of_controls_and_masks_are_refused(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["path", "text"], ["a.mp4", "b"]])
    assert "column 'controls'" in refused(table, tmp_path / "store", controls=(str(tmp_path),))
    assert "column 'mask'" in refused(table, tmp_path / "store", masks=str(tmp_path))


@pytest.mark.parametrize("missing", ["leave_out", "empty"])
@pytest.mark.parametrize("empty", ["keep", "leave_out"])
def test_captions_that_are_missing_or_empty(tmp_path: Path, missing: str, empty: str) -> None:
    """Both policies over one store: another policy needs no other copy of the table."""
    texts: list[Any] = [
        "good",
        None,
        "",
        "  \n",
        "nan",
        "NULL",
        "\u3000",
        "nancy",
        ["x", None, ""],
        [],
        ["", " "],
        [None],
    ]
    rows = [{"path": f"{number}.mp4", "text": text} for number, text in enumerate(texts)]
    config = {"captions": {"missing": missing, "empty": empty}}
    table = opened(write_any(tmp_path / "t.jsonl", rows), tmp_path / "store", **config)
    gone, blank = {1, 4, 5, 9, 11}, {2, 3, 6, 10}
    used = (
        set(range(len(texts)))
        - (gone if missing == "leave_out" else set())
        - (blank if empty == "leave_out" else set())
    )
    by_number = {int(Path(record.path).stem): record.captions for record in records(table)}
    assert set(by_number) == used
    assert by_number[0] == ("good",) and by_number[7] == ("nancy",)
    assert by_number[8] == (("x", "") if empty == "keep" else ("x",))
    assert all(by_number[number] in (("",), ("", "")) for number in used & (gone | blank))
    left = {int(Path(entry.path).stem): entry for entry in table.left_out}
    assert set(left) == set(range(len(texts))) - used
    assert {entry.code for number, entry in left.items() if number in gone} <= {"no caption"}
    assert {entry.code for number, entry in left.items() if number in blank} <= {"empty caption"}
    assert all(f"row {number + 1} of t.jsonl" in entry.reason for number, entry in left.items())
    assert table.counts["missing caption"] == (5 if missing == "empty" else 0)
    assert table.counts["empty caption"] == (4 if empty == "keep" else 0)
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_rows_that_are_no_records_are_listed_with_their_reason(tmp_path: Path) -> None:
    header = ["path", "text", "height", "start", "end", "crop"]
    rows = [
        ["good.mp4", "c", "720", "0", "2", ""],
        ["", "c", "720", "", "", ""],
        ["notes.txt", "c", "720", "", "", ""],
        ["no_extension", "c", "720", "", "", ""],
        ["tall.mp4", "c", "tall", "", "", ""],
        ["back.mp4", "c", "720", "3", "2", ""],
        ["early.mp4", "c", "720", "-1", "2", ""],
        ["still.png", "c", "720", "0", "0", ""],
        ["still.mp4", "c", "720", "1", "1", ""],
        ["three.mp4", "c", "720", "", "", "1,2,3"],
        ["turned.mp4", "c", "720", "", "", "[50, 0, 10, 10]"],
        ["whole.mp4", "c", " NaN ", "", "nan", "[0, 0, 10, 10]"],
        ["stamp.mp4", "c", "720", "00:01", "", ""],
    ]
    path = write_csv(tmp_path / "t.csv", [header, *rows])
    table = opened(path, tmp_path / "store")
    assert [Path(record.path).name for record in records(table)] == ["good.mp4", "still.png", "whole.mp4"]
    assert table.record(2).crop == (0, 0, 10, 10)
    left = list(table.left_out)
    expected = [
        (1, "no path", "has no path"),
        (2, "unknown extension", "'notes.txt'|.txt is no known"),
        (3, "unknown extension", "no extension is no known"),
        (4, "bad number", "height is 'tall', expected a number"),
        (5, "bad cut", "from 3 s to 2 s"),
        (6, "bad cut", "from -1 s to 2 s"),
        (8, "bad cut", "from 1 s to 1 s"),
        (9, "bad crop", "['1', '2', '3']"),
        (10, "bad crop", "50"),
        (12, "bad number", "start is '00:01'"),
    ]
    for entry, (row, code, words) in zip(left, expected, strict=True):
        assert (entry.code, entry.source) == (code, "clips")
        assert entry.path == (str(path) if code == "no path" else str(tmp_path / rows[row][0]))
        assert f"row {row + 1} of t.csv" in entry.reason and any(word in entry.reason for word in words.split("|"))
    assert len(table.left_out) == 10 and table.left_out[-1] == left[-1] and list(table.left_out[2:4]) == left[2:4]
    assert table.left_out.by_code() == {
        "no path": 1, "unknown extension": 2, "bad number": 2, "bad cut": 3, "bad crop": 2,
    }  # fmt: skip
    with pytest.raises(IndexError):
        table.left_out[10]
    with pytest.raises(IndexError):
        table.record(3)


def test_addresses_with_a_query_are_known_by_their_name(tmp_path: Path) -> None:
    rows = [
        ["path", "text"],
        ["https://host/a.mp4?sign=x", "c"],
        ["https://host/a?sign=x", "c"],
        ["memory://m/p.jpeg", "c"],
    ]
    table = opened(write_csv(tmp_path / "t.csv", rows), tmp_path / "store")
    assert [(record.path, record.kind) for record in records(table)] == [
        ("https://host/a.mp4?sign=x", "video"),
        ("memory://m/p.jpeg", "image"),
    ]
    assert [entry.code for entry in table.left_out] == ["unknown extension"]


# --- columns ---------------------------------------------------------------------------------------------------------

corner = st.integers(0, 90)


def box(edges: tuple[int, ...]) -> list[int]:
    return [edges[0], edges[1], edges[0] + edges[2] + 1, edges[1] + edges[3] + 1]


number = st.one_of(st.none(), st.just(float("nan")))
TABLES = st.lists(
    st.fixed_dictionaries({
        "path": st.sampled_from(["a.mp4", "b.png", "c.webm"]),
        "text": st.sampled_from(["x", None, ""]),
        "num_frames": number | st.integers(1, 500),
        "height": number | st.integers(1, 200),
        "width": number | st.integers(1, 200),
        "fps": number | st.sampled_from([24, 29.97, 1000 / 33]),
        "start": number | st.floats(0, 3),
        "end": number | st.floats(0.01, 9),
        "crop": st.none() | st.tuples(corner, corner, corner, corner).map(box),
    }),
    min_size=1, max_size=12,
)  # fmt: skip


def known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def info_of(row: dict[str, Any]) -> MediaInfo | None:
    """What probing would find, if the file is as the table says; None where the table says too little."""
    video = not row["path"].endswith(".png")
    if not all(known(row[name]) for name in ("height", "width", *(("num_frames", "fps") if video else ()))):
        return None
    if not video:
        return MediaInfo("image", row["width"], row["height"])
    duration = row["num_frames"] / row["fps"]
    return MediaInfo("video", row["width"], row["height"], row["num_frames"], row["fps"], duration)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TABLES, kind=st.sampled_from([".jsonl", ".parquet"]))
def test_columns_are_those_of_probed_files(tmp_path: Path, rows: list[dict[str, Any]], kind: str) -> None:
    """Against `columns_of`, which goes through records one by one."""
    path = tmp_path / f"t{kind}"
    if kind == ".jsonl":
        write_any(path, rows)
    else:
        types = {"num_frames": pa.float32(), "height": pa.int64(), "fps": pa.float64(), "crop": pa.list_(pa.int16())}
        arrays = {}
        for name in rows[0]:
            values = [row[name] if not isinstance(row[name], float) or known(row[name]) else None for row in rows]
            plain = pa.string() if name in ("path", "text") else pa.float64()
            arrays[name] = pa.array(values, types.get(name, plain))
        pq.write_table(pa.table(arrays), path)
    table = opened(path, tmp_path / "store")
    usable = []
    for row in rows:
        begin = row["start"] if known(row["start"]) else 0
        end = row["end"] if known(row["end"]) else float("inf")
        if row["text"] is not None and (row["path"].endswith(".png") or begin < end):
            usable.append(row)
    found = records(table)
    assert [Path(record.path).name for record in found] == [row["path"] for row in usable]
    assert len(table) + len(table.left_out) == len(rows)
    infos = []
    for row, record in zip(usable, found, strict=True):
        info = info_of(row)
        crop, cut = record.crop, record.cut
        outside = info is not None and (
            (crop is not None and (crop[0] >= info.width or crop[1] >= info.height))
            or (cut is not None and cut[0] >= info.duration)
        )
        infos.append(None if outside else info)
    expected, columns = columns_of(infos, found), table.columns()
    if columns is None:
        assert not expected.known.any()
        return
    for name in MediaColumns.__dataclass_fields__:
        ours, theirs = getattr(columns, name), getattr(expected, name)
        if name == "video":  # known from the name, whatever else is not
            ours = ours & columns.known
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, err_msg=name)
        assert len(ours) == len(found)


# --- names of columns -------------------------------------------------------------------------------------------------


def test_names_in_common_use_and_renames(tmp_path: Path) -> None:
    rows = [{"file_name": "a.mp4", "caption": "c", "score_vmafmotion": 2, "aesthetic_score": 6, "prompt": "p"}]
    record = opened(write_any(tmp_path / "a.csv", rows), tmp_path / "store").record(0)
    assert (record.captions, dict(record.scores), dict(record.extras)) == (
        ("c",), {"motion": 2.0, "aesthetic": 6.0}, {"prompt": "p"},
    )  # fmt: skip
    record = opened(tmp_path / "a.csv", tmp_path / "store", columns={"text": "prompt", "neg": "caption"}).record(0)
    assert record.captions == ("p",) and dict(record.extras) == {"neg": "c"}
    rows = [{"path": "a.mp4", "video": "b.mp4", "text": "t", "caption": "c"}]
    record = opened(write_any(tmp_path / "b.csv", rows), tmp_path / "store").record(0)
    assert Path(record.path).name == "a.mp4" and record.captions == ("t",), "the exact name goes first"
    assert dict(record.extras) == {"video": "b.mp4", "caption": "c"}


@pytest.mark.parametrize(
    ("names", "columns", "words"),
    [
        (["video", "image", "text"], {}, ["video and image", 'columns = { path = "video" }']),
        (["path", "caption", "captions"], {}, ["caption and captions", 'columns = { text = "caption" }']),
        (
            ["paths", "text"],
            {},
            ["no column 'path'", "did you mean 'paths'?", "paths, text", 'columns = { path = "..." }'],
        ),
        (["path", "text"], {"text": "capton"}, ["no column 'capton'", "columns = { text", "path, text"]),
        (["path", "text"], {"path": "txt"}, ["no column 'txt'", "did you mean 'text'?"]),
        (["path", "text"], {"caption": "text"}, ["no column 'caption'", "num_frames"]),
        (["path", "text", "text"], {}, ["several columns are called text"]),
        (["path;text"], {}, ["parted by another sign"]),
    ],
)
@pytest.mark.parametrize("kind", [".csv", ".parquet", ".jsonl"])
def test_columns_that_are_not_clear(
    tmp_path: Path, names: list[str], columns: dict[str, str], words: list[str], kind: str
) -> None:
    path = tmp_path / f"t{kind}"
    values = [f"{name}.mp4" for name in names]
    if kind == ".csv":
        write_csv(path, [names, values])
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_arrays([pa.array([value]) for value in values], names=names), path)
    elif len(set(names)) < len(names):
        pytest.skip("an object has no two keys of one name")
    else:
        write_any(path, [dict(zip(names, values, strict=True))])
    message = refused(path, tmp_path / "store", columns=columns)
    assert all(word in message for word in words), message
    assert str(path) in message or "caption" in columns


@pytest.mark.parametrize("kind", [".csv", ".parquet", ".jsonl"])
def test_a_table_without_captions_is_told_of_at_once(tmp_path: Path, kind: str) -> None:
    """Not a million times, once for every row."""
    path = write_any(tmp_path / f"t{kind}", [{"path": "a.mp4", "tekst": "x"}])
    message = refused(path, tmp_path / "store")
    assert all(word in message for word in (str(path), "no column 'text'", "did you mean 'tekst'?", "captions.missing"))
    assert opened(path, tmp_path / "store", captions={"missing": "empty"}).record(0).captions == ("",)
    assert opened(path, tmp_path / "store", columns={"text": "tekst"}).record(0).captions == ("x",)


def test_text_columns_that_hold_something_else(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.png"], "text": ["t"], "image": [{"bytes": b"x"}]}), tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", tmp_path / "store").record(0).extras["image"] == {"bytes": b"x"}
    pq.write_table(pa.table({"image": [{"bytes": b"x"}], "text": ["t"]}), tmp_path / "b.parquet")
    assert "column 'image' holds values of the type struct" in refused(tmp_path / "b.parquet", tmp_path / "store")
    write_any(tmp_path / "c.jsonl", [{"path": "a.png", "text": {"en": "t"}}])
    assert "column 'text' holds values" in refused(tmp_path / "c.jsonl", tmp_path / "store")
    write_any(tmp_path / "d.jsonl", [{"path": "a.png", "text": {"en": "t"}}, {"path": "a.png", "text": "t"}])
    assert "more than text" in refused(tmp_path / "d.jsonl", tmp_path / "store")


def test_types_of_parquet_columns(tmp_path: Path) -> None:
    """Dictionaries, large strings, string views, decimals, small integers: all as plain values."""
    text = pa.array(["x", "y", "x"])
    columns = {
        "path": pa.array(["a.mp4", "b.mp4", "c.png"]).cast(pa.large_string()),
        "text": text.dictionary_encode(),
        "num_frames": pa.array([10, 20, None], pa.uint8()),
        "height": pa.array([1080, 720, 480], pa.int16()),
        "width": pa.array([1920.0, 1280.0, 640.0], pa.float32()),
        "fps": pa.array(["25", "30", None]).cast(pa.decimal128(6, 2)),
        "name": text.cast(pa.string_view()),
        "mask": pa.array(["m.png", None, None]).dictionary_encode(),
        "controls": pa.array([["c.png"], [], None], pa.large_list(pa.large_string())),
        "__index_level_0__": pa.array([0, 1, 2]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = opened(tmp_path / "t.parquet", tmp_path / "store")
    found = records(table)
    assert [record.captions for record in found] == [("x",), ("y",), ("x",)]
    assert [record.scores.get("fps") for record in found] == [25.0, 30.0, None]
    assert found[0].mask == str(tmp_path / "m.png") and found[0].controls == (str(tmp_path / "c.png"),)
    assert [dict(record.extras) for record in found] == [{"name": "x"}, {"name": "y"}, {"name": "x"}]
    columns_ = table.columns()
    assert columns_ is not None and columns_.known.all() and columns_.frames.tolist() == [10, 20, 1]


def test_values_of_changing_types_in_jsonl(tmp_path: Path) -> None:
    """Text here and lists there, numbers as text, keys that come late: every value as it was written."""
    rows: list[dict[str, Any]] = [
        {"path": "a.mp4", "text": "one", "height": 8, "tag": 1, "when": "2020-01-01 10:00:00",
         "controls": "0.png;1.png"},
        {"path": "b.mp4", "text": ["two", "three"], "height": "9", "tag": "x", "controls": ["/2.png", "/3.png"]},
        {"path": "c.mp4", "text": 5, "width": 4, "tag": {"k": [1, None]}, "late": [1, 2], "crop": [1, 2, 3, 4]},
        {"path": "d.mp4", "text": "four", "crop": "5, 6, 7, 8"},
    ]  # fmt: skip
    table = opened(write_any(tmp_path / "t.jsonl", rows), tmp_path / "store")
    assert [record.captions for record in records(table)] == [("one",), ("two", "three"), ("5",), ("four",)]
    assert [record.extras.get("tag") for record in records(table)] == [1, "x", {"k": [1, None]}, None]
    assert [record.crop for record in records(table)] == [None, None, (1, 2, 3, 4), (5, 6, 7, 8)]
    assert [[Path(file).name for file in record.controls] for record in records(table)] == [
        ["0.png", "1.png"], ["2.png", "3.png"], [], [],
    ]  # fmt: skip
    assert table.record(0).extras["when"] == "2020-01-01 10:00:00"
    assert table.record(2).extras["late"] == [1, 2]
    assert not list(table.left_out)


def test_a_key_may_come_late_but_must_come(tmp_path: Path) -> None:
    lines = [{"path": f"{number}.mp4", "text": "x" * 900} for number in range(6000)]  # more than one block
    lines[-1] = {"path": "last.mp4", "words": "late", "text": "y"}
    table = opened(
        write_any(tmp_path / "t.jsonl", lines),
        tmp_path / "store",
        captions={"missing": "empty"},
        columns={"name": "words"},
    )
    assert table.record(5999).extras["name"] == "late" and len(table) == 6000
    assert "no column 'wards', which columns" in refused(
        tmp_path / "t.jsonl", tmp_path / "store", columns={"name": "wards"}
    )


# --- broken files -----------------------------------------------------------------------------------------------------

BROKEN = {
    "latin.csv": (b"path,text\na.mp4,good\nb.mp4,caf\xe9\nc.mp4,x\n", ["line 3 is not UTF-8", "0xe9", "position 10"]),
    "utf16.csv": ("path,text\na.mp4,good\n".encode("utf-16"), ["line 1 is not UTF-8", "UTF-16"]),
    "short.csv": (b"path,text\na.mp4,good\nb.mp4\nc.mp4,x\n", ["line 3: has 1 cells", "2 columns"]),
    "long.csv": (b'path,text\na.mp4,"two\nlines"\nb.mp4,a, b\n', ["line 4: has 3 cells"]),
    "open.csv": (b'path,text\na.mp4,good\nb.mp4,"never closed\nc.mp4,x\nd.mp4,y\n', ["line 3: a quote opens here"]),
    "stray.csv": (b'path,text\na.mp4,"open\nb.mp4,"quoted"\nc.mp4,y\n', ["line 2: a quote opens here"]),
    "first.csv": (b'path,text\n"a.mp4,good\nc.mp4,x\n', ["line 2: a quote opens here"]),
    "empty.csv": (b"", ["is empty"]),
    "short.tsv": (b"path\ttext\na.mp4\tgood\nb.mp4\n", ["line 3: has 1 cells"]),
    "half.jsonl": (b'{"path": "a.mp4", "text": "x"}\n\n{"path": "b.mp4", "text"\n', ["line 3: is no JSON"]),
    "latin.jsonl": (b'{"path": "a.mp4", "text": "caf\xe9"}\n', ["line 1 is not UTF-8", "0xe9"]),
    "list.jsonl": (b'{"path": "a.mp4", "text": "x"}\n[1, 2]\n', ["line 2: is no object"]),
    "empty.jsonl": (b" \n", ["is empty"]),
    "half.json": (b'[{"path": "a.mp4",\n "text"]', ["line 2: is no JSON"]),
    "mixed.json": (b'[{"path": "a.mp4"}, 3]', ["entry 2 of the list"]),
    "cut.parquet": (b"PAR1 and no more", ["cannot be read as parquet"]),
    "empty.parquet": (b"", ["cannot be read as parquet"]),
    "table.xlsx": (b"PK", ["'.xlsx' is no table's", ".parquet"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_name_the_file_and_the_line(tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name, tmp_path / "store")
    assert str(tmp_path / name) in message and all(word in message for word in words), message


def test_a_break_far_into_a_table_is_found_at_its_line(tmp_path: Path) -> None:
    line = b"videos/a.mp4,a caption of some length that fills the block\n"
    many = 40_000  # more than two blocks
    for name, bad, words in (
        ("quote.csv", b'b.mp4,"open\n', "a quote opens here"),
        ("cells.csv", b"b.mp4,x,y\n", "has 3 cells"),
        ("bytes.csv", b"b.mp4,caf\xe9\n", "is not UTF-8"),
    ):
        (tmp_path / name).write_bytes(b"path,text\n" + line * many + bad + line * many)
        message = refused(tmp_path / name, tmp_path / "store")
        assert f"line {many + 2}" in message and words in message, message
    entry = b'{"path": "videos/a.mp4", "text": "a caption of some length that fills the block"}\n'
    (tmp_path / "t.jsonl").write_bytes(entry * 120_000 + b'{"path": \n')
    assert "line 120001: is no JSON" in refused(tmp_path / "t.jsonl", tmp_path / "store")


def test_what_looks_odd_and_is_sound(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, blank lines, quotes inside cells, names with spaces, no last line end."""
    text = '\ufeffpath, text \r\n\r\na.mp4,"two ""quoted""\r\nlines"\r\nb.mp4,a 5" screen\r\nc.mp4,last'
    (tmp_path / "t.csv").write_bytes(text.encode())
    captions = [record.captions[0] for record in records(opened(tmp_path / "t.csv", tmp_path / "store"))]
    assert captions == ['two "quoted"\r\nlines', 'a 5" screen', "last"]
    (tmp_path / "t.jsonl").write_bytes('\ufeff{"path": "a.mp4", "text": "x"}'.encode())
    assert opened(tmp_path / "t.jsonl", tmp_path / "store").record(0).captions == ("x",)
    (tmp_path / "one.csv").write_text("path\na.mp4\n")
    table = opened(tmp_path / "one.csv", tmp_path / "store", captions={"missing": "empty"})
    assert table.record(0).captions == ("",) and table.counts["missing caption"] == 1
    for name in ("none.csv", "none.jsonl", "none.parquet"):
        write_any(tmp_path / name, [{"path": "x", "text": "y"}])
        if name == "none.csv":
            (tmp_path / name).write_text("path,text\n")
        elif name == "none.parquet":
            pq.write_table(
                pa.table({"path": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / name
            )
        table = opened(tmp_path / name, tmp_path / "store")
        assert len(table) == 0 and len(table.left_out) == (name == "none.jsonl") and table.columns() is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(['"', 'a\n"b"', "a,b"])
    ),
    kind=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
)
def test_any_text_comes_back(tmp_path: Path, texts: list[str], kind: str) -> None:
    """As the csv and json modules and pyarrow write it, whatever is in it, but for white space around captions."""
    rows = [{"path": f"{number}.mp4", "text": f"x{text}x", "name": text} for number, text in enumerate(texts)]
    rows.append({"path": "last.mp4", "text": "last", "name": "last"})
    found = records(opened(write_any(tmp_path / f"t{kind}", rows), tmp_path / "store"))
    assert [Path(record.path).stem for record in found] == [*map(str, range(len(texts))), "last"]
    assert [record.captions for record in found] == [(row["text"],) for row in rows]
    assert [record.extras.get("name", "") for record in found] == [row["name"] for row in rows]


# --- files and stores -------------------------------------------------------------------------------------------------


def test_several_files_are_one_table(tmp_path: Path) -> None:
    """Of different kinds, columns and folders, in the order of their names; paths begin at each file's folder."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    write_any(
        tmp_path / "x/0.csv", [{"path": "a.mp4", "text": "1", "height": 8, "width": 8, "num_frames": 3, "fps": 3}]
    )
    write_any(tmp_path / "x/1.jsonl", [{"file": "b.png", "caption": ["2", "3"], "size": 4}])
    write_any(
        tmp_path / "y/0.parquet", [{"video": "c.mp4", "text": "4", "tag": 1.5}, {"video": "", "text": "5", "tag": 2.0}]
    )
    table = opened(tmp_path / "{x,y}/*", tmp_path / "store")
    assert [(record.path, record.captions) for record in records(table)] == [
        (str(tmp_path / "x/a.mp4"), ("1",)),
        (str(tmp_path / "x/b.png"), ("2", "3")),
        (str(tmp_path / "y/c.mp4"), ("4",)),
    ]
    assert table.record(1).extras == {"size": 4} and table.record(2).extras == {"tag": 1.5}
    columns = table.columns()
    assert columns is not None and columns.known.tolist() == [True, False, False]
    assert table.left_out[0] == LeftOut(
        str(tmp_path / "y/0.parquet"), "row 2 of 0.parquet has no path: name its picture or video", "no path", "clips"
    )
    folder = opened(tmp_path / "x", tmp_path / "store", type="table")
    assert [Path(record.path).name for record in records(folder)] == ["a.mp4", "b.png"]
    with pytest.raises(MediaError, match=r"2\.csv"):
        opened(tmp_path / "x/{0,2}.csv", tmp_path / "store")
    assert "stands for no table" in refused(tmp_path / "*.csv", tmp_path / "store")


def test_a_table_behind_an_address_and_in_a_tar(tmp_path: Path) -> None:
    import tarfile

    import fsspec

    path = write_any(tmp_path / "t.parquet", [{"path": "sub/a.mp4", "text": "x"}])
    system = fsspec.filesystem("memory")
    system.pipe_file("/tables/t.parquet", path.read_bytes())
    system.pipe_file("/tables/t.csv", b"path,text\nb.mp4,y\n/c.mp4,z\n")
    assert opened("memory://tables/t.parquet", tmp_path / "store").record(0).path == "memory://tables/sub/a.mp4"
    table = opened("memory://tables/*.csv", tmp_path / "store")
    assert [record.path for record in records(table)] == ["memory://tables/b.mp4", "/c.mp4"]
    (tmp_path / "t.jsonl").write_text('{"path": "a.mp4", "text": "x"}\n')
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "t.jsonl", "in/t.jsonl")
    table = opened(f"{tmp_path}/all.tar::in/t.jsonl", tmp_path / "store")
    assert table.record(0).path == f"{tmp_path}/all.tar::in/a.mp4"


def test_a_store_is_made_once_and_again_when_the_table_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = write_csv(tmp_path / "t.csv", [["path", "text"], ["a.mp4", "old"]]), tmp_path / "store"
    assert opened(path, store).record(0).captions == ("old",)
    (made,) = store.iterdir()
    state = [(file.name, file.stat().st_mtime_ns) for file in sorted(made.iterdir())]
    monkeypatch.chdir(tmp_path)  # a relative path is the same table
    again = opened("t.csv", store)
    assert again.record(0).path == "./a.mp4" and [*store.iterdir()] == [made]
    assert [(file.name, file.stat().st_mtime_ns) for file in sorted(made.iterdir())] == state
    open_before = opened(path, store)
    write_csv(path, [["path", "text"], ["a.mp4", "new"], ["b.mp4", "newer"]])
    assert [record.captions for record in records(opened(path, store))] == [("new",), ("newer",)]
    assert len(list(store.iterdir())) == 1 and not made.exists(), "the old copy of a changed table goes"
    assert open_before.record(0).captions == ("old",), "who has it open reads on"


@pytest.mark.parametrize("harm", ["rows.arrow", "fps.bin", "store.json", "gone"])
def test_a_damaged_store_is_made_again(tmp_path: Path, harm: str) -> None:
    path, store = write_csv(tmp_path / "t.csv", [["path", "text"], ["a.mp4", "x"]]), tmp_path / "store"
    opened(path, store)
    (made,) = store.iterdir()
    if harm == "gone":
        (made / "video.bin").unlink()
    else:
        (made / harm).write_bytes((made / harm).read_bytes()[:-1])
    assert opened(path, store).record(0).captions == ("x",)
    assert [*store.iterdir()] == [made]


def test_leavings_of_dead_processes_go(tmp_path: Path) -> None:
    path, store = write_csv(tmp_path / "t.csv", [["path", "text"], ["a.mp4", "x"]]), tmp_path / "store"
    old, young = store / "other.1234.part", store / "other.5678.part"
    for part in (old, young):
        part.mkdir(parents=True)
        (part / "rows.arrow").write_bytes(b"some")
    day_ago = time.time() - 24 * 3600
    for file in (old / "rows.arrow", old):
        os.utime(file, (day_ago, day_ago))
    opened(path, store)
    assert not old.exists() and young.exists()


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [["path", "text"], ["a.mp4", "x"]])
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="where a copy of the table is kept, cannot be written"):
        opened(path, tmp_path / "file" / "store")


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: both end a write halfway."""
    path = write_csv(tmp_path / "t.csv", [["path", "text"], *([["a.mp4", "x" * 500]] * 4000)])
    code = (
        "import resource, signal, sys, pathlib, errno\n"
        "from kinema.config.data import DataConfig, SourceConfig\n"
        "from kinema.data.sources import table, table_store\n"
        "table_store.errno.ENOSPC = errno.EFBIG\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "config = DataConfig(sources=(SourceConfig(path=sys.argv[1]),)).sources[0]\n"
        "try:\n"
        "    table.open_table(config, 't', pathlib.Path(sys.argv[2]))\n"
        "except table.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "store"], capture_output=True, text=True)
    assert "the disk is full" in done.stdout and str(tmp_path / "store") in done.stdout, done
    assert list((tmp_path / "store").iterdir()) == []


def test_processes_may_open_one_table_at_once(tmp_path: Path) -> None:
    rows = [["path", "text"], *([f"{number}.mp4", "x" * 100] for number in range(20_000))]
    path = write_csv(tmp_path / "t.csv", rows)
    with ThreadPoolExecutor(4) as pool:  # each makes a store of its own, and one of them stays
        tables = list(pool.map(lambda _: opened(path, tmp_path / "store"), range(4)))
    assert {len(table) for table in tables} == {20_000}
    assert len(list((tmp_path / "store").iterdir())) == 1
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda row: Path(tables[0].record(row).path).stem, range(0, 20_000, 7)))
    assert paths == [str(number) for number in range(0, 20_000, 7)]


def test_the_default_store_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = write_csv(tmp_path / "t.csv", [["path", "text"], ["a.mp4", "x"]])
    assert len(open_table(settled(path), "t")) == 1
    assert len(list((tmp_path / "home/kinema/tables").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "house"))
    open_table(settled(path), "t")
    assert len(list((tmp_path / "house/.cache/kinema/tables").iterdir())) == 1


# --- size -------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, time, pathlib, threading
import numpy, pyarrow, pyarrow.compute, pyarrow.csv, pyarrow.json, pyarrow.parquet
from kinema.config.data import DataConfig, SourceConfig
from kinema.data.sources.table import open_table

def own():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

peak = before = own()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
config = DataConfig(sources=(SourceConfig(path=sys.argv[1]),)).sources[0]
table = open_table(config, "t", pathlib.Path(sys.argv[2]))
columns = table.columns()
assert columns.known.all() and int(columns.frames.max()) > 1
rows = numpy.random.default_rng(0).integers(0, len(table), 3000).tolist()
cpu = time.process_time()
for row in rows:
    table.record(row)
cpu = (time.process_time() - cpu) / len(rows) * 1e6
done.set()
watcher.join()
print(len(table), peak - before, cpu)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (".csv", 100_000),
        *(pytest.param(kind, 400_000, marks=pytest.mark.slow) for kind in (".csv", ".parquet", ".jsonl")),
    ],
)
def test_memory_does_not_grow_with_the_table(tmp_path: Path, kind: str, count: int) -> None:
    """Rows of 240 bytes, so a table of 24 and 96 MB, under one limit."""
    names = [f"videos/{number // 1000:05d}/{'clip' * 8}{number:09d}.mp4" for number in range(count)]
    numbers = {"num_frames": 49, "height": 720, "width": 1280, "fps": 24}
    columns: dict[str, list[Any]] = {
        "path": names,
        "text": ["a caption, quite long " * 6 + name[-9:] for name in names],
    }
    columns |= {name: [value] * count for name, value in numbers.items()}
    path = tmp_path / f"t{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif kind == ".jsonl":
        write_any(path, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    else:
        write_csv(
            path, [list(columns), *map(list, zip(*columns.values(), strict=True))], "\t" if kind == ".tsv" else ","
        )
    arguments = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "store")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    length, memory, microseconds = map(float, done.stdout.split())
    print(f"{kind}: {length:.0f} rows, {memory:.0f} MB, {microseconds:.0f} us a record")
    assert length == count
    assert memory < 160, f"{memory:.0f} MB"
    assert microseconds < 150, f"{microseconds:.0f} us of a busy processor"
