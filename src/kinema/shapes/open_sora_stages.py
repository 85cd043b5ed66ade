"""Open-Sora in small: a network trained from nothing through three stages on the world, then asked for everything that
it is told: text, the first frame, the last one, both, nine frames to go on from, and a video beyond its length.

Each stage is a configuration of its own (`open_sora_1.toml`...), which starts from the run of the one before, and every
step is a public command's. The judge reads the frames that were not given; the combinations are held out, in the
prompts as in the frames that are given.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from kinema.shapes.judge import accuracy, judge
from kinema.shapes.quickstart import timed, write_once
from kinema.shapes.video import read_video, write_video
from kinema.shapes.world import (
    DIRECTIONS,
    FPS,
    FRAMES,
    Combo,
    caption,
    draw_motion,
    held_out_combos,
    render_motion,
    write_dataset,
    write_pictures,
)

PICTURES, CLIPS = 1440, 960
STAGES = ("pictures", "videos", "frames")
STEPS, GUIDANCE, IMAGE_GUIDANCE = 20, 4.5, 1.0
"""Of the samples. Given frames need no guidance of their own here: they leave little open."""
LONG = 25
"""Frames of the longer videos: a further stretch of 17, of which 9 are there already."""
OVERLAP = 9


@dataclass(frozen=True)
class Trial:
    """One thing that the network is asked for."""

    condition: str
    given: tuple[str, ...] = ()
    """Files of each combination that it is given (`write_given`)."""
    judged: slice = field(default_factory=lambda: slice(None))
    """The frames that are not given. The last picture stands for the last latent frame, which is four frames long."""
    stranger: bool = False
    """The frames show another combination than the prompt says."""
    extend: int | None = None


TRIALS = {
    "t2v": Trial("t2v"),
    "i2v_head": Trial("i2v_head", ("first.png",), slice(1, None)),
    "i2v_tail": Trial("i2v_tail", ("last.png",), slice(0, -4)),
    "i2v_loop": Trial("i2v_loop", ("first.png", "last.png"), slice(1, -4)),
    "v2v_head_9": Trial("v2v_head_9", ("clip.mp4",), slice(9, None)),
    "extension": Trial("i2v_head", ("early.png",), slice(FRAMES, None), extend=1),
    "another's first frame": Trial("i2v_head", ("first.png",), slice(1, None), stranger=True),
}


def run_open_sora(directory: Path, overrides: Sequence[Sequence[tuple[str, str]]] = ((), (), ())) -> dict[str, Any]:
    """Make the world, train the three stages, ask for every trial, judge; returns the scores, as in ``scores.json``.

    ``overrides``: further settings of each stage. What is there already is not made again: a run that was stopped goes
    on.
    """
    from kinema.config.load import load_config
    from kinema.shapes.open_sora import write_model
    from kinema.training.train import train

    seconds: dict[str, float] = {}
    world = directory / "world"
    with timed(seconds, "world"):
        write_once(world / "pictures", lambda folder: write_pictures(folder, PICTURES))
        write_once(world / "clips", lambda folder: write_dataset(folder, CLIPS, roaming=True))
        write_once(world / "given", write_given)
        write_once(world / "model", write_model)
    before = None
    for number, (stage, own) in enumerate(zip(STAGES, overrides, strict=True), 1):
        paths = {
            "run.dir": directory / stage,
            "model.path": world / "model",
            "data.sources.0.path": world / ("pictures" if stage == "pictures" else "clips"),
            "data.cache": world / "cache",
        }
        if before is not None:
            paths["model.network.path"] = before
        with as_file(files("kinema.shapes") / f"open_sora_{number}.toml") as path:
            config = load_config(path, [*((key, str(value)) for key, value in paths.items()), *own])
        with timed(seconds, stage):
            train(config)
        before = directory / stage
    with timed(seconds, "trials"):
        scores = run_trials(directory)
    scores["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    (directory / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print_scores(scores)
    return scores


# -- what is given ---------------------------------------------------------------------------------------------------


def truth(number: int, start: int, frames: int) -> np.ndarray:
    """The clip that the given frames of a held-out combination are of, beginning at ``start`` pixels on its way."""
    combo = held_out_combos()[number]
    motion = draw_motion(combo, np.random.default_rng([3, number]), frames)
    dx, dy = DIRECTIONS[combo.direction]
    motion.centres[:] += np.array([dx, dy]) * (start - 16)
    return render_motion(combo, motion)


def write_given(folder: Path) -> None:
    """For each held-out combination the first and the last frame of a clip, the clip, and an earlier first frame, from
    which a longer video stays in view."""
    from PIL import Image

    for number in range(len(held_out_combos())):
        own = folder / f"{number:02d}"
        own.mkdir(parents=True)
        clip = truth(number, 16, FRAMES)
        write_video(own / "clip.mp4", clip, FPS)
        stills = {"first.png": clip[0], "last.png": clip[-1], "early.png": truth(number, 8, 1)[0]}
        for name, still in stills.items():
            Image.fromarray(still).save(own / name)


def other_than(number: int) -> int:
    """A held-out combination of the same direction and of another colour, shape and background."""
    combos = held_out_combos()
    asked = combos[number]

    def differs(one: Combo) -> bool:
        apart = all(getattr(one, name) != getattr(asked, name) for name in ("colour", "shape", "background"))
        return apart and one.direction == asked.direction

    fitting = [i for i, one in enumerate(combos) if differs(one)]
    return fitting[number % len(fitting)]


# -- trials ----------------------------------------------------------------------------------------------------------


def run_trials(directory: Path) -> dict[str, Any]:
    """Samples of every trial, in ``judged/``, and what the judge reads in them."""
    shutil.rmtree(directory / "judged", ignore_errors=True)
    drawn = {name: draw(directory, name, trial) for name, trial in TRIALS.items()}
    scores: dict[str, Any] = {"samples": len(held_out_combos())}
    for name, trial in TRIALS.items():
        scores[name] = score(trial, drawn[name], drawn["t2v"])
    return scores


def draw(directory: Path, name: str, trial: Trial) -> list[np.ndarray]:
    """One video of each held-out combination; all trials with the same noise."""
    from kinema.sampling.command import sample

    rows = []
    for number, combo in enumerate(held_out_combos()):
        shown = other_than(number) if trial.stranger else number
        given = [str(directory / "world" / "given" / f"{shown:02d}" / file) for file in trial.given]
        rows.append(
            {"text": caption(combo), "ref": ";".join(given), "name": f"{number:02d}", "seed": str(1000 + number)}
        )
    folder = directory / "judged" / name.replace(" ", "-").replace("'", "")
    folder.mkdir(parents=True)
    table = folder / "prompts.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample(
        prompt_list=table,
        run=directory / STAGES[-1],
        condition=trial.condition,
        steps=STEPS,
        guidance=GUIDANCE,
        image_guidance=IMAGE_GUIDANCE if trial.given else None,
        text_osci=False,
        extend=trial.extend,
        overlap=OVERLAP if trial.extend else None,
        out=folder,
    )
    return [read_video(folder / f"{row['name']}.mp4") for row in rows]


def score(trial: Trial, videos: Sequence[np.ndarray], without: Sequence[np.ndarray]) -> dict[str, Any]:
    """Accuracy of what the judge reads in the frames that are not given. Where frames are given: the mean error of the
    pixels, in shares of full scale, against the clip that they are of ("off") and what it is ``without`` them."""
    combos = held_out_combos()
    shown = [other_than(i) if trial.stranger else i for i in range(len(combos))]
    verdicts = [judge(video[trial.judged]) for video in videos]
    found: dict[str, Any] = accuracy(verdicts, [combos[i] for i in shown])
    if trial.given:
        start, frames = (8, LONG) if trial.extend else (16, FRAMES)
        clips = [truth(i, start, frames)[trial.judged] for i in shown]
        found["off"] = error([video[trial.judged] for video in videos], clips)
        if not trial.extend:
            others = [video[trial.judged] for video in without]
            found["off_without"] = error(others, clips)
            found["changed_by_frames"] = error([video[trial.judged] for video in videos], others)
    return found


def error(videos: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Mean absolute difference, in shares of full scale."""
    pairs = zip(videos, others, strict=True)
    return float(np.mean([np.abs(a.astype(np.float32) - b.astype(np.float32)).mean() / 255 for a, b in pairs]))


def print_scores(scores: dict[str, Any]) -> None:
    """A row for each trial."""
    columns = ("colour", "shape", "background", "direction", "all")
    print(f"\n{'':24}" + "".join(f"{name:>12}" for name in columns) + f"{'off':>9}{'without':>9}{'changed':>9}")
    for name in TRIALS:
        row = scores[name]
        print(
            f"{name:24}"
            + "".join(f"{row[column]:>12.1%}" for column in columns)
            + "".join(
                f"{row[key]:>9.4f}" if key in row else " " * 9 for key in ("off", "off_without", "changed_by_frames")
            )
        )
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in scores["seconds"].items()), flush=True)


def main() -> None:
    """``python -m kinema.shapes.open_sora_stages``."""
    parser = argparse.ArgumentParser(description="Train a small Open-Sora from nothing in three stages and judge it.")
    parser.add_argument("--dir", type=Path, default=Path("runs/open-sora"), help="where the runs go")
    run_open_sora(parser.parse_args().dir)


if __name__ == "__main__":
    main()
