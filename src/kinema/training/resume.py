"""What a resumed run may change. One table decides; everything not in it may change freely."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kinema.config.schema import Config, ModelConfig
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.from_runs import settled
from kinema.runs.checkpoint_list import checkpoint_at, list_checkpoints, read_header
from kinema.runs.exports import list_exports, step_of

Rule = Literal["refused", "announced", "resets data", "resets optimizer"]


@dataclass(frozen=True)
class ResumeOptions:
    """How a training starts, from the command line.

    By default it goes on from the newest complete checkpoint of its run directory, if there is one.
    """

    resume: bool = True
    """False: begin anew; what the run directory holds is moved into ``previous-N/`` inside it."""
    resume_from: Path | None = None
    """Go on from this checkpoint instead of the newest."""
    weights_from: Path | None = None
    """Begin anew with the weights of this checkpoint (or of the newest of this run directory)."""
    reset_data: bool = False
    """Start the order of the data afresh; needed when the data changed."""
    reset_optimizer: bool = False
    """Forget the optimiser's state; needed when the optimiser changed."""
    reset_lr: bool = False
    """Start the learning-rate schedule afresh, over the steps that are left."""
    regenerate: bool = False
    """Encode anew what the cache already has of this configuration's data."""


def check_options(options: ResumeOptions) -> None:
    """UserError for flags that contradict each other."""
    if options.resume_from is not None and (options.weights_from is not None or not options.resume):
        other = "--weights-from" if options.weights_from is not None else "--no-resume"
        raise UserError(f"--resume-from goes on with a run, {other} begins a new one: give one of them.")


def resumed_checkpoint(directory: Path, options: ResumeOptions) -> Path | None:
    """The checkpoint that a run in this directory goes on from; None where it begins."""
    if options.resume_from is not None:
        return checkpoint_at(options.resume_from)
    found = list_checkpoints(directory / "checkpoints") if options.resume else []
    return found[-1].path if found else None


def settled_model(config: Config, family: Family, options: ResumeOptions) -> ModelConfig:
    """`settled`, with what a resumed run has taken so far."""
    whole = family.trained_parts() if config.adapter is None else ()
    resumed = resumed_checkpoint(config.run.dir, options)
    earlier = None if resumed is None else ModelConfig.model_validate(read_header(resumed)["meta"]["config"]["model"])
    return settled(config.model, whole, earlier)


RULES: dict[str, Rule] = {
    "model": "refused",
    "model.text_length": "resets data",
    "model.posterior": "announced",
    "model.path": "announced",
    "model.revision": "refused",
    "model.network.path": "announced",
    "model.network_2.path": "announced",
    "model.guidance": "announced",
    "model.autoencoder": "resets data",
    "model.text_encoder": "resets data",
    "model.text_encoder_2": "resets data",
    "model.text_encoder_3": "resets data",
    "model.text_encoder_4": "resets data",
    "model.image_encoder": "resets data",
    "model.tokenizer": "resets data",
    "model.tokenizer_2": "resets data",
    "model.tokenizer_3": "resets data",
    "model.tokenizer_4": "resets data",
    "adapter": "refused",
    "adapter.dropout": "announced",
    "adapter.rank_dropout": "announced",
    "adapter.init_from": "announced",
    "run.seed": "refused",
    "data": "resets data",
    "data.cache": "announced",
    "data.examine": "announced",
    "data.online": "announced",
    "data.sources.loss_weight": "announced",
    "data.sources.name": "announced",
    "data.strict": "announced",
    "data.workers": "announced",
    "objective": "announced",
    "training.batch_size": "resets data",
    "training.batch_sizes": "resets data",
    "training.token_budget": "resets data",
    "training.steps": "announced",
    "training.epochs": "announced",
    "training.ema": "refused",
    "training.ema.decay": "announced",
    "training.precision": "announced",
    "memory.offload_blocks": "announced",
    "training.clip_norm": "announced",
    "training.compile": "announced",
    "training.float8": "announced",
    "training.attention": "announced",
    "training.fuse_qkv": "announced",
    "training.caption_dropout": "announced",
    "optimizer": "announced",
    "optimizer.type": "resets optimizer",
    "optimizer.rounding": "resets optimizer",
    "optimizer.variant": "resets optimizer",
    "optimizer.first_moment": "resets optimizer",
    "optimizer.second_moment": "resets optimizer",
    "optimizer.projection": "resets optimizer",
    "optimizer.rank": "resets optimizer",
    "schedule": "announced",
}
"""Longest matching prefix of a key wins, the numbers of list entries left out. "refused": needs a new run
(``--weights-from`` keeps the weights). "resets data" and "resets optimizer": need the flag of that name. "announced":
allowed, and printed, because it changes the numbers. Keys of no rule (previews, checkpoints, exports, evaluation,
monitoring, the parallel plan, micro-batches, activation checkpointing) change nothing that is learnt."""

