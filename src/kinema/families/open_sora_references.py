"""From the references of a call to the frames that its samples are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from kinema.errors import UserError
from kinema.families.open_sora_strategy import (
    Condition,
    Conditions,
    Given,
    Strategy,
    check_room,
    lay_out,
    placed,
    resolved,
)
from kinema.families.open_sora_video import Reference, cut_frames, encode_pixels, is_causal, pixels_of


def references_of(references: Any, count: int) -> list[list[Reference]]:
    """The references of each of ``count`` samples: the same for all of them, or a list for each (None: no reference).
    UserError for another number of lists."""
    if references is None:
        return [[]] * count
    if isinstance(references, Image.Image | np.ndarray | Tensor):
        references = [references]
    if not any(one is None or isinstance(one, list | tuple) for one in references):
        return [list(references)] * count
    if len(references) != count:
        raise UserError(f"{len(references)} lists of references for {count} prompts: give one for each.")
    return [list(own or ()) for own in references]


def given_frames(
    vae: Any, references: Any, condition: str | Sequence[Given] | None, size: tuple[int, int], noise: Tensor
) -> tuple[list[Strategy], Conditions | None]:
    """The strategy of each sample, and all of them over the latents of their references; None where there are none.

    ``references`` and ``condition`` as in `kinema.families.open_sora_pipeline.OpenSoraPipeline`; ``size``: (height,
    width).
    """
    shown = references_of(references, len(noise))
    if not any(shown):
        if condition not in (None, "t2v", ()):
            raise UserError(f"condition {condition!r} takes frames from references, and there are none. Give some.")
        return [()] * len(noise), None
    if noise.shape[2] == 1:
        raise UserError("A sample of one latent frame has no place beside a reference: ask for more frames.")
    causal = is_causal(vae)
    strategies: list[Strategy] = []
    latents: list[list[Tensor]] = []
    known: dict[tuple[int, int], Tensor] = {}
    for own in shown:
        cuts, strategy = resolved(condition, len(own), causal) if own else Condition((), ())
        chosen = [(own[index], frames) for index, frames in cuts]
        for one, frames in chosen:
            if (id(one), frames) not in known:
                pixels = cut_frames(pixels_of(one, *size), frames, causal)
                known[id(one), frames] = encode_pixels(vae, pixels)
        strategies.append(strategy)
        latents.append([known[id(one), frames] for one, frames in chosen])
        if isinstance(condition, str):  # `Given`s may be what lies beside the end of a video that is extended
            check_room(placed(strategy, [one.shape[1] for one in latents[-1]], noise.shape[2]), noise.shape[2], causal)
    return strategies, lay_out(strategies, latents, noise)
