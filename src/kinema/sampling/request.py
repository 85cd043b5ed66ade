"""What somebody asks to be sampled: defaults of a variant or a run, and checks that need no weights.

Nothing here imports torch: a size that the model cannot make is refused within a second.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kinema.config.data import BucketConfig
from kinema.config.schema import Config
from kinema.data.buckets import Bucket, bucket_groups
from kinema.data.captions import with_scores
from kinema.errors import UserError
from kinema.families.base import Family, SamplingDefaults

SLUG_LENGTH = 60


@dataclass(frozen=True)
class RunDefaults(SamplingDefaults):
    """What a run samples with, where the command says nothing else."""

    negative: str = ""


def defaults_of_variant(family: Family) -> RunDefaults:
    """The size and schedule that the variant's authors sample with."""
    return RunDefaults(**vars(family.variant.sampling))


def defaults_of_run(config: Config, family: Family) -> RunDefaults:
    """The run's preview settings; size and length from its first resolution and its longest clips."""
    learnt = next(source for source in config.data.sources if not source.regularization)
    buckets, preview = learnt.buckets or config.data.buckets, config.preview
    size = _usual_size(buckets, family)
    image = family.variant.modality == "image"
    return RunDefaults(
        height=preview.height or size.height,
        width=preview.width or size.width,
        frames=preview.frames or (1 if image else size.frames),
        fps=preview.fps or buckets.fps or family.variant.sampling.fps,
        steps=preview.steps,
        guidance=family.variant.sampling.guidance if preview.guidance is None else preview.guidance,
        image_guidance=(
            family.variant.sampling.image_guidance if preview.image_guidance is None else preview.image_guidance
        ),
        negative=preview.negative_prompt,
    )


def _usual_size(config: BucketConfig, family: Family) -> Bucket:
    """The bucket that stands for a configuration: the first of explicit sizes, else of the first resolution the one
    nearest to a square, with the longest clips."""
    buckets = bucket_groups(config, family.grid, family.lengths)[0].buckets
    if config.sizes is not None:
        height, width = config.sizes[0][:2]
        return max(b for b in buckets if (b.height, b.width) == (height, width))
    longest = max(bucket.frames for bucket in buckets)
    return min((b for b in buckets if b.frames == longest), key=lambda b: abs(math.log(b.width / b.height)))


def check_size(family: Family, height: int, width: int, frames: int, prefix: str = "--") -> None:
    """UserError, naming the nearest valid values, unless the family makes samples of this size.

    ``prefix`` comes before the names of the options: ``--`` or ``preview.``.
    """
    grid, lengths = family.grid, family.lengths
    for name, value in (("height", height), ("width", width)):
        if value < grid or value % grid:
            near = _nearest(value, grid)
            raise UserError(f"{prefix}{name} {value}: {family.name} makes multiples of {grid}; nearest: {near}.")
    if family.variant.modality == "image" and frames != 1:
        raise UserError(f"{prefix}frames {frames}: {family.variant.name} makes pictures, which have 1 frame.")
    if frames not in lengths:
        near = " or ".join(map(str, lengths.nearest(frames)))
        raise UserError(f"{prefix}frames {frames}: {family.name} makes {lengths} frames; nearest: {near}.")


