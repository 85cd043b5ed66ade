"""The folder that samples are written to: its index, and which files are there already.

``index.jsonl`` has a line for each file, with its settings. Several processes may write to one folder: a line is
appended by one write, and while lines are taken out nobody appends.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.sampling.writing import read_metadata, sidecar, write_sidecar

INDEX = "index.jsonl"


def prepare_index(folder: Path, files: Sequence[str]) -> None:
    """Make the folder, take the lines of files that are about to be made anew out of its index, and what a process
    that was killed left of them. A line that is cut short goes too."""
    index = folder / INDEX
    try:
        folder.mkdir(parents=True, exist_ok=True)
        again = set(files)
        with _alone(folder):
            _remove_leftovers(folder, {*files, *(sidecar(Path(name)).name for name in files), INDEX})
            if not index.exists():
                return
            text = index.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if (named := _file_of(line)) and named not in again]
            whole = "".join(f"{line}\n" for line in kept)
            if whole != text:
                temporary = index.with_name(f".{INDEX}.{os.getpid()}")
                temporary.write_text(whole, encoding="utf-8")
                temporary.replace(index)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}).") from error


def add_to_index(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append one line: ``file``, ``prompt``, ``seed`` and the other settings."""
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    try:
        with _alone(folder):
            file = os.open(folder / INDEX, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                written = os.write(file, line)
            finally:
                os.close(file)
    except OSError as error:
        raise UserError(f"{folder / INDEX} cannot be written: {error.strerror}.") from error
    if written < len(line):  # the next start takes the torn line out, and the file itself has its settings
        raise UserError(f"{folder / INDEX} cannot be written: the disk is full.")


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of a folder's index by file; none where there is no index."""
    try:
        lines = (folder / INDEX).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {named: json.loads(line) for line in lines if (named := _file_of(line))}


def there_already(folder: Path, name: str, wanted: Mapping[str, Any], index: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a file that is there was made as ``wanted`` says, by its line in the index or by itself.

    Of a file that was, what lies beside it is made good: its line in the index, its json.
    """
    path = folder / name
    stored = index.get(name)
    if stored is None or not _holds(stored, wanted):
        try:
            stored = read_metadata(path)
        except UserError:
            return False
        if not _holds(stored, wanted):
            return False
        if name in index:
            prepare_index(folder, [name])
        add_to_index(folder, {"file": name, **stored})
    if not sidecar(path).is_file():
        write_sidecar(path, read_metadata(path))
    return True


def _holds(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(stored.get(key) == value for key, value in json.loads(json.dumps(wanted)).items())


def _file_of(line: str) -> str | None:
    try:
        named = json.loads(line).get("file")
    except (ValueError, AttributeError):  # cut short by a full disk
        return None
    return named if isinstance(named, str) else None


def _remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Temporary files of processes that were killed while they wrote one of these files."""
    for entry in os.scandir(folder):
        match = re.fullmatch(r"\.(.+?)\.(\d+)(\.[a-z0-9]+)?", entry.name)
        if match and match[1] + (match[3] or "") in names and not _runs(int(match[2])):
            Path(entry.path).unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, where the file system has locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks; there a line still takes one write
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
