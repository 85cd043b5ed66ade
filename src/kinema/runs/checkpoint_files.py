"""The files of a checkpoint: how torch's distributed checkpoint keeps its tensors as safetensors and JSON.

torch's own storage pickles its index, which must not be read from a file that came from outside, and wraps every tensor
in a zip archive of its own, which takes seconds for a thousand small ones. Here each rank writes one
``rank-00000.safetensors``, and rank 0 an ``index.json`` of which part of which tensor is where. Planning, splitting and
resharding stay torch's.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from kinema.errors import UserError
from kinema.runs.checkpoint_list import INDEX, index_problem

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the types."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter(StorageWriter):
    """Writes this rank's part of a checkpoint into a directory, synced to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks write alike."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the directory."""
        self.path.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank its file's name."""
        return [
            SavePlan(plan.items, f"rank-{rank:05d}.safetensors", plan.planner_data) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors of the plan one after the other into one file."""
        file: str = plan.storage_data
        # Long types first, so that every tensor starts at a multiple of its element size.
        items = sorted(plan.items, key=lambda item: -_dtype(item).itemsize)
        header: dict[str, Any] = {}
        end = 0
        for item in items:
            start, end = end, end + _bytes(item)
            header[entry_name(item.index)] = {
                "dtype": _DTYPE_NAMES[_dtype(item)],
                "shape": list(_chunk(item).sizes),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(self.path / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little"))
            stream.write(text)
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, _bytes(item), file) for item in items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; rank 0 only."""
        files = {result.index: result.storage_data for rank in results for result in rank}
        index = {
            name: {
                "dtype": _DTYPE_NAMES[tensor.properties.dtype],
                "shape": list(tensor.size),
                "chunks": [
                    {
                        "offsets": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                        "file": files[MetadataIndex(name, chunk.offsets)],
                    }
                    for chunk in tensor.chunks
                ],
            }
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        (self.path / INDEX).write_text(json.dumps(index, indent=0))
        sync_path(self.path / INDEX)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class SafetensorsReader(StorageReader):
    """Reads what ``SafetensorsWriter`` wrote, by memory map; nothing in the files can run code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; UserError if it cannot be read."""
        try:
            index = json.loads((self.path / INDEX).read_text())
            tensors = {}
            for name, entry in index.items():
                chunks = [
                    ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["shape"]))
                    for chunk in entry["chunks"]
                ]
                for chunk, parts in zip(chunks, entry["chunks"], strict=True):
                    self.files[MetadataIndex(name, chunk.offsets)] = Path(parts["file"]).name
                properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
                tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(index_problem(self.path, error)) from error
        return Metadata(tensors, storage_data=self.files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Ranks other than 0 get the index from rank 0."""
        self.files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts that this rank needs into its tensors."""
        from safetensors import safe_open

        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.files[item.storage_index], []).append(item)
        for file, items in by_file.items():
            with safe_open(self.path / file, framework="pt") as stored:
                for item in items:
                    entry = entry_name(item.storage_index)
                    window = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    value = stored.get_slice(entry)[window] if window else stored.get_tensor(entry)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(value)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


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


def disk_error(error: BaseException) -> str | None:
    """Why a file system refused to write, wherever that hides in an error; None if that is not the cause."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno) + ("" if cause.errno != errno.EFBIG else " (limit of file size)")
    return None


def damage(error: BaseException) -> str | None:
    """What is wrong with the files of a checkpoint, if that is the cause of an error."""
    from safetensors import SafetensorError

    for cause in _causes(error):
        if isinstance(cause, OSError | SafetensorError):
            return str(cause)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, those that led to it, and those that other ranks reported through torch's CheckpointException."""
    waiting: list[Any] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failures = getattr(current, "failures", None) or {}
        waiting += [current.__cause__, current.__context__, *(failure[0] for failure in failures.values())]


def entry_name(index: MetadataIndex) -> str:
    """Name of a part of a tensor within a file."""
    if index.offset is None or not any(index.offset):
        return index.fqn
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data.chunk


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data.properties.dtype


def _bytes(item: WriteItem) -> int:
    return _chunk(item).sizes.numel() * _dtype(item).itemsize
