"""The samples of one tar: its members put together by name, and the records that they make."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from kinema.config.data import CaptionConfig
from kinema.data.files import file_name
from kinema.data.records import Kind, LeftOut, MediaError, Record
from kinema.data.tar_index import Member, read_contents

from .caption_files import decode_text, settle
from .kinds import BAD_NAME, is_hidden, kind_of, shown_if_bad
from .tar_meta import Meta, read_meta

ROLE = re.compile(r"(?:mask|control(?P<number>\d{0,4}))\.\w+")


@dataclass
class Shard:
    """What a tar gave. Its counts "image", "video", "caption", "mask", "control", "sidecar", "hidden" and "left out"
    add up to "files": its members."""

    tar: str
    records: list[Record] = field(default_factory=list)
    metas: list[Meta] = field(default_factory=list)
    """What is said of the media of each record."""
    left_out: list[LeftOut] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unread: bool = False
    """Whether it could not be read at all, which may be otherwise the next time."""

    def leave_out(self, member: Member, code: str, reason: str) -> None:
        self.left_out.append(LeftOut(f"{self.tar}::{member.name}", reason, code))
        self.counts["left out"] += 1


@dataclass
class _Sample:
    """The members of a sample by what they are."""

    media: list[Member] = field(default_factory=list)
    texts: list[Member] = field(default_factory=list)
    metas: list[Member] = field(default_factory=list)
    masks: list[Member] = field(default_factory=list)
    controls: dict[int, Member] = field(default_factory=dict)
    others: list[Member] = field(default_factory=list)

    def all(self) -> Iterator[Member]:
        yield from (*self.media, *self.texts, *self.metas, *self.masks, *self.controls.values(), *self.others)


def read_tar(tar: str, config: CaptionConfig) -> Shard:
    """The records of a tar, by the name of their sample, and what is left out of it. Reads headers, captions and .json
    members. Never raises for a damaged tar: what can be read is used, the rest listed. UserError for a compressed one.
    """
    shard = Shard(tar)
    try:
        contents = read_contents(tar, _is_text)
        shard.counts["files"] += len(contents.members) + len(contents.others)
        for name in contents.others:
            reason = "is a link or another special member: put the file itself into the tar"
            shard.leave_out(Member(shown_if_bad(name) or name, 0, 0), "special member", reason)
        if contents.damage:
            reason = f"{contents.damage}. What comes before is used; make the tar again"
            shard.left_out.append(LeftOut(tar, reason, "damaged tar"))
        for stem, sample in sorted(_group(shard, contents.members).items()):
            _read_sample(shard, stem, sample, contents.texts, config)
    except MediaError as error:
        reason = str(error).removeprefix(f"{tar} ")
        shard.left_out.append(LeftOut(tar, reason, error.code))
        shard.unread = True
    return shard


def _group(shard: Shard, members: list[Member]) -> dict[str, _Sample]:
    """The samples of a tar by their stem. Each member is counted or left out, but those that make the record."""
    last = {member.name: member.offset for member in members}
    samples: dict[str, _Sample] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        if is_hidden(name) or _is_hidden_folder(folder):
            shard.counts["hidden"] += 1
        elif (shown := shown_if_bad(member.name)) is not None:
            shard.leave_out(member._replace(name=shown), "bad name", BAD_NAME)
        elif last[member.name] != member.offset:
            reason = "is in the tar again, further on: that one is used, as tar does"
            shard.leave_out(member, "replaced member", reason)
        else:
            stem, _, kind = name.partition(".")
            stem = _plain_folder(folder) + stem
            sample = samples.get(stem)
            if sample is None:
                sample = samples[stem] = _Sample()
            _sort_member(shard, sample, member, kind.lower())
    return samples


def sample_stem(path: str) -> str:
    """The path of a member up to the first dot of its name."""
    folder, _, name = path.rpartition("/")
    return _plain_folder(folder) + name.partition(".")[0]


@lru_cache(maxsize=2**12)
def _plain_folder(folder: str) -> str:
    """The path of a folder without "./" and the like, with a slash at its end; "" for that of the tar itself."""
    plain = posixpath.normpath(folder)
    return "" if plain == "." else f"{plain.rstrip('/')}/"


@lru_cache(maxsize=2**12)
def _is_hidden_folder(folder: str) -> bool:
    return any(map(is_hidden, _plain_folder(folder).split("/")))


@lru_cache(maxsize=2**12)
def _role(kind: str) -> tuple[str, int, Kind | None]:
    """("mask", "control" or "", number of the control picture, kind of media) that the end of a name promises."""
    match, promised = ROLE.fullmatch(kind), kind_of(f"x.{kind}")
    if match is None:
        return "", 0, promised
    number = match["number"]
    return ("mask", 0, promised) if number is None else ("control", int(number or 0), promised)


def _sort_member(shard: Shard, sample: _Sample, member: Member, kind: str) -> None:
    """Put a member with what follows the first dot of its name, ``kind``, where it belongs in its sample."""
    role, number, promised = _role(kind)
    if role == "mask" and promised is not None:
        sample.masks.append(member)
    elif role == "control" and promised == "image":
        if sample.controls.setdefault(number, member) is not member:
            reason = f"is a second control picture beside {file_name(sample.controls[number].name)}: keep one"
            shard.leave_out(member, "second control", reason)
    elif promised is not None:
        sample.media.append(member)
    elif kind == "txt":
        sample.texts.append(member)
    elif kind == "json":
        sample.metas.append(member)
    else:
        sample.others.append(member)


def _read_sample(shard: Shard, stem: str, sample: _Sample, texts: Mapping[str, bytes], config: CaptionConfig) -> None:
    """Make the record of a sample, or list why it makes none."""
    if not sample.media:
        names = [posixpath.basename(member.name) for member in sample.all()]
        if not names:  # a second control picture alone
            return
        reason = f"there is no picture or video among the members of this sample ({', '.join(names)})"
        first = next(iter(sample.all()))
        shard.leave_out(first, "no media", reason)
        shard.counts["left out"] += len(names) - 1
        return
    media, *rest = sample.media if len(sample.media) == 1 else sorted(sample.media, key=_rank)
    for member in rest:
        reason = f"is a second picture or video of the sample of {posixpath.basename(media.name)}, which is used"
        shard.leave_out(member, "second media", reason)
    mask = _only(shard, sample.masks, "mask")
    written = _only(shard, sample.texts, "caption")
    told = _only(shard, sample.metas, "caption")
    shard.counts["sidecar"] += len(sample.others)
    shard.counts["control"] += len(sample.controls)
    gap = next(n for n in range(len(sample.controls) + 1) if n not in sample.controls)
    if gap < len(sample.controls):
        reason = f"has control pictures {sorted(sample.controls)} and none with the number {gap}"
        shard.leave_out(media, "no control picture", reason)
        return
    meta, problem = Meta(), ("", "")
    text: tuple[str, ...] | None = None
    if told is not None:
        meta, problem = read_meta(texts[told.name], posixpath.basename(told.name))
    if written is not None:
        caption, trouble = decode_text(texts[written.name], posixpath.basename(written.name))
        text, problem = (caption,), ("unreadable caption", trouble) if trouble else problem
    if problem[0]:
        shard.leave_out(media, *problem)
        return
    if text is not None and meta.captions is not None and set(text) != set(meta.captions):
        shard.counts["other caption in .json"] += 1
    given = text if text is not None else meta.captions
    settled = settle(given, config, f"{posixpath.basename(stem)}.txt in the tar")
    if settled.code:
        shard.leave_out(media, settled.code, settled.reason)
        return
    shard.counts.update([settled.count] if settled.count else [])
    kind = _role(posixpath.basename(media.name).partition(".")[2].lower())[2] or "image"
    record = Record(
        f"{shard.tar}::{media.name}", settled.captions, kind, "",
        tuple(f"{shard.tar}::{sample.controls[n].name}" for n in range(len(sample.controls))),
        None if mask is None else f"{shard.tar}::{mask.name}",
        meta.cut if kind == "video" else None, meta.crop, meta.scores, meta.extras,
    )  # fmt: skip
    shard.counts[kind] += 1
    shard.records.append(record)
    shard.metas.append(meta)


def _rank(member: Member) -> tuple[bool, bool, str]:
    """The media of a sample is a video sooner than a picture (its thumbnail), and has one extension sooner than two."""
    kind = posixpath.basename(member.name).partition(".")[2]
    return (kind_of(member.name) != "video", "." in kind, member.name)


def _only(shard: Shard, members: list[Member], what: str) -> Member | None:
    """The first of members that a sample may have one of, counted; the others are left out."""
    for member in members[1:]:
        reason = f"is a second {what} beside {posixpath.basename(members[0].name)}: keep one"
        shard.leave_out(member, f"second {what}", reason)
    shard.counts[what] += bool(members)
    return members[0] if members else None


def _is_text(name: str) -> bool:
    return name.lower().endswith((".txt", ".json"))
