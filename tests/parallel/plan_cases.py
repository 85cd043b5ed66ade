"""Steps of small trainings whose memory and traffic are counted, for the forecast to be held against.

Alone, `measured` counts the bytes of tensors that are alive in one process; what ``[memory]`` moves to a GPU's host
counts apart (`Elsewhere`). `main` runs cases one after the other on several.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from elsewhere import Elsewhere, give_what_trains_there, move, move_state
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.config.memory import MemoryConfig
from kinema.config.schema import Config, ParallelConfig
from kinema.data.batch import Batch
from kinema.data.buckets import Bucket
from kinema.dtypes import torch_dtype
from kinema.families.base import Family
from kinema.families.registry import family_class, open_family
from kinema.families.sample_shapes import sample_tensors
from kinema.memory.dry_run import LiveBytes
from kinema.optim.ema import Ema
from kinema.optim.host_state import on_host
from kinema.optim.optimizers import build_optimizers
from kinema.optim.release import GradientRelease
from kinema.parallel.data import accumulate
from kinema.parallel.devices import KNOWN, Cluster
from kinema.parallel.mesh import Sizes, World, lay_out, start, stop
from kinema.parallel.plan import Batch as Share
from kinema.parallel.plan import Candidate, Workload, kind_of
from kinema.parallel.plan_model import Memory, Model, Sharding, merged
from kinema.parallel.plan_time import Traffic
from kinema.plugins import OBJECTIVES
from kinema.runs.trained import named_trainables
from kinema.training.dry_step import DryNetworks
from kinema.training.loop import Trainer, Work, train_step
from kinema.training.networks import FamilyDenoiser, block_matrices, load_networks, pipeline_over
from kinema.training.plan import of_updates, offloading_of, passes_of
from kinema.training.progress import Progress


@dataclass(frozen=True)
class Small:
    """A network of a family that is small, but whose weights and activations are most of what a step takes."""

    family: str
    variant: str
    network: dict[str, Any]
    """Changes to the tiny network's configuration."""
    bucket: Bucket
    tables: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.family}-{self.variant}"


SMALL = (
    Small("wan", "t2v-1.3b", {"num_attention_heads": 16, "ffn_dim": 768, "num_layers": 4}, Bucket(9, 96, 96)),
    Small("flux", "dev", {"num_attention_heads": 10, "num_single_layers": 3}, Bucket(1, 160, 160)),
    Small(
        "hunyuan_video",
        "t2v",
        {"num_attention_heads": 12, "num_layers": 3, "num_single_layers": 3},
        Bucket(9, 96, 96),
    ),
    Small("qwen_image", "base", {"num_attention_heads": 10, "num_layers": 4}, Bucket(1, 160, 160)),
    Small("open_sora", "v2", {"hidden_size": 192, "num_heads": 8, "depth": 3}, Bucket(9, 96, 96)),
    Small("sd3", "sd3.5-medium", {"num_attention_heads": 20, "caption_projection_dim": 160}, Bucket(1, 160, 160)),
)


PLANS: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "alone": (Sizes(), {}),
    "replicated": (Sizes(dp_replicate=2), {}),
    "sharded": (Sizes(dp_shard=2), {}),
    "zero 2": (Sizes(dp_shard=2), {"zero": 2}),
    "zero 1": (Sizes(dp_shard=2), {"zero": 1}),
    "offloaded": (Sizes(dp_shard=2), {"cpu_offload": True}),
    "sp": (Sizes(sp=2), {}),
    "ring": (Sizes(sp=2), {"attention": "ring"}),
    "tp": (Sizes(tp=2), {}),
    "pp": (Sizes(pp=2), {}),
    "gpipe": (Sizes(pp=2), {"schedule": "gpipe"}),
    "interleaved": (Sizes(pp=2), {"schedule": "interleaved", "stages_per_rank": 2}),
    "sp x tp": (Sizes(sp=2, tp=2), {}),
    "sharded x sp": (Sizes(dp_shard=2, sp=2), {}),
    "sharded x tp": (Sizes(dp_shard=2, tp=2), {}),
    "pp x sharded": (Sizes(pp=2, dp_shard=2), {}),
    "pp x sp": (Sizes(pp=2, sp=2), {}),
    "pp x tp": (Sizes(pp=2, tp=2), {}),
}
"""Meshes, and further keys of ``[parallel]``."""

KINDS: dict[str, dict[str, Any]] = {
    "full": {"training": {"ema": {"decay": 0.99}}},
    "full, checkpointed": {"training": {"ema": {"decay": 0.99}, "activation_checkpointing": True}},
    "full, accumulated": {"training": {"batch_size": 4, "micro_batch_size": 1}},
    "full, released": {
        "training": {"ema": {"decay": 0.99}, "clip_norm": None, "activation_checkpointing": True},
        "optimizer": {"gradient_release": True},
    },
    "lora": {"adapter": {"rank": 8}},
    "lora, nested": {"adapter": {"rank": 8}, "training": {"activation_checkpointing": "nested"}},
    "lora, checkpointed": {"adapter": {"rank": 8}, "training": {"activation_checkpointing": True}},
    "full, bf16": {"training": {"precision": "bf16", "batch_size": 4, "micro_batch_size": 1}},
    "lora, bf16": {"adapter": {"rank": 8}, "training": {"precision": "bf16"}},
    "full, staged": {"training": {"batch_size": 8, "micro_batch_size": 1}},
    "lora, staged": {
        "adapter": {"rank": 8},
        "training": {"batch_size": 8, "micro_batch_size": 1, "activation_checkpointing": True},
    },
}


