"""Each projection against its definition, as a matrix in float64."""

import pytest
import torch

from kinema.optim.projections import Kind, choose, down, side, up

SHAPES = ((12, 20), (20, 12), (24, 24), (7, 15), (16, 64))
KINDS: tuple[Kind, ...] = ("svd", "topk", "uniform", "srht")
RANK = 5


def drawn(kind, shape, seed=0):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gradient, choose(kind, gradient, RANK, torch.Generator().manual_seed(1))


def matrix_of(kind, subspace, shape):
    """R [rank, n], by what `down` does to unit vectors."""
    n = shape[side(kind, shape)]
    lines = torch.eye(n, dtype=torch.float64)
    columns = []
    for line in lines:
        x = torch.zeros(shape, dtype=torch.float64)
        x.select(1 - side(kind, shape), 0).copy_(line)
        columns.append(down(kind, {k: v.double() if k == "basis" else v for k, v in subspace.items()}, x)[:, 0])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_orthonormal_and_up_is_the_transpose(kind, shape):
    gradient, subspace = drawn(kind, shape)
    exact = {k: v.double() if k == "basis" else v for k, v in subspace.items()}
    r = matrix_of(kind, exact, shape)
    tolerance = 1e-5 if kind == "svd" else 1e-12  # eigenvectors are found in fp32
    torch.testing.assert_close(r @ r.mT, torch.eye(RANK, dtype=torch.float64), atol=tolerance, rtol=0)
    x = gradient if side(kind, shape) == 0 else gradient.mT
    low = down(kind, exact, gradient)
    torch.testing.assert_close(low, r @ x, atol=1e-12, rtol=0)
    back = up(kind, exact, low, shape)
    assert back.shape == shape
    torch.testing.assert_close(back if side(kind, shape) == 0 else back.mT, r.mT @ low, atol=1e-12, rtol=0)
    assert float(back.norm()) == pytest.approx(float(low.norm()), rel=1e-5)  # so nothing is lost or scaled on the way


@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_svd_and_topk_keep_is_the_most(shape):
    gradient, subspace = drawn("svd", shape)
    kept = down("svd", {"basis": subspace["basis"].double()}, gradient).square().sum()
    best = torch.linalg.svdvals(gradient)[:RANK].square().sum()
    assert float(kept / best) == pytest.approx(1, abs=1e-6)
    gradient, subspace = drawn("topk", shape)
    longer = 0 if shape[0] >= shape[1] else 1
    norms = gradient.norm(dim=1 - longer)
    assert set(subspace["lines"].tolist()) == set(norms.argsort()[-RANK:].tolist())


def test_the_hadamard_transform_spreads_one_line_over_all():
    """A single line of 16 becomes numbers of one size, whatever the signs; of 24 = 8 x 3, of no more than twice it."""
    for n, largest in ((16, 1.0), (24, 2.0**0.5)):
        x = torch.zeros(n, 40, dtype=torch.float64)
        x[3] = 1.0
        lines = {"lines": torch.arange(n), "signs": torch.ones(n, dtype=torch.int8)}
        spread = down("srht", lines, x)[:, 0].abs()
        assert float(spread.max()) <= largest / n**0.5 + 1e-12
        assert float(spread.norm()) == pytest.approx(1)


def test_draws_follow_the_key():
    def lines(kind, seed):
        return choose(kind, torch.ones(20, 12), RANK, torch.Generator().manual_seed(seed))["lines"].tolist()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    for kind in ("uniform", "srht"):
        assert lines(kind, 1) == lines(kind, 1) != lines(kind, 2)
    assert torch.equal(before, torch.get_rng_state())
