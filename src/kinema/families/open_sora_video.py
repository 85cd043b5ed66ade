"""Pixels to latents and back for Open-Sora, with any of its autoencoders.

AutoencoderKLHunyuanVideo and AutoencoderKLWan are causal: 4 k + 1 frames make k + 1 latent ones, the first of them
alone. `VideoDCAE` is not: 4 k frames make k latent ones, a single frame one.
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
from kinema.families.latents import latent_statistics
from kinema.families.open_sora_strategy import cut_length

Reference: TypeAlias = "Image.Image | np.ndarray | Tensor"
"""A picture; or a video, uint8 [T, H, W, 3], or float in [-1, 1] [3, T, H, W] at the size of the sample."""


def is_causal(vae: Any) -> bool:
    """Whether the first latent frame is made of the first frame alone."""
    return bool(getattr(vae, "is_causal", True))  # the classes of diffusers are, and do not say so


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


def cut_frames(pixels: Tensor, frames: int, causal: bool) -> Tensor:
    """The first so many frames of a reference, the last so many where negative; with 0 all that the autoencoder takes
    whole. UserError if there are fewer."""
    frames = cut_length(frames, pixels.shape[1], causal)
    return pixels[:, :frames] if frames > 0 else pixels[:, frames:]


def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Normalised latents, float32 [C, t, h, w], of pixels [3, T, H, W] in [-1, 1]: the mean, where there is a
    posterior."""
    encoded = vae.encode(pixels[None].to(get_module_execution_device(vae), vae.dtype))
    if isinstance(encoded, Tensor):  # a DC-AE's, which are normalised
        return encoded[0].float()
    mean = encoded.latent_dist.mean.float()
    offset, scale = latent_statistics(vae, mean)
    return ((mean - offset) / scale)[0]


def decode_latents(vae: Any, latents: Tensor, frames: int) -> Tensor:
    """Pixels [B, 3, frames, H, W] of normalised latents [B, C, t, h, w], float32, not clamped."""
    raw = latents
    if is_causal(vae):
        offset, scale = latent_statistics(vae, latents)
        raw = latents * scale + offset
    raw = raw.to(get_module_execution_device(vae), vae.dtype)
    if is_causal(vae):
        return vae.decode(raw, return_dict=False)[0][:, :, :frames].float()
    return vae.decode(raw, frames=frames).float()
