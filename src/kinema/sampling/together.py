"""Processes that draw each sample together: those of a sequence hold the same pipeline, a part of the tokens each.

All of them run the whole pipeline on the same noise and come to the same pixels; the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kinema.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

    from kinema.families.base import Family, Parts
    from kinema.parallel.mesh import World

Value = TypeVar("Value")


@dataclass(frozen=True)
class Rank:
    """Which of torchrun's processes this is; they share the samples out, and ``together`` of them draw each."""

    number: int
    count: int
    local: int
    together: int = 1

    @classmethod
    def of_environment(cls, together: int = 1) -> Rank:
        names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        number, count, local = (int(os.environ.get(*pair)) for pair in names)
        return cls(number, count, local, together)

    def check(self) -> None:
        """UserError unless every sample has as many processes as it asks for."""
        if self.count % self.together:
            raise UserError(
                f"--sp {self.together} draws each sample with {self.together} processes, and there are {self.count}. "
                f"Start a multiple of {self.together}: torchrun --nproc-per-node {self.together} -m kinema sample ..."
            )

    @property
    def share(self) -> int:
        """Which of the ``shares`` of the samples it draws."""
        return self.number // self.together

    @property
    def shares(self) -> int:
        return self.count // self.together

    @property
    def writes(self) -> bool:
        """Whether it is the one that writes, of those that draw together."""
        return self.number % self.together == 0

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """What all ranks find wrong, the first alone says."""
        try:
            yield
        except UserError as error:
            if self.number:
                raise ConfigError(str(error)) from error
            raise


def check_together(size: int, family: Family) -> None:
    """ConfigError if so many processes cannot draw a sample together."""
    if size > 1:
        from kinema.parallel.sequence import check_sequence_parallel

        check_sequence_parallel(size, "--sp", family, family.trainable_parts())


@dataclass(frozen=True)
class Together:
    """The processes that draw with this one; ``world`` None: none does."""

    world: World | None = None

    def agreed(self, value: Value) -> Value:
        """The first one's value, on all of them. They all come here, so what it has written by then is there."""
        if self.world is None:
            return value
        import torch
        import torch.distributed as dist

        values, group = [value], self.world.group("sp")
        first = dist.get_global_rank(group, 0)
        dist.broadcast_object_list(values, src=first, group=group, device=torch.device("cpu"))
        return values[0]

    def split(self, family: Family, parts: Parts) -> None:
        """Let them share the sequences of the networks, in place, where those can be shared."""
        if self.world is None:
            return
        from kinema.parallel.sequence import split_sequences

        for name, part in parts.items():
            if name.startswith("network"):
                split_sequences(part, family.blocks(part), self.world)


@contextmanager
def together(size: int, device: torch.device) -> Iterator[Together]:
    """Join the processes that share each sequence, ``size`` at a time; torchrun has started them."""
    if size == 1:
        yield Together()
        return
    from kinema.config.schema import ParallelConfig
    from kinema.parallel.mesh import start, stop

    world = start(ParallelConfig(sp=size), device.type)
    try:
        yield Together(world)
    finally:
        stop()
