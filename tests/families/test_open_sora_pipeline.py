"""Open-Sora's pipeline on tiny networks: what it hands to the network, and what its options do to a sample."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from kinema.data.transform import Transform, fit
from kinema.errors import UserError
from kinema.families import open_sora_denoise
from kinema.families.base import Family
from kinema.families.open_sora_pipeline import OpenSoraPipeline
from kinema.families.open_sora_schedule import growing_with_time, oscillating, schedule
from kinema.families.open_sora_strategy import Given
from kinema.families.tiny import clip_text, clip_tokenizer, spread, t5_encoder, t5_tokenizer
from kinema.networks.dc_ae import VideoDCAE
from kinema.networks.open_sora import OpenSoraTransformer, pack, positions, unpack
from kinema.sampling.pipeline import SampleSettings, sample_many, shifted
from kinema.sampling.texts import Texts

SIZE = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}
ROUNDING = 5e-5
"""Of values up to about 5, after guidance that enlarges what rounding does by 7.5 in every step."""
SEEDED = {"seed": 0, "output_type": "latent", "return_dict": False, **SIZE}


@functools.cache
def text_parts() -> dict[str, Any]:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    torch.manual_seed(1)
    encoders = {"text_encoder": clip_text(clip, 24), "text_encoder_2": t5_encoder(t5, 32)}
    return {"tokenizer": clip, "tokenizer_2": t5, **encoders}


def network(channels: int = 64, patch: int = 2, **settings: Any) -> OpenSoraTransformer:
    """A tiny one with random weights that answers differently to all that it is told."""
    torch.manual_seed(2)
    made = OpenSoraTransformer(
        in_channels=channels,
        patch_size=patch,
        vec_in_dim=24,
        context_in_dim=32,
        hidden_size=32,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(4, 6, 6),
        **settings,
    )
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    if made.cond_in is not None:
        made.cond_in.weight.data *= 4
    return made.eval().requires_grad_(False)


def autoencoder() -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(3)
    return spread(AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 12, 12), norm_num_groups=4).eval())


def dc_ae() -> VideoDCAE:
    torch.manual_seed(4)
    widths = (8, 8, 8, 32, 32, 32)
    return VideoDCAE(
        latent_channels=16,
        encoder_widths=widths,
        decoder_widths=widths,
        encoder_depths=(1,) * 6,
        decoder_depths=(1,) * 6,
        scaling_factor=0.5,
    ).eval()


def pipeline_of(transformer: Any, vae: Any, scheduler: Any = None) -> OpenSoraPipeline:
    made = OpenSoraPipeline(transformer, vae, scheduler, **text_parts())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipeline() -> OpenSoraPipeline:
    return pipeline_of(network(), autoencoder())


@pytest.fixture(scope="module")
def causal_free() -> OpenSoraPipeline:
    """With a video DC-AE."""
    return pipeline_of(network(16, 1), dc_ae())


def picture(seed: int, height: int = 32, width: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(seed: int, frames: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """[1, C, t, h, w] of pixels [3, T, H, W], by hand."""
    return vae.encode(pixels[None]).latent_dist.mode() * vae.config.scaling_factor


def by_hand(
    pipeline: OpenSoraPipeline, prompt: str, negative: str, noise: Tensor, cond: Tensor, steps: int, full_steps: int
) -> Tensor:
    """The published sampler, in three passes of one sample: latents [1, C, T, H, W]; ``cond`` [1, N, 68]."""
    network = pipeline.transformer

    def told(text: str) -> dict[str, Tensor]:
        ids = [
            tokenizer(text, padding="max_length", max_length=most, truncation=True, return_tensors="pt").input_ids
            for tokenizer, most in ((pipeline.tokenizer_2, 512), (pipeline.tokenizer, 77))
        ]
        tokens, pooled = pipeline.text_encoder_2(ids[0])[0], pipeline.text_encoder(ids[1]).pooler_output
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    size = noise.shape[2:]
    places, x = positions(size, 2), pack(noise, 2)
    times = schedule(steps, size[1] * size[2] // 4, size[0])
    for i, (t, t_next) in enumerate(pairwise(times)):
        c, u, n = (
            network(x, torch.tensor([t]), img_ids=places, cond=own, return_dict=False, **told(text))[0]
            for text, own in ((prompt, cond), (negative, cond), (negative, torch.zeros_like(cond)))
        )
        image: Any = oscillating(3.0, i, full_steps)
        if image > 1 and cond.any():
            scale = growing_with_time(image, i, steps, size[0]).view(1, 1, -1, 1, 1)
            image = pack(scale.expand(noise.shape), 2)
        x = x + (t_next - t) * (n + image * (u - n) + oscillating(7.5, i, full_steps) * (c - u))
    return unpack(x, size, 2)


@pytest.mark.parametrize("condition", ["t2v", "i2v_head", "i2v_loop"])
@torch.no_grad()
def test_equals_the_published_sampler(pipeline: OpenSoraPipeline, condition: str) -> None:
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(5))
    shown = [picture(6), picture(7)]
    mask, masked = torch.zeros(1, 1, 3, 4, 6), torch.zeros_like(noise)
    for at, one in {"t2v": [], "i2v_head": [(0, 0)], "i2v_loop": [(0, 0), (-1, 1)]}[condition]:
        pixels = torch.from_numpy(np.array(shown[one])).permute(2, 0, 1)[:, None] / 127.5 - 1
        mask[:, :, at], masked[:, :, at] = 1, encoded(pipeline.vae, pixels)[:, :, 0]
    cond = pack(torch.cat([mask, masked], dim=1), 2)
    expected = by_hand(pipeline, "a red ball", "blue", noise, cond, 6, full_steps=2)
    expected = torch.where(mask.bool(), masked, expected)
    ours = pipeline(
        "a red ball",
        "blue",
        references=shown[: {"t2v": 0, "i2v_head": 1, "i2v_loop": 2}[condition]] or None,
        latents=noise,
        full_steps=2,
        **{**SEEDED, "num_inference_steps": 6, "seed": None},
    )[0]
    assert apart(ours, expected) <= 1e-5 * expected.abs().max().item()
    assert apart(ours, noise) > 0.1
    frames = pipeline(
        "a red ball",
        "blue",
        references=shown[: {"t2v": 0, "i2v_head": 1, "i2v_loop": 2}[condition]] or None,
        latents=noise,
        full_steps=2,
        **{**SIZE, "num_inference_steps": 6, "output_type": "pt"},
    ).frames
    pixels = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample.transpose(1, 2)
    assert frames.shape == (1, 9, 3, 32, 48) and frames.std() > 0.02
    assert apart(frames, (pixels / 2 + 0.5).clamp(0, 1)) <= ROUNDING


def test_every_sample_has_noise_of_its_own(pipeline: OpenSoraPipeline) -> None:
    both = pipeline(["a red ball"] * 2, **SEEDED)[0]
    assert apart(both[0], both[1]) > 0.1
    zero, one = (pipeline("a red ball", **{**SEEDED, "seed": seed})[0] for seed in (0, 1))
    assert apart(both, torch.cat([zero, one])) <= ROUNDING
    assert torch.equal(zero, pipeline("a red ball", **SEEDED)[0]), "0 is a seed"
    drawn = [torch.Generator().manual_seed(seed) for seed in (1, 0)]
    other = pipeline(["a red ball"] * 2, **{**SEEDED, "seed": None}, generator=drawn)[0]
    assert apart(other, both.flip(0)) <= ROUNDING
    free = [pipeline("a red ball", **{**SEEDED, "seed": None})[0] for _ in range(2)]
    assert apart(*free) > 0.1


def test_every_option_of_guidance_tells(pipeline: OpenSoraPipeline) -> None:
    told = {**SEEDED, "num_inference_steps": 5, "references": picture(6), "full_steps": 2}
    usual = pipeline("a red ball", "blue", **told)[0]
    for change in (
        {"text_osci": False},
        {"image_osci": False},
        {"scale_temporal_osci": False},
        {"full_steps": 10},
        {"guidance_scale": 4.0},
        {"image_guidance_scale": 1.5},
        {"negative_prompt": "green"},
        {"shift": 1.0},
        {"shift": False},
        {"references": picture(8)},
        {"condition": "i2v_tail"},
    ):
        arguments = {"negative_prompt": "blue", **told, **change}
        assert apart(pipeline("a red ball", **arguments)[0], usual) > 4 * ROUNDING, change
    fixed, none = (pipeline("a red ball", "blue", **told, shift=shift)[0] for shift in (1.0, False))
    assert torch.equal(fixed, none)
    assert torch.equal(pipeline("a red ball", "blue", **told, shift=True)[0], usual)


def test_the_schedulers_shift_holds(pipeline: OpenSoraPipeline) -> None:
    fixed = pipeline_of(pipeline.transformer, pipeline.vae, shifted(pipeline.scheduler, 9.0))
    assert type(fixed.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(fixed("a red ball", **SEEDED)[0], pipeline("a red ball", shift=9.0, **SEEDED)[0])
    heard = []

    def end(_of: Any, step: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        heard.append((step, t))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    assert not fixed("a red ball", **SEEDED, callback_on_step_end=end)[0].any()
    assert heard == [(i, pytest.approx(1000 * 9 * u / (1 + 8 * u))) for i, u in enumerate((1, 0.75, 0.5, 0.25))]


def test_references_of_each_sample(pipeline: OpenSoraPipeline) -> None:
    """Pictures of any size are scaled to cover; every sample has its own put back; None is made from text alone."""
    large = picture(9, 100, 70)
    fitted = torch.from_numpy(fit(large, Transform(32, 48)).copy())[:, None] / 127.5 - 1
    told = {**SEEDED, "condition": "i2v_head"}
    drawn = pipeline(["a", "b", "c"], references=[[large], [picture(6)], None], **told)[0]
    assert apart(drawn[0, :, :1], encoded(pipeline.vae, fitted)[0]) <= ROUNDING
    for i, own in enumerate(([fitted], [picture(6)], None)):
        alone = pipeline("abc"[i], references=own, **{**SEEDED, "seed": i, "image_osci": False})[0]
        batched = pipeline(["a", "b", "c"], references=[[large], [picture(6)], None], **told, image_osci=False)[0][i]
        assert apart(alone[0], batched) <= ROUNDING
    assert apart(drawn[0, :, :1], drawn[1, :, :1]) > 0.05
    kept = pipeline("a", references=large, put_back=False, **SEEDED)[0]
    assert apart(kept[0, :, :1], drawn[0, :, :1]) > 0.05 and apart(kept[0, :, 1:], drawn[0, :, 1:]) <= ROUNDING


def test_a_mask_strategy_says_the_same_in_numbers(pipeline: OpenSoraPipeline) -> None:
    shown = [picture(6), picture(7)]
    named = pipeline("a", references=shown, condition="i2v_loop", **SEEDED)[0]
    for condition in ("0,0,0,0,1,0;0,1,0,-1,1,0", [Given(), Given(1, 0, 2)]):
        assert torch.equal(pipeline("a", references=shown, condition=condition, **SEEDED)[0], named)
    softly = pipeline("a", references=shown, condition="0;0,1,0,-1,1,0.5", **SEEDED)[0]
    assert torch.equal(softly[:, :, 0], named[:, :, 0]) and apart(softly[:, :, -1], named[:, :, -1]) > 0.05


def test_videos_are_conditions(pipeline: OpenSoraPipeline) -> None:
    """33 frames are told from the head or the tail of a longer video, and are encoded without what lies beside them."""
    video = clip(1, 40)
    told = {**SEEDED, "height": 16, "width": 16, "num_frames": 41, "num_inference_steps": 2}
    head = pipeline("a", references=video, condition="v2v_head", **told)[0]
    tail = pipeline("a", references=video, condition="v2v_tail", **told)[0]
    assert head.shape[2] == 11
    assert apart(head[:, :, :9], encoded(pipeline.vae, video[:, :33])) <= ROUNDING
    assert apart(tail[:, :, -9:], encoded(pipeline.vae, video[:, -33:])) <= ROUNDING
    even = pipeline("a", references=video, condition="v2v_head", scale_temporal_osci=False, **told)[0]
    assert torch.equal(even, head), "the scale of frames grows over time for pictures alone"
    other = torch.cat([video[:, :33], clip(2, 7)], dim=1)
    assert torch.equal(pipeline("a", references=other, condition="v2v_head", **told)[0], head)
    changed = torch.cat([clip(2, 33), video[:, 33:]], dim=1)
    assert apart(pipeline("a", references=changed, condition="v2v_head", **told)[0][:, :, 9:], head[:, :, 9:]) > 1e-3
    with pytest.raises(UserError, match="told 65 frames, and the reference has 40"):
        pipeline("a", references=video, condition="v2v_head_easy", **{**told, "num_frames": 69})
    with pytest.raises(UserError, match="gives all 33 frames of the video, which leaves none"):
        pipeline("a", references=video, condition="v2v_head", **{**told, "num_frames": 33})


def test_embeddings_of_before_need_no_text_encoder(pipeline: OpenSoraPipeline) -> None:
    expected = pipeline(["a red ball", "blue"], "green", **SEEDED)[0]
    embeds, negatives = pipeline.encode_prompt(["a red ball", "blue"], True, "green")
    assert [one.tokens.shape for one in embeds] == [(512, 32)] * 2 and embeds[0].pooled.shape == (24,)
    bare = OpenSoraPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler, None, None, None, None)
    bare.set_progress_bar_config(disable=True)
    again = bare(prompt_embeds=embeds, negative_prompt_embeds=negatives, **SEEDED)[0]
    assert apart(again, expected) <= ROUNDING
    # Without guidance of the text no negative text is asked for, with frames and without.
    plain = bare(prompt_embeds=embeds, guidance_scale=1.0, **SEEDED)[0]
    assert apart(plain, expected) > 1e-2
    shown = bare(prompt_embeds=embeds, guidance_scale=1.0, references=picture(6), **SEEDED)[0]
    weaker = bare(prompt_embeds=embeds, guidance_scale=1.0, image_guidance_scale=1.0, references=picture(6), **SEEDED)[
        0
    ]
    assert apart(shown, weaker) > 1e-3


def test_joined_passes_equal_passes_one_by_one(pipeline: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    joined = pipeline(["a", "b"], "c", references=picture(6), **SEEDED)[0]
    monkeypatch.setattr(open_sora_denoise, "JOINED_TOKENS", 0)
    single = pipeline(["a", "b"], "c", references=picture(6), **SEEDED)[0]
    hook.remove()
    assert sizes == [6] * 4 + [2] * 12
    assert apart(joined, single) <= ROUNDING


def test_distilled_networks_are_told_the_scale_in_one_pass() -> None:
    distilled = pipeline_of(network(guidance_embed=True, cond_embed=False), autoencoder())
    told: list[tuple[int, list[float], float]] = []
    distilled.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(
            (len(kwargs["hidden_states"]), kwargs["guidance"].tolist(), kwargs["timestep"][0].item())
        ),
        with_kwargs=True,
    )
    a = distilled(["a", "b"], guidance_scale=4.0, **SEEDED)[0]
    times = schedule(4, 6, 3)
    assert told == [(2, [4.0, 4.0], pytest.approx(t)) for t in times[:-1]]
    assert apart(a, distilled(["a", "b"], guidance_scale=2.0, **SEEDED)[0]) > 1e-3
    with pytest.raises(UserError, match="text alone"):
        distilled("a", references=picture(6), **SEEDED)


def test_the_video_dc_ae(causal_free: OpenSoraPipeline) -> None:
    """Any number of frames; a picture's latent stands for four frames, and is not put back in their place."""
    vae = causal_free.vae
    told = {**SEEDED, "height": 32, "width": 64, "num_frames": 10}
    latents = causal_free("a", references=picture(6), **told)[0]
    assert latents.shape == (1, 16, 3, 1, 2)
    given = vae.encode(torch.from_numpy(fit(picture(6), Transform(32, 64)).copy())[None, :, None] / 127.5 - 1)
    assert apart(latents[:, :, :1], given) > 1e-2
    back = causal_free("a", references=picture(6), put_back=True, **told)[0]
    assert apart(back[:, :, :1], given) <= ROUNDING and torch.equal(back[:, :, 1:], latents[:, :, 1:])
    frames = causal_free("a", references=picture(6), **{**told, "output_type": "pt"})[0]
    assert frames.shape == (1, 10, 3, 32, 64)
    expected = (vae.decode(latents)[:, :, :10].transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    assert apart(frames, expected) <= ROUNDING
    assert causal_free("a", **{**told, "num_frames": 1})[0].shape[2] == 1
    video = clip(3, 36, 32, 64)
    head = causal_free("a", references=video, condition="v2v_head", **{**told, "num_frames": 36})[0]
    assert head.shape[2] == 9 and apart(head[:, :, :8], vae.encode(video[None, :, :32])) <= ROUNDING


def test_longer_videos(pipeline: OpenSoraPipeline) -> None:
    size = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 3}
    first = pipeline(["a", "b"], seed=0, output_type="pt", **size).frames
    told = {"prompt": ["a", "b"], "num_frames": 9, "num_inference_steps": 3, "seed": 0, "overlap": 5}
    noises: list[Tensor] = []

    def hear(_network: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["timestep"][0] >= 1:
            noises.append(kwargs["hidden_states"][:2])

    hook = pipeline.transformer.register_forward_pre_hook(hear, with_kwargs=True)
    longer = pipeline.extend(first, stretches=3, **told)
    hook.remove()
    assert len(noises) == 3 and apart(noises[0][0], noises[0][1]) > 0.5
    assert min(apart(noises[i], noises[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.5, "each stretch has its own noise"
    assert longer.shape == (2, 9 + 3 * (9 - 5), 3, 16, 16)
    assert torch.equal(longer[:, :9], first), "what was there stays"
    twice = pipeline.extend(pipeline.extend(first, **told), stretches=2, **told)
    assert torch.equal(twice, longer)
    # A stretch is video-to-video from the last frames: its latents begin with theirs.
    ends = first[:, -5:].transpose(1, 2) * 2 - 1
    by_call = pipeline(
        ["a", "b"],
        references=[[ends[0]], [ends[1]]],
        condition=[Given(frames=2)],
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="pt",
        **size,
    ).frames
    drawn = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    assert torch.equal(pipeline.extend(first, **{**told, "seed": None}, generator=drawn)[:, 9:], by_call[:, 5:])
    black = first.clone()
    black[:, -5:] = 0
    assert apart(pipeline.extend(black, **told)[:, 9:], longer[:, 9:13]) > 1e-3
    assert apart(pipeline.extend(first, **told, edit=0.9)[:, 9:], longer[:, 9:13]) > 1e-3
    shown = pipeline.extend(first, **told, stretches=2, references=picture(4), condition="2,0,0,-1")
    assert torch.equal(shown[:, :13], longer[:, :13]) and apart(shown[:, 13:], longer[:, 13:17]) > 1e-3
    assert pipeline.extend(first, **{**told, "overlap": None}).shape[1] == 9 + 8, "one frame where 33 are too many"
    for overlap, message in ((0, "Give 1 to 8"), (9, "Give 1 to 8"), (4, "nearest: 1 or 5")):
        with pytest.raises(UserError, match=message):
            pipeline.extend(first, **{**told, "overlap": overlap})


def test_a_directory_holds_it(pipeline: OpenSoraPipeline, tmp_path: Any) -> None:
    pipeline.save_pretrained(tmp_path)
    again = OpenSoraPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a red ball", **SEEDED)[0], pipeline("a red ball", **SEEDED)[0])


def test_what_cannot_be_made_is_said(pipeline: OpenSoraPipeline) -> None:
    for change, message in (
        ({"height": 40}, "height 40: this model makes multiples of 16; nearest: 32 or 48"),
        ({"width": 8}, "width 8: .* nearest: 16"),
        ({"num_frames": 8}, r"8 frames: .* 4 k \+ 1; nearest: 5 or 9"),
        ({"num_frames": 0}, "nearest: 1"),
        ({"condition": "i2v_head"}, "there are none"),
        ({"references": [picture(1)] * 3}, "3 references: say with condition"),
        ({"references": [[picture(1)], None]}, "2 lists of references for 1 prompts"),
        ({"references": picture(1), "num_frames": 1}, "ask for more frames"),
        ({"references": picture(1), "condition": "i2v"}, "no condition 'i2v'"),
        ({"references": torch.zeros(3, 1, 16, 16)}, r"A reference of shape \(3, 1, 16, 16\)"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline("a", **{**SEEDED, **change})


class _Family(Family):
    """What `sample_many` asks a family."""

    def __init__(self) -> None:
        pass

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        references = {"references": list(pictures)} if pictures else {}
        return {"guidance_scale": guidance, "max_sequence_length": text_length or 512, **references}


_Family.__abstractmethods__ = frozenset()


def test_samples_as_the_command_draws_them(pipeline: OpenSoraPipeline, tmp_path: Any) -> None:
    """Texts are encoded once, apart from the call; a sample does not depend on its batch."""
    picture(6).save(tmp_path / "first.png")
    assert Texts(_Family(), pipeline).apart
    assert set(pipeline.components) >= {"transformer", "vae", "text_encoder", "text_encoder_2"}, "all are moved"
    usual = SampleSettings("a red ball", 32, 48, 9, 4, 7.5, 3.0, negative="blue", images=(tmp_path / "first.png",))
    wanted = [SampleSettings(**{**vars(usual), "prompt": prompt, "seed": seed}) for prompt in "ab" for seed in (0, 5)]
    together = list(sample_many(_Family(), pipeline, wanted))
    for one, video in zip(wanted, together, strict=True):
        told = {**SIZE, "seed": one.seed, "output_type": "pt"}
        alone = pipeline(one.prompt, "blue", references=picture(6), **told).frames[0]
        assert video.shape == (3, 9, 32, 48) and apart(video / 2 + 0.5, alone.transpose(0, 1)) <= ROUNDING
    assert apart(together[0], together[1]) > 1e-2
    (steep,) = sample_many(_Family(), pipeline, [SampleSettings(**{**vars(usual), "shift": 9.0})])
    expected = pipeline("a red ball", "blue", references=picture(6), shift=9.0, seed=0, output_type="pt", **SIZE)
    assert apart(steep / 2 + 0.5, expected.frames[0].transpose(0, 1)) <= ROUNDING
