"""What is refused of kernels and types of computing when a training starts."""

from __future__ import annotations

from typing import Any

import pytest

from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.families.registry import open_family
from kinema.parallel.mesh import World
from kinema.training.preflight import check_compute


def check(family: str = "wan", variant: str = "t2v-1.3b", **tables: Any) -> None:
    training = {"steps": 1, "precision": "fp32"} | tables.pop("training", {})
    model = {"family": family, "variant": variant}
    given = {"model": model, "data": {"sources": [{"path": "."}]}, "training": training}
    config = Config.model_validate(given | tables)
    check_compute(config, open_family(config.model), World.alone())


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"training": {"attention": "flash"}}, "training.attention: flash runs on NVIDIA GPUs, and this is cpu"),
        (
            {"training": {"attention": "cudnn"}, "parallel": {"sp": 2, "attention": "ring"}},
            'training.attention = "cudnn": not with parallel.attention = "ring".*ulysses',
        ),
        ({"training": {"float8": "tensorwise"}}, "needs an Ada, Hopper or newer GPU, and this is cpu"),
        ({"training": {"float8": "tensorwise"}, "adapter": {}}, 'frozen weights too.*model.network.dtype = "fp8"'),
        ({"training": {"fuse_qkv": True}, "adapter": {}}, r"fuse_qkv = true: not with \[adapter\]"),
        ({"training": {"fuse_qkv": True}, "parallel": {"tp": 2}}, "fuse_qkv = true: not with parallel.tp = 2"),
        (
            {"training": {"fuse_qkv": True}, "family": "z_image", "variant": "base"},
            "training.fuse_qkv: no attention of z_image",
        ),
    ],
)
def test_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(**tables)


def test_taken() -> None:
    check()
    check(training={"fuse_qkv": True})
    check(training={"attention": "sdpa"}, parallel={"sp": 2, "attention": "ring"})
