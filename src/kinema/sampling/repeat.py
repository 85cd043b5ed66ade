"""``kinema sample --from``: draw a file again from the settings that it carries, or a variation of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.families.steering import NAMES, Steering
from kinema.sampling.lists import Ask
from kinema.sampling.pipeline import SampleSettings
from kinema.sampling.planning import Drawing, Plan, check_references, plan_of_asks
from kinema.sampling.provenance import image_contents, stored_adapters, weights_of
from kinema.sampling.request import RunDefaults
from kinema.sampling.weights import Weights, find_weights
from kinema.sampling.writing import CRF, read_metadata

FOLDER = "repeats"
"""Where repeats go by default, in the folder of the file: they never overwrite it."""

WORDED = ("asked", "worded_by")
"""What is kept of a prompt that a chat model wrote."""


@dataclass(frozen=True)
class Origin:
    """The file that is drawn again."""

    path: Path
    stored: Mapping[str, Any]

    @property
    def settings(self) -> SampleSettings:
        known = {one.name for one in fields(SampleSettings)} & set(self.stored)
        return _settings({name: self.stored[name] for name in known})

    def device(self) -> str | None:
        """The kind of device that it was drawn on, where this machine has one."""
        import torch

        kind = self.stored.get("device")
        here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return kind if here.get(str(kind)) else None


def open_origin(file: Path) -> Origin:
    """UserError where the file carries no settings to draw it again."""
    stored = read_metadata(file)
    missing = [name for name in ("prompt", "height", "width", "frames", "seed", "fps") if name not in stored]
    if missing:
        raise UserError(f"--from {file}: its settings say no {', '.join(missing)}; it cannot be drawn again.")
    return Origin(file, stored)


def origin_weights(
    origin: Origin,
    run: Path | None,
    model: str | None,
    *,
    family: str | None,
    variant: str | None,
    adapters: Sequence[Path | str],
    ema: bool | None,
) -> Weights:
    """The weights that it was drawn with, or those that are given in their place."""
    if run is None and model is None:
        if family is not None or variant is not None:
            raise UserError("--family and --variant belong to --model; --from has its weights from the file.")
        try:
            return weights_of(origin.stored, adapters, ema)
        except UserError as error:
            raise UserError(f"--from {origin.path}: {error}") from error
    own = list(adapters) or stored_adapters(origin.stored)
    return find_weights(run, model, family=family, variant=variant, adapters=own, ema=ema)


def plan_repeat(
    origin: Origin,
    weights: Weights,
    prompts: Sequence[str],
    images: Sequence[str],
    options: Mapping[str, Any],
    folder: Path,
) -> Plan:
    """The file once more, or with what is given in the place of its own settings: prompts, pictures, single options.

    A sample that was drawn in one call with others is drawn with them again, where nothing is changed.
    """
    changed = {name: value for name, value in options.items() if value is not None}
    if not images:
        _check_contents(origin)
    if prompts or images or changed:
        return _variation(origin, weights, prompts, images, changed, folder)
    own = origin.settings
    batch = origin.stored.get("batch", {"place": 0, "others": []})
    members = [_settings({**vars(own), **other}) for other in batch["others"]]
    members.insert(batch["place"], own)
    text = {name: origin.stored[name] for name in ("text", "scores", *WORDED) if name in origin.stored}
    crf = origin.stored.get("crf", CRF)
    length = origin.stored.get("length")
    drawings = [Drawing(one, crf, length=length) for one in members]
    drawings[batch["place"]] = replace(drawings[batch["place"]], file=origin.path.name, text=text)
    check_references(drawings, weights.family)
    return Plan(weights, tuple(drawings), folder, (tuple(range(len(members))),))


def _variation(
    origin: Origin,
    weights: Weights,
    prompts: Sequence[str],
    images: Sequence[str],
    changed: Mapping[str, Any],
    folder: Path,
) -> Plan:
    own, stored = origin.settings, origin.stored
    scores = stored.get("scores", {})
    names = {one.name for one in fields(RunDefaults)}
    defaults = RunDefaults(**{name: stored[name] for name in names & set(stored)})
    kept: dict[str, Any] = {"seed": own.seed, "shift": own.shift, "crf": stored.get("crf")}
    kept["tell_fps"] = "fps" in scores if scores else None
    pictures = tuple(images) or tuple(map(str, own.images))
    kept |= _kept_tiles(own, changed) | _kept_steering(own, weights, len(pictures), changed)
    kept |= {name: scores[name] for name in ("motion", "aesthetic") if name in scores}
    told = {name: stored[name] for name in WORDED if name in stored}
    same = Ask(stored.get("text", own.prompt), pictures, told=told)
    asks = [Ask(prompt, pictures) for prompt in prompts] or [same]
    return plan_of_asks(asks, weights, {**kept, **changed}, folder, defaults=defaults)


def _kept_steering(own: SampleSettings, weights: Weights, pictures: int, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What the sample was told of stretches and oscillation, but for what the changes leave nothing to act on."""
    kept = own.said
    lost: set[str] = set()
    if changed.get("extend") == 0:
        lost = {"overlap", "edit"} if pictures else {"overlap", "edit", "image_osci", "temporal_osci"}
    steering = {name: value for name, value in {**kept, **changed}.items() if name in NAMES and name not in lost}
    asked = Steering(**{**steering, "extend": steering.get("extend") or None})
    if not weights.family.oscillates(asked, changed.get("guidance", own.guidance), pictures):
        lost.add("full_steps")
    return {name: value for name, value in kept.items() if name not in lost}


def _kept_tiles(own: SampleSettings, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The tiles of a sample, but for those that contradict what is changed."""
    sizes = {"tile_size": own.tile_size, "tile_frames": own.tile_frames}
    if changed.get("tiling") == "off":
        return {}
    return sizes if own.tiling == "off" and sizes.keys() & changed.keys() else {"tiling": own.tiling, **sizes}


def _settings(values: Mapping[str, Any]) -> SampleSettings:
    """From JSON, which has lists where the settings have tuples."""
    own: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
    return SampleSettings(**own)


def _check_contents(origin: Origin) -> None:
    """UserError where a picture that the file was made from is gone or is another one now."""
    images = origin.settings.images
    if not images:
        return
    contents = origin.stored.get("image_contents")
    if contents is None:
        raise UserError(
            f"--from {origin.path}: it was made from {', '.join(map(str, images))} and does not say where that is: "
            "give it with --image."
        )
    for image, stored, found in zip(images, contents, image_contents(images, {}), strict=True):
        if stored != found:
            raise UserError(
                f"--from {origin.path}: {image} has changed since it was made from it. Give the old picture, or the "
                "new one, with --image."
            )
