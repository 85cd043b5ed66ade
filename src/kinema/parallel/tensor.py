"""Tensor parallel training: peers share the matrices of a network's blocks (Shoeybi et al. 2019, "Megatron-LM").

Attention and feed-forward parts are pairs of matrices. Of the first a peer has some output channels (whole heads), of
the second the input channels that meet them, and the results of the second are summed over the peers: between the
pairs, every peer has all channels of all tokens. Layers that make modulation of a vector keep some output channels
each, which are gathered.

Weights are DTensors over the peers, for the optimiser, FSDP2 and checkpoints; the layers compute with this process's
part of them, and sums over peers stand where they are needed, forwards and backwards. torch's styles of
``parallelize_module`` would sum the input's gradient once for each layer; here layers that read one tensor share
one sum. Of a LoRA, the factor on the side that is shared is shared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from kinema.config.section import QUANTIZED
from kinema.errors import ConfigError
from kinema.families.tensor_plans import REFUSED, Split, TensorPlan, tensor_plan
from kinema.parallel.mesh import World
from kinema.parallel.packing import DIMENSION, Packing, packings, set_part

if TYPE_CHECKING:
    from kinema.config.schema import Config
    from kinema.families.base import Family

ADAPTERS = ("lora",)
"""Kinds of adapters that can be shared. The others see the whole of a layer's weight, or its Kronecker factors."""


def check_tensor_parallel(config: Config, family: Family) -> None:
    """ConfigError if ``parallel.tp`` peers cannot share this configuration's networks. Reads no weights."""
    size = config.parallel.tp
    if size == 1:
        return
    if config.adapter is not None and config.adapter.type not in ADAPTERS:
        raise ConfigError(
            f"parallel.tp = {size}: an adapter of type {config.adapter.type} needs whole matrices, which no device "
            'has under tensor parallel. Set adapter.type = "lora", or share the network by parallel.dp_shard.'
        )
    for part in family.trained_parts():
        stored = getattr(config.model, part).dtype
        if stored in QUANTIZED:
            raise ConfigError(
                f'model.{part}.dtype: a base stored as "{stored}" has scales for rows or blocks of its matrices, which '
                f'parallel.tp = {size} would cut. Set model.{part}.dtype = "bf16", or parallel.tp = 1.'
            )
        network = family.load(part, "meta", None)
        plan = tensor_plan(network)
        if plan is None:
            if not part.startswith("network"):
                continue  # text encoders are small: every peer has them whole
            reason = REFUSED.get(family.name, "no plan says how its matrices are shared")
            raise ConfigError(
                f"parallel.tp = {size}: {family.name} cannot be tensor parallel: {reason}. Set parallel.tp = 1, and "
                "share weights by parallel.dp_shard or long sequences by parallel.sp."
            )
        _check_sizes(network, plan, size, f"{family.name}/{family.variant.name}")


def _check_sizes(network: nn.Module, plan: TensorPlan, size: int, name: str) -> None:
    """ConfigError unless every peer gets whole heads and as much of each matrix."""
    counts = {f"heads of {where}": count for where, count in plan.head_counts(network).items()}
    for where, layer, split in _planned(network, plan):
        for i, block in enumerate(split.sizes(layer)):
            counts[f"channels of {where}" + (f" (part {i})" if i else "")] = block
    largest = math.gcd(*counts.values())
    if largest % size:
        wrong = next(where for where, count in counts.items() if count % size)
        fitting = [number for number in range(1, largest + 1) if largest % number == 0]
        raise ConfigError(
            f"parallel.tp = {size} does not divide the {counts[wrong]} {wrong} in {name}. "
            f"Sizes that fit: {', '.join(map(str, fitting))}."
        )


