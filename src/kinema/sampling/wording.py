"""Prompts as a chat model writes them out, and the motion scores that it gives them, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError
from kinema.sampling.lists import Ask
from kinema.sampling.planning import defaults_of
from kinema.sampling.settings import DYNAMIC
from kinema.sampling.weights import Weights

if TYPE_CHECKING:
    from kinema.prompts.prepare import Wish
    from kinema.prompts.refine import Task


@dataclass(frozen=True)
class Wording:
    """What the chat model is asked for, and where it is."""

    refined: bool = False
    url: str | None = None
    model: str | None = None


def check_wording(weights: Weights, wording: Wording) -> None:
    """UserError where prompts are no descriptions that could be refined."""
    if wording.refined and "controls" in weights.family.variant.conditions:
        raise UserError("--refine-prompt: an instruction to edit a picture is used as it is written; leave it away.")


def without_dynamic(ask: Ask) -> Ask:
    """The ask without a score that a chat model has yet to give."""
    if ask.options.get("motion") != DYNAMIC:
        return ask
    return replace(ask, options={**ask.options, "motion": None})


def worded(
    asks: Sequence[Ask], weights: Weights, options: Mapping[str, Any], wording: Wording, folder: Path, *, first: bool
) -> list[Ask]:
    """The asks with refined prompts and motion scores, where they are wanted.

    Answers are kept in ``prompts.jsonl`` of the folder, so that a list that goes on has the prompts it began with.
    ``first``: whether this process asks; the others wait for its answers.
    """

    def is_scored(ask: Ask) -> bool:
        return ask.options.get("motion", options.get("motion")) == DYNAMIC

    wanted = [ask for ask in asks if wording.refined or is_scored(ask)]
    if not wanted:
        return list(asks)
    from kinema.prompts.chat import chat_from_environment
    from kinema.prompts.prepare import Wish, prepare

    usual = options.get("frames") or defaults_of(weights).frames

    def wish(ask: Ask) -> Wish:
        is_picture = (ask.options.get("frames") or usual) == 1
        task: Task = "t2i" if is_picture else "i2v" if ask.images else "t2v"
        return Wish(ask.prompt, task, ask.images[0] if task == "i2v" else None, wording.refined, is_scored(ask))

    chat = chat_from_environment(wording.url, wording.model)
    found = prepare([wish(ask) for ask in wanted], chat, memory=folder / "prompts.jsonl", ask=first)
    answers = {}
    for ask, answer in zip(wanted, found, strict=True):
        scored = {} if answer.motion is None else {"motion": float(answer.motion)}
        told = {"asked": ask.prompt, "worded_by": answer.by}
        answers[id(ask)] = replace(ask, prompt=answer.prompt, options={**ask.options, **scored}, told=told)
    return [answers.get(id(ask), ask) for ask in asks]
