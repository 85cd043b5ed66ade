import pytest
import torch

from kinema.config.optimizer import OptimizerConfig, ScheduleConfig
from kinema.optim.muon import Muon
from kinema.optim.optimizers import build_optimizers, set_lr
from kinema.optim.schedule import lr_factor


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


def test_parts_with_a_learning_rate_of_their_own():
    """`optimizer.part_lr`: for vectors and matrices, in AdamW and in Muon; the factor of the schedule is shared."""
    names = ("network.blocks.0.w", "network.bias", "text_encoder.layers.0.w", "text_encoder.bias")
    parameters = {n: torch.nn.Parameter(torch.ones(4, 4) if n.endswith("w") else torch.ones(4)) for n in names}
    name_of = {id(p): name for name, p in parameters.items()}
    for kind, own in (("adamw", 1e-3), ("muon", 5e-3)):
        matrices = {"matrix_lr": 5e-3} if kind == "muon" else {}
        config = OptimizerConfig(type=kind, lr=1e-3, part_lr={"text_encoder": 1e-5}, **matrices)
        optimizers = build_optimizers(parameters, {n for n in names if n.endswith("w")}, config)
        set_lr(optimizers, 0.5, 1.0)
        rates = {name_of[id(p)]: g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
        assert rates == {
            "network.blocks.0.w": own / 2, "network.bias": 5e-4,
            "text_encoder.layers.0.w": 5e-6, "text_encoder.bias": 5e-6,
        }  # fmt: skip
