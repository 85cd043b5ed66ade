"""A data set, ready to train on: sources are opened, files examined, what is missing encoded; batches come by step.

data = open_data(config, config.data.sources, family, world, print)
batch = data.batch(step=0, rank=world.dp_rank, size=world.dp_size)
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kinema.errors import UserError
from kinema.randomness import derive_seed, generator

from .batch import Batch, Encoding
from .buckets import Bucket
from .cache import Cache
from .captions import Captioner
from .contents import Contents
from .encode import MASK, EntryPlanner, clip_identity
from .facts import FactStore
from .files import file_name
from .items import Item, Items
from .mixing import repeats_of
from .online import OnlineEncoder
from .prefetch import Prefetcher
from .reading import Decoded, read_item, stand_in
from .records import LeftOut, MediaError, left_out_for
from .sampler import BatchOrder, rank_share

if TYPE_CHECKING:
    from torch import Tensor

    from .gather import Gathered

__all__ = ["Dataset", "Prefetcher", "Use"]


DECISIVE = {"captions", "repeats", "weight", "regularization"}
"""Settings of a source that decide what is trained on and do not show in its items."""


UNREAD = 50
"""After so many samples in a row whose files cannot be read, a run that encodes on line stops."""
TRIED = 256
"""So many items are looked through for a long caption."""


@dataclass(frozen=True)
class Use:
    """One use of an item: which caption, which clip and which draws it gets."""

    index: int
    """Number of the item."""
    count: int
    """How often the item was drawn before."""
    key: tuple[int | str, ...]
    """What keys the draws of its posterior."""
    dropped: frozenset[str] = frozenset()
    """Text encoders that are told the empty caption."""


class Dataset:
    """Items with their encodings, cached or made on line, and the order in which they are trained on."""

    def __init__(
        self,
        items: Items,
        gathered: Gathered,
        captioners: Sequence[Captioner],
        planner: EntryPlanner,
        contents: Contents,
        facts: FactStore,
        cache: Cache,
        online: OnlineEncoder | None,
        *,
        seed: int,
        posterior: str = "sample",
        caption_dropout: Mapping[str, float] | float = 0.0,
        text_encoders: Sequence[str] = (),
        workers: int = 0,
        strict: bool = False,
    ) -> None:
        """``captioners``: of each source. ``caption_dropout``: of all ``text_encoders`` together, or of each by its
        name, drawn independently. ``workers``: threads that decode what is encoded on line; ``strict``: a file that
        cannot be read then is an error."""
        assert len(items) > 0
        self.items, self.gathered, self.captioners = items, gathered, captioners
        self.planner, self.contents, self.facts, self.cache, self.online = planner, contents, facts, cache, online
        self.seed, self.posterior, self.caption_dropout = seed, posterior, caption_dropout
        self.text_encoders = frozenset(text_encoders)
        self.strict = strict
        self.unread: dict[str, LeftOut] = {}
        """Files that are encoded on line and could not be read when their turn came."""
        self._unread_in_a_row = 0
        self._pool = ThreadPoolExecutor(workers or 1, thread_name_prefix="decode") if online else None
        self.set_batch_sizes([1] * len(items.buckets))

    def set_batch_sizes(self, sizes: Sequence[int]) -> None:
        """Settle the order: samples in the global batch of each of ``items.buckets``."""
        configs = [source.config for source in self.items.sources]
        counts = np.bincount(self.items.source, minlength=len(configs))
        repeats = repeats_of(configs, [int(count) for count in counts])
        self.order = BatchOrder(self.items.bucket, sizes, self.seed, source_of=self.items.source, repeats=repeats)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Everything that the sources have and that is not used, each with its reason."""
        return tuple(self.gathered.all_left_out)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those that occur, sorted."""
        return self.items.buckets

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the user's data and its order: files' contents, clips, buckets and captions, item by item.

        Encoders and their types are no part of it: `kinema.training.resume` has rules of its own for them.
        """
        digest = hashlib.blake2b(digest_size=16)
        trusted = self.contents.trust
        for source in self.items.sources:
            whole = source.fingerprint if trusted else None  # no row is read where there may be millions
            digest.update(repr((whole, source.config.model_dump(include=DECISIVE))).encode())
        for column in (self.items.source, self.items.row, self.items.bucket, self.items.start, self.items.fps):
            digest.update(np.ascontiguousarray(column).tobytes())
        for item in () if trusted else self.items:
            media, *others = (self.contents[path] for path in item.record.files)
            name = file_name(item.record.path) if self.captioners[item.source].draws(item.record) else ""
            told = (item.record.captions, sorted(item.record.scores.items()), name)
            digest.update(repr((clip_identity(item, media), others, told)).encode())
        return digest.hexdigest()

    def global_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        return self.order.global_size(step)

    def batch(self, step: int, rank: int = 0, size: int = 1) -> Batch:
        """A data-parallel rank's share of the global batch of a step. Depends on nothing but the arguments."""
        drawn = self.order.batch(step)
        positions, weights = rank_share(len(drawn.items), rank, size)
        uses = [
            Use(int(drawn.items[p]), int(drawn.uses[p]), (self.seed, step, p), self._dropped(step, p))
            for p in positions
        ]
        return self._batch(step, uses, positions, weights)

    def sample_of(self, bucket: Bucket) -> Batch:
        """A batch of one sample of a bucket, to try things with: of its first, the one with the longest caption."""
        first = np.flatnonzero(self.items.bucket == self.items.buckets.index(bucket))[:TRIED]
        index = max((int(i) for i in first), key=lambda i: max(map(len, self.items[i].record.captions)))
        return self._batch(0, [Use(index, 0, (self.seed, "ordered", index))], [0], [1.0])

    def ordered_batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Every item once, unshuffled, no caption dropped, one bucket a batch: for evaluation.

        ``indices`` are places in the data set and ``weights`` are 1. All ranks get equally many batches; one that
        would run out repeats items with weight 0. Posteriors are drawn by place alone, alike at every call.
        """
        for chosen in self._ordered(batch_size * size):
            low, high = len(chosen) * rank // size, len(chosen) * (rank + 1) // size
            mine, weight = (chosen[low:high], 1.0) if high > low else (chosen[:1], 0.0)
            uses = [Use(index, 0, (self.seed, "ordered", index)) for index in mine]
            yield self._batch(0, uses, list(mine), [weight] * len(mine))

    def _ordered(self, batch_size: int) -> Iterator[list[int]]:
        by_bucket = np.argsort(self.items.bucket, kind="stable")
        for _, group in itertools.groupby(by_bucket.tolist(), key=lambda i: self.items.bucket[i]):
            indices = list(group)
            yield from (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))

    def _dropped(self, step: int, position: int) -> frozenset[str]:
        """The text encoders whose caption is dropped in a sample of a global batch."""
        import torch

        if not isinstance(self.caption_dropout, Mapping):
            if self.caption_dropout == 0:
                return frozenset()
            draw = torch.rand((), generator=generator(self.seed, step, position, "caption dropout"))
            return self.text_encoders if draw.item() < self.caption_dropout else frozenset()
        draws = {
            name: torch.rand((), generator=generator(self.seed, step, position, "caption dropout", name)).item()
            for name in self.caption_dropout
        }
        return frozenset(name for name, draw in draws.items() if draw < self.caption_dropout[name])

    # -- samples ---------------------------------------------------------------------------------------------------

    def _batch(self, step: int, uses: Sequence[Use], indices: list[int], weights: Sequence[float]) -> Batch:
        items = [self._item_of(use) for use in uses]
        captions = [
            self.captioners[item.source].choose(item.record, use.count, fps=item.clip.fps)
            for item, use in zip(items, uses, strict=True)
        ]
        decoded: Iterator[Decoded] = itertools.repeat(Decoded())
        if self._pool is not None:
            decoded = self._pool.map(self._decode, items)
        rows = []
        for position, (item, use, pixels) in enumerate(zip(items, uses, decoded, strict=False)):
            rows.append(self._sample(item, captions[position], use, pixels))
            if self._pool is not None and not self._was_read(item, pixels):
                weights = [0.0 if n == position else weight for n, weight in enumerate(weights)]
        masks = [row.pop("mask", None) for row in rows]
        factors = [self.items.sources[item.source].config.loss_weight for item in items]
        return Batch(
            step,
            {name: [row[name] for row in rows] for name in rows[0]},
            captions,
            indices,
            [weight * factor for weight, factor in zip(weights, factors, strict=True)],
            masks if any(mask is not None for mask in masks) else [],
            [use.dropped for use in uses] if any(use.dropped for use in uses) else [],
        )

    def _item_of(self, use: Use) -> Item:
        """The item of a use, its clip settled."""
        item = self.items[use.index]
        if not item.spare:
            return item
        row = int(self.items.row[use.index])
        words = np.random.PCG64(derive_seed(self.seed, "random clip", item.source, row, use.count))
        later = int(words.random_raw()) % (item.spare + 1)
        return replace(item, clip=replace(item.clip, start=item.clip.start + later), spare=0)

    def _decode(self, item: Item) -> Decoded:
        assert self.online is not None
        wanted = [one for one in self.planner.of(item) if one in self.online]
        facts = None if self.contents.trust else self.facts  # of a huge set, each file is read about once
        for pause in (1, 5, None):
            try:
                return read_item(item, wanted, facts)
            except MediaError as error:
                if error.code != "unreachable" or pause is None:
                    return stand_in(item, error)
            time.sleep(pause)
        raise AssertionError

    def _was_read(self, item: Item, decoded: Decoded) -> bool:
        """Whether an item's files could be read; said once for each that could not. Such a sample teaches nothing, at
        every use alike. UserError where all is lost, or ``strict`` is set."""
        if decoded.problem is None:
            self._unread_in_a_row = 0
            return True
        entry = left_out_for(item.record, decoded.problem)
        if self.strict:
            raise UserError(f"data.strict is set, and a file cannot be used: {entry}")
        self._unread_in_a_row += 1
        if self._unread_in_a_row >= UNREAD:
            raise UserError(f"{UNREAD} samples in a row cannot be read, now {entry}. Is their storage there?")
        if entry.path not in self.unread:
            self.unread[entry.path] = entry
            print(f"Left out of the training: {entry}", file=sys.stderr, flush=True)
        return False

    def _sample(self, item: Item, caption: str, use: Use, decoded: Decoded) -> dict[str, Tensor]:
        """The tensors of an item, posteriors drawn: its own memory, read while nobody waits for it."""
        stored: dict[str, Tensor] = {}
        for encoding in self.planner.of(item):
            told = "" if encoding.text_encoder in use.dropped else caption
            if self.online is not None and encoding in self.online:
                stored |= self.online.encode(encoding, decoded, told)
            else:
                stored |= self.cache.get(self.planner.entry(encoding, item, told, self.contents).key)
        return draw_posteriors(stored, self.posterior, use.key)


def cached_captions(
    captioner: Captioner, item: Item, encoding: Encoding, dropout: Mapping[str, float] | float
) -> tuple[str, ...]:
    """All captions under which one encoding of an item may be read; one empty one for what reads no caption."""
    if encoding is MASK or not encoding.reads_caption:
        return ("",)
    share = dropout.get(encoding.text_encoder or "", 0.0) if isinstance(dropout, Mapping) else dropout
    return tuple(dict.fromkeys((*captioner.variants(item.record, fps=item.clip.fps), *([""] if share > 0 else []))))


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
