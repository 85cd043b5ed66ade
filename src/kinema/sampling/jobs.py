"""What one command draws: from what is asked for to plans that are checked, with what their files say of the weights.

Nothing here loads weights. A chat model is asked about prompts when all else is known to be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.sampling.first_picture import FirstPicture, check_begins, plan_pictures, promised
from kinema.sampling.lists import Ask, PromptList, read_list
from kinema.sampling.planning import Plan, plan_of_asks
from kinema.sampling.provenance import differences, weights_facts
from kinema.sampling.repeat import FOLDER, open_origin, origin_weights, plan_repeat
from kinema.sampling.settings import DYNAMIC
from kinema.sampling.weights import Weights, find_weights
from kinema.sampling.wording import Wording, check_wording, without_dynamic, worded


@dataclass(frozen=True)
class Job:
    """A plan, and what every file of it says of its weights."""

    plan: Plan
    facts: dict[str, Any]
    device: str | None = None
    """The device and the type of the file that is drawn again, where there is one."""
    dtype: str | None = None
    stored: Mapping[str, Any] | None = None
    first: Job | None = None
    """What draws the pictures that its videos begin with."""


def check_sources(
    prompts: Sequence[str], prompt_list: Any, repeat: Any, rows: str | None, ignore: Sequence[str] | None
) -> None:
    """UserError unless it is clear where the prompts come from."""
    if prompt_list is not None and (prompts or repeat is not None):
        other = "a PROMPT" if prompts else "--from"
        raise UserError(f"--list {prompt_list} and {other} both say what to draw: give one of them.")
    for name, given in (("--rows", rows), ("--ignore-columns", ignore)):
        if given and prompt_list is None:
            raise UserError(f"{name} belongs to --list, which is not given.")
    if not prompts and prompt_list is None and repeat is None:
        raise UserError("Give at least one prompt, or a file of prompts with --list.")


# -- from prompts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """Prompts that are to be drawn, as they were written."""

    weights: Weights
    place: Mapping[str, Any]
    """``model``, ``family`` and ``variant`` as they were given, for the files."""
    asks: tuple[Ask, ...]
    options: Mapping[str, Any]
    folder: Path
    wording: Wording
    painter: FirstPicture | None = None
    drawer: Weights | None = None
    """The weights of the painter."""
    whole: PromptList | None = None
    """The list that the asks are all rows of, and the rows of it that are drawn."""
    chosen: Sequence[int] = ()

    def job(self) -> Job:
        """What the prompts come to as they are written, without scores that a chat model has yet to give; UserError
        for what cannot be made."""
        plan, pictures = self._planned([without_dynamic(ask) for ask in self.asks])
        facts = _facts(self.weights, self.place)
        if pictures is None or self.drawer is None or self.painter is None:
            return Job(plan, facts)
        return Job(plan, facts, first=Job(pictures, _facts(self.drawer, vars(self.painter))))

    def worded(self, job: Job, *, first: bool) -> Job:
        """The job with what a chat model makes of the prompts that are drawn, where it is to be asked. ``first``:
        whether this process asks; the others wait for its answers."""
        rows = frozenset(self.chosen)
        drawn = [ask for ask in self.asks if ask.row is None or ask.row in rows]
        answers = worded(drawn, self.weights, self.options, self.wording, self.folder, first=first)
        if answers == drawn:
            return job
        later = iter(answers)
        plan, pictures = self._planned(
            [next(later) if ask.row is None or ask.row in rows else without_dynamic(ask) for ask in self.asks]
        )
        if job.first is None or pictures is None:
            return replace(job, plan=plan)
        return replace(job, plan=plan, first=replace(job.first, plan=pictures))

    def _planned(self, asks: Sequence[Ask]) -> tuple[Plan, Plan | None]:
        """The plan, and that of the pictures which its videos begin with, where these are drawn too."""
        asks = asks if self.drawer is None else promised(asks)
        options = {**self.options, "motion": None if self.options["motion"] == DYNAMIC else self.options["motion"]}
        plan = plan_of_asks(asks, self.weights, options, self.folder, whole=self.whole, chosen=self.chosen)
        if self.painter is None or self.drawer is None:
            return plan, None
        own = {"steps": self.painter.steps, "guidance": self.painter.guidance}
        return plan_pictures(plan, self.drawer, own, None if self.whole is None else self.whole.location)


def read_order(
    prompts: Sequence[str],
    listed: tuple[str, str | None, Sequence[str]] | None,
    images: Sequence[str],
    options: Mapping[str, Any],
    source: Mapping[str, Any],
    folder: Path | None,
    wording: Wording,
    painter: FirstPicture | None,
) -> Order:
    """Find the weights and read the prompts. ``listed``: the location of a list, which of its rows, and the columns of
    it that are not read; ``source``: the arguments of `find_weights`."""
    weights = find_weights(**source)
    check_wording(weights, wording)
    drawer = None if painter is None else painter.weights()
    if drawer is not None:
        check_begins(weights)
    run = source["run"]
    folder = folder or (run / "samples" if run else Path("samples"))
    if listed is None:
        asks = tuple(Ask(prompt, tuple(images)) for prompt in prompts)
        return Order(weights, source, asks, options, folder, wording, painter, drawer)
    location, rows, ignore = listed
    whole = read_list(location, [name.strip() for one in ignore for name in one.split(",")])
    asks = tuple(replace(ask, images=ask.images or tuple(images)) for ask in whole.asks)
    return Order(weights, source, asks, options, folder, wording, painter, drawer, whole, whole.chosen(rows))


def _facts(weights: Weights, place: Mapping[str, Any]) -> dict[str, Any]:
    return weights_facts(weights, *(place.get(name) for name in ("model", "family", "variant")))


# -- from a file -----------------------------------------------------------------------------------------------------


def job_again(
    file: Path,
    prompts: Sequence[str],
    images: Sequence[str],
    options: Mapping[str, Any],
    source: Mapping[str, Any],
    folder: Path | None,
) -> Job:
    """A file once more, or a variation of it. UserError where what lies at the place of its weights is not what it was
    drawn with."""
    origin = open_origin(file)
    weights = origin_weights(origin, **source)
    plan = plan_repeat(origin, weights, prompts, images, options, folder or file.parent / FOLDER)
    given = source["run"] is not None or source["model"] is not None
    facts = _facts(weights, source if given else origin.stored["weights_from"])
    others = differences(origin.stored, facts, adapters=not source["adapters"])
    if others and not given and source["ema"] is None:
        raise UserError(
            f"--from {file}: {'; '.join(others)}. Give --run or --model to draw with what is there now all the same."
        )
    plan = replace(plan, notes=(*plan.notes, *(f"Not the same as {file.name}: {one}." for one in others)))
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return Job(plan, facts, origin.device(), short.get(origin.stored.get("dtype", "")), origin.stored)
