"""What of the optimiser's table can be refused before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.config.schema import Config
from kinema.dtypes import torch_dtype
from kinema.errors import ConfigError
from kinema.families.base import Family
from kinema.training.update_checks import check_steps, why_not_updated

if TYPE_CHECKING:
    from torch import Tensor

    from kinema.adapters.preflight import Plans
    from kinema.parallel.mesh import Sizes

WHOLE_ROWS = {
    "adamw8bit": "the blocks that share a scale are parts of a row",
    "automagic": "it takes means of whole rows and columns",
}
"""Types whose matrices must not be cut within a row, and why."""


def check_optimizer(config: Config, family: Family, sizes: Sizes, plans: Plans) -> None:
    """ConfigError for groups that match nothing, rounding where nothing is rounded, a class of a library that is
    missing or cannot train these weights, and a plan that the type cannot follow. ``plans``: what each layer of each
    part gets of an adapter. Loads no weights."""
    from kinema.optim.groups import check_groups
    from kinema.optim.library import check_library, is_librarys
    from kinema.optim.optimizers import check_rounding

    if reason := why_not_laid_out(config, sizes):
        raise ConfigError(reason)
    check_steps(config)
    optimizer = config.optimizer
    asks = optimizer.groups or optimizer.part_lr or optimizer.rounding != "none"
    if not asks and not is_librarys(optimizer.type):
        return
    trained = trained_on_paper(config, family, plans)
    check_groups(optimizer, trained)
    if optimizer.rounding != "none" and all(p.dtype.itemsize > 2 for p in trained.values()):
        key = "model.network.dtype" if config.adapter is None else "adapter.dtype"
        raise ConfigError(
            f'optimizer.rounding = "{optimizer.rounding}": the weights that train are stored in fp32, where updates '
            f'are not lost. Leave it out, or halve their memory with {key} = "bf16".'
        )
    check_rounding(trained, optimizer)
    if is_librarys(optimizer.type):
        check_library(optimizer, trained)


def trained_on_paper(config: Config, family: Family, plans: Plans) -> dict[str, Tensor]:
    """The weights that train, ``{part}.{name}``, on the meta device and in their types."""
    from kinema.adapters.preflight import planned
    from kinema.adapters.targets import adaptable_modules

    found: dict[str, Tensor] = {}
    for part in family.trained_parts():
        network = family.load(part, "meta", None)
        if config.adapter is None:
            tensors, stored = dict(network.named_parameters()), getattr(config.model, part).dtype or "fp32"
        else:
            tensors = planned(config.adapter, plans[part], adaptable_modules(network), part).state
            stored = config.adapter.dtype
        found |= {f"{part}.{name}": value.to(torch_dtype(stored)) for name, value in tensors.items()}
    return found


def why_not_laid_out(config: Config, sizes: Sizes) -> str | None:
    """Why this type of optimiser cannot follow a plan; None if it can."""
    from kinema.optim.library import ELEMENTWISE, is_librarys

    kind = config.optimizer.type
    if reason := why_not_updated(config, sizes):
        return reason
    if sizes.tp > 1 and kind in WHOLE_ROWS:
        return (
            f'optimizer.type = "{kind}" and parallel.tp = {sizes.tp}, which cuts rows: {WHOLE_ROWS[kind]}. Use '
            'parallel.dp_shard, or optimizer.type = "adamw".'
        )
    if not is_librarys(kind):
        return None
    if sizes.pp > 1:
        return (
            f'optimizer.type = "{kind}" and parallel.pp = {sizes.pp}: stages of a pipeline would each keep numbers of '
            'their own. Use parallel.dp_shard, or optimizer.type = "adamw".'
        )
    if max(sizes.dp_shard, sizes.tp) > 1 and kind not in ELEMENTWISE:
        key = "dp_shard" if sizes.dp_shard > 1 else "tp"
        return (
            f'optimizer.type = "{kind}" and parallel.{key} = {max(sizes.dp_shard, sizes.tp)}: it was made for whole '
            f"weights, of which each process would have a part. Set parallel.{key} = 1, or use adamw, adamw8bit, "
            "automagic, muon, lion or schedulefree."
        )
    return None
