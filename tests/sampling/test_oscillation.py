"""Guidance that oscillates through diffusers' callback: every step uses it, and it is refused where none would."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.cosmos_tiny import Unguarded
from kinema.families.registry import BUILT_IN, family_class, open_family
from kinema.families.steering import oscillating
from kinema.sampling.command import sample
from kinema.sampling.pipeline import SampleSettings, sample_many

SCALE, STEPS = 4.0, 5

# (family, variant, frames, side, the pipeline's scale for SCALE, the one that adds no guidance)
READ_IN_EACH_STEP = [
    ("ltx_video", "t2v-2b-0.9", 9, 32, SCALE, 1.0),
    ("sd3", None, 1, 32, SCALE, 1.0),
    ("sdxl", None, 1, 64, SCALE, 1.0),
    ("z_image", None, 1, 32, SCALE - 1, 0.0),
    ("cosmos_predict2", "text2image-2b", 1, 32, SCALE, 0.0),
]


@pytest.mark.parametrize(("name", "variant", "frames", "side", "scale", "none"), READ_IN_EACH_STEP)
def test_each_step_has_its_scale(
    tmp_path: Path, name: str, variant: str | None, frames: int, side: int, scale: float, none: float
) -> None:
    """The same as with a pipeline that is told no oscillation, but reads its scale from a table, by the step that its
    scheduler is at."""
    kind = family_class(name)
    variant = variant or next(iter(kind.variants))
    directory = kind.tiny(tmp_path, variant)
    family = open_family(ModelConfig(family=name, variant=variant, path=str(directory)))
    parts: dict[str, Any] = {part: family.load(part, "cpu", torch.float32) for part in family.variant.parts}
    if name.startswith("cosmos"):
        parts["safety_checker"] = Unguarded()
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    usual = SampleSettings("a red ball", side, side, frames, STEPS, SCALE, negative="a box")
    constant, low = (
        next(sample_many(family, pipeline, [SampleSettings(**{**vars(usual), **change})]))
        for change in ({}, {"text_osci": True, "full_steps": 1})
    )
    table = [scale, none, scale, none, scale]
    heard: list[float] = []

    class Reading(type(pipeline)):  # type: ignore[misc]
        @property
        def guidance_scale(self) -> float:
            heard.append(table[self.scheduler.step_index or 0])
            return heard[-1]

    pipeline.__class__ = Reading
    (expected,) = sample_many(family, pipeline, [usual])
    assert set(heard) == {scale, none}, "the pipeline reads its scale in every step"
    torch.testing.assert_close(low, expected, rtol=0, atol=1e-5)
    assert (low - constant).abs().max() > 1e-3


def test_open_soras_rule() -> None:
    assert [oscillating(7.5, step, 2) for step in range(6)] == [7.5, 7.5, 7.5, 1.0, 7.5, 1.0]
    assert {oscillating(7.5, step) for step in range(11)} == {7.5} and oscillating(7.5, 11, low=0.0) == 0.0


def reads_its_scale(kind: Any) -> bool:
    """Whether a pipeline's loop over the times reads the attribute that a callback can set."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__))))
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For) and "timesteps" in ast.unparse(node.iter)]
    read = {
        node.attr
        for loop in loops
        for node in ast.walk(loop)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Load)
    }
    return bool(read & {"guidance_scale", "_guidance_scale"}) and hasattr(kind, "do_classifier_free_guidance")


def test_it_is_accepted_where_the_scale_is_read_and_nowhere_else() -> None:
    for name in BUILT_IN:
        kind = family_class(name)
        for variant in kind.variants:
            family = open_family(ModelConfig(family=name, variant=variant))
            if family.variant.pipeline in ("OpenSoraPipeline", "OmniGen2Pipeline"):
                continue  # ours: the first has it built in, the second reads its scale once
            pipeline = family.pipeline_class  # type: ignore[attr-defined]
            assert (family.low_guidance is not None) == reads_its_scale(pipeline), (name, variant)


def test_it_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    wan = family_class("wan").tiny(tmp_path / "wan", "t2v-1.3b")
    for part in ("transformer", "vae", "text_encoder"):
        for file in (wan / part).glob("*.safetensors"):
            file.write_bytes(b"")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"text_osci": True}, "--text-osci: WanPipeline sets its guidance before the first step, for all of them"),
        ({"image_osci": True}, "--image-osci: t2v-1.3b has no guidance towards given frames"),
        ({"temporal_osci": True}, "--temporal-osci: t2v-1.3b has no guidance"),
        ({"full_steps": 3}, "--full-steps 3: nothing oscillates; it belongs to --text-osci"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            sample(["x"], model=str(wan), out=tmp_path / "out", **options)
    sdxl = family_class("sdxl").tiny(tmp_path / "sdxl", "base-eps")
    with pytest.raises(UserError, match="--text-osci: with a guidance of 1 nothing is guided"):
        sample(["x"], model=str(sdxl), guidance=1.0, text_osci=True, height=64, width=64, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
