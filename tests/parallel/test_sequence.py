"""Sequence parallel training gives what one process gives: predictions, gradients, whole trainings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import sequence_cases
import torch
from pipeline_cases import ALL, Plan, config_of, configured, family_of, write_model
from ranks import on_ranks, result_of
from torch import Tensor

from kinema.config.schema import ModelConfig
from kinema.errors import ConfigError, UserError
from kinema.families.registry import family_names, open_family
from kinema.families.sequence_plans import PLANS, REFUSED, First, Tokens
from kinema.families.standard import StandardFamily
from kinema.parallel.mesh import World
from kinema.parallel.ulysses import Layout, Peers
from kinema.sampling.together import Rank, sequence_attention
from kinema.training.networks import check_networks

pytestmark = [pytest.mark.timeout(600)]

FIVE = ("wan-i2v-14b-480p", "flux-dev", "hunyuan_video-i2v", "qwen_image-edit-2511", "open_sora-v2")
PARTICULAR = ("wan-ti2v-5b-i2v", "hidream-full", "hunyuan_video15-480p-t2v")
"""A time for each token, streams that the network takes apart, masks made inside."""
SPLIT = [name for name in family_names() if name not in REFUSED and any(c.family == name for c in ALL.values())]
FIRST = [next(case.id for case in ALL.values() if case.family == name) for name in SPLIT]
"""A variant of every family."""

CHECKPOINTED = (("training.activation_checkpointing", True),)
FEW = [
    Plan("wan-i2v-14b-480p", "sp2", settings=CHECKPOINTED),
    Plan("hunyuan_video-i2v", "sp2", lora=True, steps=1, settings=CHECKPOINTED),
]
MATRIX = {
    "every family": [Plan(name, "sp2", False, 1) for name in FIRST],
    "every family, lora": [Plan(name, "sp2", True, 1) for name in FIRST],
    "two": [Plan(name, "sp2", lora) for name in FIVE for lora in (False, True)],
    "three": [Plan(name, "sp3", steps=1, settings=CHECKPOINTED) for name in FIVE],
    "four": [Plan(name, "sp4") for name in FIVE],
    "sharded": [Plan(name, "dp_shard2-sp2", lora) for name in FIVE for lora in (False, True)],
    "replicated": [Plan(name, "dp_replicate2-sp2") for name in FIVE],
    "with matrices": [Plan(name, "sp2-tp2", lora) for name in FIVE[:3] for lora in (False, True)],
    "with stages": [Plan(name, "pp2-sp2", lora) for name in FIVE for lora in (False, True)],
    "replicated shards": [Plan(name, "dp_replicate2-dp_shard2-sp2", name == "flux-dev", 2) for name in FIVE],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def models(cases: list[str]) -> set[str]:
    """The models that cases need."""
    names = {case.split(":")[-1].split("+")[0] for case in cases}
    return names & ALL.keys()


def launch(root: Path, ranks: int, cases: list[str]) -> Callable[[str], dict[str, Any]]:
    """Run cases on several processes; a function that gives their results."""
    for name in sorted(models(cases)):
        write_model(name, root)
    on_ranks(ranks, sequence_cases.main, root, cases)
    return lambda case: result_of(root, case)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < tolerance * scale, name


def assert_exact(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """In float64: every element."""
    torch.testing.assert_close(ours["prediction"], theirs["prediction"], rtol=0, atol=1e-9)
    assert_same(ours["gradients"], theirs["gradients"], 1e-9)


def assert_trains_alike(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """In float32: losses, norms of gradients and of every tensor."""
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-4)
    assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-5)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, value in theirs["weights"].items():
        assert ours["weights"][name].norm().item() == pytest.approx(value.norm().item(), rel=1e-5, abs=1e-6), name


# -- two processes ---------------------------------------------------------------------------------------------------

EXACT = [f"exact:{name}" for name in PARTICULAR]
ATTENTIONS = [f"attention:{name}" for name in sequence_cases.ATTENTIONS]
OTHER = "other_kernels:wan-ti2v-5b-i2v"
SAMPLED = ["sampled:wan-t2v-1.3b", "sampled_in_blocks:wan-t2v-1.3b"]
TILED = "tiles:wan-t2v-1.3b"
"""Tiles of several calls that depend on each other."""
TILED_TOO = [f"tiles:{name}" for name in ("hunyuan_video-t2v", "open_sora-v2-dc")]
"""Tiles in time; an autoencoder of ours."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def two(root: Path) -> Callable[[str], dict[str, Any]]:
    return launch(root, 2, [*ATTENTIONS, *EXACT, OTHER, *SAMPLED, TILED, *(plan.name for plan in FEW)])


