"""What a family's entry in the suite says (`Case`), and what the suite's proofs share.

The suite runs diffusers' own pipeline, loaded by diffusers alone from the tiny directory, and records every call of
its network. An entry says how to read such a call: which latents and times it holds, and whose captions. Everything
else is the same for all families.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Batch, Sample
from kinema.families.base import Family
from kinema.families.registry import family_class, open_family

PROMPT = "  a red ball moves left & the blue\n\tbox   right "  # spaces, line ends, unknown characters
NEGATIVE = "green"
Inputs = dict[str, Any]
"""The arguments of one call of a network, by the names of its parameters, defaults filled in."""
IGNORED = ("return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One variant. Override the methods where the defaults, which are those of a text-to-image model with one call of
    the network for each prompt, do not fit. All methods may use diffusers' own functions."""

    family: str
    variant: str
    height: int = 32
    width: int = 48
    frames: int = 1
    controls: int = 0
    """How many control pictures a sample has."""
    model: Mapping[str, Any] | None = None
    """Further keys of ``[model]``."""
    unused: tuple[str, ...] = ()
    """Regular expressions (full match) of parameters that no output depends on; say why in a comment."""
    lr: float = 3e-3
    """Of the thirty steps on one batch."""
    converter: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """diffusers' own converter of the original layout's network, if it works at tiny size."""
    comfyui_loader: bool = False
    """Whether diffusers' LoRA loader reads the family's original names (at tiny size)."""
    tolerance: float = 1e-5
    """Between what the pipeline hands over and what we do, in units of values about 1."""
    last_sigma: float = 0.0
    """The noise that the pipeline's last step leaves, as EDM counts it: x_0 + sigma eps."""
    fp8_tolerance: float = 0.1
    """Relative error of the output with the frozen base stored in float8."""

    @property
    def id(self) -> str:
        return f"{self.family}-{self.variant}"

    @property
    def clip(self) -> Tensor:
        """uint8 [3, T, H, W]: smooth in space, so that resizing in an encoder is no lottery."""
        return _smooth(3, self.frames, self.height, self.width)

    @property
    def control_pictures(self) -> tuple[Tensor, ...]:
        """uint8 [3, 1, H, W] each."""
        return tuple(_smooth(11 + i, 1, self.height, self.width) for i in range(self.controls))

    def pipeline_class(self, family: Family) -> Any:
        """The class that diffusers' own pipeline is loaded by; families that diffusers lacks have theirs elsewhere."""
        import diffusers

        return getattr(diffusers, family.variant.pipeline)

    def components(self, family: Family, directory: Path) -> dict[str, Any]:
        """Components of the pipeline, by its names, that diffusers cannot load here by itself."""
        return {}

    def mend(self, pipeline: Any) -> None:
        """Undo what diffusers' pipeline is known to do wrong; say which of its issues it is."""

    def arguments(self, guided: bool) -> dict[str, Any]:
        """The pipeline call's further arguments. ``guided`` False turns classifier-free guidance off, so that the
        network is called once a step, for the prompt alone."""
        return {"guidance_scale": 5.0 if guided else 1.0}

    def captions(self, number: int) -> list[str]:
        """The caption of each row of the ``number``-th call (from 0) with guidance on."""
        return [PROMPT if number % 2 == 0 else NEGATIVE]

    def x_t(self, family: Family, inputs: Inputs) -> Tensor:
        """The noisy latents of a call, unpacked and on the flow path: [B, C, T, H, W]."""
        hidden: Tensor = inputs["hidden_states"]
        return hidden[:, :, None] if hidden.ndim == 4 else hidden

    def t(self, family: Family, inputs: Inputs) -> Tensor:
        """The time of a call in [0, 1], 1 is noise: [B], or per latent position [B, 1, T, H, W]."""
        time: Tensor = inputs["timestep"]
        return time / 1000

    def visible(self, inputs: Inputs) -> Inputs:
        """A call's arguments without what the network's own masks hide, where captions are stored without padding:
        that need not be equal, and the suite proves that no output depends on it."""
        return inputs

    def told(self, family: Family, conditioning: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
        """What the network is told of a call besides x_t and t: as for training, unless sampling knows more (where the
        step of a mean flow ends)."""
        return conditioning

    def exact_t(self, pipeline: Any, step: int, t: Tensor) -> Tensor:
        """The time of a step, where the scheduler rounds what it tells the network: its own sigma."""
        return t

    def answer(self, family: Family, native: Tensor, inputs: Inputs) -> Any:
        """What the network would return (with ``return_dict = False``, without the tuple) if its native prediction
        were ``native`` [B, C, T, H, W]."""
        return native[:, :, 0] if inputs["hidden_states"].ndim == 4 else native

    def encoded(self, autoencoder: Any, clip: Tensor) -> Tensor:
        """What the autoencoder makes of a clip [1, 3, T, H, W] in [-1, 1], not normalised: [1, C, T, H, W]."""
        from kinema.families.latents import is_picture_autoencoder

        inputs = clip[:, :, 0] if is_picture_autoencoder(autoencoder) else clip
        return self.decoded(autoencoder.encode(inputs).latent_dist.mode())

    def decoded(self, latents: Tensor) -> Tensor:
        """What the pipeline gives its autoencoder to decode, as [B, C, T, H, W]."""
        return latents[:, :, None] if latents.ndim == 4 else latents


@cache
def _smooth(seed: int, frames: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(1, 3, frames, 4, 6, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0]
    return (fine * 255).to(torch.uint8)


def picture(pixels: Tensor, frame: int = 0) -> Any:
    """One frame of uint8 [3, T, H, W] as a PIL picture."""
    from PIL import Image

    return Image.fromarray(pixels[:, frame].permute(1, 2, 0).numpy())


# -- our side --------------------------------------------------------------------------------------------------------


def family_of(case: Case, directory: Path, **model: Any) -> Family:
    """The family over the tiny directory."""
    keys = {"family": case.family, "variant": case.variant, "path": str(directory)}
    return open_family(ModelConfig.model_validate(keys | dict(case.model or {}) | model))


def config_of(case: Case, directory: Path, root: Path, **tables: Any) -> Config:
    """A whole configuration over the tiny directory."""
    model = {"family": case.family, "variant": case.variant, "path": str(directory), **(case.model or {})}
    return Config.model_validate(
        {
            "run": {"dir": str(root / "run")},
            "model": model | tables.pop("model", {}),
            "data": {"sources": [{"path": str(root)}]},
            "training": {"steps": 1, "precision": "fp32"},
        }
        | tables
    )


def encode(case: Case, family: Family, parts: dict[str, Any], caption: str) -> dict[str, Tensor]:
    """All encodings of the case's clip with a caption; each encoder gets the parts that it named and no others."""
    tensors: dict[str, Tensor] = {}
    for encoding in family.encodings():
        needed = {part: parts[part] for part in encoding.parts}
        pixels = case.clip if encoding.reads_pixels else None
        sample = Sample(caption, pixels, case.control_pictures if encoding.controls else ())
        (row,) = family.encode(encoding, needed, [sample])
        assert all(v.device.type == "cpu" and not v.requires_grad for v in row.values()), encoding.name
        assert not tensors.keys() & row.keys(), "two encodings give tensors of one name"
        tensors |= row
    return tensors


def batch_of(*samples: dict[str, Tensor], captions: Sequence[str] = ()) -> Batch:
    count = len(samples)
    tensors = {name: [sample[name] for sample in samples] for name in samples[0]}
    return Batch(0, tensors, list(captions or [""] * count), list(range(count)), [1 / count] * count)


def network_parts(family: Family) -> list[str]:
    return [part for part in family.variant.parts if part.startswith("network")]


# -- diffusers' side -------------------------------------------------------------------------------------------------


def their_pipeline(case: Case, family: Family, directory: Path) -> Any:
    """The pipeline as diffusers loads it."""
    given = case.components(family, directory)
    pipeline = case.pipeline_class(family).from_pretrained(directory, **given)
    pipeline.set_progress_bar_config(disable=True)
    case.mend(pipeline)
    return pipeline


def bound(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The arguments of a call by name, without those that do not reach the numbers, tensors copied."""
    signature = inspect.signature(type(network).forward)
    call = signature.bind(network, *args, **kwargs)
    call.apply_defaults()
    return {k: _copied(v) for k, v in call.arguments.items() if k not in ("self", *IGNORED)}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(one) for one in value)
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def recording(*networks: nn.Module) -> Iterator[list[Inputs]]:
    """All calls of the networks inside."""
    calls: list[Inputs] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(bound(module, args, kwargs))

    handles = [network.register_forward_pre_hook(hook, with_kwargs=True) for network in networks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run_pipeline(case: Case, pipeline: Any, guided: bool, steps: int = 3) -> None:
    """Sample once, from a fixed seed."""
    known = inspect.signature(type(pipeline).__call__).parameters
    sizes = {"height": case.height, "width": case.width}  # some pipelines make samples of their pictures' size
    arguments: dict[str, Any] = {"prompt": PROMPT} | {name: size for name, size in sizes.items() if name in known}
    if guided and "negative_prompt" in known:
        arguments["negative_prompt"] = NEGATIVE
    if case.frames > 1 and "num_frames" in known:
        arguments["num_frames"] = case.frames
    arguments |= case.arguments(guided)
    pipeline(
        **arguments, num_inference_steps=steps, generator=torch.Generator().manual_seed(5), output_type="np"
    )  # fmt: skip


def assert_same(ours: Any, theirs: Any, tolerance: float, where: str) -> None:
    """Tensors (in any nesting) with the same shapes and values; everything else equal."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), f"{where}: {type(ours).__name__}, not a tensor"
        assert ours.shape == theirs.shape, f"{where}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        scale = max(1.0, float(theirs.double().abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=0, atol=tolerance * scale, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(theirs, (list, tuple)):
        assert isinstance(ours, (list, tuple)) and len(ours) == len(theirs), f"{where}: {ours} != {theirs}"
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, tolerance, f"{where}[{i}]")
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), f"{where}: {ours.keys()} != {theirs.keys()}"
        for key in theirs:
            assert_same(ours[key], theirs[key], tolerance, f"{where}.{key}")
    else:
        assert ours == theirs, f"{where}: {ours!r} != {theirs!r}"


def tiny_directory(case: Case, root: Path) -> Path:
    """The tiny model of the case, written."""
    return family_class(case.family).tiny(root / case.id, case.variant, seed=1)
