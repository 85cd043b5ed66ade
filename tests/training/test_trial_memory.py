"""What a piece of work takes of the memory, measured on this machine."""

import math

import psutil
import pytest
import torch

from kinema.machine import left_in, memory_left
from kinema.training.trial_memory import TrialMemory

MIB = 2**20


def test_the_peak_counts_not_the_end():
    memory = TrialMemory(torch.device("cpu"), budget=1000 * MIB)

    def work():
        first = torch.ones(200 * MIB // 4)
        second = first + 1
        del first
        second.sum()

    assert memory.share_of(work) == pytest.approx(0.4, abs=0.03)
    assert memory.share_of(lambda: torch.ones(100 * MIB // 4)) == pytest.approx(0.1, abs=0.02)
    assert memory.share_of(lambda: None) < 0.01


def test_what_cannot_be_allocated_does_not_fit():
    memory = TrialMemory(torch.device("cpu"))
    assert memory.share_of(lambda: torch.empty(2**50, dtype=torch.uint8)) == math.inf
    assert memory.share_of(lambda: bytearray(2**50)) == math.inf
    with pytest.raises(RuntimeError, match="shape"):
        memory.share_of(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_the_budget_is_less_than_what_is_left():
    left = memory_left()
    assert 0 < left <= psutil.virtual_memory().total
    one, four = (TrialMemory(torch.device("cpu"), processes=n).budget for n in (1, 4))
    assert 0 < one < psutil.virtual_memory().available
    assert four == pytest.approx(one / 4, rel=0.3)


def test_a_control_group_limits(tmp_path):
    files = ("memory.max", "memory.current", "inactive_file")
    assert left_in(tmp_path, files) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{700 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {100 * MIB}\nactive_file 7\n")
    assert left_in(tmp_path, files) is None
    (tmp_path / "memory.max").write_text(f"{1000 * MIB}\n")
    assert left_in(tmp_path, files) == 400 * MIB
