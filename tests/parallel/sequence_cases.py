"""Sequence parallel passes and trainings that must give what one process gives.

Trainings are `pipeline_cases.Plan`s through the real loop. Beside them, in float64: the prediction and every gradient
of a family's tiny network (``exact:MODEL``), and attention by itself; kinds that begin with ``ring`` are the same with
attention round a ring. `main` runs them one after the other on several processes, which all share the sequence unless a
plan says otherwise, and rank 0 leaves each result in the directory; the tests run the same functions in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from pipeline_cases import ALL, LaggingCopies, Plan, batch_of, family_of, train
from ranks import run_cases
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kinema.config.schema import SequenceAttention
from kinema.errors import UserError
from kinema.families.sequence_plans import Attention, sequence_plans
from kinema.memory.activations import offload_activations
from kinema.memory.checkpointing import checkpoint_blocks
from kinema.memory.compile import compile_blocks
from kinema.parallel.data import accumulate, shard
from kinema.parallel.mesh import Sizes, World
from kinema.parallel.ring import around_ring
from kinema.parallel.sequence import attend, split_sequences
from kinema.parallel.ulysses import Layout, Peers, over_heads
from kinema.sampling.offload import Offload
from kinema.sampling.pipeline import SampleSettings, sample_many
from kinema.sampling.shared_tiles import share_tiles
from kinema.sampling.tiling import set_tiles
from kinema.sampling.together import Together

Result = dict[str, Any]


@contextmanager
def in_float64() -> Iterator[None]:
    """What networks do in float32 on purpose, in float64: no rounding hides a small error."""
    to, real, norm = torch.Tensor.to, torch.Tensor.float, torch.linalg.vector_norm

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def wider(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *map(wide, args), **{key: wide(value) for key, value in kwargs.items()})

    torch.Tensor.to, torch.Tensor.float = wider, torch.Tensor.double  # type: ignore[method-assign]
    torch.linalg.vector_norm = lambda x, **kwargs: norm(x, **{k: wide(v) for k, v in kwargs.items()})
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.linalg.vector_norm = to, real, norm  # type: ignore[method-assign]


def network_of(
    world: World, name: str, root: Path, dtype: torch.dtype, compiled: bool = False, way: SequenceAttention = "ulysses"
) -> nn.Module:
    """A tiny network of which everything trains, no weight zero; checkpointed, nested, with what blocks
    keep elsewhere, unless it is compiled."""
    family = family_of(ALL[name], root / name)
    network = family.load("network", "cpu", dtype).to(dtype).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    blocks = family.blocks(network)
    split_sequences(network, blocks, world, way)
    if compiled:
        compile_blocks(blocks, "aot_eager")
    else:
        checkpoint_blocks(blocks, "nested")
    shard(network, blocks, world)
    if not compiled:
        offload_activations(blocks, LaggingCopies(), smallest=256)
    return network


def predicted(world: World, network: nn.Module, name: str, root: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The prediction for two captions (of unlike lengths) and what it should be."""
    family = family_of(ALL[name], root / name)
    samples = torch.load(root / f"{name}.pt", weights_only=True)
    rows = [{key: v.to(dtype) if v.is_floating_point() else v for key, v in sample.items()} for sample in samples]
    prepared = family.prepare(batch_of(*rows), {})
    x_0 = prepared.latents.to(dtype)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
    t = torch.tensor([0.3, 0.6])
    t_at = t.view(-1, 1, 1, 1, 1) * (1.0 if prepared.given is None else 1 - prepared.given)
    x_t = ((1 - t_at) * x_0 + t_at * eps).to(dtype)
    return family.predict(network, x_t, t if prepared.given is None else t_at, prepared.conditioning), eps


def exact(world: World, root: Path, name: str, way: SequenceAttention = "ulysses") -> Result:
    """Prediction and gradients of a family's network in float64, and how many tokens its blocks saw at most."""
    network = network_of(world, name, root, torch.float64, way=way)
    seen: list[int] = []
    blocks = family_of(ALL[name], root / name).blocks(network)
    for listed in sequence_plans(network) or {}:
        for norm in (one for one in blocks[listed].modules() if isinstance(one, nn.LayerNorm)):
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with in_float64():
        prediction, eps = predicted(world, network, name, root, torch.float64)
        with accumulate(network):
            ((prediction - eps).square().mean() / world.sizes.sp).backward()
    gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    return {"prediction": prediction.detach(), "gradients": gradients, "seen": max(seen, default=0)}


def compiled(world: World, root: Path, name: str, way: SequenceAttention = "ulysses") -> Result:
    """The same in float32 with blocks compiled; clips of two sizes, after which sizes are dynamic."""
    network = network_of(world, name, root, torch.float32, compiled=True, way=way)
    prediction, eps = predicted(world, network, name, root, torch.float32)
    with accumulate(network):
        ((prediction - eps).square().mean() / world.sizes.sp).backward()
    gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    return {"prediction": prediction.detach(), "gradients": gradients, "seen": 0}