def _nearest(value: int, step: int) -> str:
    """The multiples of ``step`` on both sides of ``value``, from the first on."""
    below = max(1, value // step) * step
    return str(below) if value < below else f"{below} or {below + step}"


def check_images(family: Family, images: Sequence[Path | str], name: str = "--image") -> None:
    """UserError if pictures are needed and not given, given and not taken, or cannot be read."""
    check_image_count(family, images, name)
    from kinema.data.media import probe

    for image in images:
        probe(image)


def check_image_count(family: Family, images: Sequence[Path | str], name: str = "--image") -> None:
    """UserError if pictures are needed and not given, or given and not taken."""
    variant, (least, most) = family.variant, family.variant.pictures
    if most == 0 and images:
        raise UserError(f"{name} {images[0]}: {variant.name} makes {variant.modality}s from text alone; leave it away.")
    if not least <= len(images) <= most:
        what = "edits pictures" if "controls" in variant.conditions else "makes a video from its first frame"
        what += " and its last one" if most == 2 and "references" in variant.conditions else ""
        what += " and its last one" if "last_frame" in variant.conditions else ""
        if least == 0:
            raise UserError(f"{variant.name} {what}: give up to {most} with {name}, or none; {len(images)} given.")
        wanted = {1: "the picture", 2: "both pictures, the first frame first,"}.get(least, f"{least} pictures")
        more = f" ({least} to {most} of them)" if most > least else ""
        raise UserError(f"{variant.name} {what}: give {wanted} with {name}{more}; {len(images)} given.")


def check_image_guidance(family: Family, scale: float | None, name: str = "--image-guidance") -> None:
    """UserError if a scale is given and nothing would read it."""
    if scale is not None and not family.has_image_guidance:
        raise UserError(f"{name}: {family.variant.name} has no guidance of its own for pictures; leave it away.")


def told_scores(
    config: Config | None, frames: int, fps: float, motion: float | None, aesthetic: float | None, tell_fps: bool | None
) -> dict[str, float]:
    """The scores that a prompt is to end with, by name: those asked for. UserError for the frame rate of a picture.

    ``tell_fps`` None: the frame rate is told beside another score, unless the request is of a run (``config``) whose
    captions did not tell it, or of a picture.
    """
    scores = {name: value for name, value in (("motion", motion), ("aesthetic", aesthetic)) if value is not None}
    if tell_fps and frames == 1:
        raise UserError("--tell-fps: a picture has no frame rate; leave it away.")
    if tell_fps is None:
        trained = [] if config is None else [one.captions for one in config.data.sources if one.captions is not None]
        known = config is None or any("fps" in captions.scores for captions in trained)
        tell_fps = bool(scores) and frames > 1 and known
    return {"fps": fps, **scores} if tell_fps else scores


def told(prompts: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    """The prompts as the network is told them: with the scores said after each, in the words of the captions."""
    return [with_scores(prompt, scores, tuple(scores)) for prompt in prompts]


def check_previews(config: Config, family: Family) -> None:
    """UserError if the previews of a configuration cannot be made; call it before anything is loaded."""
    preview = config.preview
    if not preview.prompts:
        return
    check_image_guidance(family, preview.image_guidance, "preview.image_guidance")
    size = defaults_of_run(config, family)
    check_size(family, size.height, size.width, size.frames, "preview.")
    for images in preview_images(config, family):
        check_images(family, images, "preview.images")


def preview_images(config: Config, family: Family) -> list[tuple[Path, ...]]:
    """The pictures of each preview: an equal share of ``preview.images`` for each prompt, in their order."""
    prompts, images = config.preview.prompts, config.preview.images
    if not prompts:
        return []
    if len(images) % len(prompts):
        raise UserError(
            f"preview.images: {len(images)} pictures do not divide over {len(prompts)} prompts; "
            f"{family.variant.name} needs as many for each prompt."
        )
    share = len(images) // len(prompts)
    return [images[i * share : (i + 1) * share] for i in range(len(prompts))]


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case words of ASCII letters and digits joined by ``-``.

    Where words are lost by that (other scripts, the cut at 60 characters) six digits of the prompt's hash
    tell it from others.
    """
    plain = unicodedata.normalize("NFKD", prompt)
    plain = "".join(c for c in plain if not unicodedata.combining(c)).lower()
    words = "-".join(re.findall(r"[a-z0-9]+", plain))
    lost = not plain.isascii() or len(words) > SLUG_LENGTH
    if len(words) > SLUG_LENGTH:
        words = words[:SLUG_LENGTH].rpartition("-")[0] or words[:SLUG_LENGTH]
    parts = [words, _digest(prompt) if lost else ""]
    return "-".join(part for part in parts if part) or "empty"


def distinct_slugs(prompts: Sequence[str]) -> dict[str, str]:
    """A slug for each prompt; prompts that differ in what a slug drops get six digits of their hash too."""
    slugs = {prompt: slug(prompt) for prompt in dict.fromkeys(prompts)}
    taken: dict[str, str] = {}
    for prompt, name in slugs.items():
        if taken.setdefault(name, prompt) != prompt:
            slugs[prompt] = f"{name}-{_digest(prompt)}"
    return slugs


def _digest(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=3).hexdigest()
