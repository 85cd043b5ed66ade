"""Look into every file before any expensive work: what it holds, its bucket and clip, or why it is left
out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .buckets import Bucket, BucketGroup, Clip, Misfit, assign
from .media import check_clip, probe
from .records import LeftOut, MediaError, MediaInfo, Record

Check = Literal["header", "clip", "all"]


@dataclass(frozen=True)
class Item:
    """A record with its place: what its file holds, its bucket, and the clip that fills it."""

    record: Record
    info: MediaInfo
    bucket: Bucket
    clip: Clip
    group: str = ""
    """Name of the bucket group: the resolution."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the file is used: damage, a video used as a picture."""


def examine_one(
    record: Record, groups: Sequence[BucketGroup], target_fps: float | None, check: Check
) -> list[Item | LeftOut]:
    """One Item or LeftOut per group; a single LeftOut where the file cannot be used at all. Never raises for a file.

    ``check``: "clip" decodes what will be used and throws it away, so that damage is known before the expensive work
    starts (where it is found, the frames before the damage are used if they suffice); "all" decodes whole files;
    "header" trusts headers and packets, for sources of millions of files.
    """
    try:
        info = probe(record.path, decode=check == "all")
        try:
            return _place(record, info, groups, target_fps, check == "clip")
        except MediaError:
            if info.stream < 0:
                raise
            info = probe(record.path, decode=True)  # counts the frames before the damage
            return _place(record, info, groups, target_fps, check == "clip")
    except MediaError as error:
        reason = str(error).removeprefix(f"{record.path} ").removeprefix(f"{record.path}: ")
        return [LeftOut(record.path, reason, error.code, record.source)]
    except Exception as error:  # a decoder's own failure on a hostile file must not end the run
        reason = f"could not be examined ({type(error).__name__}: {error}): take it out, and report this"
        return [LeftOut(record.path, reason, "unreadable", record.source)]


def _place(
    record: Record, info: MediaInfo, groups: Sequence[BucketGroup], target_fps: float | None, decode: bool
) -> list[Item | LeftOut]:
    if record.kind != info.kind:
        record = replace(record, kind=info.kind)
    results: list[Item | LeftOut] = []
    checked: set[Clip] = set()
    for group in groups:
        place = assign(info, group, target_fps)
        if isinstance(place, Misfit):
            prefix = f"[{group.name}] " if len(groups) > 1 else ""
            results.append(LeftOut(record.path, prefix + place.reason, place.code, record.source))
            continue
        bucket, clip = place
        if decode and clip not in checked:
            check_clip(record.path, clip, info)
            checked.add(clip)
        notes = info.notes
        longer = min((b.frames for b in group.buckets if b.frames > 1), default=0)
        if info.kind == "video" and bucket.frames == 1 and longer:
            notes += (f"a video too short for {longer} frames: one frame of it is used, as a picture",)
        results.append(Item(record, info, bucket, clip, group.name, notes))
    return results
