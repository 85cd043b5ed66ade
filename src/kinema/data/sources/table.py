"""The table source: csv, tsv, parquet or jsonl files that name pictures and videos and say what is known of them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from kinema.config.data import SourceConfig
from kinema.data.files import expand, file_name, is_folder, join, list_folder, parent, status, suffix
from kinema.data.records import NO_EXTRAS, LeftOut, Record
from kinema.errors import UserError

from .base import MediaColumns, Source
from .table_names import check_renames, text_is_missing
from .table_rows import EMPTY, EXTRA, GIVEN, MISSING, NO_CAPTION, PROBLEMS, value_of
from .table_store import TableStore, open_store

if TYPE_CHECKING:
    import numpy as np

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
"""Of the files of a folder that is one table; a single table may be a .json file too."""
SCORES = ("motion", "aesthetic", "fps")


def open_table(config: SourceConfig, name: str, store: Path | None = None) -> Source:
    """The table of ``config.path``: one file, or several as one table, in the order of their names.

    Each file is read once, into a copy that is kept in ``store`` (default: in the user's cache directory) and read by
    memory map from then on. Whether media exist is not looked at. Raises UserError for a table that cannot be read or
    whose columns are not clear.
    """
    check_renames(config.columns)
    for key in ("controls", "masks"):
        if getattr(config, key):
            column = key if key == "controls" else "mask"
            raise UserError(
                f"data.sources.{key}: a table names these files itself, in its column '{column}'; leave {key} out"
            )
    if config.default_mask is not None:
        status(config.default_mask)
    files = expand(config.path)
    if len(files) == 1 and is_folder(files[0]):
        entries = [entry for entry in list_folder(files[0]) if not entry.is_folder]
        files = [entry.location for entry in entries if suffix(entry.location) in TABLE_EXTENSIONS]
    if not files:
        kinds = ", ".join(TABLE_EXTENSIONS)
        raise UserError(f"data.sources.path: {config.path} stands for no table: expected files such as {kinds}")
    opened = open_store(files, config.columns, store or _default_stores())
    if _refused_captions(config)[MISSING]:
        for file, columns, captioned in zip(files, opened.columns, opened.captioned, strict=True):
            if not captioned:
                raise text_is_missing(columns, file)
    return Table(config, name, opened)


def _default_stores() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "kinema" / "tables"


class Table:
    """Records by row: those rows of the table that are records, in its order."""

    def __init__(self, config: SourceConfig, name: str, store: TableStore) -> None:
        import numpy as np

        self.config, self.name = config, name
        self._store = store
        problem, caption, video = (store.numbers(key) for key in ("problem", "caption", "video"))
        refused = [state for state, code in _refused_captions(config).items() if code]
        usable = (problem == 0) & ~np.isin(caption, refused)
        # positions take memory, and most tables have no row that is left out
        self._positions = None if usable.all() else np.flatnonzero(usable).astype(np.uint32)
        self.left_out: Sequence[LeftOut] = LeftRows(self, np.flatnonzero(~usable).astype(np.uint32))
        self._length = len(store) - len(self.left_out)
        self.counts = Counter({
            "image": int(np.count_nonzero(usable & ~video)),
            "video": int(np.count_nonzero(usable & video)),
            "empty caption": int(np.count_nonzero(usable & (caption == EMPTY))),
            "missing caption": int(np.count_nonzero(usable & (caption == MISSING))),
        })  # fmt: skip
        self.counts = +self.counts
        self._roots = [config.root or parent(file) for file in store.files]

    def __len__(self) -> int:
        return self._length

    @property
    def fingerprint(self) -> str:
        return f"table {self._store.directory.name}, {self._length} records"

    def record(self, row: int) -> Record:
        if not 0 <= row < self._length:
            raise IndexError(f"{self.name} has {self._length} records; there is no record {row}")
        position = row if self._positions is None else int(self._positions[row])
        columns, at, stretch = self._store.locate(position)
        values: dict[str, Any] = {}
        extras: dict[str, Any] = {}
        for name, (field, column) in columns.items():
            value = column[at].as_py()
            if value is None:
                continue
            if not name.startswith(EXTRA):
                values[name] = value
            elif value != "":
                extras[name.removeprefix(EXTRA)] = value_of(field, value)
        video = bool(self._store.numbers("video")[position])
        root = self._roots[stretch.file]
        crop = values.get("crop")
        scores = {key: values[key] for key in SCORES if math.isfinite(values.get(key, math.inf))}
        if not video or scores.get("fps", 0) <= 0:
            scores.pop("fps", None)
        return Record(
            path=join(root, values["path"]),
            captions=self._captions(values.get("text")),
            kind="video" if video else "image",
            source=self.name,
            controls=tuple(join(root, control) for control in _locations(values.get("controls"))),
            mask=join(root, values["mask"].strip()) if _is_given(values.get("mask")) else self.config.default_mask,
            cut=_cut(values.get("start"), values.get("end")) if video else None,
            crop=None if crop is None else (crop[0], crop[1], crop[2], crop[3]),
            scores=MappingProxyType(scores),
            extras=MappingProxyType(extras) if extras else NO_EXTRAS,
        )

    def columns(self) -> MediaColumns | None:
        """What the table says of its media: sizes need the columns height and width, videos num_frames and fps too."""
        import numpy as np

        def column(name: str) -> np.ndarray:
            whole = self._store.numbers(name)
            return whole if self._positions is None else whole[self._positions]

        if not self._store.numbers("known").any():
            return None
        names = ("known", "video", "width", "height", "frames", "fps", "duration", "offset")
        variable = np.broadcast_to(np.False_, self._length)  # a table does not say; one value in memory
        return MediaColumns(**{name: column(name) for name in names}, variable=variable)

    def _captions(self, text: str | list[str | None] | None) -> tuple[str, ...]:
        """At least one. Of several, those that are missing are none, and empty ones are what the configuration says."""
        texts = [text] if isinstance(text, str) else text or []
        given = [one for one in texts if one is not None and one.lower() not in NO_CAPTION]
        config = self.config.captions
        if config is not None and config.empty == "leave_out":
            given = [one for one in given if one]
        return tuple(given) or ("",)

    def left_row(self, position: int) -> LeftOut:
        """Why a row of the table is no record."""
        columns, at, stretch = self._store.locate(position)
        table = self._store.files[stretch.file]
        row = f"row {stretch.in_file + at + 1} of {file_name(table)}"
        problem = PROBLEMS[self._store.numbers("problem")[position]]
        complaint = columns["complaint"][1][at].as_py() if problem else ""
        if problem == "no path":
            return LeftOut(table, f"{row} {complaint}", problem, self.name)
        path = join(self._roots[stretch.file], columns["path"][1][at].as_py())
        if problem:
            return LeftOut(path, f"{row}: {complaint}", problem, self.name)
        state = int(self._store.numbers("caption")[position])
        code = _refused_captions(self.config)[state]
        mend = {
            MISSING: 'has no caption: write one, or set captions.missing = "empty" to train on it without',
            EMPTY: 'has an empty caption: write one, or set captions.empty = "keep" to train on it without',
        }
        return LeftOut(path, f"{row} {mend[state]}", code, self.name)

    def count_left_out(self, positions: np.ndarray) -> Counter[str]:
        """How many of these rows of the table are no records, for each cause."""
        import numpy as np

        problem = self._store.numbers("problem")[positions]
        state = self._store.numbers("caption")[positions]
        found = {code: int(np.count_nonzero(problem == number)) for number, code in enumerate(PROBLEMS) if number}
        found |= {
            code: int(np.count_nonzero((problem == 0) & (state == number)))
            for number, code in _refused_captions(self.config).items()
            if code
        }
        return +Counter(found)


def _refused_captions(config: SourceConfig) -> dict[int, str]:
    """For each state of a row's captions, the code with which it is left out, or ""."""
    captions = config.captions
    missing = captions is None or captions.missing == "leave_out"
    empty = captions is not None and captions.empty == "leave_out"
    return {GIVEN: "", MISSING: "no caption" if missing else "", EMPTY: "empty caption" if empty else ""}


def _locations(value: str | list[str | None] | None) -> list[str]:
    parts = value.split(";") if isinstance(value, str) else value or []
    return [part.strip() for part in parts if part is not None and _is_given(part)]


def _is_given(location: str | None) -> bool:
    return location is not None and location.strip().lower() not in ("", "nan", "null")


def _cut(start: float | None, end: float | None) -> tuple[float, float | None] | None:
    return None if start is None and end is None else (start or 0.0, end)


class LeftRows(Sequence[LeftOut]):
    """Rows of a table that are no records, each written out when it is asked for: there may be millions."""

    def __init__(self, table: Table, positions: np.ndarray) -> None:
        self._table, self._positions = table, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> LeftOut: ...
    @overload
    def __getitem__(self, index: slice) -> LeftRows: ...
    def __getitem__(self, index: int | slice) -> LeftOut | LeftRows:
        if isinstance(index, slice):
            return LeftRows(self._table, self._positions[index])
        return self._table.left_row(int(self._positions[index]))

    def __iter__(self) -> Iterator[LeftOut]:
        return (self._table.left_row(int(position)) for position in self._positions)

    def by_code(self) -> Counter[str]:
        """How many there are for each cause, without writing them out."""
        return self._table.count_left_out(self._positions)
