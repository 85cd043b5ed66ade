"""Pipelines: the orders of their passes, who gets which blocks, and trainings equal to one process."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pipeline_cases
import pytest
import torch
from pipeline_cases import ALL, Plan, Result, assert_alike
from ranks import on_ranks, result_of
from safetensors.torch import load_file
from torch import nn
from zoo import config_of, family_of

from kinema.config.schema import ParallelConfig
from kinema.errors import ConfigError
from kinema.families.pipeline_plans import pipeline_units
from kinema.parallel.deferred import deferring
from kinema.parallel.mesh import Sizes, World
from kinema.parallel.pipeline_stages import EndOfStage, Visit, cut, partition, stages_of
from kinema.parallel.schedule import Action, Schedule, orders
from kinema.runs.checkpoint_load import load
from kinema.training.preflight import check_pipeline

# -- the order of passes ---------------------------------------------------------------------------------------------

EVERY: list[tuple[Schedule, int]] = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("zero_bubble", 1),
    ("interleaved", 2),
    ("interleaved", 3),
]


@pytest.mark.parametrize(("schedule", "per_rank"), EVERY)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_orders_can_be_run(schedule: Schedule, per_rank: int, ranks: int) -> None:
    """Every pass once, none before what it needs, messages taken in the order in which they are sent: run with messages
    that wait in one row for each way, as the processes do."""
    for count in (1, 2, 3, ranks, ranks + 1, 3 * ranks):
        lists = orders(schedule, ranks, per_rank, count).of_rank
        backward = "inputs" if schedule == "zero_bubble" else "backward"
        kinds = ["forward", backward] + ["weights"] * (backward == "inputs")
        expected = {Action(kind, s, i) for kind in kinds for s in range(ranks * per_rank) for i in range(count)}  # type: ignore[arg-type]
        assert Counter(action for actions in lists for action in actions) == Counter(expected)
        assert all(action.stage % ranks == rank for rank, actions in enumerate(lists) for action in actions)
        _run(lists, ranks, ranks * per_rank - 1)


def _run(lists: tuple[tuple[Action, ...], ...], ranks: int, last: int) -> None:
    waiting: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    done: set[Action] = set()
    left = [list(actions) for actions in lists]
    while any(left):
        before = sum(map(len, left))
        for rank, actions in enumerate(left):
            while actions and _can_run(actions[0], rank, ranks, last, waiting, done):
                done.add(actions.pop(0))
        assert sum(map(len, left)) < before, f"all wait: {[actions[:1] for actions in left]}"


def _can_run(action: Action, rank: int, ranks: int, last: int, waiting: dict[Any, Any], done: set[Action]) -> bool:
    """Whether a process can go on with this action; if so, what it takes and sends is moved."""
    kind, stage, micro = action
    if kind == "weights":
        return Action("inputs", stage, micro) in done
    step = 1 if kind == "forward" else -1
    first, final = (0, last) if kind == "forward" else (last, 0)
    if kind != "forward" and Action("forward", stage, micro) not in done:
        return False
    way = "forward" if kind == "forward" else "backward"
    if stage != first:
        row = waiting.get(((rank - step) % ranks, rank, way), [])
        if not row:
            return False
        assert row.pop(0) == (stage, micro), f"{action} would take another's message"
    if stage != final:
        waiting.setdefault((rank, (rank + step) % ranks, way), []).append((stage + step, micro))
    return True


def test_idle_time_is_what_theory_says() -> None:
    for ranks in (2, 4, 8):
        for count in (ranks, 2 * ranks, 4 * ranks):
            for schedule, per_rank in EVERY:
                idle = orders(schedule, ranks, per_rank, count).bubble
                theory = (ranks - 1) / (per_rank * count + ranks - 1)
                if schedule == "zero_bubble":
                    assert idle < 0.7 * theory
                else:
                    assert idle == pytest.approx(theory, abs=1e-12)


def test_micro_batches_that_are_kept() -> None:
    """What 1F1B is for: a process keeps no more than there are stages behind it."""

    def most(actions: tuple[Action, ...]) -> int:
        kept = peak = 0
        for action in actions:
            kept += {"forward": 1, "backward": -1, "weights": -1}.get(action.kind, 0)
            peak = max(peak, kept)
        return peak

    assert [most(actions) for actions in orders("1f1b", 4, 1, 16).of_rank] == [4, 3, 2, 1]
    assert [most(actions) for actions in orders("zero_bubble", 4, 1, 16).of_rank] == [4, 4, 4, 4]
    assert [most(actions) for actions in orders("gpipe", 4, 1, 16).of_rank] == [16] * 4


# -- stages ----------------------------------------------------------------------------------------------------------

NAMES = [*(f"double.{i}" for i in range(4)), *(f"single.{i}" for i in range(6))]
WEIGHTS = [3, 3, 3, 3, 1, 1, 1, 1, 1, 1]


def test_partition() -> None:
    assert partition(NAMES, WEIGHTS, 2, "parameters") == [0, 3, 10]
    assert partition(NAMES, WEIGHTS, 3, "parameters") == [0, 2, 4, 10]
    assert partition(NAMES, WEIGHTS, 3, "uniform") == [0, 3, 6, 10]
    assert partition(NAMES, WEIGHTS, 2, "regex:single") == [0, 7, 10]
    assert partition(NAMES, WEIGHTS, 10, "parameters") == list(range(11))
    assert partition(NAMES, WEIGHTS, 3, "parameters", [1, 2, 7]) == [0, 1, 3, 10]


@pytest.mark.parametrize(
    ("stages", "how", "split", "words"),
    [
        (11, "uniform", [], r"11 pipeline stages need as many blocks, and the network has 10"),
        (3, "regex:double.[01]$", [], r"finds 2 of the 10 blocks, and there are 3 stages. Blocks are called double.0"),
        (2, "uniform", [4, 5], r"gives 2 stages 9 blocks; there are 2 stages .* network has 10"),
        (2, "uniform", [4, 3, 3], r"gives 3 stages 10 blocks; there are 2 stages"),
        (2, "uniform", [10, 0], r"of which each stage needs one"),
    ],
)
def test_partitions_that_cannot_be(stages: int, how: str, split: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        partition(NAMES, WEIGHTS, stages, how, split)


def test_keys_that_are_not_read() -> None:
    for given in ({"schedule": "gpipe"}, {"partition": "uniform"}, {"pp": 2, "split": [1, 1], "partition": "uniform"}):
        with pytest.raises(ValueError, match="it is not read here"):
            ParallelConfig.model_validate(given)
    for given in ({"pp": 2, "stages_per_rank": 2}, {"pp": 2, "schedule": "interleaved"}):
        with pytest.raises(ValueError, match=r"interleaved needs 2 or more|above 1"):
            ParallelConfig.model_validate(given)


class Chain(nn.Module):
    """Blocks whose results all go round to the end too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Layer() for _ in range(4))
        self.first = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden_states = self.first(x)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


