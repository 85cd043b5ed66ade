"""Files by their location: a local path, an address (``s3://...``, ``https://...``, whatever fsspec knows), or a member
of a tar file, written ``<location of the tar>::<name of the member>``.

Local files are opened without fsspec. Every failure is a MediaError that names the location, or a UserError where
something is to be installed or unpacked.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from kinema.errors import UserError

from .records import MediaError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_MEMBER = re.compile(r"\.tar(?:\?[^:]*)?::", re.IGNORECASE)  # "?...": the query of a web address
_LOCAL_SCHEMES = ("file", "local")
BLOCK = 2**22
"""Bytes that are fetched at once from a remote file: most pictures whole, and enough of a video to be quick over a
connection with 50 ms of delay."""
STAMPS = ("ETag", "etag", "md5Hash", "version_id", "LastModified", "last_modified", "mtime", "updated", "modified")
"""What storages call the identity or the time of a file's content, the surest first. "created" comes after them."""


@dataclass(frozen=True)
class FileStatus:
    """What tells one state of a file from another."""

    size: int
    """Bytes; -1 where a server does not say."""
    stamp: str
    """Modification time in nanoseconds, or what a storage has instead of it. Of a tar member: that of its tar."""


class FolderEntry(NamedTuple):
    name: str
    location: str
    is_folder: bool


def is_remote(location: str) -> bool:
    """Whether the file lies behind an address. Of a tar member: whether its tar does."""
    match = _ADDRESS.match(location)
    return match is not None and match[1].lower() not in _LOCAL_SCHEMES


def split_member(location: str) -> tuple[str, str] | None:
    """(location of the tar, name of the member), or None where the location is no member of a tar file."""
    match = _MEMBER.search(location)
    return None if match is None else (location[: match.end() - 2], location[match.end() :])


def local_path(location: str) -> Path | None:
    """The path of a plain file on this machine; None for addresses and members of tar files."""
    if split_member(location) is not None or is_remote(location):
        return None
    return Path(_plain(location))


def absolute(location: str) -> str:
    """The location by which a file is known from any directory."""
    if is_remote(location):
        return location
    member = split_member(location)
    return os.path.abspath(_plain(location)) if member is None else f"{absolute(member[0])}::{member[1]}"


def _is_web(location: str) -> bool:
    return location[:8].lower().startswith(("http://", "https://"))


def _plain(location: str) -> str:
    """A local location as a path: without ``file://``."""
    match = _ADDRESS.match(location)
    return location if match is None else location[match.end() :]


def open_binary(location: str) -> BinaryIO:
    """The file, opened to read and seek, with a position of its own. Raises MediaError where it is missing, no regular
    file, or cannot be read."""
    member = split_member(location)
    if member is not None:
        from .tar_index import open_member

        return open_member(*member)
    if is_remote(location):
        return _open_remote(location)
    path = _plain(location)
    _regular(location, path)
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(location, error) from error


def read_bytes(location: str) -> bytes:
    """All of a small file, such as a caption."""
    with open_binary(location) as file, _failures(location):
        return file.read()


def status(location: str) -> FileStatus:
    """Size and stamp of a file; MediaError, with the code "missing", where there is none."""
    member = split_member(location)
    if member is not None:
        from .tar_index import member_span

        return FileStatus(member_span(*member)[1], status(member[0]).stamp)
    if not is_remote(location):
        found = _regular(location, _plain(location))
        return FileStatus(found.st_size, str(found.st_mtime_ns))
    system, path = _storage(location)
    with _failures(location):
        info = system.info(path)
    if info["type"] == "directory":
        raise MediaError(f"{location} is not a regular file", "missing")
    stamp = next((info[key] for key in (*STAMPS, "created") if info.get(key)), None)
    size = info.get("size")
    return FileStatus(-1 if size is None else int(size), str(stamp if stamp is not None else system.ukey(path)))


def is_folder(location: str) -> bool:
    """Whether a folder lies there. False for what is missing. On the web: whether the name is like that of a folder."""
    if split_member(location) is not None:
        return False
    if not is_remote(location):
        return os.path.isdir(_plain(location))
    if _is_web(location):  # fsspec would fetch all of a file to look for links in it
        return location.endswith("/") or not suffix(location)
    system, path = _storage(location)
    with _failures(location):
        return bool(system.isdir(path))


def exists(location: str) -> bool:
    """Whether a file or folder lies there."""
    try:
        status(location)
    except MediaError as error:
        if error.code != "missing":
            raise
        return is_folder(location)
    return True


def list_folder(location: str) -> list[FolderEntry]:
    """The files and folders in a folder, by name. Raises MediaError where it is missing or cannot be read."""
    if not is_remote(location):
        try:
            with os.scandir(_plain(location)) as entries:
                found = [
                    FolderEntry(entry.name, join(location, entry.name), _leads_to_folder(entry)) for entry in entries
                ]
        except OSError as error:
            raise _unreadable(location, error) from error
        return sorted(found)
    system, path = _storage(location)
    with _failures(location):
        infos = system.ls(path, detail=True)
    own = path.rstrip("/")
    entries_of: dict[str, FolderEntry] = {}
    for info in infos:
        full = info["name"].rstrip("/")
        name = full.rsplit("/", 1)[-1]
        if full != own and name and not name.startswith("?"):  # a storage may list the folder itself, a page its orders
            entries_of[name] = FolderEntry(name, join(location, name), info["type"] == "directory")
    return sorted(entries_of.values())


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def join(root: str, name: str) -> str:
    """The location of ``name`` in the folder ``root``; a ``name`` that is an absolute path or an address is itself."""
    if not root or _ADDRESS.match(name) or name.startswith("/"):
        return name
    if not _ADDRESS.match(root) and split_member(root) is None:
        return os.path.join(root, name)
    head, tail = _split_tail(root)
    parts = [part for part in tail.split("/") if part]
    for part in name.split("/"):  # addresses know no "..", so it is resolved here
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return head + "/".join(parts)


