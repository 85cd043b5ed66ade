"""Trainings that must not depend on how many processes run them, each a function of a World.

`main` goes through all of them on several processes and leaves each result of rank 0 in a directory; the tests run the
same functions in one process and compare.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinema.config.memory import Checkpointing
from kinema.config.optimizer import OptimizerConfig
from kinema.config.schema import ParallelConfig
from kinema.errors import UserError
from kinema.memory.activations import offload_activations
from kinema.memory.checkpointing import checkpoint_blocks
from kinema.optim.ema import Ema
from kinema.optim.host_state import HostState
from kinema.optim.optimizers import build_optimizers
from kinema.optim.release import GradientRelease
from kinema.parallel.data import GradientReducer, accumulate, shard
from kinema.parallel.mesh import Sizes, World, lay_out, start, stop
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.clipping import clip_gradients
from kinema.training.state import load_training_state, training_state

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))
from lagging import LaggingCopies

BATCH = 8
STEPS = 3
Result = dict[str, Any]


def network(lora: bool = False, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """A tiny Wan transformer; with ``lora`` its base is frozen, in ``dtype``, and the adapter trains in fp32."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(7)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    nn.init.normal_(wan.proj_out.weight, std=0.1)
    if not lora:
        return wan.to(dtype)
    from peft import LoraConfig

    wan.to(dtype).requires_grad_(False)
    wan.add_adapter(LoraConfig(r=3, lora_alpha=3, lora_dropout=dropout, target_modules=["to_q", "to_v", "ffn.net.2"]))
    for parameter in wan.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return wan


def sample_losses(wan: nn.Module, step: int, indices: list[int], dtype: torch.dtype) -> Tensor:
    """Losses [B] of samples that are a function of (step, index) alone."""
    generators = [torch.Generator().manual_seed(1000 * step + index) for index in indices]
    draw = lambda *shape: torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(dtype)  # noqa: E731
    x, text, target = draw(4, 2, 4, 4), draw(5, 16), draw(4, 2, 4, 4)
    time = torch.tensor([100.0 * index + 50 for index in indices])
    prediction = wan(hidden_states=x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3, 4))