def test_stages_one_after_the_other() -> None:
    """Cut networks, each in its turn, give what the whole gives; absent blocks have no parameters."""
    torch.manual_seed(0)
    whole = Chain()
    x = torch.randn(2, 3)
    expected = whole(x)
    passed: dict[Any, torch.Tensor] = {}
    output = None
    for rank in range(3):
        network = Chain()
        network.load_state_dict(whole.state_dict())
        units = pipeline_units(network, {"blocks": network.blocks})
        absent = weakref.ref(network.blocks[3 if rank == 0 else 0])
        cut(network, units, [0, 1, 3, 4], rank, 3)
        gc.collect()
        assert absent() is None, "the blocks of other stages are kept"
        stages = stages_of(network)
        assert stages is not None
        here = {name for name, _ in network.named_parameters()}
        assert here < set(whole.state_dict()) and len(network.blocks) == 4
        assert len(here) == 2 + 2 * [1, 2, 1][rank]
        visit = Visit(rank, lambda keys, got=passed: {key: got[key] for key in keys})
        output = stages.run(visit, lambda network=network: network(x))
        if rank < 2:
            passed = dict(zip(stages.crossing(rank + 1), output, strict=True))
            with pytest.raises(AssertionError, match="network in stages"):
                network(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert not issubclass(EndOfStage, Exception)


def test_deferred_gradients() -> None:
    """The same gradients, those of linear layers later."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)).double()
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    layers(x).square().sum().backward()
    want, want_x = [p.grad.clone() for p in layers.parameters()], x.grad  # type: ignore[union-attr]
    layers.zero_grad()
    x.grad, later = None, []
    with deferring(later):
        loss = layers(x).square().sum()
    loss.backward()
    torch.testing.assert_close(x.grad, want_x)
    assert len(later) == 2 and [p.grad is None for p in layers.parameters()] == [True, True, False, False, True]
    for compute in later:
        compute()
    for parameter, gradient in zip(layers.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# -- trainings -------------------------------------------------------------------------------------------------------


def launch(root: Path, ranks: int, plans: list[Plan]) -> None:
    """Run the cases on several processes; results are files in the directory."""
    for plan in plans:
        pipeline_cases.write_model(plan.model, root)
    on_ranks(ranks, pipeline_cases.main, root, (plan.name for plan in plans))


_ALONE: dict[Plan, tuple[Path, Result]] = {}
"""What one process gave, and the directory that its files are in."""


def alone(root: Path, plan: Plan) -> tuple[Path, Result]:
    if plan.alone not in _ALONE:
        _ALONE[plan.alone] = root, pipeline_cases.train(World.alone(), plan.alone, root)
    return _ALONE[plan.alone]


def assert_as_alone(root: Path, plan: Plan) -> None:
    """What a plan's ranks left, against one process."""
    assert_alike(result_of(root, plan.name), alone(root, plan)[1], plan)


def assert_files_as_alone(root: Path, plan: Plan) -> None:
    """The checkpoint of the ranks loads in one process, and the export is one process's."""
    got = result_of(root, plan.name)
    (checkpoint,) = (root / plan.name).glob("step-*")
    tensors = {name: torch.zeros_like(value) for name, value in got["weights"].items()}
    load(checkpoint, {"networks": tensors})
    for name, value in got["weights"].items():
        assert torch.equal(tensors[name], value), name
    assert_as_alone(root, plan)
    exports = [one / "exports" for one in (root / plan.name, alone(root, plan)[0] / plan.alone.name)]
    ours, theirs = (sorted(path.rglob("*.safetensors"), key=lambda path: path.name) for path in exports)
    assert [path.name for path in ours] == [path.name for path in theirs] and ours
    for one, other in zip(ours, theirs, strict=True):
        mine, its = load_file(one), load_file(other)
        assert mine.keys() == its.keys()
        for name, value in its.items():
            assert (mine[name] - value).abs().max().item() < 2e-4, name


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FILES = ("files", True)
AWAY = (("training.activation_checkpointing", "nested"), ("memory.offload_activations", True))
FEW = [
    Plan("wan-t2v-1.3b", "pp2", settings=(FILES, *AWAY)),
    Plan("wan-t2v-1.3b", "pp2", lora=True, settings=(("schedule", "gpipe"), ("partition", "uniform"), FILES)),
    Plan("lumina2-image-2.0", "pp2", steps=1, settings=(("schedule", "interleaved"), ("stages_per_rank", 3))),
    Plan("sdxl-base-eps", "pp2", steps=1, settings=(("schedule", "zero_bubble"),)),
]
"""What `make test` sees: full and adapter, refiners that are branches, skips, and the schedules."""


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    launch(root, 2, FEW)
    return root


@pytest.mark.timeout(900)
@pytest.mark.parametrize("plan", FEW, ids=lambda plan: plan.name)
def test_two_ranks(few: Path, plan: Plan) -> None:
    if FILES in plan.settings:
        assert_files_as_alone(few, plan)
    else:
        assert_as_alone(few, plan)


DIFFERENT = [
    *("aura_flow-v0.2", "chroma-hd", "cosmos1-video2world-7b", "cosmos_predict2-video2world-2b", "flux-dev"),
    *("flux-kontext-dev", "hidream-full", "hunyuan_image-base", "hunyuan_video-i2v", "hunyuan_video15-480p-i2v"),
    *("ltx_video-i2v-2b-0.9.1", "lumina2-image-2.0", "omnigen2-omnigen2", "open_sora-v2", "qwen_image-edit-plus"),
    *("sd3-sd3.5-medium", "sdxl-base-eps", "wan-flf2v-14b-720p", "wan-t2v-a14b", "wan-ti2v-5b-i2v", "z_image-base"),
]
"""One of every network, with what it can be told."""


def test_all_families_are_tried() -> None:
    from kinema.families.registry import family_names

    assert {ALL[name].family for name in DIFFERENT} == set(family_names())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_family(tmp_path: Path) -> None:
    plans = [Plan(name, "pp2", lora=lora, steps=1) for name in DIFFERENT for lora in (False, True)]
    launch(tmp_path, 2, plans)
    for plan in plans:
        assert_as_alone(tmp_path, plan)


MODELS = ("wan-t2v-1.3b", "flux-dev", "hunyuan_video-t2v", "qwen_image-base", "open_sora-v2")
FOUR_BLOCKS = ("flux-dev", "hunyuan_video-t2v", "open_sora-v2")
"""Those whose tiny networks have four blocks or more."""
INTERLEAVED = (("schedule", "interleaved"), ("stages_per_rank", 2))
CHECKPOINTED = (("training.activation_checkpointing", True),)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_schedule(tmp_path: Path) -> None:
    settings: list[Any] = [(("schedule", "gpipe"),), (("schedule", "zero_bubble"),), CHECKPOINTED]
    plans = [Plan(model, "pp2", lora, settings=one) for model in MODELS for lora in (False, True) for one in settings]
    plans += [Plan(model, "pp2", lora, settings=INTERLEAVED) for model in FOUR_BLOCKS for lora in (False, True)]
    launch(tmp_path, 2, plans)
    for plan in plans:
        assert_as_alone(tmp_path, plan)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_compiled_blocks(tmp_path: Path) -> None:
    """Through Inductor: in stages, shards and parts, full, and LoRA with checkpoints."""
    compiled = (("training.compile", True),)
    plans = [Plan("wan-t2v-1.3b", sizes, settings=compiled) for sizes in ("pp2", "dp_shard2", "tp2")]
    plans += [Plan("flux-dev", one.sizes, True, settings=compiled + CHECKPOINTED) for one in plans]
    launch(tmp_path, 2, plans)
    for plan in plans:
        assert_as_alone(tmp_path, plan)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("sizes", ["pp2-dp_replicate2", "pp2-dp_shard2", "pp2-tp2", "pp4"])
def test_four_ranks(tmp_path: Path, sizes: str) -> None:
    models = FOUR_BLOCKS if sizes == "pp4" else MODELS
    plans = [Plan(model, sizes, lora, settings=(FILES,)) for model in models for lora in (False, True)]
    plans.append(Plan("flux-dev", sizes, settings=CHECKPOINTED))
    if sizes != "pp4":
        plans.append(Plan("hunyuan_video-t2v", sizes, settings=INTERLEAVED))
    else:
        plans.append(Plan("sdxl-base-eps", sizes))
    launch(tmp_path, 4, plans)
    for plan in plans:
        (assert_files_as_alone if FILES in plan.settings else assert_as_alone)(tmp_path, plan)


# -- what is refused at the start ------------------------------------------------------------------------------------


def _staged(**sizes: int) -> Sizes:
    return Sizes(pp=2, **sizes)


@pytest.mark.parametrize(
    ("tables", "sizes", "words"),
    [
        ({}, {"tp": 2}, r"pp = 2: not with .*zero_bubble.*parallel.tp.*1f1b"),
        ({"training": {"batch_size": "auto"}}, {}, r'batch_size = "auto".*training.micro_batch_size'),
        ({"training": {"activation_checkpointing": True}}, {}, r"zero_bubble.*activation_checkpointing.*1f1b"),
        ({"training": {"compile": True}}, {}, r"zero_bubble.*training.compile.*1f1b"),
        ({}, {"dp_shard": 2}, r"zero_bubble.*dp_shard.*1f1b"),
    ],
)
def test_refusals(tmp_path: Path, tables: dict[str, Any], sizes: dict[str, int], words: str) -> None:
    """Before anything is loaded: there is no model."""
    training = {"steps": 1, "precision": "fp32", **tables.get("training", {})}
    parallel = {"pp": 2, "schedule": "zero_bubble"}
    config = config_of(ALL["wan-t2v-1.3b"], tmp_path, tmp_path, training=training, parallel=parallel)
    with pytest.raises(ConfigError, match=words):
        check_pipeline(config, family_of(ALL["wan-t2v-1.3b"], tmp_path), _staged(**sizes))


def test_more_stages_than_blocks_are_refused(few: Path) -> None:
    case = ALL["wan-t2v-1.3b"]
    parallel = {"pp": 2, "schedule": "interleaved", "stages_per_rank": 9}
    config = config_of(case, few / case.id, few, parallel=parallel)
    with pytest.raises(ConfigError, match=r"18 pipeline stages need as many blocks, and the network has \d+\."):
        check_pipeline(config, family_of(case, few / case.id), _staged())
