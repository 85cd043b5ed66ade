"""Rows of a table as they are kept: columns of known types, what they say of their media, and what is wrong with them.

Everything here works on a whole batch of rows; Python looks at single rows only where something is wrong with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kinema.data.files import suffix
from kinema.errors import UserError

from .kinds import kind_of
from .table_names import EXTRAS, is_read

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PROBLEMS = ("", "no path", "unknown extension", "bad number", "bad cut", "bad crop")
"""Codes of what makes a row no record, by their number in the column "problem"; the first in this order counts."""
GIVEN, EMPTY, MISSING = 0, 1, 2
"""States of a row's captions, in the column "caption"."""
JSON = b"kinema.json"
"""Mark of a column of values of several types, each kept as JSON text."""
EXTRA = "+"
"""Before the names of kept columns that go into a record's extras."""
NO_NUMBER = ("", "nan", "null", "none", "na", "n/a")
NO_CAPTION = ("nan", "null")
SIZES = ("num_frames", "height", "width")
NUMBERS = {
    "problem": "uint8", "caption": "uint8", "known": "bool", "video": "bool", "width": "int32", "height": "int32",
    "frames": "int32", "fps": "float64", "duration": "float64", "offset": "float64",
}  # fmt: skip
"""The numbers that are kept of every row, and their types."""


@dataclass(frozen=True)
class Rows:
    """N rows: what a record is made of, and an array [N] for each of `NUMBERS`."""

    batch: pa.RecordBatch
    numbers: dict[str, np.ndarray]


def normalise(raw: pa.RecordBatch, found: Mapping[str, str], file: str) -> Rows:
    """The rows of a batch as they are kept. ``found``: the table's column for each of kinema's."""
    import numpy as np
    import pyarrow as pa

    complaints: dict[int, tuple[int, str]] = {}
    fields = dict(zip(raw.schema.names, raw.schema, strict=True))
    columns = {name: (fields[column], raw.column(column)) for name, column in found.items()}
    kept: dict[str, pa.Array] = {}
    path = _strings(*columns["path"], file) if "path" in columns else pa.nulls(len(raw), pa.string())
    kept["path"] = path
    video = _kinds(path, complaints)
    if "text" in columns:
        kept["text"], caption = _captions(*columns["text"], file)
    else:
        caption = np.full(len(raw), MISSING, np.uint8)
    values = {}
    for name in (*SIZES, "fps", "start", "end", "motion", "aesthetic"):
        values[name] = np.full(len(raw), np.nan)
        if name in columns:
            values[name] = _numbers(found[name], *columns[name], complaints)
            if name not in SIZES:
                kept[name] = pa.array(values[name], from_pandas=True)
    _check_cuts(values["start"], values["end"], video, complaints)
    crop = None
    if "crop" in columns:
        crop, kept["crop"] = _crops(*columns["crop"], complaints)
    if "mask" in columns:
        kept["mask"] = _strings(*columns["mask"], file)
    if "controls" in columns:
        kept["controls"] = _text_or_lists(*columns["controls"], file, ";")
    named = set(found.values()) - {found[name] for name in EXTRAS if name in found}
    extras = [field for name, field in fields.items() if is_read(name) and name not in named]
    numbers = _media(values, video, crop)
    numbers |= {"problem": np.zeros(len(raw), np.uint8), "caption": caption}
    for row, (problem, _) in complaints.items():
        numbers["problem"][row] = problem
    if complaints:
        kept["complaint"] = pa.array([complaints.get(row, (0, None))[1] for row in range(len(raw))], pa.string())
    schema = [pa.field(name, column.type) for name, column in kept.items()]
    by_name = {column: name for name, column in found.items()}
    schema += [field.with_name(EXTRA + by_name.get(field.name, field.name)) for field in extras]
    arrays = [*kept.values(), *(raw.column(field.name) for field in extras)]
    return Rows(pa.RecordBatch.from_arrays(arrays, schema=pa.schema(schema)), numbers)


def value_of(field: pa.Field, value: Any) -> Any:
    """A value of a kept column as the table had it."""
    return json.loads(value) if value is not None and _is_json(field) else value


def _is_json(field: pa.Field) -> bool:
    return JSON in (field.metadata or {})


