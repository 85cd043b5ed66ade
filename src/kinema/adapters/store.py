"""Writing checkpoints that are larger than memory: a group of tensors at a time, into files laid out beforehand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kinema.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEM = "diffusion_pytorch_model"
"""How the files of a network in a diffusers directory are called."""


def groups(names: Iterable[str]) -> list[list[str]]:
    """Names by the block that they belong to: by their path up to its first number, or its first word."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r".*?\.\d+(?=\.)", name)
        found.setdefault(match[0] if match else name.partition(".")[0], []).append(name)
    return list(found.values())


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it at the end; UserError if it exists. What an error leaves goes."""
    if path.exists():
        raise UserError(f"{path} is there already. Choose another name, or move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        partial.rename(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Writer:
    """Safetensors files of known contents, written in any order.

    ``entries``: name -> an empty tensor of its shape and type. ``path`` is one file, or with ``shard_bytes`` a
    directory of files of at most that size, with the index that diffusers reads where there are several.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, Tensor], metadata: Mapping[str, str], shard_bytes: int | None = None
    ) -> None:
        self.places: dict[str, tuple[BinaryIO, int, int]] = {}
        self._stack = ExitStack()
        if shard_bytes is None:
            self._open(path, entries, metadata)
            return
        path.mkdir(parents=True, exist_ok=True)
        shards = _shards(entries, shard_bytes)
        digits = f"-of-{len(shards):05d}"
        files = [f"{STEM}{f'-{i + 1:05d}{digits}' if len(shards) > 1 else ''}.safetensors" for i in range(len(shards))]
        for file, names in zip(files, shards, strict=True):
            self._open(path / file, {name: entries[name] for name in names}, metadata)
        if len(shards) > 1:
            where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(_bytes(one) for one in entries.values())}, "weight_map": where}
            (path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _open(self, path: Path, entries: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        at = 0
        for name, value in entries.items():
            size = _bytes(value)
            header[name] = {
                "dtype": _type_name(value.dtype),
                "shape": list(value.shape),
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._stack.enter_context(path.open("wb"))
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + at)
        offset = start
        for name, value in entries.items():
            self.places[name] = (file, offset, _bytes(value))
            offset += _bytes(value)

    def write(self, name: str, value: Tensor) -> None:
        """Write one tensor, once."""
        import torch

        file, offset, size = self.places.pop(name)
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert data.numel() == size, f"{name} has {data.numel()} bytes, {size} were announced"
        file.seek(offset)
        file.write(memoryview(data.numpy()))

    def close(self) -> None:
        """End; every tensor must have been written."""
        assert not self.places, f"{len(self.places)} tensors were not written, for instance {min(self.places)}"
        self._stack.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.close()


def _shards(entries: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in their order, in runs of at most ``limit`` bytes where that is more than one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in entries.items():
        if shards[-1] and size + _bytes(value) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(value)
    return shards


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _type_name(dtype: torch.dtype) -> str:
    """The name of a type in the header of a safetensors file."""
    name = str(dtype).removeprefix("torch.")
    special = {"bfloat16": "BF16", "bool": "BOOL", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    return special.get(name) or name.replace("float", "F").replace("int", "I")
