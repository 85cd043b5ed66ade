"""Samples equal what diffusers' pipeline gives when it is called by hand, whatever the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.registry import family_class, family_names, open_family
from kinema.sampling.pipeline import SampleSettings, check_shift, sample_many, shifted
from kinema.sampling.references import picture
from kinema.sampling.texts import Texts
from kinema.sampling.weights import Weights, load_parts


def draw(pipeline, settings, *args, **kwargs):
    """`sample_many` for a Wan pipeline."""
    variant = "i2v-14b-480p" if "Image" in type(pipeline).__name__ else "t2v-1.3b"
    return sample_many(open_family(ModelConfig(family="wan", variant=variant)), pipeline, settings, *args, **kwargs)


SETTINGS = SampleSettings("a red ball", 32, 48, 9, steps=3, guidance=4.0, negative="blue box", text_length=512)


def pipeline_of(directory: Path) -> Any:
    family = open_family(ModelConfig(family="wan", path=str(directory)))
    pipeline = family.pipeline(load_parts(Weights(family, "tiny"), "cpu", torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def text_to_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("t2v"), "t2v-1.3b", seed=3)


@pytest.fixture(scope="module")
def pipeline(text_to_video: Path) -> Any:
    return pipeline_of(text_to_video)


def by_hand(directory: Path, settings: SampleSettings, **extra: Any) -> torch.Tensor:
    """diffusers' own way, from its own loader: pixels in [0, 1], [C, T, H, W]."""
    from diffusers import DiffusionPipeline

    theirs = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    if settings.shift is not None:
        theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, flow_shift=settings.shift)
    frames = theirs(
        prompt=settings.prompt,
        negative_prompt=settings.negative,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
        max_sequence_length=settings.text_length or 512,
        output_type="pt",
        **extra,
    ).frames[0]
    return frames.permute(1, 0, 2, 3)


@pytest.mark.parametrize(
    "change", [{}, {"seed": 7, "guidance": 1.0}, {"shift": 9.0}, {"frames": 1}, {"text_length": None}]
)
def test_equals_diffusers(pipeline: Any, text_to_video: Path, change: dict[str, Any]) -> None:
    settings = replace(SETTINGS, **change)
    ours = next(draw(pipeline, [settings]))
    assert ours.shape == (3, settings.frames, 32, 48) and ours.dtype == torch.float32
    theirs = by_hand(text_to_video, settings) * 2 - 1
    assert (ours - theirs).abs().max().item() <= 1e-6
    assert ours.std() > 0.01  # not a grey field that anything equals


def test_image_to_video_equals_diffusers(tmp_path: Path) -> None:
    from PIL import Image

    directory = family_class("wan").tiny(tmp_path / "i2v", "i2v-14b-480p")
    noise = torch.randint(0, 256, (45, 80, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "first.png")
    settings = replace(SETTINGS, images=(tmp_path / "first.png",))
    pipeline = pipeline_of(directory)
    ours = next(draw(pipeline, [settings]))
    first = picture(tmp_path / "first.png", 32, 48)
    assert first.size == (48, 32)
    theirs = by_hand(directory, settings, image=first) * 2 - 1
    assert (ours - theirs).abs().max().item() <= 1e-6
    Image.new("RGB", (48, 32)).save(tmp_path / "black.png")
    other = next(draw(pipeline, [replace(settings, images=(tmp_path / "black.png",))]))
    assert (ours - other).abs().max().item() > 1e-3


def test_a_sample_does_not_depend_on_its_batch(pipeline: Any) -> None:
    prompts = ["a red ball", "blue box moves left", "green"]
    many = [replace(SETTINGS, prompt=prompts[i % 3], seed=i) for i in range(5)]
    many.insert(2, replace(SETTINGS, frames=5, seed=9))
    together = list(draw(pipeline, many, batch=4))
    assert [one.shape[1] for one in together] == [9, 9, 5, 9, 9, 9]
    for settings, batched in zip(many, together, strict=True):
        alone = next(draw(pipeline, [settings]))
        assert (alone - batched).abs().max().item() <= 2e-5
    distances = [(together[0] - one).abs().max().item() for one in (together[1], together[3])]
    assert min(distances) > 1e-2, "another seed or prompt makes another sample"


def test_calls_are_as_large_as_the_budget_allows(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    seen: list[tuple[tuple[int, ...], int, int]] = []
    monkeypatch.setattr("kinema.sampling.pipeline.BATCH_PIXELS", 2 * 32 * 48 * 9 + 1)

    def on_step(group: Any, done: int, steps: int) -> None:
        seen.append((tuple(group), done, steps))
        if done == 1:
            sizes.append(len(group))

    large = replace(SETTINGS, height=64)
    list(draw(pipeline, [SETTINGS, SETTINGS, SETTINGS, large, large], on_step=on_step))
    assert sizes == [2, 1, 1, 1]
    assert seen[:4] == [((0, 1), 1, 3), ((0, 1), 2, 3), ((0, 1), 3, 3), ((2,), 1, 3)]


def test_each_text_is_encoded_once(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    own = pipeline.encode_prompt

    def counting(prompt: str | None = None, **arguments: Any) -> Any:
        if prompt is not None:
            encoded.append(prompt)
        return own(prompt=prompt, **arguments)

    monkeypatch.setattr(pipeline, "encode_prompt", counting)
    prompts = ["green", "a red ball", "green"]
    many = [replace(SETTINGS, prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
    first = list(draw(pipeline, many, batch=1))
    assert sorted(encoded) == ["a red ball", "blue box", "green"]

    texts = Texts(family_class("wan")(ModelConfig(family="wan", variant="t2v-1.3b")), pipeline)
    texts.encode(many)
    monkeypatch.setattr(pipeline, "text_encoder", None)
    again = list(draw(pipeline, many, batch=1, texts=texts))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_sampling_leaves_the_pipeline_and_the_random_state_alone(pipeline: Any) -> None:
    scheduler, state = pipeline.scheduler, torch.get_rng_state()
    a = next(draw(pipeline, [replace(SETTINGS, shift=7.0)]))
    assert pipeline.scheduler is scheduler
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(a, next(draw(pipeline, [replace(SETTINGS, shift=7.0)])))


def test_shifts_of_schedulers() -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    euler = shifted(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), 5.0)
    euler.set_timesteps(sigmas=[1.0, 0.5])
    assert euler.sigmas.tolist() == pytest.approx([1.0, 5 * 0.5 / (1 + 4 * 0.5), 0.0])
    with pytest.raises(UserError, match="DDIMScheduler has no time shift"):
        shifted(DDIMScheduler(), 5.0)


@pytest.mark.parametrize("name", family_names())
def test_whether_a_shift_is_possible_is_known_without_weights(name: str) -> None:
    """For every variant what its scheduler, once loaded, says too."""
    for variant in family_class(name).variants:
        family = open_family(ModelConfig(family=name, variant=variant))
        scheduler = family.load("scheduler", "cpu", None)
        if any(key in scheduler.config for key in ("shift", "flow_shift")):
            check_shift(family)
            found = shifted(scheduler, 2.5).config
            assert 2.5 in (found.get("shift"), found.get("flow_shift"))
            continue
        message = f"--shift: {type(scheduler).__name__} has no time shift"
        with pytest.raises(UserError, match=message):
            check_shift(family)
        with pytest.raises(UserError, match=message):
            shifted(scheduler, 2.5)
