from __future__ import annotations

import pytest
import torch
from torch import nn

from kinema.optim.ema import Ema


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for name, n in (("a", 5), ("b", 1))}


def test_warm_up_then_decay() -> None:
    ema = Ema([], 0.9)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(10) == pytest.approx(11 / 20)
    assert ema.decay_at(79) == pytest.approx(80 / 89)
    assert ema.decay_at(10_000) == 0.9


def test_equals_the_weighted_sum() -> None:
    """average_n = sum_k w_k prod_{j > k} d_j (1 - d_k), with the start weighted by the product of all d."""
    weights = parameters(torch.float64)
    ema = Ema(weights.items(), 0.8)
    history = [{name: w.detach().clone() for name, w in weights.items()}]
    for step in range(60):
        for weight in weights.values():
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        history.append({name: w.detach().clone() for name, w in weights.items()})
        ema.update(step)
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(60)]
    shares = [1.0] + [1.0 - d for d in decays]
    for k in range(len(shares)):
        for decay in decays[k:]:
            shares[k] *= decay
    assert sum(shares) == pytest.approx(1.0, abs=1e-12)
    for name, average in ema.state().items():
        want = sum(share * w[name] for share, w in zip(shares, history, strict=True))
        torch.testing.assert_close(average, want, rtol=1e-12, atol=1e-12)


def test_swapping_is_exact_and_survives_errors() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights = parameters(dtype)
        ema = Ema(weights.items(), 0.5)
        for weight in weights.values():
            weight.data.mul_(3)
        ema.update(1000)
        own = {name: w.detach().clone() for name, w in weights.items()}
        averages = {name: a.clone() for name, a in ema.state().items()}
        assert all(average.dtype == torch.float32 for average in averages.values())
        with pytest.raises(RuntimeError, match="inside"), ema.swapped():
            for name, weight in weights.items():
                assert torch.equal(weight, averages[name].to(dtype))
                torch.testing.assert_close(weight.float(), own[name].float() * 2 / 3, rtol=1e-2, atol=0)
            with pytest.raises(AssertionError):
                ema.update(1001)
            raise RuntimeError("inside")
        assert all(torch.equal(weight, own[name]) for name, weight in weights.items())
        assert all(torch.equal(average, averages[name]) for name, average in ema.state().items())


def test_small_changes_of_bf16_weights_are_not_lost() -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    ema = Ema([("w", weight)], 0.999)
    weight.data.fill_(2.0)
    for _ in range(100):
        ema.update(10**6)
    assert ema.state()["w"].item() == pytest.approx(2 - 0.999**100, abs=1e-5)


def test_only_what_trains_is_averaged() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert list(Ema([("frozen", frozen), *parameters(torch.float32).items()], 0.9).state()) == ["a", "b"]


def test_bf16_weights_are_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same averages to the bit, and never more than a piece in fp32."""
    generator = torch.Generator().manual_seed(3)
    weights = {str(i): nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for i, n in enumerate((8, 3, 5, 9))}
    whole, pieces = Ema(weights.items(), 0.9), Ema(weights.items(), 0.9)
    for weight in weights.values():
        weight.data.mul_(3)
    whole.update(5)
    sizes, lerp = [], torch._foreach_lerp_

    def counted(averages: list[torch.Tensor], converted: list[torch.Tensor], share: float) -> None:
        sizes.append([t.numel() for t in converted])
        lerp(averages, converted, share)

    monkeypatch.setattr("kinema.optim.ema.PIECE_BYTES", 8 * 4)
    monkeypatch.setattr(torch, "_foreach_lerp_", counted)
    pieces.update(5)
    assert sizes == [[8], [3, 5], [9]]
    assert all(torch.equal(average, whole.state()[name]) for name, average in pieces.state().items())
