"""What a training changed of its networks, by name, and how it is laid over networks that are fresh."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinema.runs.checkpoint_load import contents, in_pieces, load, mapped

PIECE = 2**28
"""Elements of a checkpoint that are read at once."""


def named_trainables(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by ``{network}.{parameter}``; for the EMA too."""
    return {
        f"{part}.{name}": parameter
        for part, network in networks.items()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def configuration(network: nn.Module) -> dict[str, Any]:
    """What diffusers or transformers would write as its ``config.json``, under the name of the class that FSDP2 derived
    from."""
    from torch.distributed.fsdp import FSDPModule

    name = next(kind.__name__ for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
    if hasattr(network, "to_json_string"):
        facts = json.loads(network.to_json_string()) | {"_class_name": name}
    else:
        facts = json.loads(network.config.to_json_string()) | {"architectures": [name]}
    facts.pop("_name_or_path", None)  # a path on this machine
    return facts


def averaged(checkpoint: Path) -> bool:
    """Whether a checkpoint has averaged weights."""
    return any(name.startswith("ema.") for name in contents(checkpoint))


def lay_over(networks: Mapping[str, nn.Module], checkpoint: Path, ema: bool) -> None:
    """Copy a checkpoint's trained weights into the parameters that require gradients; UserError for one it lacks.

    ``ema``: the averaged ones where the checkpoint has them. Types may differ; memory holds no network twice.
    """
    stored = contents(checkpoint)
    group = "ema" if ema and averaged(checkpoint) else "networks"
    parameters = named_trainables(networks)
    for keys in _pieces({key: value.numel() for key, value in parameters.items()}):
        tensors = {
            key: torch.empty(parameters[key].shape, dtype=stored[f"{group}.{key}"][1])
            for key in keys
            if f"{group}.{key}" in stored
        }
        missing = {key: parameters[key] for key in keys if key not in tensors}
        load(checkpoint, {group: tensors | missing})  # refuses what is missing, by its name
        with torch.no_grad():
            for key, value in tensors.items():
                parameters[key].copy_(value)


def _pieces(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in their order, in pieces of at most `PIECE` elements where that is more than one tensor: memory
    need not hold a network twice."""
    piece: list[str] = []
    for name, size in sizes.items():
        if piece and sum(sizes[one] for one in piece) + size > PIECE:
            yield piece
            piece = []
        piece.append(name)
    if piece:
        yield piece


def trained_names(checkpoint: Path, part: str) -> dict[str, str]:
    """Where a checkpoint has the tensors of a part that trained whole: its names for them, by those of the part's
    model. The averaged ones where there are some; what is not averaged (buffers) as it is."""
    stored = contents(checkpoint)
    found: dict[str, str] = {}
    for group in ("networks", "ema"):
        prefix = f"{group}.{part}."
        found |= {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
    return found


def read_trained(checkpoint: Path, part: str, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a part that trained whole, by the names of its model, in the types they were trained in.

    On the CPU those that lie in one piece are mapped: nothing is read before it is used. On the device "meta" the index
    alone is read.
    """
    stored, names = contents(checkpoint), trained_names(checkpoint, part)
    is_meta = torch.device(device).type == "meta"
    tensors = {} if is_meta else mapped(checkpoint, names.values())
    in_pieces = {
        name: torch.empty(stored[name][0], dtype=stored[name][1], device="meta" if is_meta else "cpu")
        for name in names.values()
        if name not in tensors
    }
    if not is_meta:
        load(checkpoint, in_pieces)
    tensors |= in_pieces
    return {ours: tensors[theirs] for ours, theirs in names.items()}


InPieces = tuple[Callable[[], torch.Tensor], tuple[int, ...], torch.dtype]
"""What puts a tensor together, its shape and its type."""


def leave_trained(checkpoint: Path, part: str) -> tuple[dict[str, torch.Tensor], dict[str, InPieces]]:
    """As `read_trained`, reading nothing: tensors in one piece, and those in several."""
    stored, names = contents(checkpoint), trained_names(checkpoint, part)
    whole = mapped(checkpoint, names.values())
    pieces = in_pieces(checkpoint, [one for one in names.values() if one not in whole])
    return (
        {ours: whole[theirs] for ours, theirs in names.items() if theirs in whole},
        {ours: (pieces[theirs], *stored[theirs]) for ours, theirs in names.items() if theirs in pieces},
    )
