"""How many samples the batch of each bucket has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .buckets import Bucket
from .lengths import ClipLengths

if TYPE_CHECKING:
    from kinema.config.data import SourceConfig
    from kinema.config.schema import BatchSizeConfig, TrainingConfig

ABOUT = math.sqrt(2)
"""A size for a resolution holds for buckets whose side is at most so many times larger or smaller."""


@dataclass(frozen=True)
class BatchSize:
    """The batch of a bucket."""

    total: int
    """Samples per optimiser step, over all devices."""
    device: int | None = None
    """The most that one device takes at once, where that is known: more are split into micro-batches."""


def batch_sizes(
    training: TrainingConfig,
    buckets: Sequence[Bucket],
    *,
    grid: int,
    lengths: ClipLengths,
    ranks: int,
    table: Callable[[Bucket], int | None] = lambda bucket: None,
    found: Mapping[str, int] | None = None,
    recorded: Mapping[str, BatchSize] | None = None,
) -> list[BatchSize]:
    """The batch of each bucket.

    The first that says something decides: what a run that goes on has ``recorded``; ``training.batch_sizes``; the
    bucket ``table``, in samples of one device; what trials ``found``, likewise, by the name of the bucket;
    ``token_budget``; ``batch_size``. With "auto" and nothing found yet, one sample a device.
    """
    sizes = []
    for bucket in buckets:
        device = table(bucket) or (found or {}).get(str(bucket))
        if device is None and training.token_budget is not None:
            device = max(1, training.token_budget // tokens_of(bucket, grid, lengths))
        size = (recorded or {}).get(str(bucket)) or by_hand(training.batch_sizes, bucket)
        if size is None and device is None and training.batch_size != "auto":
            size = BatchSize(training.batch_size)
        sizes.append(size or BatchSize((device or 1) * ranks, device or 1))
    return sizes


def left_to_trials(
    training: TrainingConfig,
    buckets: Sequence[Bucket],
    table: Callable[[Bucket], int | None],
    recorded: Mapping[str, BatchSize] | None = None,
) -> list[Bucket]:
    """The buckets whose batch ``batch_size = "auto"`` has to find."""
    if training.batch_size != "auto" or training.token_budget is not None:
        return []
    known = recorded or {}
    return [b for b in buckets if str(b) not in known and by_hand(training.batch_sizes, b) is None and table(b) is None]


def by_hand(rules: Iterable[BatchSizeConfig], bucket: Bucket) -> BatchSize | None:
    """What ``training.batch_sizes`` says of a bucket. A size for its length goes before one for any length; then one
    for its resolution, the nearest of several, before one for any resolution."""
    side = math.sqrt(bucket.height * bucket.width)

    def distance(rule: BatchSizeConfig) -> tuple[bool, float]:
        apart = math.inf if rule.resolution is None else abs(side - rule.resolution)
        return rule.frames is None, apart

    holding = [rule for rule in rules if _holds(rule, bucket, side)]
    return BatchSize(min(holding, key=distance).size) if holding else None


def _holds(rule: BatchSizeConfig, bucket: Bucket, side: float) -> bool:
    near = rule.resolution is None or 1 / ABOUT <= side / rule.resolution <= ABOUT
    return near and rule.frames in (None, bucket.frames)


def tokens_of(bucket: Bucket, grid: int, lengths: ClipLengths) -> int:
    """Tokens of latents that a sample of the bucket has, for a model of that grid and those lengths."""
    return lengths.latents(bucket.frames) * (bucket.height // grid) * (bucket.width // grid)


def sizes_of_tables(sources: Iterable[SourceConfig], grid: int) -> Callable[[Bucket], int | None]:
    """What the bucket tables of these sources say of a bucket, per device; where several do, the smallest."""
    from .bucket_table import table_batch_size

    tables = [one.buckets for one in sources if one.buckets is not None and one.buckets.table is not None]

    def table(bucket: Bucket) -> int | None:
        sizes = [table_batch_size(config, bucket, grid) for config in tables]
        return min((size for size in sizes if size is not None), default=None)

    return table


def to_json(buckets: Sequence[Bucket], sizes: Sequence[BatchSize]) -> dict[str, Any]:
    """What a run keeps of the sizes: ``{bucket: {"total": ..., "device": ...}}``."""
    return {str(b): {"total": size.total, "device": size.device} for b, size in zip(buckets, sizes, strict=True)}


def from_json(kept: Mapping[str, Any]) -> dict[str, BatchSize]:
    """The inverse of `to_json`, by the name of the bucket."""
    return {name: BatchSize(**size) for name, size in kept.items()}


def in_words(sizes: Iterable[BatchSize]) -> str:
    """The sizes for a message: "4", or "2 to 16"."""
    totals = sorted({size.total for size in sizes})
    return str(totals[0]) if len(totals) == 1 else f"{totals[0]} to {totals[-1]}"
