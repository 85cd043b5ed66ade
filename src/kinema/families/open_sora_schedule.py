"""Open-Sora's times and guidance scales: numbers that need no network.

Facts and names follow Open-Sora 2.0 (Peng et al. 2025, arXiv 2503.09642); tests/golden/open_sora holds what it gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.families.steering import FULL_STEPS, oscillating

if TYPE_CHECKING:
    from torch import Tensor

# -- times -----------------------------------------------------------------------------------------------------------


def shift_of(tokens: int, latent_frames: int, low: float = 1.0, high: float = 3.0) -> float:
    """The shift of times for ``tokens`` of one latent frame: on the line through (256, ``low``) and (4096, ``high``),
    times the root of the number of latent frames."""
    slope = (high - low) / (4096 - 256)
    return (slope * tokens + (low - slope * 256)) * math.sqrt(latent_frames)


def shifted_time(t: Tensor, shift: float) -> Tensor:
    """t <- shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, tokens: int, latent_frames: int, shift: float | bool | None = None) -> list[float]:
    """The ``steps`` + 1 times of a sample, from 1 (noise) to 0, exact in float32.

    ``tokens``: of one latent frame, as the network counts them. ``shift``: None or True is `shift_of` the size, False
    is none, a number is itself.
    """
    import torch

    assert steps >= 1, "a sample takes at least one step"
    times = torch.linspace(1, 0, steps + 1)
    if shift is False:
        return times.tolist()
    if shift is None or shift is True:
        shift = shift_of(tokens, latent_frames)
    return shifted_time(times, shift).tolist()


# -- guidance --------------------------------------------------------------------------------------------------------


def growing_with_time(scale: float, step: int, steps: int, latent_frames: int) -> Tensor:
    """A scale for each latent frame, [T]: from 1 at the first to a largest at the last, which falls from ``scale`` in
    the first step towards 1, one step short of it in the last one."""
    import torch

    largest = torch.linspace(scale, 1.0, steps + 1)[step]
    return torch.linspace(1.0, float(largest), latent_frames)


@dataclass(frozen=True)
class Guidance:
    """How far a sample goes from what the network says unasked to what it says when told the text and the frames."""

    text: float | None = 7.5
    """None: the text is told and not guided, so that no negative text is needed."""
    image: float = 3.0
    text_osci: bool = True
    """Let the scale of the text oscillate (`oscillating`)."""
    image_osci: bool = True
    """Let the scale of the frames oscillate."""
    scale_temporal_osci: bool = True
    """Let the scale of the frames grow over the video (`growing_with_time`) while it is above 1."""
    full_steps: int = FULL_STEPS

    def scales(self, step: int, steps: int, latent_frames: int) -> tuple[float | None, float | Tensor]:
        """The scales (text, image) of one step; the image's is a tensor [T] where it differs from frame to frame."""
        text = self.text
        if text is not None and self.text_osci:
            text = oscillating(text, step, self.full_steps)
        image = oscillating(self.image, step, self.full_steps) if self.image_osci else self.image
        if self.scale_temporal_osci and image > 1.0:
            return text, growing_with_time(image, step, steps, latent_frames)
        return text, image
