"""Networks as training needs them: loaded, adapted, laid over the devices, and in their roles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.config.section import QUANTIZED
from kinema.data.batch import Batch
from kinema.dtypes import torch_dtype
from kinema.errors import ConfigError
from kinema.families.base import Family, Prepared
from kinema.families.noise_path import NoisePath

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kinema.adapters.preflight import Plans
    from kinema.adapters.targets import LayerPlan
    from kinema.families.pipeline_plans import Unit
    from kinema.memory.block_swap import Home
    from kinema.parallel.fsdp import Sharding
    from kinema.parallel.mesh import World
    from kinema.parallel.pipeline import Pipeline
    from kinema.training.checkpoint import Checkpointer


@dataclass(frozen=True)
class FamilyDenoiser:
    """The networks of a role, behind their family's habits, as objectives use them: one, or experts by part name."""

    family: Family
    networks: Mapping[str, nn.Module]
    part: str | None = None
    """Which of them predicts, once it is chosen; there is no choice where there is one."""

    @property
    def path(self) -> NoisePath:
        return self.family.path

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(part for part in self.networks if part.startswith("network"))

    @property
    def time_range(self) -> tuple[float, float]:
        """Before one expert is chosen, the times of all."""
        parts = self.experts if self.part is None else (self.part,)
        ranges = [self.family.time_range(part) for part in parts]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def at(self, t: float) -> FamilyDenoiser:
        fitting = [part for part in self.experts if t <= self.family.time_range(part)[1]]
        lowest = min(fitting or self.experts, key=lambda part: self.family.time_range(part)[1])
        return replace(self, part=lowest)

    def prepare(self, batch: Batch) -> Prepared:
        return self.family.prepare(batch, self.networks)

    def tokens(self, latents: Tensor) -> int:
        return self.family.tokens(latents)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        part = self.part or next(iter(self.experts))
        return self.family.predict(self.networks[part], x_t, t, conditioning)


def check_networks(config: Config, family: Family) -> Plans:
    """What each layer of each part gets of an adapter; {} without one. UserError for weights that do not fit the
    network, targets that match nothing, layouts that cannot hold the adapter, or one that cannot be started from.
    Reads headers alone: nothing is loaded."""
    from kinema.adapters.preflight import check_adapter
    from kinema.adapters.targets import adaptable_modules

    if config.parallel.tp > 1:
        from kinema.parallel.tensor import check_tensor_parallel

        check_tensor_parallel(config, family)
    if config.parallel.sp > 1:
        from kinema.parallel.sequence import check_sequence_parallel

        check_sequence_parallel(config.parallel.sp, "parallel.sp", family, family.trained_parts())
    if config.parallel.dp_shard > 1:
        check_one_type(config, family)
    if config.model.random_weights and config.adapter is None:
        return {}
    networks = {part: family.load(part, "meta", None) for part in family.trained_parts()}
    if config.adapter is None:
        return {}
    modules = {part: adaptable_modules(network) for part, network in networks.items()}
    defaults = {part: family.adapter_targets(part) for part in networks}
    return check_adapter(config.adapter, config.layouts, modules, defaults, family)


def check_one_type(config: Config, family: Family) -> None:
    """ConfigError for a network whose weights would train in several types, which FSDP2 cannot shard: one that is
    loaded in a short type, but for some of its layers. Reads no weights."""
    from kinema.families.loading import kept_in_float32

    for part in family.trained_parts():
        stored = getattr(config.model, part).dtype
        if config.adapter is not None or stored is None or stored in QUANTIZED:
            continue
        network = family.load(part, "meta", None)
        exact = kept_in_float32(network, torch_dtype(stored))
        kept = [name for name, _ in network.named_parameters() if exact & set(name.split("."))]
        if kept:
            raise ConfigError(
                f'model.{part}.dtype = "{stored}" leaves {len(kept)} of its weights in fp32 ({kept[0]} is the first), '
                "and parallel.dp_shard shards weights that train in one type alone. Set "
                f'model.{part}.dtype = "fp32" (training.precision computes in a shorter type all the same), or '
                "parallel.dp_shard = 1."
            )


def load_networks(config: Config, family: Family, world: World) -> dict[str, nn.Module]:
    """The networks that train, by part name, on their devices: with an adapter on a frozen base, or whole.

    Weights that every process has whole are loaded straight onto the device. Others wait in their files, whose pages
    the processes of a machine share, until the process takes its part: in this machine's memory each needs as much as
    that and a block. (Random weights are drawn whole.)
    """
    from kinema.memory.block_swap import host_weights
    from kinema.memory.checkpointing import checkpoint_blocks
    from kinema.memory.compile import compile_blocks
    from kinema.networks.mapped import leaving_weights_mapped
    from kinema.parallel.data import check_equal_weights, shard
    from kinema.parallel.pipeline_stages import cut
    from kinema.parallel.sequence import split_sequences
    from kinema.parallel.tensor import split_matrices

    networks: dict[str, nn.Module] = {}
    plans = check_networks(config, family) if config.adapter is not None else {}
    splits = world.sizes.pp > 1 or world.sizes.tp > 1
    shared = world.is_sharded or splits
    travelling = int(config.memory.offload_blocks)
    waits = shared or travelling > 0
    place = "cpu" if waits else world.device
    sharding = _sharding(config) if world.is_sharded else None
    for part in family.trained_parts():
        stored = getattr(config.model, part).dtype
        if stored is None or stored in QUANTIZED:  # the latter are the family's to see to
            stored = "fp32" if config.adapter is None else config.training.precision
        mapped = waits and config.training.float8 == "none"  # torchao's layers take weights that are there
        with leaving_weights_mapped() if mapped else nullcontext():
            network: nn.Module = family.load(part, place, torch_dtype(stored))
        network.train()
        if config.adapter is None:
            network.requires_grad_(True)
        else:
            _adapt(network, config, family, part, plans[part])
        if splits:
            check_equal_weights(network, world)
        stages = _stages(network, config, family) if world.sizes.pp > 1 and part.startswith("network") else None
        split_matrices(network, world)
        split_sequences(network, family.blocks(network), world, config.parallel.attention)
        if part.startswith("network"):
            _compute_as_asked(network, config, family)
        if config.training.activation_checkpointing:
            checkpoint_blocks(family.blocks(network), config.training.activation_checkpointing)
        if config.training.compile is True:
            compile_blocks(family.blocks(network))
        if stages is not None:
            cut(network, *stages, world.place["pp"], world.sizes.pp)
        blocks = family.blocks(network)
        homes = host_weights(network, blocks, travelling) if travelling and part.startswith("network") else []
        shard(network, blocks, world, sharding, [p for home in homes for p in home.parameters])
        _offload(blocks, homes, config, world)
        networks[part] = network
    return networks


