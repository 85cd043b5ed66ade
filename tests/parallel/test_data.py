"""Two gloo ranks, replicated and sharded, against one process: the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import parallel_cases
import pytest
import torch
from ranks import on_ranks

from kinema.config.schema import ParallelConfig
from kinema.errors import UserError
from kinema.optim.ema import Ema
from kinema.parallel.data import shard
from kinema.parallel.mesh import Sizes, World, start
from kinema.runs.checkpoint_list import list_checkpoints
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.state import load_training_state, training_state

pytestmark = [pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world() -> World:
    return start(ParallelConfig(), "cpu")


def write_single(world: World, directory: Path) -> None:
    """Three steps of one process, saved: what the ranks resume from."""
    wan = parallel_cases.prepared(world, parallel_cases.network())
    optimizer, ema = parallel_cases.adamw(wan), Ema(named_trainables({"network": wan}).items(), 0.9)
    parallel_cases.fit(world, wan, optimizer=optimizer, ema=ema)
    checkpointer = Checkpointer(directory / "single", 2, False, world)
    checkpointer.save(3, training_state({"network": wan}, [optimizer], ema), {"note": "single"})
    checkpointer.close()


def launch(world: World, directory: Path, ranks: int, plans: list[str]) -> Path:
    """Run all cases on several processes; results are files in the directory."""
    write_single(world, directory)
    on_ranks(ranks, parallel_cases.main, directory, plans)
    return directory


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(world, tmp_path_factory.mktemp("two"), 2, ["2x1", "1x2"])


def result(directory: Path, plan: str, case: str) -> dict[str, Any]:
    return torch.load(directory / f"{plan}-{case}.pt", weights_only=True)


def assert_same_training(got: dict[str, Any], want: dict[str, Any], rel: float = 1e-5) -> None:
    assert got["norms"] == pytest.approx(want["norms"], rel=rel)
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        assert got["weights"][name].shape == weight.shape
        assert got["weights"][name].norm().item() == pytest.approx(weight.norm().item(), rel=rel), name
        # AdamW turns the rounding of a gradient near zero into a part of a step of 1e-2.
        assert (got["weights"][name] - weight).abs().max().item() < max(2e-3, rel), name


PLANS = pytest.mark.parametrize("plan", ["2x1", "1x2"])


@PLANS
@pytest.mark.parametrize("case", ["full", "away", "accumulated", "lora", "autocast", "averaged", "matrices"])
def test_equals_one_process(two: Path, world: World, tmp_path: Path, plan: str, case: str) -> None:
    got, want = result(two, plan, case), getattr(parallel_cases, case)(world, tmp_path)
    # FSDP2's hooks change the order in which autograd sums the gradients of the text, in bf16 under autocast.
    assert_same_training(got, want, rel=1e-2 if case == "autocast" else 1e-5)
    if case == "averaged":
        torch.testing.assert_close(got["swapped"], want["swapped"], rtol=1e-4, atol=1e-5)
        assert (got["own"] - got["swapped"]).abs().min() > 1e-3  # the averages were really in the network
    else:
        start_weights = parallel_cases.network(lora=case == "lora").state_dict()
        if case == "matrices":  # of each of its networks
            start_weights = {name: start_weights[name.split(".", 1)[1]] for name in got["weights"]}
        moved = [(weight - start_weights[name]).norm() for name, weight in got["weights"].items()]
        assert all(distance > 1e-3 for distance in moved)


@PLANS
def test_clipping_was_in_force(two: Path, plan: str) -> None:
    assert min(result(two, plan, "full")["norms"]) > 0.5


@PLANS
def test_resume_across_numbers_of_ranks(two: Path, world: World, plan: str, tmp_path: Path) -> None:
    """One process -> two ranks -> one process goes on like one process alone, to the bit where nothing is summed."""
    got = result(two, plan, "resumed")
    assert got["meta"] == {"note": "single"}

    def fresh() -> tuple[Any, ...]:
        wan = parallel_cases.prepared(world, parallel_cases.network())
        return wan, parallel_cases.adamw(wan), Ema(named_trainables({"network": wan}).items(), 0.9)

    wan, optimizer, ema = fresh()
    norms = parallel_cases.fit(world, wan, steps=6, optimizer=optimizer, ema=ema)
    want = {"norms": norms[3:], "weights": parallel_cases.whole(dict(wan.named_parameters()))}
    assert_same_training(got, want)

    loaded, loaded_optimizer, loaded_ema = fresh()
    written = list_checkpoints(two / f"resumed-{plan[-1]}")[-1]
    checkpointer = Checkpointer(tmp_path, 2, False, world)
    meta = load_training_state(checkpointer, written.path, {"network": loaded}, [loaded_optimizer], loaded_ema)
    assert meta["norms"] == got["norms"]
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, got["weights"][name]), name
    norms = parallel_cases.fit(world, wan, first=6, optimizer=optimizer, ema=ema)
    loaded_norms = parallel_cases.fit(world, loaded, first=6, optimizer=loaded_optimizer, ema=loaded_ema)
    assert_same_training(
        {"norms": loaded_norms, "weights": loaded_ema.state()}, {"norms": norms, "weights": ema.state()}
    )


@PLANS
def test_overflow_on_one_rank_is_seen_by_all(two: Path, plan: str) -> None:
    assert result(two, plan, "not_finite")["finite"] == [False, False]


@PLANS
def test_full_disk_on_one_rank(two: Path, plan: str) -> None:
    got = result(two, plan, "disk_full_on_one")
    assert got["kept"] == [[1], [1]]
    assert got["left"] == ["step-00000001", "step-00000003"]
    for message in got["messages"]:
        assert f"full-{plan[-1]}" in message and "KiB" in message and "step-00000001" in message


def test_parameters_that_some_ranks_use(two: Path) -> None:
    got = result(two, "2x1", "partly_used")
    assert got["everyone"].tolist() == [3.0] * 3
    assert got["first"].tolist() == [5.0] * 3
    assert got["nobody"] is None


def test_gradient_release_of_replicas(two: Path, world: World, tmp_path: Path) -> None:
    """The same weights as one process comes to, and never more than some of the gradients."""
    got, want = result(two, "2x1", "released"), parallel_cases.released(world, tmp_path)
    assert_same_training(got, want)
    assert 0 < got["share"] < 0.7


def test_clipping_mixed_gradients(two: Path) -> None:
    got = result(two, "2x1", "mixed_gradients")
    norm = torch.cat([value.reshape(-1) for value in got["values"]]).norm().item()
    assert got["norms"] == pytest.approx([norm, norm], rel=1e-12)
    for value, clipped in zip(got["values"], got["clipped"].values(), strict=True):
        torch.testing.assert_close(clipped, value * 1.5 / norm, rtol=1e-6, atol=0)


def test_different_weights_are_refused(two: Path) -> None:
    messages = result(two, "2x1", "different_weights")["messages"]
    assert all("process 1" in message and "blocks.1.ffn.net.2.bias" in message for message in messages)


def test_collectives(two: Path) -> None:
    got = result(two, "2x1", "collectives")
    assert got["broadcast"] == ["from 0", "from 0"]
    assert got["gather"] == [0, 10]
    assert got["float"] == 2.0
    assert got["tensor"].tolist() == [2.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["2x2", "1x4", "4x1"])
def test_four_ranks(world: World, tmp_path: Path, plan: str) -> None:
    launch(world, tmp_path, 4, [plan])
    for case in ("full", "accumulated", "lora", "averaged"):
        assert_same_training(result(tmp_path, plan, case), getattr(parallel_cases, case)(world, tmp_path))
    assert result(tmp_path, plan, "not_finite")["finite"] == [False] * 4


def test_sharding_needs_one_type() -> None:
    """Seen before any communication."""
    from torch.distributed.device_mesh import DeviceMesh

    wan = parallel_cases.network()
    wan.proj_out.to(torch.bfloat16)
    world = replace(World.alone(), sizes=Sizes(dp_shard=2), mesh=object.__new__(DeviceMesh))
    with pytest.raises(UserError, match=r"bfloat16 and float32.*dp_shard = 2.*model\.network\.dtype"):
        shard(wan, {"blocks": wan.blocks}, world)
