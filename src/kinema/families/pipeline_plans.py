"""Where a pipeline can cut each network: facts by the class of the network, which diffusers names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kinema.families.class_facts import of_class

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Unit:
    """What a pipeline can cut before and after, in the order of execution."""

    name: str
    """Its path in the network."""
    outputs: tuple[str, ...]
    """For each output the argument that stands in for it where the unit is absent."""
    returns: Literal["tensor", "tuple", "tensor and tuple"]
    """How they are returned: the one, all in a tuple, or the first and a tuple of the rest."""
    last_use: tuple[int, ...]
    """For each output the index of the last unit that needs it; the next unit, but for what goes round some units."""

    def flat(self, output: Any) -> tuple[Tensor, ...]:
        """Outputs as a block returned them, in a row."""
        if self.returns == "tensor":
            return (output,)
        return tuple(output) if self.returns == "tuple" else (output[0], *output[1])

    def returned(self, values: Sequence[Tensor]) -> Any:
        """The inverse."""
        if self.returns == "tensor":
            return values[0]
        return tuple(values) if self.returns == "tuple" else (values[0], tuple(values[1:]))


_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_PICTURE_FIRST = ("hidden_states", "encoder_hidden_states")
_FLUX = {"transformer_blocks": _TEXT_FIRST, "single_transformer_blocks": _TEXT_FIRST}
_HUNYUAN = {"transformer_blocks": _PICTURE_FIRST, "single_transformer_blocks": _PICTURE_FIRST}

STREAMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks": _TEXT_FIRST},
    "ChromaTransformer2DModel": {"transformer_blocks": _TEXT_FIRST},
    "FluxTransformer2DModel": _FLUX,
    "HiDreamImageTransformer2DModel": {"double_stream_blocks": _PICTURE_FIRST},
    "HunyuanImageTransformer2DModel": _HUNYUAN,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "OpenSoraTransformer": {"double_blocks": ("video", "text")},
    "QwenImageTransformer2DModel": {"transformer_blocks": _TEXT_FIRST},
    "SD3Transformer2DModel": {"transformer_blocks": _TEXT_FIRST},
}
"""Lists whose blocks return several streams: the arguments that these were, in the order of what is returned. All other
blocks return one tensor, which was their first argument."""

BRANCHES: Mapping[str, Mapping[str, str]] = {
    "Lumina2Transformer2DModel": {"context_refiner": "layers"},
    "OmniGen2Transformer2DModel": {"context_refiner": "layers", "noise_refiner": "layers"},
    "ZImageTransformer2DModel": {"noise_refiner": "layers"},
}
"""Lists whose result goes round the lists behind them, and the list whose first block needs it."""


def pipeline_units(network: nn.Module, blocks: Mapping[str, nn.ModuleList]) -> list[Unit]:
    """What a network can be cut between, in the order of execution. ``blocks`` are its family's lists."""
    if hasattr(network, "down_blocks"):
        return _unet_units(network)
    streams, branches = of_class(network, STREAMS) or {}, of_class(network, BRANCHES) or {}
    first, total = {}, 0
    for name, group in blocks.items():
        first[name] = total
        total += len(group)
    units: list[Unit] = []
    for name, group in blocks.items():
        for i, block in enumerate(group):
            outputs = streams.get(name, (_first_argument(block),))
            last_use = len(units) + 1
            if name in branches and i == len(group) - 1:
                last_use = first[branches[name]]
            returns = "tuple" if name in streams else "tensor"
            units.append(Unit(f"{name}.{i}", outputs, returns, (last_use,) * len(outputs)))  # type: ignore[arg-type]
    return units


def _first_argument(block: nn.Module) -> str:
    return list(inspect.signature(type(block).forward).parameters)[1]


def _unet_units(network: nn.Module) -> list[Unit]:
    """The levels of a U-Net. Those that go down return what each of their layers made beside the result; each of those
    that go up takes as many of these as it has layers, the last made first, and the very first is the network's."""
    down = list(network.down_blocks)  # type: ignore[arg-type]
    up = list(network.up_blocks)  # type: ignore[arg-type]
    made = [1 + len(block.resnets) + len(block.downsamplers or ()) for block in down]
    takers = [len(down) + 1 + j for j, block in enumerate(up) for _ in block.resnets]
    takers = takers[::-1][1:]  # by when they were made, without the network's own
    units: list[Unit] = []
    for i, count in enumerate(made):
        skips, takers = takers[: count - 1], takers[count - 1 :]
        outputs = ("hidden_states",) * count
        units.append(Unit(f"down_blocks.{i}", outputs, "tensor and tuple", (i + 1, *skips)))
    assert not takers, "as many layers go up as down, and one more"
    names = ["mid_block", *(f"up_blocks.{j}" for j in range(len(up)))]
    for index, name in enumerate(names, start=len(down)):
        units.append(Unit(name, ("hidden_states",), "tensor", (index + 1,)))
    return units
