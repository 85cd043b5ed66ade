"""``batch_size = "auto"`` on a real run: a tiny network, its memory measured on this machine."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from runs import final_state, finish, make_world, metrics, start_training, write_config

from kinema.config.load import load_config
from kinema.config.schema import Config
from kinema.data.batch_sizes import tokens_of
from kinema.data.buckets import Bucket
from kinema.data.lengths import CAUSAL
from kinema.errors import UserError
from kinema.families.registry import open_family
from kinema.optim.scale import LossScale
from kinema.parallel.mesh import start
from kinema.parallel.watch import Watch
from kinema.training.auto_batch import find_batch_sizes
from kinema.training.loop import train_step
from kinema.training.preflight import resolve
from kinema.training.resume import ResumeOptions
from kinema.training.train import Run, train

MIB = 2**20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("auto")
    make_world(root)
    return root


def configured(root: Path, name: str, **overrides: str) -> Config:
    flags = [("run.dir", str(root / name)), *((key.replace("__", "."), value) for key, value in overrides.items())]
    return load_config(write_config(root), flags)


def prepared(config: Config) -> Run:
    family = open_family(config.model)
    place = start(config.parallel)
    run = Run(resolve(config, place.device), ResumeOptions(), family, place, Watch(place))
    run.prepare()
    run.close()
    return run


@pytest.fixture(scope="module")
def small_run(world: Path) -> Run:
    return prepared(configured(world, "small"))


def find(run: Run, memory: int, most: int = 4000) -> tuple[dict[str, int], list[str]]:
    said: list[str] = []
    found = find_batch_sizes(
        run.trainer,
        run.networks,
        run.data.training.buckets,
        run.data.training.sample_of,
        tokens=lambda bucket: tokens_of(bucket, 16, CAUSAL),
        most=lambda bucket: most,
        say=said.append,
        memory=memory,
    )
    return found, said


def state_of(run: Run) -> list:
    """Everything that a search could change, copied."""
    t = run.trainer
    states = [[one.state[p] for p in t.parameters.values() if p in one.state] for one in t.optimizers]
    settings = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in t.optimizers]
    return copy.deepcopy(
        [
            {name: dict(network.state_dict()) for name, network in run.networks.items()},
            states,
            settings,
            {name: p.grad for name, p in t.parameters.items()},
            t.ema.state() if t.ema else {},
            t.scale.state_dict() if t.scale else {},
            torch.get_rng_state(),
        ]
    )


def assert_equal(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def test_buckets_alike_are_tried_once(small_run):
    """A size and the same turned on its side have as many tokens; neither gets more than it has use for."""
    asked, said = [], []
    wide, tall = Bucket(9, 32, 128), Bucket(9, 128, 32)

    def sample_of(bucket):
        asked.append(bucket)
        return small_run.data.training.sample_of(Bucket(9, 64, 64))

    found = find_batch_sizes(
        small_run.trainer,
        small_run.networks,
        [wide, tall],
        sample_of,
        tokens=lambda bucket: tokens_of(bucket, 16, CAUSAL),
        most=lambda bucket: {wide: 3, tall: 5}[bucket],
        say=said.append,
    )
    assert found == {str(wide): 3, str(tall): 5} and len(asked) == 1
    assert said[0].startswith(f"Batch size of {wide}, {tall}: 5 on each device") and "all that an epoch has" in said[0]


@pytest.mark.slow
def test_more_memory_holds_more(small_run):
    small, large = small_run.data.training.buckets  # of 9 and of 17 frames
    found, said = find(small_run, 6 * MIB)
    assert 1 < found[str(large)] < found[str(small)]
    again, _ = find(small_run, 12 * MIB)
    for bucket in (str(small), str(large)):
        assert 1.4 < again[bucket] / found[bucket] < 3, (found, again)  # a fixed part is small
    assert len(said) == 2 and said[0].startswith(f"Batch size of {large}: {found[str(large)]} on each device (")
    with pytest.raises(
        UserError, match=r"not even one sample of 64x64x17 fits: its step takes .* 10.0 KiB may be taken"
    ):
        find(small_run, 10 * 1024)


def assert_untouched(run: Run) -> None:
    run.trainer.scale = LossScale()
    before = state_of(run)
    assert before[1] == [[] for _ in run.trainer.optimizers]
    found, _ = find(run, 2**40, most=2)
    assert set(found.values()) == {2}
    assert_equal(state_of(run), before)

    train_step(run.trainer, run.data.work(0), 0)  # the optimiser now has a state to keep
    before = state_of(run)
    assert all(before[1])
    find(run, 2**40, most=2)
    assert_equal(state_of(run), before)


def test_nothing_of_the_run_is_touched(small_run):
    assert_untouched(small_run)


@pytest.mark.slow
def test_nothing_is_touched_under_muon(world):
    assert_untouched(prepared(configured(world, "muon", optimizer__type="muon")))


def test_a_run_with_found_sizes_is_the_run_with_these_sizes(world, capfd):
    """The search leaves no trace in the numbers: found sizes, or the same ones by hand."""
    flags = {"training__steps": "none", "training__epochs": "2", "checkpoint__every_epochs": "1"}
    train(configured(world, "auto", training__batch_size="auto", **flags))
    said = capfd.readouterr().err
    assert "64x64x17: 9 on each device" in said and "64x64x9: 5 on each device" in said  # as many as there are
    assert "4 steps of 5 to 9, 2 an epoch" in said
    recorded = json.loads((world / "auto" / "batch_sizes.json").read_text())
    assert recorded == {"64x64x9": {"total": 5, "device": 5}, "64x64x17": {"total": 9, "device": 9}}

    sizes = "[{ size = 5, frames = 9 }, { size = 9, frames = 17 }]"
    train(configured(world, "by-hand", training__batch_sizes=sizes, **flags))
    rows = [[(one["loss"], one["grad_norm"], one["epoch"]) for one in metrics(world / n)] for n in ("auto", "by-hand")]
    assert rows[0] == rows[1] and [row[2] for row in rows[0]] == [0.5, 1.0, 1.5, 2.0]
    ours, theirs = final_state(world / "auto"), final_state(world / "by-hand")
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["", "\n[parallel]\ndp_shard = 2\n"], ids=["replicated", "sharded"])
def test_two_ranks_agree_and_one_goes_on(tmp_path, parallel):
    make_world(tmp_path)
    flags = ("--training.batch_size", "auto", "--checkpoint.every_steps", "1")
    said = finish(start_training(write_config(tmp_path, 2, parallel), *flags, ranks=2))
    assert "64x64x17: 5 on each device" in said and "64x64x9: 3 on each device" in said  # half of 9 and of 5
    kept = (tmp_path / "run" / "batch_sizes.json").read_text()
    assert json.loads(kept) == {"64x64x9": {"total": 6, "device": 3}, "64x64x17": {"total": 10, "device": 5}}

    said = finish(start_training(write_config(tmp_path, 4), *flags))
    assert "Batch size of" not in said and "6 to 10" in said
    assert (tmp_path / "run" / "batch_sizes.json").read_text() == kept
    said = finish(start_training(write_config(tmp_path, 6), *flags, "--reset-data"))
    assert "64x64x17: 9 on each device" in said
