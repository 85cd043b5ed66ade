"""Masks in the loss: against pixel-by-pixel means in float64, and what a mask may and may not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flow import Known, a_batch, flow_matching, nothing

from kinema.config.schema import ObjectiveConfig
from kinema.data.lengths import CAUSAL, ClipLengths
from kinema.objectives.base import Draws
from kinema.objectives.mask import kept_latents, masked_mean, on_latent_grid

LATENTS = (4, 3, 2, 2)  # C, T, H, W, as `a_batch` has them
PIXELS = (1, 9, 16, 24)  # nine frames at a stride of four, cells of 8 x 12


def drawn(shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def frames_behind(k, given, stride, causal):
    """The frames that latent frame k is made of: of a causal autoencoder, the first of the first frame alone."""
    if given == 1:
        return [0]
    return [f for f in range(given) if (math.ceil(f / stride) if causal else f // stride) == k]


@settings(max_examples=25, deadline=None)
@given(
    stride=st.integers(1, 8), more=st.integers(1, 4), still=st.booleans(), causal=st.booleans(),
    cell=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)  # fmt: skip
def test_a_latent_gets_the_mean_of_its_pixels(stride, more, still, causal, cell, size):
    frames, (height, width) = more + 1, size
    lengths = ClipLengths(stride, first=1 if causal else 2 * stride)
    given = 1 if still else more * stride + (1 if causal else stride)
    mask = drawn((1, given, height * cell[0], width * cell[1]), seed=stride)
    found = on_latent_grid(mask, (frames, height, width), lengths)
    assert found.shape == (1, frames, height, width)
    for k in range(frames):
        behind = mask[0, frames_behind(k, mask.shape[1], stride, causal)].double() / 255
        for y in range(height):
            for x in range(width):
                cells = behind[:, y * cell[0] : (y + 1) * cell[0], x * cell[1] : (x + 1) * cell[1]]
                assert found[0, k, y, x].item() == pytest.approx(cells.mean().item(), rel=1e-6)


def test_a_mask_of_another_grid_is_a_fault():
    with pytest.raises(AssertionError):
        on_latent_grid(drawn((1, 8, 16, 16)), (3, 2, 2), CAUSAL)
    with pytest.raises(AssertionError):
        on_latent_grid(drawn((1, 9, 15, 16)), (3, 2, 2), CAUSAL)


def losses(masks, weights=None, given=None, answer=nothing):
    """Total, per sample and the gradient with respect to the prediction."""
    batch = a_batch(weights=weights)
    batch.masks = masks
    leaves = []

    def predict(x_t, t, x_0):
        leaves.append(answer(x_t, t, x_0).clone().requires_grad_())
        return leaves[-1]

    loss = flow_matching(ObjectiveConfig(), 3.0)(batch, {"student": Known(predict, given)}, Draws(1, 2))
    loss.total.backward()
    return loss.total.item(), loss.per_sample, leaves[0].grad


def test_the_loss_is_the_weighted_mean_in_float64():
    masks = [drawn(PIXELS, seed=i) for i in range(5)] + [None]
    weights = [0.5, 0.1, 0.1, 0.1, 0.2, 0.3]
    batch = a_batch()
    total, per_sample, _ = losses(masks, weights)
    expected = 0.0
    for i, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        eps = Draws(1, 2).normal(batch, torch.stack(batch.tensors["latents"]), "noise")[i]
        errors = (eps.double() - batch.tensors["latents"][i]).square()
        kept = torch.ones(1, 3, 2, 2) if mask is None else on_latent_grid(mask, (3, 2, 2), CAUSAL)
        kept = kept.double().expand(LATENTS)
        one = float((kept * errors).sum() / kept.sum())
        assert per_sample[i].item() == pytest.approx(one, rel=1e-6)
        expected += weight * one
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [1, 7, 128, 255])
def test_a_constant_mask_changes_nothing(value):
    plain, per_sample, gradient = losses([])
    masked, of_each, its_gradient = losses([torch.full(PIXELS, value, dtype=torch.uint8)] * 6)
    assert masked == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(of_each, per_sample, rtol=1e-6, atol=0)
    torch.testing.assert_close(its_gradient, gradient, rtol=1e-5, atol=1e-9)
    if value == 255:
        torch.testing.assert_close(of_each, per_sample, rtol=2e-7, atol=0)  # white is no mask, to the last digit


def test_scaling_a_mask_changes_nothing():
    masks = [drawn(PIXELS, seed=i) // 5 for i in range(6)]
    total, _, gradient = losses(masks)
    brighter, _, its_gradient = losses([mask * 5 for mask in masks])
    assert brighter == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(its_gradient, gradient, rtol=1e-5, atol=1e-9)


def test_what_is_black_has_no_gradient():
    mask = torch.zeros(PIXELS, dtype=torch.uint8)
    mask[:, :, :8, 12:] = 255  # the upper right cell
    mask[:, 5:, 8:, :12] = 1  # barely, the lower left one from the third latent frame on
    _, _, gradient = losses([mask] * 6)
    kept = torch.zeros(3, 2, 2, dtype=torch.bool)
    kept[:, 0, 1] = True
    kept[2, 1, 0] = True
    assert (gradient[:, :, ~kept] == 0).all()
    assert (gradient[:, :, kept] != 0).all()


def test_a_mask_that_keeps_nothing_gives_no_loss():
    black = torch.zeros(PIXELS, dtype=torch.uint8)
    total, per_sample, gradient = losses([None, black, None, black, None, None])
    assert per_sample[1] == per_sample[3] == 0 and (gradient[[1, 3]] == 0).all()
    assert (per_sample[[0, 2, 4, 5]] > 0).all() and math.isfinite(total)


def test_what_is_given_and_what_is_masked_are_both_left_out():
    given = torch.zeros(6, 1, 3, 2, 2, dtype=torch.float64)
    given[:, :, 0] = 1
    mask = torch.zeros(1, 1, 16, 24, dtype=torch.uint8)
    mask[..., :8, :] = 255
    _, per_sample, gradient = losses([mask] * 6, given=given)
    assert (gradient[:, :, 0] == 0).all() and (gradient[:, :, :, 1] == 0).all()
    assert (gradient[:, :, 1:, 0] != 0).all()
    latents, eps = torch.stack(a_batch().tensors["latents"]), Draws(1, 2).normal(a_batch(), gradient, "noise")
    expected = (eps.double() - latents).square()[:, :, 1:, 0].flatten(1).mean(1)
    torch.testing.assert_close(per_sample.double(), expected, rtol=1e-6, atol=0)


def test_masks_go_with_their_samples():
    masks = [drawn((1, 1, 16, 24), seed=i) for i in range(6)]
    batch = a_batch()
    batch.masks = masks
    objective = flow_matching(ObjectiveConfig(), 2.0)
    whole = objective(batch, {"student": Known(nothing)}, Draws(3, 4))
    parts = [objective(batch.select(r), {"student": Known(nothing)}, Draws(3, 4)) for r in ([4, 1], [0], [5, 2, 3])]
    assert whole.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-6)
    at = objective.at_quantile(batch, {"student": Known(nothing)}, Draws(1, "evaluation"), 0.5)
    assert at.per_sample[0].item() != pytest.approx(
        objective.at_quantile(a_batch(), {"student": Known(nothing)}, Draws(1, "evaluation"), 0.5).per_sample[0].item()
    )


def test_without_masks_nothing_is_made():
    latents = torch.zeros(2, *LATENTS)
    assert kept_latents([], latents) is None and kept_latents([None, None], latents) is None
    values = torch.arange(8.0).reshape(2, 4)
    assert masked_mean(values, None).tolist() == [1.5, 5.5]
