"""From what is asked for to what is drawn: settings, file names and pipeline calls. Nothing here loads weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.sampling.lists import Ask, Mistake, PromptList, mistakes_message
from kinema.sampling.pipeline import SampleSettings, calls
from kinema.sampling.request import (
    RunDefaults,
    check_image_count,
    check_image_guidance,
    check_size,
    defaults_of_run,
    defaults_of_variant,
    distinct_slugs,
    told,
    told_scores,
)
from kinema.sampling.weights import Weights
from kinema.sampling.writing import suffix

_LOGIN = re.compile(r"(?<=://)[^/@]*@")
_SECRET = re.compile(r"(?i)([?&][\w.-]*(?:sig|token|key|secret|credential|passw|auth)[\w.-]*=)[^&#]*?(?=&|#|::|$)")


def without_secrets(location: str) -> str:
    """A location as it may stand in a file that is handed on: no password, and ``HIDDEN`` in the place of a signature
    or a token in its query."""
    return _SECRET.sub(r"\1HIDDEN", _LOGIN.sub("", location))


@dataclass(frozen=True)
class Drawing:
    """One sample that is to be drawn, and what its file will be called and say of itself."""

    settings: SampleSettings
    fps: float
    file: str = ""
    """Empty where it is drawn for the sake of others in its call, and not written."""
    row: int | None = None
    text: dict[str, Any] = field(default_factory=dict)
    """``text``, the prompt without its scores, and ``scores``, where it has some; ``asked``, what a chat model made it
    of, and ``worded_by``, which."""

    def entry(self) -> dict[str, Any]:
        """Its settings as they are stored, but for what is known of weights, contents and the machine."""
        images = [without_secrets(str(one)) for one in self.settings.images]
        return {**asdict(self.settings), "images": images, "fps": self.fps, **self.text}


@dataclass(frozen=True)
class Plan:
    """All that one command draws, in its order."""

    weights: Weights
    drawings: tuple[Drawing, ...]
    folder: Path
    calls: tuple[tuple[int, ...], ...]
    """Positions of the drawings that each call of the pipeline draws."""
    notes: tuple[str, ...] = ()
    """What is said before anything is drawn."""


def defaults_of(weights: Weights) -> RunDefaults:
    if weights.config is not None:
        return defaults_of_run(weights.config, weights.family)
    return defaults_of_variant(weights.family)


def plan_of_asks(
    asks: Sequence[Ask],
    weights: Weights,
    options: Mapping[str, Any],
    folder: Path,
    *,
    defaults: RunDefaults | None = None,
    whole: PromptList | None = None,
    chosen: Sequence[int] = (),
) -> Plan:
    """What these asks come to. ``options`` hold for asks that have none of their own.

    ``whole``: the list that the asks are all rows of, and ``chosen`` those of its rows that are drawn; the names of
    their files do not depend on which they are. UserError, with all mistakes of the chosen rows, if any cannot be made.
    """
    defaults = defaults or defaults_of(weights)
    rows = frozenset(chosen)
    mistakes = [] if whole is None else [one for one in whole.mistakes if one.row in rows]
    drawings: list[Drawing] = []
    for ask in asks:
        try:
            drawings += _drawings(ask, weights, {**options, **ask.options}, defaults)
        except UserError as error:
            if ask.row is None:
                raise
            if ask.row in rows:
                mistakes.append(Mistake(ask.row, str(error).removeprefix("--")))
    drawings = _named(drawings, asks, mistakes)
    picked = [one for one in drawings if one.row is None or one.row in rows]
    if whole is not None:
        places = {row: place for place, row in enumerate(chosen)}
        picked.sort(key=lambda one: places[one.row or 0])
    mistakes += check_references(picked)
    first = dict(reversed([(one.file, place) for place, one in enumerate(picked)]))
    once = [one for place, one in enumerate(picked) if first[one.file] == place]
    twice = len(picked) - len(once)
    mistakes = [one for one in mistakes if one.row in rows]
    if mistakes and whole is not None:
        raise UserError(mistakes_message(whole.location, mistakes, len(rows)))
    notes = (f"{twice} of {len(picked)} samples are asked for twice, and drawn once.",) if twice else ()
    groups = calls(weights.family, [one.settings for one in once])
    return Plan(weights, tuple(once), folder, tuple(map(tuple, groups)), notes)


def _drawings(ask: Ask, weights: Weights, options: Mapping[str, Any], defaults: RunDefaults) -> Iterator[Drawing]:
    """The samples of one ask, with the seeds that it names; UserError for what cannot be made."""
    family, config = weights.family, weights.config
    known = {name: options[name] for name in vars(defaults) if options.get(name) is not None}
    wanted = replace(defaults, **known)
    check_size(family, wanted.height, wanted.width, wanted.frames, "--" if ask.row is None else "")
    check_image_count(family, ask.images, "--image" if ask.row is None else "ref")
    check_image_guidance(family, options.get("image_guidance"))
    scores = told_scores(
        config, wanted.frames, wanted.fps, options.get("motion"), options.get("aesthetic"), options.get("tell_fps")
    )
    (prompt,) = told([ask.prompt], scores)
    first = options.get("seed") or 0
    for seed in range(first, first + (options.get("num_samples") or 1)):
        settings = SampleSettings(
            prompt=prompt,
            height=wanted.height,
            width=wanted.width,
            frames=wanted.frames,
            steps=wanted.steps,
            guidance=wanted.guidance,
            image_guidance=wanted.image_guidance,
            seed=seed,
            negative=wanted.negative,
            images=ask.images,
            shift=options.get("shift"),
            text_length=family.text_length,
        )
        text = {"text": ask.prompt, "scores": scores} if scores else {}
        text |= ask.told
        yield Drawing(settings, wanted.fps, "", ask.row, text)


def _named(drawings: Sequence[Drawing], asks: Sequence[Ask], mistakes: list[Mistake]) -> list[Drawing]:
    """With the name of each one's file: the same for drawings that are the same, and for no others. Adds to the
    mistakes a name that two rows give to different samples."""
    names = {ask.row: ask.name for ask in asks if ask.name is not None}
    samples = Counter(one.row for one in drawings)
    slugs = distinct_slugs([one.settings.prompt for one in drawings])
    taken: dict[str, Drawing] = {}
    found: list[Drawing] = []
    for one in drawings:
        settings = one.settings
        stem, ending = names.get(one.row) or slugs[settings.prompt], suffix(settings.frames)
        if one.row not in names or samples[one.row] > 1:
            stem += f"-{settings.seed}"
        other = taken.setdefault((stem + ending).lower(), one)
        if not _same(other, one):
            if one.row in names:
                mistakes.append(Mistake(one.row or 0, f"name: row {other.row} makes another {stem}{ending}"))
            stem += f"-{_digest(one)}"
        found.append(replace(one, file=stem + ending))
    return found


def _same(one: Drawing, other: Drawing) -> bool:
    return (one.settings, one.fps) == (other.settings, other.fps)


def _digest(one: Drawing) -> str:
    """Six digits that tell drawings of the same prompt and seed apart."""
    return hashlib.blake2b(json.dumps(one.entry(), sort_keys=True).encode(), digest_size=3).hexdigest()


def check_references(drawings: Sequence[Drawing]) -> list[Mistake]:
    """Look at every picture that a drawing needs, each once. Those of rows that cannot be read are returned; any other
    is a UserError."""
    outcome: dict[str, str] = {}
    mistakes = []
    for one in drawings:
        for image in map(str, one.settings.images):
            if image not in outcome:
                from kinema.data.media import probe

                try:
                    probe(image)
                    outcome[image] = ""
                except UserError as error:
                    outcome[image] = str(error)
            if outcome[image] and one.row is None:
                raise UserError(outcome[image])
            if outcome[image] and one.row is not None:
                mistakes.append(Mistake(one.row, f"ref: {outcome[image]}"))
    return list(dict.fromkeys(mistakes))


def companions(group: Sequence[SampleSettings], place: int) -> dict[str, Any]:
    """``batch``, where a sample was drawn in one call with others: what they differ in, in their order, and its place
    among them. The size of a call changes the last digits of what it draws."""
    own = asdict(group[place])
    others = [asdict(one) for i, one in enumerate(group) if i != place]
    differing = [{key: value for key, value in one.items() if value != own[key]} for one in others]
    return {"batch": {"place": place, "others": differing}} if others else {}
