"""Looking after a cache: verify what it holds, measure it, take out what nobody needs.

Entries are taken out by writing the others anew: the new shard becomes visible, whole, by one rename before the old one
goes, so that a crash at any moment leaves every wanted entry readable (twice, at worst: the next `prune` ends that).
Open segments are sealed first where their writers are gone, and are never touched where they are not.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from kinema.errors import UserError
from kinema.sizes import readable_bytes

from .cache import Cache
from .cache_index import CHUNK
from .segments import INDEX, KEY_BYTES, OPEN, SEALED, TEMPORARY, OpenSegment, entry_checksum, pieces
from .shard import Shard, build_index, prefixes_of
from .writer import FULL, STALE_SECONDS, CacheFull, abandoned, full_message

WRITTEN = re.compile(r"[0-9a-f]{12}-\d{4}\.")
"""How the names of all files begin that a cache writes."""
REST = "not used by this configuration"
"""What `size_report` calls the entries that no group has."""


@dataclass
class Damage:
    """A file of a cache that is not as it was written."""

    file: str
    reason: str
    intact: int = 0
    """Entries of this file that can be read: deleting it has them encoded anew, too."""


@dataclass
class Report:
    """What `verify` found."""

    directory: Path
    files: int = 0
    entries: int = 0
    """Entries whose checksum holds; one that lies in two files counts twice."""
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    """Each of these files may be deleted: what it held is encoded anew when it is needed."""
    leftovers: dict[str, str] = field(default_factory=dict)
    """Files that hold nothing that would be missed, and why: safe to delete."""
    unfinished: dict[str, str] = field(default_factory=dict)
    """Open segments whose end is no whole entry, or that are still written to: no damage."""
    foreign: list[str] = field(default_factory=list)
    """Files like those of a cache by names that no cache gives: not looked at."""

    def lines(self) -> list[str]:
        """For people."""
        result = [f"{self.entries} entries in {self.files} files ({readable_bytes(self.bytes)}) are intact"]
        for one in self.damaged:
            rest = f"; {one.intact} entries in it are intact" if one.intact else ""
            result.append(f"damaged: {self.directory / one.file}: {one.reason}{rest}")
        result += [f"left behind: {self.directory / name}: {why}" for name, why in self.leftovers.items()]
        result += [f"open: {self.directory / name}: {why}" for name, why in self.unfinished.items()]
        result += [f"no file of a cache, not looked at: {self.directory / name}" for name in self.foreign]
        if self.damaged or self.leftovers:
            result.append(
                "All files listed as damaged or left behind are safe to delete while nothing writes to the cache: "
                "what a damaged one held is encoded anew when it is needed"
            )
        return result


@dataclass
class Freed:
    """What `prune` or `forget` took out."""

    entries: int = 0
    bytes: int = 0
    deleted: int = 0
    """Shards without anything to keep."""
    rewritten: int = 0
    """Shards that were written anew with what is kept."""
    kept: int = 0
    """Entries that stay."""
    damaged: int = 0
    """Entries that were to be kept and do not match their checksum: they are gone, and encoded anew when needed."""


def verify(directory: Path | str) -> Report:
    """Read every byte of a cache and compare each entry with its checksum. Changes nothing.

    UserError where there is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"there is no cache directory {root}: give the one that data.cache names")
    report = Report(root)
    checks = {SEALED: _verify_shard, OPEN: _verify_segment, INDEX: _verify_index, TEMPORARY: _verify_temporary}
    for name in sorted(os.listdir(root)):
        if check := checks.get(Path(name).suffix):
            if not WRITTEN.match(name):
                report.foreign.append(name)
                continue
            try:
                check(root / name, report)
            except FileNotFoundError:
                pass  # sealed, pruned or finished meanwhile
            except OSError as error:
                report.damaged.append(Damage(name, f"it cannot be read ({error.strerror or error})"))
    return report


def _verify_shard(path: Path, report: Report) -> None:
    try:
        shard = Shard(path, build_index(path))
    except ValueError as error:
        report.damaged.append(Damage(path.name, str(error)))
        return
    good = 0
    with path.open("rb") as file:
        for row in range(shard.rows):
            places = [(offset, size) for *_, offset, size in shard.stored([row])]
            found = entry_checksum(piece for place in places for piece in pieces(file.fileno(), *place))
            good += found == int(shard.checksums[row])
    _count(report, good, shard.size)
    if good < shard.rows:
        why = f"{shard.rows - good} of {shard.rows} entries do not match their checksums"
        report.damaged.append(Damage(path.name, why, good))


def _verify_segment(path: Path, report: Report) -> None:
    segment = OpenSegment(path)
    try:
        entries = sum(1 for _ in segment.scan())
    except ValueError:
        report.damaged.append(Damage(path.name, "its first line is damaged"))
        return
    _count(report, entries, segment.end)
    if not abandoned(segment):
        report.unfinished[path.name] = "a process writes to it"
    elif segment.torn:
        rest = path.stat().st_size - segment.end
        report.unfinished[path.name] = f"its last {rest} bytes are no whole entry; what is before them is used"


def _count(report: Report, entries: int, size: int) -> None:
    report.files += 1
    report.entries += entries
    report.bytes += size


def _verify_index(path: Path, report: Report) -> None:
    shard = path.with_suffix(SEALED)
    if not shard.exists():
        report.leftovers[path.name] = "the index of a file that is gone"
        return
    try:
        if path.read_bytes() != build_index(shard):
            report.leftovers[path.name] = "it is damaged, and made anew once it is deleted"
    except ValueError:
        pass  # the shard is damaged, and reported as such


