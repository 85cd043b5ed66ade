"""Samples through a family's diffusers pipeline: the settings of a sample, and the calls that draw it.

What comes out is what the pipeline itself gives for the same noise. Around it: noise from a CPU generator keyed by the
sample's seed alone, so that neither the device nor the rest of the batch matters; each distinct text encoded once and
alone, so that its embedding does not depend on the batch either; text encoders on the device only while they work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.data.files import file_name
from kinema.errors import UserError
from kinema.families.steering import NAMES, Steering
from kinema.sampling.extension import extended
from kinema.sampling.offload import offloaded
from kinema.sampling.oscillation import step_end
from kinema.sampling.placing import encoders_together, on_device, other_parts, text_encoders
from kinema.sampling.references import shown
from kinema.sampling.texts import Texts, call_parameters
from kinema.sampling.tiling import tiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kinema.families.base import Family
    from kinema.sampling.offload import Offload

BATCH_PIXELS = 2**19
"""Pixels, over all frames, that one pipeline call draws at most, where that is more than one sample: small samples
share a call (from four clips of 17 x 64 x 64 on, a CPU takes half the time for each), large ones gain nothing."""
BATCH_LIMIT = 16

OnStep = Callable[[Sequence[int], int, int], None]
"""Called with (positions of the samples in the list, steps done, steps in all) after every denoising step."""


@dataclass(frozen=True)
class SampleSettings(Steering):
    """Everything that decides what one sample looks like, given the weights; what it is told of frames, of guidance
    that oscillates and of further stretches is in `Steering`."""

    prompt: str
    height: int
    width: int
    frames: int
    steps: int = 30
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 turns it off."""
    image_guidance: float | None = None
    """Guidance towards the pictures, of pipelines that have a scale for it."""
    seed: int = 0
    negative: str = ""
    images: tuple[Path | str, ...] = ()
    """First (and last) frame for image-to-video, control pictures for edit models, as paths or addresses; each is
    scaled to cover the sample's size and cropped at the centre."""
    fps: float | None = None
    """The sample's frames a second, which videos among ``images`` are read at; None: their own."""
    shift: float | None = None
    """Time shift of the schedule; None leaves the pipeline's scheduler as it is."""
    text_length: int | None = None
    """Tokens of text that the network sees; None is the pipeline's own default."""
    tiling: str = "auto"
    """Whether the autoencoder works in tiles: `kinema.sampling.tiling.Tiling`."""
    tile_size: int | None = None
    """Pixels of such a tile in height and width; None: as the autoencoder has it."""
    tile_frames: int | None = None
    """Its frames, of autoencoders that have tiles in time; None: as the family has it."""

    def to_json(self) -> dict[str, Any]:
        """The settings as they are stored in a file's metadata."""
        return {**self.entry(), "images": [file_name(str(image)) for image in self.images]}

    def entry(self) -> dict[str, Any]:
        """The settings by name, without steering that says nothing."""
        return {name: value for name, value in asdict(self).items() if name not in NAMES} | self.said

    @property
    def all_steps(self) -> int:
        """Steps of all stretches."""
        return self.steps * (1 + (self.extend or 0))

    @property
    def call(self) -> tuple[Any, ...]:
        """What samples that share a pipeline call must have in common."""
        return (
            self.height,
            self.width,
            self.frames,
            self.steps,
            self.guidance,
            self.image_guidance,
            self.images,
            self.fps if self.images else None,
            self.shift,
            self.text_length,
            *(getattr(self, name) for name in NAMES),
            self.tiling,
            self.tile_size,
            self.tile_frames,
        )


def sample_many(
    family: Family,
    pipeline: Any,
    settings: Sequence[SampleSettings],
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    *,
    batch: int | None = None,
    texts: Texts | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    offload: Offload = "none",
) -> Iterator[Tensor]:
    """Samples of the pipeline in the order of ``settings``: pixels in [-1, 1], float32 [C, T, H, W] on the CPU.

    Neighbours that share their size and schedule are drawn in one call, up to ``batch`` of them (default: as many as
    `BATCH_PIXELS` allows); ``groups`` says the calls instead, and its order is that of the samples. The size of a call
    changes the last digits of what it draws. Text encoders are moved to ``device`` for their turn, the other parts for
    the length of the sampling, and all of them back to where they were. ``texts``: embeddings from before; the pipeline
    then needs no text encoder for the texts that they hold. ``offload``: what is on the device only while it works; all
    parts have to be on the CPU then.
    """
    if groups is None:
        groups = calls(family, settings, batch)
    texts = texts or Texts(family, pipeline)
    with _placed(family, pipeline, texts, settings, device, offload):
        for group in groups:
            members = [settings[i] for i in group]
            arguments = _arguments(family, pipeline, members) | texts.arguments(members)
            after = step_end(family, members[0], arguments.get(family.guidance_argument), group, on_step)
            if after is not None and "callback_on_step_end" in call_parameters(pipeline):
                arguments["callback_on_step_end"] = after
            with _schedule(pipeline, members[0].shift), tiles(pipeline, members[0]):
                drawn = pipeline(**arguments)[0]
                if members[0].extend:
                    drawn = extended(family, pipeline, members, arguments, drawn)
            for pixels in drawn:  # [T, C, H, W] of a video, [C, H, W] of a picture, in [0, 1]
                video = pixels.permute(1, 0, 2, 3) if pixels.ndim == 4 else pixels[:, None]
                yield video.float().cpu() * 2 - 1


