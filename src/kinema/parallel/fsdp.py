"""Sharding by torch's FSDP2: parameters, gradients and optimiser state in pieces, one group of parameters per block and
one for the rest of a network.

What is whole between the passes of a step is the level's (Rajbhandari et al. 2020, "ZeRO"):

3. nothing: a group is gathered for its forward and again for its backward pass, its gradient is reduce-scattered after
   it;
2. parameters: gathered by the first forward of a step, let go after the last backward;
1. gradients too: those of all micro-batches are reduce-scattered together, in the last backward.

Levels 1 and 2 are in force inside `accumulating` and `accumulating_all` alone. Outside, a group is resharded after its
forward at every level, so what runs there (evaluation, previews) leaves nothing gathered that would be out of date once
weights change; averages, optimisers and checkpoints always find the shards.

Under autocast, weights and biases of linear and convolution layers inside blocks are gathered in the type that autocast
would cast them to before every use. What else blocks have (norms, tables) is used in other ways and stays as it is
stored: whole on every process, its gradients to be summed by the caller.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from kinema.errors import UserError
from kinema.networks.mapped import settle
from kinema.parallel.mesh import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose parameters autocast casts, and that read them in no other way. Exactly these types: a layer derived from
one may."""
SHORT_SHARE = 0.75
"""Where layers have less of a block's numbers, it is left as it is stored: what does not travel is whole everywhere."""


@dataclass(frozen=True)
class Sharding:
    """How a network is sharded; see ``[parallel]``."""

    zero: int = 3
    autocast: torch.dtype | None = None
    """The type that the network computes in under autocast, None without."""
    cpu_offload: bool = False
    """Shards of parameters, gradients and optimiser state are in the host's memory."""


_levels: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def shard_fully(
    network: nn.Module, blocks: Mapping[str, nn.ModuleList], world: World, sharding: Sharding
) -> list[nn.Parameter]:
    """Shard a network in place; returns the parameters that stay whole, whose gradients FSDP2 does not sum.

    The rest of it is on ``world.device`` afterwards. UserError if parameters that train have several types.
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in network.parameters() if p.requires_grad})
    if len(dtypes) > 1:
        raise UserError(
            f"the weights that train are stored as {' and '.join(dtypes)}, but parallel.dp_shard = "
            f'{world.sizes.dp_shard} needs one type. Set model.network.dtype = "fp32", or parallel.dp_shard = 1.'
        )
    # Networks often return views; nothing changes their output in place, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = weights_mesh(world)
    pinned = world.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=pinned) if sharding.cpu_offload else OffloadPolicy()
    whole: list[nn.Parameter] = []
    for group in blocks.values():
        for block in group:
            parameters = list(block.parameters())
            if not parameters:
                continue  # another stage of the pipeline has it
            settle(block)
            travelling = short_parameters(block, sharding.autocast)
            policy, left = MixedPrecisionPolicy(), set[nn.Parameter]()
            if travelling:
                policy = MixedPrecisionPolicy(sharding.autocast, torch.float32, cast_forward_inputs=False)
                left = set(parameters) - travelling
            whole += [p for p in parameters if p in left]
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=True,
                mp_policy=policy,
                offload_policy=offload,
                ignored_params=left,
            )
    settle(network)
    fully_shard(network, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
    _keep_recording(network)
    move(network, whole, world.device)  # `nn.Module.to` would take the shards that are to stay in host memory
    for module in _groups(network):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    _levels[network] = sharding.zero
    return whole


def short_parameters(block: nn.Module, dtype: torch.dtype | None) -> set[nn.Parameter]:
    """Parameters of a block that may be gathered in ``dtype``, a type of 16 bits, without a change of any result under
    autocast; the others then stay whole on every process. Empty where the block is gathered as it is stored."""
    if dtype is None or dtype.itemsize > 2:
        return set()
    found: set[nn.Parameter] = set()
    for module in block.modules():
        if getattr(module, "lora_magnitude_vector", None):  # DoRA takes norms of the weights themselves
            return set()
        if type(module) in LAYERS:
            found.update(module.parameters(recurse=False))
    numbers, mine = (sum(p.numel() for p in some) for some in (block.parameters(), found))
    gains = any(p.dtype.itemsize > dtype.itemsize for p in found)
    return found if gains and mine >= SHORT_SHARE * numbers else set()


def weights_mesh(world: World) -> DeviceMesh:
    """The mesh that parameters are sharded over, in its last dimension, and replicated over in its first, if any."""
    assert world.mesh is not None
    last = "dp_shard"
    if world.sizes.sp > 1:
        last = "dp_shard_sp"
        world.submesh("dp_shard", "sp")  # names the dimension
    return world.mesh["dp_replicate", last] if world.sizes.dp_replicate > 1 else world.mesh[last]


def _keep_recording(network: nn.Module) -> None:
    """transformers knows by the name of a model's class what of its inside it can record (hidden states of text
    encoders), and FSDP2 has just given the network a class with another name."""
    recorded = getattr(network, "_can_record_outputs", None)
    if recorded:
        from transformers.utils import output_capturing

        output_capturing._CAN_RECORD_REGISTRY[network] = recorded


def move(network: nn.Module, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Put these parameters of a network, and all its buffers, on the device."""
    for parameter in parameters:
        parameter.data = parameter.data.to(device)
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _groups(network: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in network.modules() if isinstance(module, FSDPModule))


