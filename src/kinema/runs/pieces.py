"""Tensors of which a process holds several pieces, for torch's distributed checkpoint.

A DTensor's part is one box of the whole. Where a matrix is several in one (queries, keys and values), a process that
shares it has some rows of each: several boxes of the whole, one behind the other in its memory. A checkpoint holds
each at its place in the whole, so that it loads whatever the next run's layout is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Piece:
    """A box of the whole tensor, and where this process's part has it."""

    offsets: tuple[int, ...]
    """Where it begins in the whole."""
    sizes: tuple[int, ...]
    start: tuple[int, ...]
    """Where it begins in the part."""


@dataclass(frozen=True)
class Pieces:
    """A tensor by reference: ``local`` is this process's part, ``shape`` that of the whole."""

    local: Tensor
    shape: torch.Size
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    def numel(self) -> int:
        """Elements of the whole."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.local.element_size()

    def view(self, offset: torch.Size | None, part: Tensor | None = None) -> Tensor:
        """The piece that begins there in the whole: of this process's part, or of a copy of it."""
        view = self.local if part is None else part
        piece = next(piece for piece in self.pieces if piece.offsets == tuple(offset or ()))
        for dim, (start, size) in enumerate(zip(piece.start, piece.sizes, strict=True)):
            view = view.narrow(dim, start, size)
        return view

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        """What torch's planner writes of it."""
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What torch's planner reads of it."""
        return [ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in self.pieces]


class PiecesLoadPlanner(DefaultLoadPlanner):
    """torch's planner, which also fills the pieces of a tensor."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take flat names of tensors; torch's own drops what it does not know."""
        super().set_up_planner(dict(state_dict), metadata, is_coordinator)
        self.state_dict = dict(state_dict)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the data of one planned part goes."""
        target = self.state_dict[index.fqn]
        return target.view(index.offset) if isinstance(target, Pieces) else super().lookup_tensor(index)


class CopiesPlanner(DefaultSavePlanner):
    """torch's planner, but what is written are copies of this rank's parts by name: the tensors go on changing.

    ``copies`` None: the tensors themselves are written."""

    def __init__(self, copies: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The data of one planned part."""
        copy = None if self.copies is None else self.copies[index.fqn]
        stored = self.state_dict[index.fqn]
        if isinstance(stored, Pieces):
            return stored.view(index.offset, copy)
        return super().lookup_object(index) if copy is None else copy
