"""From sources to items: open, examine, place in buckets, and account for every record that is left out."""

from __future__ import annotations

import hashlib
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.data import BucketConfig, SourceConfig
from kinema.config.schema import Config
from kinema.errors import UserError

from .buckets import bucket_groups
from .choice import CODES, NOT_DRAWN
from .encode import Encoder, Ranks, from_main, together
from .examine import DAMAGED, How, Looked, look, recall, remember
from .facts import FactStore
from .fill import ahead
from .forecast import LINE_SECONDS
from .items import Items
from .placement import Placement, place
from .records import LeftOut
from .segments import publish, write_all
from .sources.base import MediaColumns, RecordList, Source, columns_of
from .sources.open import open_source

if TYPE_CHECKING:
    import numpy as np

LISTED = 30
"""So many files that are left out are printed; where there are more, a file in the cache directory lists them."""
WRITTEN = 20_000
"""That file lists so many, at most: of a table of millions, what a user reads."""

PASSED_OVER = "not drawn"
"""Count of records that the probabilities of a bucket table pass over: as asked for, and no fault of theirs."""
COUNTED = {
    "Passed over": {PASSED_OVER: "by the probabilities of data.buckets.table"},
    "Used as pictures, by one frame": {"short video": "videos too short for any longer clip"},
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
    """Records that no bucket takes, made into entries when they are read: there may be millions. Those that a table's
    probabilities pass over are none of them."""

    source: Source
    rows: np.ndarray
    """Rows in the source, of the positions in ``placement``."""
    placement: Placement
    damage: Mapping[int, str] = field(default_factory=dict)
    """What is known of damage to the files of some rows: it may be why they are too short."""

    @cached_property
    def _missed(self) -> np.ndarray:
        return self.placement.missed[self.placement.missed_code != NOT_DRAWN]

    def __len__(self) -> int:
        return len(self._missed)

    def __getitem__(self, position: int) -> LeftOut:  # type: ignore[override]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        at = int(self._missed[position])
        reason, code = self.placement.reason(at)
        record = self.source.record(int(self.rows[at]))
        damage = self.damage.get(int(self.rows[at]))
        return LeftOut(record.path, f"{reason}; {damage}" if damage else reason, code, record.source)

    def by_code(self) -> Counter[str]:
        """How many for each cause."""
        import numpy as np

        counts = np.bincount(self.placement.missed_code, minlength=len(CODES))
        found: Counter[str] = Counter()
        for number, count in enumerate(counts.tolist()):  # two causes may have one name
            found[CODES[number]] += count if number != NOT_DRAWN else 0
        return +found


@dataclass(frozen=True)
class Joined(Sequence[LeftOut]):
    """Parts of a list as one."""

    parts: tuple[Sequence[LeftOut], ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[LeftOut]:
        return itertools.chain.from_iterable(self.parts)

    def __getitem__(self, position: int | slice) -> LeftOut | list[LeftOut]:  # type: ignore[override]
        if isinstance(position, slice):
            return [self._at(number) for number in range(*position.indices(len(self)))]
        return self._at(range(len(self))[position])

    def _at(self, number: int) -> LeftOut:
        for part in self.parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(number)


@dataclass
class Gathered:
    """What the sources of a data set gave."""

    items: Items
    left_out: list[Sequence[LeftOut]]
    """Everything that is left out, in parts."""
    of_source: list[int] = field(default_factory=list)
    """How many records and files of each source are left out or passed over."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """(location, what the user should know about how it is used)."""
    counts: Counter[str] = field(default_factory=Counter)

    def leave_out(self, failed: Mapping[int, LeftOut]) -> None:
        """Take records out of the items, named by their `Items.record_keys`."""
        import numpy as np

        if not failed:
            return
        keys = np.array(list(failed), np.uint64)
        for source in (keys >> np.uint64(32)).tolist():
            self.of_source[source] += 1
        self.items = self.items.only(~np.isin(self.items.record_keys, keys))
        self.left_out.append(list(failed.values()))

    def codes(self) -> dict[str, int]:
        """How many are left out for each cause, most frequent first."""
        total: Counter[str] = Counter()
        for part in self.left_out:
            count = getattr(part, "by_code", None)  # of those that may be millions
            total.update(count() if count else Counter(entry.code for entry in part))
        return dict(sorted(total.items(), key=lambda pair: (-pair[1], pair[0])))

    @property
    def all_left_out(self) -> Joined:
        """Everything that is left out."""
        return Joined(tuple(self.left_out))

    @property
    def left_out_count(self) -> int:
        return len(self.all_left_out)


def gather(
    config: Config,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    ranks: Ranks,
    *,
    facts: FactStore,
    say: Callable[[str], None],
    online: bool = False,
    fresh: bool = False,
) -> Gathered:
    """The items of some sources, and all that is left out, alike on every rank.

    Each rank examines its share. What was found is remembered under the files' sizes and times, so that a second start
    opens none. ``online``: clips that are drawn anew for every use may be. ``fresh``: files that are known by their
    location are looked into again.
    """
    import numpy as np

    for settings in sources:  # a mistake in the buckets shows before hours of looking at files
        bucket_groups(settings.buckets or BucketConfig(), encoder.grid, encoder.lengths)
    result = Gathered(Items.none(), [])
    for number, settings in enumerate(sources):
        source = _open(settings, number, ranks, facts.directory)
        columns, found = _examined(source, config, encoder, ranks, facts, online, fresh, say)
        rows = np.flatnonzero(columns.known).astype(np.uint32)
        seed = config.run.seed
        placement = place(
            columns.take(rows), rows, settings.buckets or BucketConfig(), encoder.grid, encoder.lengths,
            seed=seed, online=online,
        )  # fmt: skip
        damage = {row: note for row, looked in found.items() for note in looked.notes if note.startswith(DAMAGED)}
        unseen = [one for looked in found.values() for one in looked.left_out]
        result.left_out += [source.left_out, unseen, Misfits(source, rows, placement, damage)]
        result.of_source.append(len(source.left_out) + len(unseen) + len(placement.missed))
        result.counts.update(source.counts)
        result.counts[PASSED_OVER] += int(np.count_nonzero(placement.missed_code == NOT_DRAWN))
        result.notes += [(source.record(row).path, note) for row, looked in found.items() for note in looked.notes]
        short = _short_videos(columns.video[rows], placement)
        result.counts["short video"] += len(short)
        for position in short[:LISTED]:
            path = source.record(int(rows[position])).path
            result.notes.append((path, "a video too short for any longer clip: one frame of it is used, as a picture"))
        result.items = result.items.joined(Items.of(source, rows, placement))
    result.counts = +result.counts
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
    source: Source,
    config: Config,
    encoder: Encoder,
    ranks: Ranks,
    facts: FactStore,
    online: bool,
    fresh: bool,
    say: Callable[[str], None],
) -> tuple[MediaColumns, dict[int, Looked]]:
    """What is known of each row's media, and what looking at files gave, by row: of those that had to be looked at."""
    import numpy as np

    own = source.columns()
    trust = config.data.examine == "trust"
    rows = np.flatnonzero(~own.known) if own is not None and trust else np.arange(len(source))
    how: How = "clips" if config.data.examine == "clips" else "headers"
    buckets = source.config.buckets or BucketConfig()

    def examine() -> dict[int, Looked]:
        def one(row: int) -> Looked:
            record = source.record(row)
            place_settings = (buckets, encoder.grid, encoder.lengths, how, row, config.run.seed, online)
            found = None if trust and fresh else recall(record, facts, place_settings, trust=trust)
            if found is None:
                found = look(record, *place_settings)
                remember(record, found, facts, place_settings, trust=trust)
            return found

        mine = [int(row) for row in rows[ranks.rank :: ranks.size]]
        seen: dict[int, Looked] = {}
        told = time.monotonic()
        for row, looked in zip(mine, ahead(one, mine, config.data.workers), strict=True):
            seen[row] = looked
            if time.monotonic() - told > LINE_SECONDS:
                told = time.monotonic()
                say(f"Examining {source.name}: {len(seen)} of {len(mine)}")
        return seen

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


def _short_videos(video: np.ndarray, placement: Placement) -> np.ndarray:
    """Positions of the videos of which one frame is used, though there are longer clips; ``video``: which records are
    some."""
    import numpy as np

    if placement.config.table is not None or max(placement.config.lengths) == 1:
        return np.empty(0, np.uint32)
    return np.unique(placement.index[video[placement.index] & (placement.frames == 1)])


def report(found: Gathered, sources: Sequence[SourceConfig], say: Callable[[str], None], directory: Path) -> None:
    """Say how many files are used, in which buckets, and which are left out and why.

    What is too long to print goes to a file in ``directory``, named after its content.
    """
    items = found.items
    names = ", ".join(source.name or source.path for source in sources)
    say(f"Data of {names}: {items.records} files used as {len(items)} items, {found.left_out_count} left out")
    for bucket, count in sorted(items.bucket_counts().items(), key=lambda pair: str(pair[0])):
        say(f"  {bucket}: {count}")
    for line in counted(found.counts):
        say(line)
    for path, note in found.notes[:LISTED]:
        say(f"  {path}: {note}")
    if len(found.notes) > LISTED:
        say(f"  ... and {len(found.notes) - LISTED} more such notes: `kinema data inspect --json` has them")
    if found.left_out_count:
        say("Left out: " + ", ".join(f"{count} {code}" for code, count in found.codes().items()))
        for line in _listed(found, directory):
            say(line)


def counted(counts: Mapping[str, int]) -> Iterator[str]:
    """What is to be said of the counts, a line for each of `COUNTED`."""
    for what, names in COUNTED.items():
        if said := [f"{counts[name]} {words}" for name, words in names.items() if counts.get(name)]:
            yield f"{what}: {', '.join(said)}"


def check(found: Gathered, sources: Sequence[SourceConfig], strict: bool, directory: Path) -> None:
    """UserError where nothing can be used, or anything is left out of a strict set; ``directory``: as in `report`."""
    names = ", ".join(source.path for source in sources)
    count = found.left_out_count
    if not len(found.items) and not count:
        passed = found.counts[PASSED_OVER]
        why = f"the probabilities of data.buckets.table passed over all {passed} records of {names}: raise them"
        nothing = f"there is no picture or video in {names}: put media with .txt captions of the same name there"
        raise UserError(why if passed else nothing)
    if not len(found.items):
        raise UserError("\n".join((f"nothing in {names} can be used:", *_listed(found, directory))))
    if strict and count:
        what = f"data.strict is set, and {count} of the files in {names} cannot be used. Mend them or take them out:"
        raise UserError("\n".join((what, *_listed(found, directory))))


def _listed(found: Gathered, directory: Path) -> list[str]:
    """The first that are left out, a line each, and where the others are listed."""
    lines = [f"  {entry}" for entry in itertools.islice(found.all_left_out, LISTED)]
    if found.left_out_count > LISTED:
        count, path = found.left_out_count, _write_list(found, directory)
        which = "them all" if count <= WRITTEN else f"the first {WRITTEN}"
        lines.append(f"  ... and {count - LISTED} more: {path} lists {which}")
    return lines


def _write_list(found: Gathered, directory: Path) -> Path:
    lines = [f"{entry}\n".encode() for entry in itertools.islice(found.all_left_out, WRITTEN)]
    digest = hashlib.blake2b(b"".join(lines), digest_size=4)
    path = directory / f"left-out-{digest.hexdigest()}.txt"
    if not path.exists():
        publish(path, lambda out: write_all(out, lines), secrets.token_hex(6))
    return path