ATTENTIONS: dict[str, dict[str, Any]] = {
    "even": {"heads": 4, "lengths": {"text": 4, "video": 12}},
    "uneven": {"heads": 3, "lengths": {"text": 5, "video": 7}},
    "short": {"heads": 5, "lengths": {"text": 1, "video": 3}},
    "one_head": {"heads": 1, "lengths": {"text": 3, "video": 4}},
    "grouped": {"heads": 6, "keys": 3, "lengths": {"text": 2, "video": 9}},
    "masked": {"heads": 3, "lengths": {"text": 4, "video": 5}, "mask": (2, 1, 9, 9)},
    "masked_heads": {"heads": 3, "lengths": {"text": 4, "video": 5}, "mask": (1, 3, 1, 9)},
    "cross": {"heads": 3, "lengths": {"video": 7}, "whole": 4, "mask": (2, 1, 7, 4)},
    "empty": {"heads": 2, "lengths": {"text": 0, "video": 5}},
    "blind": {"heads": 2, "lengths": {"text": 4, "video": 6}, "mask": (2, 1, 10, 10), "hides": True},
    "first": {"heads": 2, "lengths": {"text": 1, "video": 6}, "mask": (2, 1, 1, 7), "hides": True},
    "causal": {"heads": 2, "lengths": {"video": 7}, "causal": True},
}
"""Calls of attention: heads (of keys, where they are fewer), tokens of each stream, the mask's shape, whether it hides
keys, of some queries all."""


def attention(world: World, root: Path, name: str, way: SequenceAttention = "ulysses") -> Result:
    """The output [2, H, L, 6] of one call and the gradients of what goes into it."""
    call, generator = ATTENTIONS[name], torch.Generator().manual_seed(11)
    lengths, heads, total = call["lengths"], call["heads"], sum(call["lengths"].values())
    plan = Attention(tuple(lengths), whole_keys="whole" in call)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [draw(2, heads, total, 6)]
    inputs += [draw(2, call.get("keys", heads), call.get("whole", total), 6) for _ in range(2)]
    wanted, mask = draw(2, heads, total, 6), draw(*call["mask"]) if "mask" in call else None
    if "hides" in call:
        assert mask is not None
        mask = mask > 0.3
        mask[0, :, -1] = False
    options = {"attn_mask": mask, "enable_gqa": "keys" in call, "scale": 0.7, "is_causal": "causal" in call}
    for one in inputs:
        one.requires_grad_()
    if world.size == 1:
        output = nn.functional.scaled_dot_product_attention(*inputs, **options)
    else:
        layout = Layout(Peers(world.group("sp"), world.rank, world.size), lengths)
        split = [i == 0 or not plan.whole_keys for i in range(3)]
        local = [_split(layout, one) if its else one for one, its in zip(inputs, split, strict=True)]
        output = _gathered(layout, attend(layout, plan, *local, way=_WAYS[way], **options))
    gradients = torch.autograd.grad((output - wanted).square().sum() / world.size, inputs)
    if world.size > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
    return {"output": output.detach(), "gradients": dict(zip("qkv", gradients, strict=True))}


_WAYS = {"ulysses": over_heads, "ring": around_ring}


def _split(layout: Layout, heads: Tensor) -> Tensor:
    streams = heads.transpose(1, 2).split(list(layout.lengths.values()), dim=1)
    parts = [layout.split(one, name) for one, name in zip(streams, layout.lengths, strict=True)]
    return torch.cat(parts, dim=1).transpose(1, 2)


def _gathered(layout: Layout, heads: Tensor) -> Tensor:
    streams = heads.transpose(1, 2).split([layout.held(name) for name in layout.lengths], dim=1)
    parts = [layout.gather(one, name) for one, name in zip(streams, layout.lengths, strict=True)]
    return torch.cat(parts, dim=1).transpose(1, 2)


def other_kernels(world: World, root: Path, name: str) -> Result:
    """What a network says whose attention does not go through torch's kernels."""
    network = network_of(world, name, root, torch.float32)
    attention, sdpa = nn.functional, nn.functional.scaled_dot_product_attention
    attention.scaled_dot_product_attention = lambda query, key, value, **_: query  # type: ignore[assignment]
    try:
        predicted(world, network, name, root, torch.float32)
    except UserError as error:
        return {"message": str(error)}
    finally:
        attention.scaled_dot_product_attention = sdpa
    return {"message": ""}


def sampled(
    world: World,
    root: Path,
    name: str,
    way: SequenceAttention = "ulysses",
    offload: Offload = "none",
    tile_size: int | None = None,
) -> Result:
    """Two samples of a pipeline call, with guidance."""
    case = ALL[name]
    family = family_of(case, root / name)
    parts = {part: family.load(part, "cpu", torch.float32) for part in family.variant.parts}
    together = Together(world if world.size > 1 else None, way)
    together.split(family, parts)
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    settings = [
        SampleSettings(
            words, case.height, case.width, case.frames, steps=3, guidance=4.0, seed=seed, tile_size=tile_size
        )
        for seed, words in enumerate(("a red ball", "a green box moves left"))
    ]
    samples = list(sample_many(family, pipeline, settings, batch=2, offload=offload))
    assert together.agreed(world.place["sp"]) == 0
    return {"samples": torch.stack(samples)}


