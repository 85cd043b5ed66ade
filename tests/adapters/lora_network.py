"""A tiny network of diffusers' in the two shapes that matter here: text-to-video, and with image
conditioning."""

import torch

from kinema.adapters.inject import add_adapter, fold_adapter
from kinema.adapters.state import Adapter
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError
from kinema.families.layout import Layout
from kinema.families.wan_names import NETWORK


class Names:
    """What `Family` says of names, for one layout."""

    def __init__(self, layout: Layout = NETWORK) -> None:
        self._layout = layout

    def layout(self, part: str = "network") -> Layout:
        if part.startswith("network"):
            return self._layout
        raise UserError(f"toy has no original layout of {part}: only the layouts diffusers and peft can hold it.")

    def kohya_prefix(self, part: str) -> str:
        return "lora_unet" if part.startswith("network") else "lora_te"

    def folder(self, part: str) -> str:
        return {"network": "transformer", "network_2": "transformer_2"}.get(part, part)

    def expert(self, part: str) -> str:
        return ""


class Experts(Names):
    def expert(self, part: str) -> str:
        return part.replace("network", "expert")


NAMES = Names()

TARGETS = (
    r"blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
    r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
)

KINDS = {
    "lora": AdapterConfig(rank=4, alpha=6.0),
    "dora": AdapterConfig(type="dora", rank=4, alpha=6.0),
    "lokr": AdapterConfig(type="lokr", rank=2, alpha=3.0),
    "lokr whole": AdapterConfig(type="lokr", rank=8, alpha=4.0, decompose_factor=4),
    "lokr both": AdapterConfig(type="lokr", rank=1, alpha=2.0, decompose_both=True),
    "ia3": AdapterConfig(type="ia3", input_targets=(r"ffn\.net\.2",)),
}
"""A configuration for each form that weights of adapters take."""


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
    """Give the adapter weights that matter to the output: every one of them moves."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if any(word in name for word in (".lora_A.", ".lora_B.", ".lokr_")):
                parameter.add_(noise * 0.3)
            elif any(word in name for word in (".lora_magnitude_vector.", ".ia3_l.")):
                parameter.mul_(1 + 0.3 * noise)


def trained(kind: str = "lora", image: bool = False, targets=TARGETS, **changes) -> torch.nn.Module:
    """A tiny network with an adapter whose weights matter."""
    network = tiny_network(image)
    config = KINDS[kind].model_copy(update=changes)
    add_adapter(network, config, targets, seed=3)
    train_a_little(network)
    return network


def folded(adapter: Adapter, image: bool = False, factor: float = 1.0) -> torch.nn.Module:
    network = tiny_network(image)
    fold_adapter(network, adapter, factor)
    return network
