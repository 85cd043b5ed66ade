"""What Wan's encoders make of captions and clips, as diffusers' pipelines would; and its network's first weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.errors import ConfigError, UserError
from kinema.families.loading import Source, build, kept_in_float32

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)


def encode_text(encoder: Any, tokenizer: Any, captions: Sequence[str], length: int) -> list[Tensor]:
    """Embeddings [tokens, C] of each caption on the CPU, cut to its own tokens.

    Captions are padded to ``length`` for the encoder, so that one does not depend on the others in its batch.
    """
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    vocabulary = encoder.config.vocab_size
    if not vocabulary // 2 < len(tokenizer) <= vocabulary:
        raise UserError(
            f"model.tokenizer.path: this tokenizer has {len(tokenizer)} pieces and does not belong to a text encoder "
            f"that knows {vocabulary}. Give the one that was published with it."
        )
    cleaned = [prompt_clean(caption) for caption in captions]
    for caption, ids in zip(captions, tokenizer(cleaned).input_ids, strict=True):
        if len(ids) > length:
            log.warning("a caption has %d tokens, the last %d are cut: %.60s...", len(ids), len(ids) - length, caption)
    tokens = tokenizer(
        cleaned,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    device = encoder.get_input_embeddings().weight.device
    hidden = encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state.cpu()
    counts = tokens.attention_mask.sum(dim=1).tolist()
    return [row[:count].clone() for row, count in zip(hidden, counts, strict=True)]


def encode_video(autoencoder: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior of video [B, 3, T, H, W] in [-1, 1], both normalised to the
    latents' published statistics: float32 [B, C, t, h, w] on the CPU."""
    posterior = autoencoder.encode(video.to(autoencoder.device, autoencoder.dtype)).latent_dist
    mean, std = (posterior.mean.float().cpu(), posterior.std.float().cpu())
    offset, scale = (
        mean.new_tensor(values).view(1, -1, 1, 1, 1)
        for values in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    return (mean - offset) / scale, std / scale


def encode_image(encoder: Any, processor: Any, pixels: Tensor) -> list[Tensor]:
    """Hidden states [tokens, C] before CLIP's last layer, of the first frame of clips [B, 3, T, H, W] uint8."""
    from PIL import Image

    frames = [Image.fromarray(clip[:, 0].permute(1, 2, 0).numpy()) for clip in pixels.cpu()]
    inputs = processor(images=frames, return_tensors="pt").to(encoder.device)
    return list(encoder(**inputs, output_hidden_states=True).hidden_states[-2].cpu().unbind(0))


def random_network(source: Source, seed: int, device: str | torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The network with the random weights that its authors start from (``init_weights`` in Wan2.1's model.py):
    Xavier for linear layers and patches, N(0, 0.02) for the embeddings of text and time, zero for the output."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(source.spec, source.config)
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                if "text_embedder" in name or "time_embedder" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(network.get_submodule("patch_embedding").weight.data.flatten(1))  # type: ignore
        nn.init.zeros_(network.get_submodule("proj_out").weight)  # type: ignore[arg-type]
    if dtype is not None:
        exact = kept_in_float32(network, dtype)
        for name, parameter in network.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else dtype)
    return network.to(device).eval().requires_grad_(False)


def check_sizes(config: Config, grid: int, stride: int, from_image: bool) -> None:
    """ConfigError for clip lengths and sizes that the autoencoder and the network cannot take."""
    preview = config.preview
    lengths = [("data.buckets.frames", n) for n in config.data.buckets.frames]
    lengths += [("preview.frames", preview.frames)] if preview.frames else []
    for key, frames in lengths:
        if frames % stride != 1:
            below = (frames - 1) // stride * stride + 1
            raise ConfigError(
                f"{key}: {frames} frames do not fit the autoencoder, which takes {stride} k + 1; the nearest are "
                f"{below} and {below + stride}."
            )
        if from_image and frames == 1:
            raise ConfigError(f"{key}: image-to-video needs clips, and 1 frame is a picture; leave 1 out.")
    sides = [("data.buckets.sizes", side) for size in config.data.buckets.sizes or () for side in size]
    sides += [(f"preview.{name}", side) for name in ("height", "width") if (side := getattr(preview, name))]
    for key, side in sides:
        if side % grid:
            below = max(side // grid, 1) * grid
            raise ConfigError(
                f"{key}: {side} is no multiple of {grid} (8 pixels a latent, 2 latents a token); the nearest are "
                f"{below} and {below + grid}."
            )
