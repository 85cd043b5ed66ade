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

    ``entries``: name -> a tensor of its shape and type. ``path`` is one file, or with ``shard_bytes`` a directory of
    files of at most that size, called ``stem``, with the index that diffusers reads where there are several.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        shard_bytes: int | None = None,
        stem: str = STEM,
    ) -> None:
        self.places: dict[str, tuple[BinaryIO, int, int]] = {}
        self._stack = ExitStack()
        try:
            if shard_bytes is None:
                self._open(path, entries, metadata)
            else:
                path.mkdir(parents=True, exist_ok=True)
                self._open_shards(path, entries, metadata, shard_bytes, stem)
        except BaseException:
            self.abandon()
            raise

    def _open_shards(
        self, path: Path, entries: Mapping[str, Tensor], metadata: Mapping[str, str], shard_bytes: int, stem: str
    ) -> None:
        import torch
        from huggingface_hub import split_torch_state_dict_into_shards

        split = split_torch_state_dict_into_shards(
            # Tensors of their own: those that lie in one storage would be counted as one.
            {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in entries.items()},
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=shard_bytes,
        )
        for file, names in split.filename_to_tensors.items():
            self._open(path / file, {name: entries[name] for name in names}, metadata)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (path / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _open(self, path: Path, entries: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        at = 0
        # Long types first, so that every tensor begins at a multiple of its element's size.
        order = sorted(entries, key=lambda name: (-entries[name].element_size(), name))
        for name in order:
            size = _bytes(entries[name])
            header[name] = {
                "dtype": _type_name(entries[name].dtype),
                "shape": list(entries[name].shape),
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._stack.enter_context(path.open("wb"))
        file.write(len(text).to_bytes(8, "little") + text)
        offset = file.tell()
        file.truncate(offset + at)
        for name in order:
            self.places[name] = (file, offset, _bytes(entries[name]))
            offset += _bytes(entries[name])

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

    def abandon(self) -> None:
        """End with what there is; nothing after ``close``."""
        self._stack.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _type_name(dtype: torch.dtype) -> str:
    """The name of a type in the header of a safetensors file."""
    name = str(dtype).removeprefix("torch.")
    special = {"bfloat16": "BF16", "bool": "BOOL", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    return special.get(name) or name.replace("float", "F").replace("int", "I")
