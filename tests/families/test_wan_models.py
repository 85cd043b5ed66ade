"""The published sizes, the order of the blocks, adapter targets, random weights, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from kinema.config.schema import Config, ModelConfig
from kinema.errors import ConfigError, UserError
from kinema.families.base import Family
from kinema.families.loading import build
from kinema.families.registry import open_family
from kinema.families.wan import Wan


def full_size(variant: str, part: str) -> torch.nn.Module:
    """The part at its published size, from the shipped configuration, on the meta device."""
    family = open_family(ModelConfig(family="wan", variant=variant))
    assert isinstance(family, Wan)
    source = family.source(part)
    return build(source.spec, source.config, empty=True)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("t2v-1.3b", 1_418_996_800),
        ("t2v-14b", 14_288_491_584),
        ("i2v-14b-480p", 16_394_878_784),
        ("i2v-14b-720p", 16_394_878_784),
        ("flf2v-14b-720p", 16_395_536_704),
        ("t2v-a14b", 14_288_491_584),
        ("i2v-a14b", 14_288_901_184),
        ("ti2v-5b", 4_999_787_712),
        ("ti2v-5b-i2v", 4_999_787_712),
    ],
)
def test_networks_have_the_published_size(variant: str, parameters: int) -> None:
    network = full_size(variant, "network")
    assert count(network) == parameters == Wan.variants[variant].parameters
    assert {p.device.type for p in network.parameters()} == {"meta"}
    if variant.endswith("a14b"):
        assert count(full_size(variant, "network_2")) == parameters

    sizes = {"t2v-1.3b": (1536, 8960, 30), "ti2v-5b": (3072, 14336, 30), "ti2v-5b-i2v": (3072, 14336, 30)}
    width, hidden, layers = sizes.get(variant, (5120, 13824, 40))  # by hand
    clip = variant.startswith(("i2v-14b", "flf2v"))
    channels = 48 if "5b" in variant else 36 if variant.startswith(("i2v", "flf2v")) else 16
    block = 8 * (width**2 + width) + 4 * width + 2 * width + 2 * width * hidden + hidden + width + 6 * width
    embeddings = (256 + width + 6 * width + 4096 + width) * width + (2 + 6 + 2) * width
    patches = channels * 4 * width + width
    outputs = 48 if channels == 48 else 16
    head = width * outputs * 4 + outputs * 4 + 2 * width
    if clip:
        block += 2 * (width**2 + width) + width
        embeddings += 2 * 1280 + 1280**2 + 1280 + 1280 * width + width + 2 * width
    positions = 2 * 257 * 1280 if variant.startswith("flf2v") else 0
    assert parameters == layers * block + embeddings + patches + head + positions


def test_encoders_have_the_published_size() -> None:
    text = 256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64) + 4096
    assert count(full_size("t2v-14b", "text_encoder")) == text == 5_680_910_336
    layer = 4 * (1280**2 + 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    image = 32 * layer + 1280 * (3 * 14**2 + 1 + 257) + 4 * 1280
    assert count(full_size("i2v-14b-480p", "image_encoder")) == image == 630_766_080
    autoencoder = full_size("t2v-1.3b", "autoencoder")
    assert count(autoencoder) == 126_892_531
    assert len(autoencoder.config.latents_mean) == len(autoencoder.config.latents_std) == 16
    assert (autoencoder.config.latents_mean[0], autoencoder.config.latents_std[0]) == (-0.7571, 2.8184)


@pytest.mark.parametrize("variant", list(Wan.variants))
def test_names_at_full_size(variant: str) -> None:
    """`to_original` against diffusers' own converter; `from_original` undoes it; adapters follow."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    family = Wan(ModelConfig(family="wan", variant=variant))
    state = full_size(variant, "network").state_dict()
    original = family.to_original(state)
    assert len(original) == len(state)
    known = dict(original)
    positions = known.pop("img_emb.emb_pos", None)  # of two frames; the converter does not know it, its script does
    converted = convert_wan_transformer_to_diffusers(known)
    if positions is not None:
        converted["condition_embedder.image_embedder.pos_embed"] = positions
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)
    assert list(family.from_original(original)) == list(state)
    assert family.from_original(state).keys() == state.keys()  # diffusers' own names pass through

    samples = {"blocks.0.self_attn.q.weight", "patch_embedding.weight", "text_embedding.0.bias", "head.head.weight"}
    samples |= {"time_projection.1.weight", "head.modulation", "blocks.29.modulation", "blocks.7.norm3.weight"}
    clip = "image_encoder" in Wan.variants[variant].parts
    samples |= {"img_emb.proj.1.weight", "blocks.3.cross_attn.k_img.bias"} if clip else set()
    assert samples <= original.keys()

    lora = {"blocks.0.attn1.to_q.lora_A.weight": 1, "blocks.12.ffn.net.0.proj.lora_B.weight": 2}
    lora["blocks.1.attn2.to_out.0.alpha"] = 3
    renamed = family.to_original(lora)  # type: ignore[arg-type]
    assert renamed == {
        "blocks.0.self_attn.q.lora_A.weight": 1,
        "blocks.12.ffn.0.lora_B.weight": 2,
        "blocks.1.cross_attn.o.alpha": 3,
    }
    assert family.from_original(renamed) == lora
    with pytest.raises(KeyError, match=r"blocks\.0\.attn3"):
        family.to_original({"blocks.0.attn3.to_q.weight": 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_blocks_are_the_order_of_execution(variant: str, request: pytest.FixtureRequest) -> None:
    family = open_family(ModelConfig(family="wan", path=str(request.getfixturevalue(variant))))
    network = family.load("network", "cpu", None)
    blocks = [block for modules in family.blocks(network).values() for block in modules]
    ran = []
    for block in blocks:
        block.register_forward_hook(lambda module, *_: ran.append(module))
    channels = network.config.in_channels
    extra = {"encoder_hidden_states_image": torch.zeros(1, 5, 20)} if variant == "i2v" else {}
    with torch.no_grad():
        network(torch.zeros(1, channels, 1, 4, 4), torch.tensor([1.0]), torch.zeros(1, 512, 32), **extra)
    assert len(ran) == 3 and all(a is b for a, b in zip(ran, blocks, strict=True))
    assert family.trained_parts() == family.trainable_parts() == ("network",)


@pytest.mark.parametrize("variant", ["t2v-1.3b", "i2v-14b-480p"])
def test_adapter_targets_are_the_linear_layers_of_the_blocks(variant: str) -> None:
    family = Wan(ModelConfig(family="wan", variant=variant))
    network = full_size(variant, "network")
    matched = {
        name
        for name, _ in network.named_modules()
        if any(re.fullmatch(target, name) for target in family.adapter_targets())
    }
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert matched == {name for name in linear if name.startswith("blocks.")}
    assert len(matched) == (10 * 30 if variant == "t2v-1.3b" else 12 * 40)


def test_random_weights(t2v: Path) -> None:
    def draw(seed: int, dtype: torch.dtype | None = None) -> torch.nn.Module:
        config = ModelConfig(family="wan", path=str(t2v), random_weights=True)
        state = torch.random.get_rng_state()
        network = open_family(config, seed).load("network", "cpu", dtype)
        assert torch.equal(state, torch.random.get_rng_state())
        return network

    first, same, other = (draw(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    weight = "blocks.0.ffn.net.0.proj.weight"
    assert not torch.equal(first[weight], other[weight])
    limit = math.sqrt(6 / (24 + 40))  # Xavier
    assert 0.9 * limit < first[weight].abs().max() <= limit
    assert first["proj_out.weight"].abs().max() == 0 and first["blocks.1.attn1.to_q.bias"].abs().max() == 0
    assert first["patch_embedding.weight"].abs().max() <= math.sqrt(6 / (24 + 64))
    assert 0.015 < first["condition_embedder.time_embedder.linear_1.weight"].std() < 0.025
    half = draw(3, torch.bfloat16)
    assert half.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    assert half.get_parameter("blocks.0.scale_shift_table").dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in half.parameters())


def config_of(path: Path | str | None, data: dict | None = None, **sections: dict) -> Config:
    model = {"family": "wan", **sections.pop("model", {})}
    if path is not None:
        model["path"] = str(path)
    buckets = {"frames": [5], **(data or {})}
    values = {"model": model, "data": {"sources": [{"path": "."}], "buckets": buckets}, "training": {"steps": 1}}
    return Config.model_validate(values | sections)


def family_of(config: Config) -> Family:
    return open_family(config.model)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("t2v", {"data": {"frames": [1, 16]}}, r"data\.buckets\.frames: 16 frames .* nearest are 13 and 17"),
        ("t2v", {"data": {"sizes": [[480, 850]]}}, r"data\.buckets\.sizes: 850 is no multiple of 16.* 848 and 864"),
        ("t2v", {"preview": {"frames": 82}}, r"preview\.frames: 82"),
        ("t2v", {"preview": {"height": 100}}, r"preview\.height: 100"),
        ("i2v", {"data": {"frames": [1, 5]}}, r"data\.buckets\.frames: image-to-video needs clips"),
        ("i2v", {"model": {"text_length": 256}}, r"model\.text_length: .* must be 512, not 256"),
        ("i2v", {"preview": {"prompts": ["a", "b"]}}, r"preview\.images: 0 pictures for 2 prompts"),
        ("t2v", {"model": {"variant": "t2v-1.3"}}, r"model\.variant: .*'t2v-1\.3'; did you mean 't2v-1\.3b'\?"),
        ("t2v", {"model": {"autoencoder": {"path": "no/such/file.pth"}}}, r"model\.autoencoder\.path: there is no"),
    ],
)
def test_validate_refuses(variant: str, change: dict, message: str, request: pytest.FixtureRequest) -> None:
    config = config_of(request.getfixturevalue(variant), **change)
    with pytest.raises(UserError, match=message):
        family_of(config).validate(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"model\.variant: name one \(t2v-1\.3b, "),
        ({"variant": "t2v-1.3b"}, r"model\.network\.path: there is nowhere .*Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers"),
        ({"variant": "t2v-1.3b", "random_weights": True}, r"model\.autoencoder\.path: there is nowhere"),
    ],
)
def test_validate_says_what_has_no_place(model: dict, message: str) -> None:
    config = config_of(None, model=model)
    with pytest.raises(ConfigError, match=message):
        family_of(config).validate(config)


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_validate_accepts(variant: str, request: pytest.FixtureRequest) -> None:
    preview = {"prompts": ["a"], "images": ["a.png"]} if variant == "i2v" else {"prompts": ["a"]}
    config = config_of(request.getfixturevalue(variant), {"frames": [5, 33], "sizes": [[480, 832]]}, preview=preview)
    family = family_of(config)
    family.validate(config)
    assert family.variant.name == ("t2v-1.3b" if variant == "t2v" else "i2v-14b-480p")
    assert family.default_shift() == 3.0


def test_validate_asks_no_network() -> None:
    hub = config_of("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", model={"variant": "i2v-14b-720p"})
    family_of(hub).validate(hub)
    assert family_of(hub).default_shift() == 5.0


def test_tables_of_parts_that_the_variant_has_not(t2v: Path) -> None:
    def check(**tables: dict[str, str]) -> None:
        model = {"family": "wan", "variant": "t2v-1.3b", "path": str(t2v), **tables}
        whole = {"model": model, "data": {"sources": [{"path": "x"}]}, "training": {"steps": 1}}
        config = Config.model_validate(whole)
        open_family(config.model).validate(config)

    check(autoencoder={"dtype": "bf16"})
    with pytest.raises(ConfigError, match=r"model\.image_encoder: t2v-1\.3b has no such part.*text_encoder"):
        check(image_encoder={"path": str(t2v)})
    with pytest.raises(ConfigError, match=r"model\.tokenizer\.dtype: a tokenizer has no weights"):
        check(tokenizer={"dtype": "fp32"})
