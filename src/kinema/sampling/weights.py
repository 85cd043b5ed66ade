"""Where the weights of a sample come from: a run, an export or base weights, with adapters merged in.

Finding them (`find_weights`) reads no weights and imports no torch; `load_parts` does the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.model import PartConfig
from kinema.config.schema import Config, ModelConfig
from kinema.errors import UserError
from kinema.families.base import Family, Parts
from kinema.families.from_runs import in_checkpoint
from kinema.families.registry import family_class, family_names, open_family
from kinema.runs.checkpoint_list import Checkpoint, list_checkpoints
from kinema.runs.exports import DESCRIPTION, read_export, step_of
from kinema.runs.newest import newest

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Weights:
    """Everything that decides which networks are sampled."""

    family: Family
    label: str
    """For people: what is sampled."""
    config: Config | None = None
    """The run's, if weights are a run's."""
    checkpoint: Path | None = None
    """The checkpoint that trained weights come from, if they do. ``family`` finds parts that trained whole there,
    averaged where it has an average; adapters, and weights that are not averaged, are laid over what it finds."""
    ema: bool = True
    """Take a checkpoint's averaged weights where it has them."""
    adapters: tuple[tuple[Path, float], ...] = ()
    """Files and the factors that they are folded in with."""
    trained: tuple[tuple[str, Path], ...] = ()
    """Adapter files of an export, by the part that each belongs to."""
    export: Path | None = None
    """The export that the weights are of, if they are of one."""


def find_weights(
    run: Path | None,
    model: str | None,
    *,
    family: str | None,
    variant: str | None,
    adapters: Sequence[Path | str],
    ema: bool | None,
) -> Weights:
    """Where the weights come from, by the options of the command; UserError for what is not there."""
    if (run is None) == (model is None):
        raise UserError("Say what to sample: either --run (a run directory) or --model (base weights or an export).")
    parsed = tuple(adapter_option(str(adapter)) for adapter in adapters)
    if run is None:
        assert model is not None
        if ema is not None:
            raise UserError("--ema and --no-ema choose among the weights of a --run; a --model has one set of them.")
        found = _of_export(Path(model).expanduser()) or _of_model(model, family, variant)
    else:
        if family is not None or variant is not None:
            raise UserError(f"--family and --variant belong to --model; {run} says itself what it trained.")
        found = _of_export(run) or _of_run(run, True if ema is None else ema)
    return replace(found, adapters=found.adapters + parsed)


def adapter_option(text: str) -> tuple[Path, float]:
    """``file`` or ``file:scale``; UserError unless the file is there."""
    path, _, scale = text.rpartition(":")
    if Path(text).exists() or not path:
        path, scale = text, "1"
    try:
        factor = float(scale)
    except ValueError:
        path, factor = text, 1.0
    if not Path(path).exists():
        raise UserError(f"--adapter {path}: there is no such file or directory. Expected FILE or FILE:SCALE.")
    return Path(path), factor


def _of_model(model: str, family: str | None, variant: str | None) -> Weights:
    """Base weights: a diffusers directory, a hub id, or a single file of a network.

    What a single file lacks (autoencoder, encoders, tokenizers) is taken from the variant's repository on the hub.
    """
    path = Path(model).expanduser()
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise UserError(
            f"--model {model}: there is no such file or directory. Expected a diffusers directory, a single "
            "checkpoint file or a hub id (owner/name)."
        )
    if (path / "config.toml").is_file() and (path / "environment.json").is_file():
        raise UserError(f"--model {model} is a run directory: use --run {model}.")
    name = family or _family_of(model, path)
    config = ModelConfig(family=name, variant=variant, path=model)
    if not path.is_file():
        return Weights(open_family(config), path.name if path.exists() else model)
    if variant is None:
        known = ", ".join(family_class(name).variants)
        raise UserError(f"--model {model} is a single file: say which {name} it is with --variant ({known}).")
    one = open_family(config)
    elsewhere = PartConfig(path=one.variant.hub)
    others = (part for part in one.variant.parts if part in ModelConfig.model_fields and part != "network")
    fields = [part for part in others if not one.is_here(part)]
    return Weights(open_family(config.model_copy(update=dict.fromkeys(fields, elsewhere))), path.name)


def _family_of(model: str, path: Path) -> str:
    """The family whose pipeline a diffusers directory names; UserError if it names none of ours."""
    index = path / "model_index.json"
    if path.is_file():
        raise UserError(f"--model {model} is a single file: say what it is with --family and --variant.")
    if not path.exists():
        index = _index_on_hub(model)
    if not index.is_file():
        raise UserError(
            f"--model {model} has no model_index.json, so what it holds is not known: say it with --family, or give "
            "the directory that holds the whole model."
        )
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    for family in family_names():
        if name in {variant.pipeline for variant in family_class(family).variants.values()}:
            return family
    raise UserError(
        f"--model {model} is for {name}, which no family of kinema samples with. `kinema models` lists them."
    )


def _index_on_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "model_index.json"))
    except Exception as error:
        raise UserError(
            f"--model {model}: there is no such path here, and it cannot be fetched from the hub "
            f"({type(error).__name__}). Check the name and the connection, and log in for gated models."
        ) from error


# -- runs and exports ------------------------------------------------------------------------------------------------


