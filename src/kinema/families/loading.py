"""Parts of a model from a diffusers directory, a release in its original layout, a hub id, or single files.

A family describes its parts (`PartSpec`); everything else here is the same for all of them. Nothing heavy is
imported before weights are read.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.model import PartConfig
from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.from_runs import checkpoint_files, gone, is_trained, read_checkpoint, trained_part
from kinema.families.tensors import (
    SUFFIXES,
    is_inside,
    looks_like,
    read_tensors,
    undo_fp8_scaling,
    weight_files,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIGS = Path(__file__).parent / "configs"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SMALL_FILES = (".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class PartSpec:
    """One part of a family's models, and how to recognise it on disk."""

    what: str
    """In words, for messages."""
    folder: str
    """Its folder in a diffusers directory."""
    model: str = ""
    """The class that holds it, ``module:Class``; empty for parts without weights."""
    originals: tuple[str, ...] = ()
    """Names (glob patterns) of its file or folder in a release in the original layout."""
    config_file: str = "config.json"
    beside: str | None = None
    """The part near which this one lies when it has no path of its own."""
    to_ours: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    """Tensor names of any known layout to those of ``model``."""
    inside: tuple[str, ...] = ()
    """What its tensors' names begin with in a file that holds a whole model."""
    load: Callable[[Source], Any] | None = None
    """How a part without weights is loaded, where its name does not say it."""
    shipped: str = ""
    """Its configuration under ``configs/common``, where several families share it."""
    hub: str = ""
    """A repository that has it, for messages, where the variant's has not."""


@dataclass(frozen=True)
class Found:
    """Where a part lies. ``files`` are its weights, or the small files of a part that has none."""

    key: str
    """The configuration key that led here, for messages."""
    place: Path
    files: tuple[Path, ...]
    config: Path | None = None
    """Its configuration file, where there is one."""
    hub: str | None = None
    """``owner/name@commit`` when it came from the hub."""
    model: ModelConfig | None = None
    """The configuration of the run that trained it, where it is from one: it says what the files themselves do not."""
    described: Mapping[str, Any] | None = None
    """Its configuration, where a checkpoint says it."""
    in_checkpoint: str | None = None
    """The part's name in the checkpoint of a run that the place is."""


def part_config(config: ModelConfig, part: str) -> PartConfig:
    """The table ``[model.<part>]``; parts without one follow the others."""
    return getattr(config, part, PartConfig())


def is_hub_id(path: str | None) -> bool:
    """Whether this is an ``owner/name`` on the hub, not a place on this machine."""
    return (
        path is not None and bool(_HUB_ID.fullmatch(path)) and not Path(path).exists() and not path.endswith(SUFFIXES)
    )


def find(config: ModelConfig, part: str, spec: PartSpec, *, weights: bool = True) -> Found | None:
    """Where ``part`` lies: at its own path, beside the part that it belongs to, or in ``model.path``; or None.

    ``weights = False`` asks the hub for configuration files alone. UserError: a path that does not exist or
    does not hold the part, a hub id that cannot be fetched, shards that are missing.
    """
    if own := part_config(config, part).path:
        key = f"model.{part}.path"
        root, hub = _open(own, config.revision, spec, key, weights)
        if root.is_file():
            return Found(key, root, (root,) if spec.model else _small_files(root.parent))
        if spec.model and is_trained(root):
            return _of_run(root, config, part, spec, key)
        found = _in_root(root, spec, key, hub, weights) or _in_folder(root, spec, key, hub, weights)
        if found is None and hub:  # a repository of this part alone
            root, hub = _open(own, config.revision, spec, key, weights, alone=True)
            found = _in_folder(root, spec, key, hub, weights)
        if found is None:
            wanted = " or ".join([f"{spec.folder}/", f"{spec.config_file} beside weights", *spec.originals])
            raise UserError(f"{key}: {own} holds no {spec.what}. Expected in it: {wanted}.")
        return found
    if spec.beside and (near := part_config(config, spec.beside).path):
        key = f"model.{spec.beside}.path"
        root, hub = _open(near, config.revision, spec, key, weights)
        if root.is_file():
            root = root.parent
        for place in (root, root.parent):
            found = _in_root(place, spec, key, hub, weights)
            if found is not None:
                return found
        if (root / spec.config_file).is_file():
            return _in_folder(root, spec, key, hub, weights)
    if config.path is None:
        return None
    root, hub = _open(config.path, config.revision, spec, "model.path", weights)
    if root.is_file():
        return Found("model.path", root, (root,)) if part == "network" or is_inside(root, spec.inside) else None
    return _in_root(root, spec, "model.path", hub, weights)


