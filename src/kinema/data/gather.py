"""From sources to usable items: scan, examine, hash, and account for every file that is left out."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from types import MappingProxyType

from kinema.config.schema import BucketConfig, Config, SourceConfig
from kinema.errors import UserError

from .buckets import BucketGroup, BucketSpec, Clip, make_buckets
from .encode import Encoder, Ranks, from_main, together
from .examine import Item, examine_one
from .facts import EXAMINED, FactStore, items_from_text, items_to_text
from .folder import scan, with_controls
from .media import MediaError, check_clip, content_hash, memo_key, probe
from .records import LeftOut, Record, count_reasons
from .segments import publish, write_all

LISTED = 30
"""So many files that are left out are printed; where there are more, a file in the cache directory has all."""

COUNTED = {
    "Used with an empty caption": {"empty caption": "with an empty file", "missing caption": "with none"},
    "Ignored": {"sidecar": "beside media (tables, subtitles and the like)", "hidden": "hidden"},
}
"""Counts of a scan that are printed, where they are not zero, and their words."""

Examined = tuple[list[Item], str, list[LeftOut]]
"""What a file gave: its items, the hashes of its content and of its control pictures', what is left out of it."""


def bucket_groups(buckets: BucketConfig, encoder: Encoder) -> tuple[BucketGroup, ...]:
    """The buckets that a configuration asks for, on the grid of a family."""
    sizes = None
    if buckets.sizes is not None:
        sizes = [(width, height, frames) for height, width in buckets.sizes for frames in buckets.frames]
    spec = BucketSpec(
        resolutions=buckets.resolutions, frames=buckets.frames, min_aspect=buckets.min_aspect,
        max_aspect=buckets.max_aspect, num_aspect_buckets=buckets.aspect_buckets, size_buckets=sizes,
        frames_mode=buckets.clip,
    )  # fmt: skip
    return make_buckets(spec, encoder.grid, encoder.frame_stride)


