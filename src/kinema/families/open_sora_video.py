"""Pixels to latents and back for Open-Sora, with either of its autoencoders.

AutoencoderKLHunyuanVideo is causal: 4 k + 1 frames make k + 1 latent ones, the first of them alone. `VideoDCAE` is not:
4 k frames make k latent ones, a single frame one.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from kinema.data.transform import Transform, fit
from kinema.errors import UserError

Reference: TypeAlias = "Image.Image | np.ndarray | Tensor"
"""A picture; or a video, uint8 [T, H, W, 3], or float in [-1, 1] [3, T, H, W] at the size of the sample."""


def is_causal(vae: Any) -> bool:
    """Whether the first latent frame is made of the first frame alone."""
    return not hasattr(vae, "pad_frames")


def latent_frames_of(vae: Any, frames: int, exact: bool = False) -> int:
    """Latent frames of a sample of ``frames``; UserError for a length that a causal autoencoder does not make.

    A DC-AE makes more frames than are asked for where they do not fill the last latent one. ``exact``: UserError there
    too."""
    stride = vae.temporal_compression_ratio
    causal = is_causal(vae)
    whole = frames >= 1 and ((frames - 1) % stride == 0 if causal else frames == 1 or frames % stride == 0)
    if frames < 1 or (not whole and (causal or exact)):
        first = int(causal)
        below = max(1, (frames - first) // stride * stride + first)
        above = max(1, (frames - first) // stride * stride + first + stride)
        raise UserError(
            f"{frames} frames: this autoencoder takes {stride} k{' + 1' if causal else ', or 1'}; nearest: "
            f"{below} or {above}."
        )
    if causal:
        return (frames - 1) // stride + 1
    return max(1, frames // stride) if exact else max(1, vae.padded_frames(frames) // stride)


def frame_count(vae: Any, latent_frames: int) -> int:
    """Frames that so many latent ones stand for."""
    stride = vae.temporal_compression_ratio
    return (latent_frames - 1) * stride + 1 if is_causal(vae) else latent_frames * stride


def pixels_of(reference: Reference, height: int, width: int) -> Tensor:
    """A picture or a video as float32 [3, T, height, width] in [-1, 1]: scaled to cover the size and cropped at the
    centre, as clips are for training. Tensors have to have the size; UserError if they have not."""
    if isinstance(reference, Tensor):
        if reference.ndim != 4 or reference.shape[0] != 3 or reference.shape[2:] != (height, width):
            raise UserError(
                f"A reference of shape {tuple(reference.shape)}: tensors are [3, T, {height}, {width}], the sample's "
                "size. Give pictures or uint8 arrays to have them scaled."
            )
        return reference.float()
    frames = [reference] if isinstance(reference, Image.Image) else [Image.fromarray(one) for one in reference]
    levels = np.stack([fit(one.convert("RGB"), Transform(height, width)) for one in frames], axis=1)
    return torch.from_numpy(levels).float() / 127.5 - 1


def cut_frames(pixels: Tensor, frames: int, vae: Any) -> Tensor:
    """The first so many frames of a reference, the last so many where negative; with 0 all that the autoencoder takes
    whole. UserError if there are fewer."""
    there = pixels.shape[1]
    if frames == 0:
        stride = vae.temporal_compression_ratio
        first = int(is_causal(vae))
        frames = max(1, (there - first) // stride * stride + first)
    if abs(frames) > there:
        raise UserError(
            f"This condition is told {abs(frames)} frames, and the reference has {there}. Take a longer one."
        )
    return pixels[:, :frames] if frames > 0 else pixels[:, frames:]


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents, float32 [C, t, h, w], of pixels [3, T, H, W] in [-1, 1]: the mean, where there is a
    posterior."""
    encoded = vae.encode(pixels[None].to(get_module_execution_device(vae), vae.dtype))
    if isinstance(encoded, Tensor):  # a DC-AE's, which are normalised
        return encoded[0].float()
    return encoded.latent_dist.mean[0].float() * vae.config.scaling_factor


def decode_latents(vae: Any, latents: Tensor, frames: int) -> Tensor:
    """Pixels [B, 3, frames, H, W] of normalised latents [B, C, t, h, w], float32, not clamped."""
    raw = latents / vae.config.scaling_factor if is_causal(vae) else latents
    raw = raw.to(get_module_execution_device(vae), vae.dtype)
    if is_causal(vae):
        return vae.decode(raw, return_dict=False)[0][:, :, :frames].float()
    return vae.decode(raw, frames=frames).float()
