"""The data of a run: what trains, what is held out, and how large the batch of each bucket is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch_sizes import (
    BatchSize,
    batch_sizes,
    from_json,
    in_words,
    left_to_trials,
    sizes_of_tables,
    to_json,
    tokens_of,
)
from kinema.data.buckets import Bucket
from kinema.families.base import Family
from kinema.training.loop import Trainer, Work

if TYPE_CHECKING:
    from torch import nn

    from kinema.data.dataset import Dataset
    from kinema.parallel.mesh import World

FILE = "batch_sizes.json"
"""In the run directory: samples of each bucket's batch, over all devices and on one."""


class RunData:
    """Opens what a configuration trains on; every rank makes it alike.

    ``recorded``: the batch sizes that a run which goes on has kept (`RunData.kept`); None: they are settled anew.
    ``regenerate``: what is cached of these records is encoded anew.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        world: World,
        say: Callable[[str], None],
        *,
        recorded: Mapping[str, Any] | None = None,
        regenerate: bool = False,
    ) -> None:
        from kinema.data.opening import open_data

        self.config, self.family, self.world, self.say = config, family, world, say
        self.regenerate = regenerate
        self.recorded = from_json(recorded or {})
        self.table = sizes_of_tables(config.data.sources, family.grid)
        self.training = open_data(
            config, config.data.sources, family, world, say, regenerate=regenerate,
            batch_sizes=lambda buckets: [size.total for size in self._sizes_of(buckets)],
        )  # fmt: skip
        self.held_out: dict[str, Dataset] = {}
        self.sizes = self._sizes_of(self.training.buckets)
        idle = [str(b) for b, size in zip(self.training.buckets, self.sizes, strict=True) if size.total < world.dp_size]
        if idle:
            say(
                f"This run goes on with batches of fewer samples than there are devices ({world.dp_size}) in "
                f"{', '.join(idle[:5])}{', ...' * (len(idle) > 5)}, and some devices have nothing to do in them. "
                "Give --reset-data to settle the sizes anew."
            )

    def hold_out(self) -> None:
        """Open the sets of the evaluation."""
        from kinema.data.opening import open_data

        for one in self.config.evaluation.sets:
            self.held_out[one.name] = open_data(
                self.config, one.sources, self.family, self.world, self.say, training=False, regenerate=self.regenerate
            )

    def _sizes_of(self, buckets: Sequence[Bucket], found: Mapping[str, int] | None = None) -> list[BatchSize]:
        return batch_sizes(
            self.config.training, buckets, grid=self.family.grid, lengths=self.family.lengths,
            ranks=self.world.dp_size, table=self.table, found=found, recorded=self.recorded,
        )  # fmt: skip

    def settle(self, trainer: Trainer, networks: Mapping[str, nn.Module]) -> None:
        """Find by trial the batch sizes that are left to trials; call it once everything that a step needs is there."""
        import numpy as np

        from kinema.training.auto_batch import find_batch_sizes

        data, family, size = self.training, self.family, self.world.dp_size
        buckets = left_to_trials(self.config.training, data.buckets, self.table, self.recorded)
        if not buckets:
            return
        counts = np.bincount(data.items.bucket, minlength=len(data.buckets))
        items = dict(zip(data.buckets, counts.tolist(), strict=True))
        found = find_batch_sizes(
            trainer,
            networks,
            buckets,
            data.sample_of,
            tokens=lambda bucket: tokens_of(bucket, family.grid, family.lengths),
            most=lambda bucket: -(-items[bucket] // size),
            say=self.say,
        )
        self.sizes = self._sizes_of(data.buckets, found)
        data.set_batch_sizes([one.total for one in self.sizes])

    def work(self, step: int) -> Work:
        """This rank's part of a step, counted from where the data order began."""
        order = self.training.order
        bucket = int(order.bucket_of[order.batch(step).items[0]])
        limits = [self.config.training.micro_batch_size, self.sizes[bucket].device]
        return Work(
            batch=self.training.batch(step, self.world.dp_rank, self.world.dp_size),
            examples=order.global_size(step),
            micro_batch_size=min((limit for limit in limits if limit is not None), default=None),
            epochs=order.epochs_at(step + 1),
        )

    def kept(self) -> dict[str, Any]:
        """The batch sizes as a checkpoint keeps them."""
        return to_json(self.training.buckets, self.sizes)

    def record(self, directory: Path) -> None:
        """Write the batch sizes into the run directory, for people and tools."""
        partial = directory / f"{FILE}.partial"
        partial.write_text(json.dumps(self.kept(), indent=2) + "\n", encoding="utf-8")
        partial.replace(directory / FILE)

    def steps_in_words(self, total: int) -> str:
        """The length of the run for a message: "100 steps of 2 to 8 samples, 12.5 an epoch"."""
        per_epoch = self.training.order.steps_per_epoch
        mean = f"{per_epoch:.1f}" if isinstance(per_epoch, float) else str(per_epoch)
        return f"{total} steps of {in_words(self.sizes)}, {mean} an epoch"
