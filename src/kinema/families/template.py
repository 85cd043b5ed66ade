"""Commented configurations for ``kinema init``: what suits a family, a variant and a card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.data import BucketConfig
from kinema.config.write import toml_value
from kinema.errors import UserError
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    from kinema.families.base import Family, Variant

_RESERVE = 2.5  # GB of a card that the driver, the allocator and small buffers take
_VIDEO_SIZES = (
    (192, 17),
    (256, 17),
    (256, 33),
    (384, 33),
    (480, 33),
    (480, 49),
    (480, 81),
    (640, 81),
    (720, 81),
)
_IMAGE_SIZES = ((256, 1), (384, 1), (512, 1), (768, 1), (1024, 1))
_LARGEST_SHARD = 64
WIDEST = math.sqrt(BucketConfig().max_aspect)
"""The longer side of the widest default bucket, over that of the square with its area."""


@dataclass(frozen=True)
class Choice:
    """What the template writes for a card; ``memory`` is the estimate in GB for each device."""

    resolution: int
    frames: int
    checkpointing: bool
    shards: int
    memory: float


def weights_memory(parameters: int, full: bool) -> float:
    """GB of weights, gradients and optimiser state.

    Full: fp32 weights, gradients and two moments, 16 bytes a parameter. LoRA: the frozen network in bf16,
    2 bytes a parameter, and 3% for the adapter's own.
    """
    return parameters * (16 if full else 2 * 1.03) / 1e9


def activations_memory(parameters: int, tokens: int, checkpointing: bool) -> float:
    """GB of bf16 activations of one sample.

    A transformer of N blocks and width d has about 14 N d^2 parameters (attention to itself and to text,
    feed-forward of 4 d); N is taken as 35. A block keeps about 60 vectors of width d a token for its backward
    pass (those in fp32 count twice); with activation checkpointing, one such block at a time, and the input of
    every block.
    """
    blocks, kept = 35, 60
    width = math.sqrt(parameters / (14 * blocks))
    vectors = kept + blocks if checkpointing else kept * blocks
    return 2 * width * tokens * vectors / 1e9


def choose(variant: Variant, card: int, full: bool) -> Choice:
    """The largest size that cards of ``card`` GB are estimated to hold, sharded over as few as it takes.

    Never larger or longer than what the variant is made for. Without activation checkpointing only where the
    largest size fits without it.
    """
    made_for = variant.sampling
    sizes = [
        (resolution, variant.lengths.at_most(frames))
        for resolution, frames in (_VIDEO_SIZES if variant.modality == "video" else _IMAGE_SIZES)
        if resolution**2 <= 1.1 * made_for.height * made_for.width
        and frames <= made_for.frames
        and resolution * WIDEST <= (variant.longest_side or math.inf)
    ]

    def memory(size: tuple[int, int], checkpointing: bool, shards: int) -> float:
        resolution, frames = size
        tokens = (resolution // variant.grid) ** 2 * variant.lengths.latents(frames)
        activations = activations_memory(variant.parameters, tokens, checkpointing)
        return _RESERVE + weights_memory(variant.parameters, full) / shards + activations

    shards = 1
    while memory(sizes[0], True, shards) > card and shards < _LARGEST_SHARD:
        shards *= 2
    candidates = [(sizes[-1], False), *((size, True) for size in reversed(sizes))]
    for (resolution, frames), checkpointing in candidates:
        estimate = memory((resolution, frames), checkpointing, shards)
        if estimate <= card:
            return Choice(resolution, frames, checkpointing, shards, estimate)
    raise UserError(
        f"--card {card}: nothing fits cards of {card} GB, even {_LARGEST_SHARD} of them; give the memory of one card "
        "in GB, such as 24"
    )


def template(family: str, variant: str | None = None, card: int = 24, full: bool = False) -> str:
    """The text of a commented configuration that loads as it is.

    ``card``: memory of one card in GB. ``full``: the whole network instead of a LoRA.
    UserError for a family, a variant or a card that does not exist.
    """
    from kinema.families.registry import family_class

    kind = family_class(family)
    chosen = _variant(kind, family, variant)
    choice = choose(chosen, card, full)
    blocks = (
        _head(family, chosen, card, full, choice),
        _model(family, chosen),
        _data(chosen, choice),
        "" if full else _adapter(card),
        _training(full, choice),
        _parallel(choice),
        _watching(chosen),
    )
    return "\n".join(block for block in blocks if block)


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet; UserError if it does or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"'{path}' is there already; choose another name or remove it") from None
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from None


def _variant(kind: type[Family], family: str, name: str | None) -> Variant:
    if name is None:
        return min(kind.variants.values(), key=lambda variant: variant.parameters)
    if name not in kind.variants:
        known = ", ".join(kind.variants)
        near = did_you_mean(name, kind.variants)
        raise UserError(f"--variant: {family} has no variant '{name}'{near} Known: {known}.")
    return kind.variants[name]


def _needs_picture(variant: Variant) -> bool:
    """Whether samples start from given pictures."""
    return variant.pictures[0] > 0


def _head(family: str, variant: Variant, card: int, full: bool, choice: Choice) -> str:
    what = "Full fine-tune" if full else "A LoRA"
    cards = f"{choice.shards} cards" if choice.shards > 1 else "one card"
    start = f"torchrun --nproc-per-node {choice.shards} -m kinema" if choice.shards > 1 else "kinema"
    return f"""\
