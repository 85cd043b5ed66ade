"""Models on disk for the commands that convert, merge and extract: which family they belong to, and their weights, one
block in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.adapters.names import original_name
from kinema.adapters.store import Writer, groups, new_path
from kinema.adapters.targets import adaptable_modules
from kinema.config.layouts import LayoutName, why_not
from kinema.config.model import PartConfig
from kinema.config.schema import ModelConfig
from kinema.errors import ConfigError, UserError
from kinema.families.base import Family
from kinema.families.loading import is_hub_id
from kinema.families.registry import family_class, family_names, open_family
from kinema.families.standard import StandardFamily
from kinema.families.tensors import tensor_shapes, weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

COMFYUI_PREFIX = "model.diffusion_model."
"""Before the names of a whole network in a single file: the prefix that ComfyUI and diffusers' loader know."""


def candidates(
    family: str | None, variant: str | None, families: Iterable[str] | None = None
) -> Iterator[tuple[str, str]]:
    """The (family, variant) pairs that agree with what is given, in the order of ``families`` (default: all);
    ConfigError for names that there are not."""
    for name in [family] if family else families or family_names():
        variants = family_class(name).variants
        if variant is not None and family is not None and variant not in variants:
            raise ConfigError(f"--variant {variant}: {name} has {', '.join(variants)}.")
        for one in variants:
            if variant in (None, one):
                yield name, one


def by_likelihood(names: Iterable[str], part: str) -> dict[str, float]:
    """Families, and the share of these names (of layers or weights) that the family's layout has a rule for, the
    largest first: so that the right one is tried early. Layouts without rules for a name may still have it."""
    sample = list(names)[:200]
    scores: dict[str, float] = {}
    for name in family_names():
        try:
            family = open_family(ModelConfig(family=name, variant=next(iter(family_class(name).variants))))
            layout = family.layout(part)
        except UserError:
            scores[name] = 0.0
            continue
        known = sum(original_name(layout, one) not in (None, one) or layout.is_original([one]) for one in sample)
        scores[name] = known / max(len(sample), 1)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def _names_in(path: Path) -> list[str]:
    """Names of the weights at a place on this machine, as far as they are easily found."""
    if path.is_dir():
        places = (path, path / "transformer", path / "unet")
        files = next((found for place in places if place.is_dir() and (found := weight_files(place))), [])
    else:
        files = [path] if path.is_file() else []
    return list(tensor_shapes(files)) if files else []


def empty_parts(family: Family) -> dict[str, nn.Module]:
    """The parts that can train, on the meta device, as far as their configurations are at hand; the network first."""
    found: dict[str, nn.Module] = {}
    for part in family.trainable_parts():
        try:
            found[part] = family.empty(part)
        except UserError:  # a text encoder whose configuration does not ship
            if part.startswith("network"):
                raise
    return found


def empty_modules(family: Family, first: str | None = None) -> dict[str, Any]:
    """Adaptable modules by part; ``first`` before the others: names that leave the part open belong to it."""
    parts = empty_parts(family)
    order = sorted(parts, key=lambda part: part != first)
    return {part: adaptable_modules(parts[part]) for part in order}


@dataclass(frozen=True)
class Model:
    """A part of a model on disk."""

    family: StandardFamily
    part: str
    network: nn.Module
    """On the meta device."""

    @property
    def name(self) -> str:
        return f"{self.family.name}/{self.family.variant.name}"

    def weights(self) -> dict[str, Tensor]:
        """All tensors under diffusers' names, mapped from the files: nothing is read before it is used. Those of scaled
        float8 are not made yet (`networks.unmade`), in bf16."""
        import torch

        from kinema.families.tensors import read_tensors, undo_fp8_scaling

        source = self.family.source(self.part)
        assert source.found is not None
        in_files = read_tensors(source.found.files, source.spec.inside)
        tensors = source.spec.to_ours(undo_fp8_scaling(in_files, torch.bfloat16))
        return {name: tensors[name] for name in self.network.state_dict() if name in tensors}


def open_model(path: str, family: str | None, variant: str | None, part: str = "network") -> Model:
    """The model at ``path`` (a diffusers directory, one of its folders, a single file, a hub id), found out by its
    tensors where family and variant are not given. UserError if it is none that kinema knows."""
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if not Path(path).exists() and not is_hub_id(path):
        raise UserError(f"{path}: there is no such file or directory.")
    whole = not Path(path).exists() or (Path(path) / "model_index.json").is_file()
    problems: list[str] = []
    for name in [family] if family else by_likelihood(_names_in(Path(path)), part):
        names = [variant] if variant else [None, *family_class(name).variants]
        for one in names:
            update = {"path": path} if whole else {part: PartConfig(path=path)}
            found = open_family(ModelConfig(family=name, variant=one).model_copy(update=update))
            try:
                if part not in found.variant.parts or not isinstance(found, StandardFamily):
                    continue
                return Model(found, part, found.load(part, "meta", None))
            except Exception as error:  # another family's converters may fail in any way on files that are not theirs
                if family is not None and not isinstance(error, UserError):
                    raise
                problems.append(str(error))
    if family is not None and problems:
        raise UserError(problems[0])
    raise UserError(
        f"{path} holds no {part} of a model that kinema knows. Say what it is with --family and --variant to see what "
        "does not fit; `kinema models` lists them."
    )


def write_checkpoint(
    out: Path,
    layout: LayoutName,
    model: Model,
    entries: Mapping[str, Tensor],
    produce: Callable[[list[str]], dict[str, Tensor]],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a network's weights, a block at a time.

    ``entries``: diffusers names with tensors that have the shapes and types (their values are not read); ``produce``
    makes the tensors of some of them. ``out``: a directory for diffusers, a file for comfyui. ``dtype``: that of
    floating-point tensors; what the libraries keep in fp32 stays so.
    """
    import torch

    from kinema.families.loading import kept_in_float32

    if reason := why_not(None, layout):
        raise UserError(f"The layout {layout} cannot hold a whole network: {reason}. Take diffusers or comfyui.")
    check_suffix(out, layout)
    exact = kept_in_float32(model.network, dtype)

    def named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        typed = {}
        for name, value in state.items():
            kept = dtype is not None and bool(exact & set(name.split(".")))
            wanted = torch.float32 if kept else dtype
            typed[name] = value.to(wanted) if wanted is not None and value.is_floating_point() else value
        if layout == "diffusers":
            return typed
        original = model.family.layout(model.part).to_original(typed)
        return {f"{COMFYUI_PREFIX}{name}": value for name, value in original.items()}

    final = named({name: torch.empty_like(value, device="meta") for name, value in entries.items()})
    with new_path(out) as partial:
        is_folder = layout == "diffusers"
        with Writer(partial, final, metadata, shard_bytes if is_folder else None) as writer:
            for group in groups(entries):
                for name, value in named(produce(group)).items():
                    writer.write(name, value)
        if is_folder:
            (partial / "config.json").write_text(config_json(model.network), encoding="utf-8")


def check_suffix(out: Path, layout: LayoutName) -> None:
    """UserError unless the name is that of a file or of a directory, as the layout wants it."""
    is_file = out.suffix == ".safetensors"
    if is_file == (layout == "diffusers"):
        wanted = "a directory" if layout == "diffusers" else "a file that ends in .safetensors"
        raise UserError(f"{out}: the layout {layout} is written as {wanted}.")


def config_json(network: Any) -> str:
    """diffusers' ``config.json`` of a network."""
    facts = json.loads(network.to_json_string())
    facts.pop("_name_or_path", None)  # a path on this machine
    return json.dumps(facts, indent=2, sort_keys=True) + "\n"
