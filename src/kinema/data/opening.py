"""Opening a data set: from a configuration to something that can be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kinema.config.data import CaptionConfig, SourceConfig
from kinema.config.schema import Config
from kinema.dtypes import torch_dtype

from .batch import Encoding
from .cache import Cache
from .cache_tools import forget
from .captions import Captioner
from .contents import Contents
from .dataset import Dataset, cached_captions
from .encode import MASK, Encoder, EntryPlanner, Ranks, plan_entries, reads_files, together
from .facts import FactStore
from .fill import Filler, ahead
from .gather import Gathered, check, gather, report
from .items import Item
from .online import OnlineEncoder
from .records import LeftOut, MediaError, left_out_for

if TYPE_CHECKING:
    from .buckets import Bucket

Say = Callable[[str], None]


def open_data(
    config: Config,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    ranks: Ranks,
    say: Say = lambda message: None,
    *,
    training: bool = True,
    regenerate: bool = False,
    forecast_only: bool = False,
    batch_sizes: Callable[[Sequence[Bucket]], list[int]] | None = None,
) -> Dataset:
    """Open, examine and encode the records of some sources; every rank calls it and gets the same data set.

    What is left out is counted and listed through ``say``. ``training`` False: no caption is ever dropped and nothing
    is encoded on line, as for a held-out set. ``regenerate``: what is cached of these records is encoded anew.
    ``forecast_only``: the cache is measured and not filled; batches cannot be read. ``batch_sizes``: samples of the
    global batch of each bucket; default: `training.batch_size`. UserError where nothing can be used, where something
    cannot and ``data.strict`` is set, and where the cache cannot be written.
    """
    assert config.training.precision != "auto", "the precision is settled before data is opened"
    opened = _Opened(config, sources, encoder, ranks, say, training, fresh=regenerate)
    try:
        if regenerate:
            keys = (key for _, key in opened.named_keys())
            together(ranks, lambda: forget(opened.cache, keys) if ranks.rank == 0 else None)
            opened.cache.refresh()
        opened.leave_out(opened.identify())
        opened.leave_out(opened.fill(stop_at_forecast=forecast_only))
    finally:
        opened.facts.close()
    data = Dataset(
        opened.gathered.items, opened.gathered, opened.captioners, opened.planner, opened.contents, opened.facts,
        opened.cache, opened.online, seed=config.run.seed, posterior=config.model.posterior,
        caption_dropout=opened.dropout, text_encoders=encoder.text_encoders, workers=config.data.workers,
        strict=config.data.strict,
    )  # fmt: skip
    if batch_sizes is not None:
        data.set_batch_sizes(batch_sizes(data.buckets))
    elif isinstance(config.training.batch_size, int):
        data.set_batch_sizes([config.training.batch_size] * len(data.buckets))
    return data


def planned_keys(
    config: Config,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    ranks: Ranks,
    say: Say = lambda message: None,
    *,
    training: bool = True,
) -> Iterator[tuple[str, bytes]]:
    """(name of the encoding, key) of every cache entry that a configuration needs for some sources, opened as
    `open_data` would; reads files whose content was never hashed, encodes nothing."""
    opened = _Opened(config, sources, encoder, ranks, say, training)
    try:
        yield from opened.named_keys()
    finally:
        opened.facts.close()


class _Opened:
    """A data set on its way: everything but the encodings."""

    def __init__(
        self,
        config: Config,
        sources: Sequence[SourceConfig],
        encoder: Encoder,
        ranks: Ranks,
        say: Say,
        training: bool,
        fresh: bool = False,
    ) -> None:
        """``fresh``: what is remembered of files that are known by their location is found anew."""
        self.config, self.sources, self.ranks, self.say = config, sources, ranks, say
        self.dtype = torch_dtype(config.training.precision)
        self.dropout = config.training.caption_dropout if training else 0.0
        directory = config.data.cache or config.run.dir.parent / "cache"
        self.cache: Cache = together(ranks, lambda: Cache(directory))
        for name, why in self.cache.damaged.items():
            say(f"The cache file {directory / name} cannot be read ({why}): what it held is encoded anew. Delete it")
        self.facts = FactStore(directory)
        self.contents = Contents(self.facts, trust=config.data.examine == "trust")
        kinds = config.data.online if training else ()
        self.gathered: Gathered = gather(
            config, sources, encoder, ranks, facts=self.facts, say=say, online="media" in kinds, fresh=fresh
        )
        check(self.gathered, sources, config.data.strict, directory)
        self.encoder = encoder
        self.planner: EntryPlanner = plan_entries(encoder, ranks, self.dtype)
        online = [one for one in (*self.planner.encodings, MASK) if ("media" if reads_files(one) else "text") in kinds]
        self.online = OnlineEncoder(encoder, ranks, online, self.dtype) if online else None
        self.cached = [one for one in (*self.planner.encodings, MASK) if one not in online]
        # A caption that is made anew for every use is in no cache: then nothing that reads one may be cached.
        anew = "text" in kinds and not any(one.reads_caption for one in self.cached)
        self.captioners = [
            Captioner(source.captions or CaptionConfig(), config.run.seed, online=anew) for source in sources
        ]

    def captions(self, item: Item, encoding: Encoding) -> tuple[str, ...]:
        """All captions under which an encoding of an item is cached."""
        return cached_captions(self.captioners[item.source], item, encoding, self.dropout)

    def fill(self, *, stop_at_forecast: bool) -> dict[int, LeftOut]:
        """Encode what is missing and not made on line; gives what could not be, by `Items.record_keys`."""
        filler = Filler(
            self.cache, self.facts, self.contents, self.encoder, self.planner, self.ranks,
            dtype=self.dtype, workers=self.config.data.workers, say=self.say,
        )  # fmt: skip
        return filler.fill(self.gathered.items, self.captions, self.cached, stop_at_forecast=stop_at_forecast)

    def named_keys(self) -> Iterator[tuple[str, bytes]]:
        """(name of the encoding, key) of every entry that is cached for these items; a file that cannot be read has
        none."""
        for item, error in ahead(self._read, self.gathered.items, self.config.data.workers):
            for encoding in self.planner.of(item) if error is None else ():
                if encoding in self.cached:
                    for caption in self.captions(item, encoding):
                        yield encoding.name, self.planner.entry(encoding, item, caption, self.contents).key

    def identify(self) -> dict[int, LeftOut]:
        """Find the content of files that are encoded on line, which the identity of the data asks for, each rank for
        its share; gives what could not be read, by `Items.record_keys`. With ``trust``, and for what is cached, there
        is nothing to do here."""
        items, ranks = self.gathered.items, self.ranks
        if self.contents.trust or self.online is None or not any(map(reads_files, self.online.encodings)):
            return {}

        def share() -> dict[int, LeftOut]:
            mine = range(ranks.rank, len(items), ranks.size)
            read = ahead(self._read, (items[index] for index in mine), self.config.data.workers)
            found = zip(items.record_keys[ranks.rank :: ranks.size].tolist(), read, strict=True)
            return {key: left_out_for(item.record, error) for key, (item, error) in found if error is not None}

        failed: dict[int, LeftOut] = {}
        for found in ranks.gather_objects(together(ranks, share)):
            failed |= found
        for hashes in ranks.gather_objects(dict(self.contents.found)):
            self.contents.update(hashes)
        return failed

    def _read(self, item: Item) -> tuple[Item, MediaError | None]:
        """The item, after its files have been read where that was needed to know their content."""
        return item, self.contents.read(item.record)

    def leave_out(self, failed: Mapping[int, LeftOut]) -> None:
        """Take records that could not be read or encoded out of the items, and say so."""
        if not failed:
            return
        self.gathered.leave_out(failed)
        if self.ranks.rank == 0:
            report(self.gathered, self.sources, self.say, self.cache.directory)
        check(self.gathered, self.sources, self.config.data.strict, self.cache.directory)
