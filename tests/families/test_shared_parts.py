"""Parts that families share: every layout that they come in gives the same model, and sizes are the published ones."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from kinema import families
from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families import parts, tiny
from kinema.families.loading import CONFIGS, Found, PartSpec, Source, build, find, load_weights, read_json
from kinema.families.part_names import AUTOENCODER_KL, OPEN_CLIP
from kinema.families.tensors import read_tensors

State = dict[str, Tensor]
SPECS = {name: spec for name, spec in vars(parts).items() if isinstance(spec, PartSpec) and spec.model}

PARAMETERS = {
    "FLUX_VAE": 83_819_683,
    "SDXL_VAE": 83_653_863,
    "WAN_VAE": 126_892_531,
    "QWEN_VAE": 126_892_531,
    "CLIP_L": 123_060_480,
    "CLIP_L_PROJECTED": 123_060_480 + 768 * 768,
    "CLIP_G": 694_659_840,
    "T5_XXL": 4_762_310_656,
    "T5_11B": 4_864_791_552,
    "BYT5": 217_657_472 + (1510 - 384) * 1472,  # google/byt5-small's encoder, with Glyph's longer table of tokens
    "QWEN25_VL": 8_292_166_656,
    "QWEN25_VL_TEXT": 7_615_616_512 - 152_064 * 3584,  # Qwen2.5-7B without its output layer
    "QWEN25_VL_3B": 3_754_622_976,
    "QWEN3": 4_022_468_096,
    "LLAMA31_8B": 8_030_261_248,
    # As Llama 3, with 64 tokens more and without an output layer.
    "LLAVA_LLAMA3": 8_030_261_248 + (128_320 - 128_256) * 4096 - 128_256 * 4096,
    "GEMMA2_2B": 2_614_341_888,
}
"""Published sizes: the sums of the shapes in the headers of the published files."""


def shipped(spec: PartSpec) -> Path:
    return CONFIGS / "common" / spec.shipped / spec.config_file


@pytest.mark.parametrize("name", SPECS)
def test_sizes_are_the_published_ones(name: str) -> None:
    module = build(SPECS[name], read_json(shipped(SPECS[name])), empty=True)
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[name]


def test_settings_that_sizes_do_not_show() -> None:
    """Older configuration files say some things in other words: transformers 5 must have understood them."""
    configs = {
        name: build(SPECS[name], read_json(shipped(SPECS[name])), empty=True).config
        for name in (
            "QWEN25_VL",
            "QWEN25_VL_TEXT",
            "LLAMA31_8B",
            "LLAVA_LLAMA3",
            "QWEN3",
            "GEMMA2_2B",
            "T5_XXL",
            "T5_11B",
        )
    }
    for name in ("QWEN25_VL", "QWEN25_VL_TEXT"):
        rope = getattr(configs[name], "text_config", configs[name]).rope_parameters
        assert rope["mrope_section"] == [16, 24, 24] and rope["rope_theta"] == 1e6
    assert configs["LLAMA31_8B"].rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert configs["LLAVA_LLAMA3"].rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert configs["QWEN3"].rope_parameters["rope_theta"] == 1e6
    assert configs["GEMMA2_2B"].attn_logit_softcapping == 50.0
    assert configs["GEMMA2_2B"].layer_types[:2] == ["sliding_attention", "full_attention"]
    assert configs["T5_XXL"].is_gated_act and configs["T5_XXL"].dense_act_fn == "gelu_new"
    assert not configs["T5_11B"].is_gated_act and configs["T5_11B"].dense_act_fn == "relu"


def test_shipped_configurations_are_used() -> None:
    modules = [
        importlib.import_module(f"kinema.families.{one.name}") for one in pkgutil.iter_modules(families.__path__)
    ]
    used = {spec.shipped for module in modules for spec in vars(module).values() if isinstance(spec, PartSpec)} - {""}
    assert {folder.name for folder in (CONFIGS / "common").iterdir()} == used


# -- layouts -----------------------------------------------------------------------------------------------------------


def load(spec: PartSpec, state: State, model: Any, directory: Path) -> Any:
    """The part from a single file of these tensors, with a tiny model's configuration for the shipped one."""
    file = directory / "part.safetensors"
    save_file({name: value.clone().contiguous() for name, value in state.items()}, file)
    config = dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()
    found = Found("model.part.path", file, (file,))
    return load_weights(Source(spec, found, config, directory, "a tiny model"), "cpu", None)


