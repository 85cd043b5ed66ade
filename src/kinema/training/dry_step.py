"""A training step on the meta device: what the weights, the optimiser and the passes of a configuration take, found
without weights, data or a GPU."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kinema.config.memory import OfBlock
from kinema.config.schema import Config
from kinema.config.section import QUANTIZED
from kinema.data.batch import Batch
from kinema.data.buckets import Bucket
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.pipeline_plans import pipeline_units
from kinema.families.sample_shapes import sample_tensors
from kinema.families.stored import quantize_on_paper, quantized_bytes, table_bytes
from kinema.families.tensor_plans import tensor_plan
from kinema.memory.dry_arithmetic import DryArithmetic, Rules
from kinema.memory.dry_run import DryRun
from kinema.objectives.base import Draws
from kinema.parallel.paper import Exchanged, PaperWorld
from kinema.parallel.plan_model import OUTSIDE, Pass, Weight
from kinema.parallel.sequence import split_sequences
from kinema.parallel.tensor import split_matrices
from kinema.plugins import OBJECTIVES
from kinema.training.dry_segments import Recorder, Run, expanded
from kinema.training.networks import FamilyDenoiser

if TYPE_CHECKING:
    from kinema.adapters.targets import LayerPlan

Plan = Mapping[str, "LayerPlan"]


class DryNetworks:
    """The networks that a configuration trains, without weights: whole to be counted, and shortened to be run.

    Blocks that are alike need not all run: of each row of them a few stay, and stand for the rest (`shorten`).
    ``precision``: what is computed in, "fp32", "bf16" or "fp16". ``rules``: the device by whose autocast.
    """

    def __init__(self, config: Config, family: Family, precision: str, rules: Rules = "cuda") -> None:
        self.config, self.family, self.precision, self.rules = config, family, precision, rules
        others = [part for part in family.trained_parts() if not part.startswith("network")]
        if others:
            raise UserError(
                f"model.train: a plan cannot run {' and '.join(others)}, which reads captions in every step. Plan with "
                "the network alone: --model.train network"
            )
        self.weights: list[Weight] = []
        self.buffers = 0
        self.networks: dict[str, nn.Module] = {}
        self.runs: list[Run] = []
        """Of the first network: experts are alike, and one of them takes a step."""
        self._peers: dict[tuple[int, int], tuple[dict[str, nn.Module], Exchanged]] = {}
        self.blocks = 0
        self.lists: dict[str, int] = {}
        """Lengths of its lists of blocks."""
        self.units: tuple[str, ...] = ()
        self.unit_of: tuple[int, ...] = ()
        """What a pipeline can be cut between, and the unit of each block."""
        plans = self._adapter_plans()
        for part in family.trained_parts():
            self._add(part, plans.get(part, {}))

    def _adapter_plans(self) -> dict[str, Plan]:
        from kinema.adapters.targets import adaptable_modules, plan_layers

        if self.config.adapter is None:
            return {}
        parts = self.family.trained_parts()
        modules = {part: adaptable_modules(self.family.empty(part)) for part in parts}
        defaults = {part: self.family.adapter_targets(part) for part in parts}
        return dict(plan_layers(modules, self.config.adapter, defaults))

    def _add(self, part: str, plan: Plan) -> None:
        config, family = self.config, self.family
        network = family.empty(part)
        stored = getattr(config.model, part).dtype
        if stored is None or stored in QUANTIZED:
            stored = "fp32" if config.adapter is None else self.precision
        _convert(network, torch_dtype(stored))
        network.requires_grad_(config.adapter is None)
        rounded = quantized_bytes(family, part, network, torch_dtype(stored))
        paths = {id(module): path for path, module in network.named_modules()}
        lists = {name: len(group) for name, group in family.blocks(network).items()}
        blocks = [block for group in family.blocks(network).values() for block in group]
        numbers = {paths[id(block)]: number for number, block in enumerate(blocks)}
        first = not self.networks
        weights = _weights(network, numbers, config, plan, rounded, takes_part=first)
        self.buffers += sum(buffer.nbytes for buffer in network.buffers())
        self.buffers += table_bytes(family, part, network, torch_dtype(stored))
        if first:
            self.units = tuple(unit.name for unit in pipeline_units(network, family.blocks(network)))
            self.unit_of = tuple(_unit_of(path, self.units) for path in numbers)
        runs, renamed = shorten(network, family, plan)
        quantize_on_paper(family, part, network, torch_dtype(stored))
        if config.adapter is not None:
            from kinema.adapters.inject import add_planned, leave_casts_to_autocast

            add_planned(network, config.adapter, renamed, config.run.seed)
            if torch_dtype(self.precision).itemsize < 4:
                leave_casts_to_autocast(network, config.adapter)
        self.networks[part] = network.train()
        if not rounded:  # these are not sharded
            weights = _travelling(weights, network, runs, list(numbers), torch_dtype(self.precision))
        self.weights += weights.values()
        if first:
            self.runs, self.blocks, self.lists = runs, len(blocks), lists

    def run(
        self,
        bucket: Bucket,
        samples: int,
        checkpointing: OfBlock,
        text_tokens: int | None = None,
        sp: int = 1,
        tp: int = 1,
    ) -> Pass:
        """One micro-batch of ``samples`` samples of a bucket, forward and backward, as the first of ``sp`` x ``tp``
        processes does it that share its sequences and matrices."""
        networks, given = self._shared(sp, tp)
        controls = max((len(source.controls) for source in self.config.data.sources), default=0)
        tensors = sample_tensors(self.family, bucket, text_tokens, controls)
        rows = {name: [value] * samples for name, value in tensors.items()}
        batch = Batch(0, rows, [""] * samples, list(range(samples)), [1 / samples] * samples)
        objective = OBJECTIVES.load(self.config.objective.type)(self.config.objective, self.family)
        denoisers = {"student": FamilyDenoiser(self.family, networks)}
        dry = DryRun()
        arithmetic = DryArithmetic(dry, torch_dtype(self.precision), self.rules)
        for network in networks.values():
            dry.exclude([*network.parameters(), *network.buffers()])
        recorder = Recorder(dry, arithmetic, given)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # of a kernel's choice
            if checkpointing:
                groups = [self.family.blocks(network).values() for network in networks.values()]
                blocks = itertools.chain.from_iterable(itertools.chain.from_iterable(groups))
                stack.enter_context(arithmetic.checkpointed(blocks, checkpointing))
            for network in networks.values():
                stack.enter_context(recorder.watching(network, [run.path for run in self.runs]))
            stack.enter_context(dry)
            stack.enter_context(arithmetic())
            dry.count(rows)
            recorder.start()
            loss = objective(batch, denoisers, Draws(self.config.run.seed, 0))
            recorder.turn()
            loss.total.backward()
            del loss, batch, rows, tensors  # what is left lasts: tables that the network keeps
            recorder.cut(OUTSIDE)
        return expanded(Pass(tuple(recorder.forward), tuple(recorder.backward)), self.runs)

    def _shared(self, sp: int, tp: int) -> tuple[dict[str, nn.Module], Exchanged]:
        """The networks as one of these peers has them, and what counts the bytes that it exchanges."""
        if sp * tp == 1:
            return self.networks, Exchanged()
        if (sp, tp) not in self._peers:
            world = PaperWorld.of(sp, tp)
            networks = {part: copy.deepcopy(network) for part, network in self.networks.items()}
            for network in networks.values():
                split_matrices(network, world)
                split_sequences(network, self.family.blocks(network), world, self.config.parallel.attention)
            self._peers[sp, tp] = networks, world.given
        return self._peers[sp, tp]


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    from kinema.families.loading import kept_in_float32

    exact = kept_in_float32(network, dtype)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else dtype)


def _weights(
    network: nn.Module,
    numbers: Mapping[str, int],
    config: Config,
    plan: Plan,
    rounded: Mapping[Any, int],
    takes_part: bool,
) -> dict[str, Weight]:
    """Every tensor of a network and of its adapter, by name. ``rounded``: the bytes of those that are stored in fewer
    bits. ``takes_part``: whether it gets gradients in a step."""
    from kinema.adapters.preflight import planned
    from kinema.adapters.targets import adaptable_modules

    tensors: dict[str, tuple[Tensor, bool]] = {name: (p, p.requires_grad) for name, p in network.named_parameters()}
    if config.adapter is not None:
        dtype = torch_dtype(config.adapter.dtype)
        state = planned(config.adapter, plan, adaptable_modules(network), "network").state
        tensors |= {name: (value.to(dtype), True) for name, value in state.items()}
    of = {name: _block_of(name, numbers) for name in tensors}
    trained = {name: nn.Parameter(value.detach()) for name, (value, trains) in tensors.items() if trains}
    matrices = {name for name, value in trained.items() if of[name] != OUTSIDE and value.ndim == 2}
    states = _optimizer_state(trained, matrices, config)
    shared = _shared_layers(network)
    weights = {}
    for name, (value, trains) in tensors.items():
        size = rounded.get(value, value.nbytes)
        average = value.numel() * max(4, value.itemsize) if trains and config.training.ema is not None else 0
        weights[name] = Weight(
            block=of[name],
            elements=value.numel(),
            rows=value.shape[0] if value.ndim else 1,
            bytes=size,
            trains=trains,
            gradient=value.nbytes if trains and takes_part else 0,
            state=states.get(name, 0),
            average=average,
            splits=next((how for pattern, how in shared if pattern.fullmatch(name)), None),
            adapts=config.adapter is not None and trains,
        )
    return weights


def _travelling(
    weights: Mapping[str, Weight], network: nn.Module, runs: list[Run], paths: list[str], compute: torch.dtype
) -> dict[str, Weight]:
    """The weights, with what FSDP2 gathers in the type of computing and what it leaves whole; ``network`` is
    shortened, ``paths`` are those of the blocks of the whole one."""
    from kinema.parallel.fsdp import short_parameters

    short: dict[int, set[str]] = {}
    for run in runs:
        block = network.get_submodule(run.path)
        chosen = short_parameters(block, compute)
        if chosen:
            mine = {_plain(name) for name, parameter in block.named_parameters() if parameter in chosen}
            short |= dict.fromkeys(run.numbers, mine)
    found = {}
    for name, weight in weights.items():
        names = short.get(weight.block)
        if names is None:
            found[name] = weight
        elif name.removeprefix(f"{paths[weight.block]}.") in names:
            found[name] = replace(weight, cast=weight.elements * compute.itemsize)
        else:
            found[name] = replace(weight, stays=True)
    return found


def _plain(name: str) -> str:
    """A parameter's name without what adapters put around its layer."""
    return ".".join(word for word in name.split(".") if word not in ("base_layer", "default"))