def _verify_temporary(path: Path, report: Report) -> None:
    if time.time() - path.stat().st_mtime > STALE_SECONDS:
        report.leftovers[path.name] = "half a file of a process that is gone"


def size_report(cache: Cache, planned: Iterable[tuple[str, bytes]]) -> dict[str, tuple[int, int, int]]:
    """For each group (an encoding): (entries that are wanted, those of them that are there, their bytes).

    ``planned``: (group, key) of everything that is wanted. The last row, `REST`, is what is there and not wanted. Bytes
    are those of the tensors; a key that is named twice counts once, one that two shards hold counts both copies.
    """
    cache.refresh()
    index, loose = cache.index, cache.loose()
    extra, firsts = index.repeated()
    sizes = np.concatenate([np.zeros(0, np.int64), *(shard.sizes() for shard in index.shards)])
    np.add.at(sizes, firsts, sizes[extra])
    free = np.ones(index.rows, bool)  # not yet counted
    free[extra] = False
    counts: dict[str, list[int]] = {}  # sealed entries, loose ones, bytes
    gone: dict[str, list[np.ndarray]] = {}
    iterator = iter(planned)
    while part := list(islice(iterator, CHUNK)):
        names = np.array([name for name, _ in part])
        keys = np.frombuffer(b"".join(key for _, key in part), np.uint8).reshape(len(part), KEY_BYTES)
        numbers = index.numbers(keys)
        for name in dict.fromkeys(names.tolist()):
            mine = names == name
            found = np.unique(numbers[mine & (numbers >= 0)])
            found = found[free[found]]
            free[found] = False
            rest = keys[mine & (numbers < 0)]
            lengths = [n for key in rest if (n := loose.pop(key.tobytes(), None)) is not None] if loose else []
            added = (len(found), len(lengths), int(sizes[found].sum()) + sum(lengths))
            counts[name] = [old + new for old, new in zip(counts.get(name, (0, 0, 0)), added, strict=True)]
            gone.setdefault(name, []).append(prefixes_of(rest))
    result = {}
    for name, (sealed, unsealed, size) in counts.items():
        result[name] = (sealed + len(np.unique(np.concatenate(gone[name]))), sealed + unsealed, size)
    others = [length for key, length in loose.items() if key not in index]
    unused = int(free.sum()) + len(others)
    return {**result, REST: (unused, unused, int(sizes[free].sum()) + sum(others))}


def prune(cache: Cache, keep: Iterable[bytes], *, force: bool = False, dry_run: bool = False) -> Freed:
    """Take out every sealed entry whose key is not in ``keep``, and second copies of those that are.

    UserError while another process writes to the cache, since what it wrote and still wants would go: with ``force``
    only the open segments of such processes are spared. Nothing tells of processes that only read: do not prune what a
    running training reads. ``dry_run``: only count. UserError if nothing at all would stay: most likely, the data is
    not there.
    """
    _settle(cache, force or dry_run, "prune")
    index = cache.index
    kept = index.marked(keep)
    if index.rows and not kept.any():
        raise UserError(
            f"this configuration needs nothing of what the cache {cache.directory} holds, so that pruning would empty "
            "it. Are the sources and data.cache the right ones? If so, delete the directory"
        )
    kept[index.repeated()[0]] = False
    return _take_out(cache, kept, dry_run)


def forget(cache: Cache, keys: Iterable[bytes]) -> Freed:
    """Take out exactly these entries, so that they are encoded anew. UserError while another process writes."""
    _settle(cache, False, "encode anew")
    return _take_out(cache, ~cache.index.marked(keys), False)


def _settle(cache: Cache, although_written: bool, what: str) -> None:
    """Seal what can be sealed; refuse while others write."""
    cache.close()
    cache.adopt()
    cache.refresh()
    if (writers := cache.writers()) and not although_written:
        raise UserError(
            f"cannot {what}: another process writes to the cache {cache.directory} ({writers[0].name}"
            f"{f' and {len(writers) - 1} more' if len(writers) > 1 else ''}). Wait until it is done, then start again. "
            "The open files of a process that was killed on another machine count as written to for a day; delete "
            "them if you know that it is gone"
        )


def _take_out(cache: Cache, kept: np.ndarray, dry_run: bool) -> Freed:
    """Leave only the rows of the index that bool [rows] ``kept`` marks; whole shards go first, for the space."""
    index, freed = cache.index, Freed(kept=int(kept.sum()))
    work: list[tuple[int, Shard, np.ndarray]] = []
    for shard, base in zip(index.shards, index.bases, strict=True):
        mine = kept[base : base + shard.rows]
        if not mine.all():
            stays = int(shard.sizes()[mine].sum())
            freed.entries += int((~mine).sum())
            freed.bytes += int(shard.sizes().sum()) - stays
            work.append((stays if mine.any() else -1, shard, mine))
    for stays, shard, mine in sorted(work, key=lambda one: one[0]):
        freed.rewritten += stays >= 0
        freed.deleted += stays < 0
        if not dry_run:
            try:
                freed.damaged += _replace(shard, mine)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise CacheFull(full_message(cache.directory, f"{shard.path.name} cannot be written anew")) from error
    if work and not dry_run:
        cache.refresh()
    return freed


def _replace(shard: Shard, kept: np.ndarray) -> int:
    """Write what is kept of a shard to a new one, and remove it; how many were damaged."""
    damaged = 0
    if kept.any():
        new = shard.path.with_name(f"{secrets.token_hex(6)}-0000{SEALED}")
        damaged = shard.copy(kept, new)
        Shard(new)  # makes its index
    shard.path.unlink(missing_ok=True)
    shard.path.with_suffix(INDEX).unlink(missing_ok=True)
    return damaged
