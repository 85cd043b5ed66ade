"""Small encoders of every kind that the families use, with random weights and the structure of the real ones.

For tests: a family's ``tiny`` builds its parts with these and its own network, and saves them with
`write_directory`. Build under `tiny_seed`, so that weights follow the seed and nobody else's randomness moves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kinema.families.qwen_processor import assemble_qwen_processor
from kinema.families.tiny_tokenizers import (
    CLIP_LENGTH,
    byt5_tokenizer,
    clip_tokenizer,
    gemma_tokenizer,
    llama_tokenizer,
    qwen2_tokenizer,
    t5_tokenizer,
)
from kinema.randomness import derive_seed

if TYPE_CHECKING:
    from torch import nn

    M = TypeVar("M", bound=nn.Module)
else:
    M = TypeVar("M")

__all__ = [
    "autoencoder_kl",
    "byt5_tokenizer",
    "clip_text",
    "clip_tokenizer",
    "clip_vision",
    "gemma2",
    "gemma_tokenizer",
    "llama",
    "llama_tokenizer",
    "qwen2_tokenizer",
    "qwen3",
    "qwen25_vl",
    "qwen25_vl_processor",
    "spread",
    "t5_encoder",
    "t5_tokenizer",
    "tiny_seed",
    "umt5_encoder",
    "write_directory",
]

_RANGE = 0.15  # of initial weights: at the libraries' 0.02 narrow layers would hardly change what passes through them


@contextmanager
def tiny_seed(seed: int) -> Iterator[None]:
    """Randomness for building tiny parts: it follows ``seed``, and torch's own is as before afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny"))
        yield


def spread(module: M) -> M:
    """Every parameter random: libraries start norms at one and biases at zero, where a mix-up would not show."""
    import torch

    for name, parameter in module.named_parameters():
        if parameter.ndim <= 1 or name.endswith("gamma"):
            scale_like = "norm" in name and not name.endswith("bias")
            parameter.data = torch.randn_like(parameter) * 0.1 + (1.0 if scale_like else 0.0)
    return module


def clip_text(
    tokenizer: Any,
    dim: int = 32,
    with_projection: bool = False,
    layers: int = 3,
    hidden_act: str = "quick_gelu",
    projection_dim: int | None = None,
    positions: int = CLIP_LENGTH,
) -> Any:
    """CLIPTextModel, or CLIPTextModelWithProjection. ``hidden_act``: "quick_gelu" in CLIP-L, "gelu" in CLIP-G.
    ``positions``: more than 77 in those that were stretched for long text."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions,
        hidden_act=hidden_act,
        projection_dim=projection_dim or dim,
        bos_token_id=0,
        eos_token_id=2,  # what is published, though the end of text has another id: pooling takes the largest one
        pad_token_id=1,
    )
    return spread((CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval())


def clip_vision(dim: int = 20, layers: int = 3) -> Any:
    """CLIPVisionModel of pictures of 16 x 16 pixels in four patches."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return spread(
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=dim,
                intermediate_size=28,
                num_hidden_layers=layers,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                hidden_act="gelu",
                projection_dim=16,
            )
        ).eval()
    )


def t5_encoder(tokenizer: Any, dim: int = 32, layers: int = 2, gated: bool = True) -> Any:
    """T5EncoderModel of the gated kind (version 1.1), for T5 and ByT5, or as T5 was first: no gate, and attention wider
    than the model. Positions are known to the first layer alone."""
    from transformers import T5Config, T5EncoderModel

    first = {} if gated else {"feed_forward_proj": "relu", "d_kv": 16}
    return spread(T5EncoderModel(T5Config(**_t5_settings(tokenizer, dim, layers) | first)).eval())


def umt5_encoder(tokenizer: Any, dim: int = 32, layers: int = 2) -> Any:
    """UMT5EncoderModel; every layer has its own table of positions."""
    from transformers import UMT5Config, UMT5EncoderModel

    return spread(UMT5EncoderModel(UMT5Config(**_t5_settings(tokenizer, dim, layers))).eval())


