"""What does not go together with how an optimiser updates weights: within the backward pass, one after the other, or by
lines and directions of whole matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.config.schema import Config
from kinema.errors import ConfigError

if TYPE_CHECKING:
    from kinema.parallel.mesh import Sizes


def why_not_updated(config: Config, sizes: Sizes) -> str | None:
    """Why weights cannot be updated so under a plan and with the rest of a configuration; None if they can."""
    optimizer = config.optimizer
    of_lines = {
        "first_moment": optimizer.first_moment == "subspace",
        "second_moment": optimizer.second_moment == "subset_norm",
        "variant": optimizer.variant == "normuon",
    }
    for key in [key for key, asked in of_lines.items() if asked and sizes.tp > 1]:
        return (
            f'optimizer.{key} = "{getattr(optimizer, key)}": not with parallel.tp = {sizes.tp}: it remembers lines or '
            "directions of whole matrices, and peers hold these in another order. Use parallel.dp_shard."
        )
    if optimizer.state_on_cpu and config.parallel.cpu_offload and sizes.dp_shard > 1:
        return (
            "optimizer.state_on_cpu = true: not with parallel.cpu_offload, which keeps the shards' state in the host's "
            "memory already. Leave state_on_cpu out."
        )
    if not optimizer.gradient_release:
        return None
    refusals = _release_refusals(config, sizes)
    found = next(((what, why) for refused, what, why in refusals if refused), None)
    return None if found is None else f"optimizer.gradient_release = true: not with {found[0]}: {found[1]}"


def _release_refusals(config: Config, sizes: Sizes) -> list[tuple[bool, str, str]]:
    """(Whether this configuration asks for it, its name, the reason and what to do). The table of
    docs/guides/optimizers.md."""
    training, micro = config.training, config.training.micro_batch_size
    given = [one.size for one in training.batch_sizes]
    if training.batch_size != "auto":
        given.append(training.batch_size)
    fits = training.token_budget is None and all(-(-size // sizes.dp) <= (micro or size) for size in given)
    pieces = "it works on whole gradients, and these are in pieces. Use"
    return [
        (
            training.clip_norm is not None,
            f"training.clip_norm = {training.clip_norm}",
            "the norm of all gradients is known only when the last is there, and the first are gone by then. "
            'Set training.clip_norm = "none".',
        ),
        (
            micro is not None and not fits,
            f"training.micro_batch_size = {micro}",
            "a weight that the first micro-batch updates is another in the second. Leave it out, and lower "
            "training.batch_size to what fits at once.",
        ),
        (
            training.precision == "fp16",
            'training.precision = "fp16"',
            'a step whose gradients overflow has to be taken back. Set "bf16".',
        ),
        (
            training.batch_size == "auto" and training.token_budget is None,
            'training.batch_size = "auto"',
            "a trial must not change the weights. Give a number.",
        ),
        (
            sizes.pp > 1,
            f"parallel.pp = {sizes.pp}",
            "a pipeline runs several micro-batches in a step. Use parallel.dp_replicate.",
        ),
        (sizes.tp > 1, f"parallel.tp = {sizes.tp}", f"{pieces} parallel.dp_replicate."),
        (
            sizes.dp_shard > 1,
            f"parallel.dp_shard = {sizes.dp_shard}",
            f"{pieces} parallel.dp_replicate, or dp_shard without it: its shards of gradients are small.",
        ),
    ]


def check_steps(config: Config) -> None:
    """ConfigError for an optimiser that cannot update weights one after the other, where that is asked for."""
    from kinema.optim.apart import steps_apart

    optimizer = config.optimizer
    key = "gradient_release" if optimizer.gradient_release else "state_on_cpu"
    if getattr(optimizer, key) and not steps_apart(optimizer):
        raise ConfigError(
            f'optimizer.{key} = true: not with type = "{optimizer.type}", which looks at all weights together, or '
            "counts its steps for all of them, and this updates them one after the other. Use another type, such as "
            '"adamw" or "adamw8bit".'
        )
