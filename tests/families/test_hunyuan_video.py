"""HunyuanVideo: what the suite of all families does not see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Batch
from kinema.errors import ConfigError
from kinema.families.hunyuan_video import HunyuanVideo
from kinema.families.hunyuan_video_parts import NETWORK, comfyui_to_original, network
from kinema.families.layout import LoraFactors


def family(**model: object) -> HunyuanVideo:
    return HunyuanVideo(ModelConfig.model_validate({"family": "hunyuan_video"} | model))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights at the published width, which the converters hard-code, with one block of each kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=0.25)
    # Narrow where no rule looks: the feed-forward of the single block is four times the width in the published one.
    single = "single_transformer_blocks.0.proj_mlp."
    weights = model.state_dict()
    weights[single + "weight"] = torch.randn(4 * 3072, 8)
    weights[single + "bias"] = torch.randn(4 * 3072)
    for x in "qkv":
        weights[f"single_transformer_blocks.0.attn.to_{x}.weight"] = torch.randn(3072, 8)
    return weights


def test_diffusers_converter_inverts_our_layout(state: dict[str, Tensor]) -> None:
    original = NETWORK.to_original(state)
    assert "double_blocks.0.img_attn_qkv.weight" in original and original["single_blocks.0.linear1.bias"].shape == (
        21504,
    )
    theirs = convert_hunyuan_video_transformer_to_diffusers(dict(original))
    assert theirs.keys() == state.keys()
    for name, value in theirs.items():
        assert torch.equal(value, state[name]), name
    assert all(torch.equal(value, state[name]) for name, value in NETWORK.from_original(original).items())


def to_comfyui(name: str) -> str:
    """The renaming that ComfyUI applies to Tencent's names when it reads them (comfy/supported_models.py)."""
    for old, new in (
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("_mod.linear.", "_mod.lin."),
        ("_attn_qkv.", "_attn.qkv."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
        ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
        (".q_norm.weight", ".norm.query_norm.scale"),
        (".k_norm.weight", ".norm.key_norm.scale"),
        ("_attn_proj.", "_attn.proj."),
        (".modulation.linear.", ".modulation.lin."),
        ("_in.mlp.2.", "_in.out_layer."),
        ("_in.mlp.0.", "_in.in_layer."),
    ):
        name = name.replace(old, new)
    return name


def test_comfyui_files_have_their_own_names(state: dict[str, Tensor]) -> None:
    original = NETWORK.to_original(state)
    renamed = {to_comfyui(name): value for name, value in original.items()}
    assert sum(a != b for a, b in zip(renamed, original, strict=True)) > 20
    assert [comfyui_to_original(name) for name in renamed] == list(original)
    assert [comfyui_to_original(name) for name in original] == list(original)
    back = network(renamed)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_adapters_in_the_original_layout_are_read_by_diffusers() -> None:
    """Values at the published width: the update of every part of a fused layer is that of its own factors."""
    draw = torch.Generator().manual_seed(1)
    layers: dict[str, LoraFactors] = {}
    widths = {"to_q": 3072, "to_k": 3072, "to_v": 3072}
    for name, width in widths.items():
        for block in ("transformer_blocks.0.attn.", "single_transformer_blocks.3.attn."):
            a, b = torch.randn(2, 6, generator=draw), torch.randn(width, 2, generator=draw)
            layers[block + name] = LoraFactors(a, b, alpha=2.0)
    a, b = torch.randn(2, 6, generator=draw), torch.randn(4 * 3072, 2, generator=draw)
    layers["single_transformer_blocks.3.proj_mlp"] = LoraFactors(a, b, alpha=2.0)
    original = NETWORK.adapter_to_original(layers)
    assert set(original) == {"double_blocks.0.img_attn_qkv", "single_blocks.3.linear1"}
    file = {}
    for name, factors in original.items():
        assert factors.alpha == factors.rank
        file |= {f"transformer.{name}.lora_A.weight": factors.A, f"transformer.{name}.lora_B.weight": factors.B}
    theirs = _convert_hunyuan_video_lora_to_diffusers(file)
    for name, factors in layers.items():
        update = theirs[f"transformer.{name}.lora_B.weight"] @ theirs[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(update, factors.B @ factors.A, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hunyuan")
    return {v: HunyuanVideo.tiny(root / v, v) for v in ("t2v", "i2v", "i2v-33ch")}


def test_variants_are_told_apart(directories: dict[str, Path], tmp_path: Path) -> None:
    for variant, directory in directories.items():
        assert family(path=str(directory)).variant.name == variant
    for name, channels, expected in (
        ("hunyuan_video_t2v_720p_bf16", 16, "t2v"),
        ("hunyuan_video_v2_replace_image_to_video_720p_bf16", 16, "i2v"),
        ("hunyuan_video_image_to_video_720p_bf16", 33, "i2v-33ch"),
    ):
        weights = {"model.model.img_in.proj.weight": torch.zeros(4, channels, 1, 2, 2)}
        save_file(weights, tmp_path / f"{name}.safetensors")
        assert family(path=str(tmp_path / f"{name}.safetensors")).variant.name == expected


def test_llava_in_the_names_of_older_files(directories: dict[str, Path], tmp_path: Path) -> None:
    """Published LLaVA files are from before transformers 5, where the parts lay beside each other."""
    loaded = family(path=str(directories["i2v"])).load("text_encoder", "cpu", None)
    expected = loaded.state_dict()
    older = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    old = {}
    for name, value in expected.items():
        ((new_place, old_place),) = [pair for pair in older.items() if name.startswith(pair[0])]
        old[old_place + name.removeprefix(new_place)] = value.clone()
    assert not old.keys() & expected.keys()
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save_file(old, folder / "model.safetensors")
    (folder / "config.json").write_text((directories["i2v"] / "text_encoder" / "config.json").read_text())
    ours = family(path=str(directories["i2v"]), text_encoder={"path": str(folder)}).load("text_encoder", "cpu", None)
    state = ours.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_autoencoder_in_latent_diffusion_names(directories: dict[str, Path], tmp_path: Path) -> None:
    """Tencent's names are diffusers'; files for ComfyUI may have the older ones, attention as convolutions."""
    from kinema.families.part_names import AUTOENCODER_KL

    state = load_file(directories["t2v"] / "vae" / "diffusion_pytorch_model.safetensors")
    original = AUTOENCODER_KL.to_original(state)
    original = {
        name: value[..., None] if "attn_1" in name and value.ndim == 4 else value for name, value in original.items()
    }
    assert any("decoder.up.3.block" in name for name in original)
    save_file({name: value.contiguous() for name, value in original.items()}, tmp_path / "vae.safetensors")
    model = family(path=str(directories["t2v"]), autoencoder={"path": str(tmp_path / "vae.safetensors")})
    loaded = model.load("autoencoder", "cpu", None).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_guidance_is_one_unless_said_otherwise(directories: dict[str, Path]) -> None:
    calls: list[Tensor] = []
    for model, expected in (({}, 1000.0), ({"guidance": 6.0}, 6000.0)):
        ours = family(path=str(directories["t2v"]), variant="t2v", **model)
        loaded = ours.load("network", "cpu", torch.float32)
        loaded.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["guidance"]), with_kwargs=True
        )
        batch = Batch(
            0,
            {"latents": [torch.zeros(16, 1, 4, 4)], "text": [torch.ones(3, 32)], "pooled": [torch.ones(24)]},
            [""],
            [0],
            [1.0],
        )
        prepared = ours.prepare(batch)
        with torch.no_grad():
            ours.predict(loaded, prepared.latents, torch.tensor([0.5]), prepared.conditioning)
        assert calls.pop().tolist() == [expected]


def test_guidance_without_an_embedding_is_refused(directories: dict[str, Path]) -> None:
    config = Config.model_validate(
        {
            "model": {"family": "hunyuan_video", "path": str(directories["i2v-33ch"]), "guidance": 3.0},
            "data": {"sources": [{"path": "."}], "buckets": {"frames": [9]}},
            "training": {"steps": 1},
        }
    )
    with pytest.raises(ConfigError, match=r"model\.guidance.*no guidance embedding"):
        HunyuanVideo(config.model).validate(config)