def _unit_of(path: str, units: tuple[str, ...]) -> int:
    return next(number for number, unit in enumerate(units) if path == unit or path.startswith(f"{unit}."))


Splits = Literal["rows", "columns"]


def _shared_layers(network: nn.Module) -> list[tuple[re.Pattern[str], Splits]]:
    """Names of the weights that tensor parallel shares, and along what."""
    plan = tensor_plan(network)
    found: list[tuple[re.Pattern[str], Splits]] = []
    for name, split in {} if plan is None else plan.layers.items():
        layer = re.escape(name).replace(r"\*", "[^.]+")
        kinds: dict[Splits, str] = {"rows": r"(\.weight|\.bias)"}
        if split.kind == "column":
            kinds = {"rows": r"(\.weight|\.bias|\.lora_B\.weight)"}
        elif split.kind == "row":
            kinds = {"columns": r"(\.weight|\.lora_A\.weight)"}
        elif split.kind == "head_norm":
            kinds = {}
        found += [(re.compile(layer + parameters), how) for how, parameters in kinds.items()]
    return found


def _block_of(name: str, numbers: Mapping[str, int]) -> int:
    words = name.split(".")
    prefixes = (".".join(words[:count]) for count in range(len(words), 0, -1))
    return next((numbers[prefix] for prefix in prefixes if prefix in numbers), OUTSIDE)