TILES: dict[str, tuple[tuple[int, ...], int, int | None]] = {
    "wan-t2v-1.3b": ((3, 5, 4), 16, None),
    "wan-ti2v-5b": ((3, 5, 4), 32, None),
    "hunyuan_video-t2v": ((6, 3, 3), 16, 16),
    "hunyuan_video15-480p-t2v": ((2, 6, 5), 64, None),
    "ltx_video-i2v-2b-0.9.5": ((6, 3, 3), 64, 32),
    "open_sora-v2": ((6, 3, 3), 16, 16),
    "open_sora-v2-dc": ((6, 3, 3), 64, 16),
    "flux-dev": ((6, 5), 32, None),
    "hunyuan_image-base": ((6, 5), 128, None),
    "qwen_image-base": ((1, 3, 4), 16, None),
}
"""Latents [(T,) H, W] and tiles that they fall into, in pixels and frames: a model of every class of autoencoder."""


def tiles(world: World, root: Path, name: str) -> Result:
    """The tiles of an autoencoder, decoded by one process and by all: how far apart in any of them, and how many calls
    of the decoder each makes."""
    family = family_of(ALL[name], root / name)
    autoencoder = family.load("autoencoder", "cpu", torch.float32)
    shape, pixels, frames = TILES[name]
    set_tiles(autoencoder, "on", pixels, frames)
    channels = autoencoder.config.get("latent_channels") or autoencoder.config["z_dim"]
    z = torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(5))
    calls, forward = [0], type(autoencoder.decoder).forward

    def counting(decoder: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        calls[-1] += not isinstance(next(decoder.parameters()) + 0, FakeTensor)
        found: Tensor = forward(decoder, *args, **kwargs)
        return found

    autoencoder.decoder.forward = MethodType(counting, autoencoder.decoder)
    timed = (torch.tensor([0.05, 0.05]),) if autoencoder.config.get("timestep_conditioning") else ()
    results = []
    with torch.no_grad():
        for shared in (False, True, True):
            if shared and len(results) == 1:
                share_tiles(autoencoder, world)
            decoded = autoencoder.decode(z, *timed)
            results.append(decoded if isinstance(decoded, Tensor) else decoded.sample)
            calls.append(0)
        set_tiles(autoencoder, "off", None, None)
        autoencoder.decode(z, *timed)
    apart = max(float((result - results[0]).abs().max()) for result in results[1:])
    return {"apart": world.gather_objects(apart), "calls": world.gather_objects(calls), "size": results[0].numel()}


def ring_bytes(world: World, root: Path, name: str) -> Result:
    """Bytes that each process sends forwards and backwards, for 4 heads (2 of keys) of 6 in float64, 12 tokens."""
    generator = torch.Generator().manual_seed(1)
    peers = Peers(world.group("sp"), world.rank, world.size)
    layout = Layout(peers, {"video": 12})
    query, key, value = (
        torch.randn(2, heads, 12 // world.size, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    sent, exchange = [0], torch.distributed.all_to_all_single

    def counting(output: Tensor, given: Tensor, to: list[int], of: list[int], **options: Any) -> Any:
        assert of[world.rank] == 0 and sum(of) == given.numel()
        sent[-1] += given.nbytes
        return exchange(output, given, to, of, **options)

    torch.distributed.all_to_all_single = counting
    try:
        output = around_ring(layout, ("video",), query, key, value, None, enable_gqa=True)
        sent.append(0)
        output.sum().backward()
    finally:
        torch.distributed.all_to_all_single = exchange
    return {"sent": world.gather_objects(sent)}


CASES: dict[str, Callable[[World, Path, str], Result]] = {
    "sampled": sampled,
    "sampled_in_blocks": partial(sampled, way="ring", offload="blocks", tile_size=16),
    "sampled_in_parts": partial(sampled, offload="parts"),
    "tiles": tiles,
    "exact": exact,
    "compiled": compiled,
    "attention": attention,
    "ring_exact": partial(exact, way="ring"),
    "ring_compiled": partial(compiled, way="ring"),
    "ring_bytes": ring_bytes,
    "ring_attention": partial(attention, way="ring"),
    "other_kernels": other_kernels,
}


def run(world: World, case: str, root: Path) -> Result:
    kind, _, name = case.partition(":")
    return CASES[kind](world, root, name) if kind in CASES else train(world, Plan.of(case), root)


def sizes_of(case: str, processes: int) -> Sizes:
    return Sizes(sp=processes) if case.partition(":")[0] in CASES else Plan.of(case).mesh()


def main(root: Path, cases: list[str]) -> None:
    run_cases(root, cases, sizes_of, run)
