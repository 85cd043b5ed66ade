"""Score text of samples: the words that captions of the training had, where they are asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from kinema.cli import app
from kinema.config.data import CaptionConfig
from kinema.config.schema import Config
from kinema.data.captions import Captioner
from kinema.data.records import Record
from kinema.errors import UserError
from kinema.families.registry import family_class
from kinema.sampling.command import sample
from kinema.sampling.request import told, told_scores
from kinema.sampling.writing import read_metadata

SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("scores"), "t2v-1.3b")


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def trained_with(*scores: str, second: tuple[str, ...] = ()) -> Config:
    sources: list[dict[str, Any]] = [{"path": "a"}, {"path": "b", "captions": {"scores": list(second)}}]
    data = {"sources": sources[: 1 + bool(second)], "captions": {"scores": list(scores)}}
    return Config.model_validate(
        {"model": {"family": "wan", "path": "x"}, "data": data, "training": {"steps": 1}},
    )


def prompts_of(folder: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in (folder / "index.jsonl").read_text().splitlines()]


def test_which_scores_are_told() -> None:
    both, motion, fps = (trained_with(*names) for names in (("fps", "motion"), ("motion",), ("fps",)))
    asked: list[tuple[Config | None, int, Any, Any, Any, dict[str, float]]] = [
        # config, frames, motion, aesthetic, tell_fps -> scores
        (None, 17, None, None, None, {}),
        (fps, 17, None, None, None, {}),
        (None, 17, 4.0, None, None, {"fps": 24, "motion": 4}),
        (None, 1, 4.0, 5.5, None, {"motion": 4, "aesthetic": 5.5}),
        (None, 17, 4.0, None, False, {"motion": 4}),
        (None, 17, None, None, True, {"fps": 24}),
        (both, 17, 0.0, None, None, {"fps": 24, "motion": 0}),
        (motion, 17, 4.0, None, None, {"motion": 4}),
        (motion, 17, 4.0, None, True, {"fps": 24, "motion": 4}),
        (trained_with("motion", second=("fps",)), 17, None, 5.0, None, {"fps": 24, "aesthetic": 5}),
    ]
    for config, frames, motion_score, aesthetic, tell_fps, expected in asked:
        assert told_scores(config, frames, 24.0, motion_score, aesthetic, tell_fps) == expected


def test_prompts_end_as_captions_do() -> None:
    captioner = Captioner(CaptionConfig(scores=("aesthetic", "fps", "motion")), 0, online=False)
    texts = ("a dog runs.", "a dog", "")
    scores = {"motion": 4.0, "aesthetic": 5.25}
    captions = [captioner.choose(Record("a.mp4", (text,), "video", scores=scores), 0, 16.0) for text in texts]
    assert told(texts, told_scores(None, 17, 16.0, 4.0, 5.25, None)) == captions
    assert captions[0] == "a dog runs. 16 FPS, 4 motion score, 5.25 aesthetic score."
    assert told(texts, {}) == list(texts)


def test_what_is_no_score_is_refused(base: Path) -> None:
    for name, value in (("motion", math.nan), ("aesthetic", math.inf)):
        with pytest.raises(UserError, match=f"--{name} .*: expected a number"):
            sample(["a ball"], model=str(base), **SMALL, **{name: value})
    with pytest.raises(UserError, match=r"--tell-fps: a picture has no frame rate"):
        sample(["a ball"], model=str(base), **{**SMALL, "frames": 1}, tell_fps=True)


def test_the_command_tells_them(base: Path, tmp_path: Path) -> None:
    """The same file as of the whole text written by hand, which the index shows; one prompt a motion score."""
    arguments = ["--model", str(base), "--height", "32", "--width", "32", "--frames", "5", "--steps", "1"]
    written = "a ball 8 FPS, 4 motion score, 5.5 aesthetic score."
    for folder, prompt, extra in (
        ("asked", "a ball", ["--motion", "4", "--aesthetic", "5.5"]),
        ("written", written, []),
        ("without", "a ball", ["--motion", "4", "--aesthetic", "5.5", "--no-tell-fps"]),
    ):
        out = ["--out", str(tmp_path / folder), "--fps", "8"]
        result = CliRunner().invoke(app, ["sample", prompt, *arguments, *out, *extra])
        assert result.exit_code == 0, result.output
    assert prompts_of(tmp_path / "asked") == prompts_of(tmp_path / "written") == [written]
    assert prompts_of(tmp_path / "without") == ["a ball 4 motion score, 5.5 aesthetic score."]
    (asked,), (by_hand,), (without,) = (
        sorted((tmp_path / one).glob("*.mp4")) for one in ("asked", "written", "without")
    )
    assert asked.name == by_hand.name == "a-ball-8-fps-4-motion-score-5-5-aesthetic-score-0.mp4"
    assert (decoded(asked) == decoded(by_hand)).all() and (decoded(asked) != decoded(without)).any()
    assert {name: read_metadata(asked)[name] for name in ("text", "scores")} == {
        "text": "a ball",
        "scores": {"fps": 8.0, "motion": 4.0, "aesthetic": 5.5},
    }
