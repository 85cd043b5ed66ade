"""What training hands to the network is what diffusers' pipelines hand to it.

The pipelines are loaded and run by diffusers alone; every call of their network is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kinema.config.schema import ModelConfig
from kinema.data.batch import Batch, Sample
from kinema.families.prediction import convert, native_target
from kinema.families.registry import open_family
from kinema.families.wan import Wan

HEIGHT, WIDTH, FRAMES = 32, 48, 9
LATENTS = (16, 3, 4, 6)
PROMPT = "  a red ball moves left &amp; the blue\n\tbox   right "  # entities, spaces, unknown characters
NEGATIVE = "green"
CLOSE = {"rtol": 0.0, "atol": 1e-6}

Calls = list[dict[str, torch.Tensor]]


def clip(seed: int = 3) -> torch.Tensor:
    """uint8 [3, T, H, W]: smooth in space, so that resizing for CLIP is no lottery."""
    coarse = torch.rand(1, 3, FRAMES, 4, 6, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(FRAMES, HEIGHT, WIDTH), mode="trilinear")[0]
    return (fine * 255).to(torch.uint8)


def family_at(directory: Path) -> tuple[Wan, dict[str, Any]]:
    family = open_family(ModelConfig(family="wan", path=str(directory)))
    assert isinstance(family, Wan)
    return family, {part: family.load(part, "cpu", None) for part in family.variant.parts}


def encode(family: Wan, parts: dict[str, Any], caption: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for encoding in family.encodings():
        needed = {part: parts[part] for part in encoding.parts}  # nothing else may be used
        tensors |= family.encode(encoding, needed, [Sample(caption, pixels)])[0]
    return tensors


def batch_of(*samples: dict[str, torch.Tensor]) -> Batch:
    tensors = {name: [sample[name] for sample in samples] for name in samples[0]}
    count = len(samples)
    return Batch(0, tensors, [""] * count, list(range(count)), [1 / count] * count)


def recording(network: torch.nn.Module) -> Calls:
    """All keyword arguments of every call from now on; there must be no others."""
    calls: Calls = []

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert not args
        calls.append({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})

    network.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def run_pipeline(
    directory: Path,
    noise: torch.Tensor,
    *,
    euler: bool = False,
    answer: Callable[..., torch.Tensor] | None = None,
    guidance: float = 5.0,
) -> tuple[Calls, torch.Tensor, Any]:
    """Calls of the network in three steps, what the autoencoder was given to decode, and the pipeline."""
    import diffusers

    from_image = (directory / "image_encoder").is_dir()
    pipeline = (diffusers.WanImageToVideoPipeline if from_image else diffusers.WanPipeline).from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    if euler:
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    calls = recording(pipeline.transformer)
    if answer is not None:
        pipeline.transformer.forward = lambda **kwargs: (answer(**kwargs),)
    decoded: list[torch.Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, **kwargs: decoded.append(z.clone()) or decode(z, **kwargs)
    extra = {"image": Image.fromarray(clip()[:, 0].permute(1, 2, 0).numpy())} if from_image else {}
    pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
        num_inference_steps=3, guidance_scale=guidance, latents=noise.clone(), output_type="np", **extra,
    )  # fmt: skip
    return calls, decoded[0], pipeline


def noise(seed: int = 5) -> torch.Tensor:
    return torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_calls_of_the_network(variant: str, request: pytest.FixtureRequest) -> None:
    """Names, shapes and values of all inputs, in both branches of guidance, and the outputs."""
    directory = request.getfixturevalue(variant)
    theirs, _, pipeline = run_pipeline(directory, noise())
    assert len(theirs) == 6

    family, parts = family_at(directory)
    samples = {caption: encode(family, parts, caption, clip()) for caption in (PROMPT, NEGATIVE)}
    prepared = {caption: family.prepare(batch_of(sample)) for caption, sample in samples.items()}
    ours = recording(parts["network"])
    for step, call in enumerate(list(theirs)):
        x_t = call["hidden_states"][:, :16]
        conditioning = prepared[PROMPT if step % 2 == 0 else NEGATIVE].conditioning
        output = family.predict(parts["network"], x_t, call["timestep"] / 1000, conditioning)
        expected = {"hidden_states", "timestep", "encoder_hidden_states"}
        assert (
            set(call) == set(ours[step]) == expected | ({"encoder_hidden_states_image"} if variant == "i2v" else set())
        )
        for name, value in call.items():
            assert ours[step][name].shape == value.shape, name
            tolerance = {"rtol": 1e-6, "atol": 0.0} if name == "timestep" else CLOSE
            torch.testing.assert_close(ours[step][name], value.float(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        again = pipeline.transformer(**call, return_dict=False)[0]
        torch.testing.assert_close(output, again, rtol=1e-5, atol=1e-5)
    # The branches really differ, and padding is there, is zero, and follows the last real token.
    text = theirs[0]["encoder_hidden_states"]
    count = len(samples[PROMPT]["text"])
    assert text.shape[1] == 512 and 10 < count < 100
    assert text[0, count - 1].abs().max() > 0 and text[0, count:].abs().max() == 0
    assert (text - theirs[1]["encoder_hidden_states"]).abs().max() > 0.1
    if variant == "i2v":
        condition = theirs[0]["hidden_states"][:, 16:]
        assert condition.shape[1] == 20 and condition[:, :4, 0].min() == 1 and condition[:, :4, 1:].max() == 0
        assert condition[:, 4:].std() > 0.1


@pytest.mark.parametrize("euler", [True, False], ids=["euler", "unipc"])
@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_path_time_and_normalisation(variant: str, euler: bool, request: pytest.FixtureRequest) -> None:
    """A network that knows the answer leads the pipeline along our path to our latents.

    It returns our native target for our encoding of a clip. Then x_t of each step must be what training makes for
    that time, the time must be the one that training hands over, and what is decoded must be the autoencoder's
    own latents of the clip, before any normalisation.
    """
    directory = request.getfixturevalue(variant)
    family, parts = family_at(directory)
    sample = encode(family, parts, PROMPT, clip())
    x_0 = family.prepare(batch_of(sample)).latents
    eps = noise()
    target = native_target(family.path, x_0, eps, torch.tensor([0.5]))
    calls, decoded, pipeline = run_pipeline(directory, eps, euler=euler, answer=lambda **_: target, guidance=1.0)

    sigmas = pipeline.scheduler.sigmas
    ours = recording(parts["network"])
    assert len(calls) == 3 and sigmas[0] > 0.99 and 0.3 < sigmas[1] < 0.95
    for call, sigma in zip(calls, sigmas, strict=False):
        t = sigma.view(1)
        x_t = (1 - t) * x_0 + t * eps
        torch.testing.assert_close(call["hidden_states"][:, :16], x_t, rtol=0, atol=1e-5)
        family.predict(parts["network"], x_t, t, family.prepare(batch_of(sample)).conditioning)
        tolerance = 1e-3 if euler else 1.0  # UniPC rounds its times down to integers
        torch.testing.assert_close(ours[-1]["timestep"], call["timestep"].float(), rtol=0, atol=tolerance)
        recovered = convert(target, family.path.native, "x0", x_t, t)
        torch.testing.assert_close(recovered, x_0, rtol=0, atol=1e-5)

    with torch.no_grad():
        raw = parts["autoencoder"].encode(clip()[None].float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(decoded, raw.mean, rtol=0, atol=1e-4)
    scale = torch.tensor(parts["autoencoder"].config.latents_std).view(-1, 1, 1, 1)
    torch.testing.assert_close(sample["latents_std"] * scale, raw.std[0], rtol=1e-5, atol=0)
    assert (scale - 1).abs().max() > 1  # or the test would not see a missing division


def test_pipeline_over_our_parts(i2v: Path) -> None:
    """`pipeline` gives the frames of the pipeline that diffusers loads itself."""
    import diffusers

    family, parts = family_at(i2v)
    image = Image.fromarray(clip()[:, 0].permute(1, 2, 0).numpy())
    frames = []
    for pipeline in (family.pipeline(parts), diffusers.WanImageToVideoPipeline.from_pretrained(i2v)):
        pipeline.set_progress_bar_config(disable=True)
        result = pipeline(
            image, PROMPT, height=HEIGHT, width=WIDTH, num_frames=5, num_inference_steps=2,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        )  # fmt: skip
        frames.append(result.frames)
        assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
        assert pipeline.scheduler.config.flow_shift == 3.0
    torch.testing.assert_close(frames[0], frames[1], **CLOSE)


def test_encoding_does_not_depend_on_the_batch(i2v: Path) -> None:
    family, parts = family_at(i2v)
    captions = ["a ball", PROMPT, ""]
    for encoding in family.encodings():
        samples = [Sample(caption, clip(seed)) for seed, caption in enumerate(captions)]
        together = family.encode(encoding, parts, samples)
        for sample, row in zip(samples, together, strict=True):
            for name, value in family.encode(encoding, parts, [sample])[0].items():
                assert value.device.type == "cpu" and not value.requires_grad
                torch.testing.assert_close(row[name], value, rtol=0, atol=1e-5)
    counts = [len(row["text"]) for row in family.encode(family.encodings()[0], parts, samples)]
    assert counts[2] == 1 and counts[0] < counts[1]  # the empty caption is one end token


def test_long_captions_are_cut_with_a_warning(t2v: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = open_family(ModelConfig(family="wan", path=str(t2v), text_length=6))
    parts = {part: family.load(part, "cpu", None) for part in ("text_encoder", "tokenizer")}
    encoding = family.encodings()[0]
    assert encoding.settings != Wan(ModelConfig(family="wan", path=str(t2v))).encodings()[0].settings
    (row,) = family.encode(encoding, parts, [Sample("a red ball moves left over the box")])
    assert row["text"].shape == (6, 32)
    assert "9 tokens, the last 3 are cut" in caplog.text
    text = {"text": row["text"][:3], "latents": torch.zeros(LATENTS)}
    assert family.prepare(batch_of(text)).conditioning["encoder_hidden_states"].shape == (1, 6, 32)


def test_time_per_token(t2v: Path) -> None:
    """One time everywhere equals the same time for the sample; given frames at time 0 change the prediction."""
    family, parts = family_at(t2v)
    network = parts["network"]
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *LATENTS, generator=generator)
    conditioning = {"encoder_hidden_states": torch.randn(2, 512, 32, generator=generator)}
    t = torch.tensor([0.3, 0.8])
    calls = recording(network)
    with torch.no_grad():
        whole = family.predict(network, x_t, t, conditioning)
        positions = t.view(2, 1, 1, 1, 1).expand(2, 1, *LATENTS[1:]).clone()
        per_token = family.predict(network, x_t, positions, conditioning)
        positions[:, :, 0] = 0
        given = family.predict(network, x_t, positions, conditioning)
    torch.testing.assert_close(whole, per_token, rtol=0, atol=1e-5)
    assert calls[1]["timestep"].shape == (2, family.tokens(x_t)) == (2, 3 * 2 * 3)
    assert torch.equal(calls[2]["timestep"][0], torch.tensor([0.0] * 6 + [300.0] * 12))
    assert (given - whole).abs().max() > 1e-3
