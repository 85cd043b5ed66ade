from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from kinema.optim.scale import LossScale
from kinema.training.clipping import clip_gradients


def test_same_scales_and_weights_as_grad_scaler() -> None:
    generator = torch.Generator().manual_seed(1)
    overflow = (torch.rand(60, generator=generator) < 0.2).tolist()
    weight, reference = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, reference_optimizer = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([reference], lr=0.1)
    scale = LossScale(growth_interval=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    seen = set()
    for step, overflows in enumerate(overflow):
        target = torch.randn(3, generator=generator)
        (((weight - target) ** 2).sum() * scale.value).backward()
        scaler.scale(((reference - target) ** 2).sum()).backward()
        if overflows:
            for parameter in (weight, reference):
                assert parameter.grad is not None
                parameter.grad[step % 3] = float("nan") if step % 2 else float("inf")

        scale.unscale([weight])
        finite = bool(torch.isfinite(clip_gradients([weight], None)))
        if finite:
            optimizer.step()
        scale.update(finite)
        scaler.step(reference_optimizer)
        scaler.update()

        assert finite == (not overflows)
        assert scale.value == scaler.get_scale()
        assert torch.equal(weight, reference)
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
        seen.add(scale.value)
    assert len(seen) > 3


def test_resumes() -> None:
    scale = LossScale(growth_interval=3)
    for finite in (True, False, True, True):
        scale.update(finite)
    resumed = LossScale(growth_interval=3)
    resumed.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    for one in (scale, resumed):
        one.update(True)
        assert one.value == 2.0**16 and one.good_steps == 0


def test_defaults() -> None:
    scale = LossScale()
    assert scale.value == 65536
    for _ in range(1999):
        scale.update(True)
    assert scale.value == 65536
    scale.update(True)
    assert scale.value == 131072
    scale.update(False)
    assert scale.value == pytest.approx(65536)


def test_endless_overflow_leaves_a_scale_that_can_be_divided_by() -> None:
    scale, weight = LossScale(), nn.Parameter(torch.ones(1))
    for _ in range(2000):
        scale.update(False)
    assert 0 < scale.value < 1e-30
    weight.grad = torch.full((1,), scale.value)
    scale.unscale([weight])
    assert weight.grad.item() == pytest.approx(1.0)
