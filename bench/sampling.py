"""What sampling through kinema takes, against the plain diffusers pipeline: interleaved medians in one run.

Three comparisons on the same weights, settings and dtype, each in pairs that take turns in going first:

- draw: one clip from a loaded pipeline; ours is `sample_many`, theirs a call of diffusers' pipeline. No files.
- command: from a directory to a file; ours is what `kinema sample` runs, theirs `from_pretrained`, a call, and the
  same function writing the same kind of file.
- batch: eight clips; ours shares calls between samples, theirs is one call after the other.

The first two have the limit 1.05. Frames of both sides are compared in every pair; those of `command` have been
through H.264, which enlarges a difference in the last bit.

    python bench/sampling.py [--pairs 9] [--steps 20] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from kinema.config.schema import ModelConfig
from kinema.families.registry import open_family
from kinema.sampling.command import sample
from kinema.sampling.pipeline import SampleSettings, sample_many
from kinema.sampling.weights import Weights, load_parts
from kinema.sampling.writing import read_metadata, to_uint8, write_video
from kinema.shapes.models import write_model

LIMIT = 1.05
FAMILY = open_family(ModelConfig(family="wan", variant="t2v-1.3b"))
SETTINGS = SampleSettings("a red circle moves left on black", 64, 64, 17, guidance=3.0, text_length=512)


@dataclass(frozen=True)
class Place:
    """Where and how both sides compute."""

    directory: Path
    device: torch.device
    dtype: torch.dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="pairs of each comparison, after one to warm up")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--device", default="cpu", help="bf16 on a GPU, fp32 on a CPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    settings = replace(SETTINGS, steps=options.steps)
    with tempfile.TemporaryDirectory() as root:
        place = Place(write_model(Path(root) / "model"), device, dtype)
        plain = theirs_loaded(place)
        ours = ours_loaded(place)
        compare("draw", options.pairs, lambda s: draw(ours, s, place), lambda s: call(plain, s), settings)
        compare("command", options.pairs, lambda s: command(s, place), lambda s: script(s, place), settings)
        compare("batch", options.pairs, lambda s: eight(ours, s, place), lambda s: eight_calls(plain, s), settings)


def compare(
    name: str,
    pairs: int,
    ours: Callable[[SampleSettings], Any],
    theirs: Callable[[SampleSettings], Any],
    settings: SampleSettings,
) -> None:
    """Print medians of both sides, the medians of paired ratios (by the clock, and by processor time, which other
    programs on the machine disturb less), and by how many levels (of 255) frames differ."""
    clock: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    largest, mean = 0, 0.0
    for pair in range(pairs + 1):
        one = replace(settings, seed=1000 * pair)
        results: list[Any] = [None, None]
        for side in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter(), time.process_time()
            results[side] = (ours, theirs)[side](one)
            if pair > 0:
                clock[side].append(time.perf_counter() - start[0])
                processor[side].append(time.process_time() - start[1])
        levels = [to_uint8(frames).astype(int) for frames in results]
        difference = abs(levels[0] - levels[1])
        largest, mean = max(largest, int(difference.max())), max(mean, float(difference.mean()))
    ratios = [statistics.median(a / b for a, b in zip(*times, strict=True)) for times in (clock, processor)]
    medians = [1000 * statistics.median(side) for side in clock]
    limit = f", limit {LIMIT}" if name != "batch" else ""
    print(f"{name:8s} kinema {medians[0]:8.1f} ms   diffusers {medians[1]:8.1f} ms   ratio {ratios[0]:.4f}", end="")
    print(f" (median of {pairs} pairs{limit}; by processor time {ratios[1]:.4f})", end="")
    print(f"   frames differ by {largest} of 255 levels at most, {mean:.4f} on average")


# -- ours ------------------------------------------------------------------------------------------------------------


def ours_loaded(place: Place) -> Any:
    """The family's pipeline as the command makes it."""
    family = open_family(ModelConfig(family="wan", path=str(place.directory)))
    pipeline = family.pipeline(load_parts(Weights(family, "bench"), place.device, place.dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, settings: SampleSettings, place: Place) -> torch.Tensor:
    """One sample, [C, T, H, W] in [-1, 1]."""
    return next(sample_many(FAMILY, pipeline, [settings], place.device))


def eight(pipeline: Any, settings: SampleSettings, place: Place) -> torch.Tensor:
    """Eight samples, one after the other in time."""
    many = [replace(settings, seed=settings.seed + i) for i in range(8)]
    return torch.cat(list(sample_many(FAMILY, pipeline, many, place.device)), dim=1)


def command(settings: SampleSettings, place: Place) -> torch.Tensor:
    """What `kinema sample` runs; returns nothing to compare but what its file says, decoded."""
    (path,) = sample(
        [settings.prompt],
        again=True,
        model=str(place.directory),
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
        device=str(place.device),
        out=place.directory / "ours",
    )
    return decoded(path)


# -- theirs ----------------------------------------------------------------------------------------------------------


def theirs_loaded(place: Place) -> Any:
    """diffusers' pipeline from its own loader; the autoencoder in fp32, as ours."""
    pipeline = DiffusionPipeline.from_pretrained(place.directory, dtype={"default": place.dtype, "vae": torch.float32})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(place.device)


def call(pipeline: Any, settings: SampleSettings) -> torch.Tensor:
    """One call by hand, [C, T, H, W] in [-1, 1]."""
    frames = pipeline(
        prompt=settings.prompt,
        negative_prompt=settings.negative,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
        max_sequence_length=settings.text_length,
        output_type="pt",
    ).frames[0]
    return frames.permute(1, 0, 2, 3).float().cpu() * 2 - 1


def eight_calls(pipeline: Any, settings: SampleSettings) -> torch.Tensor:
    """Eight samples by eight calls."""
    return torch.cat([call(pipeline, replace(settings, seed=settings.seed + i)) for i in range(8)], dim=1)


def script(settings: SampleSettings, place: Place) -> torch.Tensor:
    """What a short script does: load, call, write."""
    frames = call(theirs_loaded(place), settings)
    path = write_video(frames, place.directory / "theirs" / "clip.mp4", 16.0, settings.to_json())
    return decoded(path)


def decoded(path: Path) -> torch.Tensor:
    """The file's frames as pixels in [-1, 1], so that both sides pay for the same decoding."""
    import av

    assert read_metadata(path)["prompt"]
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
