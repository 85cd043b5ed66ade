"""What Wan's encoders make of captions and clips, as diffusers' pipelines would; and its network's first weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kinema.data.batch import Sample
from kinema.errors import UserError
from kinema.families.latents import encode_pixels, pixels_of

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

MASK_CHANNELS = 4
"""Frames of the video that one latent frame stands for."""


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


def encode_image(encoder: Any, processor: Any, samples: Sequence[Sample], frames: Sequence[int] = (0,)) -> list[Tensor]:
    """Hidden states before CLIP's last layer, of these frames of each sample's clip: [tokens, C] of one frame,
    [frames, tokens, C] of several."""
    from PIL import Image

    clips = [sample.pixels for sample in samples if sample.pixels is not None]
    pictures = [Image.fromarray(clip[:, i].permute(1, 2, 0).cpu().numpy()) for clip in clips for i in frames]
    inputs = processor(images=pictures, return_tensors="pt").to(encoder.device)
    hidden = encoder(**inputs, output_hidden_states=True).hidden_states[-2].cpu()
    return list((hidden if len(frames) == 1 else hidden.unflatten(0, (-1, len(frames)))).unbind(0))


def encode_ends(autoencoder: Any, samples: Sequence[Sample], *, last: bool) -> list[Tensor]:
    """Normalised latents [C, T, H, W] of each clip with all but its first frame (and with ``last`` its last one) grey,
    as at sampling."""
    video = pixels_of(samples)
    video[:, :, 1 : -1 if last else None] = 0
    mean, _ = encode_pixels(autoencoder, video)
    return list(mean)


def ends_mask(latents: Tensor, *, last: bool) -> Tensor:
    """Which frames of the video are given, [B, 4, T, H, W] for latents [B, C, T, H, W]: one channel for each frame of a
    latent, of which the first stands for one frame."""
    mask = latents.new_zeros(len(latents), MASK_CHANNELS, *latents.shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return mask


def initialise_network(network: nn.Module) -> None:
    """The random weights that its authors start from (``init_weights`` in Wan2.1's model.py): Xavier for linear layers
    and patches, N(0, 0.02) for the embeddings of text and time, zero for the output."""
    from torch import nn

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            if "text_embedder" in name or "time_embedder" in name:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.get_submodule("patch_embedding").weight.data.flatten(1))  # type: ignore
    nn.init.zeros_(network.get_submodule("proj_out").weight)  # type: ignore[arg-type]
