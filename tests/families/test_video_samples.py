"""Samples of LTX-Video, HunyuanVideo and HunyuanVideo-1.5 through their pipelines, as previews draw them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.config.schema import ModelConfig
from kinema.families.registry import family_class, open_family
from kinema.sampling.pipeline import SampleSettings, sample_many

MODELS = [
    *(("ltx_video", v, 64, 96, 9) for v in ("t2v-2b-0.9", "i2v-2b-0.9", "i2v-2b-0.9.1", "t2v-2b-0.9.5")),
    ("ltx_video", "i2v-13b-0.9.7", 64, 96, 9),
    *(("hunyuan_video", v, 32, 48, 9) for v in ("t2v", "i2v", "i2v-33ch")),
    *(("hunyuan_video15", v, 32, 64, 5) for v in ("480p-t2v", "720p-i2v", "480p-i2v-step-distilled")),
]


@pytest.mark.parametrize(("name", "variant", "height", "width", "frames"), MODELS)
def test_samples_have_their_size_and_do_not_depend_on_each_other(
    tmp_path: Path, name: str, variant: str, height: int, width: int, frames: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    directory = family_class(name).tiny(tmp_path / "model", variant)
    family = open_family(ModelConfig(family=name, variant=variant, path=str(directory)))
    pipeline = family.pipeline({part: family.load(part, "cpu", torch.float32) for part in family.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    fixed: dict[str, Any] = {"height": height, "width": width, "frames": frames, "steps": 2, "guidance": 3.0}
    if family.from_image:
        fixed["images"] = (tmp_path / "picture.png",)
    settings = [SampleSettings(prompt=prompt, seed=i, **fixed) for i, prompt in enumerate(("a red ball", "a box"))]
    both = list(sample_many(family, pipeline, settings))
    assert [sample.shape for sample in both] == [(3, frames, height, width)] * 2
    (alone,) = sample_many(family, pipeline, settings[1:])
    torch.testing.assert_close(both[1], alone, rtol=0, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.05
