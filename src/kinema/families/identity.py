"""Identity of weights for cache keys, without loading them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kinema.families.loading import Found


PROBES, PROBE = 64, 4096
"""How many places of a checkpoint's file are read to know it again, and how many bytes at each."""


def part_identity(found: Found | None, config: Mapping[str, Any]) -> str:
    """Identity of a part: its configuration, and the commit of the hub's files or the content of local ones.

    Names and places of local files do not matter. Versions of libraries are left out of the configuration.
    """
    settings = {key: value for key, value in config.items() if not key.endswith("_version")}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    if found is not None and found.hub:
        digest.update(f"{found.hub}/{found.place.name}".encode())
    elif found is not None and found.in_checkpoint:
        digest.update(f"{found.in_checkpoint} {checkpoint_identity(found.place)}".encode())
    elif found is not None:
        from kinema.data.media import content_hash

        memo = DiskMemo()
        for file in found.files:
            digest.update(content_hash(file, memo).encode())
    return digest.hexdigest()


def checkpoint_identity(checkpoint: Path) -> str:
    """Of a training's checkpoint, which may have hundreds of gigabytes: the sizes of its files and bytes from all over
    them. Another training, or another step, differs in nearly every byte."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(checkpoint)} {size}".encode())
        with file.open("rb") as stream:
            for i in range(PROBES):
                stream.seek(max(0, size - PROBE) * i // (PROBES - 1))
                digest.update(stream.read(PROBE))
                if size <= PROBE:
                    break
    return digest.hexdigest()


class DiskMemo(MutableMapping[str, str]):
    """Facts that outlive the process, one small file each in the user's cache directory.

    Weights are large and change rarely, so their hashes are worth keeping between runs. Where the directory
    cannot be written, everything works without the memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = folder or cache / "kinema" / "hashes"

    def _file(self, key: str) -> Path:
        return self.folder / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def __getitem__(self, key: str) -> str:
        try:
            return self._file(key).read_text(encoding="ascii")
        except OSError:
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False, encoding="ascii") as file:
                file.write(value)
            os.replace(file.name, self._file(key))
        except OSError:
            pass

    def __delitem__(self, key: str) -> None:
        try:
            self._file(key).unlink()
        except OSError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a DiskMemo knows the hashes of its keys, not the keys")

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*")) if self.folder.is_dir() else 0
