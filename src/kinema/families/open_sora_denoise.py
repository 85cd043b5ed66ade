"""Open-Sora's sampler over tensors: guidance between what the network is told, and Euler's steps.

One step, for x_t in latents and v(text, frames) the velocity that the network predicts:
v = n + g_frames (f - n) + g_text (c - f), x <- x + (t_next - t) v, with c told the prompt and the frames that are
given, f the negative text and the frames, n the negative text alone. A velocity whose share in v is nil is not asked
for: where no frames are given f and n are one, and where both scales are 1 (in every low step of an oscillation) c is
all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kinema.families.open_sora_schedule import Guidance
from kinema.families.open_sora_strategy import Conditions
from kinema.networks.open_sora import pack, positions, unpack

JOINED_TOKENS = 4096
"""The passes of a step are joined to one call of the network up to so many tokens of video; beyond that a device is
busy with one of them, and joining takes memory alone."""

# -- guidance --------------------------------------------------------------------------------------------------------


class Branch(NamedTuple):
    """What the network is told in one of its passes."""

    prompt: bool
    """The prompt, or else the negative text."""
    frames: bool
    """The frames that are given, or else none."""


ALL, FRAMES = Branch(True, True), Branch(False, True)
PROMPT, NOTHING = Branch(True, False), Branch(False, False)

Predict = Callable[[Tensor, float, Tensor | None, Sequence[Branch]], Sequence[Tensor]]
"""The network: (x_t [B, C, T, H, W], t, mask and latents of the frames that are given [B, 1 + C, T, H, W] or None,
branches) to the velocity [B, C, T, H, W] of each branch."""
OnStep = Callable[[int, float, Tensor], Tensor]
"""Called with (step, its time, x after it); returns what to go on from."""


def shares(text: float | None, image: float | Tensor, given: bool) -> dict[Branch, float | Tensor]:
    """The share of each branch in the velocity of a step, of those that have any.

    ``text``: None where the text is not guided. ``image``: the scale of the frames that are given, or one for each
    latent frame [T]; ``given``: whether there are any.
    """
    if isinstance(image, Tensor):
        image = image.view(1, 1, -1, 1, 1)
    found: dict[Branch, float | Tensor]
    if not given:
        found = {ALL: 1.0} if text is None else {ALL: text, NOTHING: 1 - text}
    elif text is None:
        found = {ALL: image, PROMPT: 1 - image}
    else:
        found = {ALL: text, FRAMES: image - text, NOTHING: 1 - image}
    return {branch: share for branch, share in found.items() if torch.as_tensor(share).any()}


def denoise(
    predict: Predict,
    noise: Tensor,
    times: Sequence[float],
    guidance: Guidance | None = None,
    conditions: Conditions | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise to latents [B, C, T, H, W] through ``times``, which fall from 1 to 0.

    ``guidance`` None: no branch but the one that is told all, for networks that were distilled and are told a scale.
    ``conditions``: the frames that are given; `Conditions.put_back` puts them into the result.
    """
    x, steps, before = noise, len(times) - 1, 1.0
    for i, (t, t_next) in enumerate(pairwise(times)):
        told = None
        if conditions is not None:
            x = conditions.release(x, noise, t, before)
            told = conditions.told(t) if conditions.given(t) else None
        share: dict[Branch, float | Tensor] = {ALL: 1.0}
        if guidance is not None:
            text, image = guidance.scales(i, steps, x.shape[2])
            share = shares(text, image.to(x) if isinstance(image, Tensor) else image, told is not None)
        velocities = predict(x, t, told, list(share))
        x = x + (t_next - t) * sum(own * v for own, v in zip(share.values(), velocities, strict=True))
        if on_step is not None:
            x = on_step(i, t, x)
        before = t
    return x


# -- the network -----------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """What the network is told of one text."""

    tokens: Tensor
    """T5's last hidden states [length, C], of padding too."""
    pooled: Tensor
    """CLIP's pooled output [D]."""


def predictor(
    network: Any, prompts: Sequence[Text], negatives: Sequence[Text] | None = None, scale: float | None = None
) -> Predict:
    """An `kinema.networks.open_sora.OpenSoraTransformer` as `denoise` asks it, for a prompt and a negative text for
    each sample. ``scale``: the guidance scale that distilled networks are told."""
    patch = network.config.patch_size
    dtype = next(p.dtype for name, p in network.named_parameters() if "img_in" in name)

    def stacked(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        return torch.stack([text.tokens for text in texts]), torch.stack([text.pooled for text in texts])

    told = stacked(prompts)
    untold = told if negatives is None else stacked(negatives)

    def run(x: Tensor, t: float, given: Tensor | None, branches: Sequence[Branch]) -> Sequence[Tensor]:
        count = len(branches)
        tokens = pack(x, patch).to(dtype)
        texts = [told if branch.prompt else untold for branch in branches]
        cond = None
        if given is not None:
            own = pack(given, patch).to(dtype)
            cond = torch.cat([own if branch.frames else torch.zeros_like(own) for branch in branches])
        times = torch.full((count * len(x),), t, device=x.device, dtype=torch.float32)
        predicted = network(
            hidden_states=tokens.repeat(count, 1, 1),
            timestep=times,
            encoder_hidden_states=torch.cat([tokens for tokens, _ in texts]).to(x.device, dtype),
            pooled_projections=torch.cat([pooled for _, pooled in texts]).to(x.device, dtype),
            img_ids=positions(x.shape[2:], patch, x.device),
            cond=cond,
            guidance=None if scale is None else torch.full_like(times, scale),
            return_dict=False,
        )[0]
        return unpack(predicted.float(), x.shape[2:], patch).chunk(count)

    def predict(x: Tensor, t: float, given: Tensor | None, branches: Sequence[Branch]) -> Sequence[Tensor]:
        tokens = x.numel() // (x.shape[1] * patch**2)
        if len(branches) * tokens <= JOINED_TOKENS:
            return run(x, t, given, branches)
        return [run(x, t, given, [branch])[0] for branch in branches]

    return predict
