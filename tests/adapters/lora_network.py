"""A tiny network of diffusers' in the two shapes that matter here: text-to-video, and with image
conditioning."""

from types import SimpleNamespace

import torch

from kinema.families.wan_names import NETWORK

NAMES = SimpleNamespace(to_original=NETWORK.rename_all, from_original=NETWORK.restore_all)
"""The family's names, as `Family` gives them."""

TARGETS = (
    r"blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
    r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
)


def tiny_network(image: bool = False, seed: int = 0) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    extra = {"image_dim": 24, "added_kv_proj_dim": 24, "in_channels": 36} if image else {"in_channels": 16}
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, out_channels=16, text_dim=20,
        freq_dim=32, ffn_dim=40, num_layers=2, cross_attn_norm=True, **extra,
    ).eval()  # fmt: skip


def run(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The network's output for fixed inputs."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(1, network.config.in_channels, 2, 4, 4, generator=draw).to(dtype)
    text = torch.randn(1, 6, 20, generator=draw).to(dtype)
    image = torch.randn(1, 5, 24, generator=draw).to(dtype) if network.config.image_dim else None
    with torch.no_grad():
        return network(x, torch.tensor([400.0]), text, encoder_hidden_states_image=image, return_dict=False)[0]


def train_a_little(network: torch.nn.Module, seed: int = 1) -> None:
    """Give the adapter weights that matter to the output."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