def _strings(field: pa.Field, column: pa.Array, file: str) -> pa.Array:
    """A column of text, [N] of Arrow's plain strings; numbers become text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_string(kind) and not _is_json(field):
        return column
    if _is_json(field):
        values = [value_of(field, text) for text in column.to_pylist()]
        plain = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        return pa.array(plain, pa.string())
    if pa.types.is_nested(kind):
        raise UserError(
            f"{file}: the column '{field.name}' holds values of the type {kind}, where text is expected: one location "
            f"or caption a row"
        )
    try:
        return pc.cast(column, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{file}: the column '{field.name}' cannot be read as text ({kind}): {error}") from None


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _kinds(path: pa.Array, complaints: dict[int, tuple[int, str]]) -> np.ndarray:
    """bool [N]: whether the names promise videos. The known extensions have at most five characters, so that few
    different endings have to be looked at."""
    import numpy as np
    import pyarrow.compute as pc

    endings = pc.utf8_slice_codeunits(path, -5).dictionary_encode()
    kinds = [kind_of("x" + ending) for ending in endings.dictionary.to_pylist()]
    code = np.array([*({None: 0, "image": 1, "video": 2}[kind] for kind in kinds), 0], np.uint8)
    code = code[endings.indices.fill_null(len(kinds)).to_numpy(zero_copy_only=False)]
    for row in np.flatnonzero(code == 0):
        name = path[row].as_py()
        if name is None or not name.strip():
            complaints[int(row)] = (PROBLEMS.index("no path"), "has no path: name its picture or video")
            continue
        ending = suffix(name)  # without the query of an address
        kind = kind_of("x" + ending)
        code[row] = {None: 0, "image": 1, "video": 2}[kind]
        if kind is None:
            reason = f"{ending or 'no extension'} is no known picture or video extension"
            complaints[int(row)] = (PROBLEMS.index("unknown extension"), reason)
    return code == 2


def _captions(field: pa.Field, column: pa.Array, file: str) -> tuple[pa.Array, np.ndarray]:
    """Captions without white space around them, and the state of each row's, uint8 [N]."""
    import numpy as np
    import pyarrow.compute as pc

    column = _text_or_lists(field, column, file)
    if not _is_list(column.type):
        text = pc.utf8_trim_whitespace(column)
        return text, _caption_states(text)
    flat = pc.utf8_trim_whitespace(pc.list_flatten(column))
    states, rows = _caption_states(flat), pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    state = np.full(len(column), MISSING, np.uint8)
    state[rows[states == EMPTY]] = EMPTY
    state[rows[states == GIVEN]] = GIVEN
    return _as_lists(column, flat), state


def _text_or_lists(field: pa.Field, column: pa.Array, file: str, separator: str | None = None) -> pa.Array:
    """A column of text, or of lists of text, [N] of Arrow's plain strings or of lists of them. ``separator``: what
    parts text that stands for a list, where some rows have the one and some the other."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_json(field):
        lists = [value_of(field, text) for text in column.to_pylist()]
        if separator:
            lists = [value.split(separator) if isinstance(value, str) else value for value in lists]
        lists = [value if isinstance(value, list) or value is None else [value] for value in lists]
        if any(not isinstance(text, str | int | float | None) for value in lists for text in value or ()):
            raise UserError(f"{file}: the column '{field.name}' holds more than text: expected text or lists of it")
        plain = [value and [None if text is None else str(text) for text in value] for value in lists]
        return pa.array(plain, pa.list_(pa.string()))
    if not _is_list(column.type):
        return _strings(field, column, file)
    return _as_lists(column, _strings(pa.field(field.name, column.type.value_type), pc.list_flatten(column), file))


def _as_lists(column: pa.Array, flat: pa.Array) -> pa.ListArray:
    """Lists as long as those of ``column``, of the values ``flat``; no list becomes one of nothing."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), flat)


def _caption_states(text: pa.Array) -> np.ndarray:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    length = pc.binary_length(text).fill_null(-1).to_numpy(zero_copy_only=False)
    state = np.where(length < 0, MISSING, np.where(length == 0, EMPTY, GIVEN)).astype(np.uint8)
    short = np.flatnonzero((length > 0) & (length <= 4))
    words = pc.utf8_lower(text.take(pa.array(short)))
    state[short[pc.is_in(words, pa.array(NO_CAPTION)).to_numpy(zero_copy_only=False)]] = MISSING
    return state


