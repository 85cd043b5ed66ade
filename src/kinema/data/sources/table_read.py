"""Reading the files of a table as batches of raw rows, and finding the line where one is broken."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from kinema.data.files import local_path, open_binary, suffix
from kinema.errors import UserError

from .table_names import is_read
from .table_rows import JSON

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 1 << 20
"""Bytes of a csv file that are parsed at once; a row cannot be longer. Arrow is slower with larger ones."""
JSON_BLOCK = 4 << 20
"""Bytes of a jsonl file that are parsed at once, in pieces, on several threads."""
ROWS = 16384
"""Rows of a parquet file that are read at once."""


def raw_batches(location: str, derived: bool = False) -> Iterator[pa.RecordBatch]:
    """The rows of one file of a table, at least one batch, which may be empty; ``derived``: also columns of a csv file
    that follow from others in a table of media. UserError that names the line where it is broken; MediaError for a file
    that is missing."""
    reader = READERS.get(suffix(location))
    if reader is None:
        known = ", ".join(READERS)
        raise UserError(f"{location}: '{suffix(location) or 'no extension'}' is no table's; expected one of {known}")
    return _read_csv(location, derived) if reader is _read_csv else reader(location)


def _read_csv(location: str, derived: bool = False) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    delimiter = "\t" if suffix(location) == ".tsv" else ","
    header = _header(location, delimiter)
    names = [name.strip() for name in header]
    wanted = {name: pa.string() for name in header if is_read(name.strip(), derived)}
    read_names = [name.strip() for name in wanted]
    yield pa.RecordBatch.from_arrays([pa.array([], pa.string()) for _ in names], names=names)
    checked = False
    try:
        with _arrow_stream(location) as stream:
            reader = arrow_csv.open_csv(
                stream,
                # one thread parses as fast as two: the rest of the work is done beside it
                read_options=arrow_csv.ReadOptions(block_size=BLOCK, use_threads=False),
                parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=arrow_csv.ConvertOptions(column_types=wanted, include_columns=list(wanted)),
            )
            for batch in reader:
                if not checked and any(map(_has_newline, batch.columns)):
                    checked = True  # text of several lines, or a quote that is not closed and swallows rows
                    if broken := _broken_csv(location, delimiter, len(header)):
                        raise broken
                yield pa.RecordBatch.from_arrays(batch.columns, names=read_names)
    except pa.ArrowInvalid as error:
        broken = _broken_csv(location, delimiter, len(header))
        raise broken or UserError(f"{location} cannot be read as a table: {error}") from None


def _has_newline(column: pa.Array) -> bool:
    text = column.buffers()[2]
    return text is not None and b"\n" in bytes(text)


def _header(location: str, delimiter: str) -> list[str]:
    with open_binary(location) as stream:
        try:
            return next(csv.reader(_lines(stream, location), delimiter=delimiter))
        except StopIteration:
            raise UserError(f"{location} is empty: expected a line with the names of the columns") from None
        except csv.Error as error:
            raise UserError(f"{location}, line 1: the names of the columns cannot be read: {error}") from None


def _lines(stream: BinaryIO, location: str) -> Iterator[str]:
    """The lines of a text file, with their ends; UserError for one that is not UTF-8."""
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            utf16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
            guess = "it looks like UTF-16; " if utf16 else ""
            where = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
            raise UserError(f"{location}, line {number} is not UTF-8 ({where}): {guess}save it as UTF-8") from None


def _broken_csv(location: str, delimiter: str, columns: int) -> UserError | None:
    """What is wrong with a csv file and in which line, found by reading it slowly; None if nothing is."""
    taken: list[str] = []

    def remember(lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    line = 1
    with open_binary(location) as stream:
        try:
            for row in csv.reader(remember(_lines(stream, location)), delimiter=delimiter):
                # a row of one line may bend the rules, as readers do; in one of several, a stray quote swallows rows
                if len(taken) > 1 and not _well_quoted(taken, delimiter):
                    return _quote_error(location, line)
                if row and len(row) != columns:
                    return UserError(
                        f"{location}, line {line}: has {len(row)} cells, and the table has {columns} columns: a cell "
                        f"with a '{delimiter}' in it wants quotes around it"
                    )
                line += len(taken)
                taken.clear()
        except UserError as error:
            return error
        except csv.Error:  # a cell longer than any: the rest of the file
            return _quote_error(location, line)
    return None


def _well_quoted(lines: Sequence[str], delimiter: str) -> bool:
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


def _quote_error(location: str, line: int) -> UserError:
    return UserError(
        f"{location}, line {line}: a quote opens here and does not close before the end of a cell. Close it, and write "
        f'a quote inside quotes as two: ""'
    )


def _arrow_stream(location: str) -> pa.NativeFile:
    import pyarrow as pa

    path = local_path(location)
    return pa.OSFile(str(path)) if path is not None else pa.PythonFile(open_binary(location), "r")


def _read_parquet(location: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with _arrow_stream(location) as stream:
            # without buffering of whole row groups, which may be gigabytes
            file = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
            empty = file.schema_arrow.empty_table()
            yield pa.RecordBatch.from_arrays([column.combine_chunks() for column in empty.columns], schema=empty.schema)
            yield from file.iter_batches(ROWS)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{location} cannot be read as parquet, it may be damaged or cut off: {error}") from None


def _read_json(location: str) -> Iterator[pa.RecordBatch]:
    """Lines of objects, or a single list of them."""
    types: dict[str, pa.DataType] | None = None
    line, rest = 1, b""
    with open_binary(location) as stream:
        while chunk := stream.read(JSON_BLOCK):
            block, found, rest = (rest + chunk).rpartition(b"\n")
            block += found
            if line == 1:
                block, rest = block.removeprefix(b"\xef\xbb\xbf"), rest if block else rest.removeprefix(b"\xef\xbb\xbf")
            if types is None and (block or rest).lstrip()[:1] == b"[":
                yield from _read_json_list(location)
                return
            if block.strip():
                types = _text_columns(block) if types is None else types
                yield _parse_lines(block, line, types, location)
            line += block.count(b"\n")
    if rest.strip():
        yield _parse_lines(rest, line, types or _text_columns(rest), location)
    elif types is None:
        raise UserError(f"{location} is empty: expected an object a line, with a path and a text")


def _read_json_list(location: str) -> Iterator[pa.RecordBatch]:
    with open_binary(location) as stream:
        try:
            rows = json.loads(stream.read())
        except UnicodeDecodeError as error:
            raise UserError(f"{location} is not UTF-8 ({error.reason} at byte {error.start}): save it so") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{location}, line {error.lineno}: is no JSON: {error.msg}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{location}: entry {number} of the list is no object such as {EXAMPLE}")
    for first in range(0, max(1, len(rows)), ROWS):
        yield _as_batch(rows[first : first + ROWS])


EXAMPLE = '{"path": "a.mp4", "text": "a caption"}'


def _text_columns(block: bytes) -> dict[str, pa.DataType]:
    """The columns that hold text in the first row; Arrow would take some text for times."""
    import pyarrow as pa

    try:
        row = json.loads(block.lstrip().split(b"\n", 1)[0])
    except ValueError:
        return {}
    return {name: pa.string() for name, value in row.items() if isinstance(value, str)} if isinstance(row, dict) else {}


def _parse_lines(block: bytes, line: int, types: dict[str, pa.DataType], location: str) -> pa.RecordBatch:
    """Whole lines, the first of them number ``line``."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    try:
        table = arrow_json.read_json(
            pa.BufferReader(block),
            read_options=arrow_json.ReadOptions(block_size=BLOCK, use_threads=True),
            parse_options=arrow_json.ParseOptions(explicit_schema=pa.schema(list(types.items()))),
        )
        table.validate(full=True)  # the parser lets through what is not UTF-8
        table = table.combine_chunks()
        return pa.RecordBatch.from_arrays([_one_chunk(column) for column in table.columns], schema=table.schema)
    except pa.ArrowException:
        return _parse_slowly(block, line, location)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _parse_slowly(block: bytes, line: int, location: str) -> pa.RecordBatch:
    """Lines that are broken, or whose values have types that change from row to row."""
    rows = []
    for number, text in enumerate(io.BytesIO(block), line):
        if not text.strip():
            continue
        try:
            row = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            where = f"byte 0x{text[error.start]:02x} at position {error.start + 1}"
            raise UserError(f"{location}, line {number} is not UTF-8 ({where}): save it as UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{location}, line {number}: is no JSON: {error.msg} at position {error.colno}") from None
        if not isinstance(row, dict):
            raise UserError(f"{location}, line {number}: is no object such as {EXAMPLE}")
        rows.append(row)
    return _as_batch(rows)


def _as_batch(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [_as_column(name, [row.get(name) for row in rows]) for name in names]
    return pa.RecordBatch.from_arrays(
        [array for _, array in columns], schema=pa.schema([field for field, _ in columns])
    )


def _as_column(name: str, values: list[Any]) -> tuple[pa.Field, pa.Array]:
    """A column of one type, or of JSON text where the values have several."""
    import pyarrow as pa

    try:
        array = pa.array(values)
        return pa.field(name, array.type), array
    except pa.ArrowException:
        text = [None if value is None else json.dumps(value) for value in values]
        return pa.field(name, pa.string(), metadata={JSON: b"1"}), pa.array(text, pa.string())


READERS: dict[str, Callable[[str], Iterator[pa.RecordBatch]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
}
