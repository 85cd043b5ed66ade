"""Killed at any moment, a run goes on to the same numbers, bit for bit."""

import random
import shutil
import signal
import time

import pytest
import torch
from runs import final_state, finish, make_world, metrics, start_training, write_config

STEPS = 24


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """A world and a run in it that nobody stopped."""
    root = tmp_path_factory.mktemp("resume")
    make_world(root)
    config = write_config(root, STEPS)
    finish(start_training(config))
    (root / "run").rename(root / "unbroken")
    return root, config, final_state(root / "unbroken"), metrics(root / "unbroken")


def assert_same(run, unbroken_state, unbroken_metrics):
    state = final_state(run)
    assert state.keys() == unbroken_state.keys()
    assert any(name.startswith("ema.") for name in state) and any(name.startswith("optimizer.") for name in state)
    different = [name for name, value in state.items() if not torch.equal(value, unbroken_state[name])]
    assert different == []
    ours = [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["examples"]) for row in metrics(run)]
    theirs = [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["examples"]) for row in unbroken_metrics]
    assert ours == theirs


def kill_until_done(config, kills, moment):
    """SIGKILL ``kills`` times at moments that ``moment(process)`` waits for, then let the run end."""
    for _ in range(kills):
        process = start_training(config)
        moment(process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start_training(config))


def test_killed_runs_end_with_the_same_bits(unbroken):
    root, config, state, rows = unbroken
    shutil.rmtree(root / "run", ignore_errors=True)
    draw = random.Random(0)

    def some_steps_in(process):
        lines = root / "run" / "metrics.jsonl"
        before = lines.read_text().count("\n") if lines.exists() else 0
        wanted = before + draw.randint(1, 6)
        while process.poll() is None and (not lines.exists() or lines.read_text().count("\n") < wanted):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)

    kill_until_done(config, 2, some_steps_in)
    assert_same(root / "run", state, rows)


@pytest.mark.slow
def test_ten_kills_at_random_moments(unbroken):
    root, config, state, rows = unbroken
    shutil.rmtree(root / "run", ignore_errors=True)
    draw = random.Random(1)

    def any_moment(process):
        deadline = time.monotonic() + draw.uniform(3.0, 15.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    kill_until_done(config, 10, any_moment)
    assert_same(root / "run", state, rows)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_quits(unbroken, number):
    root, config, state, rows = unbroken
    shutil.rmtree(root / "run", ignore_errors=True)
    process = start_training(config)
    lines = root / "run" / "metrics.jsonl"
    while process.poll() is None and (not lines.exists() or lines.read_text().count("\n") < 4):
        time.sleep(0.01)
    process.send_signal(number)
    finish(process)
    stopped_at = metrics(root / "run")[-1]["step"]
    assert 4 <= stopped_at < STEPS
    assert (root / "run" / "checkpoints" / f"step-{stopped_at:08d}").exists()
    finish(start_training(config))
    assert_same(root / "run", state, rows)


@pytest.mark.slow
def test_touched_files_save_and_quit(unbroken):
    root, config, state, rows = unbroken
    shutil.rmtree(root / "run", ignore_errors=True)
    (root / "run").mkdir()
    (root / "run" / "save_quit").touch()
    finish(start_training(config))
    assert metrics(root / "run")[-1]["step"] == 1
    assert (root / "run" / "checkpoints" / "step-00000001").exists()
    assert not (root / "run" / "save_quit").exists()
    finish(start_training(config))
    assert_same(root / "run", state, rows)
