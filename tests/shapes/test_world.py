"""The world: what it enumerates, holds out, says and draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kinema.shapes import world
from kinema.shapes.video import read_video


def test_the_split_is_disjoint_complete_and_balanced() -> None:
    train, held_out = world.train_combos(), world.held_out_combos()
    assert len(set(world.all_combos())) == 288
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(world.all_combos())
    assert len(held_out) == 48
    for attribute, values in (("colour", 6), ("shape", 4), ("direction", 4), ("background", 3)):
        counts = Counter(getattr(combo, attribute) for combo in held_out)
        assert set(counts.values()) == {48 // values}


def test_every_pair_of_values_occurs_in_training() -> None:
    attributes = ("colour", "shape", "direction", "background")
    for i, first in enumerate(attributes):
        for second in attributes[i + 1 :]:
            asked = {(getattr(c, first), getattr(c, second)) for c in world.all_combos()}
            seen = Counter((getattr(c, first), getattr(c, second)) for c in world.train_combos())
            assert set(seen) == asked
            assert min(seen.values()) >= 6


def test_captions_name_the_combination_and_read_back() -> None:
    assert world.caption(world.Combo("red", "circle", "left", "black")) == (
        "a red circle moving left on a black background"
    )
    texts = [world.caption(combo) for combo in world.all_combos()]
    assert len(set(texts)) == 288
    assert [world.parse_caption(text) for text in texts] == world.all_combos()
    assert world.parse_caption("A Red circle moving left on a black background.") is not None


@pytest.mark.parametrize("text", ["", "a red circle", "a pink circle moving left on a black background"])
def test_other_sentences_do_not_parse(text: str) -> None:
    assert world.parse_caption(text) is None


@pytest.mark.parametrize("combo", world.all_combos()[::23], ids=world.caption)
def test_a_clip_is_seeded_and_its_shape_stays_in_view(combo: world.Combo) -> None:
    clip = world.render(combo, 3)
    assert clip.shape == (17, 64, 64, 3) and clip.dtype == np.uint8
    assert np.array_equal(clip, world.render(combo, 3))
    assert len({world.render(combo, seed).tobytes() for seed in range(20)}) == 3
    background = np.array(world.BACKGROUNDS[combo.background])
    seen = np.abs(clip.astype(int) - background).max(-1) > 8
    assert seen.sum((1, 2)).min() > 0.9 * seen.sum((1, 2)).max()
    edge = seen[:, [0, -1]].sum() + seen[:, :, [0, -1]].sum()
    assert edge <= 6, "more of the shape than a triangle's tip touches the edge of the picture"


def test_latent_frames_are_shifted_copies() -> None:
    """Four frames on, a shape has moved by 8 pixels exactly."""
    for combo in world.all_combos()[::31]:
        clip = world.render(combo, 1)
        dx, dy = world.DIRECTIONS[combo.direction]
        moved = np.roll(clip[4], (8 * dy, 8 * dx), (0, 1))
        assert np.array_equal(moved[8:-8, 8:-8], clip[8][8:-8, 8:-8])


def test_every_motion_keeps_its_direction() -> None:
    rng = np.random.default_rng(0)
    for combo in world.all_combos():
        way = np.diff(world.draw_motion(combo, rng).centres, axis=0)
        step = np.array(world.DIRECTIONS[combo.direction])
        assert (way @ step > 1.4).all() and np.abs(way @ step[::-1]).max() < 1e-9


def test_a_dataset_holds_readable_clips_and_no_held_out_caption(tmp_path: Path) -> None:
    paths = world.write_dataset(tmp_path, 6, seed=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        name for p in paths for name in (p.name, f"{p.stem}.txt")
    )
    jobs = list(world.training_clips(6, seed=5))
    for path, (combo, seed) in zip(paths, jobs, strict=True):
        assert world.parse_caption(path.with_suffix(".txt").read_text()) == combo
        video = read_video(path).astype(float)
        error = np.mean((video - world.render(combo, seed)) ** 2)
        assert 10 * np.log10(255**2 / error) > 30


def test_training_clips_never_name_a_held_out_combination() -> None:
    counts = Counter(combo for combo, _ in world.training_clips(480))
    assert set(counts) == set(world.train_combos()) and set(counts.values()) == {2}


def test_held_out_prompts_cover_the_held_out_combinations() -> None:
    prompts = world.held_out_prompts(96)
    assert Counter(p.combo for p in prompts) == {combo: 2 for combo in world.held_out_combos()}
    assert all(world.parse_caption(p.text) == p.combo for p in prompts)
    assert len({p.seed for p in prompts}) == 96
    assert prompts == world.held_out_prompts(96) and prompts != world.held_out_prompts(96, seed=1)
