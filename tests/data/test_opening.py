"""Opening a data set: what is not read, what is shared, what is said, and what a file that fails does to the rest."""

import csv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_files import numbered_frame, write_video
from PIL import Image
from small_encoder import Alone, SmallEncoder, ThreadRanks

from kinema.config.schema import Config
from kinema.data.contents import Contents
from kinema.data.facts import FactStore
from kinema.data.inspection import inspect_data
from kinema.data.opening import open_data, planned_keys
from kinema.data.sources.table import Table
from kinema.errors import UserError


def config_of(root: Path, *sources: Any, **data: Any) -> Config:
    buckets = data.pop("buckets", {})
    if "table" not in buckets and "sizes" not in buckets:
        buckets = {"resolutions": [32], "frames": [1], "aspects": [1.0], **buckets}
    training = {"steps": 1, "batch_size": 2, "precision": "fp32", "caption_dropout": data.pop("dropout", 0)}
    paths = [one if isinstance(one, dict) else {"path": str(one)} for one in sources]
    whole = {"sources": paths, "cache": root / "cache", "buckets": buckets, **data}
    return Config.model_validate({"model": {"family": "small"}, "data": whole, "training": training})


def write_picture(path: Path, shade: int, size: tuple[int, int] = (40, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.with_suffix(".txt").write_text(f"picture {shade}")


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def tear(path: Path) -> None:
    """Cut a picture short: its header says that all is well."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_table_that_is_believed_is_opened_without_a_row_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"path": f"{k}.png", "text": f"text {k}", "height": 40, "width": 40 + 20 * (k % 2)} for k in range(500)]
    table = write_table(tmp_path / "table.csv", rows)
    config = config_of(tmp_path, table, examine="trust", online=["media", "text"])
    read: list[int] = []
    original = Table.record
    monkeypatch.setattr(Table, "record", lambda self, row: read.append(row) or original(self, row))
    data = open_data(config, config.data.sources, SmallEncoder(), Alone())
    assert len(data) == 500 and data.fingerprint and not read


@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_what_a_bucket_table_passes_over_is_counted_and_no_fault(tmp_path: Path, chance: float) -> None:
    rows = [{"path": f"{k}.png", "text": "a text", "height": 64, "width": 64} for k in range(200)]
    table = write_table(tmp_path / "table.csv", [*rows, {"path": "x.png", "text": "t", "height": 8, "width": 8}])
    buckets = {"table": {"64px": {"1": [chance, 2]}}}
    config = config_of(tmp_path, table, examine="trust", online=["media", "text"], buckets=buckets)
    found = inspect_data(config, config.data.sources, SmallEncoder(), Alone())
    assert found.codes == {"too small": 1} == {one.code: 1 for one in found.left_out}
    assert found.records == 201 == found.used + found.counts["not drawn"] + 1
    assert 60 < found.counts["not drawn"] < 140 if chance else found.counts["not drawn"] == 200
    said: list[str] = []
    if chance:
        open_data(config, config.data.sources, SmallEncoder(), Alone(), said.append)
        passed = found.counts["not drawn"]
        assert f"Passed over: {passed} by the probabilities of data.buckets.table" in said


def test_strict_says_where_all_that_is_left_out_is_listed(tmp_path: Path) -> None:
    write_picture(tmp_path / "media" / "good.png", 0)
    for k in range(40):
        (tmp_path / "media" / f"bare{k}.png").touch()
    config = config_of(tmp_path, tmp_path / "media", strict=True)
    with pytest.raises(UserError, match=r"data\.strict is set, and 40 of the files") as caught:
        open_data(config, config.data.sources, SmallEncoder(), Alone())
    (listed,) = (tmp_path / "cache").glob("left-out-*.txt")
    assert f"... and 10 more: {listed} lists them all" in str(caught.value)
    assert len(listed.read_text().splitlines()) == 40


def test_many_copies_of_a_file_that_fails_late_are_all_left_out(tmp_path: Path) -> None:
    write_picture(tmp_path / "media" / "good.png", 0)
    for k in range(6):
        write_picture(tmp_path / "media" / f"torn{k}.png", 1)
        tear(tmp_path / "media" / f"torn{k}.png")
    config = config_of(tmp_path, tmp_path / "media", examine="headers")
    encoder = SmallEncoder()
    data = open_data(config, config.data.sources, encoder, Alone())
    assert len(data) == 1 and len(data.left_out) == 6 and encoder.calls["latents"] == 1


def test_copies_of_a_file_are_encoded_once(tmp_path: Path) -> None:
    for k in range(6):
        write_picture(tmp_path / "media" / f"copy{k}.png", 1)
    config = config_of(tmp_path, tmp_path / "media", workers=2)
    encoder = SmallEncoder()
    assert len(open_data(config, config.data.sources, encoder, Alone())) == 6
    assert encoder.calls["latents"] == 1


def test_a_held_out_set_of_a_run_that_encodes_on_line_keeps_its_entries(tmp_path: Path) -> None:
    write_picture(tmp_path / "media" / "one.png", 1)
    config = config_of(tmp_path, tmp_path / "media", online=["media", "text"])

    def planned(training: bool) -> set[str]:
        keys = planned_keys(config, config.data.sources, SmallEncoder(), Alone(), training=training)
        return {name for name, _ in keys}

    assert planned(True) == set() and planned(False) == {"latents", "text"}


def test_captions_vary_only_where_nothing_cached_reads_them(tmp_path: Path) -> None:
    write_picture(tmp_path / "media" / "one.png", 1)
    (tmp_path / "media" / "one.txt").write_text("red, green, blue, yellow, white")
    captions = {"shuffle_tags": True, "variants": 2}
    config = config_of(tmp_path, tmp_path / "media", online=["text"], captions=captions)
    data = open_data(config, config.data.sources, SmallEncoder(joint=True), Alone())
    assert len({data.batch(step).captions[0] for step in range(20)}) == 2  # "joint" is cached, of two captions
    free = config_of(tmp_path, tmp_path / "media", online=["text", "media"], captions=captions)
    data = open_data(free, free.data.sources, SmallEncoder(joint=True), Alone())
    assert len({data.batch(step).captions[0] for step in range(20)}) > 10


def test_regenerate_looks_anew_at_files_that_are_known_by_their_path(tmp_path: Path) -> None:
    write_picture(tmp_path / "media" / "one.png", 1, (32, 64))
    config = config_of(tmp_path, tmp_path / "media", examine="trust", buckets={"aspects": [0.5, 1.0, 2.0]})

    def shape(**options: bool) -> tuple[int, int]:
        data = open_data(config, config.data.sources, SmallEncoder(), Alone(), **options)
        return data.buckets[0].height, data.buckets[0].width

    before = shape()
    write_picture(tmp_path / "media" / "one.png", 1, (64, 32))
    assert shape() == before
    assert shape(regenerate=True) == before[::-1] == shape()


def test_a_relative_path_is_another_file_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        contents = Contents(FactStore(tmp_path), trust=True)
        names.append((contents["a.png"], contents["shard.tar::a.png"]))
        assert contents["a.png"] == contents[str(tmp_path / name / "a.png")]
        assert contents["s3://bucket/a.png"] == Contents(FactStore(tmp_path), trust=True)["s3://bucket/a.png"]
    assert len({*names[0], *names[1]}) == 4


@pytest.fixture
def believed(tmp_path: Path) -> Callable[..., Config]:
    """A table of four pictures that is believed; the second is torn, the mask of the third has another shape."""
    rows = []
    for k in range(4):
        write_picture(tmp_path / f"{k}.png", k)
        Image.new("L", (20, 40) if k == 2 else (40, 40), 255).save(tmp_path / f"mask{k}.png")
        rows.append({"path": f"{k}.png", "text": f"text {k}", "height": 40, "width": 40, "mask": f"mask{k}.png"})
    tear(tmp_path / "1.png")
    table = write_table(tmp_path / "table.csv", rows)
    return lambda **data: config_of(tmp_path, table, examine="trust", **data)


def test_what_cannot_be_read_when_its_turn_comes_teaches_nothing_and_is_listed(
    believed: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = believed(online=["media"])
    data = open_data(config, config.data.sources, SmallEncoder(), Alone())
    weights: dict[str, float] = {}
    for step in range(4):
        batch = data.batch(step)
        assert all(one.shape == batch.tensors["latents"][0].shape for one in batch.tensors["latents"])
        weights |= dict(zip(batch.captions, batch.weights, strict=True))
    assert weights == {"text 0": 0.5, "text 1": 0.0, "text 2": 0.0, "text 3": 0.5}
    assert {Path(path).name: entry.code for path, entry in data.unread.items()} == {
        "1.png": "unreadable picture",
        "2.png": "mask of another shape",
    }
    said = capsys.readouterr().err
    assert said.count("Left out of the training: ") == 2 and "1.png" in said
    strict = believed(online=["media"], strict=True)
    data = open_data(strict, strict.data.sources, SmallEncoder(), Alone())
    with pytest.raises(UserError, match=r"data\.strict is set, and a file cannot be used"):
        [data.batch(step) for step in range(2)]


def test_what_is_cached_lists_the_same_before_the_training(believed: Callable[..., Config]) -> None:
    config = believed()
    data = open_data(config, config.data.sources, SmallEncoder(), Alone())
    assert sorted(Path(one.path).name for one in data.left_out) == ["1.png", "2.png"] and len(data) == 2


def test_a_storage_that_is_gone_stops_the_run(believed: Callable[..., Config], tmp_path: Path) -> None:
    config = believed(online=["media"])
    data = open_data(config, config.data.sources, SmallEncoder(), Alone())
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="50 samples in a row cannot be read"):
        [data.batch(step) for step in range(30)]


def test_ranks_share_the_reading_that_the_identity_asks_for(tmp_path: Path) -> None:
    for k in range(8):
        write_picture(tmp_path / "media" / f"{k}.png", k)
    config = config_of(tmp_path, tmp_path / "media", online=["media"], examine="headers")
    ranks = ThreadRanks(2)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda n: open_data(config, config.data.sources, SmallEncoder(), ranks.rank(n)), range(2))
    assert dict(one.contents.found) == dict(other.contents.found) and len(one.contents.found) == 8
    for path in (tmp_path / "media").glob("*.png"):
        path.unlink()
    assert one.fingerprint == other.fingerprint  # nothing is left to read


def test_sources_of_one_name_are_counted_apart(tmp_path: Path) -> None:
    for k, folder in enumerate(("a", "b")):
        write_picture(tmp_path / folder / "clips" / "good.png", k)
        (tmp_path / folder / "clips" / "bare.png").touch()
    (tmp_path / "b" / "clips" / "bare2.png").touch()
    config = config_of(tmp_path, tmp_path / "a" / "clips", tmp_path / "b" / "clips")
    found = inspect_data(config, config.data.sources, SmallEncoder(), Alone())
    assert [(one.name, one.records, one.used) for one in found.sources] == [("clips", 2, 1), ("clips", 3, 1)]
    assert found.records == 5 and [one.code for one in found.left_out] == ["no caption"] * 3


def test_short_videos_are_counted_and_named_by_the_lengths_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for k in range(3):
        write_video(tmp_path / "media" / f"{k}.mp4", [numbered_frame(i, 32, 32) for i in range(12)], rate=16)
        (tmp_path / "media" / f"{k}.txt").write_text("a video")

    def notes(sizes: list[list[int]]) -> tuple[int, list[str]]:
        config = config_of(tmp_path, tmp_path / "media", buckets={"sizes": sizes, "fps": 16})
        found = inspect_data(config, config.data.sources, SmallEncoder(), Alone())
        return found.counts.get("short video", 0), [note for _, note in found.notes]

    assert notes([[32, 32, 1], [32, 32, 9]]) == (0, [])
    assert notes([[32, 32, 1]]) == (0, [])
    count, said = notes([[32, 32, 1], [32, 32, 17]])
    assert count == 3 == len(said) and "one frame of it is used" in said[0]


def test_scores_that_are_told_belong_to_the_identity_of_the_data(tmp_path: Path) -> None:
    write_picture(tmp_path / "one.png", 1)
    prints = set()
    for motion in (1, 2):
        rows = [{"path": "one.png", "text": "a text", "motion": motion}]
        table = write_table(tmp_path / "table.csv", rows)
        config = config_of(tmp_path, table, captions={"scores": ["motion"]})
        data = open_data(config, config.data.sources, SmallEncoder(), Alone())
        assert data.batch(0).captions == [f"a text {motion} motion score."]
        prints.add(data.fingerprint)
    assert len(prints) == 2
    assert torch.isfinite(data.batch(0).tensors["latents"][0]).all()


def test_a_row_that_fails_takes_no_other_row_of_its_file_along(tmp_path: Path) -> None:
    write_picture(tmp_path / "one.png", 1, (64, 64))
    rows = [
        {"path": "one.png", "text": f"text {k}", "height": 64, "width": 64, "crop": crop}
        for k, crop in enumerate(("0,0,32,32", "40,40,80,80", "32,32,64,64"))
    ]
    config = config_of(tmp_path, write_table(tmp_path / "table.csv", rows), examine="trust")
    data = open_data(config, config.data.sources, SmallEncoder(), Alone())
    assert [entry.code for entry in data.left_out] == ["crop outside"]
    assert sorted(item.record.captions[0] for item in data.items) == ["text 0", "text 2"]


def test_a_mistake_in_the_buckets_shows_before_any_file_is_looked_at(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path / "nowhere", buckets={"frames": [2]})
    with pytest.raises(UserError, match="2 frames do not fit this model"):
        open_data(config, config.data.sources, SmallEncoder(), Alone())


def test_of_a_huge_set_some_captions_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"path": f"{k}.png", "text": "word " * (k + 1), "height": 40, "width": 40} for k in range(100)]
    config = config_of(tmp_path, write_table(tmp_path / "table.csv", rows), examine="trust")
    monkeypatch.setattr("kinema.data.inspection.CAPTIONS", 20)
    said: list[str] = []
    found = inspect_data(config, config.data.sources, SmallEncoder(), Alone(), say=said.append)
    captions = found.captions
    assert (captions.records, captions.words_least, captions.words_most) == (20, 1, 96)  # every fifth
    assert found.used == 100 and not found.duplicates and "Duplicates are not looked for" in said[0]


def test_what_examining_found_is_not_looked_for_again_when_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinema.data import reading

    (tmp_path / "media").mkdir()
    for k in range(3):
        write_video(tmp_path / "media" / f"{k}.mp4", [numbered_frame(9 * k + i, 40, 40) for i in range(9)], rate=16)
        (tmp_path / "media" / f"{k}.txt").write_text("text")
    probed: list[str] = []
    monkeypatch.setattr(reading, "probe", probed.append)
    encoder = SmallEncoder()
    config = config_of(tmp_path, tmp_path / "media", buckets={"frames": [9]})
    data = open_data(config, config.data.sources, encoder, Alone())
    assert len(data) == 3 and encoder.calls["latents"] == 3 and not probed
