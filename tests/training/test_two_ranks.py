"""Two ranks and one process with the same global batch: the same losses and weights."""

import pytest
from runs import final_state, finish, make_world, metrics, start_training, write_config


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param("", id="replicated"),
        pytest.param("\n[parallel]\ndp_shard = 2\n", id="sharded", marks=pytest.mark.slow),
        pytest.param("\n[parallel]\nsp = 2\n", id="sequence", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one_process(tmp_path, parallel):
    make_world(tmp_path)
    config = write_config(tmp_path, steps=6)
    finish(start_training(config))
    (tmp_path / "run").rename(tmp_path / "one")
    finish(start_training(write_config(tmp_path, steps=6, extra=parallel), ranks=2))

    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "run")
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert (b["examples"], b["lr"]) == (a["examples"], a["lr"])
    # The sharded state is read by going on with one process, which writes it whole.
    finish(start_training(write_config(tmp_path, steps=7)))
    (tmp_path / "run").rename(tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "run")
    finish(start_training(write_config(tmp_path, steps=7)))
    ours, theirs = final_state(tmp_path / "two"), final_state(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith(("networks.", "ema.")):
            assert ours[name].norm().item() == pytest.approx(value.norm().item(), rel=1e-5, abs=1e-7), name