DRAWN_BY_RANK = ("training.micro_batch_size", "parallel.")
"""Change the draws of dropout layers, and so are announced where there are any."""

FLAGS = {"resets data": "--reset-data", "resets optimizer": "--reset-optimizer"}


def compare(old: dict[str, Any], new: dict[str, Any], options: ResumeOptions) -> list[str]:
    """Announcements for keys that changed between two resolved configurations; UserError listing every key that may
    not change, each with what would allow it."""
    announcements, refusals = [], []
    adapter = new.get("adapter") or {}
    dropout = max(adapter.get("dropout", 0), adapter.get("rank_dropout", 0)) > 0
    allowed = {"resets data": options.reset_data, "resets optimizer": options.reset_optimizer}
    for key, before, after in _without_copies(list(_differences(old, new))):
        rule = _rule(key)
        if rule is None and dropout and key.startswith(DRAWN_BY_RANK):
            rule = "announced"
        line = f"{key}: {before!r} -> {after!r}"
        if rule == "refused":
            refusals.append(f"  {line} (needs a new run: other run.dir, and --weights-from to keep the weights)")
        elif rule in FLAGS and not allowed[rule]:
            refusals.append(f"  {line} (allowed with {FLAGS[rule]})")
        elif rule is not None:
            announcements.append(line)
    if refusals:
        raise UserError("This run cannot be resumed with a configuration that changes:\n" + "\n".join(refusals))
    return announcements


def check_data(old: str, new: str, options: ResumeOptions) -> None:
    """Refuse to go on when the records themselves changed, unless the order of the data is reset."""
    if old != new and not options.reset_data:
        raise UserError(
            "The data is not what this run was trained on so far: files or captions were added, removed or edited, so "
            "the order of the data cannot go on where it stopped. Restore the data, or give --reset-data to begin a "
            "new pass over what is there now (weights, optimiser and learning rate go on)."
        )


RUN_CONTENTS = (
    "batch_sizes.json",
    "config.toml",
    "environment.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "exports",
    "previews",
    "samples",
    "report.html",
    "wandb-id",
)
"""What a run writes into its directory."""


def set_aside(directory: Path) -> Path | None:
    """Move what an earlier run left in its directory into ``previous-N`` inside it; returns that directory, or None if
    there was nothing to move. Files that no run writes stay."""
    contents = [directory / name for name in RUN_CONTENTS if (directory / name).exists()]
    if not contents:
        return None
    target = _previous(directory)
    for path in contents:
        path.rename(target / path.name)
    return target


def set_aside_exports(directory: Path, step: int) -> Path | None:
    """Move the exports of later steps than this one into ``previous-N/exports``, or they would count as the newest of
    the run; returns that directory, or None if there were none."""
    later = [path for path in list_exports(directory / "exports") if step_of(path) > step]
    if not later:
        return None
    target = _previous(directory) / "exports"
    target.mkdir()
    for path in later:
        path.rename(target / path.name)
    return target


def _previous(directory: Path) -> Path:
    """The next ``previous-N``, made."""
    number = 1
    while (directory / f"previous-{number}").exists():
        number += 1
    target = directory / f"previous-{number}"
    target.mkdir()
    return target


def _rule(key: str) -> Rule | None:
    parts = [part for part in key.split(".") if not part.isdecimal()]
    for length in range(len(parts), 0, -1):
        rule = RULES.get(".".join(parts[:length]))
        if rule is not None:
            return rule
    return None


Difference = tuple[str, Any, Any]


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif _are_tables(old) and _are_tables(new) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{prefix}.{number}")
    elif old != new:
        yield prefix, old, new


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _without_copies(differences: list[Difference]) -> list[Difference]:
    """Without those of a source that only repeat what changed in ``data.captions`` or ``data.buckets``."""
    common = {key: (before, after) for key, before, after in differences}

    def is_copy(key: str, before: Any, after: Any) -> bool:
        source = re.fullmatch(r"data\.sources\.\d+\.((captions|buckets)\..+)", key)
        return source is not None and common.get(f"data.{source[1]}") == (before, after)

    return [one for one in differences if not is_copy(*one)]