def _optimizer_state(trained: Mapping[str, nn.Parameter], matrices: set[str], config: Config) -> dict[str, int]:
    """Bytes of the state of each tensor: what the optimiser makes at its first step."""
    from kinema.optim.library import make_state_on_paper
    from kinema.optim.numbers import tensors_of
    from kinema.optim.optimizers import build_optimizers, is_vector

    inside = {name for name in matrices if not is_vector(trained[name])}
    optimizers = build_optimizers({f"network.{name}": p for name, p in trained.items()},
                                  {f"network.{name}" for name in inside}, config.optimizer)  # fmt: skip
    for parameter in trained.values():
        parameter.grad = torch.empty_like(parameter)
    names = {id(parameter): name for name, parameter in trained.items()}
    found: dict[str, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group |= {key: False for key in ("fused", "foreach") if key in group}  # kernels that no meta device has
        make_state_on_paper(optimizer)
        for parameter, state in optimizer.state.items():
            found[names[id(parameter)]] = sum(value.nbytes for value in tensors_of(state).values())
    return found


def shorten(network: nn.Module, family: Family, plan: Plan) -> tuple[list[Run], Plan]:
    """Take out of a network, in place, the blocks that others stand for; the runs, and the plan of an adapter with the
    names of what stays."""
    paths = {id(module): path for path, module in network.named_modules()}
    runs: list[Run] = []
    moved: dict[str, str] = {}
    number = 0
    for group in family.blocks(network).values():
        path = paths.get(id(group))
        kept: list[nn.Module] = []
        alike = itertools.groupby(group, key=lambda block: _kind(block, paths[id(block)], plan))
        rows = [list(row) for _, row in alike]
        for row in rows:
            places = range(len(row)) if path is None else _standing(len(row), row is rows[-1])
            for place, end in itertools.pairwise([*places, len(row)]):
                own = paths[id(row[place])]
                new = own if path is None else f"{path}.{len(kept)}"
                runs.append(Run(new, range(number + place, number + end)))
                moved[own] = new
                kept.append(row[place])
            number += len(row)
        if path is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, nn.ModuleList(kept))
    return runs, _renamed(network, plan, moved)


