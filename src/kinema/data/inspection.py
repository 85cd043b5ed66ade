"""What a configuration will train on, found without encoding anything: counts, reasons, duplicates, captions, crops."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kinema.config.data import CaptionConfig, SourceConfig
from kinema.config.schema import Config

from .batch_sizes import batch_sizes, left_to_trials, sizes_of_tables
from .buckets import Clip
from .cache import Cache
from .captions import Captioner
from .contents import Contents
from .encode import Encoder, Ranks, together
from .facts import FactStore
from .files import absolute
from .fill import ahead
from .gather import Gathered, gather
from .items import Item, Items
from .mixing import repeats_of
from .records import LeftOut, MediaError, left_out_for
from .sampler import BatchOrder

if TYPE_CHECKING:
    from collections.abc import Mapping

THUMBNAILS = 48
COMMON = 10
"""So many of the captions that several records share are shown."""
CAPTIONS = 100_000
"""Of so many records at most, spread evenly over all, the captions are looked at."""


@dataclass(frozen=True)
class SourceSummary:
    """One source in figures."""

    name: str
    path: str
    records: int
    used: int
    items: int
    """Records times the clips and resolutions that they are used at."""
    repeats: float
    """How often each item is drawn in an epoch."""
    regularization: bool


@dataclass(frozen=True)
class BucketSummary:
    """One bucket in figures. ``batch_size`` None: it will be found by trial."""

    frames: int
    height: int
    width: int
    items: int
    batch_size: int | None


@dataclass(frozen=True)
class CaptionSummary:
    """The captions of the records that are used, before prefix, suffix and shuffling."""

    records: int
    """Those that were looked at: all, or an even choice of a large set."""
    captions: int
    distinct: int
    empty: int
    several: int
    """Records that have more than one."""
    words_least: int
    words_median: float
    words_most: int
    shared: tuple[tuple[str, int], ...]
    """Captions that several records have, and how many do, most frequent first."""


@dataclass(frozen=True)
class Inspection:
    """All of it, of one set."""

    name: str
    records: int
    """Every row and media file that the sources have: used, left out, or passed over by a bucket table."""
    used: int
    items: int
    left_out: Sequence[LeftOut]
    codes: Mapping[str, int]
    notes: tuple[tuple[str, str], ...]
    counts: Mapping[str, int]
    sources: tuple[SourceSummary, ...]
    buckets: tuple[BucketSummary, ...]
    captions: CaptionSummary
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of files of the same content."""
    steps_per_epoch: float | None
    """None: batch sizes will be found by trial."""
    examples: tuple[tuple[Item, str], ...] = field(default=(), compare=False)
    """Items spread over sources and buckets, to be shown, each with the first caption that it is trained with."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``left_out`` has a ``path`` and a ``reason`` each."""
        plain = asdict(replace(self, examples=(), notes=(), left_out=()))
        del plain["examples"]
        plain["left_out"] = [
            {"path": one.path, "reason": one.reason, "code": one.code, "source": one.source} for one in self.left_out
        ]
        plain["notes"] = [{"path": path, "note": note} for path, note in self.notes]
        return plain


def inspect_data(
    config: Config,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    ranks: Ranks,
    *,
    name: str = "training",
    training: bool = True,
    device_count: int = 1,
    say: Callable[[str], None] = lambda message: None,
) -> Inspection:
    """Look at the records of some sources as the training would; nothing is encoded. ``training`` False: as a held-out
    set. ``device_count``: data-parallel devices, for batch sizes that are given for one. A set of which nothing can be
    used is no error here."""
    directory = config.data.cache or config.run.dir.parent / "cache"
    together(ranks, lambda: Cache(directory))  # that it can be used is found out here
    facts = FactStore(directory)
    try:
        online = training and "media" in config.data.online
        found = gather(config, sources, encoder, ranks, facts=facts, say=lambda message: None, online=online)
        duplicates = _duplicates(found, Contents(facts, config.data.examine == "trust"), config.data.workers, say)
    finally:
        facts.close()
    items = found.items
    settings = [source.config for source in items.sources]
    counts = np.bincount(items.source, minlength=len(settings))
    repeats = repeats_of(settings, [int(count) for count in counts])
    sizes = _batch_sizes(config, items, encoder, device_count)
    steps = None
    if sizes is not None and len(items):
        order = BatchOrder(items.bucket, sizes, config.run.seed, source_of=items.source, repeats=repeats)
        steps = float(order.steps_per_epoch)
    return Inspection(
        name=name,
        records=items.records + sum(found.of_source),
        used=items.records,
        items=len(items),
        left_out=found.all_left_out,
        codes=found.codes(),
        notes=tuple(found.notes),
        counts=dict(found.counts),
        sources=tuple(_source(found, number, float(share)) for number, share in enumerate(repeats)),
        buckets=tuple(
            BucketSummary(bucket.frames, bucket.height, bucket.width, count, None if sizes is None else sizes[number])
            for number, (bucket, count) in enumerate(items.bucket_counts().items())
        ),
        captions=_captions(items),
        duplicates=duplicates,
        steps_per_epoch=steps,
        examples=tuple(
            _example(items[index], sources[items.source[index]], config.run.seed) for index in _spread(items)
        ),
    )


