"""Tensor parallel training gives what one process gives: losses, gradients, checkpoints, exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pipeline_cases
import pytest
import tensor_cases
import torch
from pipeline_cases import Plan
from ranks import on_ranks, result_of
from torch import Tensor

from kinema.config.schema import Config
from kinema.config.section import QUANTIZED
from kinema.errors import ConfigError
from kinema.families.registry import family_names, open_family
from kinema.families.tensor_plans import REFUSED, tensor_plan
from kinema.parallel.mesh import World
from kinema.parallel.packing import Packing
from kinema.parallel.tensor import _planned, check_tensor_parallel
from kinema.runs.checkpoint_load import contents, load

pytestmark = [pytest.mark.timeout(1500)]

REPRESENTATIVE = ("open_sora-v2", "wan-i2v-14b-480p", "flux-dev")
"""In `make test`: a network of our own, norms over all heads, matrices that are several in one."""
OTHERS = ("hunyuan_video-i2v", "qwen_image-edit", "wan-i2v-14b-480p", "wan-ti2v-5b", "wan-t2v-a14b", "open_sora-v2-dc")
FIRST = [next(case for case in pipeline_cases.ALL.values() if case.family == name).id for name in family_names()]
"""A variant of every family."""
FOUR_RANKS = ("dp_shard2-tp2", "dp_replicate2-tp2", "tp4", "pp2-tp2")
WITHOUT_STATES = ("sp2-tp2", "pp2-sp2", "dp_shard2-sp2", "pp2-dp_shard2", "dp_replicate2-dp_shard2")
"""Plans of four ranks whose gradients alone are compared."""
COMPILED = {
    2: [f"tp2:compiled {name} {kind}" for name in ("flux", "wan", "open_sora") for kind in ("full", "lora")],
    4: ["dp_shard2-tp2:compiled flux full", "pp2-tp2:compiled open_sora lora", "sp2-tp2:compiled wan full"],
}
"""By the number of ranks."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Results:
    """What one process gives, and what several give, by case."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, dict[str, Any]] = {}

    def alone(self, case: str) -> dict[str, Any]:
        if case not in self.known:
            self.known[case] = tensor_cases.run(World.alone(), case, self.root)
        return self.known[case]

    def launch(self, ranks: int, cases: list[str]) -> None:
        """Run cases (``SIZES:CASE``) on several processes, after those of one process that they go on from."""
        for case in cases:
            if "states" in case:
                self.alone(case.partition(":")[2])
        on_ranks(ranks, tensor_cases.main, self.root, cases)

    def shared(self, case: str) -> dict[str, Any]:
        return result_of(self.root, case)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("tensor"))


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
    """Every element, in units of the tensor's largest."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        worst = float((ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-3))
        assert worst < tolerance, f"{name}: {worst:.2g}"


def assert_trains_alike(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["shared"] > 0 == theirs["shared"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, value in theirs["weights"].items():
        assert ours["weights"][name].norm().item() == pytest.approx(value.norm().item(), rel=1e-5, abs=1e-6), name


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3 * tolerance)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-3 * tolerance)
    assert theirs["norm"] > tensor_cases.CLIP_NORM, "clipping was not in force"
    assert_close(ours["gradients"], theirs["gradients"], tolerance)


