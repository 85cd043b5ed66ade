"""Sharding: levels, gathers in 16 bits, offload to the host. Trainings equal to one process, and what they send."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_cases
from pipeline_cases import ALL, Plan, Result, configured, share, trainer_of, write_model
from ranks import on_ranks, result_of
from torch import Tensor, nn

from kinema.config.schema import Config, ModelConfig, ParallelConfig
from kinema.config.section import QUANTIZED
from kinema.errors import ConfigError
from kinema.families.registry import open_family
from kinema.networks.quantized import quantize
from kinema.objectives.base import Draws
from kinema.parallel.fsdp import short_parameters
from kinema.parallel.mesh import World
from kinema.training.loop import compute_loss

WAN = "wan-t2v-1.3b"
BF16 = (("training.precision", "bf16"), ("training.micro_batch_size", 2), ("training.clip_norm", 1000))
"""One micro-batch a step, nothing clipped: no sum is taken in another order."""


def sharded(sizes: str = "dp_shard2", lora: bool = False, model: str = WAN, **settings: Any) -> Plan:
    return Plan(model, sizes, lora, settings=tuple(settings.items()))


TWO = {
    "level 1": sharded(zero=1),
    "level 2": sharded(zero=2),
    "level 3": sharded(cpu_offload=True),
    "lora": sharded(lora=True, zero=1, cpu_offload=True),
    "bf16": replace(sharded(), settings=BF16),
    "as stored": replace(sharded(), settings=(*BF16, ("as_stored", True))),
}
MICRO_BATCHES = 2
"""Of a device, in a step of the first four."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launch(root: Path, ranks: int, plans: list[Plan]) -> dict[str, Result]:
    for plan in plans:
        write_model(plan.model, root)
    on_ranks(ranks, zero_cases.main, root, (plan.name for plan in plans))
    return {plan.name: result_of(root, plan.name) for plan in plans}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def two(root: Path) -> dict[str, Result]:
    found = launch(root, 2, list(TWO.values()))
    return {what: found[plan.name] for what, plan in TWO.items()}


_ALONE: dict[Plan, Result] = {}


def assert_as_alone(root: Path, plan: Plan, got: Result, rel: float = 1e-5) -> None:
    if plan.alone not in _ALONE:
        _ALONE[plan.alone] = zero_cases.train(World.alone(), plan.alone, root)
    want = _ALONE[plan.alone]
    for kind in ("losses", "norms", "averaged"):
        assert got[kind] == pytest.approx(want[kind], rel=rel), kind
    assert got["left"] == [], "gathered although no step is under way"
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        assert got["weights"][name].norm().item() == pytest.approx(weight.norm().item(), rel=rel, abs=1e-7), name
        # AdamW turns the rounding of a gradient near zero into a part of a step of 1e-3.
        assert (got["weights"][name] - weight).abs().max().item() < max(2e-4, rel), name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["level 1", "level 2", "level 3", "lora"])
def test_levels_equal_one_process(root: Path, two: dict[str, Result], what: str) -> None:
    """Accumulated and clipped, with an evaluation of the averages behind every step and a checkpoint loaded: nothing
    that was gathered is used again."""
    assert_as_alone(root, TWO[what], two[what])
    assert what == "lora" or min(two[what]["norms"]) > 0.005, "clipping was not in force"


@pytest.mark.timeout(900)
def test_what_levels_send(two: dict[str, Result]) -> None:
    one, two_, three = (two[f"level {level}"]["numbers"] for level in (1, 2, 3))
    parameters = sum(weight.numel() for weight in two["level 1"]["weights"].values())
    assert parameters <= one["all_gather"] < 1.05 * parameters  # padded to a multiple of the shards
    assert two_["all_gather"] == one["all_gather"]
    assert three["all_gather"] == 2 * MICRO_BATCHES * one["all_gather"]
    assert one["reduce_scatter"] == one["all_gather"]
    assert two_["reduce_scatter"] == three["reduce_scatter"] == MICRO_BATCHES * one["reduce_scatter"]
    assert "all_reduce" not in one


