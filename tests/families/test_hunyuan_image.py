"""HunyuanImage-2.1: what the suite cannot see."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo import Case, batch_of, config_of, recording

from kinema.config.model import PartConfig
from kinema.config.schema import ModelConfig
from kinema.data.batch import Sample
from kinema.errors import ConfigError, UserError
from kinema.families.hunyuan_image import HunyuanImage
from kinema.families.hunyuan_image_layout import (
    AUTOENCODER,
    NETWORK,
    autoencoder_from_original,
    network_from_original,
)
from kinema.families.registry import open_family

QUOTED = "a sign that says \"red ball\" and 'blue'"


@pytest.fixture(scope="module", params=["base", "distilled"])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return HunyuanImage.tiny(tmp_path_factory.mktemp("tiny"), variant, seed=3)


def opened(directory: Path, variant: str, **model: Any) -> HunyuanImage:
    family = open_family(ModelConfig(family="hunyuan_image", variant=variant, path=str(directory), **model))
    assert isinstance(family, HunyuanImage)
    return family


def parts_of(family: HunyuanImage) -> dict[str, Any]:
    return {part: family.load(part, "cpu", torch.float32) for part in family.variant.parts}


def encoded(family: HunyuanImage, parts: dict[str, Any], caption: str) -> dict[str, Tensor]:
    tensors = {"latents": torch.zeros(64, 1, 2, 3)}
    for encoding in family.encodings():
        if encoding.reads == "caption":
            tensors |= family.encode(encoding, {p: parts[p] for p in encoding.parts}, [Sample(caption)])[0]
    return tensors


def test_words_to_draw_reach_the_network(tiny: Path, variant: str) -> None:
    """Captions with and without words in quotation marks, in one batch, give what the pipeline gives for each: both
    texts without padding are its own, and so is the prediction."""
    family = opened(tiny, variant)
    parts = parts_of(family)
    captions = [QUOTED, "a green box"]
    batch = batch_of(*(encoded(family, parts, caption) for caption in captions))
    assert [len(one) > 0 for one in batch.tensors["glyphs"]] == [True, False]
    pipeline = family.pipeline(parts)
    network = parts["network"]
    x_t, t = torch.randn(2, 64, 1, 2, 3), torch.tensor([0.7, 0.7])
    with torch.no_grad():
        ours = family.predict(network, x_t, t, family.prepare(batch).conditioning)
        text, mask, glyphs, glyph_mask = pipeline.encode_prompt(captions, batch_size=2, device=torch.device("cpu"))
        assert text.shape[1] == 1000 and glyphs.shape[1] == 128
        for i in range(2):
            torch.testing.assert_close(batch.tensors["text"][i], text[i][mask[i].bool()], rtol=0, atol=1e-5)
            torch.testing.assert_close(batch.tensors["glyphs"][i], glyphs[i][glyph_mask[i].bool()], rtol=0, atol=1e-5)
        told = {"guidance": torch.full((2,), 1000.0), "timestep_r": t * 1000} if family.distilled else {}
        (theirs,) = network(
            x_t[:, :, 0], t * 1000, text, mask, encoder_hidden_states_2=glyphs, encoder_attention_mask_2=glyph_mask,
            **told, return_dict=False,
        )  # fmt: skip
    torch.testing.assert_close(ours[:, :, 0], theirs, rtol=0, atol=1e-5)


def test_words_to_draw_train_their_own_embedding(tiny: Path, variant: str) -> None:
    family = opened(tiny, variant)
    parts = parts_of(family)
    network = parts["network"].requires_grad_(True)
    for caption, trained in ((QUOTED, True), ("a green box", False)):
        network.zero_grad()
        conditioning = family.prepare(batch_of(encoded(family, parts, caption))).conditioning
        family.predict(
            network, torch.randn(1, 64, 1, 2, 3), torch.tensor([0.5]), conditioning
        ).square().sum().backward()
        gradients = [p.grad for p in network.get_submodule("context_embedder_2").parameters()]
        assert all(grad is not None and bool(grad.any()) == trained for grad in gradients)


def test_long_captions_are_cut_with_a_warning(tiny: Path, variant: str, caplog: pytest.LogCaptureFixture) -> None:
    family = opened(tiny, variant)
    parts = parts_of(family)
    with caplog.at_level(logging.WARNING):
        rows = encoded(family, parts, "a red ball " * 400 + '"' + "x" * 200 + '"')
    assert len(caplog.messages) == 2 and all("are cut: a red ball" in message for message in caplog.messages)
    assert len(rows["text"]) == 1000 and len(rows["glyphs"]) == 128


def test_what_the_distilled_network_is_told(tmp_path: Path) -> None:
    """In training the step ends where it begins, and guidance is 1 or the configuration's."""
    directory = HunyuanImage.tiny(tmp_path, "distilled")
    for told, scale in (({}, 1.0), ({"guidance": 3.25}, 3.25)):
        family = opened(directory, "distilled", **told)
        network = family.load("network", "cpu", torch.float32)
        row = {"latents": torch.zeros(64, 1, 2, 2), "text": torch.randn(3, 32), "glyphs": torch.zeros(0, 24)}
        with recording(network) as calls, torch.no_grad():
            family.predict(
                network, torch.randn(1, 64, 1, 2, 2), torch.tensor([0.5]), family.prepare(batch_of(row)).conditioning
            )
        assert calls[0]["timestep"].tolist() == calls[0]["timestep_r"].tolist() == [500.0]
        assert calls[0]["guidance"].tolist() == [1000 * scale]


