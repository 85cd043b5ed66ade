"""Open-Sora 2.0's sampler at its real size on a GPU: seconds, memory, and the share of the device's peak that it uses.

All parts have random weights, drawn on the device (11.9B parameters and the text encoders in bf16, the autoencoder in
the type that it samples in): nothing is downloaded, and the machine's own memory never holds them. Two parts:

- network: one pass with each attention kernel that torch has for the device, and with ``--compile`` with compiled
  blocks; seconds (median), FLOP/s, peak memory, and how far the result is from the plain path (torch's own choice of
  kernel, nothing compiled), as the root mean square of the difference over that of the result.
- sample: 129 frames in 50 steps from text, with all parts on the device: encoding two texts, denoising with the fastest
  way found above, decoding. Where ``--limit`` seconds of denoising are over, it stops, and the rest is extrapolated by
  the number of passes, which is said. Without oscillating guidance every step has two passes; with it, as here, every
  other step from the twelfth on has one. The authors' sampler makes three in every step.

FLOPs of a pass: 2 in out for every token through a linear layer, 4 S^2 D for the attention of every block (S tokens of
text and video, D channels); nothing else is counted.

    python bench/open_sora.py [--sizes 256px 768px] [--steps 50] [--limit 240] [--compile]

Without a GPU, a tiny model takes the same way, to show that it runs; its figures say nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from kinema.config.schema import ModelConfig
from kinema.families.loading import kept_in_float32
from kinema.families.open_sora_denoise import Text, shares
from kinema.families.open_sora_pipeline import OpenSoraPipeline
from kinema.families.open_sora_schedule import Guidance
from kinema.families.open_sora_video import decode_latents
from kinema.families.registry import family_class, open_family
from kinema.memory.compile import compile_blocks
from kinema.networks.open_sora import pack, positions

FAMILY, VARIANT = "open_sora", "v2"
KERNELS = {
    "torch's choice": "native",
    "flash": "_native_flash",
    "cudnn": "_native_cudnn",
    "memory-efficient": "_native_efficient",
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s of dense bf16 matrix products, by what a device's name contains (makers' data sheets, SXM)."""
GUIDANCE, TEXT_TOKENS = 7.5, 512
GB = 1e9


@dataclass(frozen=True)
class Size:
    """What is drawn, and the figures to put beside it."""

    name: str
    height: int
    width: int
    frames: int = 129
    published: tuple[float, float] | None = None
    """Seconds and GB of the authors' sampler, one H100, 50 steps."""
    aim: tuple[float, float] | None = None
    """Seconds and GB that kinema aims at there."""