def _standing(count: int, ends: bool) -> list[int]:
    """Which of so many blocks that are alike stay: the first, which may have no gradient to pass on; the second, for
    all that follow; and the last of a list, of whose outputs some may go nowhere."""
    return sorted({0, min(1, count - 1), count - 1} if ends else {0, min(1, count - 1)})


def _kind(block: nn.Module, path: str, plan: Plan) -> tuple[Any, ...]:
    """What blocks have in common that are alike."""
    own = sorted((name.removeprefix(path), one.rank) for name, one in plan.items() if name.startswith(f"{path}."))
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return type(block), shapes, tuple(own)


def _renamed(network: nn.Module, plan: Plan, moved: Mapping[str, str]) -> Plan:
    """The plan for the layers that are still there, by their new names."""
    there = {name for name, _ in network.named_modules()}
    new: dict[str, LayerPlan] = {}
    for name, one in plan.items():
        words = name.split(".")
        prefixes = (".".join(words[:count]) for count in range(len(words), 0, -1))
        block = next((prefix for prefix in prefixes if prefix in moved), None)
        if block is not None:
            new[moved[block] + name.removeprefix(block)] = one
        elif name in there and not _is_numbered_like(name, moved):
            new[name] = one
    return new


def _is_numbered_like(name: str, moved: Mapping[str, str]) -> bool:
    """Whether a layer lies in a list of blocks, in a block that is gone."""
    lists = {path.rpartition(".")[0] for path in moved if path.rpartition(".")[2].isdecimal()}
    words = name.split(".")
    return any(".".join(words[:count]) in lists for count in range(1, len(words)))
