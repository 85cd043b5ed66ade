"""Open-Sora's network against tensors of the original, and against diffusers' Flux, of which it is a relative."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from kinema.families.flux_layout import NETWORK as FLUX
from kinema.networks.open_sora import OpenSoraTransformer, pack, positions, sinusoids, unpack
from kinema.networks.open_sora_layout import fuse_qkv, split_qkv, to_interleaved, to_rotate_half
from kinema.networks.open_sora_rotary import rotary_angles, rotate

GOLDEN = Path(__file__).parents[1] / "golden" / "open_sora"
CASES = {"a_t2v": "a_t2v", "b_cond": "b_cond", "b_cond_image": "b_cond"}
"""Each case, and whose weights it has."""
NOT_OURS = ("from_pretrained", "cache_dir", "grad_ckpt_settings", "use_liger_rope")
SMALL = {
    "in_channels": 16, "vec_in_dim": 12, "context_in_dim": 20, "hidden_size": 48, "num_heads": 2,
    "axes_dim": (4, 8, 12), "depth": 2, "depth_single_blocks": 2,
}  # fmt: skip


def golden(case: str) -> tuple[OpenSoraTransformer, dict[str, Tensor], dict[str, Any]]:
    described = json.loads((GOLDEN / f"mmdit_{case}.json").read_text())
    config = {key: value for key, value in described["config"].items() if key not in NOT_OURS}
    assert described["config"]["use_liger_rope"], "pairs (j, j + D/2)"
    network = OpenSoraTransformer(**config)
    network.load_state_dict(load_file(GOLDEN / f"mmdit_{CASES[case]}.weights.safetensors"), strict=True)
    return network, load_file(GOLDEN / f"mmdit_{case}.io.safetensors"), described


def small(**changes: Any) -> OpenSoraTransformer:
    """A small network whose every weight is random: initial weights would hide what they multiply by zero."""
    network = OpenSoraTransformer(**{**SMALL, **changes})
    draw = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith(".scale"):
            parameter.data = 1 + 0.2 * torch.randn(parameter.shape, generator=draw)
        else:
            parameter.data = torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5
    return network.eval().requires_grad_(False)


def inputs_of(network: OpenSoraTransformer, size: tuple[int, int, int] = (3, 4, 6), text: int = 5) -> dict[str, Any]:
    """Random inputs for a batch of two latents of T, H, W."""
    draw = torch.Generator().manual_seed(1)
    config = network.config
    where = positions(size, config.patch_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    inputs: dict[str, Any] = {
        "hidden_states": normal(2, len(where), config.in_channels),
        "timestep": torch.tensor([0.83, 0.12]),
        "encoder_hidden_states": normal(2, text, config.context_in_dim),
        "pooled_projections": normal(2, config.vec_in_dim),
        "img_ids": where,
    }
    if config.cond_embed:
        inputs["cond"] = normal(2, len(where), config.in_channels + config.patch_size**2)
    if config.guidance_embed:
        inputs["guidance"] = torch.tensor([4.0, 7.5])
    return inputs


def run(network: OpenSoraTransformer, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return network(**inputs, return_dict=False)[0]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


# -- the original ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_original_does(case: str) -> None:
    """Output, what passes from part to part, loss, and the norm of every gradient."""
    network, io, described = golden(case)
    seen: dict[str, Any] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
    output = network(
        hidden_states=io["img"],
        timestep=io["timesteps"],
        encoder_hidden_states=io["txt"],
        pooled_projections=io["y_vec"],
        img_ids=io["img_ids"],
        txt_ids=io["txt_ids"],
        cond=io.get("cond"),
    ).sample
    close(output, io["output"])
    compared = 0
    for name, value in io.items():
        part = name.removeprefix("mid.")
        if part != name and not part.startswith("pe_embedder"):
            ours = seen[part] if part in seen else seen[part[:-2]][int(part[-1])]
            close(ours, value)
            compared += 1
    assert compared == 4 + 2 * 2 + 2 + (case != "a_t2v")
    loss = (output - io["target"]).square().mean()
    assert float(loss.detach()) == pytest.approx(float(io["loss"]), rel=1e-5)
    loss.backward()
    norms = described["grad_l2_norms_of_loss"]
    assert {name for name, _ in network.named_parameters()} == set(norms)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) == pytest.approx(norms[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("case", CASES)
def test_angles_tokens_and_positions_are_the_originals(case: str) -> None:
    network, io, described = golden(case)
    places = torch.cat([io["txt_ids"], io["img_ids"]], dim=1)
    cos, sin = rotary_angles(places, network.config.axes_dim, network.config.theta)
    for ours, theirs in ((cos, io["mid.pe_embedder.0"]), (sin, io["mid.pe_embedder.1"])):
        close(torch.cat([ours, ours], dim=-1)[:, :, 0], theirs, 1e-6)
    size = described["latent_shape_BCTHW"][2:]
    assert torch.equal(pack(io["latent_unpacked"], 2), io["img"])
    assert torch.equal(unpack(io["img"], size, 2), io["latent_unpacked"])
    assert torch.equal(positions(size, 2).expand(2, -1, -1), io["img_ids"])


# -- forms of the weights --------------------------------------------------------------------------------------------


def forms(network: OpenSoraTransformer) -> dict[tuple[bool, str], OpenSoraTransformer]:
    """The network (split, rotate-half) in all four forms."""
    result = {}
    for fused in (False, True):
        for rope in ("rotate_half", "interleaved"):
            state = dict(network.state_dict())
            state = to_interleaved(state) if rope == "interleaved" else state
            state = fuse_qkv(state) if fused else state
            other = OpenSoraTransformer(**{**network.config, "fused_qkv": fused, "rope": rope})
            other.load_state_dict(state, strict=True)
            result[fused, rope] = other.requires_grad_(False)
    return result


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_every_form_gives_the_same_and_comes_back_to_the_bit(qkv_bias: bool) -> None:
    network = small(qkv_bias=qkv_bias)
    inputs = inputs_of(network)
    state = network.state_dict()
    for (fused, rope), other in forms(network).items():
        close(run(other, inputs), run(network, inputs))
        back = dict(other.state_dict())
        for undo in (split_qkv, to_rotate_half) if rope == "interleaved" else (split_qkv,):
            back = undo(back)
        assert back.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in back.items()), (fused, rope)
        if rope == "interleaved" and fused:  # in the other order too
            back = split_qkv(to_rotate_half(dict(other.state_dict())))
            assert all(torch.equal(value, state[name]) for name, value in back.items())
    wrong = OpenSoraTransformer(**{**network.config, "rope": "interleaved"})
    wrong.load_state_dict(state)
    assert (run(wrong, inputs) - run(network, inputs)).abs().max() > 1e-2, "the form of the rotation is not seen"


def test_the_rows_go_where_the_rule_says() -> None:
    """flux[2 d] = open_sora[d], flux[2 d + 1] = open_sora[D/2 + d], of every head of queries and keys."""
    rows = torch.arange(48.0)
    state = {
        "double_blocks.0.img_attn.q_proj.bias": rows,
        "double_blocks.0.img_attn.v_proj.bias": rows,
        "double_blocks.0.img_attn.norm.query_norm.scale": rows[:24],
    }
    turned = to_interleaved(state)
    one_head = [value for d in range(12) for value in (d, 12 + d)]
    assert turned["double_blocks.0.img_attn.norm.query_norm.scale"].tolist() == one_head
    assert turned["double_blocks.0.img_attn.q_proj.bias"].tolist() == one_head + [24 + d for d in one_head]
    assert torch.equal(turned["double_blocks.0.img_attn.v_proj.bias"], rows)


FLUX_CASES = {
    "as_published": {},
    "without_condition": {"cond_embed": False},
    "guidance": {"guidance_embed": True},
    "patch_1": {"patch_size": 1, "in_channels": 10},
    "other_axes": {"hidden_size": 96, "num_heads": 3, "axes_dim": (16, 6, 10), "depth": 1, "depth_single_blocks": 3},
    "fused": {"fused_qkv": True},
    "interleaved": {"rope": "interleaved"},
    "fused_interleaved_guidance": {"fused_qkv": True, "rope": "interleaved", "guidance_embed": True},
}


@pytest.mark.parametrize("case", FLUX_CASES)
def test_it_is_a_flux_in_disguise(case: str) -> None:
    """diffusers' Flux with the weights in Flux's form, and the condition folded into its first layer."""
    network = small(**FLUX_CASES[case])
    config, inputs = network.config, inputs_of(network)
    state = dict(network.state_dict())
    state = state if config.rope == "interleaved" else to_interleaved(state)
    state = state if config.fused_qkv else fuse_qkv(state)
    tokens = inputs["hidden_states"]
    if config.cond_embed:
        tokens = torch.cat([tokens, inputs["cond"]], dim=-1)
        state["img_in.weight"] = torch.cat([state["img_in.weight"], state.pop("cond_in.weight")], dim=1)
        state["img_in.bias"] = state["img_in.bias"] + state.pop("cond_in.bias")
    flux = FluxTransformer2DModel(
        in_channels=tokens.shape[-1],
        out_channels=config.in_channels,
        num_layers=config.depth,
        num_single_layers=config.depth_single_blocks,
        attention_head_dim=config.hidden_size // config.num_heads,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim,
        pooled_projection_dim=config.vec_in_dim,
        guidance_embeds=config.guidance_embed,
        axes_dims_rope=config.axes_dim,
    )
    flux.load_state_dict(FLUX.from_original(state), strict=True)
    given = {key: value for key, value in inputs.items() if key not in ("cond", "hidden_states")}
    with torch.no_grad():
        theirs = flux(hidden_states=tokens, txt_ids=torch.zeros(5, 3), **given, return_dict=False)[0]
    close(run(network, inputs), theirs)


# -- parts -----------------------------------------------------------------------------------------------------------


def test_angles_and_rotation_in_closed_form() -> None:
    """Pair i of an axis of width d turns by position * 10000^(-2 i / d); in float64 by complex numbers."""
    axes, places = (4, 8, 12), torch.tensor([[0.0, 0.0, 0.0], [2.0, 35.0, 63.0]])
    rates = torch.cat([10_000.0 ** (-torch.arange(0, d, 2).double() / d) for d in axes])
    axis = torch.tensor([0] * 2 + [1] * 4 + [2] * 6)
    turn = torch.polar(torch.ones(2, 12).double(), places.double()[:, axis] * rates)[None, :, None]
    x = torch.randn(1, 2, 3, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for rope, first, second in (("rotate_half", slice(0, 12), slice(12, 24)), ("interleaved", slice(0, 24, 2), slice(1, 24, 2))):  # fmt: skip  # noqa: E501
        turned = torch.complex(x[..., first], x[..., second]) * turn
        ours = rotate(x, rotary_angles(places, axes, 10_000, rope), rope)  # type: ignore[arg-type]
        torch.testing.assert_close(ours[..., first], turned.real, rtol=0, atol=2e-5)
        torch.testing.assert_close(ours[..., second], turned.imag, rtol=0, atol=2e-5)


def test_time_is_not_rounded_to_the_type_of_the_weights() -> None:
    """In bfloat16, 1000 t of 0.83 and 0.8305 would both be 828 to 832."""
    t = torch.tensor([0.83, 0.8305])
    rates = 10_000 ** (-torch.arange(128).double() / 128)
    exact = 1000 * t.double()[:, None] * rates
    torch.testing.assert_close(sinusoids(t).double(), torch.cat([exact.cos(), exact.sin()], 1), rtol=0, atol=2e-4)
    network = small().to(torch.bfloat16)
    inputs = {k: v.bfloat16() if k not in ("timestep", "img_ids") else v for k, v in inputs_of(network).items()}
    one, other = (run(network, inputs | {"timestep": t[i].expand(2)}) for i in range(2))
    assert one.dtype == torch.bfloat16 and (one != other).any()


def test_positions_are_each_samples_own() -> None:
    network = small()
    inputs = inputs_of(network)
    whole = positions((6, 4, 6), 2)
    both = torch.stack([whole[:18], whole[18:]])
    together = run(network, inputs | {"img_ids": both})
    for i in range(2):
        alone = {k: v[i : i + 1] for k, v in inputs.items() if k != "img_ids"}
        close(together[i : i + 1], run(network, alone | {"img_ids": both[i]}))
    assert (together[1] - run(network, inputs)[1]).abs().max() > 1e-3


def test_order_is_known_by_positions_alone() -> None:
    """Tokens and their positions in another order come back in that order: tokens may be shared out among devices."""
    network = small()
    inputs = inputs_of(network)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))
    moved = {"hidden_states": inputs["hidden_states"][:, order], "cond": inputs["cond"][:, order]}
    close(run(network, inputs | moved | {"img_ids": inputs["img_ids"][order]}), run(network, inputs)[:, order])


def test_no_condition_is_a_condition_of_zeros() -> None:
    network = small()
    inputs = inputs_of(network)
    zeros = inputs | {"cond": torch.zeros_like(inputs["cond"])}
    assert torch.equal(run(network, inputs | {"cond": None}), run(network, zeros))
    with pytest.raises(AssertionError, match="no cond_in"):
        run(small(cond_embed=False), inputs)


def test_an_untrained_network_predicts_zero_and_learns() -> None:
    torch.manual_seed(0)
    network = OpenSoraTransformer(**SMALL)
    inputs = inputs_of(network)
    assert torch.equal(run(network, inputs), torch.zeros(2, 18, 16))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    target, losses = torch.randn(2, 18, 16, generator=torch.Generator().manual_seed(4)), []
    for _ in range(30):
        loss = (network(**inputs).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.abs().max() > 0 for name, parameter in network.named_parameters() if "weight" in name)


# -- the published model ---------------------------------------------------------------------------------------------


def published_names(depth: int = 19, single: int = 38) -> dict[str, tuple[int, ...]]:
    """Every tensor of Open_Sora_v2.safetensors, by the rules of its layout."""
    names: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        names[f"{name}.weight"], names[f"{name}.bias"] = (rows, columns), (rows,)

    wide = 3072
    for name, width in (("img_in", 64), ("cond_in", 68), ("txt_in", 4096)):
        linear(name, wide, width)
    for name, width in (("time_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", wide, width)
        linear(f"{name}.out_layer", wide, wide)
    for i in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * wide, wide)
            for layer in ("q_proj", "k_proj", "v_proj", "proj"):
                linear(f"{block}_attn.{layer}", wide, wide)
            names |= {f"{block}_attn.norm.{which}_norm.scale": (128,) for which in ("query", "key")}
            linear(f"{block}_mlp.0", 4 * wide, wide)
            linear(f"{block}_mlp.2", wide, 4 * wide)
    for i in range(single):
        block = f"single_blocks.{i}"
        for layer, rows in (("q_proj", wide), ("k_proj", wide), ("v_mlp", 15_360), ("modulation.lin", 3 * wide)):
            linear(f"{block}.{layer}", rows, wide)
        linear(f"{block}.linear2", wide, 15_360)
        names |= {f"{block}.norm.{which}_norm.scale": (128,) for which in ("query", "key")}
    linear("final_layer.linear", 64, wide)
    linear("final_layer.adaLN_modulation.1", 2 * wide, wide)
    return names


def count(h: int, d: int, channels: int, cond: int, text: int, pooled: int, double: int, single: int) -> int:
    """Parameters of a network h wide with heads of d: in closed form."""
    ends = h * (channels + 1) + h * (cond + 1) + h * (text + 1)
    told = h * (256 + 1) + h * (pooled + 1) + 2 * h * (h + 1)
    stream = 6 * h * (h + 1) + 4 * h * (h + 1) + 2 * d + 4 * h * (h + 1) + h * (4 * h + 1)
    one = 2 * h * (h + 1) + 5 * h * (h + 1) + 3 * h * (h + 1) + h * (5 * h + 1) + 2 * d
    last = channels * (h + 1) + 2 * h * (h + 1)
    return ends + told + 2 * double * stream + single * one + last


def test_the_published_model() -> None:
    """11.89 thousand million parameters, under the names of the published file."""
    with torch.device("meta"):
        network = OpenSoraTransformer()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes == published_names()
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == count(3072, 128, 64, 68, 4096, 768, 19, 38) == 11_891_390_528
    assert all(parameter.is_meta for parameter in network.parameters())
    with torch.device("meta"):
        wide = OpenSoraTransformer(in_channels=128, patch_size=1)
    assert sum(p.numel() for p in wide.parameters()) == count(3072, 128, 128, 129, 4096, 768, 19, 38)


# -- as diffusers' models ----------------------------------------------------------------------------------------------


def test_it_is_saved_and_loaded_as_a_model_of_diffusers(tmp_path: Path) -> None:
    network = small(fused_qkv=True, guidance_embed=True)
    network.save_pretrained(tmp_path)
    loaded = OpenSoraTransformer.from_pretrained(tmp_path)
    settings = {key: value for key, value in network.config.items() if not key.startswith("_")}
    assert settings == {key: loaded.config[key] for key in settings} | {"axes_dim": (4, 8, 12)}
    inputs = inputs_of(network)
    assert torch.equal(run(loaded, inputs), run(network, inputs))
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["_class_name"] == "OpenSoraTransformer" and described["fused_qkv"] is True
    again = OpenSoraTransformer.from_config({k: v for k, v in described.items() if not k.startswith("_")})
    assert again.state_dict().keys() == network.state_dict().keys()


def test_the_attention_kernel_can_be_chosen() -> None:
    from diffusers.models.attention_dispatch import attention_backend

    network = small()
    inputs = inputs_of(network)
    expected = run(network, inputs)
    with attention_backend("_native_math"):
        close(run(network, inputs), expected)
    blocks = [*network.double_blocks, *network.single_blocks]
    for block in blocks:
        block.attention.set_attention_backend("_native_math")
    assert {str(block.attention.processor._attention_backend.value) for block in blocks} == {"_native_math"}
    close(run(network, inputs), expected)


def test_adapters_of_peft() -> None:
    from peft import LoraConfig

    network = small()
    inputs = inputs_of(network)
    before = run(network, inputs)
    network.add_adapter(LoraConfig(r=2, target_modules=r".*(q_proj|v_mlp|img_mlp\.2)", init_lora_weights=False))
    adapted = {re.sub(r"\.lora_.*", "", name) for name, _ in network.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * (2 + 1) + 2 * 2
    assert (run(network, inputs) - before).abs().max() > 1e-3


def test_attention_has_no_weights() -> None:
    network = small()
    parts = [block.attention for block in [*network.double_blocks, *network.single_blocks]]
    assert all(isinstance(part, nn.Module) and not list(part.parameters()) for part in parts)
