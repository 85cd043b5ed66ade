"""The mean over a held-out set."""

import pytest
import torch

from kinema.config.schema import ParallelConfig
from kinema.data.batch import Batch
from kinema.objectives.base import Loss
from kinema.parallel.mesh import start
from kinema.training.evaluation import QUANTILES, evaluate


class Known:
    """An objective whose loss of record i at a quantile is i + quantile."""

    def at_quantile(self, batch, networks, draws, quantile):
        values = torch.tensor([index + quantile for index in batch.indices])
        return Loss(values.sum(), values, {})


def batch(indices, weights):
    return Batch(0, {}, [""] * len(indices), indices, weights)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_padding_counts_nothing_and_records_as_their_source_says(factor):
    """Record 2 is of a source with twice the weight in the loss; record 3 only pads."""
    batches = [batch([0, 1], [factor, factor]), batch([2, 3], [2 * factor, 0.0])]
    world = start(ParallelConfig(), "cpu")
    found = evaluate("set", batches, Known(), {}, 1, world)
    for quantile in QUANTILES:
        expected = (0 + 1 + 2 * 2) / 4 + quantile
        assert found[f"set/loss_quantile_{quantile:.2f}"] == pytest.approx(expected, rel=1e-6)
    assert found["set/loss"] == pytest.approx(1.25 + 0.5, rel=1e-6)
