"""Chroma 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo import Inputs

from cases.flux import Packed


@dataclass(frozen=True, kw_only=True)
class Chroma(Packed):
    family: str = "chroma"

    def mend(self, pipeline: Any) -> None:
        # Its mask is added to the logits of attention, 1 where text is and 0 where padding is: diffusers issue 12116.
        from kinema.families.chroma_pipeline import ChromaPipeline

        pipeline.__class__ = ChromaPipeline

    def visible(self, inputs: Inputs) -> Inputs:
        """Text behind the mask is cut off: the caption's tokens and one of padding are left."""
        mask, text = inputs["attention_mask"], inputs["encoder_hidden_states"]
        if mask is None:
            return inputs
        count = int(mask[0, : text.shape[1]].sum())
        expected = mask.new_ones(mask.shape)
        expected[:, count : text.shape[1]] = False
        assert (mask == expected).all() and text.shape[1] == 512 and 3 <= count < 100
        shown = {"encoder_hidden_states": text[:, :count], "txt_ids": inputs["txt_ids"][:count]}
        return inputs | shown | {"attention_mask": None}


CASES = [Chroma(variant="hd")]