@pytest.mark.timeout(900)
def test_half_the_bytes_and_the_same_bits(two: dict[str, Result]) -> None:
    got, want = two["bf16"], two["as stored"]
    for kind in ("losses", "norms", "averaged"):
        assert got[kind] == pytest.approx(want[kind], rel=1e-6), kind  # of the same numbers, in another order
    for name, weight in want["weights"].items():
        assert torch.equal(got["weights"][name], weight), name
    numbers, sent = got["numbers"], got["bytes"]
    assert numbers["all_gather"] < want["numbers"]["all_gather"]
    assert got["whole"] < 0.1 * sum(weight.numel() for weight in want["weights"].values())
    short = (4 * numbers["all_gather"] - sent["all_gather"]) / 2  # of the numbers, those that took two bytes
    blocks = sum(w.numel() for name, w in want["weights"].items() if ".blocks." in name)
    assert short == pytest.approx(2 * (blocks - got["whole"]), rel=0.01)
    assert sent["reduce_scatter"] == 4 * numbers["reduce_scatter"], "gradients are summed in fp32"


# -- what may travel in 16 bits --------------------------------------------------------------------------------------


FEW = [WAN, "flux-dev"]


def gradients(plan: Plan, root: Path, short: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss of two samples under bf16 autocast, and its gradients; ``short``: with the weights that may travel in 16
    bits as they arrive."""
    config, family = configured(plan, root)
    trainer = trainer_of(World.alone(), config, family)
    networks = trainer.networks["student"].networks  # type: ignore[attr-defined]
    blocks = [block for one in networks.values() for group in family.blocks(one).values() for block in group]
    if short:
        found = [short_parameters(block, torch.bfloat16) for block in blocks]
        assert plan.lora or all(found), "blocks that travel as they are stored"
        for parameter in set[nn.Parameter]().union(*found):
            parameter.data = parameter.data.bfloat16()
    samples = torch.load(root / f"{plan.model}.pt", weights_only=True)
    if config.model.train:
        samples = [{n: one[n] for n in one if not n.startswith(("text", "pooled"))} for one in samples]
    batch = share(World.alone(), samples, config).batch.select([0, 1])
    loss = compute_loss(trainer, batch, Draws(0, 0)).total
    loss.backward()
    parameters = trainer.parameters
    return loss.detach(), {name: None if p.grad is None else p.grad.float() for name, p in parameters.items()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("model", [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in ALL])
def test_weights_in_16_bits_change_nothing(root: Path, model: str, lora: bool) -> None:
    """No layer of any family reads them in another way than autocast would."""
    write_model(model, root)
    plan = Plan(model, lora=lora, settings=(("training.precision", "bf16"),))
    (loss, ours), (expected, theirs) = gradients(plan, root, True), gradients(plan, root, False)
    assert torch.equal(loss, expected)
    for name, gradient in theirs.items():
        mine = ours[name]
        assert (mine is None) == (gradient is None), name
        assert mine is None or gradient is None or torch.equal(mine, gradient), name


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("flux", "dev"),
        pytest.param("wan", "t2v-14b", marks=pytest.mark.slow),
        pytest.param("hidream", "full", marks=pytest.mark.slow),
        pytest.param("sdxl", "base-eps", marks=pytest.mark.slow),
        pytest.param("ltx_video", "t2v-13b-0.9.7", marks=pytest.mark.slow),
    ],
)
def test_little_is_left_whole(family: str, variant: str) -> None:
    opened = open_family(ModelConfig(family=family, variant=variant, random_weights=True))
    network = opened.load("network", "meta", None)
    blocks = [block for group in opened.blocks(network).values() for block in group]
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    short = sum(p.numel() for block in blocks for p in short_parameters(block, torch.bfloat16))
    assert short > 0.999 * inside > 0.96 * sum(p.numel() for p in network.parameters())


def test_blocks_that_travel_as_they_are_stored() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def block() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))

    plain = block()
    assert short_parameters(plain, torch.bfloat16) == {*plain[0].parameters(), *plain[2].parameters()}
    assert short_parameters(plain, None) == short_parameters(plain, torch.float32) == set()
    assert short_parameters(block().bfloat16(), torch.bfloat16) == set()
    assert short_parameters(nn.Sequential(nn.Linear(8, 8), nn.Embedding(64, 64)), torch.float16) == set()
    float8 = block()
    quantize([float8], "fp8")
    assert short_parameters(float8, torch.bfloat16) == set()
    for use_dora in (False, True):
        adapted = block()
        adapted[0].bfloat16()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], use_dora=use_dora), adapted)
        assert bool(short_parameters(adapted, torch.bfloat16)) != use_dora


def test_a_base_in_few_bits_is_refused() -> None:
    """Whole too; nothing is loaded."""
    for kind in QUANTIZED:
        model = {"family": "wan", "variant": "t2v-1.3b", "random_weights": True, "network": {"dtype": kind}}
        tables = {"model": model, "data": {"sources": [{"path": "clips"}]}, "training": {"steps": 1}}
        config = Config.model_validate(tables | {"adapter": {}, "parallel": {"dp_shard": 2}})
        family = open_family(config.model)
        with pytest.raises(ConfigError, match=rf'base in "{kind}" has not. Set parallel\.dp_shard = 1, or choose bf16'):
            family.validate(config)
        with pytest.raises(ConfigError, match="nowhere to load the autoencoder"):  # which is all that copies lack
            family.validate(Config.model_validate(tables | {"adapter": {}, "parallel": {"dp_replicate": 2}}))
        with pytest.raises(ConfigError, match=rf'"{kind}" stores weights that do not train.* Add an \[adapter\]'):
            family.validate(Config.model_validate(tables))


def test_refused_without_shards() -> None:
    for key, value in (("zero", 2), ("cpu_offload", True)):
        with pytest.raises(ValueError, match="dp_shard"):
            ParallelConfig.model_validate({key: value})
        ParallelConfig.model_validate({key: value, "dp_shard": 2})
    with pytest.raises(ValueError, match="less than or equal to 3"):
        ParallelConfig.model_validate({"zero": 4, "dp_shard": 2})


# -- four ranks ------------------------------------------------------------------------------------------------------


FOUR = [
    *(sharded("dp_replicate2-dp_shard2", zero=level) for level in (1, 2)),
    sharded("dp_replicate2-dp_shard2", cpu_offload=True, **{"optimizer.type": "muon"}),
    *(sharded("sp2-dp_shard2", zero=level) for level in (1, 2)),
    sharded("tp2-dp_shard2", zero=1, lora=True),
    sharded("tp2-dp_shard2", zero=2, cpu_offload=True),
    *(sharded("pp2-dp_shard2", zero=level) for level in (1, 2)),
    sharded("pp2-dp_shard2", zero=1, lora=True, cpu_offload=True),
    sharded("pp2-dp_shard2", zero=1, schedule="interleaved", stages_per_rank=2, model="flux-dev"),
    sharded("dp_shard4", zero=1, model="sdxl-base-eps"),
    sharded("dp_shard4", zero=2, model="wan-t2v-a14b"),
]
FOUR_BF16 = [
    replace(sharded(sizes), settings=(("zero", 1), ("training.precision", "bf16")))
    for sizes in ("dp_replicate2-dp_shard2", "sp2-dp_shard2", "tp2-dp_shard2", "pp2-dp_shard2")
]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_four_ranks(root: Path) -> None:
    found = launch(root, 4, FOUR + FOUR_BF16)
    for plan in FOUR:
        assert_as_alone(root, plan, found[plan.name])
    for plan in FOUR_BF16:  # parts of sums of the text's gradients are rounded in bf16
        assert_as_alone(root, plan, found[plan.name], rel=1e-2)
