"""A gradient that is not finite on one process: all skip the step alike, and the next goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import skip_cases
import torch
from pipeline_cases import Result, write_model
from ranks import on_ranks, result_of
from skip_cases import BAD, MODEL

from kinema.parallel.mesh import World

WAYS = ["dp_replicate2", "dp_shard2", "pp2", "tp2", "sp2"]
CASES = [*(f"{sizes} sample" for sizes in WAYS), "pp2 weight"]
RELEASED = "dp_replicate2 release"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("skipped")
    write_model(MODEL, root)
    on_ranks(2, skip_cases.main, root, [*CASES, RELEASED])
    return root


def alone(root: Path, case: str) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = skip_cases.train(World.alone(), f" {case.split()[1]}", root)
    torch.set_num_threads(threads)
    return result


def assert_weights(ours: Result, theirs: Result) -> None:
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        # AdamW turns the rounding of a gradient near zero into a part of a step of 1e-3.
        assert (ours["weights"][name] - weight).abs().max().item() < 2e-4, name


@pytest.mark.parametrize("case", CASES)
def test_all_skip_the_step(root: Path, case: str) -> None:
    ours, theirs = result_of(root, case), alone(root, case)
    for step, (norms, changed) in enumerate(zip(ours["norms"], ours["changed"], strict=True)):
        assert len(norms) == len(changed) == 2 and norms[0] == pytest.approx(norms[1], nan_ok=True)
        for count, of, _ in changed:
            assert of > 60 and count == (0 if step == BAD else of), f"step {step}: {count} of {of} tensors changed"
        assert math.isfinite(norms[0]) == (step != BAD)
    assert ours["non_finite"] == [0, 0]
    for key, good in (("losses", ours["losses"]), ("norms", [norms[0] for norms in ours["norms"]])):
        want = [one if key == "losses" else one[0] for one in theirs[key]]
        assert [good[0], good[2]] == pytest.approx([want[0], want[2]], rel=1e-5), key
    assert_weights(ours, theirs)


def test_released_weights_are_skipped_one_by_one(root: Path) -> None:
    """Of what is updated within the backward pass, the weight whose gradient is not finite, on both replicas."""
    ours, theirs = result_of(root, RELEASED), alone(root, RELEASED)
    assert ours["skipped"] == [[0, 0], [1, 1], [0, 0]]
    for step, changed in enumerate(ours["changed"]):
        for _, _, same in changed:
            skipped = [name for name in same if not name.startswith("ema.")]
            state = [f"optimizer.{ours['last']}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")]
            assert skipped == ([] if step != BAD else [f"networks.{ours['last']}", *state]), f"step {step}"
    assert ours["non_finite"] == [0, 0]
    assert_weights(ours, theirs)
