"""The judge: right on what it should read, silent on what it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kinema.shapes import world
from kinema.shapes.judge import ATTRIBUTES, Verdict, accuracy, judge
from kinema.shapes.video import write_video

NOTHING = Verdict(None, None, None, None)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [world.render(combo, (7, i)) for i, combo in enumerate(world.all_combos())]


def test_fresh_clips_are_read_right(clips: list[np.ndarray]) -> None:
    scores = accuracy([judge(clip) for clip in clips], world.all_combos())
    assert min(scores.values()) >= 0.99, scores


def test_clips_are_read_right_from_files(clips: list[np.ndarray], tmp_path: Path) -> None:
    for i, clip in enumerate(clips[::5]):
        write_video(tmp_path / f"{i}.mp4", clip, crf=23)
    verdicts = [judge(tmp_path / f"{i}.mp4") for i in range(len(clips[::5]))]
    scores = accuracy(verdicts, world.all_combos()[::5])
    assert min(scores.values()) >= 0.99, scores


def test_blurred_noisy_and_tinted_clips_are_read_right(clips: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for clip in clips[::5]:
        soft = clip.astype(np.float32)
        soft = (soft + np.roll(soft, 1, 1) + np.roll(soft, 1, 2) + np.roll(soft, (1, 1), (1, 2))) / 4
        soft += rng.normal(0, 8, soft.shape) + rng.uniform(-12, 12, 3)
        verdicts.append(judge(np.clip(soft, 0, 255).astype(np.uint8)))
    scores = accuracy(verdicts, world.all_combos()[::5])
    assert min(scores.values()) >= 0.97, scores


def test_a_clip_played_backwards_moves_the_other_way(clips: list[np.ndarray]) -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for clip, combo in list(zip(clips, world.all_combos(), strict=True))[::11]:
        backwards = judge(np.ascontiguousarray(clip[::-1]))
        assert backwards == Verdict(combo.colour, combo.shape, opposite[combo.direction], combo.background)


def test_what_does_not_move_has_no_direction(clips: list[np.ndarray]) -> None:
    still = np.repeat(clips[0][8:9], 17, 0)
    assert judge(still) == replace(judge(clips[0]), direction=None)


def test_a_path_that_turns_back_has_no_direction(clips: list[np.ndarray]) -> None:
    there_and_back = np.concatenate([clips[0][::2], clips[0][::-2]])
    assert judge(there_and_back).direction is None


def test_noise_has_no_label() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert judge(rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)) == NOTHING


def test_an_empty_picture_has_only_a_background() -> None:
    for name, colour in world.BACKGROUNDS.items():
        empty = np.broadcast_to(np.array(colour, np.uint8), (17, 64, 64, 3)).copy()
        assert judge(empty) == Verdict(None, None, None, name)


def test_colours_outside_the_palette_have_no_name() -> None:
    clip = world.render(world.Combo("red", "circle", "left", "black"), 0).astype(np.float32)
    brown = clip * np.array([0.5, 1.5, 1.0], np.float32)
    assert judge(brown.astype(np.uint8)).colour is None


def test_a_shape_that_vanishes_has_no_direction_and_no_shape(clips: list[np.ndarray]) -> None:
    flicker = clips[0].copy()
    flicker[5:9] = flicker[0, 0, 0]
    verdict = judge(flicker)
    assert verdict.direction is None and verdict.shape is None


def test_accuracy_counts_each_attribute() -> None:
    combo = world.Combo("red", "circle", "left", "black")
    verdicts = [Verdict("red", "square", "left", "black"), Verdict("red", "circle", None, "black")]
    scores = accuracy(verdicts, [combo, combo])
    assert scores == {"colour": 1.0, "shape": 0.5, "direction": 0.5, "background": 1.0, "all": 0.0}
    assert tuple(scores) == (*ATTRIBUTES, "all")


@pytest.mark.parametrize("bad", [np.zeros((17, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8)])
def test_other_arrays_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        judge(bad)