@pytest.mark.parametrize("case", EXACT)
def test_predictions_and_gradients(two: Callable[[str], dict[str, Any]], root: Path, case: str) -> None:
    ours, theirs = two(case), sequence_cases.run(World.alone(), case, root)
    assert_exact(ours, theirs)
    assert ours["seen"] <= theirs["seen"] // 2 + 1, "blocks see half of the tokens"


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention(two: Callable[[str], dict[str, Any]], root: Path, case: str) -> None:
    ours, theirs = two(case), sequence_cases.run(World.alone(), case, root)
    torch.testing.assert_close(ours["output"], theirs["output"], rtol=0, atol=1e-12)
    assert_same(ours["gradients"], theirs["gradients"], 1e-12)


@pytest.mark.parametrize("plan", FEW, ids=lambda plan: plan.name)
def test_trainings(two: Callable[[str], dict[str, Any]], root: Path, plan: Plan) -> None:
    assert_trains_alike(two(plan.name), sequence_cases.run(World.alone(), plan.alone.name, root))


def test_other_kernels_are_told(two: Callable[[str], dict[str, Any]]) -> None:
    assert "WanTransformerBlock has not done" in two(OTHER)["message"]


@pytest.mark.parametrize("case", SAMPLED)
def test_samples_drawn_together(two: Callable[[str], dict[str, Any]], root: Path, case: str) -> None:
    theirs = sequence_cases.run(World.alone(), case, root)["samples"]
    assert float(theirs.std()) > 0.01
    torch.testing.assert_close(two(case)["samples"], theirs, rtol=0, atol=3e-5)


def assert_tiles_are_shared(result: dict[str, Any], ranks: int) -> None:
    """The same pixels, on every process; each calls the decoder for its share alone."""
    assert result["apart"] == [0.0] * ranks
    alone, *twice, whole = zip(*result["calls"], strict=True)
    assert len(set(alone)) == 1 and sum(twice[0]) == alone[0] == sum(twice[1])
    assert max(twice[0]) <= -(-alone[0] // ranks) + 2, "a tile more than the others"
    assert len(set(whole)) == 1, "what is no tiles is not shared"


def test_tiles_are_shared_out(two: Callable[[str], dict[str, Any]]) -> None:
    assert_tiles_are_shared(two(TILED), 2)


@pytest.mark.slow
def test_tiles_of_all_kinds_are_shared_out(root: Path) -> None:
    result = launch(root, 2, TILED_TOO)
    for case in TILED_TOO:
        assert_tiles_are_shared(result(case), 2)


# -- the whole matrix ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", MATRIX)
def test_matrix(root: Path, kind: str) -> None:
    plans = MATRIX[kind]
    result = launch(root, plans[0].mesh().total, [plan.name for plan in plans])
    for plan in plans:
        assert_trains_alike(result(plan.name), sequence_cases.run(World.alone(), plan.alone.name, root))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 5])
def test_every_variant_exactly(root: Path, ranks: int) -> None:
    """Five processes are more than the tiny networks have heads, and than some streams have tokens."""
    cases = [f"exact:{case.id}" for case in ALL.values() if case.family not in REFUSED]
    if ranks == 5:
        cases = [f"exact:{name}" for name in FIRST]
    cases += ATTENTIONS
    result = launch(root, ranks, cases)
    for case in cases:
        ours, theirs = result(case), sequence_cases.run(World.alone(), case, root)
        if "output" in theirs:
            torch.testing.assert_close(ours["output"], theirs["output"], rtol=0, atol=1e-12)
            assert_same(ours["gradients"], theirs["gradients"], 1e-12)
        else:
            assert_exact(ours, theirs)


