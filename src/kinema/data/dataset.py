"""A data set, ready to train on: sources are scanned, files examined, everything encoded; batches come by step.

data = open_data(config, config.data.sources, family, world, print)
batch = data.batch(step=0, rank=world.dp_rank, size=world.dp_size)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kinema.config.schema import Config, SourceConfig
from kinema.dtypes import torch_dtype
from kinema.randomness import generator

from .batch import Batch
from .cache import Cache
from .encode import Encoder, Entry, EntryPlanner, Filler, Ranks, clip_identity, from_main, together
from .examine import Item
from .facts import FactStore
from .gather import check, gather_items, report
from .prefetch import Prefetcher
from .records import LeftOut
from .sampler import BatchOrder, rank_share

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dataset", "Prefetcher", "open_data"]


class Dataset:
    """Items with their encodings in the cache, and the order in which they are trained on.

    ``contents[i]`` is the hash of item i's file, ``keys[i]`` are its cache keys, one for each encoding, and
    ``empty_keys[i]`` those with the empty caption (None where captions are never dropped).
    """

    def __init__(
        self,
        items: Sequence[Item],
        contents: Sequence[str],
        keys: Sequence[tuple[bytes, ...]],
        empty_keys: Sequence[tuple[bytes, ...]] | None,
        cache: Cache,
        *,
        batch_size: int,
        seed: int,
        posterior: str = "sample",
        caption_dropout: float = 0.0,
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        assert len(items) == len(contents) == len(keys) > 0
        assert empty_keys is not None or caption_dropout == 0
        self.items, self.contents, self.keys, self.empty_keys = items, contents, keys, empty_keys
        self.cache, self.seed, self.posterior, self.caption_dropout = cache, seed, posterior, caption_dropout
        self.left_out = tuple(left_out)
        self.buckets = sorted({item.bucket for item in items})
        number = {bucket: n for n, bucket in enumerate(self.buckets)}
        self.order = BatchOrder([number[item.bucket] for item in items], batch_size, seed)

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the user's data and its order: files' contents, clips, buckets and captions, item by item.

        Encoders and their types are no part of it: `kinema.training.resume` has rules of its own for them.
        """
        digest = hashlib.blake2b(digest_size=16)
        for item, content in zip(self.items, self.contents, strict=True):
            digest.update(repr((clip_identity(item, content), item.record.caption)).encode())
        return digest.hexdigest()

    def global_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        return len(self.order.batch(step)[1])

    def batch(self, step: int, rank: int = 0, size: int = 1) -> Batch:
        """A data-parallel rank's share of the global batch of a step. Depends on nothing but the arguments."""
        chosen = self.order.batch(step)[1]
        positions, weights = rank_share(len(chosen), rank, size)
        dropped = [self._drops_caption(step, position) for position in positions]
        rows = [self._sample(int(chosen[p]), (step, p), drop) for p, drop in zip(positions, dropped, strict=True)]
        captions = [
            "" if drop else self.items[int(chosen[p])].record.caption
            for p, drop in zip(positions, dropped, strict=True)
        ]
        return Batch(step, _by_name(rows), captions, positions, weights)

    def ordered_batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Every item once, unshuffled, no caption dropped, one bucket a batch: for evaluation.

        ``indices`` are places in the data set and ``weights`` are 1. All ranks get equally many batches; one that
        would run out repeats items with weight 0. Posteriors are drawn by place alone, alike at every call.
        """
        for chosen in self._ordered(batch_size * size):
            low, high = len(chosen) * rank // size, len(chosen) * (rank + 1) // size
            mine, weight = (chosen[low:high], 1.0) if high > low else (chosen[:1], 0.0)
            rows = [self._sample(index, ("ordered", index), False) for index in mine]
            captions = [self.items[index].record.caption for index in mine]
            yield Batch(0, _by_name(rows), captions, list(mine), [weight] * len(mine))

    def _ordered(self, batch_size: int) -> Iterator[list[int]]:
        by_bucket = np.argsort(self.order.bucket_of, kind="stable")
        for _, group in itertools.groupby(by_bucket.tolist(), key=lambda i: self.order.bucket_of[i]):
            indices = list(group)
            yield from (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))

    def _drops_caption(self, step: int, position: int) -> bool:
        import torch

        if self.caption_dropout == 0:
            return False
        draw = torch.rand((), generator=generator(self.seed, step, position, "caption dropout"))
        return draw.item() < self.caption_dropout

    def _sample(self, index: int, place: tuple[int | str, int], without_caption: bool) -> dict[str, Tensor]:
        """The tensors of an item, posteriors drawn: its own memory, read while nobody waits for it."""
        keys = self.keys[index]
        if without_caption:
            assert self.empty_keys is not None
            keys = self.empty_keys[index]
        stored = {name: tensor for key in keys for name, tensor in self.cache.get(key).items()}
        return draw_posteriors(stored, self.posterior, (self.seed, *place))


def draw_posteriors(stored: Mapping[str, Tensor], posterior: str, key: tuple[int | str, ...]) -> dict[str, Tensor]:
    """For every ``X`` with ``X_std``: X = mean + std * eps in float32, eps from ``generator(*key, "posterior", X)``, or
    the mean as it is if ``posterior`` is "mean". The others are copied."""
    import torch

    result = {}
    for name, tensor in stored.items():
        std = stored.get(f"{name}_std")
        if name.endswith("_std") and name.removesuffix("_std") in stored:
            continue
        if std is None or posterior == "mean":
            result[name] = tensor.clone()
            continue
        noise = torch.randn(tensor.shape, generator=generator(*key, "posterior", name))
        result[name] = noise.mul_(std.float()).add_(tensor.float())
    return result


def _by_name(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def open_data(
    config: Config,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    ranks: Ranks,
    say: Callable[[str], None] = lambda message: None,
    *,
    training: bool = True,
) -> Dataset:
    """Scan, examine and encode the media of some sources; every rank calls it and gets the same data set.

    What is left out is counted and listed through ``say``. ``training`` False: no caption is ever dropped, as for a
    held-out set. UserError where nothing can be used, where something cannot and ``data.strict`` is set, and where
    the cache cannot be written.
    """
    assert config.training.precision != "auto", "the precision is settled before data is opened"
    dropout = config.training.caption_dropout if training else 0.0
    dtype = torch_dtype(config.training.precision)
    directory = config.data.cache or config.run.dir.parent / "cache"
    cache = together(ranks, lambda: Cache(directory))
    facts = FactStore(directory)
    for name, why in cache.damaged.items():
        say(f"The cache file {directory / name} cannot be read ({why}): what it held is encoded anew. Delete it")
    try:
        items, hashes, left_out = gather_items(config, sources, encoder, ranks, facts=facts, say=say)
        check(items, left_out, sources, config.data.strict)
        encodings = encoder.encodings()
        prints = from_main(ranks, lambda: {e.parts: encoder.fingerprint(e.parts) for e in encodings})
        dtypes = {e.parts: " ".join(str(encoder.part_dtype(part, dtype)) for part in e.parts) for e in encodings}
        planner = EntryPlanner(encodings, prints, dtypes)
        entries = [planner.entries(i, hashes[i.record.path], i.record.caption) for i in items]
        empty = [planner.entries(i, hashes[i.record.path], "") for i in items] if dropout > 0 else []
        filler = Filler(cache, facts, encoder, ranks, dtype=dtype, workers=config.data.workers, say=say)
        failed = filler.fill([entry for row in (*entries, *empty) for entry in row])
    finally:
        facts.close()
    if failed:
        gone = {str(entry.path) for entry in failed}
        kept = [n for n, item in enumerate(items) if str(item.record.path) not in gone]
        items, entries = [items[n] for n in kept], [entries[n] for n in kept]
        empty = [empty[n] for n in kept] if empty else []
        left_out = [*left_out, *failed]
        if ranks.rank == 0:
            report(items, left_out, sources, say, directory)
        check(items, left_out, sources, config.data.strict)
    return Dataset(
        items, [hashes[i.record.path] for i in items], _keys(entries), _keys(empty) if dropout > 0 else None, cache,
        batch_size=config.training.batch_size, seed=config.run.seed, posterior=config.model.posterior,
        caption_dropout=dropout, left_out=left_out,
    )  # fmt: skip


def _keys(rows: Sequence[Sequence[Entry]]) -> list[tuple[bytes, ...]]:
    return [tuple(entry.key for entry in row) for row in rows]