# {what} of {family} {variant.name} ({variant.parameters / 1e9:.1f}B parameters) on {cards} of {card} GB.
# Sizes and lengths are chosen by a rough estimate of the memory: {choice.memory:.0f} GB a card, not measured.
# Start:  {start} train THIS_FILE
# Any value can be given on that line too:  --optimizer.lr 2e-5
# Every key: docs/configuration.md. Completion in editors: run `kinema schema > kinema.schema.json`
# and put "#:schema ./kinema.schema.json" on the first line.

[run]
dir = "runs/{family}-{variant.name}-{"full" if full else "lora"}"  # all that the run makes; it resumes from here
seed = 42
"""


def _model(family: str, variant: Variant) -> str:
    elsewhere = "".join(f"{part}.path = {toml_value(hub)}\n" for part, hub in variant.elsewhere)
    return f"""\
[model]
family = {toml_value(family)}
variant = {toml_value(variant.name)}
path = {toml_value(variant.hub)}  # a hub id, a diffusers directory or a single file
{elsewhere}# network.path = "network.safetensors"  # any part may come from elsewhere: autoencoder.path...
"""


def _data(variant: Variant, choice: Choice) -> str:
    pictures_too = choice.frames == 1 or "first_frame" not in variant.conditions
    frames = sorted({1, choice.frames}) if pictures_too else [choice.frames]
    is_video = variant.modality == "video"
    lengths = "a video takes the longest that it fills" + (", a picture takes 1" if pictures_too else "")
    fps = f"fps = {variant.sampling.fps:g}  # videos are resampled to this rate\n" if is_video else ""
    return f"""\
[[data.sources]]  # one such table for each folder
path = "data"  # pictures and videos, each with its caption in a .txt file of the same name
{_controls(variant)}
[data.buckets]
resolutions = [{choice.resolution}]  # side of a square of the same area; shapes follow the records
frames = {toml_value(frames)}  # clip lengths: {lengths if is_video else "pictures"}
{fps}"""


def _controls(variant: Variant) -> str:
    if "controls" not in variant.conditions:
        return ""
    line = 'controls = ["controls"]  # what is edited: a picture of the same name for every one of path\n'
    return line if variant.pictures[0] else f"# {line}"


def _adapter(card: int) -> str:
    rank = 16 if card <= 16 else 32 if card <= 48 else 64
    return f"""\
[adapter]  # without this table the whole network trains
type = "lora"
rank = {rank}  # more learns more, and forgets more
"""


def _training(full: bool, choice: Choice) -> str:
    batch = max(8, choice.shards) if full else choice.shards
    ema = "\n[training.ema]  # average of the weights, for previews and exports\ndecay = 0.999\n" if full else ""
    return f"""\
[training]
steps = {10000 if full else 2000}  # or epochs = 10
batch_size = {batch}  # samples for each update, over all cards
micro_batch_size = 1  # samples at once on a card; the rest is accumulated
precision = "auto"  # bf16 where the hardware computes in it
activation_checkpointing = {toml_value(choice.checkpointing)}  # true: less memory, about a third more time
caption_dropout = 0.1  # share of samples without caption, for classifier-free guidance
{ema}
[optimizer]
type = "adamw"
lr = {"1e-5" if full else "1e-4"}

[schedule]
warmup_steps = {500 if full else 100}
decay = "{"cosine" if full else "constant"}"
"""


def _parallel(choice: Choice) -> str:
    if choice.shards == 1:
        return ""
    return f"""\
[parallel]
dp_shard = {choice.shards}  # cards over which the weights are spread; one alone cannot hold them
"""


def _watching(variant: Variant) -> str:
    needs_picture = _needs_picture(variant)
    pictures = ["to_edit.png"] if "controls" in variant.conditions else ["first_frame.png", "last_frame.png"]
    images = f"images = {toml_value(pictures[: variant.pictures[0]])}  # for each prompt, in their order\n"
    prompts = (
        '# prompts = ["a sentence like your captions"]'
        if needs_picture or variant.sampling_needs
        else 'prompts = ["a sentence like your captions"]'
    )
    needs = f"# Samples need a package more: pip install {variant.sampling_needs}\n" if variant.sampling_needs else ""
    return f"""\
[checkpoint]
every_minutes = 30
keep = 2  # the newest are kept

[preview]  # samples made while training goes on, one before the first step
{needs}{prompts}
{"# " + images if needs_picture else ""}every_steps = 500
steps = 30

[export]  # weights for other tools; the last step always exports
every_steps = 1000

# [[evaluation.sets]]  # held-out data: the loss that tells when to stop
# name = "held_out"
# sources = [{{ path = "held_out" }}]

# [evaluation]
# every_steps = 500
"""
