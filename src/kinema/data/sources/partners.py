"""Control pictures and masks: files of the same name in folders beside that of the media."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from kinema.config.data import SourceConfig
from kinema.data.files import is_folder, join, status, suffix
from kinema.data.records import LeftOut, MediaError, Record
from kinema.errors import UserError

from .kinds import is_hidden, kind_of
from .walk import same_place, walk


@dataclass(frozen=True)
class _Partners:
    """The files of a folder by their path in it without extension."""

    folder: str
    by_stem: dict[str, list[str]]

    def find(self, stem: str, like: str) -> tuple[str, str]:
        """(location, problem): the file that goes with the media ``like``; of several, the one of its extension."""
        names = self.by_stem.get(stem, [])
        if len(names) > 1:
            names = [name for name in names if suffix(name) == suffix(like)] or names
        if len(names) > 1:
            return "", f"{' and '.join(names)} are both in {self.folder}: keep one of them"
        return (join(self.folder, names[0]), "") if names else ("", "")


def partner_places(config: SourceConfig) -> set[str]:
    """Locations that a source's own scan must not take for media: its control pictures, its masks."""
    given = (*config.controls, config.masks, config.default_mask)
    return {same_place(location) for location in given if location is not None}


def add_partners(
    found: Sequence[tuple[str, Record]], config: SourceConfig, stems: Collection[str]
) -> tuple[list[Record], list[LeftOut], Counter[str]]:
    """Records with the control pictures and masks that the source is given, what is left out for the lack of one, and
    counts of partners without media.

    ``found``: records by their path in the source without extension. Those that have controls or a mask already keep
    them. ``stems``: of all media of the source, those left out too. UserError for a folder that is missing.
    """
    controls = [_read(config, "controls", folder, pictures_only=True) for folder in config.controls]
    masks = None if config.masks is None else _read(config, "masks", config.masks, pictures_only=False)
    if config.default_mask is not None:
        _require_default(config.default_mask)
    kept: list[Record] = []
    left_out: list[LeftOut] = []
    for stem, record in found:
        paired, code, reason = _with_controls(stem, record, controls)
        if not code:
            paired, code, reason = _with_mask(stem, paired, masks, config.default_mask)
        if code:
            left_out.append(LeftOut(record.path, reason, code, record.source))
        else:
            kept.append(paired)
    counts: Counter[str] = Counter()
    alone = [sum(len(names) for stem, names in one.by_stem.items() if stem not in stems) for one in controls]
    counts["control picture without media"] += sum(alone)
    if masks is not None:
        counts["mask without media"] += sum(len(names) for stem, names in masks.by_stem.items() if stem not in stems)
    return kept, left_out, +counts


def _with_controls(stem: str, record: Record, controls: Sequence[_Partners]) -> tuple[Record, str, str]:
    """(record, code, reason why it is left out)."""
    if record.controls or not controls:
        return record, "", ""
    pairs = [one.find(stem, record.path) for one in controls]
    if problems := [problem for _, problem in pairs if problem]:
        return record, "two control pictures", f"has more than one control picture: {'; '.join(problems)}"
    if missing := [one.folder for one, (path, _) in zip(controls, pairs, strict=True) if not path]:
        reason = f"has no control picture: expected {stem} with a picture's extension in {', '.join(missing)}"
        return record, "no control picture", reason
    return replace(record, controls=tuple(path for path, _ in pairs)), "", ""


def _with_mask(stem: str, record: Record, masks: _Partners | None, default: str | None) -> tuple[Record, str, str]:
    if record.mask is not None or (masks is None and default is None):
        return record, "", ""
    path, problem = masks.find(stem, record.path) if masks is not None else ("", "")
    if problem:
        return record, "two masks", f"has more than one mask: {problem}"
    if not path and default is None:
        assert masks is not None
        reason = f"has no mask: expected {stem} with the extension of a picture or video in {masks.folder}"
        return record, "no mask", f"{reason}; draw one, or set default_mask for those without"
    return replace(record, mask=path or default), "", ""


def _read(config: SourceConfig, key: str, folder: str, pictures_only: bool) -> _Partners:
    what = {"controls": "control pictures", "masks": "masks"}[key]
    if not is_folder(folder):
        raise UserError(f"data.sources.{key}: there is no folder {folder}; give that of the {what}")
    if same_place(folder) == same_place(config.path):
        raise UserError(
            f"data.sources.{key}: {folder} is the folder of the media; put the {what} into one of their own"
        )
    by_stem: dict[str, list[str]] = {}
    for found in walk(folder):
        if found.trouble:
            raise UserError(f"data.sources.{key}: {join(folder, found.prefix)} {found.trouble}")
        for name in found.names:
            kind = kind_of(name)
            if not is_hidden(name) and (kind == "image" or (kind == "video" and not pictures_only)):
                by_stem.setdefault(os.path.splitext(found.prefix + name)[0], []).append(found.prefix + name)
    return _Partners(folder, by_stem)


def _require_default(mask: str) -> None:
    try:
        status(mask)
    except MediaError as error:
        raise UserError(f"data.sources.default_mask: {error}; give a picture or video") from error
    if kind_of(mask) is None:
        raise UserError(f"data.sources.default_mask: {mask} is no picture or video by its extension")