def assert_same_states(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """What was loaded, bitwise; what came of it; the checkpoint, which one process reads; the export."""
    assert all(torch.equal(ours["before"][name], value) for name, value in theirs["before"].items())
    assert_close(ours["after"], theirs["after"], tolerance)
    assert_close(ours["exported"], theirs["exported"], tolerance)
    path = Path(ours["written"])
    read = {name: torch.full(shape, 7.0, dtype=dtype) for name, (shape, dtype) in contents(path).items()}
    load(path, read)
    assert read.keys() == ours["after"].keys()
    assert all(torch.equal(value, ours["after"][name]) for name, value in read.items())


def plan_of(model: str, lora: bool, **settings: Any) -> str:
    return Plan(model, "", lora, 3, tuple(settings.items())).name


# -- two peers -------------------------------------------------------------------------------------------------------

AWAY = {"training.activation_checkpointing": "nested", "memory.offload_activations": True}
TRAININGS = {
    "open_sora-full": plan_of("open_sora-v2", False),
    "open_sora-lora-checkpointed": plan_of("open_sora-v2", True, **AWAY),
    "wan-full": plan_of("wan-i2v-14b-480p", False),
    "flux-lora": plan_of("flux-dev", True),
}
GRADIENTS = [f"gradients {name} {kind}" for name in ("flux", "open_sora_fused") for kind in ("full", "lora")]
STATES = ["states open_sora_fused full adamw", "states flux lora adamw"]


@pytest.fixture(scope="module")
def two(results: Results) -> Results:
    for model in REPRESENTATIVE:
        pipeline_cases.write_model(model, results.root)
    results.launch(2, [f"tp2:{case}" for case in (*TRAININGS.values(), *GRADIENTS, *STATES)])
    return results


@pytest.mark.parametrize("case", TRAININGS.values(), ids=TRAININGS)
def test_two_peers_train_like_one_process(two: Results, case: str) -> None:
    assert_trains_alike(two.shared(f"tp2:{case}"), two.alone(case))


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_two_peers(two: Results, case: str) -> None:
    assert_same_gradients(two.shared(f"tp2:{case}"), two.alone(case))


@pytest.mark.parametrize("case", STATES)
def test_checkpoints_and_exports_of_two_peers(two: Results, case: str) -> None:
    assert_same_states(two.shared(f"tp2:{case}"), two.alone(case), 1e-9)


# -- the whole matrix ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_family_on_two_peers(results: Results) -> None:
    models = list(dict.fromkeys([m for m in FIRST if not m.startswith(tuple(REFUSED))] + list(OTHERS)))
    cases = [plan_of(model, lora) for model in models for lora in (False, True)]
    for model in models:
        pipeline_cases.write_model(model, results.root)
    results.launch(2, [f"tp2:{case}" for case in cases])
    for case in cases:
        assert_trains_alike(results.shared(f"tp2:{case}"), results.alone(case))


def tolerance_of(case: str) -> float:
    """Wan's norms are in float32 whatever its weights are, and a part of a sequence sums in another order."""
    return 1e-6 if "sp2" in case and "wan" in case else 1e-9


EVERY_GRADIENT = [f"gradients {name} {kind}" for name in tensor_cases.NETWORKS for kind in ("full", "lora")]


@pytest.mark.slow
def test_four_ranks(results: Results) -> None:
    """Gradients of every combination of two ways, and what AdamW and Muon make of them, in float64."""
    states = [*STATES, "states open_sora full muon"]
    cases = [f"{sizes}:{case}" for sizes in FOUR_RANKS + WITHOUT_STATES for case in EVERY_GRADIENT]
    cases += [f"{sizes}:{case}" for sizes in FOUR_RANKS for case in states]
    results.launch(4, cases)
    for one in cases:
        case = one.partition(":")[2]
        if case in EVERY_GRADIENT:
            assert_same_gradients(results.shared(one), results.alone(case), tolerance_of(one))
        else:  # Muon's iteration is in float32
            assert_same_states(results.shared(one), results.alone(case), 1e-6 if "muon" in case else 1e-9)


@pytest.mark.slow
def test_eight_ranks(results: Results) -> None:
    """Three ways together."""
    plans = ("dp_shard2-sp2-tp2", "pp2-dp_shard2-tp2", "pp2-sp2-tp2")
    cases = [f"{sizes}:{case}" for sizes in plans for case in EVERY_GRADIENT]
    results.launch(8, cases)
    for one in cases:
        assert_same_gradients(results.shared(one), results.alone(one.partition(":")[2]), tolerance_of(one))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", COMPILED)
def test_compiled_blocks_of_peers(results: Results, ranks: int) -> None:
    """Compiled and checkpointed blocks have the gradients of those that are not."""
    results.launch(ranks, COMPILED[ranks])
    for one in COMPILED[ranks]:
        theirs = results.alone(one.partition(":")[2].replace("compiled", "gradients"))
        assert_same_gradients(results.shared(one), theirs, tolerance_of(one))


# -- plans and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_packing_is_undone(dim: int) -> None:
    packing = Packing(dim, (4, 8, 2), 2)
    whole = torch.arange(14.0 * 3).view(14, 3) if dim == 0 else torch.arange(14.0 * 3).view(3, 14)
    parts = [packing.part(whole, rank) for rank in range(2)]
    assert parts[1].movedim(dim, 0)[:, 0].tolist() == whole.movedim(dim, 0)[[2, 3, 8, 9, 10, 11, 13], 0].tolist()
    assert torch.equal(packing.original(torch.cat(parts, dim)), whole)


def configured(family: str, variant: str, tp: int, **tables: Any) -> Config:
    model = {"family": family, "variant": variant, "random_weights": True} | tables.pop("model", {})
    given = {"model": model, "data": {"sources": [{"path": "clips"}]}, "training": {"steps": 1}}
    return Config.model_validate(given | {"parallel": {"tp": tp}} | tables)


def refusal(family: str, variant: str, tp: int, **tables: Any) -> str:
    config = configured(family, variant, tp, **tables)
    with pytest.raises(ConfigError) as raised:
        check_tensor_parallel(config, open_family(config.model))
    return str(raised.value)


def test_sizes_that_fit_are_named() -> None:
    assert refusal("wan", "t2v-1.3b", 3).endswith("Sizes that fit: 1, 2, 4.")
    assert "does not divide the 24 heads" in refusal("flux", "dev", 16)
    config = configured("wan", "t2v-1.3b", 4)
    check_tensor_parallel(config, open_family(config.model))


def test_what_cannot_be_shared_is_refused() -> None:
    assert "sdxl cannot be tensor parallel: its network is made of convolutions" in refusal("sdxl", "base-eps", 2)
    assert 'Set adapter.type = "lora"' in refusal("wan", "t2v-1.3b", 2, adapter={"type": "dora"})
    for kind in QUANTIZED:
        stored = {"network": {"dtype": kind}}
        assert 'Set model.network.dtype = "bf16"' in refusal("wan", "t2v-1.3b", 2, adapter={}, model=stored)


@pytest.mark.slow
def test_every_family_has_a_plan_or_a_reason() -> None:
    """A plan shares nearly all weights of the blocks, at their real size."""
    for case in (pipeline_cases.ALL[name] for name in FIRST):
        if case.family in REFUSED:
            continue
        config = configured(case.family, case.variant, 1, model=dict(case.model or {}))
        family = open_family(config.model)
        network = family.load("network", "meta", None)
        plan = tensor_plan(network)
        assert plan is not None, case.id
        inside = {p for blocks in family.blocks(network).values() for p in blocks.parameters()}
        layers = {layer for _, layer, _ in _planned(network, plan)}
        shared = {p for layer in layers for p in layer.parameters()}
        share = sum(p.numel() for p in shared & inside) / sum(p.numel() for p in inside)
        assert share > 0.8, f"{case.id}: {share:.3f}"


def test_the_guide_lists_the_refusals() -> None:
    guide = " ".join((Path(__file__).parents[2] / "docs" / "guides" / "parallel.md").read_text("utf-8").split())
    assert all(reason in guide for reason in REFUSED.values())
