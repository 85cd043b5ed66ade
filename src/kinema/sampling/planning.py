"""From what is asked for to what is drawn: settings, file names and pipeline calls. Nothing here loads weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.steering import FULL_STEPS, NAMES, Steering, whole_length
from kinema.sampling.lists import Ask, Mistake, PromptList, mistakes_message
from kinema.sampling.pipeline import SampleSettings, calls, check_shift
from kinema.sampling.references import frames_at
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
from kinema.sampling.sizes import asked_size, merged
from kinema.sampling.tiling import check_tiling
from kinema.sampling.weights import Weights
from kinema.sampling.writing import CRF, suffix

_LOGIN = re.compile(r"(?<=://)[^/@]*@")
_SECRET = re.compile(r"(?i)([?&][\w.-]*(?:sig|token|key|secret|credential|passw|auth)[\w.-]*=)[^&#]*?(?=&|#|::|$)")


PROMISED = "(first picture)"
"""Stands for a picture that is drawn before the sample (`kinema.sampling.first_picture`)."""


def without_secrets(location: str) -> str:
    """A location as it may stand in a file that is handed on: no password, and ``HIDDEN`` in the place of a signature
    or a token in its query."""
    return _SECRET.sub(r"\1HIDDEN", _LOGIN.sub("", location))


@dataclass(frozen=True)
class Drawing:
    """One sample that is to be drawn, and what its file will be called and say of itself."""

    settings: SampleSettings
    crf: int = CRF
    """How a video is compressed; 0 is lossless."""
    file: str = ""
    """Empty where it is drawn for the sake of others in its call, and not written."""
    row: int | None = None
    text: dict[str, Any] = field(default_factory=dict)
    """``text``, the prompt without its scores, and ``scores``, where it has some; ``asked``, what a chat model made it
    of, and ``worded_by``, which."""

    length: int | None = None
    """Frames of the whole video, where it has more than one stretch."""

    @property
    def fps(self) -> float:
        """Frames a second of its file."""
        assert self.settings.fps is not None, "a drawing is planned with a rate"
        return self.settings.fps

    def entry(self) -> dict[str, Any]:
        """Its settings as they are stored, but for what is known of weights, contents and the machine."""
        images = [without_secrets(str(one)) for one in self.settings.images]
        length = {} if self.length is None else {"length": self.length}
        quality = {"crf": self.crf} if self.settings.frames > 1 else {}
        return {**self.settings.entry(), "images": images, **length, **quality, **self.text}


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
            drawings += _drawings(ask, weights, merged(options, ask.options), defaults)
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
    mistakes += check_references(picked, weights.family)
    first = dict(reversed([(one.file, place) for place, one in enumerate(picked)]))
    once = [one for place, one in enumerate(picked) if first[one.file] == place]
    twice = len(picked) - len(once)
    mistakes = [one for one in mistakes if one.row in rows]
    if mistakes and whole is not None:
        raise UserError(mistakes_message(whole.location, mistakes, len(rows)))
    notes = [f"{twice} of {len(picked)} samples are asked for twice, and drawn once."] if twice else []
    groups = calls(weights.family, [one.settings for one in once])
    return Plan(weights, tuple(once), folder, tuple(map(tuple, groups)), (*notes, *_steering_notes(once)))


def _drawings(ask: Ask, weights: Weights, options: Mapping[str, Any], defaults: RunDefaults) -> Iterator[Drawing]:
    """The samples of one ask, with the seeds that it names; UserError for what cannot be made."""
    family, config = weights.family, weights.config
    known = {name: options[name] for name in vars(defaults) if options.get(name) is not None}
    wanted = replace(defaults, **known)
    prefix = "--" if ask.row is None else ""
    there = [image for image in ask.images if image != PROMISED]
    height, width = asked_size(family, defaults, options, there, prefix)
    check_size(family, height, width, wanted.frames, prefix)
    steering, length = _steering(family, options, wanted.frames)
    if not steering.has_strategy:  # which says how many it takes
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
            height=height,
            width=width,
            frames=wanted.frames,
            steps=wanted.steps,
            guidance=wanted.guidance,
            image_guidance=wanted.image_guidance,
            seed=seed,
            negative=wanted.negative,
            images=ask.images,
            fps=wanted.fps,
            shift=options.get("shift"),
            text_length=family.text_length,
            tiling=options.get("tiling") or "auto",
            tile_size=options.get("tile_size"),
            tile_frames=options.get("tile_frames"),
            **steering.said,
        )
        text = {"text": ask.prompt, "scores": scores} if scores else {}
        text |= ask.told
        crf = options.get("crf")
        yield Drawing(settings, CRF if crf is None else crf, row=ask.row, text=text, length=length)


def _steering(family: Family, options: Mapping[str, Any], frames: int) -> tuple[Steering, int | None]:
    """What of the options steers a sample, and the length of the whole video where it is extended; UserError where
    options of stretches come without a stretch."""
    asked = Steering(**{name: options.get(name) for name in NAMES})
    if not asked.extend:
        for name in ("overlap", "edit"):
            if (value := getattr(asked, name)) is not None:
                raise UserError(f"--{name} {value:g}: no stretch is added; it belongs to --extend.")
        return replace(asked, extend=None), None
    if frames == 1:
        raise UserError(f"--extend {asked.extend}: a sample of 1 frame is a picture; ask for more --frames.")
    return asked, whole_length(asked, frames, family.stretch_overlap(frames, asked.overlap))


def _steering_notes(drawings: Sequence[Drawing]) -> list[str]:
    """What was asked for and changes nothing."""
    idle = [one.settings for one in drawings if one.settings.text_osci and one.settings.steps <= _low(one.settings)]
    if not idle:
        return []
    return [
        f"--text-osci changes nothing in {idle[0].steps} steps: the first low one is number {_low(idle[0]) + 1}. "
        "--full-steps makes it an earlier one."
    ]


def _low(settings: SampleSettings) -> int:
    """The number of the first low step of an oscillation, from 0."""
    full = FULL_STEPS if settings.full_steps is None else settings.full_steps
    return full + 1 - full % 2


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
    return (one.settings, one.crf) == (other.settings, other.crf)


def _digest(one: Drawing) -> str:
    """Six digits that tell drawings of the same prompt and seed apart."""
    return hashlib.blake2b(json.dumps(one.entry(), sort_keys=True).encode(), digest_size=3).hexdigest()


def check_references(drawings: Sequence[Drawing], family: Family) -> list[Mistake]:
    """Look at every picture and video that a drawing needs, each once, and whether the family can be told what the
    drawing asks for: tiles and a time shift too. What is wrong with rows is returned; anything else is a UserError."""
    found: dict[tuple[str, float | None], int | UserError] = {}
    tiling = cache(lambda *tiles: _mistake(check_tiling, family, *tiles))
    shift = cache(lambda: _mistake(check_shift, family))
    mistakes = []
    for one in drawings:
        settings = one.settings
        lengths = [_length(str(image), settings.fps, found) for image in settings.images]
        wrong = [known for known in lengths if isinstance(known, UserError)]
        try:
            if wrong:
                raise UserError(str(wrong[0]) if one.row is None else f"ref: {wrong[0]}")
            known_lengths = [known for known in lengths if isinstance(known, int)]
            family.check_steering(settings, settings.frames, settings.guidance, known_lengths)
            refused = tiling(settings.tiling, settings.tile_size, settings.tile_frames)
            if refused is None and settings.shift is not None:
                refused = shift()
            if refused is not None:
                raise UserError(str(refused))
        except UserError as error:
            if one.row is None:
                raise
            mistakes.append(Mistake(one.row, str(error).removeprefix("--")))
    return list(dict.fromkeys(mistakes))


def _mistake(check: Callable[..., None], *arguments: Any) -> UserError | None:
    """What a check finds wrong, to be remembered."""
    try:
        check(*arguments)
    except UserError as error:
        return error
    return None


def _length(image: str, fps: float | None, found: dict[tuple[str, float | None], int | UserError]) -> int | UserError:
    """Frames of a picture or a video at a rate, or what is wrong with it; ``found`` remembers."""
    if image == PROMISED:
        return 1
    if (image, fps) not in found:
        from kinema.data.media import known_info

        try:
            found[image, fps] = frames_at(known_info(image), fps)[0]
        except UserError as error:
            found[image, fps] = error
    return found[image, fps]


def companions(group: Sequence[SampleSettings], place: int) -> dict[str, Any]:
    """``batch``, where a sample was drawn in one call with others: what they differ in, in their order, and its place
    among them. The size of a call changes the last digits of what it draws."""
    own = asdict(group[place])
    others = [asdict(one) for i, one in enumerate(group) if i != place]
    differing = [{key: value for key, value in one.items() if value != own[key]} for one in others]
    return {"batch": {"place": place, "others": differing}} if others else {}
