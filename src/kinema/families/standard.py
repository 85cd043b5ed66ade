"""What is the same for every family whose models are laid out as a diffusers pipeline: finding and loading parts,
their identity, their pipeline, the checks that need no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kinema.config.model import PartConfig
from kinema.config.schema import Config
from kinema.config.section import QUANTIZED
from kinema.data.batch import Sample
from kinema.dtypes import torch_dtype
from kinema.errors import ConfigError, UserError
from kinema.families.base import Family, Parts, Variant
from kinema.families.checks import check_controls, check_dropout, check_options, check_sizes
from kinema.families.from_runs import needing_its_base
from kinema.families.identity import part_identity
from kinema.families.latents import encode_pixels, latent_statistics, pixels_of
from kinema.families.layout import Layout
from kinema.families.loading import (
    CONFIGS,
    Found,
    PartSpec,
    Source,
    build,
    find,
    is_hub_id,
    kept_in_float32,
    load_weights,
    part_config,
    read_json,
    with_config,
)
from kinema.families.stored import load_quantized
from kinema.families.tensors import looks_like, tensor_shapes
from kinema.randomness import derive_seed
from kinema.runs.checkpoint_list import META
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class StandardFamily(Family):
    """A family with a table of parts. A subclass states its tables, what it encodes, and its network's habits."""

    parts: ClassVar[Mapping[str, PartSpec]]
    """Every part that some variant has, by its name."""
    network_layout: ClassVar[Layout]
    """The original layout of the network."""
    block_lists: ClassVar[tuple[str, ...]]
    """Names of the network's lists of repeated blocks, in the order in which they run."""
    configs: ClassVar[Path | None] = None
    """Where its published configurations lie, ``<variant>/<folder>/...``; None: with kinema, under its name."""
    encoding_version: ClassVar[str]
    """Part of every fingerprint: change it when the same weights are made to encode something else."""

    def spec(self, part: str) -> PartSpec:
        """One part as this variant has it; families whose variants differ in a part override this."""
        return self.parts[part]

    # -- which variant ---------------------------------------------------------------------------------------------

    @property
    def variant(self) -> Variant:
        return self.variants[self._variant_name]

    @cached_property
    def _variant_name(self) -> str:
        name = self.config.variant or self._detect_variant()
        if name not in self.variants:
            raise ConfigError(
                f"model.variant: {self.name} has no variant '{name}'{did_you_mean(name, self.variants)} "
                f"Known: {', '.join(self.variants)}."
            )
        return name

    def _detect_variant(self) -> str:
        """From the files at the network's place; ConfigError if they leave it open."""
        found = self._find("network", weights=False) or self._find("network")
        if found is None:
            raise ConfigError(
                f"model.variant: name one ({', '.join(self.variants)}), or give model.path to read it from."
            )
        if found.model is not None:  # of a run, which knows
            with needing_its_base(found.place):
                return type(self)(found.model)._variant_name
        path = self._config_file("network", found)
        described = read_json(path) if path else {}
        fitting = self._fitting(described)
        index = found.place.parent / "model_index.json"
        pipeline = read_json(index).get("_class_name", "") if index.is_file() else ""
        fitting = [name for name in fitting if self.variants[name].pipeline == pipeline] or fitting
        name = self.detect(fitting, described, found)
        if name is None:
            appearance = "" if described else f" (it looks like {looks_like(tensor_shapes(found.files))})"
            raise UserError(
                f"model.variant: {found.place}{appearance} does not say which variant of {self.name} it is. Name one: "
                f"{', '.join(fitting or self.variants)}."
            )
        return name

    def _fitting(self, described: Mapping[str, Any]) -> list[str]:
        """Variants whose shipped configuration of the network agrees with this one."""
        fitting: list[str] = []
        if not self.spec("network").model.endswith(f":{described.get('_class_name')}"):
            return fitting
        for name in self.variants:
            path = self._shipped(name, self.spec("network"))
            shipped = read_json(path) if path is not None else {}
            settings = {key: value for key, value in shipped.items() if not key.startswith("_")}
            if settings and all(described.get(key, value) == value for key, value in settings.items()):
                fitting.append(name)
        return fitting

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        """Choose the variant, or None: ``fitting`` are those whose network has this configuration (and whose pipeline
        the model's index names); ``described`` is the configuration, or {}; ``found`` is where the network lies."""
        return fitting[0] if len(fitting) == 1 or (len(self.variants) == 1 and described) else None

    # -- loading ---------------------------------------------------------------------------------------------------

    def _find(self, part: str, *, weights: bool = True) -> Found | None:
        return find(self.config, part, self.spec(part), weights=weights)

    def _config_file(self, part: str, found: Found | None) -> Path | None:
        """The part's configuration file: beside its weights, else (a single file) in the model's directory."""
        if found and found.config:
            return found.config
        if part_config(self.config, part).path is None or self.config.path is None:
            return None
        model = self.config.model_copy(update={part: PartConfig()})
        of_model = find(model, part, self.spec(part), weights=False)
        return of_model.config if of_model else None

    def _shipped(self, variant: str, spec: PartSpec) -> Path | None:
        """The configuration that ships with kinema: the variant's own, the family's, or a common one."""
        own = self.configs or CONFIGS / self.name
        places = [own / variant / spec.folder, own / spec.folder]
        places += [CONFIGS / "common" / spec.shipped] if spec.shipped else []
        return next((place / spec.config_file for place in places if (place / spec.config_file).is_file()), None)

    def ships(self, part: str) -> bool:
        """Whether the part's published configuration is at hand without its files."""
        return self._shipped(self.variant.name, self.spec(part)) is not None

    def source(self, part: str) -> Source:
        """Where a part lies and its configuration; UserError if there is neither a file nor a shipped one."""
        assert part in self.variant.parts, f"{self.variant.name} has no part {part}"
        return self._described(part, self._find(part, weights=not self._is_drawn(part)))

    def _described(self, part: str, found: Found | None) -> Source:
        """A part with its configuration: that of its files, of the run that trained it, or the one that ships."""
        spec, model = self.spec(part), f"{self.name} {self.variant.name}"
        if found is not None and found.described is not None:
            source = Source(spec, found, found.described, found.place / META, model)
        elif found is not None and found.config is None and found.model is not None:
            with needing_its_base(found.place):
                of_run = type(self)(found.model).source(part)
            source = replace(of_run, spec=spec, found=found, model_name=model)
        else:
            shipped = self._shipped(self.variant.name, spec)
            source = with_config(spec, found, self._config_file(part, found), shipped, model)
        return replace(source, config=self.configured(part, source.config))

    def configured(self, part: str, described: Mapping[str, Any]) -> Mapping[str, Any]:
        """A part's configuration as this run has it, from the one that was found with its files."""
        return described

    def is_here(self, part: str) -> bool:
        places = part_config(self.config, part).path, self.config.path
        return not any(map(is_hub_id, places)) and self._find(part) is not None

    def known_config(self, part: str) -> Mapping[str, Any]:
        """A part's configuration as far as it is known without fetching anything: the shipped one for a hub id."""
        places = part_config(self.config, part).path, self.config.path
        if is_hub_id(places[0]) or (places[0] is None and is_hub_id(places[1])):
            shipped = self._shipped(self.variant.name, self.spec(part))
            return {} if shipped is None else self.configured(part, read_json(shipped))
        return self.source(part).config

    def _is_drawn(self, part: str) -> bool:
        return part.startswith("network") and self.config.random_weights

    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        configured = part_config(self.config, part).dtype
        if configured is not None and configured not in QUANTIZED:
            dtype = torch_dtype(configured)
        source = self.source(part)
        quantized = configured in QUANTIZED and str(device) != "meta"
        if self._is_drawn(part):
            draw = partial(self._drawn, source, derive_seed(self.seed, "random_weights", part))
            if quantized:
                return load_quantized(self, part, partial(draw, "cpu", dtype), dtype).to(device)
            return draw(device, dtype)
        if source.found is None and (self.spec(part).model or (part.startswith("tokenizer") and not source.config)):
            raise UserError(self._nowhere(part))
        if (loader := self.spec(part).load) is not None:
            return loader(source)
        kind = next((kind for kind in SMALL_LOADERS if part.startswith(kind)), None)
        if kind is not None:
            return SMALL_LOADERS[kind](source)
        if quantized:  # rounded in this machine's memory: the device never holds the wider weights
            return load_quantized(self, part, partial(load_weights, source, "cpu", dtype), dtype).to(device)
        return load_weights(source, device, dtype)

    def empty(self, part: str) -> nn.Module:
        source = self._described(part, self._find(part, weights=False))
        return build(source.spec, source.config, empty=True).eval().requires_grad_(False)

    def _drawn(self, source: Source, seed: int, device: str | torch.device, dtype: torch.dtype | None) -> nn.Module:
        import torch

        if torch.device(device).type == "meta":
            return build(source.spec, source.config, empty=True).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build(source.spec, source.config)
            self.initialise(network)
        if dtype is not None:
            exact = kept_in_float32(network, dtype)
            for name, parameter in network.named_parameters():
                parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else dtype)
        return network.to(device).eval().requires_grad_(False)

    def initialise(self, network: nn.Module) -> None:
        """Draw the weights that its authors start training from; by default those that its class draws."""

    def _nowhere(self, part: str) -> str:
        spec = self.spec(part)
        near = f", put it beside model.{spec.beside}.path" if spec.beside else ""
        return (
            f"model.{part}.path: there is nowhere to load the {spec.what} from. Give its path or a hub id "
            f"(for instance {spec.hub or self.variant.hub}){near}, or give model.path = a whole model."
        )

    def fingerprint(self, parts: Sequence[str]) -> str:
        identities = [self.encoding_version]
        for part in parts:
            source = self.source(part)
            drawn = self._is_drawn(part)
            identity = f"{self.seed} " if drawn else ""
            identity += part_identity(None if drawn else source.found, source.config)
            identities.append(f"{part} {identity} {part_config(self.config, part).dtype}")
        return hashlib.blake2b("\n".join(identities).encode(), digest_size=16).hexdigest()

    # -- checks ----------------------------------------------------------------------------------------------------

    def validate(self, config: Config) -> None:
        check_options(config, self.name, self.options)
        check_sizes(config, self.variant)
        check_controls(config, self.variant)
        check_dropout(config, self.variant)
        self._check_parts(config)
        self._check_trained(config)
        for part in self.needed_parts(config):
            own, near = (part_config(config.model, name).path for name in (part, self.spec(part).beside or part))
            if is_hub_id(own) or (own is None and (is_hub_id(near) or is_hub_id(config.model.path))):
                continue  # fetched when work starts
            needs_files = self.spec(part).model and not self._is_drawn(part)
            shipped = self._shipped(self.variant.name, self.spec(part))
            if self._find(part) is None and (needs_files or shipped is None):
                raise ConfigError(self._nowhere(part))

    def needed_parts(self, config: Config) -> tuple[str, ...]:
        """The parts that have to be there for this configuration."""
        return self.variant.parts

    def _check_parts(self, config: Config) -> None:
        """ConfigError for tables of parts that the variant has not, and for types of parts without weights."""
        for name, value in config.model:
            if not isinstance(value, PartConfig) or value == PartConfig():
                continue
            if name not in self.variant.parts:
                known = [part for part in self.variant.parts if part in type(config.model).model_fields]
                raise ConfigError(
                    f"model.{name}: {self.variant.name} has no such part{did_you_mean(name, known)} "
                    f"Its parts: {', '.join(known)}."
                )
            if value.dtype is not None and not self.spec(name).model:
                raise ConfigError(f"model.{name}.dtype: a {self.spec(name).what} has no weights; leave the key out.")

    def _check_trained(self, config: Config) -> None:
        known = self.trainable_parts()
        for part in config.optimizer.part_lr:
            if part not in self.trained_parts():
                trained = ", ".join(self.trained_parts())
                raise ConfigError(f"optimizer.part_lr: '{part}' does not train here. What does: {trained}.")
        for part in self.trained_parts():
            stored = part_config(config.model, part).dtype
            if stored not in QUANTIZED:
                continue
            if config.adapter is None:
                raise ConfigError(
                    f'model.{part}.dtype: "{stored}" stores weights that do not train, and the whole {part} trains '
                    "here. Add an [adapter], or choose bf16 or fp32."
                )
            if isinstance(config.parallel.dp_shard, int) and config.parallel.dp_shard > 1:
                raise ConfigError(
                    f"model.{part}.dtype: FSDP2 shards blocks whose weights have one type, which a base in "
                    f'"{stored}" has not. Set parallel.dp_shard = 1, or choose bf16.'
                )
        for part in config.model.train or ():
            if part not in known:
                raise ConfigError(
                    f"model.train: {self.variant.name} cannot train '{part}'{did_you_mean(part, known)} "
                    f"What can train: {', '.join(known)}."
                )

    def blocks(self, network: nn.Module) -> dict[str, nn.ModuleList]:
        return {name: network.get_submodule(name) for name in self.block_lists}  # type: ignore[misc]

    # -- other tools -----------------------------------------------------------------------------------------------

    def pipeline(self, parts: Parts) -> Any:
        return self.pipeline_class(**self.pipeline_modules(parts))

    @property
    def pipeline_class(self) -> Any:
        """The diffusers pipeline of the variant."""
        import diffusers

        return getattr(diffusers, self.variant.pipeline)

    def pipeline_modules(self, parts: Parts) -> dict[str, Any]:
        """The pipeline's components by its own names; small parts that are not given are loaded, models are None."""
        modules = {self.spec(part).folder: parts.get(part) for part in self.variant.parts}
        if modules.get("scheduler") is None and "scheduler" in self.variant.parts:
            modules["scheduler"] = self.load("scheduler", "cpu", None)
        return modules

    def text_pipeline(self, parts: Parts) -> Any:
        """A pipeline over these parts alone, for what its own methods make of text and pictures."""
        modules = {self.spec(part).folder: parts.get(part) for part in self.variant.parts}
        return self.pipeline_class(**modules)

    def folder(self, part: str) -> str:
        return self.spec(part).folder

    def layout(self, part: str = "network") -> Layout:
        if part.startswith("network"):
            return self.network_layout
        return super().layout(part)

    # -- latents ---------------------------------------------------------------------------------------------------

    def latent_statistics(self, autoencoder: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """(offset, scale) with normalised = (raw - offset) / scale, for raw latents [B, C, T, H, W]."""
        return latent_statistics(autoencoder, like)

    def encode_latents(self, autoencoder: Any, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """``latents`` and ``latents_std`` [C, T, H, W] of each sample's clip."""
        mean, std = encode_pixels(autoencoder, pixels_of(samples))
        return [{"latents": m, "latents_std": s} for m, s in zip(mean, std, strict=True)]


def _load_scheduler(source: Source) -> Any:
    import diffusers

    return getattr(diffusers, source.config["_class_name"]).from_config(dict(source.config))


def _load_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    # One without a vocabulary (bytes) is all in its configuration, and may be the one that ships with kinema.
    place = source.config_path.parent if source.found is None else source.found.place
    return AutoTokenizer.from_pretrained(place, local_files_only=True)


def _load_clip_processor(source: Source) -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**{k: v for k, v in source.config.items() if k != "image_processor_type"})


SMALL_LOADERS: dict[str, Callable[[Source], Any]] = {
    "tokenizer": _load_tokenizer,
    "scheduler": _load_scheduler,
    "image_processor": _load_clip_processor,
}
"""How parts without weights are loaded, by the beginning of their name, unless their `PartSpec` says otherwise."""
