"""Networks as training needs them: loaded, adapted, laid over the devices, and in their roles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch
from kinema.dtypes import torch_dtype
from kinema.families.base import Family, NoisePath, Parts, Prepared

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kinema.parallel.mesh import World
    from kinema.training.checkpoint import Checkpointer


@dataclass(frozen=True)
class FamilyDenoiser:
    """A network behind its family's habits, as objectives use it."""

    family: Family
    network: nn.Module

    @property
    def path(self) -> NoisePath:
        return self.family.path

    def prepare(self, batch: Batch) -> Prepared:
        return self.family.prepare(batch)

    def tokens(self, latents: Tensor) -> int:
        return self.family.tokens(latents)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        return self.family.predict(self.network, x_t, t, conditioning)


def check_networks(config: Config, family: Family) -> None:
    """UserError for weights that do not fit the network, targets that match nothing, or an adapter that cannot be
    started from. Reads headers alone: nothing is loaded."""
    from kinema.adapters.files import read_adapter
    from kinema.adapters.lora import adaptable_modules, match_targets

    if config.model.random_weights and config.adapter is None:
        return
    network = family.load("network", "meta", None)
    if config.adapter is not None:
        modules = adaptable_modules(network)
        match_targets(modules, config.adapter.targets or family.adapter_targets())
        if config.adapter.init_from is not None:
            read_adapter(config.adapter.init_from, family, modules)


def load_networks(config: Config, family: Family, world: World) -> dict[str, nn.Module]:
    """The networks that train, by part name, on their devices: with an adapter on a frozen base, or whole.

    Weights that are not sharded are loaded straight onto the device. Sharded ones pass through this machine's memory:
    processes share the pages of files of the stored type, but conversion to another type gives each process a whole
    copy until its shards are made.
    """
    from kinema.memory.checkpointing import checkpoint_blocks
    from kinema.parallel.data import shard

    stored = config.model.network.dtype or ("fp32" if config.adapter is None else config.training.precision)
    place = world.device if world.dp_shard == 1 else "cpu"
    parts: Parts = {"network": family.load("network", place, torch_dtype(stored))}
    networks = family.trainables(parts)
    for network in networks.values():
        network.train()
        if config.adapter is None:
            network.requires_grad_(True)
        else:
            _adapt(network, config, family)
        if config.training.activation_checkpointing:
            checkpoint_blocks(family.blocks(network))
        shard(network, family.blocks(network), world)
    return networks


def _adapt(network: nn.Module, config: Config, family: Family) -> None:
    from kinema.adapters.files import read_adapter
    from kinema.adapters.lora import adaptable_modules, add_adapter, start_from

    assert config.adapter is not None
    add_adapter(network, config.adapter, family.adapter_targets(), config.run.seed)
    if config.adapter.init_from is not None:
        adapter = read_adapter(config.adapter.init_from, family, adaptable_modules(network))
        start_from(network, config.adapter, adapter)


def block_matrices(networks: Mapping[str, nn.Module], family: Family) -> set[str]:
    """Canonical names of the trained 2-D weights inside the blocks."""
    from kinema.training.state import named_trainables

    inside = {
        parameter
        for network in networks.values()
        for blocks in family.blocks(network).values()
        for parameter in blocks.parameters()
        if parameter.ndim == 2
    }
    return {name for name, parameter in named_trainables(networks).items() if parameter in inside}


def take_weights(checkpointer: Checkpointer, checkpoint: Path, networks: Mapping[str, nn.Module]) -> str:
    """Load another run's trained weights alone, the averaged ones where it kept an average; says which."""
    from kinema.training.checkpoint import contents
    from kinema.training.state import named_trainables

    averaged = any(name.startswith("ema.") for name in contents(checkpoint))
    tensors = {name: parameter.detach() for name, parameter in named_trainables(networks).items()}
    checkpointer.load(checkpoint, {"ema" if averaged else "networks": tensors}, convert=True)
    return f"Starting from the {'averaged ' if averaged else ''}weights of {checkpoint}"


@contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Networks in eval mode inside, as they were afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