def parent(location: str) -> str:
    """The folder of a file. Of a member at the top of a tar: the tar and ``::``; of a bare name: ``"."``."""
    if not _ADDRESS.match(location) and split_member(location) is None:
        return os.path.dirname(location.rstrip("/") or "/") or "."
    head, tail = _split_tail(location)
    return (head + tail.rstrip("/").rpartition("/")[0]) or head


def _split_tail(location: str) -> tuple[str, str]:
    """(what names the storage or the tar, path in it) of an address or a member."""
    if (member := split_member(location)) is not None:
        return f"{member[0]}::", member[1]
    match = _ADDRESS.match(location)
    assert match is not None, location
    host, slash, path = _without_query(location)[match.end() :].partition("/")
    return location[: match.end()] + host + (slash or "/"), path


def _without_query(location: str) -> str:
    return re.split(r"[?#]", location, maxsplit=1)[0] if _is_web(location) else location


def file_name(location: str) -> str:
    """The last part of a location, without the query of a web address."""
    member = split_member(location)
    if member is not None:
        location = member[1]
    return _without_query(location).rstrip("/").rpartition("/")[2]


def stem(location: str) -> str:
    """The file's name without its extension."""
    return os.path.splitext(file_name(location))[0]


def suffix(location: str) -> str:
    """The file's extension in lower case, with its dot; "" where there is none."""
    return os.path.splitext(file_name(location))[1].lower()


def _regular(location: str, path: str) -> os.stat_result:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise _unreadable(location, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(f"{location} is not a regular file", "missing")
    return found


def _unreadable(location: str, error: Exception) -> MediaError:
    if isinstance(error, PermissionError):
        return MediaError(f"{location} may not be read: check its permissions", "missing")
    return MediaError(f"{location} cannot be read: {getattr(error, 'strerror', None) or error}", "missing")


def _storage(location: str) -> tuple[AbstractFileSystem, str]:
    """The file system behind an address, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        return cast("tuple[AbstractFileSystem, str]", url_to_fs(location))
    except ImportError as error:
        raise UserError(
            f'{location}: this kind of address needs a package that is not installed: pip install "kinema[remote]" '
            f"({error})"
        ) from error
    except ValueError as error:
        raise UserError(f"{location}: {error}; expected a path or an address such as s3://bucket/clips") from error
    except Exception as error:  # credentials, names of hosts: each storage has errors of its own
        raise _unreachable(location, error) from error


def _unreachable(location: str, error: Exception) -> MediaError:
    detail = f"{type(error).__name__}: {error}".rstrip(": ")
    return MediaError(
        f"{location} cannot be read ({detail}): check the address, and that you have access to it", "unreachable"
    )


@contextmanager
def _failures(location: str) -> Iterator[None]:
    """Whatever a storage raises, as a MediaError."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"{location} cannot be read: No such file or directory", "missing") from error
    except IsADirectoryError as error:
        raise MediaError(f"{location} is not a regular file", "missing") from error
    except Exception as error:
        raise _unreachable(location, error) from error


def _open_remote(location: str) -> BinaryIO:
    system, path = _storage(location)
    with _failures(location):
        file: Any = system.open(path, "rb", block_size=BLOCK, cache_type="readahead")
        if isinstance(file, io.BytesIO):  # memory:// hands everyone the same object, with one position for all
            return io.BytesIO(file.getvalue())
        if file.seekable() and getattr(file, "size", 0) is not None:  # a web server may send a stream of no known end
            return cast(BinaryIO, file)
        return _spooled(file)


def _spooled(file: Any) -> BinaryIO:
    """A copy on disk, gone when it is closed, of what can only be read from front to back."""
    import shutil
    import tempfile

    copy = tempfile.TemporaryFile()  # noqa: SIM115 - whoever opened the location closes it
    with file:
        shutil.copyfileobj(file, copy, BLOCK)
    copy.seek(0)
    return cast(BinaryIO, copy)


def is_pattern(location: str) -> bool:
    """Whether a location stands for several files: it has ``*``, ``?``, ``[..]`` or braces, and no file or folder of
    this machine is called so."""
    if _query_only(location):
        return False
    return re.search(r"[*?\[{]", location) is not None and not (
        not is_remote(location) and os.path.lexists(_plain(location))
    )


def _query_only(location: str) -> bool:
    """Whether the ``?`` of a web address begins its query and there is nothing else that a pattern has."""
    return _is_web(location) and not re.search(r"[*\[{]", location.split("?", 1)[0])


def expand(pattern: str) -> list[str]:
    """The files that a pattern stands for, sorted by name, none twice.

    ``*`` and ``?`` stand for characters of a name, ``[..]`` for one of several characters, ``**`` for any folders,
    none among them; hidden names are not meant. ``{a,b}`` and ``{000..012}`` write out names: these are returned
    whether or not there is such a file, so that a shard that is missing is noticed when it is opened.
    """
    from .patterns import braces, matches

    if not is_pattern(pattern):
        return [pattern]
    return sorted({location for one in braces(pattern) for location in matches(one)})