def split_matrices(network: nn.Module, world: World) -> None:
    """Let the tensor-parallel peers share a network's matrices, in place.

    Call it after adapters, before activation checkpointing and ``parallel.data.shard``. The network may
    be in this machine's memory: parts go to the device. It is called as before, on every peer with the same arguments,
    and returns the whole output on each; gradients of what every peer has are whole. Names of modules and parameters
    stay as they are. All processes have to hold the same weights (``parallel.data.check_equal_weights``).
    """
    if world.sizes.tp == 1:
        return
    plan = tensor_plan(network)
    if plan is None:
        return
    peers = Peers(world)
    for name in plan.counters:
        for _, module in _matching(network, name):
            module.heads //= peers.size  # type: ignore[operator]
    for name, argument in plan.narrowed.items():
        for _, module in _matching(network, name):
            module.register_forward_pre_hook(_narrowing(argument, peers), with_kwargs=True)
    for _, layer, split in list(_planned(network, plan)):
        _split(layer, split, peers)
    for name in plan.blocks:
        for _, block in _matching(network, name):
            block.forward = MethodType(_forgetting(block.forward.__func__, peers), block)  # type: ignore[union-attr]
            block.register_forward_pre_hook(_take_parts)
            block.register_forward_hook(_drop_parts, always_call=True)


def _planned(network: nn.Module, plan: TensorPlan) -> Iterator[tuple[str, nn.Module, Split]]:
    for pattern, split in plan.layers.items():
        for name, layer in _matching(network, pattern):
            yield name, layer, split


def _matching(network: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules by a pattern of names in which ``*`` stands for one of a list."""
    first, *rest = pattern.split(".")
    found = [("", network)]
    for word in (first, *rest):
        following = []
        for name, module in found:
            children = dict(module.named_children())
            for child in children if word == "*" else [word]:
                if child in children:
                    following.append((f"{name}.{child}" if name else child, children[child]))
        found = following
    yield from found


AnyTensor = TypeVar("AnyTensor", Tensor, "Tensor | None")


class Peers:
    """The processes that share matrices, and what they exchange."""

    def __init__(self, world: World) -> None:
        assert world.mesh is not None
        self.mesh = world.mesh[DIMENSION]
        self.group: dist.ProcessGroup = self.mesh.get_group()
        self.rank, self.size = self.mesh.get_local_rank(), self.mesh.size()
        self._entered: tuple[Tensor, Tensor] | None = None

    def enter(self, x: Tensor, alone: bool = False) -> Tensor:
        """What all peers have, on its way into their parts of a layer: its gradient is the sum of theirs.

        Layers of a block that read the same tensor one after the other get the same one here, so that there is one
        sum. ``alone``: no other layer reads it.
        """
        kind, source = x.device.type, x
        if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:  # what the layer would do: less to exchange
            x = x.to(torch.get_autocast_dtype(kind))
        if alone or not (x.requires_grad and torch.is_grad_enabled()):
            return self.share(x)
        if self._entered is None or self._entered[0] is not source or self._entered[1].dtype != x.dtype:
            self._entered = source, self.share(x)
        return self._entered[1]

    def share(self, x: AnyTensor) -> AnyTensor:
        """What all peers have, or None; its gradient is the sum of theirs."""
        if x is None or not (x.requires_grad and torch.is_grad_enabled()):
            return x
        return _SumGradients.apply(x, self)

    def forget(self) -> None:
        """Let go of the tensor that was read last."""
        self._entered = None

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the peers' tensors, whose gradient every peer has."""
        return _Sum.apply(x, self.group)

    def sum_both_ways(self, x: Tensor) -> Tensor:
        """The sum of the peers' tensors, of whose gradient every peer has a part."""
        return _SumGradients.apply(_Sum.apply(x, self.group), self)

    def gather(self, x: Tensor) -> Tensor:
        """The channels of all peers, one behind the other; every peer has their gradient."""
        return _Gather.apply(x, self)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.peers.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(peers.size)]
        dist.all_gather(parts, x.contiguous(), group=peers.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.peers.size, dim=-1)[ctx.peers.rank], None


def _forgetting(forward: Callable[..., Any], peers: Peers) -> Callable[..., Any]:
    """A block's forward pass, also the one that is run again for its backward pass: nothing that its layers read
    stays behind."""

    @wraps(forward)
    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        peers.forget()
        try:
            return forward(block, *args, **kwargs)
        finally:
            peers.forget()

    return run


_PART = "_part_of_"
"""Before a parameter's name: the attribute of a layer that holds this process's part of it while its block runs."""


@torch.compiler.disable
def _take_parts(block: nn.Module, _: Any) -> None:
    """Before a compiled block: DTensors stay outside of what is compiled."""
    if block._compiled_call_impl is None:
        return
    for path in packings(block):
        layer, _, name = path.rpartition(".")
        module = block.get_submodule(layer)
        part = _local(getattr(module, name))
        setattr(module, _PART + name, part.view_as(part))  # torch takes what a DTensor gives for a parameter


