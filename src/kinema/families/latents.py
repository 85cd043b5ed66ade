"""Between pixels and normalised latents, for autoencoders as diffusers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kinema.data.batch import Encoding, Sample

if TYPE_CHECKING:
    from torch import Tensor

LATENTS = Encoding("latents", "media", ("autoencoder",))
"""What nearly every family makes of a clip."""


def pixels_of(samples: Sequence[Sample]) -> Tensor:
    """The clips of samples of one bucket, in [-1, 1], [B, C, T, H, W]."""
    import torch

    clips = [sample.pixels for sample in samples if sample.pixels is not None]
    assert len(clips) == len(samples), "this encoding reads pixels"
    return torch.stack(clips).float() / 255 * 2 - 1


def encode_pixels(autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior of pixels [B, C, T, H, W] in [-1, 1], normalised to unit scale:
    float32 [B, C, t, h, w] on the CPU. Picture autoencoders get [B, C, H, W], and T must be 1."""
    flat = is_picture_autoencoder(autoencoder)
    assert not flat or pixels.shape[2] == 1, "a picture autoencoder takes one frame"
    inputs = pixels[:, :, 0] if flat else pixels
    posterior = autoencoder.encode(inputs.to(autoencoder.device, autoencoder.dtype)).latent_dist
    mean, std = posterior.mean.float().cpu(), posterior.std.float().cpu()
    if flat:
        mean, std = mean[:, :, None], std[:, :, None]
    offset, scale = latent_statistics(autoencoder, mean)
    return (mean - offset) / scale, std / scale


def is_picture_autoencoder(autoencoder: Any) -> bool:
    """Whether it takes single pictures [B, C, H, W] and no videos."""
    from torch import nn

    return not any(isinstance(module, nn.Conv3d) for module in autoencoder.modules())


def latent_statistics(autoencoder: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(offset, scale) with normalised = (raw - offset) / scale, from an autoencoder's published configuration:
    per-channel mean and std where it has them, else its shift; std divided by its scaling factor."""
    config = autoencoder.config
    shape = (1, -1, *[1] * (like.ndim - 2))
    factor = getattr(config, "scaling_factor", None) or 1.0
    mean = getattr(config, "latents_mean", None)
    std = getattr(config, "latents_std", None)
    buffers = dict(autoencoder.named_buffers(recurse=False))
    if mean is None and "latents_mean" in buffers:  # LTX keeps them so
        mean, std = buffers["latents_mean"].tolist(), buffers["latents_std"].tolist()
    if mean is None:
        mean = [getattr(config, "shift_factor", None) or 0.0]
    offset = like.new_tensor(mean).view(shape)
    return offset, like.new_tensor(std if std is not None else [1.0]).view(shape) / factor
