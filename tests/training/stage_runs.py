"""Stages of a training on a tiny Open-Sora: their configurations, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kinema.config.schema import Config, ModelConfig
from kinema.families.open_sora import OpenSora
from kinema.families.registry import open_family
from kinema.networks.open_sora import OpenSoraTransformer
from kinema.runs.checkpoint_load import contents, load
from kinema.shapes.world import training_clips, write_clips
from kinema.training.train import train

BASE: dict[str, Any] = {
    "model": {"family": "open_sora", "text_length": 16},
    "data": {"buckets": {"sizes": [[32, 32]], "frames": [9], "fps": 16}},
    "training": {"steps": 2, "batch_size": 2, "precision": "fp32", "ema": {"decay": 0.5}},
    "optimizer": {"lr": 1e-3},
    "export": {"dtype": "fp32"},
    "monitoring": {"tensorboard": False},
}


def configured(root: Path, name: str, **tables: dict[str, Any]) -> Config:
    place = {
        "run": {"dir": str(root / name), "threads": 1},
        "model": {"path": str(root / "model")},
        "data": {"sources": [{"path": str(root / "clips")}], "cache": str(root / "cache")},
    }
    names = {*BASE, *place, *tables}
    return Config.model_validate(
        {one: {**BASE.get(one, {}), **place.get(one, {}), **tables.get(one, {})} for one in names}
    )


def first_stage(root: Path) -> Path:
    """A folder with clips, a tiny model, and the run of a first stage, which is told no frames."""
    write_clips(root / "clips", list(training_clips(3)), frames=9, size=32)
    OpenSora.tiny(root / "model", "v2", seed=5)
    train(configured(root, "first", model={"cond_embed": False}, checkpoint={"every_steps": 1}))
    return root


def network_of(root: Path, device: str = "cpu", **model: Any) -> OpenSoraTransformer:
    settings = {"family": "open_sora", "path": str(root / "model"), **model}
    return open_family(ModelConfig.model_validate(settings)).load("network", device, None)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in contents(checkpoint).items()}
    load(checkpoint, tensors)
    return tensors
