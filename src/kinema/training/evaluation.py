"""Loss on held-out sets at fixed quantiles of the time law, with noise of its own: comparable between runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from kinema.data.batch import Batch
from kinema.objectives.base import Denoiser, Draws, Objective

if TYPE_CHECKING:
    from kinema.parallel.mesh import World

QUANTILES = tuple(round(0.1 * k, 1) for k in range(1, 10))


def evaluate(
    name: str,
    batches: Iterable[Batch],
    objective: Objective,
    networks: Mapping[str, Denoiser],
    seed: int,
    world: World,
) -> dict[str, float]:
    """``{name}/loss_quantile_0.10`` ... ``_0.90`` and their mean ``{name}/loss``: means over the records of the set,
    each over what its mask keeps.

    ``batches`` are this rank's; a record weighs what the loss of its source does, one that only pads weighs nothing.
    Noise is keyed by the record's place in the set, so no draw of the training is touched and every evaluation sees the
    same.
    """
    import torch

    totals = torch.zeros(len(QUANTILES) + 1, dtype=torch.float64)
    with torch.no_grad():
        for batch in (one.to(world.device) for one in batches):
            weights = torch.tensor(batch.weights, dtype=torch.float64)
            if world.place["pp"]:  # all stages of a pipeline come to know the loss, and one counts it
                weights.zero_()
            for i, quantile in enumerate(QUANTILES):
                draws = Draws(seed, f"evaluation {quantile:.2f}")
                loss = objective.at_quantile(batch, networks, draws, quantile)
                totals[i] += (loss.per_sample.double().cpu() * weights).sum()
            totals[-1] += weights.sum()
    totals = world.all_reduce_sum(totals)
    losses = (totals[:-1] / (totals[-1].item() or 1.0)).tolist()
    result = {f"{name}/loss_quantile_{q:.2f}": value for q, value in zip(QUANTILES, losses, strict=True)}
    return {**result, f"{name}/loss": sum(losses) / len(losses)}
