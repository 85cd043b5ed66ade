"""Ring attention: pieces of keys merged by their log-sum-exp are the whole, and so are gradients; over processes, what
one process gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import sequence_cases
import torch
from pipeline_cases import Plan, configured
from pydantic import ValidationError
from test_sequence import (
    ATTENTIONS,
    CHECKPOINTED,
    FIRST,
    FIVE,
    assert_exact,
    assert_same,
    assert_trains_alike,
    launch,
    one_thread,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kinema.config.schema import ParallelConfig
from kinema.parallel import sequence
from kinema.parallel.mesh import World
from kinema.parallel.ring import _biases
from kinema.parallel.ring_kernels import (
    CPU_FLASH,
    EFFICIENT,
    FLASH,
    PLAIN,
    Kernel,
    Piece,
    additive,
    choose_kernel,
    hidden,
    merge,
)
from kinema.parallel.ulysses import Peers
from kinema.training.networks import load_networks

pytestmark = [pytest.mark.timeout(600)]
__all__ = ["one_thread"]

RING = (("attention", "ring"),)
THREE = Plan("hunyuan_video-i2v", "sp3", steps=1, settings=CHECKPOINTED + RING)
MATRIX = {
    "every family": [Plan(name, "sp2", False, 1, settings=RING) for name in FIRST],
    "two": [Plan(name, "sp2", lora, settings=CHECKPOINTED + RING) for name in FIVE for lora in (False, True)],
    "four": [Plan(name, "sp4", settings=RING) for name in FIVE],
    "sharded": [Plan(name, "dp_shard2-sp2", True, settings=RING) for name in FIVE],
    "with matrices": [Plan(name, "sp2-tp2", settings=RING) for name in FIVE[:3]],
    "with stages": [Plan(name, "pp2-sp2", settings=RING) for name in FIVE],
}

# -- kernels ---------------------------------------------------------------------------------------------------------


def pieces_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel) -> list[Tensor]:
    """Output and gradients (of a gradient of ones) of attention over keys in pieces of 3, 8 and the rest."""
    total, pieces = None, []
    for keys in torch.arange(key.shape[2]).tensor_split([3, 11]):
        bias = None if mask is None else additive(mask, query.dtype)[..., keys]
        piece = Piece(query, key[:, :, keys], value[:, :, keys], bias, 0.7)
        output, lse, extra = kernel.forward(piece)
        assert output.shape == query.shape and lse.shape == query.shape[:-1]
        total = merge(total, output, lse)
        pieces.append(piece)
    assert total is not None
    output, lse = total
    blind = lse < hidden(query.dtype) / 2
    output, lse = output.masked_fill(blind[..., None], 0).to(query.dtype), lse.masked_fill(blind, float("inf"))
    parts = [kernel.backward(piece, torch.ones_like(output), output, lse, extra) for piece in pieces]
    of_query, of_key, of_value = zip(*parts, strict=True)
    return [output, sum(of_query[1:], of_query[0]), torch.cat(of_key, dim=2), torch.cat(of_value, dim=2)]


def assert_pieces_are_the_whole(kernel: Kernel, dtype: torch.dtype, kind: str | None, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # some keys are far more alike to the queries than others: a merge that forgot the weights would be seen
    inputs = [torch.randn(2, 3, length, 16, generator=generator).to(device, dtype) for length in (9, 19, 19)]
    inputs[1][:, :, 5] *= 3
    mask = None
    if kind is not None:
        mask = torch.rand((2, 1, 1 if kind == "keys" else 9, 19), generator=generator).to(device) > 0.4
        mask[0, ..., :3] = False  # the first piece
        if kind == "pairs":
            mask[1, :, 4] = False  # a query that sees nothing
    wide = [one.double().requires_grad_() for one in inputs]
    whole = scaled_dot_product_attention(*wide, mask, scale=0.7)
    wanted = [whole.detach(), *torch.autograd.grad(whole.sum(), wide)]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for ours, theirs in zip(pieces_of(*inputs, mask, kernel), wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * max(1, float(theirs.abs().max())))


@pytest.mark.parametrize("kind", [None, "keys", "pairs"])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(PLAIN, torch.float64), (PLAIN, torch.bfloat16), (CPU_FLASH, torch.float32), (CPU_FLASH, torch.bfloat16)],
    ids=["plain-float64", "plain-bfloat16", "cpu-float32", "cpu-bfloat16"],
)
def test_pieces_are_the_whole(kernel: Kernel, dtype: torch.dtype, kind: str | None) -> None:
    assert_pieces_are_the_whole(kernel, dtype, kind, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "keys", "pairs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pieces_are_the_whole_on_a_gpu(dtype: torch.dtype, kind: str | None) -> None:
    kernels = [EFFICIENT] if kind or dtype == torch.float32 else [FLASH, EFFICIENT]
    for kernel in kernels:
        assert_pieces_are_the_whole(kernel, dtype, kind, "cuda")
    query = torch.zeros(1, 2, 8, 64, device="cuda", dtype=dtype)
    bias = None if kind is None else query.new_zeros(1, 1, 1, 8)
    assert choose_kernel(query, query, query, bias) is kernels[0]


def test_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain kernel's memory does not grow with the square of the length."""
    monkeypatch.setattr("kinema.parallel.ring_kernels._SCORES", 2 * 3 * 19 * 2)
    for kind in (None, "keys", "pairs"):
        assert_pieces_are_the_whole(PLAIN, torch.float64, kind, "cpu")


