import pytest
import torch

from kinema.config.schema import OptimizerConfig, ScheduleConfig
from kinema.optim.muon import Muon, orthogonalise
from kinema.optim.optimizers import build_optimizers, set_lr
from kinema.optim.schedule import lr_factor


def quintic_in_float64(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration acts on singular values alone: the closed form through the SVD."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_orthogonalise_acts_on_singular_values(shape):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for ours, matrix in zip(orthogonalise(stack), stack, strict=True):
        torch.testing.assert_close(ours.double(), quintic_in_float64(matrix), atol=2e-5, rtol=0)


def test_muon_follows_its_definition_for_twenty_steps():
    g = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(6, 10, generator=g)) for _ in range(3)]
    reference = [w.detach().double().clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in reference]
    muon = Muon(weights, lr=0.02, momentum=0.9, weight_decay=0.1)
    for _ in range(20):
        gradients = [torch.randn(6, 10, generator=g) for _ in weights]
        for i, gradient in enumerate(gradients):
            weights[i].grad = gradient.clone()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient.double()
            update = quintic_in_float64(0.1 * gradient.double() + 0.9 * momenta[i])
            reference[i] = reference[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 10**0.5 * update
        muon.step()
    for ours, theirs in zip(weights, reference, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_taken_once_and_vectors_do_not_decay(kind):
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 1), torch.nn.Linear(4, 8), torch.nn.Linear(8, 8))
    parameters = dict(net.named_parameters())
    optimizers = build_optimizers(parameters, {"2.weight"}, OptimizerConfig(type=kind, weight_decay=0.1))
    taken = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, parameters.values()))
    for o in optimizers:
        for group in o.param_groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
    muons = [o for o in optimizers if isinstance(o, Muon)]
    assert [p is parameters["2.weight"] for o in muons for p in o.param_groups[0]["params"]] == [True] * (
        kind == "muon"
    )
    assert set_lr(optimizers, 0.5, 1.0) == pytest.approx(0.5e-4)
    assert set_lr([], 0.5, 1.0) == 0.5 and build_optimizers({}, set(), OptimizerConfig()) == []


def test_learning_rate_over_the_real_horizon():
    config = ScheduleConfig(warmup_steps=4, decay="linear", final_fraction=0.1)
    factors = [lr_factor(config, step, 105) for step in range(105)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[54] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    cosine = ScheduleConfig(warmup_steps=4, decay="cosine")
    assert lr_factor(cosine, 54, 105) == pytest.approx(0.5)
    assert lr_factor(cosine, 104, 105) == pytest.approx(0.0, abs=1e-12)
    assert lr_factor(ScheduleConfig(), 0, 10) == 1.0


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

    def counted(stack, iterations):
        sizes.append(len(stack))
        return orthogonalise(stack, iterations)

    whole = step()
    monkeypatch.setattr("kinema.optim.muon.orthogonalise", counted)
    monkeypatch.setattr("kinema.optim.muon.PIECE_BYTES", 2 * 6 * 10 * 4)
    for ours, theirs in zip(step(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert sizes == [2, 2, 1]


def test_parts_with_a_learning_rate_of_their_own():
    """`optimizer.part_lr`: for vectors and matrices, in AdamW and in Muon; the factor of the schedule is shared."""
    names = ("network.blocks.0.w", "network.bias", "text_encoder.layers.0.w", "text_encoder.bias")
    parameters = {n: torch.nn.Parameter(torch.ones(4, 4) if n.endswith("w") else torch.ones(4)) for n in names}
    name_of = {id(p): name for name, p in parameters.items()}
    for kind, own in (("adamw", 1e-3), ("muon", 5e-3)):
        config = OptimizerConfig(
            type=kind, lr=1e-3, part_lr={"text_encoder": 1e-5}, matrix_lr=None if kind == "adamw" else 5e-3
        )
        optimizers = build_optimizers(parameters, {n for n in names if n.endswith("w")}, config)
        set_lr(optimizers, 0.5, 1.0)
        rates = {name_of[id(p)]: g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
        assert rates == {
            "network.blocks.0.w": own / 2, "network.bias": 5e-4,
            "text_encoder.layers.0.w": 5e-6, "text_encoder.bias": 5e-6,
        }  # fmt: skip
