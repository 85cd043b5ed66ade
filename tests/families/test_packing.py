"""Latents as tokens, against diffusers' own packing."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline

from kinema.families.packing import pack, unpack


def test_as_diffusers_packs_and_back() -> None:
    latents = torch.randn(2, 3, 6, 10)
    tokens = pack(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 3, 6, 10))
    assert torch.equal(unpack(tokens, 3, 5), latents)