def write(small: Small, root: Path) -> Path:
    """The model's configurations on disk."""
    directory = root / small.id
    if not directory.exists():
        family_class(small.family).tiny(directory, small.variant, seed=1)
        path = directory / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | small.network))
    return directory


def config_of(small: Small, directory: Path, kind: str, plan: str = "alone") -> Config:
    """A training of the network from random weights; ``kind``: of `KINDS`, ``plan``: of `PLANS`."""
    return configured(small, directory, KINDS[kind], plan)


def configured(small: Small, directory: Path, tables: dict[str, Any], plan: str = "alone") -> Config:
    """The same, of any tables."""
    sizes, settings = PLANS[plan]
    mesh = {name: size for name, size in asdict(sizes).items() if size > 1}
    model = {
        "family": small.family,
        "variant": small.variant,
        "path": str(directory),
        "random_weights": True,
        "text_length": 64,
    }
    return Config.model_validate(
        {
            "data": {"sources": [{"path": str(directory)}]},
            "parallel": mesh | settings,
            **tables,
            "model": model | tables.get("model", {}),
            "training": {"steps": 10, "precision": "fp32", "batch_size": 2} | tables.get("training", {}),
        }
    )


def batch_of(family: Family, bucket: Bucket, samples: int) -> Batch:
    tensors = {name: torch.randn(value.shape) for name, value in sample_tensors(family, bucket).items()}
    rows = {name: [value.clone() for _ in range(samples)] for name, value in tensors.items()}
    return Batch(0, rows, [""] * samples, list(range(samples)), [1 / samples] * samples)


