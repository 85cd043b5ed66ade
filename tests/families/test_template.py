"""Every template loads; the choices fit the card and grow with it."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from kinema.config.load import load_config
from kinema.errors import UserError
from kinema.families.base import SamplingDefaults, Variant
from kinema.families.registry import family_class, family_names, open_family
from kinema.families.template import activations_memory, choose, template, weights_memory, write_new

CARDS = (12, 16, 24, 48, 80)
VARIANTS = [(name, variant) for name in family_names() for variant in family_class(name).variants]
SMALL = Variant("small", "video", 1_500_000_000, ("network",), "hub/small", SamplingDefaults(720, 1280, 81))
LARGE = replace(SMALL, parameters=14_000_000_000)
PICTURE = Variant("picture", "image", 12_000_000_000, ("network",), "hub/p", SamplingDefaults(1024, 1024, 1))


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_every_template_loads_and_suits_its_family(tmp_path: Path, family: str, variant: str) -> None:
    for card, full in itertools.product(CARDS, (False, True)):
        path = tmp_path / f"{card}-{full}.toml"
        write_new(path, template(family, variant, card, full))
        config = load_config(path)
        assert (config.model.family, config.model.variant) == (family, variant)
        assert (config.adapter is None) == full
        bound = open_family(config.model)
        bound.validate(config)
        assert all(frames in bound.lengths for frames in config.data.buckets.frames)
        shards = config.parallel.dp_shard
        assert config.training.batch_size % shards == 0
        assert (f"torchrun --nproc-per-node {shards} " in path.read_text()) == (shards > 1)


def test_commented_lines_are_right_too(tmp_path: Path) -> None:
    """What a user uncomments loads: tables and keys that the template only mentions."""
    name, variant = VARIANTS[0]
    text = template(name, variant)
    lines = [
        line[2:] if line.startswith("# ") and (" = " in line or line[2] == "[") else line for line in text.splitlines()
    ]
    path = tmp_path / "c.toml"
    path.write_text("\n".join(lines))
    config = load_config(path)
    assert config.evaluation.sets[0].name == "held_out"
    assert config.model.network.path == "network.safetensors"


def test_the_estimate_in_numbers() -> None:
    assert weights_memory(14_000_000_000, full=True) == 224
    assert weights_memory(14_000_000_000, full=False) == pytest.approx(28.84)
    width = math.sqrt(14e9 / (14 * 35))  # 5345
    assert activations_memory(14_000_000_000, 32760, checkpointing=False) == pytest.approx(2e-9 * width * 32760 * 2100)
    assert activations_memory(14_000_000_000, 32760, checkpointing=True) == pytest.approx(2e-9 * width * 32760 * 95)


@pytest.mark.parametrize("variant", [SMALL, LARGE, PICTURE])
@pytest.mark.parametrize("full", [False, True])
def test_choices_fit_and_grow_with_the_card(variant: Variant, full: bool) -> None:
    choices = [choose(variant, card, full) for card in CARDS]
    for card, choice in zip(CARDS, choices, strict=True):
        assert choice.memory <= card
        assert choice.frames <= variant.sampling.frames
    shards = [choice.shards for choice in choices]
    assert shards == sorted(shards, reverse=True)
    for smaller, larger in itertools.pairwise(choices):
        if smaller.shards == larger.shards:
            assert smaller.resolution**2 * smaller.frames <= larger.resolution**2 * larger.frames


def test_sizes_stay_below_what_the_variant_is_made_for() -> None:
    low = replace(SMALL, sampling=SamplingDefaults(480, 832, 49))
    assert choose(low, 80, False).resolution == 480
    assert choose(low, 80, False).frames == 49
    assert choose(SMALL, 80, False).resolution == 720
    assert choose(replace(SMALL, parameters=10_000_000), 80, False).checkpointing is False


def test_mistakes(tmp_path: Path) -> None:
    name, variant = VARIANTS[0]
    with pytest.raises(UserError, match="there is no family"):
        template(name + "x")
    with pytest.raises(UserError, match=f"did you mean '{variant}'"):
        template(name, variant + "x")
    with pytest.raises(UserError, match="nothing fits cards of 2 GB"):
        template(name, variant, card=2)
    write_new(tmp_path / "c.toml", "")
    with pytest.raises(UserError, match="is there already"):
        write_new(tmp_path / "c.toml", "")
    with pytest.raises(UserError, match="No such file or directory"):
        write_new(tmp_path / "no" / "c.toml", "")
