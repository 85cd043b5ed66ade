"""Reading checkpoint metadata without trusting it, and what disks say when they are full."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles what torch writes into ``.metadata``: records of names, shapes and offsets, nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


_METADATA_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class SafeReader(FileSystemReader):
    """torch's reader, but nothing in a checkpoint that came from outside can run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint; pickle.UnpicklingError if it holds anything else."""
        data = (Path(self.path) / ".metadata").read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def sync_path(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user may still write on the file system of a directory."""
    return shutil.disk_usage(path).free


def readable_bytes(number: int) -> str:
    """For instance ``12.3 MB``."""
    value = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def disk_error(error: BaseException) -> str | None:
    """The reason why a file system refused to write, wherever it hides in an error; None if that is not the cause."""
    for cause in _causes(error):
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, those that led to it, and those that other ranks reported to torch's CheckpointException."""
    waiting: list[Any] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__]
        failures = getattr(current, "failures", None) or {}
        waiting += [failure[0] for failure in failures.values()]