def trainer_of(
    config: Config, family: Family, world: World, elsewhere: Elsewhere | None = None
) -> tuple[Trainer, dict[str, Any]]:
    """As a run makes them. ``elsewhere``: what stands for a GPU's host where a run on a CPU moves nothing."""
    loaded = config if elsewhere is None else config.model_copy(update={"memory": MemoryConfig()})
    networks = load_networks(loaded, family, world)
    if elsewhere is not None:
        move(config.memory, family, networks["network"], elsewhere)
    parameters = named_trainables(networks)

    @contextmanager
    def accumulating(last: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for network in networks.values():
                stack.enter_context(accumulate(network, last, None if release is None else release.update))
            yield

    ema, release = config.training.ema, None
    optimizers = build_optimizers(parameters, block_matrices(networks, family), config.optimizer)
    if config.optimizer.state_on_cpu:
        there = elsewhere is None
        optimizers = on_host(optimizers, world.device) if there else move_state(optimizers, elsewhere)
    if config.optimizer.gradient_release:
        release = GradientRelease(optimizers, hooks=world.size == 1)
    trainer = Trainer(
        config=config,
        world=world,
        networks={"student": FamilyDenoiser(family, networks)},
        parameters=parameters,
        objective=OBJECTIVES.load("flow")(config.objective, family),
        optimizers=optimizers,
        release=release,
        compute_dtype=torch_dtype(config.training.precision),
        progress=Progress(),
        total_steps=10,
        ema=None if ema is None else Ema(parameters.items(), ema.decay),
        pipeline=pipeline_over(networks, config, world),
        accumulating=accumulating,
    )
    return trainer, networks


def held(trainer: Trainer, networks: dict[str, Any], batch: Batch) -> list[Tensor]:
    """What is there between two steps."""
    tensors: list[Any] = [*batch.tensors.values()]
    for network in networks.values():
        tensors += [*network.parameters(), *network.buffers()]
    for optimizer in trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    if trainer.ema is not None:
        tensors += trainer.ema.averages.values()
    flat = torch.utils._pytree.tree_leaves(tensors)
    return [one.to_local() if isinstance(one, DTensor) else one for one in flat if isinstance(one, Tensor)]


@contextmanager
def seeing_resizes(live: LiveBytes) -> Iterator[None]:
    """FSDP2 gives storages back by resizing them, which no operator does."""
    resize = torch.UntypedStorage.resize_

    def seen(storage: Any, size: int) -> Any:
        resize(storage, size)
        live.resized(storage)
        return storage

    torch.UntypedStorage.resize_ = seen  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


class Sent(TorchDispatchMode):
    """Bytes that collectives are given, by kind; single numbers, such as the norm of the gradients, and headers of
    messages left out."""

    OPERATORS: ClassVar = {
        torch.ops.c10d.allreduce_.default: ("all_reduce", 0),
        torch.ops.c10d._allgather_base_.default: ("all_gather", 0),
        torch.ops.c10d._reduce_scatter_base_.default: ("reduce_scatter", 1),
        torch.ops.c10d.allgather_.default: ("gather", 0),
        torch.ops.c10d.alltoall_base_.default: ("all_to_all", 1),
        torch.ops.c10d.send.default: ("send", 0),
    }
    NUMBERS = 8

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.OPERATORS:
            kind, place = self.OPERATORS[func]
            tensors = torch.utils._pytree.tree_leaves(args[place])
            counted = [one for one in tensors if one.numel() > self.NUMBERS and one.dtype != torch.int64]
            self.bytes[kind] += sum(one.nbytes for one in counted)
        return func(*args, **(kwargs or {}))


CLUSTER = Cluster(KNOWN["H100"], 8, 8)
"""What a forecast of memory does not ask for."""


@dataclass(frozen=True)
class Counted:
    """Of one step."""

    peak: int
    """The most bytes of tensors that were alive at once on the device."""
    host: int
    """And of those that `[memory]` keeps in the host's memory."""
    sent: Counter[str]
    """Bytes that collectives were given."""


def measured(config: Config, bucket: Bucket, world: World) -> Counted:
    """The second of two steps."""
    family, elsewhere = open_family(config.model), Elsewhere()
    trainer, networks = trainer_of(config, family, world, elsewhere)
    size = config.training.batch_size
    assert isinstance(size, int)
    batch = batch_of(family, bucket, size // world.dp_size)
    work = Work(batch, size, config.training.micro_batch_size, 0.0)
    train_step(trainer, work, 0)
    with Sent() as sent, counting(trainer, networks, batch, elsewhere) as live:
        train_step(trainer, work, 0)
    return Counted(live.peak, elsewhere.book.peak, sent.bytes)


@contextmanager
def counting(trainer: Trainer, networks: dict[str, Any], batch: Batch, elsewhere: Elsewhere) -> Iterator[LiveBytes]:
    """Counts the device's bytes of a step that is not the first."""
    gc.collect()
    live = LiveBytes("cpu")
    give_what_trains_there(elsewhere, trainer.optimizers, trainer.ema)
    elsewhere.tell(live)
    live.count([*held(trainer, networks, batch), *elsewhere.places])
    live.mark()
    with live, seeing_resizes(live):
        yield live


def expected(config: Config, bucket: Bucket, sizes: Sizes) -> tuple[Memory, Traffic]:
    """The forecast of the same step, by the rules of CPUs, without what a GPU's allocator and libraries add."""
    training, parallel = config.training, config.parallel
    networks = DryNetworks(config, open_family(config.model), training.precision, rules="cpu")
    assert isinstance(training.batch_size, int)
    share = training.batch_size // sizes.dp
    micro = min(training.micro_batch_size or share, share)
    model = Model(
        merged(networks.weights),
        networks.buffers,
        networks.blocks,
        parallel.schedule,
        parallel.stages_per_rank,
        parallel.partition,
        tuple(parallel.split),
        networks.units,
        networks.unit_of,
        parallel.attention == "ring",
        *of_updates(config, networks),
    )
    laid = Share(training.batch_size, micro, share // micro)
    workload = Workload(model, passes_of(networks, bucket), lambda _: laid)
    how = Sharding(parallel.zero)  # what `cpu_offload` moves stays in the same memory here
    kind = kind_of(training.activation_checkpointing)
    found = workload.forecast(Candidate(sizes, kind, how, offloading_of(config)), CLUSTER)
    return replace(found.memory, margin=0.0), found.traffic


def cases_of(small: Small, ranks: int) -> list[str]:
    """Cases of a network for so many processes."""
    found = []
    for plan, (sizes, _) in PLANS.items():
        if sizes.total == ranks:
            kinds = [kind for kind in KINDS if ("staged" in kind) == (sizes.pp > 1)]
            kinds = [kind for kind in kinds if "released" not in kind or plan == "replicated"]
            found += [f"{small.id}/{kind}/{plan}" for kind in kinds if sizes.dp_shard > 1 or "bf16" not in kind]
    return found


def main(root: Path, cases: list[str]) -> None:
    """``cases``: such as "wan-t2v-1.3b/lora/sp"."""
    started = start(ParallelConfig(), "cpu")
    worlds: dict[Sizes, World] = {}
    found: dict[str, Any] = {}
    for case in cases:
        name, kind, plan = case.split("/")
        small, sizes = next(one for one in SMALL if one.id == name), PLANS[plan][0]
        if sizes not in worlds:
            worlds[sizes] = lay_out(started, sizes)
        world = worlds[sizes]
        of_ranks = world.gather_objects(measured(config_of(small, root / small.id, kind, plan), small.bucket, world))
        kinds = {kind for one in of_ranks for kind in one.sent}
        most = {kind: max(one.sent[kind] for one in of_ranks) for kind in kinds}
        found[case] = max(one.peak for one in of_ranks), most
        if started.is_main:
            (root / "measured.json").write_text(json.dumps(found))
    stop()
