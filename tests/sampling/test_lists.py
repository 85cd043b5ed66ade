"""Lists of prompts: every kind of file, what rows may say, which rows are meant, and all mistakes at once."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import csv, parquet

from kinema.errors import UserError
from kinema.families.registry import family_class
from kinema.sampling.command import sample
from kinema.sampling.lists import Ask, PromptList, file_stem, read_list
from kinema.sampling.settings import COLUMNS
from kinema.sampling.writing import read_metadata

SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 1}
ROWS: list[dict[str, Any]] = [
    {"text": "a red, round ball", "ref": "a.png;sub/b.png", "name": "ball", "neg": "blue", "seed": 7, "fps": 12.5},
    {"text": "größe 雪", "ref": None, "name": None, "neg": None, "seed": 0, "fps": None},
    {"text": "a box", "ref": "https://example.org/c.png?x=1", "name": None, "neg": None, "seed": None, "fps": 8.0},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("lists"), "t2v-1.3b")


@pytest.fixture(scope="module")
def from_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("lists-i2v"), "i2v-14b-480p")


def noise(path: Path, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix in (".jsonl", ".json"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    else:
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    return path


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_says_the_same(tmp_path: Path, kind: str) -> None:
    found = read_list(str(write(tmp_path / f"rows{kind}", ROWS)))
    assert (found.rows, found.mistakes) == (3, ())
    assert found.asks == (
        Ask(
            "a red, round ball",
            (str(tmp_path / "a.png"), str(tmp_path / "sub/b.png")),
            "ball",
            0,
            {"negative": "blue", "seed": 7, "fps": 12.5},
        ),
        Ask("größe 雪", (), None, 1, {"seed": 0}),
        Ask("a box", ("https://example.org/c.png?x=1",), None, 2, {"fps": 8.0}),
    )
    assert [type(ask.options.get("seed")) for ask in found.asks] == [int, int, type(None)]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa red ball\n\n  größe \r\n", encoding="utf-8")
    assert [(ask.row, ask.prompt) for ask in read_list(str(tmp_path / "p.txt")).asks] == [
        (0, "a red ball"),
        (1, "größe"),
    ]


def test_settings_have_their_own_names_and_types(tmp_path: Path) -> None:
    of_kind: dict[type, Any] = {int: 9, float: 0.5, bool: True, str: "16:9"}
    values = {name: of_kind[one.kind] for name, one in COLUMNS.items()}
    path = write(tmp_path / "a.csv", [{"prompt": "x", **values}])
    assert read_list(str(path)).asks[0].options == values
    # pandas turns whole numbers, and truths with empty cells between them, into floats
    floats = {name: value if isinstance(value, str) else float(value) for name, value in values.items()}
    assert read_list(str(write(tmp_path / "b.parquet", [{"caption": "x", **floats}]))).asks[0].options == values
    large = write(tmp_path / "c.jsonl", [{"text": "x", "seed": 2**62 + 1}])
    assert read_list(str(large)).asks[0].options == {"seed": 2**62 + 1}


bound = st.one_of(st.none(), st.integers(-14, 14))


@given(bound, bound, st.one_of(st.none(), st.integers(-3, 3).filter(bool)), st.integers(1, 12))
def test_rows_are_slices_as_python_has_them(first: int | None, last: int | None, step: int | None, count: int) -> None:
    whole = PromptList("a.csv", (), (), count)
    parts = ["" if part is None else str(part) for part in (first, last, step)]
    expected = list(range(count))[first:last:step]
    for text in (":".join(parts), *([":".join(parts[:2])] if step is None else [])):
        if expected:
            assert list(whole.chosen(text)) == expected
        else:
            with pytest.raises(UserError, match=f"has {count} rows"):
                whole.chosen(text)


def test_one_row_and_what_is_no_slice() -> None:
    whole = PromptList("a.csv", (), (), 10)
    assert [list(whole.chosen(text)) for text in ("7", "-1", "0")] == [[7], [9], [0]]
    for text in ("10", "-11", "12:"):
        with pytest.raises(UserError, match=r"--rows .*: a\.csv has 10 rows, 0 to 9; none of these"):
            whole.chosen(text)
    for text in ("", "a", "1:2:0", "1-3", "1,2", "1:2:3:4"):
        with pytest.raises(UserError, match="expected rows such as 10:20"):
            whole.chosen(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(name: str, text: str | bytes, message: str, ignore: tuple[str, ...] = ()) -> None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=message):
            read_list(str(tmp_path / name), ignore)

    refused("a.csv", "text,hieght\nx,3\n", r"no column 'hieght'; did you mean 'height'\? .*--ignore-columns hieght")
    refused("a.csv", "text,id,hash\nx,3,4\n", r"no column 'id'.*--ignore-columns id,hash")
    refused("a.csv", "text,prompt\nx,y\n", r"columns text and prompt could each be the text")
    refused("a.csv", "txt,seed\nx,y\n", r"no column 'txt'; did you mean 'text'")
    refused("a.csv", "ref\nx\n", r"has no column 'text'\. It holds the prompts")
    refused("a.csv", "text,seed\n", r"has no rows")
    refused("a.txt", "\n\n", r"has no rows")
    refused("a.txt", b"\xff\xfe", r"is not UTF-8")
    refused("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: is no JSON")
    refused("a.xlsx", "", r"'\.xlsx' is no list; expected \.csv, .*\.txt")
    refused("a.csv", "text,id\nx,3\n", r"--ignore-columns idd: .* no such column; did you mean 'id'", ("id", "idd"))
    with pytest.raises(UserError, match=r"gone\.csv cannot be read"):
        read_list(str(tmp_path / "gone.csv"))
    (tmp_path / "a.csv").write_text(",text,id\n0,x,3\n")  # the first is the index of pandas
    assert read_list(str(tmp_path / "a.csv"), ("id",)).asks == (Ask("x", (), None, 0),)


def test_names_of_files() -> None:
    assert [file_stem(name) for name in ("a b", "a.mp4", "a.v2.PNG", 7)] == ["a b", "a", "a.v2", "7"]
    for name in ("a/b", "..", ".hidden", ".mp4", "a\\b", "a:b", "x" * 201):
        with pytest.raises(UserError, match="no plain file name"):
            file_stem(name)


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_said_at_once_before_anything_is_loaded(from_image: Path, tmp_path: Path) -> None:
    noise(tmp_path / "good.png", 0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [
        "a,100,good.png,,",
        "b,,gone.png,,",
        ",,good.png,,",
        "d,,,-3,",
        "e,,broken.png,,",
        "f,100,good.png,1.5,",
        "g,,good.png,,same",
        "h,,good.png,,same",
        "i,,good.png,,",
    ]
    (tmp_path / "l.csv").write_text("text,height,ref,seed,name\n" + "\n".join(rows))
    with pytest.raises(UserError) as caught:
        sample(prompt_list=tmp_path / "l.csv", model=str(from_image), out=tmp_path / "out", **SMALL)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}/l.csv: 7 of 9 rows cannot be made; nothing was drawn.")
    starts = ["row 0: height 100: wan makes multiples of 16", "row 1: ref: ", "row 2: text: there is no prompt"]
    starts += ["row 3: seed: -3 is not a whole number from 0 on", "row 4: ref: "]
    starts += ["row 5: seed: 1.5 is not a whole number"]
    starts += ["row 7: name: row 6 makes another same.mp4"]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start), line
    assert "gone.png" in lines[1] and "broken.png" in lines[4]
    (tmp_path / "n.txt").write_text("\n".join("abcdefgh"))
    with pytest.raises(UserError, match=r"rows 0, 1, 2, 3, 4 and 3 more: .*give the picture with ref"):
        sample(prompt_list=tmp_path / "n.txt", model=str(from_image), **SMALL)
    assert not (tmp_path / "out").exists()
    for options, message in (
        ({"prompts": ["x"], "prompt_list": "l.csv"}, "--list l.csv and a PROMPT both say"),
        ({"repeat": "x.mp4", "prompt_list": "l.csv"}, "--list l.csv and --from both say"),
        ({"prompts": ["x"], "rows": "3"}, "--rows belongs to --list"),
        ({"prompts": ["x"], "ignore_columns": ["id"]}, "--ignore-columns belongs to --list"),
    ):
        with pytest.raises(UserError, match=message):
            sample(**options, model=str(from_image))  # type: ignore[arg-type]


def test_tiles_and_shifts_that_cannot_be_are_said_by_row(base: Path, tmp_path: Path) -> None:
    """All of them, with their rows, each wrong value looked at once."""
    rows = ["a,,100,,", "b,of,,,", "c,,64,,", "d,off,64,,", "e,,,8,", "f,,100,,", "g,,,,3"]
    (tmp_path / "l.csv").write_text("text,tiling,tile_size,tile_frames,shift\n" + "\n".join(rows))
    with pytest.raises(UserError) as caught:
        sample(prompt_list=tmp_path / "l.csv", model=str(base), out=tmp_path / "out", **SMALL)
    first, *lines = str(caught.value).splitlines()
    assert "5 of 7 rows cannot be made" in first
    starts = ["rows 0, 5: tile-size 100: tiles of this autoencoder", "row 1: tiling of: expected one of auto, on, off"]
    starts += ["row 3: tiling off and --tile-size do not go together", "row 4: tile-frames 8: the autoencoder"]
    assert len(lines) == len(starts) and all(map(str.startswith, lines, starts)), lines
    with pytest.raises(UserError, match=r"^--tile-size 100: tiles of this autoencoder"):
        sample(["a"], model=str(base), tile_size=100, out=tmp_path / "out", **SMALL)
    sdxl = family_class("sdxl").tiny(tmp_path / "sdxl", "base-eps")
    (tmp_path / "s.csv").write_text("text,shift\na,\nb,3\nc,2\n")
    with pytest.raises(UserError, match=r"2 of 3 rows .*\nrows 1, 2: shift: EulerDiscreteScheduler has no time shift"):
        sample(prompt_list=tmp_path / "s.csv", model=str(sdxl), out=tmp_path / "out", height=64, width=64)
    assert not (tmp_path / "out").exists()


def test_a_row_has_its_own_settings_and_the_command_those_of_the_others(base: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "a ball", "name": "first", "steps": 2, "frames": 1, "seed": 5, "neg": "red", "motion": 3},
        {"text": "a ball", "seed": 0, "num_samples": 2},
        {"text": "A ball!", "fps": 8.0},
        {"text": "a ball", "guidance": 2.0},
        {"text": "a ball", "guidance": 2.0},
    ]
    listed = write(tmp_path / "l.jsonl", rows)
    options: dict[str, Any] = {"model": str(base), "prompt_list": listed, "negative": "box", **SMALL}
    paths = sample(**options, seed=3, out=tmp_path / "all")
    names = [path.name for path in paths]
    assert names[:3] == ["first.png", "a-ball-0.mp4", "a-ball-1.mp4"]
    assert names[3].startswith("a-ball-") and names[3].endswith("-3.mp4") and names[4] == "a-ball-3.mp4"
    assert len(names) == 5, "the last two rows are the same"
    found = [read_metadata(path) for path in paths]
    assert [one["seed"] for one in found] == [5, 0, 1, 3, 3]
    assert [one["negative"] for one in found] == ["red"] + ["box"] * 4
    assert [(one["steps"], one["fps"], one["guidance"]) for one in found] == [
        (2, 16.0, 5.0), (1, 16.0, 5.0), (1, 16.0, 5.0), (1, 8.0, 5.0), (1, 16.0, 2.0),
    ]  # fmt: skip
    assert found[0]["prompt"] == "a ball 3 motion score." and found[0]["text"] == "a ball"
    some = sample(**options, seed=3, out=tmp_path / "some", rows="-1:1:-1")
    assert [path.name for path in some] == ["a-ball-3.mp4", names[3]], "names do not depend on --rows"


@pytest.fixture(params=["memory", "http"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[str, bytes], object]]]:
    """An address, and what puts a file there."""
    if request.param == "memory":
        import fsspec

        memory = fsspec.filesystem("memory")
        yield "memory://sampling", lambda name, data: memory.pipe(f"/sampling/{name}", data)
        memory.rm("/sampling", recursive=True)
        return
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "web").mkdir()
    running = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "web"))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{running.server_port}"
    yield address, lambda name, data: (tmp_path / "web" / name).write_bytes(data)
    running.shutdown()
    running.server_close()


def test_references_by_path_and_address(from_image: Path, tmp_path: Path, server: Any) -> None:
    """One picture by each way, and a list that lies at an address itself: the same pixels each time."""
    server, put = server
    (tmp_path / "list").mkdir()
    picture = noise(tmp_path / "list" / "a.png", 1).read_bytes()
    put("b.png", picture)
    put("own.png", picture)
    put("l.csv", b"text,ref,name\nx,own.png,listed\n")
    noise(tmp_path / "other.png", 2)
    (tmp_path / "list" / "l.csv").write_text(f"text,ref,name\nx,a.png,path\nx,{server}/b.png,web\nx,,command\n")
    options: dict[str, Any] = {"model": str(from_image), "out": tmp_path / "out", **SMALL, "frames": 5}
    paths = sample(prompt_list=tmp_path / "list" / "l.csv", images=[tmp_path / "other.png"], **options)
    paths += sample(prompt_list=f"{server}/l.csv", **options)
    paths += sample(["x"], images=[f"{server}/b.png"], **options)
    found = [read_metadata(path) for path in paths]
    assert [one["images"] for one in found] == [
        [str(tmp_path / "list" / "a.png")],
        [f"{server}/b.png"],
        [str(tmp_path / "other.png")],
        [f"{server}/own.png"],
        [f"{server}/b.png"],
    ]
    contents = [one["image_contents"][0] for one in found]
    assert contents[0] == contents[1] == contents[3] == contents[4] != contents[2]
    import av

    def pixels(path: Path) -> np.ndarray:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    shown = [pixels(path) for path in paths]
    assert all(np.array_equal(shown[0], shown[i]) for i in (1, 3, 4))
    assert not np.array_equal(shown[0], shown[2])
    with pytest.raises(UserError, match=rf"row 0: ref: {server}/gone\.png cannot be read"):
        (tmp_path / "list" / "l.csv").write_text(f"text,ref\nx,{server}/gone.png\n")
        sample(prompt_list=tmp_path / "list" / "l.csv", **options)
