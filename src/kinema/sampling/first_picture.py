"""A picture of each prompt first, and a video that begins with it: what draws the pictures, and which they are.

A picture is a sample of its own, in the folder ``first`` beside the videos: drawn from the prompt without its scores,
at the video's size, with the video's seed. Nothing here loads weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kinema.data.files import absolute
from kinema.errors import UserError
from kinema.sampling.lists import Ask, Mistake, mistakes_message
from kinema.sampling.pipeline import calls
from kinema.sampling.planning import PROMISED, Drawing, Plan, plan_of_asks
from kinema.sampling.request import check_size
from kinema.sampling.settings import read_option
from kinema.sampling.weights import Weights, find_weights

FOLDER = "first"

Key = tuple[str, int, int, int]
"""What tells one picture from another: prompt, seed, height, width."""


@dataclass(frozen=True)
class FirstPicture:
    """What draws the pictures, as the options ``--first-...`` have it."""

    model: str | None = None
    run: Path | str | None = None
    family: str | None = None
    variant: str | None = None
    adapter: Sequence[Path | str] = ()
    steps: int | None = None
    guidance: float | None = None

    @property
    def is_wanted(self) -> bool:
        """UserError where there are settings of pictures and nothing to draw them, or values that they cannot have."""
        for name in ("steps", "guidance"):
            read_option(name, getattr(self, name), "first-")
        if self.model is not None or self.run is not None:
            return True
        for name in ("family", "variant", "adapter", "steps", "guidance"):
            if getattr(self, name) not in (None, "", (), []):
                raise UserError(f"--first-{name} belongs to --first-model (or --first-run), which is not given.")
        return False

    def weights(self) -> Weights:
        """Where its weights are; UserError for what is not there, or cannot draw a picture from text."""
        with _named():
            run = None if self.run is None else Path(self.run)
            found = find_weights(
                run, self.model, family=self.family, variant=self.variant, adapters=self.adapter, ema=None
            )
            variant = found.family.variant
        if variant.pictures[0]:
            made = "edits pictures" if "controls" in variant.conditions else "makes videos from pictures"
            raise UserError(f"--first-model: {variant.name} {made}; give a model that draws one from text alone.")
        return found


def wanted(first: FirstPicture | None, images: Sequence[str], repeat: Path | str | None) -> FirstPicture | None:
    """What draws the pictures, if that is asked for; UserError where others say what the videos begin with."""
    if first is None or not first.is_wanted:
        return None
    for other, given in (("--image", images), ("--from", repeat is not None)):
        if given:
            raise UserError(f"--first-model and {other} both say what the videos begin with: give one of them.")
    return first


@contextmanager
def _named() -> Iterator[None]:
    """Errors that name the options of the video's model, about those of the picture's."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"(?:--|\bmodel\.)(run|model|family|variant|adapter)\b", r"--first-\1", str(error))
        raise type(error)(text) from error


def check_begins(weights: Weights) -> None:
    """UserError unless one picture is what these weights make a video from."""
    variant = weights.family.variant
    least, most = variant.pictures
    if variant.modality == "image":
        raise UserError(f"--first-model: {variant.name} makes pictures itself; it is for models that make videos.")
    if most == 0:
        raise UserError(
            f"--first-model: {variant.name} makes videos from text alone; give a model that takes a first frame."
        )
    if least > 1:
        raise UserError(f"--first-model: {variant.name} needs {least} pictures; give them with --image.")


def promised(asks: Sequence[Ask]) -> list[Ask]:
    """The asks, those without pictures with one that will be drawn."""
    return [ask if ask.images else replace(ask, images=(PROMISED,)) for ask in asks]


def plan_pictures(
    plan: Plan, weights: Weights, options: Mapping[str, Any], location: str | None = None
) -> tuple[Plan, Plan]:
    """The plan with the pictures that it was promised, and the plan that draws these, one a call: so they do not depend
    on which videos a process draws.

    ``options``: ``steps`` and ``guidance`` of the pictures, None for what is usual. ``location``: of the list that the
    drawings are rows of. UserError for sizes that the picture's model does not make, and for videos of one frame.
    """
    asks: dict[Key, Ask] = {}
    mistakes: list[Mistake] = []
    for one in plan.drawings:
        if one.settings.images != (PROMISED,):
            continue
        try:
            asks.setdefault(_key(one), _ask(one, weights))
        except UserError as error:
            if one.row is None or location is None:
                raise
            mistakes.append(Mistake(one.row, str(error)))
    if mistakes and location is not None:
        raise UserError(mistakes_message(location, mistakes, len({one.row for one in plan.drawings})))
    pictures = plan_of_asks(list(asks.values()), weights, options, plan.folder / FOLDER)
    note = f"First pictures: {len(pictures.drawings)}, drawn by {weights.label} into {pictures.folder}."
    pictures = replace(pictures, calls=tuple((i,) for i in range(len(pictures.drawings))), notes=(note,))
    places = {_key(one): absolute(str(pictures.folder / one.file)) for one in pictures.drawings}
    drawings = tuple(_given(one, places) for one in plan.drawings)
    groups = calls(plan.weights.family, [one.settings for one in drawings])
    notes = (*plan.notes, f"Videos: {len(drawings)}, drawn by {plan.weights.label} into {plan.folder}.")
    return replace(plan, drawings=drawings, calls=tuple(map(tuple, groups)), notes=notes), pictures


def _key(one: Drawing) -> Key:
    settings = one.settings
    return one.text.get("text", settings.prompt), settings.seed, settings.height, settings.width


def _ask(one: Drawing, weights: Weights) -> Ask:
    """What the picture of a video is asked for with."""
    prompt, seed, height, width = _key(one)
    if one.settings.frames == 1:
        raise UserError("--first-model: one frame is a picture already; ask for more with --frames.")
    try:
        check_size(weights.family, height, width, 1, "")
    except UserError as error:
        raise UserError(f"the first picture has the video's size, {height} x {width}: {error}") from error
    return Ask(prompt, options={"seed": seed, "height": height, "width": width, "frames": 1})


def _given(one: Drawing, places: Mapping[Key, str]) -> Drawing:
    if one.settings.images != (PROMISED,):
        return one
    return replace(one, settings=replace(one.settings, images=(places[_key(one)],)))


def pictures_of(calls_: Sequence[Sequence[int]], plan: Plan, pictures: Plan) -> tuple[tuple[int, ...], ...]:
    """The calls of ``pictures`` that draw what these calls of ``plan`` begin with."""
    needed = {str(image) for group in calls_ for i in group for image in plan.drawings[i].settings.images}
    return tuple(
        group
        for group in pictures.calls
        if any(absolute(str(pictures.folder / pictures.drawings[i].file)) in needed for i in group)
    )
