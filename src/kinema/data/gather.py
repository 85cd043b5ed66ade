"""From sources to items: open, examine, place in buckets, and account for every record that is left out."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.data import BucketConfig, SourceConfig
from kinema.config.schema import Config
from kinema.errors import UserError

from .encode import Encoder, Ranks, from_main, together
from .examine import DAMAGED, How, Looked, look, recall, remember
from .facts import FactStore
from .items import Items
from .placement import CODES, Placement, place
from .records import LeftOut
from .segments import publish, write_all
from .sources.base import MediaColumns, RecordList, Source, columns_of
from .sources.open import open_source

if TYPE_CHECKING:
    import numpy as np

LISTED = 30
"""So many files that are left out are printed; where there are more, a file in the cache directory has all."""

COUNTED = {
    "Used with an empty caption": {"empty caption": "with an empty one", "missing caption": "with none"},
    "Ignored": {
        "sidecar": "beside media (tables, subtitles and the like)",
        "hidden": "hidden",
        "control picture without media": "control pictures without media",
        "mask without media": "masks without media",
        "other caption in .json": "captions in .json that differ from the .txt",
        "empty among others": "empty captions beside others",
    },
}
"""Counts of a source that are printed, where they are not zero, and their words."""


@dataclass(frozen=True)
class Misfits(Sequence[LeftOut]):
    """Records that no bucket takes, made into entries when they are read: there may be millions."""

    source: Source
    rows: np.ndarray
    """Rows in the source, of the positions in ``placement``."""
    placement: Placement
    damage: Mapping[int, str] = field(default_factory=dict)
    """What is known of damage to the files of some rows: it may be why they are too short."""

    def __len__(self) -> int:
        return len(self.placement.missed)

    def __getitem__(self, position: int) -> LeftOut:  # type: ignore[override]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        at = int(self.placement.missed[position])
        reason, code = self.placement.reason(at)
        record = self.source.record(int(self.rows[at]))
        damage = self.damage.get(int(self.rows[at]))
        return LeftOut(record.path, f"{reason}; {damage}" if damage else reason, code, record.source)

    def by_code(self) -> Counter[str]:
        """How many for each cause."""
        import numpy as np

        counts = np.bincount(self.placement.missed_code, minlength=len(CODES))
        return Counter({code: int(count) for code, count in zip(CODES, counts, strict=True) if count})


@dataclass
class Gathered:
    """What the sources of a data set gave."""

    items: Items
    left_out: list[Sequence[LeftOut]]
    """Everything that is left out, in parts."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """(location, what the user should know about how it is used)."""
    counts: Counter[str] = field(default_factory=Counter)

    def codes(self) -> dict[str, int]:
        """How many are left out for each cause, most frequent first."""
        total: Counter[str] = Counter()
        for part in self.left_out:
            count = getattr(part, "by_code", None)  # of those that may be millions
            total.update(count() if count else Counter(entry.code for entry in part))
        return dict(sorted(total.items(), key=lambda pair: (-pair[1], pair[0])))

    def each(self) -> Iterator[LeftOut]:
        """Everything that is left out."""
        return itertools.chain.from_iterable(self.left_out)

    @property
    def left_out_count(self) -> int:
        return sum(len(part) for part in self.left_out)


def gather(
    config: Config,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    ranks: Ranks,
    *,
    facts: FactStore,
    say: Callable[[str], None],
    online: bool = False,
) -> Gathered:
    """The items of some sources, and all that is left out, alike on every rank.

    Each rank examines its share. What was found is remembered under the files' sizes and times, so that a second start
    opens none. ``online``: clips that are drawn anew for every use may be.
    """
    import numpy as np

    result = Gathered(Items.none(), [])
    for number, settings in enumerate(sources):
        source = _open(settings, number, ranks, facts.directory)
        columns, found = _examined(source, config, encoder, ranks, facts, online)
        rows = np.flatnonzero(columns.known).astype(np.uint32)
        seed = config.run.seed
        placement = place(
            columns.take(rows), rows, settings.buckets or BucketConfig(), encoder.grid, encoder.frame_stride,
            seed=seed, online=online,
        )  # fmt: skip
        result.left_out += [source.left_out, [one for looked in found.values() for one in looked.left_out]]
        damage = {row: note for row, looked in found.items() for note in looked.notes if note.startswith(DAMAGED)}
        result.left_out.append(Misfits(source, rows, placement, damage))
        result.counts.update(source.counts)
        result.notes += [(source.record(row).path, note) for row, looked in found.items() for note in looked.notes]
        result.notes += list(_short_videos(source, rows, columns, placement, settings.buckets or BucketConfig()))
        result.items = result.items.joined(Items.of(source, rows, placement))
    if ranks.rank == 0:
        report(result, sources, say, facts.directory)
    return result


def _open(settings: SourceConfig, number: int, ranks: Ranks, store: Path) -> Source:
    """A source, the same on every rank: records that are in memory come from rank 0, tables are opened by each."""
    first = from_main(ranks, lambda: _shared(open_source(settings, number, store)))
    if first is not None:
        return first
    return together(ranks, lambda: open_source(settings, number, store))


def _shared(source: Source) -> RecordList | None:
    return source if isinstance(source, RecordList) else None


def _examined(
    source: Source, config: Config, encoder: Encoder, ranks: Ranks, facts: FactStore, online: bool
) -> tuple[MediaColumns, dict[int, Looked]]:
    """What is known of each row's media, and what looking at files gave, by row (rows that say nothing of themselves
    are not in it)."""
    import numpy as np

    own = source.columns()
    trust = config.data.examine == "trust"
    rows = np.flatnonzero(~own.known) if own is not None and trust else np.arange(len(source))
    how: How = "clips" if config.data.examine == "clips" else "headers"
    buckets = source.config.buckets or BucketConfig()

    def examine() -> dict[int, Looked]:
        def one(row: int) -> Looked:
            record = source.record(row)
            place_settings = (buckets, encoder.grid, encoder.frame_stride, how, row, config.run.seed, online)
            found = recall(record, facts, place_settings, trust=trust)
            if found is None:
                found = look(record, *place_settings)
                remember(record, found, facts, place_settings, trust=trust)
            return found

        mine = [int(row) for row in rows[ranks.rank :: ranks.size]]
        with ThreadPoolExecutor(config.data.workers or 1, thread_name_prefix="examine") as pool:
            return dict(zip(mine, pool.map(one, mine), strict=True))

    found: dict[int, Looked] = {}
    for share in ranks.gather_objects(together(ranks, examine)):
        found.update(share)
    found = dict(sorted(found.items()))
    if not found and own is not None:
        return own, found
    looked = [found[int(row)] for row in rows]
    records = [source.record(int(row)) for row in rows]
    seen = columns_of([one.info for one in looked], records)
    return (seen if own is None or len(rows) == len(source) else own.with_rows(rows, seen)), found


def _short_videos(
    source: Source, rows: np.ndarray, columns: MediaColumns, placement: Placement, buckets: BucketConfig
) -> Iterator[tuple[str, str]]:
    """A note for every video of which one frame is used, though there are longer buckets; at most as many as listed."""
    import numpy as np

    longer = min((count for count in buckets.frames if count > 1), default=0)
    if not longer or buckets.table is not None:
        return
    short = columns.video[rows[placement.index]] & (placement.frames == 1)
    for position in np.flatnonzero(short)[: LISTED + 1]:
        path = source.record(int(rows[placement.index[position]])).path
        yield path, f"a video too short for {longer} frames: one frame of it is used, as a picture"


def report(found: Gathered, sources: Sequence[SourceConfig], say: Callable[[str], None], directory: Path) -> None:
    """Say how many files are used, in which buckets, and which are left out and why.

    A long list goes to a file in ``directory``, named after its content.
    """
    items = found.items
    names = ", ".join(source.name or source.path for source in sources)
    say(f"Data of {names}: {items.records} files used as {len(items)} items, {found.left_out_count} left out")
    for bucket, count in sorted(items.bucket_counts().items(), key=lambda pair: str(pair[0])):
        say(f"  {bucket}: {count}")
    for what, names_of in COUNTED.items():
        if said := [f"{found.counts[name]} {words}" for name, words in names_of.items() if found.counts.get(name)]:
            say(f"{what}: {', '.join(said)}")
    for path, note in found.notes[:LISTED]:
        say(f"  {path}: {note}")
    if len(found.notes) > LISTED:
        say(f"  ... and {len(found.notes) - LISTED} more such notes: `kinema data inspect` lists them all")
    if found.left_out_count:
        say("Left out: " + ", ".join(f"{count} {code}" for code, count in found.codes().items()))
        for entry in itertools.islice(found.each(), LISTED):
            say(f"  {entry}")
    if found.left_out_count > LISTED:
        say(f"  ... and {found.left_out_count - LISTED} more: {_write_list(found, directory)} lists them all")


def _write_list(found: Gathered, directory: Path) -> Path:
    digest = hashlib.blake2b(digest_size=4)
    for entry in found.each():
        digest.update(f"{entry}\n".encode())
    path = directory / f"left-out-{digest.hexdigest()}.txt"
    if not path.exists():
        lines = (f"{entry}\n".encode() for entry in found.each())
        publish(path, lambda out: write_all(out, lines), secrets.token_hex(6))
    return path


def check(found: Gathered, sources: Sequence[SourceConfig], strict: bool) -> None:
    """UserError where nothing can be used, or anything is left out of a strict data set."""
    names = ", ".join(source.path for source in sources)
    count = found.left_out_count
    listed = "".join(f"\n  {entry}" for entry in itertools.islice(found.each(), LISTED))
    listed += f"\n  ... and {count - LISTED} more" if count > LISTED else ""
    if not len(found.items) and not count:
        raise UserError(f"there is no picture or video in {names}: put media with .txt captions of the same name there")
    if not len(found.items):
        raise UserError(f"nothing in {names} can be used:{listed}")
    if strict and count:
        raise UserError(
            f"data.strict is set, and {count} of the files in {names} cannot be used. "
            f"Mend them or take them out:{listed}"
        )