SIZES = {
    "256px": Size("256px", 192, 336, published=(60, 52.5), aim=(30, 40)),
    "768px": Size("768px", 576, 1024, published=(1656, 60.3), aim=(900, 48)),
}
TINY = Size("tiny", 64, 96, frames=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of a sample")
    parser.add_argument("--passes", type=int, default=3, help="timed passes of each way, after one to warm up")
    parser.add_argument("--limit", type=float, default=240, help="seconds of denoising, for each size")
    parser.add_argument("--compile", action="store_true", help="time compiled blocks too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    with torch.no_grad():
        if torch.cuda.is_available():
            device = torch.device("cuda")
            print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, random weights in bf16")
            bench(real_pipeline(device), [SIZES[name] for name in options.sizes], options)
        else:
            print("No GPU: a tiny model on the CPU, to show that this runs. Nothing below is a claim.")
            options.steps = min(options.steps, 13)
            with tempfile.TemporaryDirectory() as root:
                bench(tiny_pipeline(Path(root)), [TINY], options)


def bench(pipeline: OpenSoraPipeline, sizes: list[Size], options: argparse.Namespace) -> None:
    network = pipeline.transformer
    print(f"{sum(p.numel() for p in network.parameters()) / 1e9:.2f}B parameters in the network")
    plain: dict[str, Tensor] = {}
    best: dict[str, tuple[float, str]] = {}
    for size in sizes:
        for kernel in KERNELS:
            way = time_pass(pipeline, size, kernel, False, plain, options.passes)
            best[size.name] = min(best.get(size.name, (math.inf, "")), (way, kernel))
    if options.compile:
        compile_blocks(open_family(ModelConfig(family=FAMILY, variant=VARIANT)).blocks(network))
        for size in sizes:
            time_pass(pipeline, size, best[size.name][1], True, plain, options.passes)
    for size in sizes:
        kernel = best[size.name][1]
        network.set_attention_backend(KERNELS[kernel])
        print(f"{size.name:6} sample with the kernel '{kernel}'{', compiled blocks' if options.compile else ''}:")
        sample(pipeline, size, options.steps, options.limit)


# -- the model -------------------------------------------------------------------------------------------------------


def real_pipeline(device: torch.device) -> OpenSoraPipeline:
    """The published sizes, on the device."""
    family = open_family(ModelConfig(family=FAMILY, variant=VARIANT))
    names = {"network": "transformer", "autoencoder": "vae"}
    parts: dict[str, Any] = {"scheduler": None, "tokenizer": None, "tokenizer_2": None}
    for part in ("network", "autoencoder", "text_encoder", "text_encoder_2"):
        filled = fill(family.empty(part), device, family.part_dtype(part, torch.bfloat16))
        parts[names.get(part, part)] = filled
    parts["vae"].use_framewise_encoding = parts["vae"].use_framewise_decoding = False  # as the family loads it
    parts["vae"].enable_tiling()
    pipeline = OpenSoraPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fill(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Weights for a model on the meta device, drawn where they stay: matrices and kernels with the variance
    1 / inputs, scales of norms 1, biases 0."""
    draw = torch.Generator(device).manual_seed(0)
    exact, made = kept_in_float32(module, dtype), {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            kind = torch.float32 if exact & set(name.split(".")) else dtype
            if parameter.ndim > 1:
                value = torch.empty(parameter.shape, device=device, dtype=kind)
                value.normal_(std=parameter[0].numel() ** -0.5, generator=draw)
            else:
                value = torch.full(parameter.shape, float(not name.endswith("bias")), device=device, dtype=kind)
            made[id(parameter)] = nn.Parameter(value, requires_grad=False)
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, made[id(parameter)])
    return module.to(device).eval()


def tiny_pipeline(root: Path) -> OpenSoraPipeline:
    path = family_class(FAMILY).tiny(root / "tiny", VARIANT)
    family = open_family(ModelConfig(family=FAMILY, variant=VARIANT, path=str(path)))
    pipeline = family.pipeline({part: family.load(part, "cpu", torch.float32) for part in family.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# -- one pass of the network -----------------------------------------------------------------------------------------


def time_pass(
    pipeline: OpenSoraPipeline, size: Size, kernel: str, compiled: bool, plain: dict[str, Tensor], passes: int
) -> float:
    """Print what a pass takes one way; returns its seconds, infinity where the device has no such kernel."""
    network = pipeline.transformer
    network.set_attention_backend(KERNELS[kernel])
    inputs = network_inputs(pipeline, size)
    way = f"{size.name:6} {kernel:18}{'compiled' if compiled else '':9}"
    start_peak()
    try:
        mark = time.perf_counter()
        result = network(**inputs)[0]
        synchronise()
        first = time.perf_counter() - mark
        seconds = statistics.median(timed(lambda: network(**inputs)) for _ in range(passes))
    except RuntimeError as error:
        print(f"{way} not here: {str(error).strip().splitlines()[-1][:80]}")
        return math.inf
    result = result.float().cpu()
    far = result - plain.setdefault(size.name, result)
    work = pass_flops(network, inputs)
    print(
        f"{way}{seconds:9.3f} s ({first:.1f} s the first time)  {work / seconds / 1e12:7.1f} TFLOP/s"
        f"{share(work, seconds)}  {peak()}  {float(far.norm() / result.norm()):.1e} from the plain path"
    )
    return seconds


def network_inputs(pipeline: OpenSoraPipeline, size: Size) -> dict[str, Any]:
    network, config = pipeline.transformer, pipeline.transformer.config
    weight = network.img_in.weight
    draw = torch.Generator(weight.device).manual_seed(1)
    channels, *latent = pipeline._latent_shape(size.height, size.width, size.frames)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=weight.device, dtype=weight.dtype)

    return {
        "hidden_states": pack(noise(1, channels, *latent), config.patch_size),
        "timestep": torch.full((1,), 0.7, device=weight.device),
        "encoder_hidden_states": noise(1, TEXT_TOKENS, config.context_in_dim),
        "pooled_projections": noise(1, config.vec_in_dim),
        "img_ids": positions(latent, config.patch_size, weight.device),
        "return_dict": False,
    }


def pass_flops(network: nn.Module, inputs: dict[str, Any]) -> float:
    """Floating-point operations of one pass for one sample."""
    video, text = inputs["hidden_states"].shape[1], inputs["encoder_hidden_states"].shape[1]
    total = 0
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        vector = ("mod.lin", "modulation.lin", "adaLN_modulation.1")
        once = name.endswith(vector) or name.startswith(("time_in", "vector_in", "guidance_in"))
        tokens = 1 if once else text if ".txt_" in name or name == "txt_in" else video
        tokens += text if name.startswith("single_blocks") and not once else 0
        total += 2 * tokens * module.in_features * module.out_features
    blocks = len(network.double_blocks) + len(network.single_blocks)
    return total + 4 * blocks * (video + text) ** 2 * network.config.hidden_size


# -- a whole sample --------------------------------------------------------------------------------------------------


class Enough(Exception):
    """The time for denoising is over."""


def sample(pipeline: OpenSoraPipeline, size: Size, steps: int, limit: float) -> None:
    """Print what a sample takes."""
    passes = [len(shares(*scales, given=False)) for scales in guidance_scales(steps)]
    encode_text(pipeline)  # what is done once, such as choosing kernels, is no part of a sample
    start_peak()
    mark = time.perf_counter()
    texts = [encode_text(pipeline) for _ in range(2)]
    synchronise()
    encoding = time.perf_counter() - mark
    seconds, latents = denoise(pipeline, size, steps, limit, texts)
    mark = time.perf_counter()
    video = decode_latents(pipeline.vae, latents, size.frames)
    synchronise()
    decoding = time.perf_counter() - mark
    assert video.shape[2:] == (size.frames, size.height, size.width) and bool(video.isfinite().all())

    done, asked = sum(passes[: len(seconds)]), sum(passes)
    denoising = sum(seconds) * asked / done
    whole = encoding + denoising + decoding
    work = asked * pass_flops(pipeline.transformer, network_inputs(pipeline, size))
    how = (
        "measured" if done == asked else f"extrapolated from {done} of {asked} passes ({len(seconds)} of {steps} steps)"
    )
    print(
        f"{size.name} sample, {size.frames} frames, {steps} steps, {asked} passes: {whole:.1f} s ({how}): text "
        f"{encoding:.1f} s, network {denoising:.1f} s{share(work, denoising)}, autoencoder {decoding:.1f} s; {peak()}"
    )
    if size.published is not None and size.aim is not None and steps == 50:
        print(
            f"{size.name} published for one H100: {size.published[0]:g} s, {size.published[1]:g} GB; ratio "
            f"{whole / size.published[0]:.2f} in time, {peak_bytes() / GB / size.published[1]:.2f} in memory; "
            f"aim {size.aim[0]:g} s, {size.aim[1]:g} GB"
        )


def guidance_scales(steps: int) -> Iterator[tuple[float | None, float | Tensor]]:
    """The scales of text and of given frames at each step, of which there are none."""
    guidance = Guidance(GUIDANCE)
    for step in range(steps):
        text, image = guidance.scales(step, steps, 1)
        yield text, image


def encode_text(pipeline: OpenSoraPipeline) -> Text:
    """Ids drawn at random, as many as a text has with its padding."""
    clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2

    def ids(encoder: Any, length: int) -> Tensor:
        drawn = torch.randint(3, encoder.config.vocab_size, (1, length), device=encoder.device)
        if encoder.config.eos_token_id is not None:
            drawn[:, -1] = encoder.config.eos_token_id
        return drawn

    pooled = clip(ids(clip, clip.config.max_position_embeddings)).pooler_output[0]
    return Text(t5(ids(t5, TEXT_TOKENS))[0][0], pooled)


def denoise(
    pipeline: OpenSoraPipeline, size: Size, steps: int, limit: float, texts: list[Text]
) -> tuple[list[float], Tensor]:
    """Seconds of each step that there was time for, and the latents after the last."""
    seconds: list[float] = []
    reached: list[Tensor] = []
    mark = begin = time.perf_counter()

    def on_step(_: Any, step: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal mark
        synchronise()
        now = time.perf_counter()
        seconds.append(now - mark)
        mark = now
        reached[:] = [tensors["latents"]]
        if now - begin > limit and step + 1 < steps:
            raise Enough
        return {}

    with suppress(Enough):
        pipeline(
            prompt_embeds=texts[:1],
            negative_prompt_embeds=texts[1:],
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            seed=0,
            output_type="latent",
            callback_on_step_end=on_step,
        )
    return seconds, reached[0]


# -- the device ------------------------------------------------------------------------------------------------------


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    synchronise()
    mark = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - mark


def start_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def peak() -> str:
    """The most memory that tensors took, and that was held for them."""
    if not torch.cuda.is_available():
        return "no device memory"
    return f"peak {peak_bytes() / GB:.1f} GB ({torch.cuda.max_memory_reserved() / GB:.1f} held)"


def share(work: float, seconds: float) -> str:
    """The share of the device's peak, where its data sheet is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = next((flops for part, flops in PEAKS.items() if part in name), None)
    return "" if found is None else f" (MFU {work / seconds / found:.1%})"


if __name__ == "__main__":
    main()
