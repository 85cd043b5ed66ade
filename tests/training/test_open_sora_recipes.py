"""The recipes of Open-Sora's stages: each is valid, starts from the one before, and trains, on a tiny model."""

from __future__ import annotations

import csv
import math
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kinema.config.load import load_config
from kinema.config.schema import Config
from kinema.families.open_sora import OpenSora
from kinema.families.registry import open_family
from kinema.networks.open_sora import OpenSoraTransformer
from kinema.runs.exports import list_exports
from kinema.shapes.world import caption, render, training_clips, write_clips
from kinema.training.train import train

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "open_sora").glob("*.toml"))
LENGTHS = (1, 5, 9)


def test_the_stages_start_from_one_another_with_the_authors_numbers() -> None:
    configs = [load_config(path) for path in RECIPES]
    assert [path.stem for path in RECIPES] == ["1-image", "2-256px", "3-768px", "4-i2v"]
    assert configs[0].model.random_weights and configs[0].model.network.path is None
    for before, after in pairwise(configs):
        assert after.model.network.path == str(before.run.dir)
    assert [config.model.cond_embed for config in configs] == [False, False, False, True]
    assert [config.optimizer.lr for config in configs] == [1e-5, 5e-5, 5e-5, 1e-5]
    for config in configs:
        dropped = config.training.caption_dropout
        assert isinstance(dropped, dict)
        assert math.prod(dropped.values()) == pytest.approx(0.1, abs=1e-4)
        assert (config.optimizer.eps, config.optimizer.weight_decay, config.training.clip_norm) == (1e-15, 0, 1)
        assert config.training.ema is not None and config.training.ema.decay == 0.9999
    assert configs[-1].model.conditions == {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}
    lengths = [config.data.sources[0].buckets.lengths for config in configs]  # type: ignore[union-attr]
    assert lengths == [(1,), tuple(range(1, 130, 4)), tuple(range(1, 130, 4)), tuple(range(5, 130, 4))]


def made_small(recipe: Path, root: Path) -> Config:
    """The recipe on a tiny model, on small clips, for two steps; its lengths up to 9 at one small resolution."""
    config: dict[str, Any] = tomllib.loads(recipe.read_text())
    before = config["model"].get("network")
    if before is not None:
        before["path"] = str(root / Path(before["path"]).name)
    config["run"] |= {"dir": str(root / Path(config["run"]["dir"]).name), "threads": 1}
    config["model"] |= {"path": str(root / "model"), "text_length": 24}
    config["data"] |= {"cache": str(root / "cache")}
    config["data"]["sources"][0]["path"] = str(root / "videos.csv")
    known = {length for lengths in config["data"]["buckets"]["table"].values() for length in lengths}
    config["data"]["buckets"]["table"] = {"32px": {str(n): [1.0, 2] for n in LENGTHS if str(n) in known}}
    config["training"] |= {"steps": 2, "precision": "fp32"}
    config["schedule"]["warmup_steps"] = 1
    config["monitoring"] = {"tensorboard": False}
    del config["parallel"], config["preview"]
    return Config.model_validate(config)


def write_pictures(folder: Path) -> list[Path]:
    """Two pictures of 64 x 64 pixels with captions."""
    folder.mkdir()
    for combo, seed in training_clips(2):
        path = folder / f"{seed[1]}.png"
        Image.fromarray(render(combo, seed)[0]).save(path)
        path.with_suffix(".txt").write_text(caption(combo))
    return sorted(folder.glob("*.png"))


def write_table(root: Path) -> None:
    """Pictures and clips of two lengths, and a table in Open-Sora's columns."""
    clips = list(training_clips(4))
    paths = dict.fromkeys(write_pictures(root / "pictures"), (1, 64))
    paths |= dict.fromkeys(write_clips(root / "long", clips[:2], frames=14, size=32), (14, 32))
    paths |= dict.fromkeys(write_clips(root / "short", clips[2:], frames=5, size=32), (5, 32))
    columns = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps", "score_vmafmotion")
    with open(root / "videos.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for path, (frames, size) in paths.items():
            text = path.with_suffix(".txt").read_text().strip()
            rows.writerow([path.relative_to(root), text, frames, size, size, 1, size * size, 16, 4])


def test_every_stage_trains(tmp_path: Path) -> None:
    write_table(tmp_path)
    OpenSora.tiny(tmp_path / "model", "v2", seed=1)
    for recipe in RECIPES:
        config = made_small(recipe, tmp_path)
        run = train(config)
        network = open_family(
            config.model.model_copy(
                update={"network": config.model.network.model_copy(update={"path": str(run)}), "random_weights": False}
            )
        ).load("network", "cpu", None)
        assert isinstance(network, OpenSoraTransformer)
        assert (network.cond_in is not None) is (recipe.stem == "4-i2v")
        assert len(list_exports(run / "exports")) == 1