def _t5_settings(tokenizer: Any, dim: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": dim,
        "d_kv": 8,
        "d_ff": dim * 3 // 2,
        "num_layers": layers,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def qwen25_vl(tokenizer: Any, dim: int = 32, layers: int = 3) -> Any:
    """Qwen2_5_VLForConditionalGeneration: grouped heads, positions in three axes, and a vision tower of two layers,
    one with attention in windows and one with all of it, of patches of 14 pixels."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = dim // 4 // 2
    side = half * 3 // 8  # [16, 24, 24] of the 64 frequencies of a head of 128
    config = Qwen2_5_VLConfig(
        text_config={
            **_decoder_settings(tokenizer, dim, layers),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * side, side, side],
            },
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": dim,
            "fullatt_block_indexes": [1],
            "initializer_range": _RANGE,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        initializer_range=_RANGE,
    )
    return spread(Qwen2_5_VLForConditionalGeneration(config).eval())


def qwen25_vl_processor(texts: Iterable[str] = ()) -> Any:
    """Qwen2.5-VL's processor with the published treatment of pictures, around `qwen2_tokenizer`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = qwen2_tokenizer(texts)
    pictures = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
    return assemble_qwen_processor(tokenizer, pictures, tokenizer.chat_template)


def qwen3(tokenizer: Any, dim: int = 32, layers: int = 3, causal: bool = False) -> Any:
    """Qwen3Model, or Qwen3ForCausalLM with its output tied to the embedding: norms on queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        **_decoder_settings(tokenizer, dim, layers),
        head_dim=16,  # not the width over the heads, as in the 4B model
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    return spread((Qwen3ForCausalLM if causal else Qwen3Model)(config).eval())


def llama(tokenizer: Any, dim: int = 32, layers: int = 3, causal: bool = False) -> Any:
    """LlamaModel, or LlamaForCausalLM with an output of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(
        **_decoder_settings(tokenizer, dim, layers),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return spread((LlamaForCausalLM if causal else LlamaModel)(config).eval())


def gemma2(tokenizer: Any, dim: int = 32, layers: int = 3) -> Any:
    """Gemma2Model: layers that see a window and layers that see all of the text in turn."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        **_decoder_settings(tokenizer, dim, layers),
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return spread(Gemma2Model(config).eval())


def _decoder_settings(tokenizer: Any, dim: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": dim,
        "intermediate_size": dim * 3 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": _RANGE,
    }


def autoencoder_kl(
    latent_channels: int = 16,
    scaling_factor: float = 0.3611,
    shift_factor: float | None = 0.1159,
    quant_convs: bool = False,
) -> Any:
    """AutoencoderKL with the published blocks, narrow: 8 x 8 pixels a latent. As it stands Flux's; SDXL's has 4
    channels, a factor of 0.13025, no shift, and convolutions around the latents (``quant_convs``)."""
    from diffusers import AutoencoderKL

    return spread(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=2,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            force_upcast=True,
            use_quant_conv=quant_convs,
            use_post_quant_conv=quant_convs,
        ).eval()
    )


def write_directory(directory: Path, pipeline: Any) -> Path:
    """Save a diffusers pipeline as the published ones are saved; returns the directory."""
    pipeline.save_pretrained(directory)
    index = Path(directory) / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    # Published indices name the image processors that need torchvision; diffusers itself finds those that do not.
    for part, entry in content.items():
        if isinstance(entry, list) and str(entry[1]).endswith("ImageProcessorPil"):
            content[part] = [entry[0], entry[1].removesuffix("Pil")]
    _write_json(index, content)
    # Published processors keep the settings for pictures in a file of their own; transformers 5 does not.
    for file in Path(directory).glob("*/processor_config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        _write_json(file.with_name("preprocessor_config.json"), settings["image_processor"])
    return Path(directory)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
