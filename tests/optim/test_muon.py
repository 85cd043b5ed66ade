"""Muon and its variants against their definitions in float64, where only singular values are iterated."""

import pytest
import torch

from kinema.optim.muon import Muon, Orthogonal, orthogonalise

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonal_in_float64(matrix: torch.Tensor, method: str = "newton_schulz") -> torch.Tensor:
    """The iteration acts on singular values alone: the closed form through the SVD."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm() / (1.0 if method == "newton_schulz" else 1.02)
    for a, b, c in JORDAN if method == "newton_schulz" else POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_orthogonalise_acts_on_singular_values(shape, method):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for ours, matrix in zip(orthogonalise(stack, method), stack, strict=True):
        torch.testing.assert_close(ours.double(), orthogonal_in_float64(matrix, method), atol=2e-5, rtol=0)


def test_polar_express_comes_nearer_where_singular_values_are_far_apart():
    """Of values from 1 down to 0.01 of the largest: the furthest from 1 of each."""
    g = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(32, 32, generator=g))[0] for _ in range(2))
    matrix = u @ torch.diag(torch.logspace(0, -2, 32)) @ v
    far = {}
    for method in ("newton_schulz", "polar_express"):
        values = torch.linalg.svdvals(orthogonalise(matrix[None], method)[0])
        far[method] = float((values - 1).abs().max())
    assert far["polar_express"] < 0.2 and 0.3 < far["newton_schulz"] < 0.6


def reference_update(variant, momentum, state, method, beta2=0.9, eps=1e-8):
    o = orthogonal_in_float64(momentum, method)
    rows, columns = o.shape
    if variant == "muon":
        return 0.2 * max(rows, columns) ** 0.5 * o
    if variant == "adamuon":
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * o**2
        divided = o / (state["v"].sqrt() + eps)
        return divided * (0.2 / divided.square().mean().sqrt())
    lines = (o**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * lines
    divided = o / (state["v"].sqrt() + eps)
    return divided * (o.norm() / divided.norm()) * 0.2 * max(rows, columns) ** 0.5


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize(
    ("variant", "method"),
    [("muon", "newton_schulz"), ("muon", "polar_express"), ("adamuon", "newton_schulz"), ("normuon", "polar_express")],
)
def test_muon_follows_its_definition_for_twenty_steps(variant, method, shape):
    g = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=g)) for _ in range(3)]
    reference = [w.detach().double().clone() for w in weights]
    momenta, states = [torch.zeros_like(w) for w in reference], [{} for _ in weights]
    muon = Muon(weights, lr=0.02, momentum=0.9, weight_decay=0.1, how=Orthogonal(variant, method, 0.9))
    for _ in range(20):
        gradients = [torch.randn(shape, generator=g) for _ in weights]
        for i, gradient in enumerate(gradients):
            weights[i].grad = gradient.clone()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient.double()
            seen = 0.1 * gradient.double() + 0.9 * momenta[i]
            update = reference_update(variant, seen, states[i], method)
            reference[i] = reference[i] * (1 - 0.02 * 0.1) - 0.02 * update
        muon.step()
    for ours, theirs in zip(weights, reference, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", ["muon", "adamuon", "normuon"])
def test_updates_are_of_adamws_size(variant):
    g = torch.Generator().manual_seed(4)
    weight = torch.nn.Parameter(torch.zeros(24, 40))
    muon = Muon([weight], lr=1.0, how=Orthogonal(variant))
    weight.grad = torch.randn(24, 40, generator=g)
    muon.step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.15)


def test_normuon_evens_out_lines():
    """Along the longer side of a matrix whose lines differ tenfold, the update's lines differ little."""
    weight = torch.nn.Parameter(torch.zeros(48, 8))
    weight.grad = torch.randn(48, 8, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, 1, 48)[:, None]
    spread = {}
    for variant in ("muon", "normuon"):
        with torch.no_grad():
            weight.zero_()
        Muon([weight], lr=1.0, how=Orthogonal(variant)).step()
        norms = weight.detach().norm(dim=1)
        spread[variant] = float(norms.max() / norms.min())
    assert spread["normuon"] < 1.001 and spread["muon"] > 4


def test_muon_agrees_with_torchs_in_bf16_precision():
    g = torch.Generator().manual_seed(2)
    start = torch.randn(16, 24, generator=g)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = Muon([ours], lr=0.02, momentum=0.95)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(16, 24, generator=g)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.03


def test_muon_stacks_pieces_of_bounded_size(monkeypatch):
    """Many matrices of one shape in several pieces: the same step, and no stack above the bound."""
    g = torch.Generator().manual_seed(4)
    starts, gradients = ([torch.randn(6, 10, generator=g) for _ in range(5)] for _ in range(2))
    sizes = []

    def step() -> list[torch.nn.Parameter]:
        weights = [torch.nn.Parameter(start.clone()) for start in starts]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        Muon(weights, lr=0.02, weight_decay=0.1).step()
        return weights

    def counted(stack, method):
        sizes.append(len(stack))
        return orthogonalise(stack, method)

    whole = step()
    monkeypatch.setattr("kinema.optim.muon.orthogonalise", counted)
    monkeypatch.setattr("kinema.optim.muon.PIECE_BYTES", 2 * 6 * 10 * 4)
    for ours, theirs in zip(step(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert sizes == [2, 2, 1]