@torch.compiler.disable
def _drop_parts(block: nn.Module, *_: Any) -> None:
    if block._compiled_call_impl is None:
        return
    for path in packings(block):
        layer, name = path.rpartition(".")[::2]
        vars(block.get_submodule(layer)).pop(_PART + name, None)


def _part(layer: nn.Module, name: str) -> Tensor:
    """This process's part of a parameter."""
    part: Tensor | None = getattr(layer, _PART + name, None)
    return _local(getattr(layer, name)) if part is None else part


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _split(layer: Any, split: Split, peers: Peers) -> None:
    """Share one layer, or the layer under a LoRA and the LoRA with it."""
    if split.kind == "head_norm":
        layer.forward = MethodType(_norm_of_some_heads(layer, peers), layer)
    elif split.kind == "norm":
        set_part(layer, "weight", Packing(0, split.sizes(layer), peers.size), peers.mesh)
        layer.forward = MethodType(_norm_over_all_heads(peers), layer)
    elif hasattr(layer, "base_layer"):
        _split(layer.base_layer, split, peers)
        shared = {"row": layer.lora_A, "column": layer.lora_B}.get(split.kind, {})
        for factor in dict(shared).values():
            _split_linear(factor, split, split.sizes(layer.base_layer), peers, alone=True)
    else:
        _split_linear(layer, split, split.sizes(layer), peers)


def _split_linear(layer: nn.Linear, split: Split, blocks: tuple[int, ...], peers: Peers, alone: bool = False) -> None:
    dim = 1 if split.kind == "row" else 0
    set_part(layer, "weight", Packing(dim, blocks, peers.size), peers.mesh)
    if dim == 0 and layer.bias is not None:
        set_part(layer, "bias", Packing(0, blocks, peers.size), peers.mesh)
    run = _rows(peers) if split.kind == "row" else _columns(peers, split.kind == "gathered", alone)
    layer.forward = MethodType(run, layer)  # type: ignore[method-assign]


def _columns(peers: Peers, gathered: bool, alone: bool) -> Callable[..., Tensor]:
    def columns(layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else _part(layer, "bias")
        y = functional.linear(peers.enter(x, alone), _part(layer, "weight"), bias)
        return peers.gather(y) if gathered else y

    return columns


def _rows(peers: Peers) -> Callable[..., Tensor]:
    def rows(layer: nn.Linear, x: Tensor) -> Tensor:
        y = peers.sum(functional.linear(x, _part(layer, "weight")))
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    return rows


def _narrowing(argument: str, peers: Peers) -> Callable[..., Any]:
    """Of an argument by keyword, the channels of the heads that are here."""

    def mine(value: Tensor) -> Tensor:
        return value.chunk(peers.size, dim=-1)[peers.rank]

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        value = kwargs.get(argument)
        if value is not None:
            kwargs[argument] = tuple(map(mine, value)) if isinstance(value, tuple) else mine(value)
        return args, kwargs

    return narrow


class _StandIn:
    """What a norm's ``forward`` reads of the norm, its parameters among it."""


def _norm_of_some_heads(norm: nn.Module, peers: Peers) -> Callable[..., Tensor]:
    """A norm within each head sees those that are here: the gradient of its weight is the sum of the peers'. Hooks on
    parameters would not do: FSDP2 replaces them."""
    forward = type(norm).forward
    settings = {name: value for name, value in vars(norm).items() if not name.startswith("_")}
    names = list(norm._parameters)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        stand_in = _StandIn()
        for name, value in settings.items():
            setattr(stand_in, name, value)
        for name in names:
            setattr(stand_in, name, peers.share(getattr(module, name)))
        return forward(stand_in, x)  # type: ignore[no-any-return]

    return run


def _norm_over_all_heads(peers: Peers) -> Callable[..., Tensor]:
    """torch's RMSNorm over channels that the peers share."""

    def norm(module: Any, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        squares = peers.sum_both_ways(wide.square().sum(dim=-1, keepdim=True))
        scale = (squares / (x.shape[-1] * peers.size) + module.eps).rsqrt()
        return (wide * scale).type_as(x) * _part(module, "weight")

    return norm
