"""How many frames a clip may have, by what a model's autoencoder takes whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipLengths:
    """One frame, a picture; and ``first``, ``first + stride``, ``first + 2 stride``... frames.

    A causal autoencoder makes one latent of its first frame and one of each ``stride`` further ones: ``first`` is 1.
    """

    stride: int = 4
    first: int = 1

    def __contains__(self, frames: int) -> bool:
        return frames == 1 or (frames >= self.first and (frames - self.first) % self.stride == 0)

    def __str__(self) -> str:
        """Such as "4 k + 1", to stand before "frames"."""
        if self.stride == 1:
            return "any number of"
        if self.first == 1:
            return f"{self.stride} k + 1"
        return ", ".join(map(str, (1, self.first, self.first + self.stride, self.first + 2 * self.stride))) + "..."

    def latents(self, frames: int) -> int:
        """Latent frames of a clip."""
        return 1 if frames == 1 else -(-frames // self.stride)

    def behind(self, frames: int) -> list[slice]:
        """Which frames of a clip each of its latent frames is made of."""
        first = frames - (self.latents(frames) - 1) * self.stride
        return [slice(0, first), *(slice(begin, begin + self.stride) for begin in range(first, frames, self.stride))]

    def at_most(self, frames: int) -> int:
        """The longest clip of no more than ``frames``, 1 at least."""
        return 1 if frames < self.first else frames - (frames - self.first) % self.stride

    def nearest(self, frames: int) -> tuple[int, ...]:
        """The lengths below and above one that is not among these."""
        if frames < 1:
            return (1,)
        below = self.at_most(frames)
        return below, self.first if below < self.first else below + self.stride

    def between(self, least: int, most: int) -> list[int]:
        """All lengths from ``least`` to ``most``."""
        return [frames for frames in range(least, most + 1) if frames in self]


CAUSAL = ClipLengths()
"""Those of most video autoencoders: 4 k + 1."""
