"""Small Cosmos models of both generations with random weights and every structural feature of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.base import Variant
from kinema.families.tiny import spread, t5_encoder, t5_tokenizer, tiny_seed, write_directory

TEXT_DIM = 32


class Unguarded:
    """In the place of NVIDIA's guardrail, which needs models of its own: for random weights, which show nothing."""

    def to(self, device: Any) -> None:
        """It has no weights."""

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def write_predict2(directory: Path, variant: Variant, seed: int) -> Path:
    """Write the diffusers directory of a tiny Cosmos-Predict2; returns the directory."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

    rope = (20 / 24, 2.0, 2.0) if variant.name == "video2world-14b" else (1.0, 3.0, 4.0)
    with tiny_seed(seed):
        modules = {
            "vae": spread(AutoencoderKLWan(base_dim=4).eval()),
            "transformer": _network(variant, rope, positions=None),
        }
        return _write(directory, variant, modules, FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))


def write_cosmos1(directory: Path, variant: Variant, seed: int) -> Path:
    """Write the diffusers directory of a tiny Cosmos 1; returns the directory."""
    from diffusers import AutoencoderKLCosmos, EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    rope = (2.0, 2.0, 2.0) if "14b" in variant.name else (2.0, 1.0, 1.0)
    with tiny_seed(seed):
        autoencoder = AutoencoderKLCosmos(
            encoder_block_out_channels=(4, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8), num_layers=1
        )
        modules = {
            "vae": spread(autoencoder.eval()),
            "transformer": _network(variant, rope, positions="learnable"),
        }
        return _write(directory, variant, modules, scheduler)


def _network(variant: Variant, rope: tuple[float, float, float], positions: str | None) -> Any:
    from diffusers import CosmosTransformer3DModel

    network = CosmosTransformer3DModel(
        in_channels=17 if "first_frame" in variant.conditions else 16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=4,
        max_size=(8, 16, 16),
        rope_scale=rope,
        extra_pos_embed_type=positions,
    )
    if positions is not None:
        for parameter in network.learnable_pos_embed.parameters():
            parameter.data.normal_()
    return spread(network.eval())


def _write(directory: Path, variant: Variant, modules: dict[str, Any], scheduler: Any) -> Path:
    import diffusers

    tokenizer = t5_tokenizer()
    pipeline = getattr(diffusers, variant.pipeline)(
        **modules,
        scheduler=scheduler,
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, TEXT_DIM, gated=False),
        safety_checker=Unguarded(),
    )
    return write_directory(directory, pipeline)
