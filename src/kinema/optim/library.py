"""Optimisers of libraries: pytorch-optimizer's and torch's classes by name, and what is asked of them here.

A class is tried on small weights when a run starts: it has to step without a closure, to leave weights alone at
learning rate 0 (which is how state is made for a checkpoint to be read into), and to go on from its tensors and
numbers to the same bits.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kinema.config.optimizer import OptimizerConfig, library_of
from kinema.errors import ConfigError
from kinema.optim.groups import grouped, peak_lr, weight_decay_of
from kinema.optim.numbers import numbers_of, restore_numbers, tensors_of
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    from kinema.optim.optimizers import Parameters

MODULES = {"pytorch_optimizer": "pytorch_optimizer", "torch": "torch.optim"}
ALIASES = {
    "lion": "pytorch_optimizer.Lion",
    "adafactor": "pytorch_optimizer.AdaFactor",
    "prodigy": "pytorch_optimizer.Prodigy",
    "schedulefree": "pytorch_optimizer.ScheduleFreeAdamW",
}
"""Types of their own that are a library's class."""
ELEMENTWISE = {
    "lion", "schedulefree", "pytorch_optimizer.Lion", "pytorch_optimizer.ScheduleFreeAdamW",
    *(f"torch.{name}" for name in ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad",
                                   "Adadelta", "ASGD", "Rprop")),
}  # fmt: skip
"""Types whose update of an element depends on no other element, so that each rank may update its own."""
OURS = ("self", "params", "lr", "weight_decay")
"""Arguments that are not `optimizer.options`."""


