"""Every layout that the parts come in gives the same model; a wrong file is named."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, softmax

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.loading import PartSpec, is_hub_id
from kinema.families.registry import open_family
from kinema.families.tensors import looks_like, read_tensors, tensor_shapes, weight_files
from kinema.families.wan import Wan

FOLDERS = {"network": "transformer", "autoencoder": "vae", "text_encoder": "text_encoder"}
FOLDERS["image_encoder"] = "image_encoder"


def weights(directory: Path, part: str) -> dict[str, Tensor]:
    """What diffusers or transformers wrote."""
    (file,) = (directory / FOLDERS[part]).glob("*.safetensors")
    return load_file(file)


def loaded(part: str, **config: Any) -> dict[str, Tensor]:
    family = open_family(ModelConfig(family="wan", **config))
    module = family.load(part, "cpu", None)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert not any(value.is_meta for value in [*module.parameters(), *module.buffers()])
    return module.state_dict()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert theirs.keys() <= ours.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert ours.keys() - theirs.keys() <= {"encoder.embed_tokens.weight"}  # an alias of `shared`


# The original layouts, written from the original code's module structure.


def original_network(directory: Path) -> dict[str, Tensor]:
    return Wan(ModelConfig(family="wan", path=str(directory))).to_original(weights(directory, "network"))


def original_autoencoder(directory: Path) -> dict[str, Tensor]:
    """The original VAE is flat: three residual blocks and a resampler a level, counted through."""
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    residual["conv_shortcut"] = "shortcut"
    result = {}
    for name, value in weights(directory, "autoencoder").items():
        end, *path = name.split(".")
        if end in ("quant_conv", "post_quant_conv"):
            new = ["conv1" if end == "quant_conv" else "conv2", *path]
        elif path[0] in ("conv_in", "conv_out", "norm_out"):
            new = [end, {"conv_in": "conv1", "conv_out": "head.2", "norm_out": "head.0"}[path[0]], *path[1:]]
        elif path[0] == "mid_block" and path[1] == "attentions":
            new = [end, "middle.1", *path[3:]]
        elif path[0] == "mid_block":
            new = [end, f"middle.{2 * int(path[2])}", residual[path[3]], *path[4:]]
        elif path[0] == "down_blocks":
            new = [end, "downsamples", path[1], residual.get(path[2], path[2]), *path[3:]]
        else:
            assert path[0] == "up_blocks"
            index = 4 * int(path[1]) + (3 if path[2] == "upsamplers" else int(path[3]))
            new = [end, "upsamples", str(index), residual.get(path[4], path[4]), *path[5:]]
        result[".".join(new)] = value
    assert len(result) == len(weights(directory, "autoencoder"))
    return result


def original_text_encoder(directory: Path) -> dict[str, Tensor]:
    state = weights(directory, "text_encoder")
    result = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for layer in range(2):
        here, attention = f"blocks.{layer}", f"encoder.block.{layer}.layer.0"
        dense = f"encoder.block.{layer}.layer.1"
        for name in "qkvo":
            result[f"{here}.attn.{name}.weight"] = state[f"{attention}.SelfAttention.{name}.weight"]
        bias = state[f"{attention}.SelfAttention.relative_attention_bias.weight"]
        result[f"{here}.pos_embedding.embedding.weight"] = bias
        result[f"{here}.norm1.weight"] = state[f"{attention}.layer_norm.weight"]
        result[f"{here}.norm2.weight"] = state[f"{dense}.layer_norm.weight"]
        for new, old in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
            result[f"{here}.ffn.{new}.weight"] = state[f"{dense}.DenseReluDense.{old}.weight"]
    return result


def original_image_encoder(directory: Path) -> dict[str, Tensor]:
    state = weights(directory, "image_encoder")
    result = {
        "visual.cls_embedding": state["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": state["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(20, 16),
        "textual.token_embedding.weight": torch.zeros(5, 4),
        "log_scale": torch.zeros(()),
    }
    for kind in ("weight", "bias"):
        result[f"visual.pre_norm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        result[f"visual.post_norm.{kind}"] = state[f"post_layernorm.{kind}"]
        for layer in range(3):
            here, there = f"visual.transformer.{layer}", f"encoder.layers.{layer}"
            qkv = [state[f"{there}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            result[f"{here}.attn.to_qkv.{kind}"] = torch.cat(qkv)
            for new, old in (("attn.proj", "self_attn.out_proj"), ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")):
                result[f"{here}.{new}.{kind}"] = state[f"{there}.{old}.{kind}"]
            for norm in (1, 2):
                result[f"{here}.norm{norm}.{kind}"] = state[f"{there}.layer_norm{norm}.{kind}"]
    return result


@pytest.fixture
def shipped(i2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny sizes stand in for the shipped configurations of the variant, so that single files can be tiny."""
    target = tmp_path / "shipped" / "wan" / "i2v-14b-480p"
    for part in i2v.iterdir():
        if part.is_dir() and part.name != "tokenizer":
            shutil.copytree(part, target / part.name, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("kinema.families.standard.CONFIGS", tmp_path / "shipped")


SINGLE = {"variant": "i2v-14b-480p"}


def save(state: dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model."], ids=["original", "full", "comfy"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_network_from_one_file(prefix: str, suffix: str, i2v: Path, tmp_path: Path) -> None:
    """Original names, ComfyUI's prefixes; as `model.path` and as the part's own path; the outputs agree too."""
    state = {f"{prefix}{name}": value for name, value in original_network(i2v).items()}
    if prefix == "model.diffusion_model.":
        state["first_stage_model.decoder.conv1.weight"] = torch.zeros(1)  # other parts in the same file
    file = save(state, tmp_path / f"network{suffix}")
    for place in ({"path": str(file)}, {"network": {"path": str(file)}}):
        equal(loaded("network", **SINGLE, **place), weights(i2v, "network"))

    from diffusers import WanTransformer3DModel

    ours = Wan(ModelConfig(family="wan", **SINGLE, path=str(file))).load("network", "cpu", None)
    theirs = WanTransformer3DModel.from_pretrained(i2v / "transformer")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, 36, 2, 4, 4), (1, 512, 32), (1, 5, 20))]
    with torch.no_grad():
        outputs = [network(inputs[0], torch.tensor([500.0]), *inputs[1:]).sample for network in (ours, theirs)]
    assert torch.equal(*outputs) and outputs[0].std() > 0.01


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("part", "make"),
    [
        ("autoencoder", original_autoencoder),
        ("text_encoder", original_text_encoder),
        ("image_encoder", original_image_encoder),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_parts_from_original_files(part: str, make: Any, suffix: str, i2v: Path, tmp_path: Path) -> None:
    state = make(i2v)
    assert not state.keys() & weights(i2v, part).keys() or part == "autoencoder"
    file = save(state, tmp_path / f"part{suffix}")
    equal(loaded(part, **SINGLE, **{part: {"path": str(file)}}), weights(i2v, part))


@pytest.mark.usefixtures("shipped")
def test_comfyui_files(i2v: Path, tmp_path: Path) -> None:
    """transformers' names in one file: the text encoder with its alias and its tokenizer, CLIP with its prefix."""
    text = weights(i2v, "text_encoder")
    extra = {"encoder.embed_tokens.weight": text["shared.weight"].clone(), "spiece_model": torch.zeros(9).byte()}
    file = save(text | extra, tmp_path / "umt5_xxl_fp16.safetensors")
    equal(loaded("text_encoder", **SINGLE, text_encoder={"path": str(file)}), text)
    image = weights(i2v, "image_encoder")
    file = save({f"vision_model.{name}": value for name, value in image.items()}, tmp_path / "clip.safetensors")
    equal(loaded("image_encoder", **SINGLE, image_encoder={"path": str(file)}), image)


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale"])
def test_scaled_float8(ending: str, i2v: Path, tmp_path: Path) -> None:
    """ComfyUI's `umt5_xxl_fp8_e4m3fn_scaled.safetensors`: float8 times a scale is the weight, to float8's 2^-4."""
    state, text = {}, weights(i2v, "text_encoder")
    for name, value in text.items():
        if value.ndim == 2 and ".layer." in name:
            scale = value.abs().max() / 448
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            state[name.removesuffix(".weight") + ending] = scale
        else:
            state[name] = value
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = save(state, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    family = Wan(ModelConfig(family="wan", **SINGLE, text_encoder={"path": str(file), "dtype": "fp32"}))
    module = family.load("text_encoder", "cpu", torch.bfloat16).state_dict()
    for name, value in text.items():
        assert module[name].dtype == torch.float32
        error = (module[name] - value).abs()
        assert (error <= value.abs() / 16 + value.abs().max() / 448 / 512).all(), name


def test_release_in_original_layout(i2v: Path, tmp_path: Path, shipped: None) -> None:
    """The directory that `hf download Wan-AI/Wan2.1-I2V-14B-480P` makes, with the authors' own config.json."""
    root = tmp_path / "Wan2.1-I2V-14B-480P"
    state = original_network(i2v)
    shards = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = save(shard, root / f"diffusion_pytorch_model-{number}.safetensors")
        index |= dict.fromkeys(shard, file.name)
    (root / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (root / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 5120, "num_heads": 40}))
    save(original_autoencoder(i2v), root / "Wan2.1_VAE.pth")
    save(original_text_encoder(i2v), root / "models_t5_umt5-xxl-enc-bf16.pth")
    save(original_image_encoder(i2v), root / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    shutil.copytree(i2v / "tokenizer", root / "google" / "umt5-xxl")
    for part in FOLDERS:
        equal(loaded(part, **SINGLE, path=str(root)), weights(i2v, part))
    family = Wan(ModelConfig(family="wan", **SINGLE, path=str(root)))
    assert family.load("tokenizer", "cpu", None)("a red ball").input_ids[-1] == 1
    assert family.load("image_processor", "cpu", None).crop_size == {"height": 16, "width": 16}
    # Beside a text encoder given as a file, too.
    own = {"text_encoder": {"path": str(root / "models_t5_umt5-xxl-enc-bf16.pth")}}
    assert len(Wan(ModelConfig(family="wan", **SINGLE, **own)).load("tokenizer", "cpu", None)) > 20


def test_shards_and_variant_files(t2v: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel.from_pretrained(t2v / "transformer")
    network.save_pretrained(tmp_path / "sharded" / "transformer", max_shard_size="40KB")
    assert len(weight_files(tmp_path / "sharded" / "transformer")) > 2
    equal(loaded("network", path=str(tmp_path / "sharded")), weights(t2v, "network"))
    network.to(torch.float16).save_pretrained(tmp_path / "half" / "transformer", variant="fp16")
    (file,) = weight_files(tmp_path / "half" / "transformer")
    assert file.name == "diffusion_pytorch_model.fp16.safetensors"
    half = loaded("network", network={"path": str(tmp_path / "half" / "transformer")})
    assert {value.dtype for value in half.values()} == {torch.float16}
    network.save_pretrained(tmp_path / "half" / "transformer", variant="bf16")
    assert ".bf16." in weight_files(tmp_path / "half" / "transformer")[0].name
    missing = weight_files(tmp_path / "sharded" / "transformer")[1]
    missing.unlink()
    with pytest.raises(UserError, match=rf"1 of \d+ shards are missing.*{missing.name}"):
        loaded("network", path=str(tmp_path / "sharded"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_those_of_the_libraries_loaders(dtype: torch.dtype, i2v: Path) -> None:
    """Parameters that diffusers and transformers keep in float32 stay in float32 here, and only those."""
    import diffusers
    import transformers

    family = Wan(ModelConfig(family="wan", path=str(i2v)))
    classes = [
        ("network", diffusers.WanTransformer3DModel, {"torch_dtype": dtype}),
        ("autoencoder", diffusers.AutoencoderKLWan, {"torch_dtype": dtype}),
        ("text_encoder", transformers.UMT5EncoderModel, {"dtype": dtype}),
        ("image_encoder", transformers.CLIPVisionModel, {"dtype": dtype}),
    ]
    for part, cls, wanted in classes:
        theirs = cls.from_pretrained(i2v / FOLDERS[part], **wanted).state_dict()
        ours = family.load(part, "cpu", dtype).state_dict()
        assert {name: value.dtype for name, value in ours.items()} == {n: v.dtype for n, v in theirs.items()}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert dtype in {value.dtype for value in ours.values()}


def test_each_part_has_its_own_path_and_type(t2v: Path, i2v: Path, tmp_path: Path) -> None:
    """A network in one file, an autoencoder in a folder, a text encoder in another model, the rest in `path`."""
    changed = {name: value + 1 for name, value in weights(i2v, "autoencoder").items()}
    vae = tmp_path / "my-vae"
    shutil.copytree(i2v / "vae", vae)
    save(changed, vae / "diffusion_pytorch_model.safetensors")
    file = save(original_network(t2v), tmp_path / "network.safetensors")
    config = {
        "path": str(t2v),
        "network": {"path": str(file), "dtype": "bf16"},
        "autoencoder": {"path": str(vae), "dtype": "fp32"},
        "text_encoder": {"path": str(i2v)},
    }
    network = loaded("network", **config)  # its configuration is read from `path`
    assert network["proj_out.weight"].dtype == torch.bfloat16
    assert torch.equal(network["proj_out.weight"], weights(t2v, "network")["proj_out.weight"].bfloat16())
    equal(loaded("autoencoder", **config), changed)
    equal(loaded("text_encoder", **config), weights(i2v, "text_encoder"))
    family = Wan(ModelConfig(family="wan", **config))
    assert family.load("autoencoder", "cpu", torch.bfloat16).dtype == torch.float32  # the configuration wins
    assert family.load("text_encoder", "cpu", torch.float16).dtype == torch.float16
    assert family.load("scheduler", "cpu", None).config.flow_shift == 3.0


def test_the_type_of_each_part(i2v: Path) -> None:
    """One rule for encoding, previews and samples; latents do not depend on the type of the training."""

    def types(compute: torch.dtype, **config: Any) -> dict[str, torch.dtype]:
        family = Wan(ModelConfig(family="wan", path=str(i2v), **config))
        return {part: family.part_dtype(part, compute) for part in family.variant.parts}

    half = types(torch.bfloat16)
    assert {part for part, dtype in half.items() if dtype == torch.bfloat16} == {"network", "text_encoder"}
    assert set(half.values()) == {torch.bfloat16, torch.float32} and half["autoencoder"] == torch.float32
    assert set(types(torch.float32).values()) == {torch.float32}
    said = types(torch.bfloat16, text_encoder={"dtype": "fp16"}, autoencoder={"dtype": "bf16"})
    assert said == half | {"text_encoder": torch.float16, "autoencoder": torch.bfloat16}


def test_weights_are_copied_out_of_the_file(t2v: Path, tmp_path: Path) -> None:
    """A file that is replaced while the model is in use does not change the model."""
    copy = tmp_path / "model"
    shutil.copytree(t2v, copy)
    network = Wan(ModelConfig(family="wan", path=str(copy))).load("network", "cpu", None)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-4096, 2)
        opened.write(bytes(4096))
    equal(network.state_dict(), weights(t2v, "network"))


@pytest.mark.usefixtures("shipped")
def test_wrong_files_are_named(t2v: Path, i2v: Path, tmp_path: Path) -> None:
    vae = save(original_autoencoder(i2v), tmp_path / "vae.safetensors")
    network = save(original_network(i2v), tmp_path / "network.safetensors")
    lora = {f"diffusion_model.blocks.0.self_attn.q.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    lora_file = save(lora, tmp_path / "lora.safetensors")
    broken = original_network(i2v)
    broken["blocks.0.surplus.weight"] = torch.zeros(1)
    broken["blocks.1.ffn.0.weight"] = torch.zeros(3, 24)
    del broken["blocks.2.modulation"]
    broken_file = save(broken, tmp_path / "broken.safetensors")
    cases = [
        ("network", vae, r"does not hold the diffusion network of wan i2v-14b-480p\. It looks like an autoencoder"),
        ("network", lora_file, "It looks like a LoRA"),
        ("autoencoder", network, r"does not hold the autoencoder .*It looks like a diffusion network"),
        ("text_encoder", vae, "It looks like an autoencoder"),
        ("network", broken_file, r"1 missing \(blocks\.2\.scale_shift_table\); 1 unexpected \(blocks\.0\.surplus"),
        ("network", broken_file, r"blocks\.1\.ffn\.net\.0\.proj\.weight: \[3, 24\] instead of \[40, 24\]"),
    ]
    for part, file, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            loaded(part, **SINGLE, **{part: {"path": str(file)}})
        assert f"model.{part}.path: {file}" in str(caught.value)
    with pytest.raises(UserError, match=r"another shape \(patch_embedding\.weight"):  # 16 channels for 36
        loaded("network", **SINGLE, network={"path": str(t2v / "transformer" / "diffusion_pytorch_model.safetensors")})


def test_unreadable_files(t2v: Path, tmp_path: Path) -> None:
    good = (t2v / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    files = {
        "cut.safetensors": (good[:5000], "cannot be read as safetensors"),
        "empty.safetensors": (b"", "0 bytes; if the download broke off"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        "text.pth": (b"not a checkpoint", "model.pth|text.pth"),
        "code.pth": (pickle.dumps(PartSpec("x", "y"), protocol=2), "kinema refuses"),
    }
    for name, (content, message) in files.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_tensors([file])
        with pytest.raises(UserError):
            loaded("network", variant="t2v-1.3b", path=str(file))
    nested = tmp_path / "nested.pt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "step": 3}, nested)
    assert read_tensors([nested]).keys() == {"a"}
    with pytest.raises(UserError, match="is not valid JSON"):
        copy = tmp_path / "model"
        shutil.copytree(t2v, copy)
        (copy / "vae" / "config.json").write_text("{")
        loaded("autoencoder", path=str(copy))
    with pytest.raises(UserError, match=r"model\.autoencoder\.path: .* holds no autoencoder"):
        loaded("autoencoder", path=str(t2v), autoencoder={"path": str(t2v / "scheduler")})
    tokens = Wan(ModelConfig(family="wan", path=str(t2v)))
    parts = {part: tokens.load(part, "cpu", None) for part in ("text_encoder", "tokenizer")}
    parts["text_encoder"].config.vocab_size = 256384
    with pytest.raises(UserError, match=r"model\.tokenizer\.path: this tokenizer has \d+ pieces"):
        from kinema.data.batch import Sample

        tokens.encode(tokens.encodings()[0], parts, [Sample("a")])


def test_variant_from_shapes(tmp_path: Path) -> None:
    def file(name: str, **shapes: tuple[int, ...]) -> str:
        state = {key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()}
        return str(save(state, tmp_path / name))

    def variant(path: str, **config: Any) -> str:
        return open_family(ModelConfig(family="wan", path=path, **config)).variant.name

    image = {"patch_embedding__weight": (5120, 36, 1, 2, 2), "img_emb__proj__1__weight": (4, 4)}
    assert variant(file("a.safetensors", patch_embedding__weight=(1536, 16, 1, 2, 2))) == "t2v-1.3b"
    assert variant(file("b.pth", patch_embedding__weight=(5120, 16, 1, 2, 2))) == "t2v-14b"
    assert variant(file("wan2.1_i2v_480p_14B.safetensors", **image)) == "i2v-14b-480p"
    assert variant(file("wan2.1_i2v_720p_14B.safetensors", **image)) == "i2v-14b-720p"
    assert variant(file("c.safetensors", **image), variant="i2v-14b-720p") == "i2v-14b-720p"
    prefixed = {f"model__diffusion_model__{key}": shape for key, shape in image.items()}
    assert variant(file("d.safetensors", **prefixed)) == "i2v-14b-480p"
    ends = image | {"img_emb__emb_pos": (1, 514, 4)}
    assert variant(file("f.safetensors", **ends)) == "flf2v-14b-720p"
    assert variant(file("g.safetensors", patch_embedding__weight=(5120, 36, 1, 2, 2))) == "i2v-a14b"
    assert variant(file("h.safetensors", patch_embedding__weight=(3072, 48, 1, 2, 2))) == "ti2v-5b"
    low = file("wan2.2_t2v_low_noise_14B.safetensors", patch_embedding__weight=(5120, 16, 1, 2, 2))
    assert variant(low) == "t2v-a14b"
    with pytest.raises(UserError, match=r"looks like an autoencoder, not a Wan network"):
        variant(file("e.safetensors", decoder__conv1__weight=(4,)))
    shapes = tensor_shapes([tmp_path / "a.safetensors"])
    assert shapes == {"patch_embedding.weight": (1536, 16, 1, 2, 2)}


def test_looks_like() -> None:
    assert looks_like(["lora_unet_blocks_0_self_attn_q.lora_down.weight"]) == "a LoRA or another adapter"
    assert looks_like(["encoder.block.0.layer.0.SelfAttention.q.weight"]) == "a T5 text encoder"
    assert looks_like(["visual.patch_embedding.weight"]) == "a CLIP image encoder"
    assert looks_like(["something.weight"]) == "something that kinema does not know"


def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_off_line(t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = offline_hub(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"model\.path: 'maker/tiny-wan' is no path .*hf download maker/tiny-wan"):
        loaded("network", path="maker/tiny-wan")
    commits = ("a" * 40, "b" * 40)
    for commit, name in zip(commits, ("main", "v2"), strict=True):
        shutil.copytree(t2v, cache / "models--maker--tiny-wan" / "snapshots" / commit)
        reference = cache / "models--maker--tiny-wan" / "refs" / name
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    equal(loaded("network", path="maker/tiny-wan"), weights(t2v, "network"))
    families = [Wan(ModelConfig(family="wan", path="maker/tiny-wan", revision=r)) for r in (None, "main", "v2")]
    assert families[0].variant.name == "t2v-1.3b"
    main, named, other = (family.fingerprint(["autoencoder"]) for family in families)
    assert main == named != other
    with pytest.raises(UserError, match=r"'maker/tiny-wan' \(revision 'v3'\)"):
        Wan(ModelConfig(family="wan", path="maker/tiny-wan", revision="v3")).load("network", "cpu", None)
    assert is_hub_id("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") and not is_hub_id("models/wan.safetensors")


@pytest.mark.parametrize(
    ("part", "fetched"),
    [
        ("network", {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}),
        ("autoencoder", {"vae/config.json", "vae/diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"}),
        ("tokenizer", {"tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json"}),
    ],
)
def test_hub_fetches_only_the_part(part: str, fetched: set[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Of the files of the published repositories, in both layouts, those of the part alone are asked for."""
    from huggingface_hub.utils import filter_repo_objects

    published = ["model_index.json", "README.md", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"]
    published += ["google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors"]
    for folder in ("transformer", "vae"):
        published += [f"{folder}/config.json", f"{folder}/diffusion_pytorch_model.safetensors"]
    asked: set[str] = set()

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(filter_repo_objects(published, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError):
        Wan(ModelConfig(family="wan", variant="t2v-14b", path="maker/model")).load(part, "cpu", None)
    assert asked == fetched


def test_fingerprint(t2v: Path, tmp_path: Path) -> None:
    def of(root: Path, *parts: str, **config: Any) -> str:
        return Wan(ModelConfig(family="wan", path=str(root), **config)).fingerprint(parts)

    def edit(root: Path, name: str, old: str, new: str) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    text, latents = ("text_encoder", "tokenizer"), ("autoencoder",)
    before = of(t2v, *text), of(t2v, *latents)
    copy = tmp_path / "copied elsewhere"
    shutil.copytree(t2v, copy)
    assert (of(copy, *text), of(copy, *latents)) == before  # names, places and times do not matter
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert of(copy, *latents) == before[1]  # remembered by path, size and time of change
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert of(copy, *latents) != before[1]
    content[-1] ^= 1
    file.write_bytes(content)
    assert of(copy, *latents) == before[1]

    edit(copy, "vae/config.json", '"_diffusers_version": "', '"_diffusers_version": "9.')
    assert of(copy, *latents) == before[1]
    edit(copy, "vae/config.json", "-0.7571", "-0.7572")
    assert of(copy, *latents) != before[1] and of(copy, *text) == before[0]
    edit(copy, "tokenizer/tokenizer.json", "▁ball", "▁bell")
    assert of(copy, *text) != before[0]
    assert of(t2v, *text, text_encoder={"dtype": "bf16"}) != before[0]


def test_original_t5_names_by_its_formula(i2v: Path, shipped: None, tmp_path: Path) -> None:
    """UMT5 computed from the original names as its paper defines it equals the loaded text encoder."""
    w = original_text_encoder(i2v)
    ids = torch.tensor([[3, 7, 9, 4, 1]])
    distance = torch.arange(5)[None] - torch.arange(5)[:, None]  # key minus query; exact below 8 of 16 buckets
    bucket = distance.abs() + 16 * (distance > 0)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    x = w["token_embedding.weight"][ids]
    for layer in range(2):
        here = {name.removeprefix(f"blocks.{layer}."): value for name, value in w.items()}
        y = norm(x, here["norm1.weight"])
        q, k, v = ((y @ here[f"attn.{name}.weight"].T).unflatten(-1, (4, 8)).transpose(1, 2) for name in "qkv")
        bias = here["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        attended = softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
        x = x + attended.transpose(1, 2).flatten(2) @ here["attn.o.weight"].T
        y = norm(x, here["norm2.weight"])
        gated = gelu(y @ here["ffn.gate.0.weight"].T, approximate="tanh") * (y @ here["ffn.fc1.weight"].T)
        x = x + gated @ here["ffn.fc2.weight"].T
    expected = norm(x, w["norm.weight"])
    file = save(w, tmp_path / "t5.pth")
    config = ModelConfig(family="wan", **SINGLE, text_encoder={"path": str(file)})
    with torch.no_grad():
        got = Wan(config).load("text_encoder", "cpu", None)(ids).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert math.isclose(expected.square().mean().item(), 1, rel_tol=0.5)


def test_nothing_is_said_on_a_good_load(t2v: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for part in ("network", "autoencoder", "text_encoder"):
            loaded(part, path=str(t2v))
    assert not caplog.records
