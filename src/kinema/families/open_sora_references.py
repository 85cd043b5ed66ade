"""From the references of a call to the frames that its samples are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from kinema.errors import UserError
from kinema.families.open_sora_conditions import CONDITIONS
from kinema.families.open_sora_strategy import (
    Condition,
    Conditions,
    Given,
    Strategy,
    lay_out,
    named_condition,
    parse_strategy,
)
from kinema.families.open_sora_video import Reference, cut_frames, encode_pixels, frame_count, is_causal, pixels_of


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
    strategies: list[Strategy] = []
    latents: list[list[Tensor]] = []
    known: dict[tuple[int, int], Tensor] = {}
    for own in shown:
        cuts, strategy = _condition(vae, condition, len(own)) if own else Condition((), ())
        _leave_some(vae, condition, strategy, noise.shape[2])
        wanted = cuts or [(index, 0) for index in range(len(own)) if strategy]
        chosen = [(own[index], frames) for index, frames in wanted]
        for one, frames in chosen:
            if (id(one), frames) not in known:
                pixels = cut_frames(pixels_of(one, *size), frames, vae)
                known[id(one), frames] = encode_pixels(vae, pixels)
        strategies.append(strategy)
        latents.append([known[id(one), frames] for one, frames in chosen])
    return strategies, lay_out(strategies, latents, noise)


def _condition(vae: Any, condition: str | Sequence[Given] | None, references: int) -> Condition:
    """What is asked for; without a condition what the number of references stands for."""
    if condition is None:
        if references > 2:
            raise UserError(f"{references} references: say with condition which frames come from each.")
        condition = "i2v_head" if references == 1 else "i2v_loop"
    if not isinstance(condition, str):
        return Condition((), tuple(condition))
    if condition not in CONDITIONS and condition[:1].isdecimal():
        return Condition((), parse_strategy(condition).get(0, ()))
    return named_condition(condition, is_causal(vae))


def _leave_some(vae: Any, condition: Any, strategy: Strategy, latent_frames: int) -> None:
    """UserError where the video has no frame besides those of one reference."""
    most = max((one.frames for one in strategy), default=0)
    if isinstance(condition, str) and condition in CONDITIONS and most >= latent_frames:
        raise UserError(
            f"condition {condition} gives {frame_count(vae, most)} frames, which leaves none to be made. Ask for more."
        )
