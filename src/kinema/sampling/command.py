"""``kinema sample``: prompts in, files out, with an index beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.sampling.pipeline import SampleSettings
from kinema.sampling.request import (
    RunDefaults,
    check_image_guidance,
    check_images,
    check_size,
    defaults_of_run,
    defaults_of_variant,
    distinct_slugs,
    told,
    told_scores,
)
from kinema.sampling.weights import Weights, find_weights
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    import torch

    from kinema.sampling.pipeline import OnStep

INDEX = "index.jsonl"
DTYPES = ("fp32", "bf16", "fp16")


def sample(
    prompts: Sequence[str],
    *,
    run: Path | str | None = None,
    model: str | None = None,
    family: str | None = None,
    variant: str | None = None,
    adapter: Sequence[Path | str] = (),
    negative: str | None = None,
    images: Sequence[Path] = (),
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    image_guidance: float | None = None,
    shift: float | None = None,
    motion: float | None = None,
    aesthetic: float | None = None,
    tell_fps: bool | None = None,
    seed: int = 0,
    num_samples: int = 1,
    out: Path | str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    ema: bool | None = None,
) -> list[Path]:
    """Write ``num_samples`` files for each prompt, with the seeds ``seed``, ``seed`` + 1, ...; returns their paths.

    Files are ``OUT/<prompt's words>-<seed>.mp4``, or ``.png`` where ``frames`` is 1; `index.jsonl` beside them has a
    line for each. ``motion``, ``aesthetic`` and the frame rate are written after each prompt as captions have them (see
    `kinema.sampling.request.told_scores`). What else is None is the run's preview setting, or what the variant's
    authors use. UserError, before anything is loaded, for what cannot be made.
    """
    if not prompts:
        raise UserError("Give at least one prompt.")
    run = None if run is None else Path(run)
    weights = find_weights(run, model, family=family, variant=variant, adapters=adapter, ema=ema)
    if dtype is not None and dtype not in DTYPES:
        near = did_you_mean(dtype, DTYPES)
        raise UserError(f"--dtype {dtype}: there is no such type{near} Known: {', '.join(DTYPES)}.")
    defaults = _defaults(weights)
    given: dict[str, Any] = {
        "height": height,
        "width": width,
        "frames": frames,
        "fps": fps,
        "steps": steps,
        "guidance": guidance,
        "image_guidance": image_guidance,
        "negative": negative,
    }
    wanted = replace(defaults, **{name: value for name, value in given.items() if value is not None})
    check_size(weights.family, wanted.height, wanted.width, wanted.frames)
    check_images(weights.family, images)
    check_image_guidance(weights.family, image_guidance)
    scores = told_scores(weights.config, wanted.frames, wanted.fps, motion, aesthetic, tell_fps)
    folder = Path(out) if out is not None else (run / "samples" if run else Path("samples"))
    settings = [
        SampleSettings(
            prompt=prompt,
            height=wanted.height,
            width=wanted.width,
            frames=wanted.frames,
            steps=wanted.steps,
            guidance=wanted.guidance,
            image_guidance=wanted.image_guidance,
            seed=one_seed,
            negative=wanted.negative,
            images=tuple(images),
            shift=shift,
            text_length=weights.family.text_length,
        )
        for prompt in dict.fromkeys(told(prompts, scores))  # each once, however often it was given
        for one_seed in range(seed, seed + num_samples)
    ]
    return _write_all(folder, weights, settings, fps=wanted.fps, device=device, dtype=dtype)


def _defaults(weights: Weights) -> RunDefaults:
    if weights.config is not None:
        return defaults_of_run(weights.config, weights.family)
    return defaults_of_variant(weights.family)


def _write_all(
    folder: Path,
    weights: Weights,
    settings: list[SampleSettings],
    *,
    fps: float,
    device: str | None,
    dtype: str | None,
) -> list[Path]:
    """Load, draw and write; a file and its line in the index are there as soon as its sample is drawn."""
    from kinema.sampling.pipeline import sample_many
    from kinema.sampling.weights import load_parts
    from kinema.sampling.writing import suffix, write_video

    slugs = distinct_slugs([one.prompt for one in settings])
    paths = [folder / f"{slugs[one.prompt]}-{one.seed}{suffix(one.frames)}" for one in settings]
    prepare_index(folder, [path.name for path in paths])
    place, kind = _device_and_dtype(device, dtype)
    facts: dict[str, Any] = {"fps": fps, "weights": weights.label, "dtype": str(kind).removeprefix("torch.")}
    if weights.adapters:
        facts["adapters"] = [f"{path.name}:{factor:g}" for path, factor in weights.adapters]
    with _progress(settings) as (on_step, say):
        say(f"Loading {weights.label}")
        pipeline = weights.family.pipeline(load_parts(weights, place, kind))
        pipeline.set_progress_bar_config(disable=True)
        samples = sample_many(weights.family, pipeline, settings, place, on_step)
        for path, one, frames in zip(paths, settings, samples, strict=True):
            entry = {**one.to_json(), **facts}
            write_video(frames, path, fps, entry)
            add_to_index(folder, {"file": path.name, **entry})
            say(str(path))
    return paths


def _device_and_dtype(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """A GPU where there is one; bf16 there (fp16 on cards without), fp32 on CPUs."""
    import torch

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used here ({str(error).splitlines()[0]}).") from error
    if dtype is not None:
        return place, torch_dtype(dtype)
    if place.type == "cpu":
        return place, torch.float32
    native = place.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return place, torch.bfloat16 if native else torch.float16


# -- the index -------------------------------------------------------------------------------------------------------


def prepare_index(folder: Path, files: Sequence[str]) -> None:
    """Make the folder, and take the lines of files that are about to be made anew out of its index."""
    index = folder / INDEX
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not index.exists():
            return
        again = set(files)
        lines = index.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.strip() and _file_of(line) not in again]
        temporary = index.with_name(f".{INDEX}.{os.getpid()}")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(index)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}).") from error


def _file_of(line: str) -> str | None:
    try:
        return json.loads(line).get("file")
    except (ValueError, AttributeError):  # a line cut short by a full disk
        return None


def add_to_index(folder: Path, entry: dict[str, Any]) -> None:
    """Append one line: ``file``, ``prompt``, ``seed`` and the other settings."""
    with (folder / INDEX).open("a", encoding="utf-8") as index:
        index.write(json.dumps(entry, ensure_ascii=False) + "\n")


@contextmanager
def _progress(settings: list[SampleSettings]) -> Iterator[tuple[OnStep, Any]]:
    """A bar over all denoising steps on a terminal; the lines that are said above it, or alone elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("[bold]sampling"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    task = bar.add_task("sampling", total=sum(one.steps for one in settings))

    def on_step(group: Sequence[int], _step: int, _steps: int) -> None:
        bar.advance(task, len(group))

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with bar:
        yield on_step, say
