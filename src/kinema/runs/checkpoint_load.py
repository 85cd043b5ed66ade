"""Checkpoints read back: their tensors by name, on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from kinema.errors import UserError
from kinema.runs.checkpoint_files import SafetensorsReader, damage, entry_name
from kinema.runs.checkpoint_list import read_header
from kinema.runs.pieces import Pieces, PiecesLoadPlanner

State = Mapping[str, "Tensor | Pieces | State"]
"""Nested names of tensors."""


def read_meta(path: Path) -> dict[str, Any]:
    """The ``meta`` that was saved with a checkpoint."""
    return read_header(path)["meta"]


def contents(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of the tensors in a checkpoint; nested names are joined with dots."""
    read_header(path)
    stored = SafetensorsReader(path).read_metadata().state_dict_metadata
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in stored.items()}


def load(path: Path, tensors: State, group: dist.ProcessGroup | None = None, convert: bool = False) -> dict[str, Any]:
    """Fill ``tensors`` in place from a checkpoint, whatever number of ranks wrote it; returns its ``meta``.

    ``group``: the ranks that load together, each its parts; None for a process that loads alone.
    Tensors of the checkpoint that are not asked for are left alone. UserError, before anything is changed, if one that
    is asked for is not there or has another shape, or, unless ``convert``, another type.
    """
    meta = read_meta(path)
    stored = contents(path)
    for name, tensor in flatten(tensors).items():
        if name not in stored:
            raise UserError(
                f"checkpoint {path} has no '{name}' among its {len(stored)} tensors: it belongs to another network, "
                "adapter or optimiser. Resume with the configuration that it was trained with, or start from its "
                "weights only."
            )
        shape, dtype = stored[name]
        if shape != tuple(tensor.shape) or (dtype != tensor.dtype and not convert):
            raise UserError(
                f"checkpoint {path} has '{name}' as {dtype} {list(shape)}, but this run needs {tensor.dtype} "
                f"{list(tensor.shape)}. Resume with the configuration that it was trained with."
            )
    with _naming_damage(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(
            flatten(tensors),
            storage_reader=SafetensorsReader(path),
            planner=PiecesLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    return meta


def mapped(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of these tensors that one process wrote whole, memory-mapped: nothing is read of them before it is used."""
    from safetensors import safe_open

    reader = SafetensorsReader(path)
    stored = reader.read_metadata().state_dict_metadata
    by_file: dict[str, list[str]] = {}
    for name in names:
        first, *more = stored[name].chunks
        if not more:
            by_file.setdefault(reader.files[MetadataIndex(name, first.offsets)], []).append(name)
    with _naming_damage(path):
        tensors: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            with safe_open(path / file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in inside}
    return tensors


def in_pieces(path: Path, names: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
    """What puts together, each time it is called, one of these tensors, of pieces that are mapped as by `mapped`."""
    from safetensors import safe_open

    reader = SafetensorsReader(path)
    stored = reader.read_metadata().state_dict_metadata
    wanted = {name: stored[name] for name in names}
    places: dict[str, list[MetadataIndex]] = {}
    for name, entry in wanted.items():
        for chunk in entry.chunks:
            index = MetadataIndex(name, chunk.offsets)
            places.setdefault(reader.files[index], []).append(index)
    pieces: dict[str, list[tuple[torch.Size, Tensor]]] = {name: [] for name in wanted}
    with _naming_damage(path):
        for file, indices in places.items():
            with safe_open(path / file, framework="pt") as opened:
                for index in indices:
                    assert index.offset is not None
                    pieces[index.fqn].append((index.offset, opened.get_tensor(entry_name(index))))
    return {name: partial(_together, entry.size, pieces[name]) for name, entry in wanted.items()}


def _together(shape: torch.Size, pieces: list[tuple[torch.Size, Tensor]]) -> Tensor:
    whole = torch.empty(shape, dtype=pieces[0][1].dtype)
    for offsets, piece in pieces:
        place = tuple(slice(start, start + size) for start, size in zip(offsets, piece.shape, strict=True))
        whole[place].copy_(piece)
    return whole


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Files of a checkpoint that cannot be read inside are a UserError."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = damage(error)
        if reason is None:
            raise
        raise UserError(
            f"checkpoint {path} is damaged: {reason}. Resume from another checkpoint, or copy this one "
            "again from where it came from."
        ) from error


def flatten(tensors: State, prefix: str = "") -> dict[str, Tensor | Pieces]:
    """Nested names joined with dots."""
    flat: dict[str, Tensor | Pieces] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
