"""Where the weights of a sample come from: a run, an export or base weights, with adapters merged in.

Finding them (`find_weights`) reads no weights and imports no torch; `load_parts` does the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.schema import Config, ModelConfig, PartConfig
from kinema.errors import UserError
from kinema.families.base import Family, Parts
from kinema.families.registry import family_class, family_names, open_family

if TYPE_CHECKING:
    import torch
    from torch import nn

_STEP = re.compile(r"step-(\d{8,})(?:-\d+)?")
ENDS = ("autoencoder", "image_encoder")
"""Parts that are kept in fp32: they are small, and what they lose in a shorter type is seen."""


@dataclass(frozen=True)
class Weights:
    """Everything that decides which networks are sampled."""

    family: Family
    label: str
    """For people: what is sampled."""
    config: Config | None = None
    """The run's, if weights are a run's."""
    checkpoint: Path | None = None
    """Trained weights that are laid over the base, if they come from a checkpoint."""
    ema: bool = True
    """Take a checkpoint's averaged weights where it has them."""
    adapters: tuple[tuple[Path, float], ...] = ()
    """Files and the factors that they are merged with."""


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
        found = Weights(open_family(model_config(model, family, variant)), model)
    else:
        if family is not None or variant is not None:
            raise UserError(f"--family and --variant belong to --model; {run} says itself what it trained.")
        found = _of_run(run, True if ema is None else ema)
    if run is None and ema is not None:
        raise UserError("--ema and --no-ema choose among the weights of a --run; a --model has one set of them.")
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


def model_config(model: str, family: str | None, variant: str | None) -> ModelConfig:
    """The configuration of base weights: a diffusers directory, a hub id, or a single file of a network.

    What a single file lacks (autoencoder, encoders) is taken from the variant's repository on the hub.
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
        return config
    if variant is None:
        known = ", ".join(family_class(name).variants)
        raise UserError(f"--model {model} is a single file: say which {name} it is with --variant ({known}).")
    one = open_family(config).variant
    elsewhere = PartConfig(path=one.hub)
    fields = [part for part in one.parts if part in ModelConfig.model_fields and part not in ("network", "tokenizer")]
    return config.model_copy(update={part: elsewhere for part in fields})


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
        if name in family_class(family).pipelines:
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


# -- runs ------------------------------------------------------------------------------------------------------------


def _of_run(run: Path, ema: bool) -> Weights:
    """The newest export or checkpoint of a run, whichever is later.

    An export holds the averaged weights if the run keeps an average, so where those are not wanted only
    checkpoints will do.
    """
    from kinema.config.load import load_config

    if not run.is_dir():
        raise UserError(f"--run {run}: there is no such directory.")
    if not (run / "config.toml").is_file():
        raise UserError(f"--run {run} is no run directory: it has no config.toml. An export is sampled with --model.")
    config = load_config(run / "config.toml")
    export = _newest(run / "exports", "diffusers")
    checkpoint = _newest(run / "checkpoints", "meta.json")
    if config.training.ema is not None and not ema:
        export = None
        if checkpoint is None:
            raise UserError(f"--no-ema: {run} has no checkpoint, which alone holds weights that are not averaged.")
    if export is None and checkpoint is None:
        raise UserError(f"--run {run} holds neither an export nor a checkpoint: nothing has been trained in it yet.")
    # the type that the network is sampled in is the command's to say, not that of its storage in training
    model = config.model.model_copy(update={"network": config.model.network.model_copy(update={"dtype": None})})
    if export is not None and (checkpoint is None or checkpoint[0] <= export[0]):
        path = export[1] / "diffusers"
        label = f"{run.name} at step {export[0]}"
        if config.adapter is not None:
            return Weights(open_family(model, config.run.seed), label, config, adapters=((path, 1.0),))
        exported = {"network": PartConfig(path=str(path)), "random_weights": False}
        return Weights(open_family(model.model_copy(update=exported)), label, config)
    assert checkpoint is not None
    label = f"{run.name} at step {checkpoint[0]}"
    return Weights(open_family(model, config.run.seed), label, config, checkpoint[1], ema)


def _newest(root: Path, needs: str) -> tuple[int, Path] | None:
    """(step, path) of the newest complete ``step-*`` of a directory, by the time of writing among equal steps."""
    found = [
        (int(match[1]), path.stat().st_mtime, path)
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and (path / needs).exists()
    ]
    if not found:
        return None
    step, _, path = max(found)
    return step, path


# -- loading ---------------------------------------------------------------------------------------------------------


def load_parts(weights: Weights, device: torch.device | str, dtype: torch.dtype) -> Parts:
    """All parts that the pipeline needs: networks on ``device``, the others on the CPU until their turn.

    Networks and text encoders have ``dtype``, the others fp32, where the configuration does not say otherwise.
    Adapters are merged into the network, in fp32.
    """
    family = weights.family
    parts: Parts = {}
    for part in family.variant.parts:
        if part != "network":
            parts[part] = family.load(part, "cpu", part_dtype(part, dtype))
    parts["network"] = _network(weights, device, dtype)
    return parts


def part_dtype(part: str, dtype: torch.dtype) -> torch.dtype:
    """The type that a part is sampled with, where the configuration names none."""
    import torch

    return torch.float32 if part in ENDS else dtype


def _network(weights: Weights, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    import torch

    family = weights.family
    changed = weights.checkpoint is not None or bool(weights.adapters)
    # what is merged or laid over is so in fp32, and rounded once
    network: nn.Module = family.load("network", device, torch.float32 if changed else dtype)
    if weights.checkpoint is not None:
        _lay_over(weights, network, weights.checkpoint)
    for path, factor in weights.adapters:
        _merge(family, network, path, factor)
    if changed:
        network = _rounded(network, dtype)
    return network.eval().requires_grad_(False)


def _rounded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In ``dtype``, but for the modules that must stay in fp32."""
    import torch

    exact = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype != torch.float32 else set()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and not exact & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return network


def _merge(family: Family, network: nn.Module, path: Path, factor: float) -> None:
    from kinema.adapters.files import read_adapter
    from kinema.adapters.lora import adaptable_modules, attach_adapter, merge_adapter

    adapter = read_adapter(path, family, adaptable_modules(network))
    attach_adapter(network, replace(adapter, alpha=adapter.alpha * factor))
    merge_adapter(network)


def _lay_over(weights: Weights, network: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's trained weights on the network: all of it, or an adapter, which is then merged."""
    import torch

    from kinema.adapters.lora import add_adapter, merge_adapter
    from kinema.parallel.mesh import World
    from kinema.training.checkpoint import contents, load
    from kinema.training.state import named_trainables

    config, family = weights.config, weights.family
    assert config is not None
    if config.adapter is not None:
        add_adapter(network, config.adapter, family.adapter_targets(), config.run.seed)
    else:
        network.requires_grad_(True)
    ((name, trained),) = family.trainables({"network": network}).items()
    stored = contents(checkpoint)
    group = "ema" if weights.ema and any(key.startswith("ema.") for key in stored) else "networks"
    parameters = named_trainables({name: trained})
    # in the types that they were saved in, which may differ from the network's
    tensors = {
        key: torch.empty(value.shape, dtype=stored.get(f"{group}.{key}", ((), value.dtype))[1])
        for key, value in parameters.items()
    }
    world = World(0, 1, 0, torch.device("cpu"), 0, 1, 1, 1, None)
    load(checkpoint, {group: tensors}, world)
    with torch.no_grad():
        for key, value in parameters.items():
            value.copy_(tensors[key])
    if config.adapter is not None:
        merge_adapter(network)