def same(loaded: nn.Module, model: nn.Module) -> None:
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """The state with beginnings of names replaced."""
    result = {}
    for name, value in state.items():
        old, new = next(((old, new) for old, new in pairs if name.startswith(old)), ("", ""))
        result[new + name.removeprefix(old)] = value
    return result


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with tiny.tiny_seed(0):
        yield


@pytest.mark.parametrize("quant_convs", [False, True], ids=["flux", "sdxl"])
@pytest.mark.parametrize("layout", ["diffusers", "old diffusers", "ldm"])
def test_autoencoder_kl(layout: str, quant_convs: bool, tmp_path: Path) -> None:
    model = tiny.autoencoder_kl(4 if quant_convs else 16, quant_convs=quant_convs)
    state = dict(model.state_dict())
    if layout == "ldm":
        state = AUTOENCODER_KL.to_original(state)
        # Names and shapes are the original's: diffusers' own reader understands them.
        back = convert_ldm_vae_checkpoint(state, model.config)
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.items())
        assert state["decoder.mid.attn_1.proj_out.weight"].shape == (16, 16, 1, 1)
        assert state["decoder.up.1.block.0.nin_shortcut.weight"].shape == (8, 16, 1, 1)  # counted from the last level
    elif layout == "old diffusers":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for key, v in state.items()}
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
    same(load(parts.SDXL_VAE if quant_convs else parts.FLUX_VAE, state, model, tmp_path), model)


def wan_original(state: State) -> State:
    """The flat original names of Wan's autoencoder, found by asking diffusers' converter for each of them."""
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    residual["conv_shortcut"] = "shortcut"
    result = {}
    for name, value in state.items():
        end, *path = name.split(".")
        if end in ("quant_conv", "post_quant_conv"):
            new = ["conv1" if end == "quant_conv" else "conv2", *path]
        elif path[0] in ("conv_in", "conv_out", "norm_out"):
            new = [end, {"conv_in": "conv1", "conv_out": "head.2", "norm_out": "head.0"}[path[0]], *path[1:]]
        elif path[:2] == ["mid_block", "attentions"]:
            new = [end, "middle.1", *path[3:]]
        elif path[0] == "mid_block":
            new = [end, f"middle.{2 * int(path[2])}", residual[path[3]], *path[4:]]
        elif path[0] == "down_blocks":
            new = [end, "downsamples", path[1], residual.get(path[2], path[2]), *path[3:]]
        else:
            index = 4 * int(path[1]) + (3 if path[2] == "upsamplers" else int(path[3]))
            new = [end, "upsamples", str(index), residual.get(path[4], path[4]), *path[5:]]
        result[".".join(new)] = value
    return result


