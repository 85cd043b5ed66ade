"""Encoding on line: the same batches as from the cache, nothing cached, random clips and captions that vary."""

from pathlib import Path

import pytest
import torch
from media_files import numbered_frame, write_video
from small_encoder import Alone, SmallEncoder

from kinema.config.schema import Config
from kinema.data.batch import Sample
from kinema.data.dataset import Dataset, Use
from kinema.data.opening import open_data

FRAMES = 30


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for k in range(4):
        write_video(folder / f"video{k}.mp4", [numbered_frame(FRAMES * k + i, 32, 48) for i in range(FRAMES)], rate=16)
        (folder / f"video{k}.txt").write_text("red, green, blue, yellow")
    return folder


def open_set(
    media: Path, root: Path, encoder: SmallEncoder, online: list[str], training: bool = True, **more
) -> Dataset:
    buckets = {"resolutions": [32], "frames": [9], "fps": 16, **more.pop("buckets", {})}
    data = {"sources": [{"path": media}], "cache": root / "cache", "online": online, "buckets": buckets, **more}
    config = Config.model_validate(
        {
            "model": {"family": "small"},
            "data": {
                "sources": [{"path": media}],
                "cache": root / "cache",
                "online": online,
                "buckets": buckets,
                **data,
            },
            "training": {"steps": 1, "batch_size": 3, "precision": "fp32", "caption_dropout": 0.3},
        }
    )
    return open_data(config, config.data.sources, encoder, Alone(), training=training)


@pytest.mark.parametrize("online", [["media"], ["text"], ["media", "text"]])
def test_batches_are_those_of_the_cache_bit_for_bit(media: Path, tmp_path: Path, online: list[str]) -> None:
    encoder = SmallEncoder()
    cached = open_set(media, tmp_path / "cached", SmallEncoder(), [])
    fresh = open_set(media, tmp_path / "online", encoder, online)
    names = {"media": "latents", "text": "text"}
    assert not any(encoder.calls[names[kind]] for kind in online), "nothing is encoded ahead"
    assert len(fresh.cache) == (1 + 1) * ("text" not in online) + 4 * ("media" not in online)
    samples = 0
    for step in (0, 1, 2, 3, 1):
        one, other = cached.batch(step), fresh.batch(step)
        samples += len(one)
        assert one.captions == other.captions and one.dropped == other.dropped and one.indices == other.indices
        for name, tensors in one.tensors.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, other.tensors[name], strict=True))
    assert all(encoder.calls[names[kind]] == samples for kind in online)
    assert encoder.loaded == dict.fromkeys(encoder.loaded, 1), "encoders are loaded once and stay"


def test_held_out_sets_are_cached_all_the_same(media: Path, tmp_path: Path) -> None:
    encoder = SmallEncoder()
    data = open_set(media, tmp_path, encoder, ["media", "text"], training=False)
    assert data.online is None and encoder.calls["latents"] == 4


def test_random_clips_differ_at_every_use_and_repeat_with_the_step(media: Path, tmp_path: Path) -> None:
    data = open_set(media, tmp_path, SmallEncoder(), ["media"], buckets={"clip": "random"}, workers=2)
    again = open_set(media, tmp_path, SmallEncoder(), ["media"], buckets={"clip": "random"}, workers=0)
    starts: list[int] = []
    for step in range(60):
        drawn = data.order.batch(step)
        for index, use in zip(drawn.items, drawn.uses, strict=True):
            item = data._item_of(Use(int(index), int(use), (0,)))
            assert 0 <= item.clip.start <= FRAMES - 9 and item.spare == 0
            starts.append(item.clip.start)
        if step % 20 == 0:
            one, other = data.batch(step), again.batch(step)
            assert all(torch.equal(a, b) for a, b in zip(one.tensors["latents"], other.tensors["latents"], strict=True))
    assert len(starts) == 120
    # 22 places, each expected 5.45 times: chi-square has mean 21, and 47 is passed once in a thousand.
    counts = [starts.count(place) for place in range(FRAMES - 9 + 1)]
    assert sum((count - 120 / 22) ** 2 / (120 / 22) for count in counts) < 47


def test_captions_that_vary_are_encoded_as_they_are_drawn(media: Path, tmp_path: Path) -> None:
    encoder = SmallEncoder()
    captions = {"shuffle_tags": True, "keep_tags": 1, "prefix": "xyz, "}
    data = open_set(media, tmp_path, encoder, ["text"], captions=captions)
    parts = {"text_encoder": encoder.load("text_encoder", "cpu", torch.float32)}
    (text, _) = encoder.encodings()
    seen = set()
    for step in range(20):
        batch = data.batch(step)
        for row in range(len(batch)):
            assert batch.captions[row].startswith("xyz, red, ")
            assert sorted(batch.captions[row].split(", ")) == ["blue", "green", "red", "xyz", "yellow"]
            seen.add(batch.captions[row])

            told = batch.caption(row, "text_encoder")
            expected = encoder.encode(text, parts, [Sample(told)])[0]["text"]
            assert torch.equal(batch.tensors["text"][row], expected)
    assert len(seen) == 6, "all orders of three tags"
