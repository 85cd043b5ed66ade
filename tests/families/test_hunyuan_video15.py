"""HunyuanVideo-1.5: what the suite of all families does not see."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import Case, assert_same, batch_of, encode, picture, recording, their_pipeline

from kinema.config.schema import Config, ModelConfig
from kinema.errors import ConfigError
from kinema.families.hunyuan_video15 import HunyuanVideo15
from kinema.families.hunyuan_video15_layout import AUTOENCODER, NETWORK, network

WORDS = 'a shop with the sign "red ball", and “move” on the door'
CASE = Case(family="hunyuan_video15", variant="480p-i2v", frames=5)


def family(**model: object) -> HunyuanVideo15:
    return HunyuanVideo15(ModelConfig.model_validate({"family": "hunyuan_video15"} | model))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return HunyuanVideo15.tiny(tmp_path_factory.mktemp("hunyuan15"), "480p-i2v")


@pytest.fixture(scope="module")
def state(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")


def to_tencent(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names to Tencent's: its converter (scripts/convert_hunyuan_video1_5_to_diffusers.py), inverted."""
    pairs = {
        "time_embed.timestep_embedder.linear_1.": "time_in.mlp.0.",
        "time_embed.timestep_embedder.linear_2.": "time_in.mlp.2.",
        "context_embedder.time_text_embed.timestep_embedder.linear_1.": "txt_in.t_embedder.mlp.0.",
        "context_embedder.time_text_embed.timestep_embedder.linear_2.": "txt_in.t_embedder.mlp.2.",
        "context_embedder.time_text_embed.text_embedder.": "txt_in.c_embedder.",
        "context_embedder.proj_in.": "txt_in.input_embedder.",
        "context_embedder.token_refiner.refiner_blocks.": "txt_in.individual_token_refiner.blocks.",
        "context_embedder_2.norm.": "byt5_in.layernorm.",
        "context_embedder_2.linear_": "byt5_in.fc",
        "image_embedder.norm_in.": "vision_in.proj.0.",
        "image_embedder.linear_1.": "vision_in.proj.1.",
        "image_embedder.linear_2.": "vision_in.proj.3.",
        "image_embedder.norm_out.": "vision_in.proj.4.",
        "x_embedder.": "img_in.",
        "cond_type_embed.": "cond_type_embedding.",
        "transformer_blocks.": "double_blocks.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
        "proj_out.": "final_layer.linear.",
    }
    refiner = {"attn.to_out.0": "self_attn_proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
    refiner |= {"norm_out.linear": "adaLN_modulation.1"}
    block = {"norm1.linear": "img_mod.linear", "norm1_context.linear": "txt_mod.linear"}
    block |= {f"attn.to_{x}.": f"img_attn_{x}." for x in "qkv"} | {f"attn.add_{x}_proj": f"txt_attn_{x}" for x in "qkv"}
    block |= {"attn.norm_q": "img_attn_q_norm", "attn.norm_k": "img_attn_k_norm", "attn.to_out.0": "img_attn_proj"}
    block |= {"attn.norm_added_q": "txt_attn_q_norm", "attn.norm_added_k": "txt_attn_k_norm"}
    block |= {"attn.to_add_out": "txt_attn_proj", "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2"}
    block |= {"ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2"}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        ((ours, theirs),) = [pair for pair in pairs.items() if name.startswith(pair[0])]
        inner = name.removeprefix(ours)
        for one, other in (refiner if "refiner" in ours else block if ours == "transformer_blocks." else {}).items():
            if inner.split(".", 1)[1].startswith(one):
                inner = inner.replace(one, other, 1)
                break
        swapped = torch.cat(value.chunk(2)[::-1]) if ours.startswith("norm_out") else value
        result[theirs + inner] = swapped
    for i in range(2):
        for kind in ("weight", "bias"):
            at = f"txt_in.individual_token_refiner.blocks.{i}."
            parts = [result.pop(f"{at}attn.to_{x}.{kind}") for x in "qkv"]
            result[f"{at}self_attn_qkv.{kind}"] = torch.cat(parts)
    return result


def test_tencents_own_files_are_read(state: dict[str, Tensor]) -> None:
    tencent = to_tencent(state)
    assert "double_blocks.1.txt_attn_v.bias" in tencent and "double_blocks.0.img_attn_q_norm.weight" in tencent
    assert not set(tencent) & set(state)
    back = network(tencent)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_the_original_names_are_those_that_comfyui_reads(state: dict[str, Tensor]) -> None:
    original = NETWORK.to_original(state)
    for name in (
        "img_in.proj.weight",
        "time_in.in_layer.bias",
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight",
        "byt5_in.fc3.weight",
        "vision_in.proj.4.bias",
        "cond_type_embedding.weight",
        "double_blocks.2.img_attn.qkv.weight",
        "double_blocks.0.txt_attn.norm.key_norm.scale",
        "double_blocks.0.img_mod.lin.weight",
        "final_layer.adaLN_modulation.1.weight",
    ):
        assert name in original, name


def test_the_autoencoder_of_an_original_file(directory: Path, tmp_path: Path) -> None:
    state = load_file(directory / "vae" / "diffusion_pytorch_model.safetensors")
    original = AUTOENCODER.to_original(state)
    for name in ("encoder.down.1.downsample.conv.conv.weight", "encoder.mid.attn_1.q.weight", "decoder.norm_out.gamma"):
        assert name in original, name
    assert "decoder.up.0.block.1.norm1.gamma" in original and "decoder.up.3.upsample.conv.conv.bias" in original
    save_file(original, tmp_path / "vae.safetensors")
    ours = family(path=str(directory), variant="480p-i2v", autoencoder={"path": str(tmp_path / "vae.safetensors")})
    loaded = ours.load("autoencoder", "cpu", None).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.fixture(scope="module")
def model(directory: Path) -> tuple[HunyuanVideo15, dict[str, Any]]:
    ours = family(path=str(directory), variant="480p-i2v")
    return ours, {part: ours.load(part, "cpu", torch.float32) for part in ours.variant.parts}


def test_words_to_be_drawn_reach_the_network(model: tuple[HunyuanVideo15, dict[str, Any]], directory: Path) -> None:
    """Both kinds of quotation marks; beside a caption without any, whose glyphs are all padding."""
    ours, parts = model
    pipeline = their_pipeline(CASE, ours, directory)
    pipeline.guider.guidance_scale = 1.0
    network = parts["network"]
    with recording(pipeline.transformer) as theirs:
        pipeline(
            picture(CASE.clip), WORDS, num_frames=5, num_inference_steps=1, generator=torch.Generator().manual_seed(1)
        )
    drawn, plain = (encode(CASE, ours, parts, caption) for caption in (WORDS, "no words"))
    assert len(drawn["glyphs"]) == len('Text "red ball". Text "move". ') + 1 and len(plain["glyphs"]) == 0
    (inputs,) = theirs
    x_t, t = inputs["hidden_states"][:, :32], inputs["timestep"] / 1000
    expected = network(**inputs, return_dict=False)[0]
    alone = ours.prepare(batch_of(drawn))
    with torch.no_grad():
        assert_same(ours.predict(network, x_t, t, alone.conditioning), expected, 1e-5, "alone")
        both = ours.prepare(batch_of(plain, drawn))
        together = ours.predict(network, x_t.repeat(2, 1, 1, 1, 1), t.repeat(2), both.conditioning)
    assert_same(together[1:], expected, 1e-5, "beside another")
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_glyphs_train_their_projection(model: tuple[HunyuanVideo15, dict[str, Any]]) -> None:
    ours, parts = model
    network = copy.deepcopy(parts["network"]).requires_grad_(True)
    prepared = ours.prepare(batch_of(encode(CASE, ours, parts, WORDS)))
    ours.predict(network, prepared.latents, torch.tensor([0.5]), prepared.conditioning).square().mean().backward()
    for name, parameter in network.context_embedder_2.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_samples_have_the_size_that_is_asked_for(model: tuple[HunyuanVideo15, dict[str, Any]]) -> None:
    """diffusers' pipeline would make 32 x 48 of this picture."""
    ours, parts = model
    pipeline = ours.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    arguments = ours.sampling_arguments(1.0, [picture(CASE.clip)], None)
    sizes = {"height": 48, "width": 64}
    frames = pipeline(
        prompt="a ball", **arguments, **sizes, num_frames=5, num_inference_steps=1, output_type="pt", return_dict=False
    )[0]
    assert frames.shape == (1, 5, 3, 48, 64)
    assert "calculate_default_height_width" not in vars(pipeline.video_processor)


def test_two_samples_in_one_call(tmp_path: Path) -> None:
    directory = HunyuanVideo15.tiny(tmp_path / "t2v", "480p-t2v")
    ours = family(path=str(directory), variant="480p-t2v")
    pipeline = ours.pipeline({part: ours.load(part, "cpu", torch.float32) for part in ours.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    ours.sampling_arguments(3.0, [], None)
    assert pipeline.guider.guidance_scale == 3.0
    settings = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
    draw = [torch.Generator().manual_seed(i) for i in (1, 2)]
    both = pipeline(prompt=["a ball", "a box"], negative_prompt=["", ""], generator=draw, **settings).frames
    alone = pipeline(prompt="a box", negative_prompt="", generator=torch.Generator().manual_seed(2), **settings).frames
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("hunyuanvideo1.5_720p_t2v_fp16.safetensors", "720p-t2v"),
        ("hunyuanvideo1.5_480p_i2v_cfg_distilled_fp16.safetensors", "480p-i2v-distilled"),
        ("480p_i2v_step_distilled/diffusion_pytorch_model.safetensors", "480p-i2v-step-distilled"),
    ],
)
def test_files_say_in_their_names_what_they_are(tmp_path: Path, file: str, variant: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, tmp_path / file)
    assert family(path=str(tmp_path / file)).variant.name == variant


def test_a_directory_says_it_in_its_configurations(tmp_path: Path) -> None:
    from kinema.families.loading import CONFIGS

    for variant, scale in (("720p-i2v", 6.0), ("720p-i2v-distilled", 1.0), ("480p-i2v-step-distilled", 1.0)):
        root = tmp_path / variant
        for folder in ("transformer", "guider"):
            (root / folder).mkdir(parents=True)
        shipped = CONFIGS / "hunyuan_video15" / variant / "transformer" / "config.json"
        (root / "transformer" / "config.json").write_text(shipped.read_text())
        (root / "guider" / "guider_config.json").write_text(f'{{"guidance_scale": {scale}}}')
        assert family(path=str(root)).variant.name == variant


def test_a_text_length_is_refused(directory: Path) -> None:
    config = Config.model_validate(
        {
            "model": {"family": "hunyuan_video15", "path": str(directory), "variant": "480p-i2v", "text_length": 64},
            "data": {"sources": [{"path": "."}], "buckets": {"frames": [9]}},
            "training": {"steps": 1},
        }
    )
    with pytest.raises(ConfigError, match=r"model\.text_length.*1000 tokens"):
        HunyuanVideo15(config.model).validate(config)