def lion(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[Optimizer]:
    """Lion (Chen et al. 2023), of pytorch-optimizer."""
    return [_build(parameters, config, {"betas": config.betas})]


def adafactor(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[Optimizer]:
    """Adafactor (Shazeer and Stern 2018), of pytorch-optimizer: by default without momentum, and with the learning rate
    that is given, neither made by the class nor scaled by the weights."""
    return [_build(parameters, config, {"betas": (None, 0.999), "relative_step": False, "scale_parameter": False})]


def prodigy(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[Optimizer]:
    """Prodigy (Mishchenko and Defazio 2023), of pytorch-optimizer."""
    return [_build(parameters, config, {"betas": config.betas, "eps": config.eps})]


def schedulefree(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[Optimizer]:
    """Schedule-free AdamW (Defazio et al. 2024), of pytorch-optimizer."""
    return [_build(parameters, config, {"betas": config.betas, "eps": config.eps})]


def named_class(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[Optimizer]:
    """The class that `optimizer.type` names, with `optimizer.options` as its arguments."""
    return [_build(parameters, config, {})]


def is_librarys(kind: str) -> bool:
    """Whether a type is a class of a library."""
    return kind in ALIASES or library_of(kind) is not None


def check_library(config: OptimizerConfig, parameters: Mapping[str, Tensor]) -> None:
    """ConfigError for a library that is missing, a class or an option that there is not, and a class that cannot train
    these parameters (on the meta device, ``{part}.{name}``) here: it is tried on small ones of their kinds."""
    kind = optimizer_class(config.type)
    _check_options(kind, config)
    _check_decay(kind, config, parameters)
    _check_one_lr(kind, config, parameters)
    small: dict[str, nn.Parameter] = {}
    seen: set[tuple[Any, ...]] = set()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        shape = tuple(min(size, 6 + place) for place, size in enumerate(parameter.shape))
        if (parameter.ndim, parameter.dtype) not in seen:
            seen.add((parameter.ndim, parameter.dtype))
            small[name] = nn.Parameter(torch.randn(shape, generator=generator).to(parameter.dtype))
    try:
        with _quietly():
            _try_out(small, config)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f'optimizer.type = "{config.type}" cannot train here: tried on small weights, it fails with '
            f"{type(error).__name__}: {error}"
        ) from error


def optimizer_class(kind: str) -> type[Optimizer]:
    """The class behind a type; ConfigError if its library is not installed or has none of this name."""
    found = library_of(ALIASES.get(kind, kind))
    assert found is not None, f"{kind} names no class of a library"
    library, name = found
    try:
        with _quietly():
            module = importlib.import_module(MODULES[library])
    except ImportError as error:
        raise ConfigError(
            f'optimizer.type = "{kind}" is a class of the package pytorch-optimizer, which cannot be imported '
            f"({error}). Install it with: pip install 'kinema[optim]'"
        ) from error
    kinds = {
        name: one for name, one in vars(module).items()
        if isinstance(one, type) and issubclass(one, Optimizer) and one is not Optimizer
    }  # fmt: skip
    if name not in kinds:
        raise ConfigError(f'optimizer.type = "{kind}": {library} has no optimiser {name}{did_you_mean(name, kinds)}')
    return kinds[name]


def _arguments(kind: type[Optimizer]) -> dict[str, inspect.Parameter]:
    """The named arguments of a class."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: one for name, one in inspect.signature(kind.__init__).parameters.items() if one.kind in named}


def _check_options(kind: type[Optimizer], config: OptimizerConfig) -> None:
    arguments = _arguments(kind)
    takes = {name: one for name, one in arguments.items() if name not in OURS}
    for name in config.options:
        if name in OURS:
            raise ConfigError(f"optimizer.options.{name}: this is optimizer.{name}.")
        if name not in takes:
            raise ConfigError(
                f"optimizer.options.{name}: {kind.__name__} has no such argument{did_you_mean(name, takes)} It takes "
                f"{', '.join(takes)}."
            )
        if name in ("betas", "eps") and config.type in ALIASES and name not in config.unread():
            raise ConfigError(f"optimizer.options.{name}: this is optimizer.{name}.")
    missing = [
        name for name, one in takes.items() if one.default is inspect.Parameter.empty and name not in config.options
    ]
    if missing:
        raise ConfigError(
            f'optimizer.type = "{config.type}" needs optimizer.options.{missing[0]}'
            + (", which no file can hold" if missing[0] in ("optimizer", "base_optimizer", "model") else "")
            + "."
        )
    if "lr" not in arguments:
        raise ConfigError(f'optimizer.type = "{config.type}" takes no learning rate, which kinema sets at every step.')


def _check_decay(kind: type[Optimizer], config: OptimizerConfig, parameters: Mapping[str, Any]) -> None:
    if "weight_decay" not in _arguments(kind) and any(weight_decay_of(n, p, config) for n, p in parameters.items()):
        raise ConfigError(
            f'optimizer.type = "{config.type}" has no weight decay: set optimizer.weight_decay = 0, and none in groups.'
        )


def _check_one_lr(kind: type[Optimizer], config: OptimizerConfig, parameters: Iterable[str]) -> None:
    finds_one = kind.__name__.startswith(("Prodigy", "DAdapt"))
    if finds_one and len({peak_lr(name, config, config.lr) for name in parameters}) > 1:
        raise ConfigError(
            f'optimizer.type = "{config.type}" finds one learning rate for all weights: leave out optimizer.part_lr, '
            "optimizer.lora_plus and lr in optimizer.groups."
        )


def _build(parameters: Parameters, config: OptimizerConfig, own: dict[str, Any]) -> Optimizer:
    kind = optimizer_class(config.type)
    groups = grouped(parameters, config)
    _check_one_lr(kind, config, parameters)
    if "weight_decay" not in _arguments(kind):
        for group in groups:
            del group["weight_decay"]
    try:
        with _quietly():
            return kind(groups, lr=config.lr, **{**own, **config.options})  # type: ignore[call-arg]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f'optimizer.type = "{config.type}": {kind.__name__} refuses its arguments: {error}'
        ) from error


@contextmanager
def averaged_weights(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Inside, parameters hold the average that a schedule-free optimiser means to be used; afterwards what they held,
    to the bit. Needs memory for one more copy of what trains. Other optimisers are left alone."""
    with torch.no_grad(), ExitStack() as stack:
        for optimizer in optimizers:
            if has_average(optimizer):
                stack.enter_context(_switched(optimizer))
        yield


def has_average(optimizer: Optimizer) -> bool:
    """Whether evaluation wants other weights than training has: a schedule-free optimiser."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextmanager
def _switched(optimizer: Any) -> Iterator[None]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, before in zip(parameters, saved, strict=True):
            parameter.copy_(before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what libraries warn of when they are imported and made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_state_on_paper(optimizer: Any) -> None:
    """Let an optimiser make its state for parameters on the meta device that have gradients: by a step, or, where a
    step reads numbers, by what pytorch-optimizer's classes make it with. ConfigError where neither works."""
    try:
        with _quietly():
            optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if not hasattr(optimizer, "init_group"):
            raise ConfigError(f"the state of {type(optimizer).__name__} cannot be forecast: {error}") from error
        for group in optimizer.param_groups:
            optimizer.init_group(group, beta1=(group.get("betas") or (None,))[0])


def averages_now(optimizers: Iterable[Optimizer]) -> dict[nn.Parameter, Tensor]:
    """Copies of the averages that schedule-free optimisers mean to be used; {} without one."""
    switching = [optimizer for optimizer in optimizers if has_average(optimizer)]
    with averaged_weights(switching):
        return {p: p.detach().clone() for one in switching for group in one.param_groups for p in group["params"]}


def _try_out(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> None:
    """Step twice; go on from there as a resumed run would; both ways must come to the same bits."""
    from kinema.optim.optimizers import build_optimizers

    draws = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(p.shape, generator=draws).to(p.dtype) for p in parameters.values()] for _ in range(4)]

    def start(weights: Iterable[Tensor]) -> tuple[dict[str, nn.Parameter], Optimizer]:
        fresh = {name: nn.Parameter(w.detach().clone()) for name, w in zip(parameters, weights, strict=True)}
        (optimizer,) = build_optimizers(fresh, set(), config)
        return fresh, optimizer

    def step(mine: dict[str, nn.Parameter], optimizer: Optimizer, number: int) -> None:
        torch.manual_seed(number)
        for parameter, gradient in zip(mine.values(), gradients[number], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    with torch.random.fork_rng([]):
        first, optimizer = start(parameters.values())
        for number in range(2):
            step(first, optimizer, number)
        second, resumed = start(first.values())
        _without_moving(config, second, lambda: _zero_step(resumed))
        names, others = ({p: name for name, p in mine.items()} for mine in (first, second))
        for parameter, name in names.items():
            ours = tensors_of(optimizer.state[parameter])
            theirs = tensors_of(resumed.state[second[name]])
            if {key: t.shape for key, t in ours.items()} != {key: t.shape for key, t in theirs.items()}:
                raise _not_exact(config, "its state is another after some steps than after one")
            for key, tensor in ours.items():
                theirs[key].copy_(tensor)
        restore_numbers([resumed], others, numbers_of([optimizer], names))
        for number in range(2, 4):
            step(first, optimizer, number)
            step(second, resumed, number)
    for name, weight in first.items():
        if not torch.equal(weight, second[name]):
            raise _not_exact(config, "it keeps more than its tensors and numbers")


def _zero_step(optimizer: Optimizer) -> None:
    """As `kinema.training.state.make_optimizer_state` does it."""
    settings = [{key: group[key] for key in ("lr", "weight_decay") if key in group} for group in optimizer.param_groups]
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(dict.fromkeys(values, 0.0))
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _without_moving(config: OptimizerConfig, parameters: dict[str, nn.Parameter], work: Callable[[], None]) -> None:
    before = [p.detach().clone() for p in parameters.values()]
    work()
    if not all(torch.equal(old, new) for old, new in zip(before, parameters.values(), strict=True)):
        raise _not_exact(config, "a step with learning rate 0 and no gradient moves weights")


def _not_exact(config: OptimizerConfig, reason: str) -> ConfigError:
    return ConfigError(
        f'optimizer.type = "{config.type}" cannot be saved and resumed exactly: {reason}. Choose another type.'
    )
