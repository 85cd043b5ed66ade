"""Look into the files of a record before any expensive work: what they hold, or why the record is left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kinema.errors import UserError

from .buckets import Clip
from .facts import EXAMINED, PROBED, FactStore, info_to_text, looked_from_text, looked_to_text
from .files import absolute
from .lengths import ClipLengths
from .masks import check_mask, is_black
from .media import check_clip, memo_key, probe
from .records import LeftOut, MediaError, MediaInfo, Record, left_out_for
from .transform import Transform, crop_within

if TYPE_CHECKING:
    from kinema.config.data import BucketConfig

How = Literal["clips", "headers"]
Settings = tuple["BucketConfig", int, ClipLengths, How, int, int, bool]
"""The arguments of `look` after the record: buckets, grid, lengths, how, row, seed, online."""
DAMAGED = "damaged"
"""How a note begins which says that a file is used up to where it is damaged."""


@dataclass(frozen=True)
class Looked:
    """What looking into the files of a record gave."""

    info: MediaInfo | None
    """What its media holds; None where the record is left out."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the files are used, damage and colours among it."""
    left_out: tuple[LeftOut, ...] = ()
    version: str = ""
    """Which versions of the record's files were looked into; "" where that is not known."""


@dataclass(frozen=True)
class _Use:
    """A clip of the media, and the bucket that it fills; drawn anew for every use, the whole range that it may be."""

    clip: Clip
    height: int
    width: int


def look(
    record: Record, buckets: BucketConfig, grid: int, lengths: ClipLengths, how: How, row: int, seed: int, online: bool
) -> Looked:
    """Look into the media, the control pictures and the mask of the record in ``row`` of its source.

    ``how``: "headers" reads headers and counts packets; "clips" also decodes what will be used and throws it away, so
    that damage is known before the expensive work starts (where it is found, the frames before it are used if they
    suffice). Whether a bucket takes the media is not asked here. Never raises for a file; UserError for a kind of
    address that is not installed.
    """
    version = _version(record, trust=False) or ""
    try:
        if how == "headers":
            info = probe(record.path)
            notes = (*_inside(record, info), *_controls(record, False), *_mask(record, info, ()))
            return Looked(info, (*info.notes, *notes), version=version)
        settings = (buckets, grid, lengths, row, seed, online)
        info, uses, notes = _used(record, settings, decode=False)
        try:
            _check(record, uses, info)
        except MediaError:
            if info.stream < 0:
                raise
            info, uses, notes = _used(record, settings, decode=True)  # counts the frames before the damage
            _check(record, uses, info)
        notes = (*notes, *_controls(record, True), *_mask(record, info, uses))
        return Looked(info, (*info.notes, *notes), version=version)
    except MediaError as error:
        left_out = left_out_for(record, error)
    except UserError:
        raise
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        left_out = LeftOut(record.path, reason, "unreadable", record.source)
    except Exception as error:  # a decoder's own failure on a hostile file must not end the run
        reason = f"could not be examined ({type(error).__name__}: {error}): take it out, and report this"
        left_out = LeftOut(record.path, reason, "unreadable", record.source)
    return Looked(None, (), (left_out,), version)


def _used(
    record: Record, settings: tuple[BucketConfig, int, ClipLengths, int, int, bool], decode: bool
) -> tuple[MediaInfo, list[_Use], tuple[str, ...]]:
    """What the media holds, which clips of it will be used, and notes."""
    import numpy as np

    from .placement import place
    from .sources.base import columns_of

    buckets, grid, lengths, row, seed, online = settings
    info = probe(record.path, decode)
    notes = _inside(record, info)
    columns = columns_of([info], [record])
    placed = place(columns, np.array([row], np.uint32), buckets, grid, lengths, seed=seed, online=online)
    uses = [
        _Use(Clip(int(start), int(frames) + int(spare), float(fps)), int(height), int(width))
        for start, frames, spare, fps, height, width in zip(
            placed.start, placed.frames, placed.spare, placed.fps, placed.height, placed.width, strict=True
        )
    ]
    return info, list(dict.fromkeys(uses)), notes


def _check(record: Record, uses: Iterable[_Use], info: MediaInfo) -> None:
    """Decode what the clips need, every stretch once; MediaError where it is damaged."""
    for stretch in _stretches(use.clip for use in uses):
        check_clip(record.path, stretch, info)


def _stretches(clips: Iterable[Clip]) -> Iterator[Clip]:
    """The clips, those that overlap or follow one another made into one."""
    current: Clip | None = None
    for clip in sorted(set(clips), key=lambda clip: (clip.fps, clip.start)):
        if current is not None and clip.fps == current.fps and clip.start <= current.start + current.frames:
            end = max(current.start + current.frames, clip.start + clip.frames)
            current = replace(current, frames=end - current.start)
            continue
        if current is not None:
            yield current
        current = clip
    if current is not None:
        yield current