@pytest.mark.slow
def test_compiled_blocks(root: Path) -> None:
    cases = [f"compiled:{name}" for name in ("wan-t2v-1.3b", "flux-dev")]
    result = launch(root, 2, cases)
    for case in cases:
        theirs = sequence_cases.run(World.alone(), case, root)
        torch.testing.assert_close(result(case)["prediction"], theirs["prediction"], rtol=0, atol=1e-4)
        assert_same(result(case)["gradients"], theirs["gradients"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_tiles_of_every_class(root: Path, ranks: int) -> None:
    cases = [f"tiles:{name}" for name in sequence_cases.TILES]
    result = launch(root, ranks, cases)
    for case in cases:
        assert_tiles_are_shared(result(case), ranks)


@pytest.mark.slow
def test_parts_take_turns(root: Path) -> None:
    case = "sampled_in_parts:wan-t2v-1.3b"
    theirs = sequence_cases.run(World.alone(), case, root)["samples"]
    torch.testing.assert_close(launch(root, 2, [case])(case)["samples"], theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_command_draws_together(root: Path) -> None:
    """`kinema sample --sp 2` writes the file that one process writes, the autoencoder's tiles shared out."""
    write_model("wan-t2v-1.3b", root)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["a red ball", "--model", str(root / "wan-t2v-1.3b"), "--family", "wan", "--variant", "t2v-1.3b"]
    asked += ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2", "--crf", "0", "--device", "cpu"]
    asked += ["--tile-size", "16"]
    found = []
    for launcher, sp in (([], "1"), (several, "2")):
        command = [sys.executable, *launcher, "-m", "kinema", "sample", *asked, "--sp", sp, "--out", str(root / sp)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("a-red-ball-0.mp4") == 1, "one of them writes and says so"
        found.append((root / sp / "a-red-ball-0.mp4").read_bytes())
    assert found[0] == found[1]


# -- without processes -----------------------------------------------------------------------------------------------


def layout(rank: int, size: int, **lengths: int) -> Layout:
    return Layout(Peers(cast(Any, None), rank, size), lengths)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8])
def test_every_token_is_taken_once(length: int) -> None:
    for size in (2, 3, 4):
        layouts = [layout(rank, size, video=length) for rank in range(size)]
        taken = [one.start("video") + i for one in layouts for i in range(one.real("video")[one.peers.rank])]
        assert taken == list(range(length))
        counts = layouts[0].real("video")
        assert max(counts) - min(counts) <= 1
        for one in layouts:  # whoever has none holds a copy of the last
            part = one.split(torch.arange(length)[None], "video")[0]
            assert part.tolist() == list(range(one.start("video"), one.start("video") + one.held("video")))
            assert len(part) == max(1, counts[one.peers.rank])


def test_arguments_go_with_the_tokens() -> None:
    one = layout(1, 2, text=3, video=5)  # it has token 2 of the text, and 3 and 4 of the video
    table = torch.arange(8)[:, None]
    assert one.slice(table, Tokens(("text", "video"), dim=0))[:, 0].tolist() == [2, 6, 7]
    assert one.slice(table, Tokens(("video", "text"), dim=0))[:, 0].tolist() == [3, 4, 7]
    assert one.slice((table, None), Tokens(("text", "video"), dim=0))[1] is None
    video, text = torch.arange(5), torch.arange(3)
    both = one.slice((video, text), (Tokens(("video",), dim=0), Tokens(("text",), dim=0)))
    assert [part.tolist() for part in both] == [[3, 4], [2]]
    for all_tokens in (torch.zeros(2, 1, 4), torch.zeros(2, 6)):
        assert one.slice(all_tokens, Tokens(("video",), ndim=3)) is all_tokens
    assert [one.slice(count, First("video")) for count in (0, 2, 3, 4, 5)] == [0, 0, 0, 1, 2]
    assert [layout(0, 2, video=5).slice(count, First("video")) for count in (0, 2, 5)] == [0, 2, 3]
    with pytest.raises(AssertionError, match="does not have 5 tokens"):
        one.slice(torch.zeros(2, 4), Tokens(("video",)))


def test_every_family_has_a_plan_or_a_reason() -> None:
    kinds = set()
    for name in SPLIT:
        case = next(case for case in ALL.values() if case.family == name)
        family = open_family(ModelConfig(family=case.family, variant=case.variant, random_weights=True))
        assert isinstance(family, StandardFamily)
        kind = family.known_config("network")["_class_name"]
        assert PLANS[kind].keys() <= set(family.block_lists), name
        kinds.add(kind)
    assert kinds == PLANS.keys()
    assert REFUSED.keys() <= set(family_names())


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in ALL.values() if case.family == "sdxl")
    config = config_of(case, tmp_path, tmp_path, parallel={"sp": 2})
    with pytest.raises(ConfigError, match=r"parallel\.sp = 2: sdxl cannot be sequence parallel: its network is"):
        check_networks(config, family_of(case, tmp_path))
    write_model("wan-t2v-1.3b", tmp_path)
    config, family = configured(Plan("wan-t2v-1.3b", "sp2"), tmp_path)
    check_networks(config, family)
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "flash")
    with pytest.raises(ConfigError, match='DIFFUSERS_ATTN_BACKEND = "flash" does not use'):
        check_networks(config, family)


def test_ranks_that_draw_together() -> None:
    ranks = [Rank(number, 4, number, together=2) for number in range(4)]
    assert [(rank.share, rank.shares, rank.writes) for rank in ranks] == [
        (0, 2, True),
        (0, 2, False),
        (1, 2, True),
        (1, 2, False),
    ]
    with pytest.raises(UserError, match="--sp 3 draws each sample with 3 processes, and there are 4"):
        Rank(0, 4, 0, together=3).check()


def test_how_they_attend_is_told() -> None:
    assert [sequence_attention(*given) for given in ((None, 1), (None, 2), ("ring", 2))] == [
        "ulysses",
        "ulysses",
        "ring",
    ]
    with pytest.raises(UserError, match=r"--sp-attention ring is for .*: give --sp too"):
        sequence_attention("ring", 1)
    with pytest.raises(UserError, match=r"--sp-attention rings: expected ulysses or ring.*\bring\b"):
        sequence_attention("rings", 2)
