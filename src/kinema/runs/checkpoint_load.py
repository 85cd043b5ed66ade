"""Checkpoints read back: their tensors by name, on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from kinema.errors import UserError
from kinema.runs.checkpoint_files import SafetensorsReader, damage
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(
                flatten(tensors),
                storage_reader=SafetensorsReader(path),
                planner=PiecesLoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except (Exception, CheckpointException) as error:
        reason = damage(error)
        if reason is None:
            raise
        raise UserError(
            f"checkpoint {path} is damaged: {reason}. Resume from another checkpoint, or copy this one "
            "again from where it came from."
        ) from error
    return meta


def flatten(tensors: State, prefix: str = "") -> dict[str, Tensor | Pieces]:
    """Nested names joined with dots."""
    flat: dict[str, Tensor | Pieces] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
