"""What a training starts from: its bases, the checkpoint that it goes on from, the one it takes weights from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kinema.config.schema import Config
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.training.resume import ResumeOptions, check_options, compare, resumed_checkpoint, set_aside, settled_model

if TYPE_CHECKING:
    from kinema.parallel.mesh import World

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    checkpoint: Path | None = None
    """What the run goes on from; None: it begins."""
    weights: Path | None = None
    """The checkpoint that a new run takes its weights from."""
    meta: dict[str, Any] | None = None
    """The first one's own description."""
    branches: bool = False
    """Whether a resumed run may come to other weights than those it exported at later steps."""


def settle_bases(
    config: Config, family: Family, options: ResumeOptions, world: World, say: Say
) -> tuple[Config, Family]:
    """With the very export or checkpoint in the place of each run directory that a part of the model is taken from."""
    check_options(options)
    model = _as_main_sees(world, lambda: settled_model(config, family, options))
    for part in type(model).model_fields:
        before, now = (getattr(getattr(one, part), "path", None) for one in (config.model, model))
        if before != now:
            say(f"model.{part}.path: {before} stands for {now}")
    if model == config.model:
        return config, family
    return config.model_copy(update={"model": model}), open_family(model, config.run.seed)


def find_start(config: Config, options: ResumeOptions, world: World, say: Say) -> tuple[Config, Start]:
    """Where the run starts, after refusing what a resumed run may not change; an old run is set aside if asked to.

    The configuration comes back with ``training.compile`` settled, which a resumed run does as before.
    """
    from kinema.memory.compile import settled
    from kinema.runs.checkpoint_load import read_meta

    checkpoint, weights = _as_main_sees(world, lambda: _choose(config.run.dir, options, say))
    meta = None if checkpoint is None else read_meta(checkpoint)
    earlier = None if meta is None else meta["config"]["training"]["compile"] is True
    training = config.training.model_copy(update={"compile": settled(config, world.device, earlier)})
    config = config.model_copy(update={"training": training})
    if meta is None:
        return config, Start(weights=weights)
    changes = compare(meta["config"], config.model_dump(mode="json"), options)
    say(f"Resuming from {checkpoint}")
    for change in changes:
        say(f"  changed: {change}")
    return config, Start(checkpoint, None, meta, branches=options.resume_from is not None or bool(changes))


def _choose(directory: Path, options: ResumeOptions, say: Say) -> tuple[Path | None, Path | None]:
    """(checkpoint to go on from, checkpoint to take weights from)."""
    from kinema.runs.checkpoint_list import checkpoint_at

    resumed = resumed_checkpoint(directory, options)
    weights = None if options.weights_from is None else checkpoint_at(options.weights_from)
    if resumed is not None and weights is not None:
        raise UserError(
            f"{directory} holds a run with checkpoints, which --weights-from would not go on from. "
            "Give another run.dir, or --no-resume to move the old run into a directory previous-N inside it."
        )
    if resumed is not None:
        return resumed, None
    aside = set_aside(directory)
    if aside is not None:
        say(f"What {directory} held was moved to {aside}")
        if weights is not None and not weights.exists():  # it was in there
            weights = aside / weights.resolve().relative_to(directory.resolve())
    return None, weights


def _as_main_sees(world: World, choose: Callable[[], T]) -> T:
    """What the main rank finds in the files, or its UserError, on all ranks."""
    outcome: tuple[Any, str | None] = (None, None)
    if world.is_main:
        try:
            outcome = (choose(), None)
        except UserError as error:
            outcome = (None, str(error))
    found, problem = world.broadcast_object(outcome)
    if problem is not None:
        raise UserError(problem)
    return found