def test_time_is_exact_under_autocast(tmp_path: Path) -> None:
    """The embedding of time takes the type of what it is given: a narrow network alone gets a narrow time."""
    family = opened(HunyuanImage.tiny(tmp_path, "base"), "base")
    network = family.load("network", "cpu", torch.bfloat16)
    row = {"latents": torch.zeros(64, 1, 2, 2), "text": torch.randn(3, 32), "glyphs": torch.zeros(0, 24)}
    arguments = torch.randn(1, 64, 1, 2, 2), torch.tensor([0.9871]), family.prepare(batch_of(row)).conditioning
    with recording(network) as calls, torch.no_grad():
        alone = family.predict(network, *arguments)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = family.predict(network, *arguments)
    assert calls[0]["timestep"].dtype == torch.bfloat16
    assert calls[1]["timestep"].item() == pytest.approx(987.1)
    assert alone.isfinite().all() and mixed.isfinite().all()


def test_guidance_of_samples(tiny: Path, variant: str) -> None:
    """The base's pipeline has guidance in objects of its own: a scale of 1 turns them off."""
    family = opened(tiny, variant)
    parts = parts_of(family)
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    calls = {}
    for guidance in (1.0, 4.0):
        arguments = family.sampling_arguments(guidance, [], None)
        with recording(parts["network"]) as called:
            pipeline("a", height=64, width=64, num_inference_steps=2, output_type="latent", **arguments)
        calls[guidance] = called
    if family.distilled:
        assert [len(one) for one in calls.values()] == [2, 2]
        assert calls[4.0][0]["guidance"].item() == 4000
    else:
        assert [len(one) for one in calls.values()] == [2, 4]
        assert pipeline.guider.guidance_scale == 4.0 and pipeline.ocr_guider.guidance_scale == 4.0


# -- names -----------------------------------------------------------------------------------------------------------

_TENCENT = (
    (r"self_attn\.(qkv|proj)", r"self_attn_\1"),
    (r"(img|txt)_attn\.(qkv|proj)", r"\1_attn_\2"),
    (r"(img|txt)_attn\.norm\.(query|key)_norm\.scale", r"\1_attn_\2_norm.weight"),
    (r"\.norm\.(query|key)_norm\.scale", r".\1_norm.weight"),
    (r"query_norm\.", "q_norm."),
    (r"key_norm\.", "k_norm."),
    (r"mlp\.0\.", "mlp.fc1."),
    (r"mlp\.2\.", "mlp.fc2."),
    (r"(_mod|modulation)\.lin\.", r"\1.linear."),
    (r"c_embedder\.in_layer", "c_embedder.linear_1"),
    (r"c_embedder\.out_layer", "c_embedder.linear_2"),
    (r"\.in_layer\.", ".mlp.0."),
    (r"\.out_layer\.", ".mlp.2."),
)


def fused(name: str) -> str:
    """ComfyUI's name in Tencent's words."""
    for pattern, new in _TENCENT:
        name = re.sub(pattern, new, name)
    return name


def separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tencent's release: projections apart."""
    result = {}
    for name, value in state.items():
        if match := re.search(r"(img|txt)_attn_qkv", name):
            result |= {
                name.replace(match[0], f"{match[1]}_attn_{x}"): v for x, v in zip("qkv", value.chunk(3), strict=True)
            }
        elif ".linear1." in name:
            width = len(value) // 7
            sizes = [width, width, width, 4 * width]
            for x, v in zip(("q", "k", "v", "mlp"), value.split(sizes), strict=True):
                result[name.replace("linear1", f"linear1_{x}")] = v
        else:
            result[name.replace("linear2.", "linear2.fc.")] = value
    return result


def test_names_of_all_layouts(tiny: Path, variant: str) -> None:
    network = opened(tiny, variant).load("network", "cpu", torch.float32)
    ours = {name: torch.randn(value.shape) for name, value in network.state_dict().items()}
    comfyui = NETWORK.to_original(ours)
    tencent = {fused(name): value for name, value in comfyui.items()}
    apart = separate(tencent)
    assert {
        "double_blocks.0.img_attn_q_norm.weight",
        "double_blocks.1.txt_attn_k.bias",
        "single_blocks.2.linear1_mlp.weight",
        "single_blocks.0.q_norm.weight",
        "single_blocks.0.linear2.fc.weight",
        "single_blocks.0.modulation.linear.bias",
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight",
        "txt_in.individual_token_refiner.blocks.0.mlp.fc2.bias",
        "txt_in.t_embedder.mlp.0.weight",
        "txt_in.c_embedder.linear_2.weight",
        "time_in.mlp.2.bias",
        "byt5_in.fc3.weight",
        "final_layer.adaLN_modulation.1.weight",
    } <= apart.keys()
    shift, scale = apart["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), ours["norm_out.linear.weight"])
    for state in (comfyui, tencent, apart, ours):
        back = network_from_original(dict(state))
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[name], value) for name, value in ours.items())


def test_variant_of_a_single_file(tiny: Path, variant: str, tmp_path: Path) -> None:
    """In ComfyUI's layout and under its prefix, which holds a second ``model.``: told by its names, and read."""
    network = opened(tiny, variant).load("network", "cpu", torch.float32)
    state = NETWORK.to_original(network.state_dict())
    save_file(
        {f"model.model.{name}": value.contiguous() for name, value in state.items()}, tmp_path / "one.safetensors"
    )
    told = ModelConfig(
        family="hunyuan_image", path=str(tiny), network=PartConfig(path=str(tmp_path / "one.safetensors"))
    )
    assert (
        open_family(ModelConfig(family="hunyuan_image", path=str(tmp_path / "one.safetensors"))).variant.name == variant
    )
    back = open_family(told.model_copy(update={"variant": variant})).load("network", "cpu", torch.float32).state_dict()
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors looks like .*not the network of HunyuanImage"):
        _ = open_family(ModelConfig(family="hunyuan_image", path=str(tmp_path / "other.safetensors"))).variant


def test_autoencoder_in_tencents_layout() -> None:
    """At the published size: every weight has a name, and kernels with an axis of time are read."""
    family = open_family(ModelConfig(family="hunyuan_image", variant="base"))
    state = family.empty("autoencoder").state_dict()
    original = AUTOENCODER.to_original(state)
    assert {
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.5.block.1.conv2.bias",
        "decoder.up.4.upsample.conv.weight",
        "decoder.up.5.block.2.norm1.weight",
        "encoder.mid.attn_1.proj_out.weight",
    } <= original.keys()
    assert "encoder.down.5.downsample.conv.weight" not in original
    with_time = {name: value[:, :, None] if value.ndim == 4 else value for name, value in original.items()}
    back = autoencoder_from_original(with_time)
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in state.items()}


def refusal(variant: str, tiny: Path, root: Path, **model: Any) -> Callable[[], None]:
    config = config_of(Case(family="hunyuan_image", variant=variant), tiny, root, model=model)
    return lambda: open_family(config.model).validate(config)


def test_keys_that_nothing_reads_are_refused(tiny: Path, variant: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.text_length"):
        refusal(variant, tiny, tmp_path, text_length=100)()
    check = refusal(variant, tiny, tmp_path, guidance=2.0)
    if variant == "distilled":
        check()
    else:
        with pytest.raises(ConfigError, match=r"model\.guidance.*distilled"):
            check()