def test_kernels_are_chosen_by_what_they_take() -> None:
    short, exact = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    assert choose_kernel(short, short, short, None) is CPU_FLASH
    assert choose_kernel(exact, exact, exact, None) is PLAIN
    assert choose_kernel(short, short, short[..., :4], None) is PLAIN


def test_biases_go_with_the_tokens() -> None:
    """Text of 3 and video of 4 over two processes: the first has tokens 0, 1, 3 and 4, the second 2, 5 and 6."""
    peers, query = Peers(cast(Any, None), 1, 2), torch.zeros(1, 1, 3, 2)
    real, mask = [[2, 1], [2, 2]], torch.arange(49.0).view(7, 7)
    first, second = cast("list[Tensor]", _biases(real, peers, query, mask, False))
    assert first[0, 0].tolist() == mask[[2, 5, 6]][:, [0, 1, 3, 4]].tolist()
    assert second[0, 0].tolist() == mask[[2, 5, 6]][:, [2, 5, 6]].tolist()
    of_keys = cast("list[Tensor]", _biases(real, peers, query, mask[:1] < 4, False))
    assert [(one == 0).flatten().tolist() for one in of_keys] == [[True] * 3 + [False], [True, False, False]]
    causal = cast("list[Tensor]", _biases(real, peers, query, None, True))
    assert (causal[0][0, 0] == 0).tolist() == [[True, True, False, False], [True] * 4, [True] * 4]


def test_the_setting_is_refused_without_a_sequence() -> None:
    assert ParallelConfig(sp=2, attention="ring").attention == "ring"
    with pytest.raises(ValidationError, match=r"sp = 1 shares no sequence"):
        ParallelConfig(attention="ring")


# -- three processes -------------------------------------------------------------------------------------------------

RING_ATTENTIONS = [f"ring_{case}" for case in ATTENTIONS]
EXACT = ["ring_exact:wan-ti2v-5b-i2v", "ring_exact:hunyuan_video15-480p-t2v"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ring")


@pytest.fixture(scope="module")
def three(root: Path) -> Callable[[str], dict[str, Any]]:
    return launch(root, 3, [*RING_ATTENTIONS, *EXACT, "ring_bytes", THREE.name])


@pytest.mark.parametrize("case", RING_ATTENTIONS)
def test_attention(three: Callable[[str], dict[str, Any]], root: Path, case: str) -> None:
    ours, theirs = three(case), sequence_cases.run(World.alone(), case, root)
    torch.testing.assert_close(ours["output"], theirs["output"], rtol=0, atol=1e-12)
    assert_same(ours["gradients"], theirs["gradients"], 1e-12)


@pytest.mark.parametrize("case", EXACT)
def test_predictions_and_gradients(three: Callable[[str], dict[str, Any]], root: Path, case: str) -> None:
    ours, theirs = three(case), sequence_cases.run(World.alone(), case, root)
    assert_exact(ours, theirs)
    assert ours["seen"] <= theirs["seen"] // 3 + 1, "blocks see a third of the tokens"


def test_a_training(three: Callable[[str], dict[str, Any]], root: Path) -> None:
    assert_trains_alike(three(THREE.name), sequence_cases.run(World.alone(), THREE.alone.name, root))


def test_the_setting_reaches_the_blocks(
    three: Callable[[str], dict[str, Any]], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training above would be right with the other way too."""
    config, family = configured(THREE, root)
    asked: list[Any] = []
    monkeypatch.setattr(sequence, "split_sequences", lambda *given: asked.append(given[3]))
    load_networks(config, family, World.alone())
    assert asked == ["ring"]


def test_what_is_sent(three: Callable[[str], dict[str, Any]]) -> None:
    """Forwards keys and values of all but one; backwards once more, and as many numbers of their gradients."""
    one_way = (3 - 1) * 2 * 4 * 2 * 6 * 2 * 8  # keys and values of 4 tokens, 2 heads of 6, 2 samples of float64
    assert three("ring_bytes")["sent"] == [[one_way, 2 * one_way]] * 3


# -- the whole matrix ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", MATRIX)
def test_matrix(root: Path, kind: str) -> None:
    plans = MATRIX[kind]
    result = launch(root, plans[0].mesh().total, [plan.name for plan in plans])
    for plan in plans:
        assert_trains_alike(result(plan.name), sequence_cases.run(World.alone(), plan.alone.name, root))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_family_exactly(root: Path, ranks: int) -> None:
    cases = [f"ring_exact:{name}" for name in FIRST]
    result = launch(root, ranks, cases)
    for case in cases:
        assert_exact(result(case), sequence_cases.run(World.alone(), case, root))


@pytest.mark.slow
def test_compiled_blocks(root: Path) -> None:
    cases = [f"ring_compiled:{name}" for name in ("wan-t2v-1.3b", "flux-dev")]
    result = launch(root, 2, cases)
    for case in cases:
        theirs = sequence_cases.run(World.alone(), case, root)
        torch.testing.assert_close(result(case)["prediction"], theirs["prediction"], rtol=0, atol=1e-4)
        assert_same(result(case)["gradients"], theirs["gradients"], 1e-4)
