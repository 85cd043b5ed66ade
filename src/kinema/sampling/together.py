"""Processes that draw each sample together: those of a sequence hold the same pipeline, a part of the tokens each.

All of them run the whole pipeline on the same noise and come to the same pixels; the first one writes. Where the
autoencoder works in tiles, each decodes some (`kinema.sampling.shared_tiles`). A watch ends all of them where one has
died or hangs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, get_args

from kinema.config.schema import SequenceAttention
from kinema.errors import ConfigError, UserError
from kinema.sampling.watched import WatchedSteps
from kinema.suggest import did_you_mean

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


def sequence_attention(asked: str | None, size: int) -> SequenceAttention:
    """What ``--sp-attention`` says; UserError for what it cannot be."""
    if asked is not None and size == 1:
        raise UserError(f"--sp-attention {asked} is for processes that draw each sample together: give --sp too.")
    known: tuple[SequenceAttention, ...] = get_args(SequenceAttention)
    for one in known:
        if (asked or "ulysses") == one:
            return one
    raise UserError(f"--sp-attention {asked}: expected {' or '.join(known)}{did_you_mean(str(asked), known)}")


def check_together(size: int, family: Family) -> None:
    """ConfigError if so many processes cannot draw a sample together."""
    if size > 1:
        from kinema.parallel.sequence import check_sequence_parallel

        check_sequence_parallel(size, "--sp", family, family.trainable_parts())


@dataclass(frozen=True)
class Together:
    """The processes that draw with this one; ``world`` None: none does."""

    world: World | None = None
    attention: SequenceAttention = "ulysses"
    steps: WatchedSteps = field(default_factory=WatchedSteps)
    """Where the pipeline tells what it has done."""

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
        """Let them share the sequences of the networks and the tiles of the autoencoder, in place, where there are
        some to share."""
        if self.world is None:
            return
        from kinema.parallel.sequence import split_sequences
        from kinema.sampling.shared_tiles import share_tiles

        for name, part in parts.items():
            if name.startswith("network"):
                split_sequences(part, family.blocks(part), self.world, self.attention)
        if "autoencoder" in parts:
            share_tiles(parts["autoencoder"], self.world)


@contextmanager
def together(size: int, device: torch.device, attention: SequenceAttention = "ulysses") -> Iterator[Together]:
    """Join the processes that share each sequence, ``size`` at a time; torchrun has started them."""
    if size == 1:
        yield Together()
        return
    from kinema.config.schema import ParallelConfig
    from kinema.parallel.mesh import start, stop
    from kinema.parallel.watch import Watch

    world = start(ParallelConfig(sp=size), device.type)
    with Watch(world) as watch:
        yield Together(world, attention, WatchedSteps(watch))
    stop()