def _of_run(root: Path, config: ModelConfig, part: str, spec: PartSpec, key: str) -> Found:
    """The part that a run or an export trained."""
    trained = trained_part(root, part, config, key)
    place, model = trained.place, trained.model
    if trained.is_checkpoint:
        files = checkpoint_files(place)
        return Found(key, place, files, model=model, described=trained.config, in_checkpoint=part)
    if place.is_file():
        return Found(key, place, (place,), model=model)
    found = _in_folder(place, spec, key, None, True)
    assert found is not None, f"an export is complete: {place}"
    return replace(found, model=model)


def _in_root(root: Path, spec: PartSpec, key: str, hub: str | None, weights: bool) -> Found | None:
    """The part in a directory that holds a whole model, in diffusers' layout or the original one."""
    if (root / spec.folder).is_dir():
        return _in_folder(root / spec.folder, spec, key, hub, weights)
    for pattern in spec.originals:
        for match in sorted(root.glob(pattern)):
            if match.is_dir():
                return _in_folder(match, spec, key, hub, weights)
            of_folder = weight_files(root)
            files = tuple(of_folder) if match in of_folder else (match,)
            return Found(key, match if len(files) == 1 else root, files, _if_file(root / spec.config_file), hub)
    return None


def _in_folder(folder: Path, spec: PartSpec, key: str, hub: str | None, weights: bool) -> Found | None:
    """The part in a directory of its own."""
    files = tuple(weight_files(folder)) if spec.model and weights else _small_files(folder)
    if not files or not (spec.model or (folder / spec.config_file).is_file()):
        return None
    return Found(key, folder, files, _if_file(folder / spec.config_file), hub)


def _small_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for file in folder.iterdir() if file.suffix in _SMALL_FILES and file.is_file()))


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _open(
    path: str, revision: str | None, spec: PartSpec, key: str, weights: bool, *, alone: bool = False
) -> tuple[Path, str | None]:
    """The local file or directory of a path or hub id, and ``owner/name@commit`` for the latter.

    Of a hub repository only this part is fetched; ``alone`` takes the weights that lie at its top.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local, None
    if not is_hub_id(path):
        why = gone(local) or f"there is no file or directory {path}. Give a path that exists, or a hub id."
        raise UserError(f"{key}: {why}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [f"{spec.folder}/*.json", spec.config_file]
    if weights:
        patterns += [f"{spec.folder}/*", *(f"{name}{end}" for name in spec.originals for end in ("", "/*"))]
        patterns += ["diffusion_pytorch_model*", "model*", "pytorch_model*"] if alone and spec.model else []
    if not spec.model:
        patterns += ["tokenizer*", "spiece.model", "special_tokens_map.json"]
    named = f"'{path}'" + (f" (revision '{revision}')" if revision else "")
    try:
        snapshot = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(
            f"{key}: {named} asks for consent. Accept its terms on its hub page, then set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"model.revision: {path} on the hub has no revision '{revision}'.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{key}: there is no file, directory or hub repository {named}. If it is private, set HF_TOKEN."
        ) from None
    except (OSError, ValueError) as error:  # not in the local cache, and off line
        raise UserError(
            f"{key}: {named} is no path on this machine, and the hub cannot be reached "
            f"({type(error).__name__}). If it is a path, correct it. If it is a hub id, go on line, or run "
            f"`hf download {path}` on a machine that is, copy the directory here and give its path."
        ) from None
    return snapshot, f"{path}@{snapshot.name}"


@dataclass(frozen=True)
class Source:
    """A part that was found, with its configuration: all that building and loading it needs."""

    spec: PartSpec
    found: Found | None
    config: Mapping[str, Any]
    config_path: Path
    model_name: str
    """Which model the part should belong to, for messages."""


def with_config(
    spec: PartSpec, found: Found | None, config: Path | None, shipped: Path | None, model_name: str
) -> Source:
    """Add the configuration: the file ``config`` if it describes this class, else the one shipped for the variant.

    Releases in the original layout have a ``config.json`` too, of another class: it is passed over. UserError:
    JSON that is broken, or no configuration at all.
    """
    for path in (config, shipped):
        if path is None or not path.is_file():
            continue
        content = read_json(path)
        named = content.get("_class_name")
        if not spec.model or named is None or spec.model.endswith(f":{named}"):
            return Source(spec, found, content, path, model_name)
    if spec.model:
        raise UserError(f"There is no {spec.config_file} for the {spec.what}; give a diffusers directory.")
    return Source(spec, found, {}, shipped or CONFIGS, model_name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a configuration file; UserError if it is broken."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None


def model_class(spec: PartSpec) -> Any:
    """The class of a part, imported."""
    module, _, name = spec.model.partition(":")
    return getattr(importlib.import_module(module), name)


def build(spec: PartSpec, config: Mapping[str, Any], *, empty: bool = False) -> nn.Module:
    """The model of a part from its configuration, with its class's own random weights.

    ``empty``: parameters on the meta device, to be filled; buffers that are no weights are computed either way.
    """
    from accelerate import init_empty_weights

    cls = model_class(spec)
    if empty:
        with init_empty_weights(include_buffers=False):
            module = build(spec, config)
        if hasattr(module, "tie_weights"):
            module.tie_weights()  # type: ignore[operator]
        return module
    if hasattr(cls, "load_config"):  # diffusers
        return cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    return cls(cls.config_class.from_dict(dict(config)))


def load_weights(source: Source, device: str | torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The model of a part with the weights of its files, in eval mode and without gradients.

    ``dtype`` None keeps the types of the files; parameters that the class wants in float32 stay so. Weights are
    copied one by one out of mapped files: memory peaks at the size of the result. Inside
    `networks.mapped.leaving_weights_mapped` a module on the CPU has placeholders, and weights wait in their files.
    UserError lists tensors that are missing, left over or of another shape.
    """
    import torch

    from kinema.networks.mapped import may_wait, placeholder, wait

    assert source.found is not None
    module = build(source.spec, source.config, empty=True)
    waits = may_wait() and torch.device(device).type == "cpu"
    in_files = _stored(source.found, source.spec, device, waits)
    tensors = source.spec.to_ours(undo_fp8_scaling(in_files, dtype or torch.bfloat16))
    tied = _tied(module)
    wanted = {key: value for key, value in module.state_dict().items() if key not in tied}
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    state = {
        key: value
        for key, value in tensors.items()
        if key in wanted or not (key in tied or any(re.search(pattern, key) for pattern in ignored))
    }
    _check(wanted, state, source, source.found, looks_like(in_files))
    exact = kept_in_float32(module, dtype)
    waiting: dict[str, Callable[[], Tensor]] = {}
    for key, value in state.items():
        kept = dtype is not None and bool(exact & set(key.split(".")))
        kind = torch.float32 if kept else dtype or value.dtype
        copied = partial(_copied, value, device, kind)
        if waits:
            waiting[key] = copied
        state[key] = placeholder(value.shape, kind) if waits else copied()
    module.load_state_dict(state, strict=False, assign=True)
    if tied:
        module.tie_weights()  # type: ignore[operator]
    wait(module, waiting)
    return module.to(device).eval().requires_grad_(False)