@contextmanager
def accumulating(network: FSDPModule, last: bool) -> Iterator[None]:
    """One micro-batch, forward and backward; after the ``last`` of a step the shards have their gradients."""
    level = _levels[network]  # type: ignore[index]
    if level < 3:
        network.set_reshard_after_forward(False)
        network.set_reshard_after_backward(last)
        network.set_requires_gradient_sync(level == 2 or last)
    network.set_requires_all_reduce(last)
    ended = False
    try:
        yield
        ended = True
    finally:
        if not ended or (level < 3 and last):
            _let_go(network)


@contextmanager
def accumulating_all(network: nn.Module) -> Iterator[None]:
    """All micro-batches of a step, whose forward and backward passes may be mixed; afterwards as behind the last of
    `accumulating`, if `backward_comes` was told of every one. A network that is not sharded is left alone."""
    level = _levels.get(network)
    if level is None or not isinstance(network, FSDPModule):
        yield
        return
    if level < 3:
        network.set_reshard_after_forward(False)
        network.set_reshard_after_backward(False)
        network.set_requires_gradient_sync(level == 2)
    try:
        yield
        if level == 1:
            network.set_requires_gradient_sync(True)
            # What the last backward would do, had we known it. torch's own pipelines end in the same way.
            fully_shard.state(network)._root_post_backward_final_callback()  # type: ignore[attr-defined]
    finally:
        network.set_requires_all_reduce(True)
        if level < 3:
            _let_go(network)


def backward_comes(network: nn.Module, last: bool) -> None:
    """Inside `accumulating_all`, before each backward pass; ``last``: it is that of the last micro-batch, with which
    replicas add up the gradients of blocks. At level 1 they do so once, behind all."""
    if isinstance(network, FSDPModule) and _levels.get(network, 1) > 1:
        network.set_requires_all_reduce(last)
        # What lies beside the blocks has gradients of other parameters in each stage's passes, and FSDP2 could not add
        # one pass to another before it sends them.
        network.set_requires_all_reduce(True, recurse=False)


def _let_go(network: FSDPModule) -> None:
    """Back to the shards, in all groups, and to level 3."""
    network.set_reshard_after_forward(True)
    network.set_reshard_after_backward(True)
    network.set_requires_gradient_sync(True)
    for module in _groups(network):  # type: ignore[arg-type]
        module.reshard()
