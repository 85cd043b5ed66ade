"""The writing side of the cache: one open segment a process, how a writer is known to be gone, full disks."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError
from kinema.sizes import readable_bytes

from .segments import FORMAT, FRAME, OPEN, TEMPORARY, OpenSegment, frame, pack, seal, sync_directory, write_all

if TYPE_CHECKING:
    from torch import Tensor

SYNC_SECONDS = 2.0
"""What was put is on the disk at the next put after so many seconds: a power cut loses the work of less than twice as
many, or of the one entry that takes longer."""
STALE_SECONDS = 24 * 3600.0
"""Segments of other machines are taken for abandoned when nothing was written to them for so long."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a limit on file sizes is used up."""


class CacheFull(UserError):
    """The cache's disk is full. Everything that was finished before is intact."""


def full_message(directory: Path, what: str) -> str:
    """What a user is told when the cache's disk is full."""
    free = readable_bytes(shutil.disk_usage(directory).free)
    return (
        f"the cache directory {directory} cannot take more: {what}; {free} are free on its disk. "
        "What was encoded so far is kept. Free some space (or lift the quota), or set data.cache to a "
        "directory on a larger disk and move the files of this one there; then start again: the work goes "
        "on where it stopped"
    )


@lru_cache(maxsize=1)
def _machine() -> tuple[str, str]:
    """(this boot of this machine, this process namespace): where a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), ""


def _started(pid: int) -> int | None:
    """When a process started (clock ticks since boot; 0 where that is not told), None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # a zombie writes no more
    except (OSError, IndexError, ValueError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it lives, and belongs to somebody else
    return 0


def identity() -> dict[str, Any]:
    """What the first line of a segment says of its writer."""
    machine, namespace = _machine()
    pid = os.getpid()
    return {"machine": machine, "namespace": namespace, "pid": pid, "started": _started(pid)}


def abandoned(segment: OpenSegment) -> bool:
    """Whether nobody will write to a segment any more: certain on one machine, by age across machines."""
    owner = segment.owner
    if (owner.get("machine"), owner.get("namespace")) == _machine():
        return _started(owner["pid"]) != owner["started"]
    return time.time() - segment.path.stat().st_mtime > STALE_SECONDS


class SegmentWriter:
    """The one open segment that this process appends to; a new one after each that is sealed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = secrets.token_hex(6)
        self.segment: OpenSegment | None = None
        self.entries = 0
        self._descriptor = -1
        self._count = 0
        self._synced = 0.0

    def append(self, key: bytes, tensors: Mapping[str, Tensor]) -> tuple[OpenSegment, int, int]:
        """Write an entry: (segment, payload offset, payload bytes). `CacheFull` where the disk is full."""
        pieces = frame(key, pack(tensors))
        size = sum(map(len, pieces))
        try:
            if self.segment is not None and os.fstat(self._descriptor).st_nlink == 0:
                self._let_go()  # another machine took us for gone, and has sealed our segment
            segment = self.segment or self._begin()
            try:
                write_all(self._descriptor, pieces)
                self._sync()
            except BaseException:
                os.ftruncate(self._descriptor, segment.end)  # the next frame must not follow half a one
                os.lseek(self._descriptor, segment.end, os.SEEK_SET)
                raise
        except OSError as error:
            if error.errno not in FULL:
                raise
            what = f"an entry of {size} bytes ({readable_bytes(size)}) could not be written ({error.strerror})"
            raise CacheFull(full_message(self.directory, what)) from error
        offset = segment.end + FRAME.size
        segment.end += size
        self.entries += 1
        return segment, offset, size - FRAME.size

    def _begin(self) -> OpenSegment:
        path = self.directory / f"{self.name}-{self._count:04d}{OPEN}"
        owner = identity()
        line = json.dumps({"format": FORMAT, **owner}).encode() + b"\n"
        temporary = path.with_name(path.name + TEMPORARY)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            write_all(descriptor, (line,))
            os.replace(temporary, path)  # a segment never shows up without its first line
            sync_directory(self.directory)
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self._count += 1
        self._descriptor, self.entries, self._synced = descriptor, 0, -math.inf
        self.segment = OpenSegment(path, owner, end=len(line))
        return self.segment

    def _sync(self) -> None:
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def finish(self) -> bool:
        """Seal the open segment; whether there was one. On a full disk it stays open, for a later run."""
        if self.segment is None:
            return False
        try:
            os.fsync(self._descriptor)
            seal(self.segment, self.name)
        except OSError as error:
            if error.errno not in FULL:
                raise
        finally:
            self._let_go()
        return True

    def _let_go(self) -> None:
        os.close(self._descriptor)
        self.segment, self._descriptor = None, -1