def _offload(blocks: Mapping[str, nn.ModuleList], homes: list[Home], config: Config, world: World) -> None:
    """Let blocks travel whose weights are at ``homes``, and what all save for the backward pass."""
    from kinema.memory.activations import SMALLEST, offload_activations
    from kinema.memory.block_swap import BlockSwap
    from kinema.memory.copy_engine import engine_of

    if homes:
        BlockSwap(blocks, homes, engine_of(world.device))
    if config.memory.offload_activations:
        offload_activations(blocks, engine_of(world.device), SMALLEST)


def _compute_as_asked(network: nn.Module, config: Config, family: Family) -> None:
    """Other kernels for the products and the attention of a network's blocks, as far as they are asked for."""
    from kinema.memory.attention import attend_with
    from kinema.memory.float8_compute import compute_in_float8
    from kinema.memory.fusion import fuse_projections

    training = config.training
    if training.fuse_qkv:
        fuse_projections(network)
    if training.float8 != "none":
        compute_in_float8(family.blocks(network), training.float8)
    attend_with(family.blocks(network), training.attention)


def _sharding(config: Config) -> Sharding:
    from kinema.parallel.fsdp import Sharding

    return Sharding(config.parallel.zero, torch_dtype(config.training.precision), config.parallel.cpu_offload)


def _stages(network: nn.Module, config: Config, family: Family) -> tuple[list[Unit], list[int]]:
    """What a whole network can be cut between, and where each stage of the pipeline begins."""
    from kinema.families.pipeline_plans import pipeline_units
    from kinema.parallel.pipeline_stages import starts_of

    units = pipeline_units(network, family.blocks(network))
    return units, starts_of(network, units, config.parallel)


def pipeline_over(networks: Mapping[str, nn.Module], config: Config, world: World) -> Pipeline | None:
    """What runs networks that are cut into stages."""
    if world.sizes.pp == 1:
        return None
    from kinema.parallel.pipeline import Pipeline

    return Pipeline(networks, world, config.parallel.schedule, config.parallel.stages_per_rank)


def _adapt(network: nn.Module, config: Config, family: Family, part: str, plan: Mapping[str, LayerPlan]) -> None:
    from kinema.adapters.files import read_adapter
    from kinema.adapters.inject import add_planned, leave_casts_to_autocast, start_from
    from kinema.adapters.targets import adaptable_modules

    assert config.adapter is not None
    add_planned(network, config.adapter, plan, config.run.seed)
    if torch_dtype(config.training.precision).itemsize < 4:
        leave_casts_to_autocast(network, config.adapter)
    if config.adapter.init_from is not None:
        modules = {
            one: adaptable_modules(network if one == part else family.load(one, "meta", None))
            for one in family.trained_parts()
        }
        adapters = read_adapter(config.adapter.init_from, family, modules).adapters
        if part in adapters:
            start_from(network, config.adapter, adapters[part])


def block_matrices(networks: Mapping[str, nn.Module], family: Family) -> set[str]:
    """Canonical names of the trained 2-D weights inside the blocks."""
    from kinema.optim.optimizers import is_vector
    from kinema.runs.trained import named_trainables

    inside = {
        parameter
        for network in networks.values()
        for blocks in family.blocks(network).values()
        for parameter in blocks.parameters()
        if parameter.ndim == 2 and not is_vector(parameter)
    }
    return {name for name, parameter in named_trainables(networks).items() if parameter in inside}


def take_weights(checkpointer: Checkpointer, checkpoint: Path, networks: Mapping[str, nn.Module]) -> str:
    """Load another run's trained weights alone, the averaged ones where it kept an average; says which."""
    from kinema.parallel.packing import for_checkpoint
    from kinema.runs.trained import averaged, named_trainables

    has_average = averaged(checkpoint)
    trained = {name: parameter.detach() for name, parameter in named_trainables(networks).items()}
    tensors = for_checkpoint(networks, trained)
    checkpointer.load(checkpoint, {"ema" if has_average else "networks": tensors}, convert=True)
    return f"Starting from the {'averaged ' if has_average else ''}weights of {checkpoint}"


@contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Networks in eval mode inside, as they were afterwards. What is compiled runs as it is written: other sizes and a
    pass without gradients would take their minutes to compile, and training's own sizes would count as changing."""
    import torch

    modes = [(module, module.training) for network in networks for module in network.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