@pytest.mark.parametrize("kind", ["wan", "qwen"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_video_autoencoders(kind: str, layout: str, tmp_path: Path) -> None:
    model = tiny.spread((AutoencoderKLWan if kind == "wan" else AutoencoderKLQwenImage)(base_dim=4).eval())
    state = dict(model.state_dict())
    if layout == "original":
        state = wan_original(state)
        assert convert_wan_vae_to_diffusers(dict(state)).keys() == model.state_dict().keys()
    same(load(parts.WAN_VAE if kind == "wan" else parts.QWEN_VAE, state, model, tmp_path), model)


def clip_layouts(state: State) -> dict[str, State]:
    """A projected CLIP's weights in each layout, with what else lies in such files."""
    extra = {"logit_scale": torch.zeros(()), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    vision = {"vision_model.post_layernorm.bias": torch.zeros(3), "visual_projection.weight": torch.zeros(2, 3)}
    return {"comfyui": {**state, **extra}, "whole clip": {**state, **extra, **vision}}


@pytest.mark.parametrize("layout", ["comfyui", "whole clip", "open clip", "flat"])
def test_clip(layout: str, tmp_path: Path) -> None:
    tokenizer = tiny.clip_tokenizer("!")
    model = tiny.clip_text(tokenizer, with_projection=True, hidden_act="gelu", projection_dim=24)
    state = dict(model.state_dict())
    if layout == "open clip":
        state = {**OPEN_CLIP.to_original(state), "logit_scale": torch.zeros(())}
        assert state["transformer.resblocks.1.attn.in_proj_weight"].shape == (96, 32)
        assert state["text_projection"].shape == (32, 24)
        back = convert_open_clip_checkpoint(model, dict(state), prefix="")  # diffusers' own reader understands them
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    elif layout == "flat":
        state = renamed(state, ("text_model.", ""))
    else:
        state = clip_layouts(state)[layout]
    same(load(parts.CLIP_G, state, model, tmp_path), model)
    bare = tiny.clip_text(tokenizer, hidden_act="gelu")
    bare.load_state_dict(model.text_model.state_dict())
    same(load(parts.CLIP_L, state, bare, tmp_path), bare)


def test_clip_without_a_projection_has_the_identity(tmp_path: Path) -> None:
    """ComfyUI's clip_l.safetensors: the pooled output goes through unchanged, as diffusers reads SD3's files."""
    tokenizer = tiny.clip_tokenizer()
    plain = tiny.clip_text(tokenizer)
    config = tiny.clip_text(tokenizer, with_projection=True)
    loaded = load(parts.CLIP_L_PROJECTED, renamed(dict(plain.state_dict()), ("", "text_model.")), config, tmp_path)
    ids = tokenizer("a red ball", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).text_embeds, plain(ids).pooler_output)


@pytest.mark.parametrize("layout", ["transformers", "without alias", "alias alone", "with decoder", "comfyui", "glyph"])
@pytest.mark.parametrize("kind", ["t5", "byt5"])
def test_t5(kind: str, layout: str, tmp_path: Path) -> None:
    tokenizer = tiny.t5_tokenizer() if kind == "t5" else tiny.byt5_tokenizer()
    model = tiny.t5_encoder(tokenizer)
    state = dict(model.state_dict())
    assert state.keys() >= {"shared.weight", "encoder.embed_tokens.weight"}
    if layout in ("without alias", "comfyui"):
        del state["encoder.embed_tokens.weight"]
    if layout in ("alias alone", "glyph"):
        del state["shared.weight"]
    if layout == "with decoder":
        state |= {"decoder.block.0.layer.0.layer_norm.weight": torch.zeros(3), "lm_head.weight": torch.zeros(2, 3)}
    if layout == "comfyui":
        state["spiece_model"] = torch.zeros(5, dtype=torch.uint8)
    if layout == "glyph":
        state = {f"module.text_tower.{name}": value for name, value in state.items()}
    loaded = load(parts.T5_XXL if kind == "t5" else parts.BYT5, state, model, tmp_path)
    same(loaded, model)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight


DECODERS: dict[str, tuple[PartSpec, Callable[[], Any]]] = {
    "llava": (parts.LLAVA_LLAMA3, lambda: tiny.llama(tiny.llama_tokenizer(llava=True))),
    "qwen3": (parts.QWEN3, lambda: tiny.qwen3(tiny.qwen2_tokenizer())),
    "gemma": (parts.GEMMA2_2B, lambda: tiny.gemma2(tiny.gemma_tokenizer())),
    "qwen text": (parts.QWEN25_VL_TEXT, lambda: tiny.qwen25_vl(tiny.qwen2_tokenizer()).model.language_model),
}


@pytest.mark.parametrize("place", ["", "model.", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize("kind", DECODERS)
def test_language_models(kind: str, place: str, tmp_path: Path) -> None:
    """Bare, inside a language model, and inside a model that sees pictures; ComfyUI's have the tokenizer in them."""
    spec, make = DECODERS[kind]
    model = make().eval()
    state = renamed(dict(model.state_dict()), ("", place))
    state["lm_head.weight"] = torch.zeros(3, 2)
    state["spiece_model"] = torch.zeros(5, dtype=torch.uint8)
    state["visual.blocks.0.norm1.weight"] = state["multi_modal_projector.linear_1.bias"] = torch.zeros(3)
    state["vision_tower.vision_model.encoder.layers.0.layer_norm1.bias"] = torch.zeros(3)
    same(load(spec, state, model, tmp_path), model)


def test_output_layers_are_kept_apart_from_embeddings(tmp_path: Path) -> None:
    """Llama 3.1's output layer is its own, though its class can tie it; a file for diffusion may lack it."""
    model = tiny.llama(tiny.llama_tokenizer(), causal=True)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert not torch.equal(embedding, head)
    loaded = load(parts.LLAMA31_8B, dict(model.state_dict()), model, tmp_path)
    same(loaded, model)
    state = dict(model.state_dict())
    del state["lm_head.weight"]
    loaded = load(parts.LLAMA31_8B, state, model, tmp_path)
    assert torch.equal(loaded.lm_head.weight, embedding) and not loaded.lm_head.weight.is_meta
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True).hidden_states
        assert all(
            torch.equal(a, b) for a, b in zip(loaded(ids, output_hidden_states=True).hidden_states, wanted, strict=True)
        )


@pytest.mark.parametrize("layout", ["transformers 5", "older", "comfyui without head", "inside"])
def test_qwen25_vl(layout: str, tmp_path: Path) -> None:
    model = tiny.qwen25_vl(tiny.qwen2_tokenizer())
    state = dict(model.state_dict())
    spec = parts.QWEN25_VL
    if layout != "transformers 5":
        state = renamed(state, ("model.language_model.", "model."), ("model.visual.", "visual."))
        assert {"model.layers.0.self_attn.q_proj.weight", "visual.merger.mlp.0.weight"} <= state.keys()
    if layout == "comfyui without head":
        del state["lm_head.weight"]
        model.lm_head.weight.data = model.get_input_embeddings().weight.data
    if layout == "inside":
        state = {f"{spec.inside[0]}{name}": value for name, value in state.items()}
        state["vae.decoder.conv_in.bias"] = torch.zeros(2)
    same(load(spec, state, model, tmp_path), model)


def test_parts_of_a_whole_checkpoint(tmp_path: Path) -> None:
    """One file with everything, as SDXL is published: each part finds its own tensors in it, and no other's."""
    tokenizer = tiny.clip_tokenizer()
    large = tiny.clip_text(tokenizer)
    giant = tiny.clip_text(tokenizer, 48, True, hidden_act="gelu")
    vae = tiny.autoencoder_kl(4, 0.13025, None, True)
    state = {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}
    for prefix, tensors in (
        ("conditioner.embedders.0.transformer.text_model.", dict(large.state_dict())),
        ("conditioner.embedders.1.model.", OPEN_CLIP.to_original(giant.state_dict())),
        ("first_stage_model.", AUTOENCODER_KL.to_original(vae.state_dict())),
    ):
        state |= {f"{prefix}{name}": value for name, value in tensors.items()}
    file = tmp_path / "sd_xl_base.safetensors"
    save_file({name: value.clone().contiguous() for name, value in state.items()}, file)
    config = ModelConfig(family="wan", path=str(file))
    for spec, part, model in (
        (parts.CLIP_L, "text_encoder", large),
        (parts.CLIP_G, "text_encoder_2", giant),
        (parts.SDXL_VAE, "autoencoder", vae),
    ):
        found = find(config, part, spec)
        assert found is not None and found.files == (file,)
        settings = dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()
        same(load_weights(Source(spec, found, settings, tmp_path, "sdxl"), "cpu", None), model)
    assert find(config, "text_encoder", parts.T5_XXL) is None
    assert read_tensors([file]).keys() == {"out.2.weight"}


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    model = tiny.t5_encoder(tiny.t5_tokenizer())
    with pytest.raises(UserError, match=r"does not hold the text encoder \(Qwen3 4B\).*a T5 text encoder"):
        load(parts.QWEN3, dict(model.state_dict()), tiny.qwen3(tiny.qwen2_tokenizer()), tmp_path)
    vae = tiny.autoencoder_kl()
    with pytest.raises(UserError, match=r"does not hold the text encoder \(T5-XXL\).*an autoencoder"):
        load(parts.T5_XXL, dict(vae.state_dict()), model, tmp_path)


# -- small parts -------------------------------------------------------------------------------------------------------


def test_tokenizers_lie_beside_their_encoders(tmp_path: Path) -> None:
    """An encoder given by its own path brings the tokenizer of the same number."""
    tiny.clip_tokenizer("!").save_pretrained(tmp_path / "model" / "tokenizer_2")
    (tmp_path / "model" / "text_encoder_2").mkdir()
    config = ModelConfig.model_validate({"family": "wan", "path": str(tmp_path / "model")})
    found = find(config, "tokenizer_2", parts.CLIP_G_TOKENIZER)
    assert found is not None and found.place == tmp_path / "model" / "tokenizer_2"


def test_bytes_need_no_vocabulary() -> None:
    from transformers import AutoTokenizer

    place = shipped(parts.BYT5_TOKENIZER).parent
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    ids = tokenizer("ré", padding="max_length", max_length=6).input_ids
    assert ids == [ord("r") + 3, 0xC3 + 3, 0xA9 + 3, 1, 0, 0]
    assert len(tokenizer) == 384


def test_processor_part(tmp_path: Path) -> None:
    processor = tiny.qwen25_vl_processor()
    processor.save_pretrained(tmp_path / "processor")
    settings = json.loads((tmp_path / "processor" / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    found = find(ModelConfig(family="wan", path=str(tmp_path)), "processor", parts.QWEN_PROCESSOR)
    assert found is not None and parts.QWEN_PROCESSOR.load is not None
    loaded = parts.QWEN_PROCESSOR.load(Source(parts.QWEN_PROCESSOR, found, {}, tmp_path, "a tiny model"))
    assert type(loaded) is type(processor) and loaded.image_processor.size["shortest_edge"] == 56 * 56
