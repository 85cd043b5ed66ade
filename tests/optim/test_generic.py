"""The generic optimiser against its definition in float64, its parts against AdamW and Muon, and what it remembers."""

import itertools

import pytest
import torch

from kinema.config.optimizer import OptimizerConfig
from kinema.errors import ConfigError
from kinema.optim.generic import Forms, Generic
from kinema.optim.muon import Orthogonal
from kinema.optim.optimizers import build_optimizers, set_lr
from kinema.randomness import generator

LR, DECAY, BETA1, BETA2, EPS = 0.02, 0.1, 0.9, 0.95, 1e-8
RANK, REFRESH, SEED = 3, 6, 7


def directions(projection, gradient, step, name="weight"):
    """R [RANK, n] in float64 and the side it acts on, by the definitions."""
    rows, columns = gradient.shape
    longer = 0 if rows >= columns else 1
    side = longer if projection in ("topk", "uniform") else 1 - longer
    x = gradient if side == 0 else gradient.mT
    n = len(x)
    if projection == "svd":
        return torch.linalg.svd(x, full_matrices=False)[0][:, :RANK].mT, side
    unit = torch.eye(n, dtype=torch.float64)
    if projection == "topk":
        return unit[x.norm(dim=1).argsort()[-RANK:]], side
    draw = generator(SEED, step, name, "projection")
    lines = torch.randperm(n, generator=draw)[:RANK]
    if projection == "uniform":
        return unit[lines], side
    signs = torch.diag((torch.randint(0, 2, (n,), generator=draw, dtype=torch.int8) * 2 - 1).double())
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < n:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    return (hadamard / n**0.5 @ signs)[lines], side


def reference(start, gradients, first, second, projection="svd"):
    w, m, v, r, side = start.double().clone(), None, None, None, 0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        if first == "none":
            n = g
        elif first == "full":
            m = (0 if m is None else BETA1 * m) + (1 - BETA1) * g
            n = m / (1 - BETA1**t)
        else:
            s = (t - 1) % REFRESH + 1
            if s == 1:
                r, side = directions(projection, g, t)
                m = 0
            x = g if side == 0 else g.mT
            m = BETA1 * m + (1 - BETA1) * (r @ x)
            n = r.mT @ m / (1 - BETA1**s) + x - r.mT @ r @ x
            n = n if side == 0 else n.mT
        if second == "none":
            u = n
        else:
            square = g**2 if second == "full" else (g**2).mean(dim=1 if g.shape[0] >= g.shape[1] else 0, keepdim=True)
            v = (0 if v is None else BETA2 * v) + (1 - BETA2) * square
            u = n / ((v / (1 - BETA2**t)).sqrt() + EPS)
        w = w - LR * (u + DECAY * w)
    return w


def trained(start, gradients, forms, dtype=torch.float32, rounding="none"):
    weight = torch.nn.Parameter(start.clone().to(dtype))
    groups = [{"params": [weight], "param_names": ["weight"], "seed": SEED}]
    optimizer = Generic(groups, LR, forms, (BETA1, BETA2), EPS, DECAY, rounding)
    for gradient in gradients:
        weight.grad = gradient.to(dtype)
        optimizer.step()
    return weight.detach(), optimizer


def numbers(shape, count=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(count)]


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(["full", "none"], ["full", "subset_norm", "none"]))
)
def test_moments_follow_their_definition_for_twenty_steps(first, second, shape):
    start, gradients = numbers(shape)
    weight, optimizer = trained(start, gradients, Forms(first, second))
    torch.testing.assert_close(weight.double(), reference(start, gradients, first, second), atol=2e-5, rtol=0)
    state = next(iter(optimizer.state.values()))
    lines = {"full": shape, "subset_norm": (16, 1) if shape == (16, 8) else (1, 16)}.get(second)
    assert (tuple(state["second_moment"].shape) if "second_moment" in state else None) == lines
    assert ("momentum" in state) == (first == "full")


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
@pytest.mark.parametrize("projection", ["svd", "topk", "uniform", "srht"])
def test_subspace_momentum_follows_its_definition_for_twenty_steps(projection, shape):
    start, gradients = numbers(shape)
    weight, optimizer = trained(start, gradients, Forms("subspace", "subset_norm", projection, RANK, REFRESH))
    want = reference(start, gradients, "subspace", "subset_norm", projection)
    torch.testing.assert_close(weight.double(), want, atol=2e-5, rtol=0)
    state = next(iter(optimizer.state.values()))
    assert tuple(state["momentum"].shape) == (RANK, 8 if projection in ("topk", "uniform") else 16)


def test_with_full_moments_it_is_adamw():
    """torch's own, over a matrix and a vector; a matrix that is no larger than the rank is kept whole."""
    start, gradients = numbers((6, 10))
    theirs = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([theirs], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        adamw.step()
    for forms in (Forms(), Forms("subspace", rank=6), Forms("subspace", "subset_norm", rank=2).of_others):
        ours, _ = trained(start, gradients, forms)
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["muon", "adamuon", "normuon"])
def test_orthogonal_updates_of_its_moments(variant):
    """Without Nesterov's look ahead: what `Orthogonal` makes of the running average alone."""
    start, gradients = numbers((6, 10))
    how = Orthogonal(variant, "polar_express", BETA2)
    ours, _ = trained(start, gradients, Forms("full", orthogonal=how))
    w, m, state = start.clone(), torch.zeros(6, 10), {}
    for gradient in gradients:
        m = BETA1 * m + (1 - BETA1) * gradient
        (update,) = how.updates([w], [m], [state])
        w = w - LR * (update + DECAY * w)
    torch.testing.assert_close(ours, w, atol=1e-4, rtol=0)


