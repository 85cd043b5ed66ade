"""A process of several that dies, hangs or comes back on fewer devices, as a user meets it: through torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import final_state, finish, make_world, metrics, start_training, write_config

pytestmark = [pytest.mark.timeout(2400)]
ENDS_WITHIN = 600
"""Seconds after which a run that should have ended is called hung, however busy the machine is."""


def on_time(seconds: float) -> float:
    """What a limit in seconds is on a machine that has more to do than it can."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def workers(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """{rank: pid} of the processes that torchrun started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for pid in children:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [one for one in environment if one.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0][5:])] = int(pid)
    return found


HANG = """
import os, time

from kinema.cli import main
from kinema.objectives.flow import flow_matching
from kinema.plugins import OBJECTIVES


def while_it_hangs():
    while True:
        time.sleep(0.1)


def objective(config, family):
    real = flow_matching(config, family)

    def compute(batch, networks, draws):
        if os.environ["RANK"] == "1" and draws.step == 5:
            while_it_hangs()
        return real(batch, networks, draws)

    return compute


OBJECTIVES.built_in["flow"] = "__main__:objective"
main()
"""


def torchrun(config: Path, *flags: str, ranks: int = 2, script: Path | None = None) -> subprocess.Popen[str]:
    what = ["-m", "kinema"] if script is None else [str(script)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *flags]
    return subprocess.Popen(
        [*launcher, *what, "train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def wait_for_step(launcher: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + ENDS_WITHIN
    while time.monotonic() < deadline and launcher.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    launcher.terminate()
    raise AssertionError(f"step {step} was not reached: {launcher.communicate()[0][-3000:]}")


@pytest.mark.slow
def test_a_killed_process_ends_all_and_is_named(tmp_path: Path) -> None:
    make_world(tmp_path)
    launcher = torchrun(write_config(tmp_path, steps=4000))
    wait_for_step(launcher, tmp_path / "run", 4)
    killed = time.monotonic()
    os.kill(workers(launcher)[1], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=ENDS_WITHIN)
    assert time.monotonic() - killed < on_time(60)
    assert launcher.returncode != 0
    # torchrun notices by itself, and may be sooner than the processes.
    by_torchrun = r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9"
    assert re.search(rf"process 1 \(.*\) has been silent|{by_torchrun}", output), output[-3000:]


@pytest.mark.slow
def test_a_stopped_process_ends_all_and_is_named(tmp_path: Path) -> None:
    """It does not die: nobody but the watch notices."""
    make_world(tmp_path)
    launcher = torchrun(write_config(tmp_path, steps=4000))
    wait_for_step(launcher, tmp_path / "run", 4)
    stopped = time.monotonic()
    victim = workers(launcher)[1]
    os.kill(victim, signal.SIGSTOP)
    output, _ = launcher.communicate(timeout=ENDS_WITHIN)
    assert time.monotonic() - stopped < on_time(60)
    assert launcher.returncode != 0 and f"process 1 ({os.uname().nodename}, pid {victim})" in output, output[-3000:]


@pytest.mark.slow
def test_a_process_that_hangs_says_where(tmp_path: Path) -> None:
    """A hang in one process's own code: the others wait for it in the all-reduce."""
    make_world(tmp_path)
    (tmp_path / "hang.py").write_text(HANG)
    launcher = torchrun(write_config(tmp_path, steps=4000), script=tmp_path / "hang.py")
    wait_for_step(launcher, tmp_path / "run", 5)
    hung = time.monotonic()
    output, _ = launcher.communicate(timeout=ENDS_WITHIN)
    assert time.monotonic() - hung < on_time(75)  # of which 45 are patience
    assert launcher.returncode != 0
    assert "process 1 stands here" in output and "hang.py" in output and "while_it_hangs" in output, output[-3000:]
    assert "hangs in 'step 6: forward 1 of 1'" in output


@pytest.mark.slow
def test_restarted_by_torchrun_it_ends_with_the_right_result(tmp_path: Path) -> None:
    make_world(tmp_path)
    config = write_config(tmp_path, steps=14)
    finish(start_training(config, ranks=2))
    whole, losses = final_state(tmp_path / "run"), metrics(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "unbroken")
    launcher = torchrun(config, "--max-restarts", "1")
    wait_for_step(launcher, tmp_path / "run", 8)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=ENDS_WITHIN)
    assert launcher.returncode == 0, output[-3000:]
    again = metrics(tmp_path / "run")
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in losses]
    state = final_state(tmp_path / "run")
    assert state.keys() == whole.keys() and all(torch.equal(state[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_from_four_processes_to_two_to_one(tmp_path: Path) -> None:
    """The same order of the data, and losses that agree with those of a run that never stopped."""
    make_world(tmp_path)
    shards = "\n[parallel]\ndp_shard = {}\n"
    finish(start_training(write_config(tmp_path, steps=15)))
    unbroken = metrics(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "unbroken")
    reached = 0
    for ranks, sharded in ((4, 2), (2, 2), (1, 1)):
        config = write_config(tmp_path, steps=15, extra=shards.format(sharded))
        launcher = torchrun(config, ranks=ranks) if ranks > 1 else start_training(config)
        if ranks > 1:
            reached += 5
            wait_for_step(launcher, tmp_path / "run", reached)
            for pid in workers(launcher).values():
                os.kill(pid, signal.SIGKILL)
            launcher.communicate(timeout=ENDS_WITHIN)
            assert launcher.returncode != 0
        else:
            finish(launcher)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 16))
    for ours, theirs in zip(rows, unbroken, strict=True):
        assert (ours["examples"], ours["epoch"]) == (theirs["examples"], theirs["epoch"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]