def gather_items(
    config: Config,
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    ranks: Ranks,
    *,
    facts: FactStore,
    say: Callable[[str], None],
) -> tuple[list[Item], dict[Path, str], list[LeftOut]]:
    """(items in the order of the sources, hash of each file's content, what is left out), alike on every rank.

    Each rank examines its share. What was found is remembered under the file's size and time, so that a second
    start opens no file.
    """
    groups = bucket_groups(config.data.buckets, encoder)
    records, left_out, counts = from_main(ranks, lambda: _scan(sources, config.data.missing_caption))
    fps = config.data.buckets.fps
    asked = hashlib.blake2b(repr(([astuple(group) for group in groups], fps)).encode(), digest_size=8)
    how = f"{EXAMINED}\0{asked.hexdigest()}"

    def examine() -> list[Examined]:
        mine = records[ranks.rank :: ranks.size]
        known = [recall(record, how, facts) for record in mine]
        with ThreadPoolExecutor(config.data.workers or 1, thread_name_prefix="examine") as pool:
            new = pool.map(
                lambda record: examine_and_hash(record, groups, fps, how, facts),
                [record for record, found in zip(mine, known, strict=True) if found is None],
            )
            return [found if found is not None else next(new) for found in known]

    shares = ranks.gather_objects(together(ranks, examine))
    items: list[Item] = []
    hashes: dict[Path, str] = {}
    for n in range(len(records)):
        found, content, misfits = shares[n % ranks.size][n // ranks.size]
        items += found
        left_out += misfits
        for item in found:
            hashes[item.record.path] = content
    if ranks.rank == 0:
        report(items, left_out, sources, say, facts.directory, counts)
    for item in items:
        for note in item.notes:
            say(f"  {item.record.path}: {note}")
    return items, hashes, left_out


def _scan(sources: Sequence[SourceConfig], missing_caption: str) -> tuple[list[Record], list[LeftOut], dict[str, int]]:
    """`scan` of all sources: their records, what is left out, and the counts added up."""
    records: list[Record] = []
    left_out: list[LeftOut] = []
    counts: Counter[str] = Counter()
    for source in sources:
        found, missed, counted = scan(source.path, source.name or "", missing_caption)  # type: ignore[arg-type]
        if source.controls:
            found, without = with_controls(found, Path(source.path), source.controls)
            missed = [*missed, *without]
            counted["left out"] += len(without)
        records += found
        left_out += missed
        counts.update(counted)
    return records, left_out, dict(counts)


def recall(record: Record, how: str, facts: FactStore) -> Examined | None:
    """What examining a file gave before, if the file is as it was then and nothing was left out of it."""
    try:
        text = facts[f"{how}\0{memo_key(record.path)}"]
        return items_from_text(record, text), contents_of(record, facts), []
    except (KeyError, ValueError, TypeError, OSError):  # unknown, written by another version, or gone
        return None


def contents_of(record: Record, facts: FactStore) -> str:
    """The hash of the file's content, and after it those of its control pictures, separated by spaces."""
    return " ".join(content_hash(path, facts) for path in (record.path, *record.controls))


def examine_and_hash(
    record: Record, groups: Sequence[BucketGroup], fps: float | None, how: str, facts: FactStore
) -> Examined:
    """Examine a file and hash its content; full success is remembered."""
    try:
        before = memo_key(record.path)
        results = examine_one(record, groups, fps, "clip")
        items = [result for result in results if isinstance(result, Item)]
        left_out = [result for result in results if isinstance(result, LeftOut)]
        for control in record.controls:
            check_clip(control, Clip(), probe(control))
        content = contents_of(record, facts) if items else ""
        if items and not left_out and memo_key(record.path) == before:
            facts[f"{how}\0{before}"] = items_to_text(items)
        return items, content, left_out
    except (MediaError, OSError) as error:
        code = error.code if isinstance(error, MediaError) else "missing"
        reason = str(error).removeprefix(f"{record.path} ").removeprefix(f"{record.path}: ")
        return [], "", [LeftOut(record.path, reason, code, record.source)]


def report(
    items: Sequence[Item],
    left_out: Sequence[LeftOut],
    sources: Sequence[SourceConfig],
    say: Callable[[str], None],
    directory: Path,
    counts: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Say how many files are used, in which buckets, and which are left out and why.

    ``counts``: those of `scan`, for what is neither used as it is nor left out. A long list
    goes to a file in ``directory``, named after its content.
    """
    names = ", ".join(str(source.name or source.path) for source in sources)
    files = len({item.record.path for item in items})
    say(f"Data of {names}: {files} files used as {len(items)} items, {len(left_out)} left out")
    buckets: dict[str, int] = {}
    for item in items:
        buckets[str(item.bucket)] = buckets.get(str(item.bucket), 0) + 1
    for bucket, count in sorted(buckets.items()):
        say(f"  {bucket}: {count}")
    for what, names_of in COUNTED.items():
        if found := [f"{counts[name]} {words}" for name, words in names_of.items() if counts.get(name)]:
            say(f"{what}: {', '.join(found)}")
    if left_out:
        say("Left out: " + ", ".join(f"{count} {code}" for code, count in count_reasons(left_out).items()))
        for entry in left_out[:LISTED]:
            say(f"  {entry}")
    if len(left_out) > LISTED:
        text = "".join(f"{entry}\n" for entry in left_out)
        path = directory / f"left-out-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.txt"
        if not path.exists():
            publish(path, lambda out: write_all(out, (text.encode(),)), secrets.token_hex(6))
        say(f"  ... and {len(left_out) - LISTED} more: {path} lists them all")


def check(items: Sequence[Item], left_out: Sequence[LeftOut], sources: Sequence[SourceConfig], strict: bool) -> None:
    """UserError where nothing can be used, or anything is left out of a strict data set."""
    names = ", ".join(str(source.path) for source in sources)
    listed = "".join(f"\n  {entry}" for entry in left_out)
    if not items and not left_out:
        raise UserError(f"there is no picture or video in {names}: put media with .txt captions of the same name there")
    if not items:
        raise UserError(f"nothing in {names} can be used:{listed}")
    if strict and left_out:
        raise UserError(
            f"data.strict is set, and {len(left_out)} of the files in {names} cannot be used. "
            f"Mend them or take them out:{listed}"
        )