def _batch_sizes(config: Config, items: Items, encoder: Encoder, ranks: int) -> list[int] | None:
    table = sizes_of_tables((source.config for source in items.sources), encoder.grid)
    if left_to_trials(config.training, items.buckets, table):
        return None
    sizes = batch_sizes(
        config.training, items.buckets, grid=encoder.grid, lengths=encoder.lengths, ranks=ranks, table=table
    )
    return [size.total for size in sizes]


def _source(found: Gathered, number: int, repeats: float) -> SourceSummary:
    source, items = found.items.sources[number], found.items
    mine = items.source == number
    used = len(np.unique(items.row[mine]))
    left_out = found.of_source[number]
    return SourceSummary(
        source.name, source.config.path, used + left_out, used, int(mine.sum()), repeats, source.config.regularization
    )


def _records(items: Items) -> np.ndarray:
    """The number of one item of each record."""
    return np.unique(items.record_keys, return_index=True)[1]


def _captions(items: Items) -> CaptionSummary:
    shared: Counter[str] = Counter()
    several = 0
    records = _records(items)
    chosen = records[:: max(1, -(-len(records) // CAPTIONS))]
    for index in chosen.tolist():
        captions = items[index].record.captions
        several += len(captions) > 1
        shared.update(set(captions))
    words = sorted(len(caption.split()) for caption in shared.elements())
    common = tuple((text, count) for text, count in shared.most_common(COMMON) if count > 1)
    return CaptionSummary(
        len(chosen), len(words), len(shared), shared.get("", 0), several, words[0] if words else 0,
        statistics.median(words) if words else 0.0, words[-1] if words else 0, common,
    )  # fmt: skip


def _duplicates(
    found: Gathered, contents: Contents, workers: int, say: Callable[[str], None]
) -> tuple[tuple[str, ...], ...]:
    """Groups of files of one content. Records that cannot be read whole are taken out of the items and left out. With
    ``trust`` no file is read, and nothing found."""
    items = found.items
    if contents.trust:
        say('Duplicates are not looked for: with data.examine = "trust" no file is read')
        return ()
    say("Reading files for duplicates ...")
    by_content: dict[str, list[str]] = {}
    unreadable: dict[int, LeftOut] = {}
    keys = items.record_keys.tolist()

    def identify(index: int) -> tuple[int, Item, MediaError | None]:
        item = items[index]
        return index, item, contents.read(item.record)

    for index, item, error in ahead(identify, _records(items).tolist(), workers):
        if error is None:
            by_content.setdefault(contents[item.record.path], []).append(item.record.path)
            continue
        unreadable[keys[index]] = left_out_for(item.record, error)
    found.leave_out(unreadable)
    groups = (tuple({absolute(path): path for path in paths}.values()) for paths in by_content.values())
    return tuple(group for group in groups if len(group) > 1)


def _example(item: Item, source: SourceConfig, seed: int) -> tuple[Item, str]:
    captioner = Captioner(source.captions or CaptionConfig(), seed, online=False)
    return item, captioner.choose(item.record, 0, fps=item.clip.fps)


def _spread(items: Items) -> list[int]:
    """Items of every source and bucket, as evenly as they go, at most `THUMBNAILS`."""
    if not len(items):
        return []
    keys = items.source.astype(np.int64) * len(items.buckets) + items.bucket
    order = np.argsort(keys, kind="stable")
    _, first = np.unique(keys[order], return_index=True)
    groups = np.split(order, first[1:])
    each = max(1, THUMBNAILS // len(groups))
    chosen = [
        int(i) for group in groups for i in group[np.linspace(0, len(group) - 1, min(each, len(group))).astype(int)]
    ]
    return chosen[:THUMBNAILS]


@dataclass(frozen=True)
class Thumbnail:
    """A frame as shown, uint8 [H, W, 3], and what is used of it: (left, top, right, bottom), each 0 to 1."""

    pixels: np.ndarray
    box: tuple[float, float, float, float]
    size: tuple[int, int]
    """Height and width of the file as shown."""


def thumbnail(item: Item, width: int = 320) -> Thumbnail:
    """The first frame of an item's clip with the part of it that is used. MediaError where the file is damaged."""
    from .media import decode_clip, probe
    from .transform import Transform, cover_box

    record, bucket = item.record, item.bucket
    info = probe(record.path)
    shown = Transform(max(1, round(width * info.height / info.width)), width)
    clip = Clip(item.clip.start, 1, item.clip.fps)
    pixels = decode_clip(record.path, clip, shown, info)[:, 0].transpose(1, 2, 0)
    left, top, right, bottom = record.crop or (0, 0, info.width, info.height)
    box = cover_box(right - left, bottom - top, bucket.width / bucket.height)
    box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
    scale = (info.width, info.height) * 2
    inside = tuple(edge / side for edge, side in zip(box, scale, strict=True))
    return Thumbnail(pixels, (inside[0], inside[1], inside[2], inside[3]), (info.height, info.width))