def _stored(found: Found, spec: PartSpec, device: str | torch.device, waits: bool) -> dict[str, Tensor]:
    """The tensors of a part as its files have them."""
    if not found.in_checkpoint:
        return read_tensors(found.files, spec.inside)
    if not waits:
        return read_checkpoint(found.place, found.in_checkpoint, device)
    from kinema.networks.unmade import Unmade
    from kinema.runs.trained import leave_trained

    whole, in_pieces = leave_trained(found.place, found.in_checkpoint)
    return whole | {name: Unmade.of(*one) for name, one in in_pieces.items()}


def _copied(value: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """A stored tensor in memory of its own."""
    from kinema.networks.unmade import made

    return made(value).to(device, dtype, copy=True)


def _tied(module: nn.Module) -> set[str]:
    """Names of parameters that are another one's alias, where the configuration ties them (transformers' models)."""
    return set(getattr(module, "all_tied_weights_keys", None) or ())


def kept_in_float32(module: nn.Module, dtype: torch.dtype | None) -> set[str]:
    """Module names whose parameters the libraries' own loaders keep in float32 when ``dtype`` is narrower."""
    import torch

    if dtype not in (torch.float16, torch.bfloat16):
        return set()
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16 or hasattr(type(module), "load_config"):  # transformers: for fp16 alone
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return names


def _check(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Source, found: Found, appearance: str
) -> None:
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if not (missing or unexpected or misshapen):
        return
    problems = [f"{len(missing)} missing ({_few(missing)})"] if missing else []
    problems += [f"{len(unexpected)} unexpected ({_few(unexpected)})"] if unexpected else []
    if misshapen:
        shapes = f"{list(state[misshapen[0]].shape)} instead of {list(wanted[misshapen[0]].shape)}"
        problems.append(f"{len(misshapen)} of another shape ({_few(misshapen)}: {shapes})")
    if len(missing) > len(wanted) / 2:
        hint = f"It looks like {appearance}."
    else:
        hint = f"Its names are right, its size or version is not that of {source.config_path}."
    key = found.key if found.key != "model.path" else "model.path, or as the path of this part alone"
    raise UserError(
        f"{found.key}: {found.place} does not hold the {source.spec.what} of {source.model_name}. {hint} "
        f"Tensors: {'; '.join(problems)}. Give the right file or directory as {key}."
    )


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
