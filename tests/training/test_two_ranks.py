"""Two ranks and one process with the same global batch: the same losses and weights."""

import pytest
from runs import final_state, finish, make_world, metrics, start_training, write_config

STEPS = 6


def gone_on_alone(root, run):
    """The whole state of a run's newest checkpoint, read and written by one process that goes on for one step."""
    run.rename(root / "run")
    finish(start_training(write_config(root, STEPS + 1)))
    state = final_state(root / "run")
    (root / "run").rename(run)
    return state


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A world, the metrics of a run by one process, and its state a step later."""
    root = tmp_path_factory.mktemp("ranks")
    make_world(root)
    finish(start_training(write_config(root, STEPS)))
    rows = metrics(root / "run")
    (root / "run").rename(root / "one")
    return root, rows, gone_on_alone(root, root / "one")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", ["", "\n[parallel]\ndp_shard = 2\n"], ids=["replicated", "sharded"])
def test_two_ranks_are_one_process(one_process, parallel):
    root, rows, state = one_process
    finish(start_training(write_config(root, STEPS, extra=parallel), ranks=2))
    ours = metrics(root / "run")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(rows, ours, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert (b["examples"], b["lr"]) == (a["examples"], a["lr"])
    (root / "run").rename(root / f"two{len(parallel)}")
    two = gone_on_alone(root, root / f"two{len(parallel)}")
    assert two.keys() == state.keys()
    for name, value in state.items():
        if name.startswith(("networks.", "ema.")):
            assert two[name].norm().item() == pytest.approx(value.norm().item(), rel=1e-5, abs=1e-7), name