def _inside(record: Record, info: MediaInfo) -> tuple[str, ...]:
    """Check that the record's cut and crop lie inside its file; notes where they are taken a little smaller."""
    notes: list[str] = []
    if record.crop is not None:
        left, top, right, bottom = crop = crop_within(record.path, record.crop, (info.width, info.height))
        if crop != record.crop:
            notes.append(f"its crop reaches a pixel beyond the frame: [{left}, {top}, {right}, {bottom}] is used")
    if record.cut is not None and info.kind == "video":
        begin, end = record.cut
        shown = f"its cut from {begin:g} s" + ("" if end is None else f" to {end:g} s")
        length = f"its {info.duration:.3f} s"
        damage = next((f"; {note}" for note in info.notes if note.startswith(DAMAGED)), "")
        if not 0 <= begin < info.duration:
            raise MediaError(f"{shown} does not begin within {length}{damage}: mend the cut", "cut outside")
        if end is not None and not end > begin:
            raise MediaError(f"{shown} is empty: it must end after it begins", "cut outside")
        if end is not None and end > info.duration:
            if end > info.duration + 0.5 / info.fps and not damage:
                raise MediaError(f"{shown} reaches beyond {length}: mend the cut, or leave its end out", "cut outside")
            notes.append(f"{shown} reaches beyond {length}: it ends there")
    return tuple(notes)


def _controls(record: Record, decode: bool) -> tuple[str, ...]:
    """Check the control pictures; notes."""
    notes: list[str] = []
    for control in record.controls:
        try:
            info = probe(control)
            if decode:
                check_clip(control, Clip(), info)
        except MediaError as error:
            raise MediaError(f"its control picture {error}", f"control: {error.code}") from error
        if info.kind == "video":
            notes.append(f"its control {control} is a video: the first frame is used")
    return tuple(notes)


def _mask(record: Record, info: MediaInfo, uses: Sequence[_Use]) -> tuple[str, ...]:
    """Check the mask, and decode what the clips need of it; notes."""
    if record.mask is None:
        return ()
    try:
        check_mask(record.mask, info)
        black = sum(
            is_black(record.mask, use.clip, Transform(use.height, use.width, crop=record.crop), info) for use in uses
        )
    except MediaError as error:
        code = error.code if "mask" in error.code else f"mask: {error.code}"
        raise MediaError(f"its mask {error}", code) from error
    if uses and black == len(uses):
        raise MediaError(
            f"its mask {record.mask} is black wherever the {info.kind} is used: nothing would be learnt. "
            "White is what is learnt; what is transparent counts as black",
            "empty mask",
        )
    return (f"its mask is black in {black} of its {len(uses)} clips: they teach nothing",) if black else ()


def recall(record: Record, facts: Mapping[str, str], settings: Settings, *, trust: bool = False) -> Looked | None:
    """What `look` with these settings gave before, if it found nothing to leave out and the files are as they were.

    ``trust``: files of the same location are taken to be as they were, and none is touched.
    """
    version = _version(record, trust)
    try:
        return None if version is None else looked_from_text(facts[_fact(record, version, settings)])
    except (KeyError, ValueError, TypeError):  # unknown, or written by another version
        return None


def remember(record: Record, looked: Looked, facts: FactStore, settings: Settings, *, trust: bool = False) -> None:
    """Keep what `look` gave for `recall`. What is left out is looked into again the next time."""
    if looked.info is None or looked.left_out or not looked.version:
        return
    if _version(record, trust=False) != looked.version:  # a file changed while it was looked into
        return
    version = _version(record, trust=True) if trust else looked.version
    assert version is not None
    facts[_fact(record, version, settings)] = looked_to_text(looked)
    *_, online = settings
    if trust and online:  # decoding will not ask: see `Dataset._decode`
        return
    path = "\0".join(looked.version.split("\0")[:3])  # `memo_key` of the first file: looked up once, it may go
    probed, text = f"{PROBED}\0{path}", info_to_text(looked.info)
    if facts.get(probed) != text:  # decoding asks for it again (`kinema.data.reading`), and need not look
        facts[probed] = text


def _version(record: Record, trust: bool) -> str | None:
    """Which versions of its files a record has now; None where one is missing."""
    try:
        return "\0".join(map(absolute if trust else memo_key, record.files))
    except MediaError:
        return None


def _fact(record: Record, version: str, settings: Settings) -> str:
    """The name under which what `look` found is kept: all that it depends on, hashed, for there may be millions."""
    buckets, grid, lengths, how, row, seed, online = settings
    asked: tuple[object, ...] = (how, record.cut, record.crop, len(record.controls), record.mask is None)
    if how == "clips":
        drawn = (row, seed) if buckets.clip == "random" or buckets.table is not None else ()
        asked += (buckets.model_dump_json(), grid, lengths.stride, online, drawn)
        asked += (lengths.first,) if lengths.first > 1 else ()
    return f"{EXAMINED} {hashlib.blake2b(repr((asked, version)).encode(), digest_size=16).hexdigest()}"