def _numbers(name: str, field: pa.Field, column: pa.Array, complaints: dict[int, tuple[int, str]]) -> np.ndarray:
    """float64 [N]; NaN: not given. What is no number is complained of."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_nested(column.type):
        rows = column.is_valid().to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(rows):
            complaints.setdefault(int(row), (PROBLEMS.index("bad number"), f"{name} is a list, expected a number"))
        return np.full(len(column), np.nan)
    if _is_json(field) or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        column = pc.utf8_trim_whitespace(_strings(field, column, name))
    for _ in range(2):
        try:
            return pc.cast(column, pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:  # some cells are blank, or no numbers
            column = _without_blanks(column)
    values = np.full(len(column), np.nan)
    for number, text in enumerate(column.to_pylist()):
        try:
            values[number] = np.nan if text is None else float(text)
        except ValueError:
            reason = f"{name} is '{text}', expected a number"
            complaints.setdefault(number, (PROBLEMS.index("bad number"), reason))
    return values


def _without_blanks(text: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    blank = pc.is_in(pc.utf8_lower(text), pa.array(NO_NUMBER))
    return pc.if_else(blank, pa.scalar(None, pa.string()), text)


def _check_cuts(start: np.ndarray, end: np.ndarray, video: np.ndarray, complaints: dict[int, tuple[int, str]]) -> None:
    import numpy as np

    given = ~(np.isnan(start) & np.isnan(end))
    begin, stop = np.where(np.isnan(start), 0, start), np.where(np.isnan(end), np.inf, end)
    for row in np.flatnonzero(video & given & ~((begin >= 0) & (stop > begin) & np.isfinite(begin))):
        reason = f"it is cut from {begin[row]:g} s to {stop[row]:g} s: expected 0 <= start < end"
        complaints.setdefault(int(row), (PROBLEMS.index("bad cut"), reason))


def _crops(
    field: pa.Field, column: pa.Array, complaints: dict[int, tuple[int, str]]
) -> tuple[np.ndarray, pa.FixedSizeListArray]:
    """float64 [N, 4], NaN where the whole frame is used; and the same for keeping, null where it is."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    crop = np.full((len(column), 4), np.nan)
    if not _is_list(column.type):
        text = pc.utf8_trim(_strings(field, column, "crop"), characters=" []()\t")
        column = pc.split_pattern(_without_blanks(text), ",")
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    whole = np.flatnonzero(lengths == 4)
    flat_field = pa.field("crop", column.type.value_type)
    flat = _numbers("crop", flat_field, pc.list_flatten(column.take(pa.array(whole))), {})
    crop[whole] = np.rint(flat.reshape(-1, 4))
    left, top, right, bottom = crop.T
    with np.errstate(invalid="ignore"):
        good = (left >= 0) & (top >= 0) & (right > left) & (bottom > top) & (right < 2**31) & (bottom < 2**31)
    given = column.is_valid().to_numpy(zero_copy_only=False) & (lengths > 0)
    for row in np.flatnonzero(given & ~good):
        shown = column[int(row)].as_py()
        reason = f"crop is {shown}, expected left, top, right, bottom in pixels with left < right and top < bottom"
        complaints.setdefault(int(row), (PROBLEMS.index("bad crop"), reason))
    crop[~good] = np.nan
    flat = pa.array(np.nan_to_num(crop).astype(np.int32).ravel())
    return crop, pa.FixedSizeListArray.from_arrays(flat, 4, mask=pa.array(~good))


def _media(values: Mapping[str, np.ndarray], video: np.ndarray, crop: np.ndarray | None) -> dict[str, np.ndarray]:
    """What the numbers say of the media, as `columns_of` says it of probed files."""
    import numpy as np

    with np.errstate(all="ignore"):
        width, height, frames, fps = (values[name].copy() for name in ("width", "height", "num_frames", "fps"))
        whole = frames / fps
        offset, duration = np.zeros_like(whole), whole.copy()
        start, end = np.nan_to_num(values["start"]), values["end"]
        cut = video & ~(np.isnan(values["start"]) & np.isnan(end))
        offset[cut] = start[cut]
        duration[cut] = np.fmin(end, whole)[cut] - start[cut]
        known = (frames >= 1) & (frames < 2**31) & (fps > 0) & np.isfinite(fps) & (duration > 0)
        frames[cut] = np.maximum(1, np.rint(frames * duration / whole))[cut]
        if crop is not None:
            left, top, right, bottom = crop.T
            cropped = ~np.isnan(left)
            width[cropped] = (np.minimum(right, width) - left)[cropped]
            height[cropped] = (np.minimum(bottom, height) - top)[cropped]
        for name, column in (("frames", frames), ("fps", fps), ("duration", duration), ("offset", offset)):
            column[~video] = 1 if name == "frames" else 0
        known = (known | ~video) & (width >= 1) & (width < 2**31) & (height >= 1) & (height < 2**31)
        columns = {
            "width": width, "height": height, "frames": frames, "fps": fps, "duration": duration, "offset": offset,
        }  # fmt: skip
        media = {name: np.where(known, column, 0).astype(NUMBERS[name]) for name, column in columns.items()}
    return {"known": known, "video": video, **media}
