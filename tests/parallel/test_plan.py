"""Forecasts of memory and of traffic against what real steps take; plans on paper; the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_cases
import pytest
import torch
from plan_cases import KINDS, PLANS, SMALL, Small, cases_of, config_of, expected, measured, write
from ranks import on_ranks
from typer.testing import CliRunner

from kinema.cli import app
from kinema.config.load import load_config
from kinema.errors import ConfigError, UserError
from kinema.memory.dry_run import LiveBytes
from kinema.parallel.devices import KNOWN, Cluster, parse_devices
from kinema.parallel.mesh import Sizes, World
from kinema.parallel.plan import Batch, Candidate, Workload, layouts, search
from kinema.parallel.plan_memory import forecast
from kinema.parallel.plan_model import OUTSIDE, Model, Pass, Segment, Weight
from kinema.parallel.plan_stages import Moment, moments_of, stages_of
from kinema.parallel.plan_time import bubble_of, shared_out, step_time, traffic
from kinema.parallel.schedule import Schedule, orders
from kinema.training.dry_segments import Run, expanded
from kinema.training.plan import not_there, online_bytes, planning_family

STAGES = Path(__file__).parents[2] / "recipes" / "open_sora"

TOLERANCE = 0.1
ROUNDING = 1e-5
"""Of traffic, which is forecast to the byte, but where shards travel in 16 bits and some weights get no gradient."""
OF_STAGES = 0.02
"""Of what the shards of a pipeline exchange. In some of its mixed passes FSDP2 does not fetch a block ahead that
nothing in the backward pass reaches (HunyuanVideo's refiner, LoRA: in three of four), and gradients that a stage does
not make are taken out by their share of the bytes, without what pads them (Wan: 0.8%)."""
QUICK = {("wan-t2v-1.3b", "full"), ("wan-t2v-1.3b", "full, released"), ("flux-dev", "lora, checkpointed")}
ON_TWO_RANKS = (
    "wan-t2v-1.3b/full, accumulated/sharded",
    "wan-t2v-1.3b/full, accumulated/zero 1",
    "wan-t2v-1.3b/lora, checkpointed/sharded",
    "wan-t2v-1.3b/full, staged/pp",
    "flux-dev/full/sp",
    "flux-dev/lora, checkpointed/tp",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


# -- forecasts against real steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("small", "kind"),
    [
        pytest.param(small, kind, id=f"{small.id}-{kind}", marks=[] if (small.id, kind) in QUICK else pytest.mark.slow)
        for small in SMALL
        for kind in KINDS
        if "staged" not in kind and "bf16" not in kind
    ],
)
def test_memory_of_one_process(small: Small, kind: str, root: Path) -> None:
    """Bytes of tensors alive in a real step on the CPU."""
    config = config_of(small, write(small, root), kind)
    counted = measured(config, small.bucket, World.alone())
    memory, _ = expected(config, small.bucket, Sizes())
    assert memory.total == pytest.approx(counted.peak, rel=TOLERANCE)


def _on_ranks(ranks: int, cases: list[str], root: Path) -> dict[str, Any]:
    for small in SMALL:
        if any(case.startswith(small.id) for case in cases):
            write(small, root)
    on_ranks(ranks, plan_cases.main, root, cases)
    found: dict[str, Any] = json.loads((root / "measured.json").read_text())
    return found


def _compare(found: dict[str, Any], root: Path) -> None:
    for name, (peak, sent) in found.items():
        case, kind, plan = name.split("/")
        small, sizes = next(one for one in SMALL if one.id == case), PLANS[plan][0]
        memory, moved = expected(config_of(small, root / case, kind, plan), small.bucket, sizes)
        assert memory.total == pytest.approx(peak, rel=TOLERANCE), name
        given = {
            "all_gather": moved.shard_gather,
            "reduce_scatter": moved.shard_scatter,
            "all_to_all": moved.sp_exchange,
            "gather": moved.tp_gather,
            "send": moved.pp_send,
            "all_reduce": moved.replicate_reduce + moved.small_reduce + moved.tp_reduce + moved.pp_reduce,
        }
        for kind, value in given.items():
            rel = OF_STAGES if kind in ("all_gather", "reduce_scatter") and sizes.pp > 1 else ROUNDING
            assert sent.get(kind, 0) == pytest.approx(value, rel=rel), (name, kind)


def test_memory_and_traffic_of_two_ranks(root: Path) -> None:
    """What collectives are given is forecast to the byte."""
    found = _on_ranks(2, list(ON_TWO_RANKS), root)
    assert len(found) == len(ON_TWO_RANKS)
    sharded = found["wan-t2v-1.3b/full, accumulated/sharded"][1]
    assert sharded["all_gather"] > 40e6  # forward and back, two micro-batches
    _compare(found, root)


@pytest.mark.slow
@pytest.mark.parametrize("small", SMALL[:5], ids=lambda small: small.id)
def test_memory_and_traffic_of_two_ranks_in_all_cases(small: Small, root: Path) -> None:
    _compare(_on_ranks(2, cases_of(small, ranks=2), root), root)


@pytest.mark.slow
@pytest.mark.parametrize("small", SMALL[:5], ids=lambda small: small.id)
def test_memory_and_traffic_of_four_ranks(small: Small, root: Path) -> None:
    _compare(_on_ranks(4, cases_of(small, ranks=4), root), root)


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [None, {"rank": 16}], ids=["full", "lora"])
def test_memory_of_a_gpu(adapter: dict[str, Any] | None, tmp_path: Path) -> None:
    """The real Wan 1.3B with random weights, in bf16, against what the allocator counts."""
    from kinema.config.schema import Config
    from kinema.data.buckets import Bucket
    from kinema.families.registry import open_family
    from kinema.training.dry_step import DryNetworks
    from kinema.training.loop import Work, train_step

    model = {"family": "wan", "variant": "t2v-1.3b", "random_weights": True}
    training = {"steps": 2, "precision": "bf16", "batch_size": 1, "activation_checkpointing": True}
    config = Config.model_validate(
        {"model": model, "data": {"sources": [{"path": str(tmp_path)}]}, "training": training, "adapter": adapter}
    )
    family, bucket = open_family(config.model), Bucket(33, 480, 832)
    trainer, _ = plan_cases.trainer_of(config, family, World.alone("cuda"))
    trainer.compute_dtype = torch.bfloat16
    work = Work(plan_cases.batch_of(family, bucket, 1), 1, None, 0.0)
    train_step(trainer, work, 0)
    torch.cuda.reset_peak_memory_stats()
    train_step(trainer, work, 0)
    peak = torch.cuda.max_memory_allocated()
    networks = DryNetworks(config, family, "bf16")
    one = networks.run(bucket, 1, checkpointing=True)
    memory = forecast(Model(tuple(networks.weights), networks.buffers, networks.blocks), one, Sizes(), 1, on_gpu=False)
    assert memory.total == pytest.approx(peak, rel=TOLERANCE)


def test_live_bytes_counts_storages_once_and_forgets_what_is_gone() -> None:
    before = torch.zeros(1000)
    with LiveBytes("cpu") as live:
        live.exclude([before])
        x = before + 1  # 4000 bytes
        view = x[10:].view(-1, 9)
        before.mul_(2)
        assert live.live == 4000
        y = x.double()  # 8000
        del y
        assert (live.live, live.peak) == (4000, 12000)
        del x
        assert live.live == 4000  # the view holds it
        del view
        assert live.live == 0


# -- on paper --------------------------------------------------------------------------------------------------------


def paper_model(blocks: int = 4) -> Model:
    """Blocks of one trained matrix of 8 x 1000 bytes, and as much outside, in fp32 with AdamW."""
    weight = Weight(block=OUTSIDE, elements=2000, rows=8, bytes=8000, trains=True, gradient=8000, state=16000)
    return Model((weight, *(replace(weight, block=i, splits="rows") for i in range(blocks))), buffers=0, blocks=blocks)


def paper_pass(blocks: int = 4) -> Pass:
    forward = [Segment(i, kept=100, peak=150, flops=1e12, attention=400, made=60) for i in range(blocks)]
    backward = [Segment(i, kept=-100, peak=50, own_peak=8050, gradients=8000, flops=2e12) for i in range(blocks)][::-1]
    outside = Segment(OUTSIDE, own_peak=8000, gradients=8000)
    return Pass(tuple(forward), (*backward, outside))


def test_what_shards_and_what_does_not() -> None:
    model, one = paper_model(), paper_pass()
    alone = forecast(model, one, Sizes(), 2, on_gpu=False)
    assert (alone.weights, alone.gradients, alone.optimizer) == (40000, 40000, 80000)
    sharded = forecast(model, one, Sizes(dp_shard=4), 2, on_gpu=False)
    assert (sharded.weights, sharded.optimizer) == (10000, 20000)
    padded = forecast(model, one, Sizes(dp_shard=3), 2, on_gpu=False)
    assert padded.weights == 15000  # 3 of 8 rows
    assert forecast(model, one, Sizes(tp=2), 2, on_gpu=False).weights == 8000 + 4 * 4000
    staged = forecast(model, one, Sizes(pp=2), 2, on_gpu=False)
    assert staged.weights == 3 * 8000  # what is outside lies on both
    assert forecast(model, one, Sizes(dp_replicate=4), 2, on_gpu=False).weights == 40000


def test_gradients_that_are_let_go_and_state_that_waits() -> None:
    """The largest gradient is left of all; of the state what a step has at once, and the rest is the machine's."""
    model, one = replace(paper_model(), largest_gradient=8000.0, visiting_state=1000.0), paper_pass()
    alone = forecast(model, one, Sizes(), 1)
    assert (alone.gradients, alone.optimizer, alone.host) == (8000, 1000, 80000)
    plain = forecast(paper_model(), one, Sizes(), 1)
    assert (plain.gradients, plain.optimizer, plain.host) == (40000, 80000, 0)
    # Where all gradients are there before an update, none of the state is while activations are.
    waiting = replace(paper_model(), visiting_state=1000.0)
    updated = forecast(waiting, one, Sizes(), 1)
    assert (updated.gradients, updated.optimizer, updated.activations) == (40000, 1000, 0)
    kept = Pass((replace(one.forward[0], kept=1e5), *one.forward[1:]), one.backward)
    passing = forecast(waiting, kept, Sizes(), 1)
    assert (passing.optimizer, passing.host) == (0, 80000)
    # Of replicas two buckets besides, and no more than there is.
    assert forecast(model, one, Sizes(dp_replicate=2), 1).gradients == 40000
    assert forecast(model, one, Sizes(), 1, on_gpu=False).optimizer == 80000  # where it is the machine's memory anyway
    slow = Cluster(replace(KNOWN["H100"], flops=1e12, host=1e3), 1, 1)
    there, away = (step_time(of, one, Sizes(), 1, slow, mfu=0.5).total for of in (paper_model(), model))
    assert away - there == pytest.approx(2 * 80000 / 1e3)


def test_traffic_by_dimension() -> None:
    model, one = paper_model(), paper_pass()
    copies = traffic(model, one, Sizes(dp_replicate=4), 2)
    assert copies.replicate_reduce == 40000 + 5 * 4  # and a flag for each tensor, in its type
    assert copies.wire(Sizes(dp_replicate=4)) == {"dp_replicate": 2 * 3 / 4 * 40020}
    shards = traffic(model, one, Sizes(dp_shard=4), 2)
    assert (shards.shard_gather, shards.shard_scatter) == (2 * 2 * 40000, 2 * 40000)
    assert shards.wire(Sizes(dp_shard=4)) == {"dp_shard": 3 / 4 * 240000}
    hybrid = traffic(model, one, Sizes(dp_replicate=2, dp_shard=4), 1)
    assert hybrid.replicate_reduce == 10000  # each shard between the copies
    assert traffic(model, shared_out(one, 4, 1), Sizes(sp=4), 1).sp_exchange == 2 * 4 * 400 / 4  # there and back
    assert traffic(model, shared_out(one, 1, 2), Sizes(tp=2), 1).tp_reduce == 2 * 2 * 4 * 60
    staged = traffic(model, one, Sizes(pp=2), 8)
    assert (staged.pp_send, staged.pp_reduce) == (8 * 60, 8000 + 4)  # the first stage sends forward, the last back
    assert traffic(model, one, Sizes(pp=4), 8).pp_send == 2 * 8 * 60


def test_a_step_takes_flops_over_speed_and_waits_for_what_is_not_hidden() -> None:
    model, one = paper_model(), paper_pass()
    slow = Cluster(replace(KNOWN["H100"], flops=1e12, link=1e4), 4, 4)
    alone = step_time(model, one, Sizes(), 1, replace(slow, count=1), mfu=0.5)
    assert alone.total == alone.compute == 12 / 0.5
    sequence = step_time(model, shared_out(one, 4, 1), Sizes(sp=4), 1, slow, mfu=0.5)
    assert sequence.compute == 6
    assert sequence.sending["sp"] == pytest.approx(3 / 4 * 800 / 1e4)
    staged = step_time(model, one, Sizes(pp=4), 8, slow, mfu=0.5)
    assert staged.bubble == pytest.approx(3 / 11)  # (p - 1) / (m + p - 1)
    assert staged.total == pytest.approx((staged.compute + staged.exposed) * 11 / 8)
    beyond = step_time(model, one, Sizes(dp_replicate=4), 1, replace(slow, per_node=2, network=1e3), mfu=0.5)
    assert beyond.exposed == pytest.approx(60 - 24 + 0.03, rel=1e-3)  # 60 s of sending, behind 24 s of computing


def test_stages_and_the_micro_batches_that_wait_in_them() -> None:
    assert stages_of(paper_model(), 2) == [{0, 1}, {2, 3}]
    assert stages_of(replace(paper_model(), split=(1, 3)), 2) == [{0}, {1, 2, 3}]
    interleaved = replace(paper_model(), schedule="interleaved", stages_per_rank=2)
    assert stages_of(interleaved, 2) == [{0}, {1}, {2}, {3}]
    assert moments_of("1f1b", 2, 1, 8)[1] == {Moment(False, 0, (0,)), Moment(True, 0, (0,))}
    for schedule, waiting in (("1f1b", [3, 2, 1, 0]), ("gpipe", [7, 7, 7, 7])):  # besides the one that runs
        for micro_batches in (8, 64) if schedule == "1f1b" else (8,):
            found = moments_of(schedule, 4, 1, micro_batches)
            assert [max(moment.waiting[0] for moment in of_rank) for of_rank in found] == waiting
    with pytest.raises(ConfigError, match="5 pipeline stages need as many blocks, and the network has 4"):
        stages_of(paper_model(), 5)


@pytest.mark.parametrize(("schedule", "per_rank"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zero_bubble", 1)])
def test_the_bubble_is_that_of_the_schedule_that_runs(schedule: Schedule, per_rank: int) -> None:
    for micro_batches in (8, 24):
        simulated = orders(schedule, 4, per_rank, micro_batches).bubble
        assert bubble_of(schedule, 4, per_rank, micro_batches) == pytest.approx(simulated, abs=1e-9)


def test_a_search_finds_the_fastest_that_fits() -> None:
    cluster = Cluster(replace(KNOWN["H100"], flops=1e13, memory=0.7e9 + 1.06 * 100_000), 8, 8)
    found_sizes = list(layouts(cluster))
    assert len(found_sizes) == len(set(found_sizes)) and all(sizes.total == 8 for sizes in found_sizes)
    assert Sizes(dp_replicate=8) in found_sizes and Sizes(tp=8) in found_sizes and Sizes(2, 1, 2, 2, 1) in found_sizes
    workload = Workload(
        paper_model(),
        lambda _, samples, sp, tp: shared_out(paper_pass(), sp, tp),
        lambda sizes: Batch(8, 1, 8 // min(sizes.dp, 8)),
    )

    def refusal(plan: Candidate) -> tuple[str, str] | None:
        sizes = plan.sizes
        if sizes.pp > 4:
            return "pp = 8", "four blocks"
        return ("tp = 2", "no heads") if sizes.tp > 1 else None

    found = search(workload, cluster, refusal)
    assert found.refused == {"tp = 2": "no heads", "pp = 8": "four blocks"}
    replicated = workload.forecast(Candidate(Sizes(dp_replicate=8), False), cluster)
    assert not replicated.fits(cluster)
    assert len(found.best) == 3 and all(one.fits(cluster) and one.plan.sizes.tp == 1 for one in found.best)
    times = [one.time.total for one in found.best]
    assert times[0] < 1.03 * min(times) and times[-1] > 0.97 * max(times)
    many = Workload(
        paper_model(), lambda _, n, *__: paper_pass().at(paper_pass(), n), lambda _: Batch(8, 8, 1), splits=True
    )
    split = many.forecast(Candidate(Sizes(dp_shard=8), True), cluster, micro=2)
    assert (split.batch.micro, split.batch.micro_batches) == (2, 4)
    none = search(workload, replace(cluster, device=replace(cluster.device, memory=1.0)), refusal)
    assert not none.best and none.smallest is not None


def test_devices_by_name_and_by_memory() -> None:
    cluster = parse_devices("64xH100")
    assert (cluster.count, cluster.nodes, cluster.device.memory) == (64, 8, 80e9)
    assert cluster.bandwidth(8) == 450e9 and cluster.bandwidth(16) == 50e9
    assert parse_devices("rtx 4090").device == KNOWN["4090"]
    by_memory = parse_devices("4 x 24GB").device
    assert (by_memory.memory, by_memory.flops) == (24e9, KNOWN["4090"].flops)
    assert parse_devices("16xA100", nodes=4).per_node == 4
    with pytest.raises(UserError, match="did you mean 'H100'"):
        parse_devices("8xH10O")
    with pytest.raises(UserError, match="10 devices do not fill 4 nodes"):
        parse_devices("10xH100", nodes=4)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_plans_a_published_model_without_its_files(tmp_path: Path) -> None:
    path = tmp_path / "flux.toml"
    (tmp_path / "data").mkdir()
    path.write_text(
        f"""
        [model]
        family = "flux"
        variant = "dev"
        path = "black-forest-labs/FLUX.1-dev"
        [[data.sources]]
        path = "{tmp_path / "data"}"
        [data.buckets]
        sizes = [[1024, 1024]]
        [adapter]
        type = "lora"
        rank = 16
        [training]
        steps = 100
        batch_size = 8
        precision = "bf16"
        activation_checkpointing = true
        """
    )
    answer = CliRunner().invoke(app, ["plan", str(path), "--devices", "8xH100", "--json"], catch_exceptions=False)
    assert answer.exit_code == 0
    report = json.loads(answer.stdout)
    given = report["given"]
    assert given["parallel"] == {"pp": 1, "dp_replicate": 8, "dp_shard": 1, "sp": 1, "tp": 1}
    assert given["batch"] == {"total": 8, "micro": 1, "micro_batches": 1}
    assert given["memory"]["weights"] == pytest.approx(11.9e9 * 2, rel=0.03)
    # A token meets 12 matrices of 3072^2 in each of 57 blocks, three times: forward, once more, and for its gradient;
    # attention over 4608 tokens runs twice forward and once, two and a half times as long, back.
    matrices, attention = 3 * 2 * 4608 * 57 * 12 * 3072**2, 4.5 * 57 * 4 * 4608**2 * 3072
    assert given["seconds"]["compute"] == pytest.approx((matrices + attention) / (989e12 * 0.4), rel=0.03)
    assert given["fits"] and len(report["found"]) == 3
    assert report["encoders"]["text"] == pytest.approx(9.5e9, rel=0.02)  # T5 XXL in bf16


@pytest.mark.slow
def test_a_stage_is_planned_before_the_run_that_it_starts_from() -> None:
    """By the published configuration, with the encoders that work on line; blocks that share sequences keep a share."""
    path = STAGES / "4-i2v.toml"
    answer = CliRunner().invoke(app, ["plan", str(path), "--devices", "8x80GB", "--json"], catch_exceptions=False)
    assert answer.exit_code == 0
    report = json.loads(answer.stdout)
    assert any("runs/open-sora/768px is not there (yet)" in note for note in report["notes"])
    assert report["given"]["memory"]["encoders"] > 10e9 and report["given"]["fits"]


def test_encoders_that_work_on_line_are_counted() -> None:
    config = load_config(STAGES / "4-i2v.toml")
    assert not_there(config) == {"network": "runs/open-sora/768px"}
    family = planning_family(config)
    assert family.config.network.path is None
    # T5 XXL and CLIP's text model in bf16, the autoencoder in fp32
    texts, media = (4.76e9 + 0.12e9) * 2, 0.25e9 * 4
    assert online_bytes(config, family, "bf16") == pytest.approx(texts + media, rel=0.02)
    online = config.model_copy(update={"data": config.data.model_copy(update={"online": ("media",)})})
    assert online_bytes(online, family, "bf16") == pytest.approx(media, rel=0.02)
    cached = config.model_copy(update={"data": config.data.model_copy(update={"online": ()})})
    assert online_bytes(cached, family, "bf16") == 0


def test_encoders_that_work_on_line_may_be_too_much() -> None:
    model = Model((Weight(0, 8, 4, 32),), 0, 1)
    one = Pass((Segment(0, kept=1),), (Segment(0, kept=-1),))
    cluster = Cluster(replace(KNOWN["H100"], memory=2e9), 1, 1)
    alone = Workload(model, lambda *_: one, lambda _: Batch(1, 1, 1))
    plan = Candidate(Sizes(), False)
    with_them = replace(alone, encoders=1.5e9).forecast(plan, cluster)
    assert alone.forecast(plan, cluster).fits(cluster) and not with_them.fits(cluster)
    assert with_them.memory.total - alone.forecast(plan, cluster).memory.total >= 1.5e9


def test_a_block_stands_for_others_with_what_lies_between_like_ones() -> None:
    """Not with what goes once, between the first two: under sp the sequence that is shared out before the first."""
    segments = (Segment(0, kept=1), Segment(kept=-5), Segment(1, kept=1), Segment(kept=2), Segment(2, kept=1))
    runs = [Run("blocks.0", range(1)), Run("blocks.1", range(1, 4)), Run("blocks.2", range(4, 5))]
    whole = expanded(Pass(segments, segments[::-1]), runs)
    assert [one.kept for one in whole.forward] == [1, -5, 1, 2, 1, 2, 1, 2, 1]
    assert [one.kept for one in whole.backward] == [1, -5, 1, 2, 1, 2, 1, 2, 1][::-1]
    assert [one.block for one in whole.forward if one.block >= 0] == [0, 1, 2, 3, 4]
    ended = expanded(Pass(segments[:3], ()), runs[:2])  # no block after it: as before it
    assert [one.kept for one in ended.forward] == [1, -5, 1, -5, 1, -5, 1]
