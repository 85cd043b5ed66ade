"""Longer videos: further stretches, each of which is told how the video before it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kinema.randomness import derive_seed

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from kinema.families.base import Family
    from kinema.sampling.pipeline import SampleSettings


def extended(
    family: Family, pipeline: Any, members: Sequence[SampleSettings], arguments: Mapping[str, Any], drawn: Tensor
) -> Tensor:
    """The videos of one call [B, T, 3, H, W] in [0, 1], with the stretches that their settings ask for.

    ``arguments``: those of the call. The noise of a stretch comes from the seed and the length before it, so that it
    depends on neither the number of stretches nor the rest of the batch.
    """
    first = members[0]
    if hasattr(pipeline, "extend"):
        return _by_pipeline(pipeline, members, arguments, drawn)
    assert len(members) == 1, "a stretch has a first frame of its own"
    whole = drawn
    for _ in range(first.extend or 0):
        last = family.sampling_arguments(first.guidance, [_picture(whole[0, -1])], first.text_length)
        stretch = pipeline(**{**arguments, **last, "generator": [_generator(first.seed, whole.shape[1])]})[0]
        whole = _joined(whole, stretch)
    return whole


def _by_pipeline(
    pipeline: Any, members: Sequence[SampleSettings], arguments: Mapping[str, Any], drawn: Tensor
) -> Tensor:
    """By a pipeline that can be told several frames."""
    first = members[0]
    own = {"height", "width", "generator", "output_type", "return_dict", "condition", "references"}
    further = {name: value for name, value in arguments.items() if name not in own}
    if first.has_strategy:  # its further parts are for further stretches
        further |= {name: arguments[name] for name in ("condition", "references") if name in arguments}
    return pipeline.extend(
        drawn,
        stretches=first.extend,
        overlap=first.overlap,
        edit=first.edit or 0.0,
        seed=[one.seed for one in members],
        **further,
    )


def _picture(frame: Tensor) -> Image.Image:
    """A frame [3, H, W] in [0, 1] as it would be written."""
    from PIL import Image

    levels = (frame.float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _generator(seed: int, length: int) -> torch.Generator:
    import torch

    return torch.Generator("cpu").manual_seed(derive_seed(seed, "extend", length))


def _joined(whole: Tensor, stretch: Tensor) -> Tensor:
    """Without the stretch's first frame, which stands for the last one of the video."""
    import torch

    return torch.cat([whole.float().cpu(), stretch[:, 1:].float().cpu()], dim=1)
