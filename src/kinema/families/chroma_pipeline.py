"""diffusers' pipeline of Chroma with the mask that the network was trained with."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import Tensor


class ChromaPipeline(diffusers.ChromaPipeline):
    """The pipeline hands its text mask over as numbers, which attention adds to its logits instead of masking with
    them: padding is seen, if less (diffusers issue 12116, which still is so). Here it is a mask."""

    def _prepare_attention_mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        mask = super()._prepare_attention_mask(*args, **kwargs)
        return None if mask is None else mask.bool()
