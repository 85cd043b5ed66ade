"""State in the host's memory: the same numbers, what is where when, and copies that come in time."""

from dataclasses import dataclass, field

import pytest
import torch

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.apart import Part, parts, steps_apart
from kinema.optim.host_state import ON_DEVICE, CudaCopies, HostState
from kinema.optim.optimizers import build_optimizers, set_lr
from kinema.optim.release import GradientRelease

KINDS = {
    "adamw": OptimizerConfig(lr=1e-2, weight_decay=0.1),
    "adamw, kahan": OptimizerConfig(lr=1e-2, rounding="kahan"),
    "adamw8bit": OptimizerConfig(type="adamw8bit", lr=1e-2),
    "muon": OptimizerConfig(type="muon", lr=1e-2, variant="adamuon"),
    "generic": OptimizerConfig(
        type="generic", lr=1e-2, first_moment="subspace", second_moment="subset_norm", rank=4, refresh_steps=7
    ),
}


@dataclass
class FakeCopies:
    """A device whose memory is this machine's, too: copies are made at the last moment that is allowed, and what is
    fetched and not yet sent back is counted."""

    on_device: int = 0
    most: int = 0
    sent: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def fetch(self, away):
        self.on_device += 1
        self.most = max(self.most, self.on_device)

        def take():
            assert not {id(one) for one in away} & {id(place) for place, _ in self.sent}, "fetched before it was sent"
            return [one.clone() for one in away]

        return take

    def send(self, here, away):
        self.on_device -= 1
        places = [torch.full_like(one, 77) if place is None else place for one, place in zip(here, away, strict=True)]
        self.sent += zip(places, here, strict=True)  # the copy itself comes later
        return places

    def finish(self):
        for place, one in self.sent:
            place.copy_(one)
        self.sent = []


def weights(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((12, 20), (12, 20), (20, 8), (20,), (5, 5), (1,))
    return {f"network.{i}.w": torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for i, s in enumerate(shapes)}


def run(config, wrap, steps=20, skip=()):
    parameters = weights(torch.bfloat16 if config.rounding == "kahan" else torch.float32)
    matrices = {name for name, p in parameters.items() if p.ndim == 2}
    optimizers = [wrap(one) for one in build_optimizers(parameters, matrices, config, seed=5)]
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        set_lr(optimizers, 1 - step / 40, 1.0)
        for number, p in enumerate(parameters.values()):
            gradient = torch.randn(p.shape, generator=g).to(p.dtype)
            p.grad = None if number in skip else gradient
        for optimizer in optimizers:
            optimizer.step()
    return parameters, optimizers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part_bytes", [0, 1200])
def test_equal_to_the_bit_over_twenty_steps(kind, part_bytes):
    """Weights and state; three parts on the device at most, of one parameter or of several."""
    copies = FakeCopies()
    ours, hosted = run(KINDS[kind], lambda one: HostState(one, copies, part_bytes), skip=(2,))
    theirs, plain = run(KINDS[kind], lambda one: one, skip=(2,))
    exact = kind != "muon"  # of which a stack of two has other roundings than one matrix
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], atol=0 if exact else 1e-5, rtol=0)
    state = {id(p): values for one in hosted for p, values in one.state.items()}
    for one in plain:
        for name, p in theirs.items():
            for key, value in one.state.get(p, {}).items():
                mine = state[id(ours[name])][key]
                torch.testing.assert_close(mine, value, atol=0 if exact else 1e-4, rtol=0, msg=f"{name} {key}")
    assert 1 < copies.most <= ON_DEVICE - 1 and copies.on_device == 0


def test_state_has_one_place_in_the_hosts_memory():
    """A checkpoint keeps references and loads into them: they stay good."""
    copies = FakeCopies()
    parameters, (hosted,) = run(KINDS["adamw"], lambda one: HostState(one, copies), steps=2)
    p = parameters["network.0.w"]
    kept = hosted.state[p]["exp_avg"]
    for wanted in (1.0, 3.0):
        kept.fill_(wanted)
        p.grad = torch.zeros_like(p)
        hosted.step()
        assert hosted.state[p]["exp_avg"] is kept
        torch.testing.assert_close(kept, torch.full_like(kept, 0.9 * wanted))
    assert hosted.state[p]["step"].ndim == 0


def test_with_gradient_release():
    """One parameter at a time, from within the backward pass."""
    parameters = weights()
    config = KINDS["generic"]
    (hosted,) = (HostState(one, FakeCopies()) for one in build_optimizers(parameters, {"network.0.w"}, config, seed=5))
    plain = weights()
    (optimizer,) = build_optimizers(plain, {"network.0.w"}, config, seed=5)
    release = GradientRelease([hosted])
    for step in range(5):
        for group in (parameters, plain):
            with release.updating():
                sum((p * p * (step + i)).sum() for i, p in enumerate(group.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in parameters.items():
        assert torch.equal(p, plain[name]) and p.grad is None


def test_parts_of_a_group():
    parameters = list(weights().values())
    group = {"params": parameters, "param_names": [str(i) for i in range(6)], "lr": 0.1}
    optimizer = torch.optim.SGD([dict(group)])
    sizes = [[p.nbytes for p in part.parameters] for part in parts(optimizer, optimizer.param_groups[0], 1100)]
    assert sizes == [[960], [960], [640, 80, 100, 4]]
    assert [part.names for part in parts(optimizer, optimizer.param_groups[0])] == [[str(i)] for i in range(6)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in parameters]
    Part(optimizer, optimizer.param_groups[0], [parameters[3]], ["3"]).step()
    assert [torch.equal(p, old) for p, old in zip(parameters, before, strict=True)] == [True] * 3 + [False] + [True] * 2
    assert optimizer.param_groups[0]["params"] == parameters and len(optimizer.param_groups[0]["param_names"]) == 6


def test_which_optimisers_take_parameters_one_after_the_other():
    for config in KINDS.values():
        assert steps_apart(config), config.type
    for kind in ("prodigy", "schedulefree"):
        pytest.importorskip("pytorch_optimizer")
        assert not steps_apart(OptimizerConfig(type=kind)), kind
    assert steps_apart(OptimizerConfig(type="torch.RMSprop"))


@pytest.mark.gpu
def test_on_a_gpu_equal_to_the_bit_and_out_of_its_memory():
    device = torch.device("cuda")
    results = []
    for wrap in (lambda one: one, lambda one: HostState(one, CudaCopies(device), 2**20)):
        g = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(512, 512, generator=g).to(device)) for _ in range(24)]
        optimizer = wrap(torch.optim.AdamW(parameters, lr=1e-2, fused=True))
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn(512, 512, generator=g).to(device)
            optimizer.step()
            for p in parameters:
                p.grad = None
        torch.cuda.synchronize()
        results.append(([p.detach().cpu() for p in parameters], torch.cuda.memory_allocated() - before))
        if isinstance(optimizer, HostState):
            assert all(s["exp_avg"].is_pinned() for s in optimizer.state.values())
    (plain, taken), (hosted, left) = results
    assert all(torch.equal(one, other) for one, other in zip(plain, hosted, strict=True))
    assert taken >= 24 * 2 * 2**20 and left < 2**20