def _of_export(path: Path) -> Weights | None:
    """An export, or a directory inside one; None if it is neither."""
    from kinema.config.load import load_config

    place = next((place for place in (path, path.parent) if (place / DESCRIPTION).is_file()), None)
    export = None if place is None else read_export(place)
    if place is None or export is None:
        return None
    config = load_config(place / "config.toml")
    trained = tuple(export.adapters.items())
    label = f"{config.run.dir.name} at step {export.step}"
    return Weights(open_family(_free(export.model), config.run.seed), label, config, trained=trained, export=place)


def _of_run(run: Path, ema: bool) -> Weights:
    """The newest export or checkpoint of a run, whichever is later.

    An export holds the averaged weights if the run keeps an average, so where those are not wanted only
    checkpoints will do.
    """
    from kinema.config.load import load_config

    if not run.is_dir():
        raise UserError(f"--run {run}: there is no such directory.")
    if not (run / "config.toml").is_file():
        raise UserError(f"--run {run} is no run directory: it has no config.toml.")
    config = load_config(run / "config.toml")
    exports = ema or config.training.ema is None
    found = newest(run, exports)
    if isinstance(found, Checkpoint):
        return _of_checkpoint(run, config, found, ema)
    if found is None and not exports:
        raise UserError(f"--no-ema: {run} has no checkpoint, which alone holds weights that are not averaged.")
    if found is None:
        raise UserError(f"--run {run} holds neither an export nor a checkpoint: nothing has been trained in it yet.")
    weights = _of_export(found)
    assert weights is not None
    return replace(weights, label=f"{run.resolve().name} at step {step_of(found)}", config=config)


def _of_checkpoint(run: Path, config: Config, checkpoint: Checkpoint, ema: bool) -> Weights:
    """Parts that trained whole are taken from the checkpoint itself: what the run began with may be gone."""
    model = config.model if config.adapter is not None else in_checkpoint(config.model, checkpoint.path)
    family = open_family(_free(model), config.run.seed)
    return Weights(family, f"{run.resolve().name} at step {checkpoint.step}", config, checkpoint.path, ema)


def weights_at(export: Path | None = None, checkpoint: Path | None = None, ema: bool = True) -> Weights:
    """Those of one export, or of one checkpoint of a run, though there may be newer ones; UserError if it is gone."""
    from kinema.config.load import load_config

    place = export or checkpoint
    assert place is not None
    if export is not None and (export / DESCRIPTION).is_file() and (found := _of_export(export)):
        return found
    if checkpoint is not None and (config_file := checkpoint.parent.parent / "config.toml").is_file():
        for one in list_checkpoints(checkpoint.parent):
            if one.path.name == checkpoint.name:
                return _of_checkpoint(checkpoint.parent.parent, load_config(config_file), one, ema)
    raise UserError(
        f"{place} is no longer there. Say with --run or --model which weights to draw with, such as newer ones of the "
        "same run."
    )


def _free(model: ModelConfig) -> ModelConfig:
    """Without the type that the network is stored in while it trains: samples have their own."""
    return model.model_copy(update={"network": model.network.model_copy(update={"dtype": None})})


# -- loading ---------------------------------------------------------------------------------------------------------


def load_parts(weights: Weights, device: torch.device | str, dtype: torch.dtype) -> Parts:
    """All parts that the pipeline needs: networks on ``device``, the others on the CPU until their turn.

    ``dtype``: what the network computes in; the other parts' types follow from it (`Family.part_dtype`). Adapters
    are merged into the network.
    """
    family = weights.family
    parts: Parts = {}
    for part in family.variant.parts:
        is_network = part.startswith("network")
        place = device if part == "network" else "cpu"
        parts[part] = family.load(part, place, dtype if is_network else family.part_dtype(part, dtype))
    trained: Mapping[str, nn.Module] = {}
    if weights.checkpoint is not None and weights.config is not None and (weights.config.adapter or not weights.ema):
        trained = {part: parts[part] for part in family.trained_parts()}
        _lay_over(weights, trained, weights.checkpoint)
    from kinema.adapters.files import fold_file

    for path in dict.fromkeys(path for _, path in weights.trained):
        fold_file(path, family, {part: parts[part] for part, one in weights.trained if one == path})
    for path, factor in weights.adapters:
        fold_file(path, family, {part: parts[part] for part in family.trainable_parts()}, factor)
    for network in trained.values():
        network.eval().requires_grad_(False)
    return parts


def _lay_over(weights: Weights, networks: Mapping[str, nn.Module], checkpoint: Path) -> None:
    """Put a checkpoint's trained weights on the networks: all of them, or adapters, which are then merged."""
    from kinema.adapters.inject import add_planned, merge_adapter
    from kinema.adapters.targets import adaptable_modules, plan_layers
    from kinema.runs.trained import lay_over

    config, family = weights.config, weights.family
    assert config is not None
    if config.adapter is not None:
        modules = {part: adaptable_modules(network) for part, network in networks.items()}
        defaults = {part: family.adapter_targets(part) for part in networks}
        for part, plan in plan_layers(modules, config.adapter, defaults).items():
            add_planned(networks[part], config.adapter, plan, config.run.seed)
    else:
        for network in networks.values():
            network.requires_grad_(True)
    lay_over(networks, checkpoint, weights.ema)
    if config.adapter is not None:
        for network in networks.values():
            merge_adapter(network)
