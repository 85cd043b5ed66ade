"""Adapters under the names of an original layout that keeps layers as one, or stores them in another order."""

import pytest
import torch
from lora_network import Names, train_a_little
from safetensors.torch import load_file
from torch import nn

from kinema.adapters.files import read_adapter
from kinema.adapters.inject import adapter_of, add_adapter, fold_adapter
from kinema.adapters.preflight import check_adapter
from kinema.adapters.targets import adaptable_modules
from kinema.adapters.write import save_adapter
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError
from kinema.families.layout import Fused, Layout, swapped_halves

LAYOUT = Layout(
    [("blocks.{}.out", "layers.{}.proj")],
    fused=(Fused("layers.{}.qkv", ("blocks.{}.q", "blocks.{}.k", "blocks.{}.v")),),
    changed=(swapped_halves("norm_out", "final.mod"),),
)  # what no rule knows has no name in the original layout
NAMES = Names(LAYOUT)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {name: nn.Linear(12, 12) for name in ("q", "k", "v", "out")}
        self.blocks = nn.ModuleList([nn.ModuleDict(layers)])
        self.norm_out = nn.Linear(12, 24)


def trained(config, targets=("q", "k", "v", "out", "norm_out")):
    network = Toy()
    add_adapter(network, config, targets, seed=0)
    train_a_little(network)
    return adapter_of(network)


def merged(adapter):
    """The original layout's weights with the adapter folded in."""
    network = Toy()
    fold_adapter(network, adapter)
    return LAYOUT.to_original(network.state_dict())


def read(path):
    return read_adapter(path, NAMES, {"network": adaptable_modules(Toy())}).adapters["network"]


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fused_and_swapped_layers_carry_the_same_update(tmp_path, kind, layout):
    config = AdapterConfig(type=kind, rank=3, rank_patterns={"k": 2}, alpha_patterns={"v": 1.0})
    adapter = trained(config)
    path = tmp_path / "x.safetensors"
    save_adapter(path, layout, [adapter], NAMES, metadata={})
    tensors = load_file(path)
    start = "diffusion_model.layers.0.qkv" if layout == "comfyui" else "lora_unet_layers_0_qkv"
    down, up = ("lora_A", "lora_B") if layout == "comfyui" else ("lora_down", "lora_up")
    a, b = tensors[f"{start}.{down}.weight"].double(), tensors[f"{start}.{up}.weight"].double()
    assert a.shape == (8, 12) and b.shape == (36, 8)
    alpha = tensors.get(f"{start}.alpha", torch.tensor(8.0)).item()
    before, after = LAYOUT.to_original(Toy().state_dict()), merged(adapter)
    weight = before["layers.0.qkv.weight"].double() + alpha / 8 * b @ a
    if kind == "dora":
        weight = weight * tensors[f"{start}.dora_scale"] / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight, after["layers.0.qkv.weight"].double(), rtol=1e-5, atol=1e-6)
    again = read(path)
    assert again.ranks == adapter.ranks
    back = merged(again)
    for name, value in after.items():
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-6)
    mod = "diffusion_model.final.mod" if layout == "comfyui" else "lora_unet_final_mod"
    swapped = tensors[f"{mod}.{up}.weight"]
    torch.testing.assert_close(swapped.roll(12, 0), adapter.state["norm_out.lora_B.weight"])


def test_kronecker_products_move_with_their_rows(tmp_path):
    """Halves that the original swaps are rows of the small matrix; a fused layer of another tool is cut there."""
    adapter = trained(AdapterConfig(type="lokr", rank=8, decompose_factor=4), targets=("out", "norm_out"))
    path = tmp_path / "x.safetensors"
    save_adapter(path, "kohya", [adapter], NAMES, metadata={})
    tensors = load_file(path)
    w1, w2 = (tensors[f"lora_unet_final_mod.lokr_w{i}"] for i in (1, 2))
    before, after = LAYOUT.to_original(Toy().state_dict()), merged(adapter)
    torch.testing.assert_close(before["final.mod.weight"] + torch.kron(w1, w2), after["final.mod.weight"])
    again = merged(read(path))
    assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in after.items())

    from safetensors.torch import save_file

    w1, w2 = torch.randn(6, 3), torch.randn(6, 4)
    save_file({"lora_unet_layers_0_qkv.lokr_w1": w1, "lora_unet_layers_0_qkv.lokr_w2": w2}, path)
    found = read(path)
    assert sorted(found.layers) == ["blocks.0.k", "blocks.0.q", "blocks.0.v"]
    expected = before["layers.0.qkv.weight"] + torch.kron(w1, w2)
    torch.testing.assert_close(merged(found)["layers.0.qkv.weight"], expected)
    save_file(
        {"lora_unet_layers_0_qkv.lokr_w1": torch.randn(4, 3), "lora_unet_layers_0_qkv.lokr_w2": torch.randn(9, 4)}, path
    )
    with pytest.raises(UserError, match="small matrix does not divide"):
        read(path)


def check(config, layouts, targets=("q", "k", "v", "out", "norm_out")):
    modules = {"network": adaptable_modules(Toy().to("meta"))}
    return check_adapter(config, layouts, modules, {"network": targets}, NAMES)


def test_a_layer_without_an_original_name_is_told():
    network = Toy()
    network.extra = nn.Linear(12, 12)
    modules = {"network": adaptable_modules(network)}
    with pytest.raises(UserError, match=r"export\.layouts: comfyui: extra has no name in the original layout.*exclude"):
        check_adapter(AdapterConfig(), ["comfyui"], modules, {"network": ("q", "k", "v", "extra")}, NAMES)


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_what_a_layout_cannot_hold_is_refused_before_anything_is_loaded(layout):
    assert len(check(AdapterConfig(type="dora"), [layout])["network"]) == 5
    with pytest.raises(UserError, match=rf"export\.layouts: {layout}: blocks\.0\.q is a part of layers\.0\.qkv .*lokr"):
        check(AdapterConfig(type="lokr"), [layout])
    assert check(AdapterConfig(type="lokr"), ["diffusers", "peft"])
    assert check(AdapterConfig(type="lokr", exclude=("[qkv]",)), [layout])
    with pytest.raises(UserError, match=r"DoRA changes only some of its parts"):
        check(AdapterConfig(type="dora", targets=("q", "v")), [layout])


def test_the_file_to_start_from_is_checked_before_anything_is_loaded(tmp_path):
    path = tmp_path / "x.safetensors"
    save_adapter(path, "comfyui", [trained(AdapterConfig(rank=3))], NAMES, metadata={})
    with pytest.raises(UserError, match=r"has rank 3 .*Set adapter\.rank = 3"):
        check(AdapterConfig(rank=4, init_from=path), ["comfyui"])
    assert check(AdapterConfig(rank=3, init_from=path), ["comfyui"])
