"""The quickstart: a video model trained from nothing in minutes on two CPU cores, sampled and judged.

Every step is what a user does with data of their own: a folder of clips with captions, a TOML file, ``train``,
``sample``, the report. The judge reads the samples back; the prompts ask for combinations that training never saw.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from kinema.shapes.judge import ATTRIBUTES, Verdict, accuracy, judge
from kinema.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Combo,
    all_combos,
    caption,
    held_out_combos,
    parse_caption,
    render,
    write_clips,
    write_dataset,
)

CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "direction": 1 / len(DIRECTIONS),
    "background": 1 / len(BACKGROUNDS),
}
UNTRAINED_SAMPLES = 24


def run_quickstart(
    directory: Path, clips: int, samples_per_prompt: int, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Make the world, train, sample every held-out prompt, judge, write the report; returns the scores.

    Leaves in ``directory``: ``samples/*.mp4`` and ``samples/index.jsonl``, ``scores.json``, ``report.html`` and what
    every run leaves. The clips, the untrained model and the cache stand beside it.
    """
    from kinema.config.load import load_config
    from kinema.sampling.command import sample
    from kinema.shapes.models import write_model
    from kinema.training.train import train
    from kinema.ui.report import write_report

    seconds: dict[str, float] = {}
    world = directory.with_name(directory.name + "-world")
    held_out = held_out_combos()
    print(
        f"The world: {clips} clips; {len(held_out)} of {len(all_combos())} combinations are kept for later", flush=True
    )
    with timed(seconds, "world"):
        write_once(world / "clips", lambda folder: write_dataset(folder, clips))
        write_once(world / "held-out", write_held_out)
        write_once(world / "model", write_model)

    with as_file(files("kinema.shapes") / "quickstart.toml") as path:
        paths = {
            "run.dir": directory,
            "model.path": world / "model",
            "data.sources.0.path": world / "clips",
            "data.cache": world / "cache",
            "evaluation.sets.0.sources.0.path": world / "held-out",
        }
        config = load_config(path, [*((key, str(value)) for key, value in paths.items()), *overrides])
    with timed(seconds, "caching and training"):
        train(config)

    prompts = [caption(combo) for combo in held_out]
    print(f"Sampling {len(prompts) * samples_per_prompt} videos of held-out prompts", flush=True)
    with timed(seconds, "sampling"):
        shutil.rmtree(directory / "samples", ignore_errors=True)
        written = sample(prompts, run=directory, num_samples=samples_per_prompt, out=directory / "samples")
    with timed(seconds, "controls"):
        untrained = sample(
            prompts[:: max(1, len(prompts) // UNTRAINED_SAMPLES)],
            model=str(world / "model"),
            family=config.model.family,
            height=64,
            width=64,
            frames=17,
            fps=16,
            steps=config.preview.steps,
            guidance=config.preview.guidance,
            shift=None,
            out=directory / "untrained",
        )
        scores = score(directory, written, untrained)
    scores["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    (directory / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print_scores(scores)
    print(f"Open {write_report(directory).resolve()}", flush=True)
    return scores


def score(directory: Path, written: Sequence[Path], untrained: Sequence[Path]) -> dict[str, Any]:
    """Judge samples, an untrained network's samples, and freshly rendered clips; annotates ``index.jsonl``."""
    verdicts = judge_index(directory / "samples" / "index.jsonl")
    fresh = [render(combo, (2, i)) for i, combo in enumerate(all_combos())]
    return {
        "samples": len(written),
        "held_out": accuracy(*verdicts),
        "chance": CHANCE,
        "untrained": accuracy(*judge_index(directory / "untrained" / "index.jsonl")),
        "untrained_samples": len(untrained),
        "judge_on_fresh_clips": accuracy([judge(video) for video in fresh], all_combos()),
        "fresh_clips": len(fresh),
    }


def judge_index(index: Path) -> tuple[list[Verdict], list[Combo]]:
    """What the judge reads in each file of an index, and what its prompt asked for; adds ``judged`` to each line."""
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    verdicts, asked = [], []
    for row in rows:
        combo = parse_caption(row["prompt"])
        assert combo is not None, row["prompt"]
        verdict = judge(index.parent / row["file"])
        row["judged"] = {name: [getattr(verdict, name), getattr(combo, name)] for name in ATTRIBUTES}
        verdicts.append(verdict)
        asked.append(combo)
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return verdicts, asked


def print_scores(scores: dict[str, Any]) -> None:
    """The table of the report, for the terminal."""
    columns = ("held_out", "untrained", "chance", "judge_on_fresh_clips")
    titles = ("trained", "untrained", "chance", "judge itself")
    print(f"\n{'':12}" + "".join(f"{title:>14}" for title in titles))
    for name in ATTRIBUTES:
        print(f"{name:12}" + "".join(f"{scores[column][name]:>14.1%}" for column in columns))
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in scores["seconds"].items()), flush=True)


def write_held_out(folder: Path) -> None:
    """One clip of every held-out combination, to evaluate on."""
    write_clips(folder, [(combo, (1, i)) for i, combo in enumerate(held_out_combos())])


def write_once(folder: Path, write: Any) -> None:
    """Make a folder by ``write(folder)`` unless a complete one is there already."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    partial.rename(folder)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record how long the inside takes."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def main() -> None:
    """``python -m kinema.shapes.quickstart``."""
    from kinema.config.load import parse_overrides

    parser = argparse.ArgumentParser(description="Train a small video model from nothing, sample and judge it.")
    parser.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="run directory")
    parser.add_argument("--clips", type=int, default=960, help="training clips to render")
    parser.add_argument("--samples", type=int, default=2, help="samples of each held-out prompt")
    options, rest = parser.parse_known_args()
    run_quickstart(options.dir, options.clips, options.samples, parse_overrides(rest))


if __name__ == "__main__":
    main()