def fit(
    world: World,
    wan: nn.Module,
    *,
    micro: int = 2,
    steps: int = STEPS,
    first: int = 0,
    autocast: bool = False,
    optimizer: torch.optim.Optimizer | Together | None = None,
    ema: Ema | None = None,
) -> list[float]:
    """Train on this rank's slice of every global batch; returns the global gradient norm of every step."""
    optimizer = optimizer or adamw(wan)
    dtype = torch.float32 if autocast else next(p.dtype for p in wan.parameters())
    share = BATCH // world.dp_size
    mine = list(range(world.dp_rank * share, (world.dp_rank + 1) * share))
    norms = []
    for step in range(first, first + steps):
        for i in range(0, share, micro):
            with accumulate(wan, last=i + micro >= share):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = sample_losses(wan, step, mine[i : i + micro], dtype).sum() / BATCH
                loss.backward()
        norms.append(clip_gradients(wan.parameters(), max_norm=0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(step)
    return norms


def adamw(wan: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in wan.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)


@dataclass(frozen=True)
class Together:
    """Several optimisers as one."""

    optimizers: list[torch.optim.Optimizer]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class Elsewhere:
    """Copies of an optimiser's state between two places in one memory."""

    def fetch(self, away: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [one.clone() for one in away]

    def send(self, here: Sequence[Tensor], away: Sequence[Tensor | None]) -> list[Tensor]:
        return [one.clone() if place is None else place.copy_(one) for one, place in zip(here, away, strict=True)]

    def finish(self) -> None:
        pass


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors, gathered where they are sharded."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def prepared(world: World, wan: nn.Module, checkpointing: Checkpointing = False) -> nn.Module:
    if checkpointing:
        checkpoint_blocks({"blocks": wan.blocks}, checkpointing)
    shard(wan, {"blocks": wan.blocks}, world)
    return wan


def full(world: World, directory: Path) -> Result:
    """Full training, activation checkpointing on, two micro-batches a rank."""
    wan = prepared(world, network(), checkpointing=True)
    norms = fit(world, wan)
    return {"norms": norms, "weights": whole(dict(wan.named_parameters()))}


def away(world: World, directory: Path) -> Result:
    """What blocks save for the backward pass waits elsewhere: all of it, two micro-batches a rank."""
    wan = prepared(world, network())
    offload = offload_activations({"blocks": wan.blocks}, LaggingCopies(), smallest=256)
    norms = fit(world, wan)
    assert offload.moved_bytes > 0
    return {"norms": norms, "weights": whole(dict(wan.named_parameters()))}


def accumulated(world: World, directory: Path) -> Result:
    """One sample a micro-batch."""
    wan = prepared(world, network())
    norms = fit(world, wan, micro=1)
    return {"norms": norms, "weights": whole(dict(wan.named_parameters()))}


def lora(world: World, directory: Path) -> Result:
    """A frozen bf16 base and an fp32 adapter under autocast."""
    wan = prepared(world, network(lora=True, dtype=torch.bfloat16), checkpointing="nested")
    frozen = whole({name: p for name, p in wan.named_parameters() if not p.requires_grad})
    norms = fit(world, wan, autocast=True)
    after = dict(wan.named_parameters())
    assert all(torch.equal(value, whole({"": after[name]})[""]) for name, value in frozen.items())
    return {"norms": norms, "weights": whole({n: p for n, p in after.items() if p.requires_grad})}


def autocast(world: World, directory: Path) -> Result:
    """fp32 weights that train under bf16 autocast."""
    wan = prepared(world, network())
    norms = fit(world, wan, autocast=True, steps=2)
    return {"norms": norms, "weights": whole(dict(wan.named_parameters()))}


def matrices(world: World, directory: Path) -> Result:
    """Optimisers that work on whole matrices, or on their lines: each trains a network of its own."""
    norms, weights = [], {}
    forms: list[dict[str, Any]] = [
        {"type": "muon", "variant": "normuon", "orthogonalisation": "polar_express"},
        {"type": "generic", "variant": "adamuon", "first_moment": "subspace", "rank": 4, "refresh_steps": 2},
        {"type": "generic", "second_moment": "subset_norm", "first_moment": "subspace", "rank": 4,
         "projection": "srht"},
    ]  # fmt: skip
    for number, form in enumerate(forms):
        wan = prepared(world, network())
        named = named_trainables({"network": wan})
        chosen = {name for name, p in named.items() if ".blocks." in name and p.ndim == 2 and "table" not in name}
        optimizers = build_optimizers(named, chosen, OptimizerConfig(lr=1e-2, **form), seed=1)
        if number == 2:  # shards of its state, too, can wait elsewhere
            optimizers = [HostState(one, Elsewhere(), part_bytes=2000) for one in optimizers]
        norms += fit(world, wan, optimizer=Together(optimizers))
        weights |= {f"{number}.{name}": p for name, p in whole(dict(wan.named_parameters())).items()}
    return {"norms": norms, "weights": weights}


def averaged(world: World, directory: Path) -> Result:
    """EMA: the averages, what the network says with them, and that its own weights come back."""
    wan = prepared(world, network())
    ema = Ema(named_trainables({"network": wan}).items(), 0.9)
    fit(world, wan, ema=ema)
    before = whole(dict(wan.named_parameters()))
    with ema.swapped(), torch.no_grad():
        swapped = sample_losses(wan, 99, [0, 1], torch.float32)
    with torch.no_grad():
        own = sample_losses(wan, 99, [0, 1], torch.float32)
    after = whole(dict(wan.named_parameters()))
    assert all(torch.equal(before[name], after[name]) for name in before)
    return {"norms": [], "weights": whole(ema.state()), "swapped": swapped, "own": own}


def resumed(world: World, directory: Path) -> Result:
    """Load what one process wrote, go on, save; the test goes on from that in one process."""
    wan = prepared(world, network())
    optimizer, ema = adamw(wan), Ema(named_trainables({"network": wan}).items(), 0.9)
    checkpointer = Checkpointer(directory / f"resumed-{world.sizes.dp_shard}", 2, True, world)
    meta = load_training_state(checkpointer, directory / "single" / "step-00000003", {"network": wan}, [optimizer], ema)
    norms = fit(world, wan, first=3, optimizer=optimizer, ema=ema)
    checkpointer.save(6, training_state({"network": wan}, [optimizer], ema), {"norms": norms})
    checkpointer.wait_for_staging()
    weights = whole(dict(wan.named_parameters()))
    fit(world, wan, first=6, optimizer=optimizer, ema=ema)  # while it is written
    checkpointer.close()
    latest = checkpointer.latest()
    assert latest is not None and latest.step == 6
    return {"norms": norms, "weights": weights, "meta": meta}


def not_finite(world: World, directory: Path) -> Result:
    """One rank's gradients overflow: every rank sees it."""
    wan = prepared(world, network())
    with accumulate(wan):
        loss = sample_losses(wan, 0, [world.rank], torch.float32).sum()
        (loss * (float("inf") if world.rank == world.size - 1 else 1.0)).backward()
    norm = clip_gradients(wan.parameters(), 1.0).item()
    return {"finite": [torch.isfinite(torch.tensor(n)).item() for n in world.gather_objects(norm)]}


def partly_used(world: World, directory: Path) -> Result:
    """Replicated parameters that no rank uses keep no gradient; one rank's use reaches all."""
    everyone, first, nobody = (nn.Parameter(torch.full((3,), float(i))) for i in (1, 2, 3))
    reducer = GradientReducer([everyone, first, nobody], bucket_bytes=12)
    assert len(reducer.buckets) == 3
    with reducer.reducing():
        loss = (everyone * (world.rank + 1)).sum()
        if world.rank == 0:
            loss = loss + (first * 5).sum()
        loss.backward()
    return {"everyone": everyone.grad, "first": first.grad, "nobody": nobody.grad}


def released(world: World, directory: Path) -> Result:
    """Gradient release: replicas sum a bucket, update its weights and let its gradients go while the next is sent."""
    wan = network()
    named = {f"network.{name}": p for name, p in wan.named_parameters()}
    release = GradientRelease(build_optimizers(named, set(), OptimizerConfig(lr=1e-2)), hooks=world.size == 1)
    reducer = GradientReducer(named.values(), bucket_bytes=4096) if world.size > 1 else None
    share, norms, most = BATCH // world.dp_size, [], 0
    mine = list(range(world.dp_rank * share, (world.dp_rank + 1) * share))

    def update(parameters: Sequence[nn.Parameter]) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in named.values() if p.grad is not None))
        release.update(parameters)

    for step in range(STEPS):
        with release.updating(), nullcontext() if reducer is None else reducer.reducing(update):
            (sample_losses(wan, step, mine, torch.float32).sum() / BATCH).backward()
        norms.append(release.norm)
    total = sum(p.nbytes for p in named.values())
    return {"norms": norms, "weights": whole(dict(wan.named_parameters())), "share": most / total}


def mixed_gradients(world: World, directory: Path) -> Result:
    """Clipping over plain tensors and DTensors of two meshes together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    assert world.mesh is not None
    mesh = world.mesh["dp_replicate", "dp_shard"]
    line = init_device_mesh("cpu", (world.size,), mesh_dim_names=("line",))
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (1, 4), (6,), (2, 2))]
    layouts = [
        None,
        (line, [Shard(0)]),
        (mesh, [Shard(0), Replicate()]),
        (mesh, [Replicate(), Replicate()]),
    ]
    parameters = []
    for value, layout in zip(values, layouts, strict=True):
        tensor = value if layout is None else distribute_tensor(value, *layout)
        parameters.append(nn.Parameter(torch.zeros_like(tensor)))
        parameters[-1].grad = tensor.clone()
    norm = clip_gradients(parameters, 1.5)
    clipped = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
    return {"values": values, "norms": world.gather_objects(norm.item()), "clipped": whole(clipped)}


def different_weights(world: World, directory: Path) -> Result:
    """Ranks that start from other weights are told."""
    wan = network()
    if world.rank == 1:
        with torch.no_grad():
            wan.blocks[1].ffn.net[2].bias[3] += 1e-6
    try:
        shard(wan, {"blocks": wan.blocks}, world)
    except UserError as error:
        return {"messages": world.gather_objects(str(error))}
    return {"messages": world.gather_objects("")}


def disk_full_on_one(world: World, directory: Path) -> Result:
    """The last rank cannot write its part: every rank is told, the checkpoint before stays, the next works."""
    wan = prepared(world, network())
    checkpointer = Checkpointer(directory / f"full-{world.sizes.dp_shard}", 2, True, world)
    tensors = training_state({"network": wan})
    checkpointer.save(1, tensors, {})
    checkpointer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    checkpointer.save(2, tensors, {})
    message = ""
    try:
        checkpointer.wait()
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = [checkpoint.step for checkpoint in checkpointer.complete()]
    world.barrier()
    checkpointer.save(3, tensors, {})
    checkpointer.close()
    left = sorted(path.name for path in checkpointer.root.iterdir())
    return {"messages": world.gather_objects(message), "kept": world.gather_objects(kept), "left": left}


def collectives(world: World, directory: Path) -> Result:
    """The small functions of World."""
    world.barrier()
    return {
        "broadcast": world.gather_objects(world.broadcast_object(f"from {world.rank}")),
        "gather": world.gather_objects(world.rank * 10),
        "float": world.all_reduce_sum(0.5 + world.rank),
        "tensor": world.all_reduce_sum(torch.tensor([1.0, world.rank])),
    }


Case = Callable[[World, Path], Result]
TRAININGS: list[Case] = [full, away, accumulated, lora, autocast, averaged, matrices, resumed]
REPLICATED: list[Case] = [partly_used, released, mixed_gradients, different_weights, collectives]
FAILURES: list[Case] = [not_finite, disk_full_on_one]


def main(directory: Path, plans: list[str]) -> None:
    """``plans``: "replicate x shard" pairs such as 1x2, run one after the other on the same ranks."""
    started = start(ParallelConfig(), "cpu")
    for plan in plans:
        replicas, shards = map(int, plan.split("x"))
        world = lay_out(started, Sizes(dp_replicate=replicas, dp_shard=shards))
        for case in TRAININGS + FAILURES + (REPLICATED if shards == 1 else []):
            result = case(world, directory)
            if world.is_main:
                torch.save(result, directory / f"{plan}-{case.__name__}.pt")
    stop()