def test_kahan_summation_keeps_what_bf16_loses():
    """Updates of 1e-5 to weights of 1 vanish in bf16, one by one; with compensation they add up."""
    start, gradients = torch.ones(8, 8), [torch.ones(8, 8)] * 50
    weights = {}
    for rounding in ("none", "kahan"):
        weight = torch.nn.Parameter(start.bfloat16().clone())
        optimizer = Generic([weight], 1e-3, Forms("full", "subset_norm"), weight_decay=0.0, rounding=rounding)
        for gradient in gradients:
            weight.grad = gradient.bfloat16()
            optimizer.step()
        weights[rounding] = float(weight.detach().float().mean())
    assert weights["none"] == 1.0
    assert weights["kahan"] == pytest.approx(1 - 50e-3, abs=2**-8)


@pytest.mark.parametrize("kind", ["muon", "generic"])
@pytest.mark.parametrize("variant", ["muon", "adamuon", "normuon"])
def test_weights_in_bf16(kind, variant):
    """Near the same steps in fp32; second moments are in fp32 either way."""
    gradients = numbers((16, 24), count=5)[1]
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(16, 24, dtype=dtype))
        config = OptimizerConfig(type=kind, variant=variant, lr=0.1, weight_decay=0.0)
        (optimizer,) = build_optimizers({"network.a": weight}, {"network.a"}, config)
        for gradient in gradients:
            weight.grad = gradient.to(dtype)
            optimizer.step()
        moved[dtype] = weight.detach().float()
        state = optimizer.state[weight]
        assert {state[key].dtype for key in ("second_moment", "line_moment") if key in state} <= {torch.float32}
    exact, short = moved.values()
    assert (short - exact).norm() / exact.norm() < 0.06  # adamuon: 0.031, of small elements that it divides


def network_and_names():
    net = torch.nn.ModuleDict({"blocks": torch.nn.Linear(12, 20), "head": torch.nn.Linear(20, 4)})
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return {f"network.{name}": p for name, p in net.named_parameters()}, {"network.blocks.weight"}


def steps(optimizers, parameters, count, seed):
    set_lr(optimizers, 1.0, 1.0)
    for step in range(count):
        for name, p in parameters.items():
            p.grad = torch.randn(p.shape, generator=generator(seed, step, name))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("settings", [
    {"first_moment": "subspace", "second_moment": "subset_norm", "projection": "srht", "rank": 4, "refresh_steps": 4},
    {"first_moment": "subspace", "variant": "normuon", "projection": "svd", "rank": 4, "refresh_steps": 4},
    {"variant": "adamuon", "orthogonalisation": "polar_express"},
])  # fmt: skip
def test_from_the_configuration_and_resumed_to_the_bit(settings):
    """Forms are for the blocks' matrices; what is left has AdamW's moments. State is tensors, and enough to go on."""
    config = OptimizerConfig(type="generic", lr=1e-2, weight_decay=0.1, **settings)
    parameters, matrices = network_and_names()
    (optimizer,) = build_optimizers(parameters, matrices, config, seed=3)
    steps([optimizer], parameters, 6, seed=1)
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in parameters.items()}
    assert set(state["network.head.weight"]) == {"step", "momentum", "second_moment"}
    assert state["network.head.weight"]["second_moment"].shape == (4, 20)
    assert set(state["network.blocks.weight"]) != set(state["network.head.weight"]) or "variant" in settings
    steps([optimizer], parameters, 3, seed=2)

    again, _ = network_and_names()
    for name, p in again.items():
        p.data.copy_(kept[name])
    (resumed,) = build_optimizers(again, matrices, config, seed=3)
    for name, p in again.items():
        resumed.state[p].update(state[name])
    steps([resumed], again, 3, seed=2)
    for name, p in parameters.items():
        assert torch.equal(p, again[name]), name
    decays = {group["matrices"]: group["weight_decay"] for group in optimizer.param_groups if group["weight_decay"]}
    assert decays == {True: 0.1, False: 0.1}


def test_keys_that_are_not_read_are_refused():
    for key, value, reason in (
        ("rank", 4, "no subspace"),
        ("orthogonalisation", "polar_express", "only variant"),
        ("momentum", 0.9, "no such setting"),
    ):
        with pytest.raises(ValueError, match=reason):
            OptimizerConfig(type="generic", **{key: value})
    assert OptimizerConfig(type="muon", variant="normuon", orthogonalisation="polar_express").variant == "normuon"
    with pytest.raises(ValueError, match="no such setting"):
        OptimizerConfig(variant="muon")
    parameters = {"network.a": torch.nn.Parameter(torch.ones(2, dtype=torch.float16))}
    with pytest.raises(ConfigError, match="stochastic"):
        build_optimizers(parameters, set(), OptimizerConfig(type="generic", rounding="stochastic"))
