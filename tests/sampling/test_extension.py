"""`--extend`: longer videos, stretch by stretch, by a pipeline that is told several frames and by a first frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.registry import family_class, open_family
from kinema.randomness import derive_seed
from kinema.sampling.command import sample
from kinema.sampling.pipeline import SampleSettings, calls, sample_many
from kinema.sampling.references import picture
from kinema.sampling.writing import read_metadata, to_uint8, write_video

SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 9, "steps": 2}


@pytest.fixture(scope="module")
def open_sora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("open_sora").tiny(tmp_path_factory.mktemp("extend") / "v2", "v2", seed=6)


@pytest.fixture(scope="module")
def from_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("extend") / "i2v", "i2v-14b-480p", seed=6)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extend") / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def opened(name: str, directory: Path) -> tuple[Any, Any]:
    family = open_family(ModelConfig(family=name, path=str(directory)))
    pipeline = family.pipeline({part: family.load(part, "cpu", torch.float32) for part in family.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    return family, pipeline


def length(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_open_sora_goes_on_from_several_frames(open_sora: Path) -> None:
    """As its pipeline does in two calls; a sample of a batch is that sample alone; every step is told."""
    family, pipeline = opened("open_sora", open_sora)
    usual = SampleSettings("a ball", 32, 32, 9, 2, 7.5, 3.0, text_length=512, extend=2, overlap=5, edit=0.25)
    wanted = [SampleSettings(**{**vars(usual), "seed": seed}) for seed in (3, 9)]
    steps: list[tuple[int, int]] = []
    both = list(sample_many(family, pipeline, wanted, on_step=lambda _, done, most: steps.append((done, most))))
    assert steps == [(i, 6) for i in range(1, 7)], "one call of three stretches"
    told = {"prompt": "a ball", "num_frames": 9, "num_inference_steps": 2}
    for seed, ours in zip((3, 9), both, strict=True):
        begun = pipeline(height=32, width=32, seed=seed, output_type="pt", **told).frames
        whole = pipeline.extend(begun, stretches=2, overlap=5, edit=0.25, seed=seed, **told)
        assert whole.shape[1] == 17
        torch.testing.assert_close(ours / 2 + 0.5, whole[0].transpose(0, 1), rtol=0, atol=1e-4)
    (shorter,) = sample_many(family, pipeline, [SampleSettings(**{**vars(wanted[0]), "extend": 1})])
    torch.testing.assert_close(both[0][:, :13], shorter, rtol=0, atol=1e-4)
    (kept,) = sample_many(family, pipeline, [SampleSettings(**{**vars(wanted[0]), "edit": None})])
    assert (kept - both[0]).abs()[:, 9:].max() > 1e-3, "edit tells"


def test_a_first_frame_goes_on_from_the_last_one(from_image: Path, first: Path) -> None:
    family, pipeline = opened("wan", from_image)
    settings = SampleSettings("a ball", 32, 32, 9, 2, 4.0, images=(first,), text_length=512, seed=7, extend=2)
    assert calls(family, [settings, settings]) == [[0], [1]], "stretches have first frames of their own"
    (ours,) = sample_many(family, pipeline, [settings])
    assert ours.shape == (3, 9 + 8 + 8, 32, 32)

    whole, frame, seed = [], picture(first, 32, 32), 7
    for stretch in range(3):
        drawn = pipeline(
            image=frame, prompt="a ball", negative_prompt="", height=32, width=32, num_frames=9, num_inference_steps=2,
            guidance_scale=4.0, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt",
        ).frames[0]  # fmt: skip
        whole.append(drawn[1:] if stretch else drawn)
        frame = Image.fromarray(to_uint8(whole[-1].transpose(0, 1) * 2 - 1)[-1])
        seed = derive_seed(7, "extend", sum(map(len, whole)))
    torch.testing.assert_close(ours / 2 + 0.5, torch.cat(whole).transpose(0, 1), rtol=0, atol=1e-5)


def test_lists_batches_repeats_and_what_is_there_already(
    open_sora: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": "a ball", "extend": 1, "overlap": 5, "num_samples": 2},
        {"text": "a box", "extend": 1, "ref": str(first), "condition": "0,0;1,0,0,-1", "overlap": 5},
        {"text": "a boat", "extend": 1, "ref": "clip.mp4", "condition": "v2v_head_5", "overlap": 5},
        {"text": "a cone"},
    ]
    clip = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    write_video(clip, tmp_path / "clip.mp4", 24)
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {"model": str(open_sora), "prompt_list": tmp_path / "l.jsonl", **SMALL}
    paths = sample(**options, out=tmp_path / "out")
    assert [path.name for path in paths] == [
        "a-ball-0.mp4",
        "a-ball-1.mp4",
        "a-box-0.mp4",
        "a-boat-0.mp4",
        "a-cone-0.mp4",
    ]
    assert [length(path) for path in paths] == [13, 13, 13, 13, 9]
    found = [read_metadata(path) for path in paths]
    stretches = [(one["frames"], one.get("length"), one.get("extend")) for one in found]
    assert stretches == [(9, 13, 1)] * 4 + [(9, None, None)]
    assert found[1]["batch"] == {"place": 1, "others": [{"seed": 0}]}

    before = [path.read_bytes() for path in paths]
    for path in (paths[1], paths[3]):
        (again,) = sample(repeat=path)
        assert again.read_bytes() == path.read_bytes(), "a repeat is the same to the bit"
    paths[1].unlink()
    capsys.readouterr()
    sample(**options, out=tmp_path / "out")
    assert "4 of 5 are there already" in capsys.readouterr().err
    assert [path.read_bytes() for path in paths] == before
    (shorter,) = sample(repeat=paths[0], extend=0)
    assert length(shorter) == 9 and "overlap" not in read_metadata(shorter)
    (longer,) = sample(repeat=paths[0], extend=2, out=tmp_path / "longer")
    assert length(longer) == 17 and read_metadata(longer)["overlap"] == 5


def test_what_cannot_be_extended_is_said(open_sora: Path, from_image: Path, first: Path, tmp_path: Path) -> None:
    text = family_class("wan").tiny(tmp_path / "t2v", "t2v-1.3b")
    ends = family_class("wan").tiny(tmp_path / "flf2v", "flf2v-14b-720p")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (text, {"extend": 1}, "--extend: t2v-1.3b makes videos from text alone, .* told the last frame"),
        (ends, {"extend": 1, "images": [first] * 2}, "--extend: flf2v-14b-720p has to be told the last frame of every"),
        (from_image, {"extend": 1, "overlap": 5, "images": [first]}, "--overlap 5: i2v-14b-480p is told one frame"),
        (from_image, {"extend": 1, "edit": 0.5, "images": [first]}, "--edit 0.5: i2v-14b-480p keeps the frames"),
        (open_sora, {"overlap": 5}, "--overlap 5: no stretch is added; it belongs to --extend"),
        (open_sora, {"edit": 0.5}, "--edit 0.5: no stretch is added"),
        (open_sora, {"extend": 1, "overlap": 4}, "--overlap 4: .* nearest: 1 or 5"),
        (open_sora, {"extend": 1, "overlap": 9}, "--overlap 9: .* Give 1 to 8"),
        (open_sora, {"extend": 1, "frames": 1}, "--extend 1: a sample of 1 frame is a picture"),
        (open_sora, {"extend": 1, "edit": 1.5}, "--edit 1.5: expected a number from 0 to 1"),
        (open_sora, {"extend": -1}, "--extend -1: expected a whole number from 0 on"),
    ]
    for model, options, message in cases:
        with pytest.raises(UserError, match=message):
            sample(["x"], model=str(model), out=tmp_path / "out", **{**SMALL, **options})
    assert not (tmp_path / "out").exists()