def calls(family: Family, settings: Sequence[SampleSettings], batch: int | None = None) -> list[list[int]]:
    """Positions of the samples of each pipeline call, as `sample_many` makes them."""
    batch = batch if family.batched_sampling else 1
    groups: list[list[int]] = []
    for i, one in enumerate(settings):
        size = batch or max(1, min(BATCH_LIMIT, BATCH_PIXELS // (one.height * one.width * one.frames)))
        if one.extend and family.from_image:
            size = 1  # every stretch has a first frame of its own
        if groups and len(groups[-1]) < size and settings[groups[-1][0]].call == one.call:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _arguments(family: Family, pipeline: Any, members: Sequence[SampleSettings]) -> dict[str, Any]:
    """The call's arguments, but for the text: those of ours that the pipeline's signature knows."""
    import torch

    first, known = members[0], call_parameters(pipeline)
    arguments: dict[str, Any] = {
        "height": first.height,
        "width": first.width,
        "num_inference_steps": first.steps,
        "generator": [torch.Generator("cpu").manual_seed(one.seed) for one in members],
        "output_type": "pt",
        "return_dict": False,
    }
    if "num_frames" in known:
        arguments["num_frames"] = first.frames
    cuts = family.reference_cuts(first.condition, len(first.images))
    pictures = shown(first.images, cuts, first.fps, first.height, first.width)
    arguments |= family.sampling_arguments(first.guidance, pictures, first.text_length)
    arguments |= family.steering_arguments(first)
    if first.image_guidance is not None:
        arguments["image_guidance_scale"] = first.image_guidance
    unknown = sorted(set(arguments) - set(known))
    assert not unknown, f"{type(pipeline).__name__} takes no {', '.join(unknown)}"
    return arguments


@contextmanager
def _placed(
    family: Family,
    pipeline: Any,
    texts: Texts,
    settings: Sequence[SampleSettings],
    device: torch.device | str,
    offload: Offload,
) -> Iterator[None]:
    """The texts encoded, and the parts on the device: for the length of the sampling, or in turn."""
    if offload != "none":
        networks = [family.folder(part) for part in family.variant.parts if part.startswith("network")]
        together = encoders_together(pipeline) if texts.apart else ()  # for every text, one after another
        with offloaded(pipeline, networks, device, offload, together):
            texts.encode(settings, device, move=False)
            yield
        return
    texts.encode(settings, device)
    held = other_parts(pipeline) + ([] if texts.apart else text_encoders(pipeline))
    with on_device(held, device):
        yield


@contextmanager
def _schedule(pipeline: Any, shift: float | None) -> Iterator[None]:
    """The pipeline with another time shift, for one call."""
    scheduler = pipeline.scheduler
    if shift is not None:
        pipeline.scheduler = shifted(scheduler, shift)
    try:
        yield
    finally:
        pipeline.scheduler = scheduler


def check_shift(family: Family) -> None:
    """UserError, before weights are loaded, if the family's scheduler is known to have no time shift."""
    config = family.known_config("scheduler") if "scheduler" in family.variant.parts else {}
    if config.get("_class_name"):
        _shift_name(config)


def shifted(scheduler: Any, shift: float) -> Any:
    """The same kind of scheduler with t <- shift t / (1 + (shift - 1) t) at every resolution."""
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in config else {}
    return type(scheduler).from_config(scheduler.config, **{_shift_name(config): shift}, **fixed)


def _shift_name(config: Mapping[str, Any]) -> str:
    """What a scheduler of this configuration calls its time shift, by its class where the configuration leaves it out;
    UserError for one that has none."""
    names = ("flow_shift", "shift")
    found = next((name for name in names if name in config), None)
    if found is None:
        import diffusers

        kind = getattr(diffusers, config["_class_name"], None)
        known = inspect.signature(kind.__init__).parameters if kind is not None else {}
        found = next((name for name in names if name in known), None)
    if found is None:
        raise UserError(f"--shift: {config['_class_name']} has no time shift; leave the option away.")
    return found
