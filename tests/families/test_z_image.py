"""Z-Image: what the suite cannot see."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from zoo import batch_of

from kinema.config.schema import ModelConfig
from kinema.data.batch import Sample
from kinema.errors import UserError
from kinema.families.layout import LoraFactors
from kinema.families.loading import CONFIGS
from kinema.families.registry import open_family
from kinema.families.z_image import NETWORK, ZImage
from kinema.sampling.pipeline import SampleSettings, sample_many


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ZImage.tiny(tmp_path_factory.mktemp("tiny"), "base", seed=3)


def test_texts_of_several_lengths_do_not_see_each_other(tiny: Path) -> None:
    family = open_family(ModelConfig(family="z_image", variant="base", path=str(tiny)))
    network = family.load("network", "cpu", torch.float32)
    x_t, t = torch.randn(2, 16, 1, 4, 6), torch.tensor([0.3, 0.8])
    rows = [{"text": torch.randn(length, 32), "latents": torch.randn(16, 1, 4, 6)} for length in (3, 40)]
    with torch.no_grad():
        both = family.predict(network, x_t, t, family.prepare(batch_of(*rows)).conditioning)
        for i, row in enumerate(rows):
            alone = family.predict(network, x_t[i : i + 1], t[i : i + 1], family.prepare(batch_of(row)).conditioning)
            torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)


def test_long_captions_are_cut_with_a_warning(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = open_family(ModelConfig(family="z_image", variant="base", path=str(tiny), text_length=20))
    encoding = family.encodings()[0]
    parts = {part: family.load(part, "cpu", torch.float32) for part in encoding.parts}
    with caplog.at_level(logging.WARNING):
        short, long = family.encode(encoding, parts, [Sample("a red ball"), Sample("a red ball " * 30)])
    assert len(caplog.messages) == 1 and "are cut: a red ball" in caplog.messages[0]
    assert len(short["text"]) < 20 and long["text"].shape == (20, 32)


@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_variant_of_a_directory(tmp_path: Path, variant: str) -> None:
    """Their networks are alike: the schedulers tell."""
    shipped = CONFIGS / "z_image"
    shutil.copytree(shipped / "transformer", tmp_path / "transformer")
    shutil.copytree(shipped / variant / "scheduler", tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}))
    assert open_family(ModelConfig(family="z_image", path=str(tmp_path))).variant.name == variant


def test_variant_of_a_single_file(tmp_path: Path) -> None:
    """By its name; base and Turbo are alike inside."""
    for name in ("z_image_turbo_bf16.safetensors", "model.safetensors"):
        save_file({"layers.0.attention.qkv.weight": torch.zeros(1)}, tmp_path / name)
    turbo, other = (
        open_family(ModelConfig(family="z_image", path=str(tmp_path / name)))
        for name in ("z_image_turbo_bf16.safetensors", "model.safetensors")
    )
    assert turbo.variant.name == "turbo"
    with pytest.raises(UserError, match="Name one: base, turbo"):
        _ = other.variant


def test_adapters_are_named_as_the_community_names_them() -> None:
    """Written by the authors' layers, which ComfyUI and diffusers read; read by ComfyUI's fused layers too."""
    layer = "layers.3.attention.to_k"
    factors = LoraFactors(torch.randn(2, 6), torch.randn(6, 2), 2.0)
    assert NETWORK.adapter_to_original({layer: factors}) == {layer: factors}
    fused = LoraFactors(torch.randn(2, 6), torch.randn(18, 2), 2.0)
    split = NETWORK.adapter_from_original({"layers.3.attention.qkv": fused})
    assert list(split) == [f"layers.3.attention.to_{x}" for x in "qkv"]
    whole = torch.cat([one.scale * one.B @ one.A for one in split.values()])
    torch.testing.assert_close(whole, fused.scale * fused.B @ fused.A)


def test_samples_equal_the_pipelines_own(tiny: Path) -> None:
    """Texts encoded apart are handed over one by one, and a scale of 1 means no guidance."""
    family = open_family(ModelConfig(family="z_image", variant="base", path=str(tiny)))
    pipeline = family.pipeline({part: family.load(part, "cpu", torch.float32) for part in family.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    one = SampleSettings("a red ball", 32, 48, 1, steps=2, guidance=4.0, negative="blue", text_length=512)
    settings = [one, replace(one, prompt="a green box in a far longer sentence", seed=1), replace(one, guidance=1.0)]
    drawn = list(sample_many(family, pipeline, settings))
    for sample, wanted in zip(drawn, settings, strict=True):
        theirs = pipeline(
            wanted.prompt, negative_prompt=wanted.negative, height=32, width=48, num_inference_steps=2,
            guidance_scale=wanted.guidance - 1, generator=torch.Generator().manual_seed(wanted.seed), output_type="pt",
        ).images[0]  # fmt: skip
        torch.testing.assert_close(sample[:, 0], theirs * 2 - 1, rtol=0, atol=2e-4)
