"""``kinema convert``: an adapter or a whole network into another layout or type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.adapters.files import AdapterFile, UnknownLayer, locate, read_adapter, split
from kinema.adapters.model import by_likelihood, candidates, check_suffix, empty_modules, open_model, write_checkpoint
from kinema.adapters.state import Adapter
from kinema.adapters.store import new_path
from kinema.adapters.write import DIFFUSERS_FILE, HEADER, PART, by_file, save_adapter
from kinema.config.layouts import LayoutName
from kinema.config.schema import ModelConfig
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.families.tensors import tensor_shapes

if TYPE_CHECKING:
    import torch

_OURS_ALONE = (HEADER, PART, "format", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
"""What a header says of one layout, and not of the next."""


def convert(
    source: str,
    out: Path,
    to: LayoutName,
    *,
    family: str | None = None,
    variant: str | None = None,
    part: str = "network",
    base: str | None = None,
    dtype: str | None = None,
    shard_gb: float = 5.0,
) -> list[str]:
    """Write ``source`` in the layout ``to``; lines that say what was done.

    An adapter (file or directory) becomes an adapter, a model's network a network. ``base`` is the model that an
    adapter belongs to, where that has no published size. UserError for what is neither, what the layout cannot hold, or
    an ``out`` that exists.
    """
    kind = None if dtype is None else torch_dtype(dtype)
    if is_adapter(source):
        path = Path(source).expanduser()
        if base is not None:
            owner = open_model(base, family, variant, part).family
            found: tuple[Family, AdapterFile] = owner, read_adapter(path, owner, empty_modules(owner, part))
        else:
            found = find_adapter(path, family, variant, part)
        return _convert_adapter(path, out, to, *found, kind)
    if base is not None:
        raise UserError(f"--base belongs to an adapter, and {source} is none.")
    from kinema.networks.unmade import made

    model = open_model(source, family, variant, part)
    weights = model.weights()
    write_checkpoint(
        out,
        to,
        model,
        weights,
        lambda names: {name: made(weights[name]) for name in names},
        metadata={"modelspec.architecture": model.name},
        dtype=kind,
        shard_bytes=round(shard_gb * 1e9),
    )
    return [f"{source}: the {part} of {model.name}, {len(weights)} tensors", f"wrote {out} ({to})"]


def is_adapter(source: str) -> bool:
    """Whether this is the path of an adapter: a file (or a directory with one) whose tensors are factors."""
    path = Path(source).expanduser()
    try:
        files = locate(path) if path.exists() else []
    except UserError:
        return False
    if not files or files[0].suffix != ".safetensors":
        return False
    names = tensor_shapes(files[:1])
    return any(split(name) is not None and not name.endswith(".alpha") for name in names)


def _convert_adapter(
    source: Path, out: Path, to: LayoutName, family: Family, file: AdapterFile, dtype: torch.dtype | None
) -> list[str]:
    metadata = {key: value for key, value in file.metadata.items() if key not in _OURS_ALONE}
    adapters = list(file.adapters.values())
    lines = [
        f"{source}: {one.kind} of {len(one.layers)} layers of the {one.part} of {family.name}/{family.variant.name}"
        for one in adapters
    ]
    for sharing, path in _paths(adapters, out, to, family):
        with new_path(path) as partial:
            save_adapter(partial, to, sharing, family, metadata=metadata, dtype=dtype)
        lines.append(f"wrote {path} ({to})")
    return lines


def _paths(adapters: list[Adapter], out: Path, to: LayoutName, family: Family) -> list[tuple[list[Adapter], Path]]:
    """Where each file goes: ``out`` itself, or names beside it where experts lie apart."""
    if to == "diffusers" and out.suffix != ".safetensors":
        out /= DIFFUSERS_FILE
    elif to == "peft":
        if out.suffix == ".safetensors":
            raise UserError(f"{out}: the layout peft is written as a directory.")
    else:
        check_suffix(out, "comfyui")
    files = by_file(adapters, to, family)
    if len(files) == 1:
        return [(files[0], out)]
    if to == "peft":
        return [(one, out / one[0].part) for one in files]
    return [(one, out.with_stem(f"{out.stem}-{family.expert(one[0].part)}")) for one in files]


def find_adapter(source: Path, family: str | None, variant: str | None, part: str) -> tuple[Family, AdapterFile]:
    """The family that an adapter belongs to, and the adapter; found out by its header, else by its layers.

    UserError if it fits none, or several families and none was named.
    """
    said = _said(source) if family is None else None
    pairs = [said] if said else list(candidates(family, variant, None if family else _in_order(source, part)))
    fitting: dict[str, tuple[Family, AdapterFile]] = {}
    problems: list[str] = []
    other: set[str] = set()  # families that have no layers of these names in any size
    for name, one in pairs:
        if name in fitting or name in other:
            continue
        found = open_family(ModelConfig(family=name, variant=one))
        try:
            fitting[name] = found, read_adapter(source, found, empty_modules(found, part))
        except Exception as error:  # another family's rules may fail in any way on layers that are not theirs
            if family is not None and not isinstance(error, UserError):
                raise
            problems.append(str(error))
            if isinstance(error, UnknownLayer) and not error.other_size:
                other.add(name)
    if len(fitting) > 1:
        raise UserError(f"{source} fits several families: {', '.join(fitting)}. Say which with --family.")
    if not fitting:
        hint = "" if family else " Say what it is for with --family and --variant to see what does not fit."
        raise UserError(problems[0] if len(pairs) == 1 else f"{source} fits no model that kinema knows.{hint}")
    return next(iter(fitting.values()))


def _in_order(source: Path, part: str) -> list[str]:
    """All families, those first whose layouts know the names of the adapter's layers."""
    names = [found[0] for name in tensor_shapes(locate(source)[:1]) if (found := split(name)) is not None]
    bare = [re.sub(r"^(base_model\.model\.)?(transformer|unet|diffusion_model)\.", "", name) for name in names]
    return list(by_likelihood(dict.fromkeys(bare), part))


def _said(source: Path) -> tuple[str, str] | None:
    """(family, variant) as kinema writes them into headers, where they are still known."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(locate(source)[0], framework="pt") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
    except SafetensorError:
        return None
    words = metadata.get("modelspec.architecture", "").split("/")
    known = set(candidates(None, None))
    return (words[0], words[1]) if len(words) >= 2 and (words[0], words[1]) in known else None
