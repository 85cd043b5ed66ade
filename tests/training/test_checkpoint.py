from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError
from kinema.parallel.mesh import World, start
from kinema.runs.checkpoint_list import list_checkpoints
from kinema.runs.checkpoint_load import contents, load, read_meta
from kinema.training.checkpoint import Checkpointer


@pytest.fixture
def world() -> World:
    return start(ParallelConfig(), "cpu")


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "networks": {
            "a.weight": torch.randn(7, 5, generator=generator),
            "a.transposed": torch.randn(3, 4, generator=generator).T,
            "a.odd": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
            "b.bf16": torch.randn(9, generator=generator).bfloat16(),
            "b.fp16": torch.randn(3, generator=generator).half(),
            "b.double": torch.randn(2, 2, generator=generator).double(),
        },
        "optimizer": {"a.step": torch.tensor(12.0), "a.count": torch.tensor([2**40, -1]), "empty": torch.zeros(0, 3)},
        "flags": {"mask": torch.tensor([True, False]), "bytes": torch.arange(5, dtype=torch.uint8)},
    }


def zeros(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: zeros(v) if isinstance(v, dict) else torch.zeros_like(v) for k, v in tensors.items()}


def bits(tensors: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Everything about the tensors, to the bit."""
    found: dict[str, tuple[Any, ...]] = {}
    for group, named in tensors.items():
        for name, t in named.items():
            raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{group}.{name}"] = (tuple(t.shape), t.dtype, raw)
    return found


@pytest.mark.parametrize("asynchronous", [False, True])
def test_everything_comes_back_to_the_bit(world: World, tmp_path: Path, asynchronous: bool) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints", 2, asynchronous, world)
    saved, loaded = state(), zeros(state())
    checkpointer.save(120, saved, {"epoch": 3, "order": [1, 2], "scale": 0.1})
    checkpointer.close()
    latest = checkpointer.latest()
    assert latest is not None and (latest.path.name, latest.step) == ("step-00000120", 120)
    assert checkpointer.load(latest.path, loaded) == {"epoch": 3, "order": [1, 2], "scale": 0.1}
    assert bits(loaded) == bits(saved)
    assert read_meta(latest.path)["epoch"] == 3
    assert contents(latest.path)["networks.b.bf16"] == ((9,), torch.bfloat16)
    assert sorted(p.name for p in latest.path.iterdir()) == ["index.json", "meta.json", "rank-00000.safetensors"]


def test_other_tools_read_the_file(world: World, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    checkpointer = Checkpointer(tmp_path, 2, False, world)
    checkpointer.save(1, state(), {})
    stored = load_file(tmp_path / "step-00000001" / "rank-00000.safetensors")
    assert torch.equal(stored["networks.a.weight"], state()["networks"]["a.weight"])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_training_goes_on_while_it_is_written(tmp_path: Path, device: str) -> None:
    checkpointer = Checkpointer(tmp_path, 5, True, start(ParallelConfig(), device))
    weight = torch.zeros(1_000_000, device=device)
    for step in range(4):
        weight.fill_(step)
        checkpointer.save(step, {"w": weight}, {})
        checkpointer.wait_for_staging()
        weight.fill_(-1.0)
    checkpointer.close()
    assert [checkpoint.step for checkpoint in checkpointer.complete()] == [0, 1, 2, 3]
    for checkpoint in checkpointer.complete():
        checkpointer.load(checkpoint.path, {"w": weight})
        assert torch.equal(weight, torch.full_like(weight, checkpoint.step))


def test_rotation_keeps_the_newest(world: World, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 2, False, world)
    for step in (5, 10, 15, 20):
        checkpointer.save(step, {"w": torch.tensor(float(step))}, {})
    assert [c.step for c in checkpointer.complete()] == [15, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_a_run_that_was_taken_back(world: World, tmp_path: Path) -> None:
    """Resumed from step 10 though 20 was there: its own 20 comes after the old one, and neither replaces the other."""
    checkpointer = Checkpointer(tmp_path, 3, False, world)
    for step, value in ((10, 1.0), (20, 2.0), (15, 3.0), (20, 4.0)):
        checkpointer.save(step, {"w": torch.tensor(value)}, {})
    assert [c.step for c in checkpointer.complete()] == [20, 15, 20]
    latest = checkpointer.latest()
    assert latest is not None and latest.path.name == "step-00000020-1"
    value = torch.zeros(())
    checkpointer.load(latest.path, {"w": value})
    assert value.item() == 4.0


def test_what_a_killed_run_left_is_cleaned_away(world: World, tmp_path: Path) -> None:
    Checkpointer(tmp_path, 2, False, world).save(1, {"w": torch.ones(3)}, {})
    os.rename(tmp_path / "step-00000001", tmp_path / ".writing-step-00000002")
    (tmp_path / ".deleting-step-00000000").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert list_checkpoints(tmp_path) == []
    Checkpointer(tmp_path, 2, False, world)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


KILLED = """
import sys, torch
from pathlib import Path
from kinema.config.schema import ParallelConfig
from kinema.parallel.mesh import start
from kinema.training.checkpoint import Checkpointer
torch.set_num_threads(1)
checkpointer = Checkpointer(Path(sys.argv[1]), 2, True, start(ParallelConfig(), "cpu"))
tensors = {str(i): torch.zeros(2000) for i in range(100)}
step = checkpointer.latest().step if checkpointer.latest() else 0
print("ready", flush=True)
while True:
    step += 1
    for tensor in tensors.values():
        tensor.fill_(step)
    checkpointer.save(step, tensors, {"step": step})
    checkpointer.wait_for_staging()
"""


def test_killed_at_any_moment(world: World, tmp_path: Path) -> None:
    """SIGKILL while checkpoints are written without pause: what is listed is whole, and there is always one."""
    generator = torch.Generator().manual_seed(5)
    before = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        first = time.monotonic()
        while not any(c.step > before for c in list_checkpoints(tmp_path)):
            assert time.monotonic() - first < 60
            time.sleep(0.01)
        time.sleep(torch.rand((), generator=generator).item() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = list_checkpoints(tmp_path)
        assert found and found[-1].step > before
        for checkpoint in found:
            tensors = {str(i): torch.zeros(2000) for i in range(100)}
            assert load(checkpoint.path, tensors) == {"step": checkpoint.step}
            assert all(torch.equal(t, torch.full_like(t, checkpoint.step)) for t in tensors.values())
        before = found[-1].step


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """A file system that refuses to write more than this into a file, as a full one does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("limit", [0, 100_000])
def test_a_disk_that_fills_up(world: World, tmp_path: Path, asynchronous: bool, limit: int) -> None:
    checkpointer = Checkpointer(tmp_path, 1, asynchronous, world)
    tensors = {"w": torch.full((100_000,), 1.0)}
    checkpointer.save(1, tensors, {})
    checkpointer.wait()
    tensors["w"].fill_(2.0)
    with small_files(limit), pytest.raises(UserError) as error:
        checkpointer.save(2, tensors, {})
        checkpointer.wait()
    message = str(error.value)
    for part in (str(tmp_path), "390.6 KiB", "File too large", "Free some space", "step-00000001"):
        assert part in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpointer.load(tmp_path / "step-00000001", tensors)
    assert torch.equal(tensors["w"], torch.full((100_000,), 1.0))
    checkpointer.save(3, tensors, {})
    checkpointer.close()
    assert [c.step for c in checkpointer.complete()] == [3]


def test_too_little_space_is_seen_before_writing(world: World, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 1, True, world)
    with pytest.raises(UserError, match=r"36\.4 TiB to .* are free.*no complete checkpoint yet"):
        checkpointer.save(1, {"w": torch.zeros(1).expand(10**13)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_background_error_is_raised_by_the_next_save(world: World, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 1, True, world)
    with small_files(1000):
        checkpointer.save(1, {"w": torch.ones(10_000)}, {})
        with pytest.raises(UserError, match="File too large"):
            checkpointer.save(2, {"w": torch.ones(10_000)}, {})
    checkpointer.close()


def test_wrong_checkpoints_change_nothing(world: World, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 1, False, world)
    checkpointer.save(1, {"networks": {"a": torch.ones(3), "b": torch.ones(2, 2)}}, {})
    path = tmp_path / "step-00000001"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"a": torch.zeros(3), "c": torch.zeros(3)}, r"no 'networks\.c' among its 2 tensors.*weights only"),
        ({"a": torch.zeros(3), "b": torch.zeros(2, 3)}, r"'networks\.b' as torch\.float32 \[2, 2\].*\[2, 3\]"),
        ({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, r"needs torch\.bfloat16"),
    ]
    for tensors, message in cases:
        with pytest.raises(UserError, match=message):
            checkpointer.load(path, {"networks": tensors})
        assert not tensors["a"].any()
    part = torch.zeros(3)
    checkpointer.load(path, {"networks": {"a": part}})  # a part may be asked for
    assert part.tolist() == [1.0] * 3
    short = torch.zeros(3, dtype=torch.bfloat16)
    checkpointer.load(path, {"networks": {"a": short}}, convert=True)
    assert short.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path / "rank-00000.safetensors", 300), "is damaged"),
        (lambda path: (path / "rank-00000.safetensors").unlink(), "is damaged.*No such file"),
        (lambda path: (path / "index.json").write_text("{"), "index.json cannot be read"),
        (lambda path: (path / "index.json").unlink(), "index.json cannot be read"),
        (lambda path: (path / "meta.json").write_text('{"form'), "no complete checkpoint"),
        (lambda path: (path / "meta.json").write_text('{"format": 99}'), "format 99, this kinema reads format 1"),
    ],
)
def test_damaged_checkpoints(world: World, tmp_path: Path, damage: Any, message: str) -> None:
    checkpointer = Checkpointer(tmp_path, 1, False, world)
    checkpointer.save(1, {"w": torch.ones(1000)}, {})
    damage(tmp_path / "step-00000001")
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        checkpointer.load(tmp_path / "step-00000001", {"w": torch.zeros(1000)})


def test_an_index_cannot_lead_outside(world: World, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "a", 1, False, world)
    checkpointer.save(1, {"w": torch.ones(10)}, {})
    path = tmp_path / "a" / "step-00000001"
    os.rename(path / "rank-00000.safetensors", tmp_path / "outside.safetensors")
    index = json.loads((path / "index.json").read_text())
    index["w"]["chunks"][0]["file"] = "../../outside.safetensors"
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is damaged"):
        checkpointer.load(path, {"w": torch.zeros(10)})


def test_a_directory_that_cannot_be_made(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the checkpoint directory .*file.*run\.dir"):
        Checkpointer(tmp_path / "file" / "checkpoints", 1, False, world)


def test_meta_that_json_cannot_hold(world: World, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 1, True, world)
    with pytest.raises(TypeError):
        checkpointer.save(1, {"w": torch.ones(1)}, {"net": nn.Linear(1, 1)})
    assert list(tmp_path.iterdir()) == []
