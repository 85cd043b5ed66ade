"""Gradient release and state in the host's memory in real runs, and what they are refused with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import final_state, make_world, metrics, write_config

from kinema.config.load import load_config
from kinema.config.schema import Config
from kinema.errors import ConfigError
from kinema.parallel.mesh import Sizes
from kinema.training.train import train
from kinema.training.update_checks import check_steps, why_not_updated

RELEASED = {"optimizer.gradient_release": True, "training.clip_norm": None}


def config_of(**changes: Any) -> Config:
    tables: dict[str, dict[str, Any]] = {
        "model": {"family": "wan", "variant": "t2v-1.3b", "random_weights": True},
        "data": {"sources": [{"path": "nowhere"}]},
        "training": {"steps": 1, "batch_size": 4},
        "optimizer": {},
    }
    for key, value in changes.items():
        table, _, name = key.partition(".")
        tables[table][name] = value
    return Config.model_validate(tables)


@pytest.mark.parametrize(
    ("changes", "sizes", "says"),
    [
        ({"training.clip_norm": 1.0}, {}, r"training\.clip_norm = 1\.0: .* training\.clip_norm = \"none\""),
        ({"training.micro_batch_size": 2}, {}, r"training\.micro_batch_size = 2: .* Leave it out"),
        ({"training.precision": "fp16"}, {}, r".*\"fp16\": .* \"bf16\""),
        ({"training.batch_size": "auto"}, {}, r".*batch_size = \"auto\": .* Give a number"),
        ({}, {"pp": 2}, r"parallel\.pp = 2: "),
        ({}, {"tp": 2}, r"parallel\.tp = 2: .* pieces"),
        ({}, {"dp_shard": 2}, r"parallel\.dp_shard = 2: .* without it"),
    ],
)
def test_what_release_excludes_is_refused(changes: dict[str, Any], sizes: dict[str, int], says: str) -> None:
    config = config_of(**{**RELEASED, **changes})
    reason = why_not_updated(config, Sizes(**sizes))
    assert reason is not None and re.match(r"optimizer\.gradient_release = true: not with " + says, reason)


def test_state_by_lines_is_refused_where_peers_share_matrices() -> None:
    for changes in (
        {"optimizer.type": "generic", "optimizer.first_moment": "subspace"},
        {"optimizer.type": "generic", "optimizer.second_moment": "subset_norm"},
        {"optimizer.type": "muon", "optimizer.variant": "normuon"},
    ):
        key, value = list(changes.items())[1]
        reason = why_not_updated(config_of(**changes), Sizes(tp=2))
        assert reason is not None and reason.startswith(f'{key} = "{value}": not with parallel.tp = 2: ')
        assert why_not_updated(config_of(**changes), Sizes(dp_shard=2, pp=2)) is None


def test_what_goes_with_release() -> None:
    assert why_not_updated(config_of(**RELEASED), Sizes(dp_replicate=2, sp=2)) is None
    # Two devices with two samples each run one micro-batch.
    two_each = config_of(**RELEASED, **{"training.micro_batch_size": 2})
    assert why_not_updated(two_each, Sizes(dp_replicate=2)) is None
    check_steps(config_of(**RELEASED))


@pytest.mark.parametrize("key", ["gradient_release", "state_on_cpu"])
def test_optimisers_that_look_at_all_weights_are_refused(key: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match=rf'optimizer\.{key} = true: not with type = "prodigy"'):
        check_steps(config_of(**{"optimizer.type": "prodigy", f"optimizer.{key}": True}))


def test_a_run_with_release_is_a_run_without(tmp_path: Path) -> None:
    """Weights, averages and the optimiser's state, to the bit; also stopped and resumed."""
    make_world(tmp_path, clips=8)
    config = write_config(tmp_path, 6)

    def run(name: str, *flags: tuple[str, Any]) -> Path:
        fixed = (("training.clip_norm", "none"), ("schedule.decay", "constant"), ("schedule.warmup_steps", "0"))
        return train(load_config(config, [*fixed, ("run.dir", str(tmp_path / name)), *flags]))

    own = (("optimizer.gradient_release", "true"), ("optimizer.state_on_cpu", "true"))
    plain, released = run("plain"), run("released", *own)
    run("resumed", *own, ("training.steps", "3"))
    resumed = run("resumed", *own)
    want = final_state(plain)
    for other in (released, resumed):
        state = final_state(other)
        assert state.keys() == want.keys() and len(state) > 100
        assert [name for name, value in state.items() if not torch.equal(value, want[name])] == []
    rows = list(zip(metrics(plain), metrics(released), strict=True))
    assert [one["loss"] for one, _ in rows] == [other["loss"] for _, other in rows]
    assert [other["grad_norm"] for _, other in rows] == pytest.approx([one["grad_norm"] for one, _ in rows], rel=1e-5)
    assert all(other["skipped_updates"] == 0 and "skipped_updates" not in one for one, other in rows)
    assert json.loads((resumed / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
