"""Small Wan models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.randomness import derive_seed

if TYPE_CHECKING:
    from torch import nn

TEXT_DIM = 32
IMAGE_DIM = 20
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'()-"
_WORDS = "a the red blue green ball box moves left right over under and"


def write_tiny(directory: Path, from_image: bool, seed: int) -> Path:
    """Write the diffusers directory of a tiny text-to-video or image-to-video model; returns the directory."""
    import torch
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    tokenizer = _tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny"))
        modules["text_encoder"] = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=TEXT_DIM,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
        # The widths of the published one divided by 24: the same shortcuts, resamplers and attention.
        modules["vae"] = AutoencoderKLWan(base_dim=4)
        modules["transformer"] = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=36 if from_image else 16,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=40,
            num_layers=3,
            image_dim=IMAGE_DIM if from_image else None,
            added_kv_proj_dim=24 if from_image else None,
            rope_max_seq_len=64,
        )
        if from_image:
            modules["image_encoder"] = CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=IMAGE_DIM,
                    intermediate_size=28,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=16,
                    patch_size=8,
                    hidden_act="gelu",
                    projection_dim=16,
                )
            )
            modules["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
        for name in ("text_encoder", "vae", "transformer", "image_encoder"):
            if name in modules:
                _spread(modules[name].eval())
    pipeline = (WanImageToVideoPipeline if from_image else WanPipeline)(**modules)
    pipeline.save_pretrained(directory)
    _name_like_published(Path(directory) / "model_index.json")
    return Path(directory)


def _tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in _WORDS.split()]
    return T5Tokenizer(vocab=[*special, *words, ("▁", -4.0), *((c, -8.0) for c in _CHARACTERS)], extra_ids=0)


def _spread(module: nn.Module) -> None:
    """Every parameter random: libraries start norms at one and biases at zero, where a mix-up would not show."""
    import torch

    for name, parameter in module.named_parameters():
        if parameter.ndim <= 1 or name.endswith("gamma"):
            scale_like = "norm" in name and not name.endswith("bias")
            parameter.data = torch.randn_like(parameter) * 0.1 + (1.0 if scale_like else 0.0)


def _name_like_published(index: Path) -> None:
    """The published index names the image processor that needs torchvision; diffusers finds the other one itself."""
    content = json.loads(index.read_text(encoding="utf-8"))
    if "image_processor" in content:
        content["image_processor"] = ["transformers", "CLIPImageProcessor"]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
