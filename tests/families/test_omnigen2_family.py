"""OmniGen2: what the suite cannot see."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from zoo import batch_of

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Sample
from kinema.errors import ConfigError, UserError
from kinema.families import omnigen2
from kinema.families.loading import CONFIGS
from kinema.families.omnigen2 import OmniGen2
from kinema.families.registry import open_family
from kinema.networks import omnigen2_pipeline
from kinema.networks.omnigen2 import MAX_REFERENCES
from kinema.sampling.pipeline import SampleSettings, sample_many
from kinema.sampling.placing import text_encoders
from kinema.sampling.references import picture
from kinema.sampling.request import check_image_guidance, check_images, defaults_of_run, defaults_of_variant
from kinema.sampling.texts import Texts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OmniGen2.tiny(tmp_path_factory.mktemp("omnigen2") / "tiny", "omnigen2", seed=3)


@pytest.fixture(scope="module")
def family(tiny: Path) -> OmniGen2:
    return OmniGen2(ModelConfig(family="omnigen2", path=str(tiny)))


@pytest.fixture(scope="module")
def parts(family: OmniGen2) -> dict[str, Any]:
    return {part: family.load(part, "cpu", torch.float32) for part in family.variant.parts}


def noise_picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 1, height, width), generator=draw, dtype=torch.uint8)


def test_limits_are_those_of_network_and_pipeline() -> None:
    """They are repeated where nothing heavy may be imported."""
    shipped = json.loads((CONFIGS / "omnigen2" / "transformer" / "config.json").read_text())
    assert (shipped["axes_lens"][0], shipped["hidden_size"]) == (omnigen2.POSITIONS, omnigen2.WIDTH)
    assert omnigen2.MOST_PICTURES == MAX_REFERENCES
    assert omnigen2.REFERENCE_SIDE == omnigen2_pipeline.REFERENCE_SIDE == omnigen2_pipeline.REFERENCE_PIXELS**0.5
    assert omnigen2.GRID == omnigen2_pipeline.GRID == omnigen2.VARIANTS["omnigen2"].grid


def test_samples_of_a_batch_may_have_different_references(family: OmniGen2, parts: dict[str, Any]) -> None:
    """None, one of its own size, two: each sample's prediction is the one that it has alone."""
    encodings = family.encodings()
    rows = []
    for caption, sizes in (("a", []), ("a red ball under the box", [(32, 48)]), ("left", [(16, 32), (16, 32)])):
        controls = tuple(noise_picture(*size, seed=i) for i, size in enumerate(sizes))
        row: dict[str, torch.Tensor] = {}
        for encoding in encodings:
            sample = Sample(caption, noise_picture(32, 32), controls if encoding.controls else ())
            row |= family.encode(encoding, parts, [sample])[0]
        rows.append(row)
    assert [len(row["controls"]) for row in rows] == [0, 1, 2]
    x_t, t = torch.randn(3, 16, 1, 4, 4), torch.tensor([0.9, 0.2, 0.5])
    with torch.no_grad():
        together = family.predict(parts["network"], x_t, t, family.prepare(batch_of(*rows)).conditioning)
        for i, row in enumerate(rows):
            told = family.prepare(batch_of(row)).conditioning
            assert (told["ref_image_hidden_states"] is None) == (i == 0) and told["text_attention_mask"] is None
            alone = family.predict(parts["network"], x_t[i : i + 1], t[i : i + 1], told)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


def test_large_references_are_encoded_smaller(family: OmniGen2, parts: dict[str, Any]) -> None:
    """As the pipeline sees them: the longer side at most 1024."""
    encoding = next(one for one in family.encodings() if one.name == "controls")
    (row,) = family.encode(
        encoding, {"autoencoder": parts["autoencoder"]}, [Sample("", None, (noise_picture(48, 1152),))]
    )
    assert row["controls"].shape == (1, 16, 32 // 8, 1024 // 8)  # 48 * 1024 / 1152 = 42.7


def test_long_captions_are_cut_with_a_warning(
    tiny: Path, parts: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    short = OmniGen2(ModelConfig(family="omnigen2", path=str(tiny), text_length=30))
    with caplog.at_level(logging.WARNING):
        fits, cut = short.encode(short.encodings()[0], parts, [Sample("a red ball"), Sample("a red ball " * 9)])
    assert len(fits["text"]) == 28 and len(cut["text"]) == 30
    assert len(caplog.messages) == 1 and "are cut: a red ball" in caplog.messages[0]


def test_samples_equal_the_pipelines_own(family: OmniGen2, parts: dict[str, Any], tmp_path: Path) -> None:
    """With and without pictures, which have a guidance of their own; texts are encoded apart."""
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(noise_picture(40, 70, i)[:, 0].permute(1, 2, 0).numpy()).save(files[-1])
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    one = SampleSettings("a red ball", 32, 48, 1, steps=2, guidance=5.0, negative="blue", text_length=888)
    settings = [
        replace(one, image_guidance=2.0),
        replace(one, images=tuple(files[:1]), image_guidance=1.4),
        replace(one, images=tuple(files), guidance=1.0, seed=3),
    ]
    drawn = list(sample_many(family, pipeline, settings))
    for sample, wanted in zip(drawn, settings, strict=True):
        theirs = pipeline(
            wanted.prompt, wanted.negative, [picture(path, 32, 48) for path in wanted.images], 32, 48,
            num_inference_steps=2, guidance_scale=wanted.guidance, image_guidance_scale=wanted.image_guidance or 2.0,
            generator=torch.Generator().manual_seed(wanted.seed), output_type="pt",
        ).images[0]  # fmt: skip
        torch.testing.assert_close(sample[:, 0], theirs * 2 - 1, rtol=0, atol=2e-5)
    assert (drawn[0] - drawn[1]).abs().max() > 0.01


def test_the_text_encoder_is_let_go_after_its_turn(family: OmniGen2, parts: dict[str, Any]) -> None:
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    settings = [SampleSettings("a red ball", 32, 48, 1, steps=1, negative="blue", text_length=888)]
    texts = Texts(family, pipeline)
    texts.encode(settings)
    assert texts.apart
    without = family.pipeline({**parts, "text_encoder": None})
    without.set_progress_bar_config(disable=True)
    expected = next(sample_many(family, pipeline, settings))
    assert torch.equal(next(sample_many(family, without, settings, texts=texts)), expected)
    assert text_encoders(pipeline) == [parts["text_encoder"]]  # and on the device for its turn alone


def test_the_published_scheduler_shifts_by_the_size(tiny: Path, tmp_path: Path) -> None:
    """Its configuration has a key of its authors' for what diffusers calls dynamic shifting."""
    (tmp_path / "scheduler").mkdir()
    published = CONFIGS / "omnigen2" / "scheduler" / "scheduler_config.json"
    for dynamic in (True, False):
        config = json.loads(published.read_text()) | {"dynamic_time_shift": dynamic}
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        family = OmniGen2(ModelConfig(family="omnigen2", variant="omnigen2", path=str(tmp_path)))
        scheduler = family.load("scheduler", "cpu", None)
        assert (scheduler.config.use_dynamic_shifting, scheduler.config.shift) == (dynamic, 1.0)
    family = OmniGen2(ModelConfig(family="omnigen2", path=str(tiny)))
    assert family.load("scheduler", "cpu", None).config.use_dynamic_shifting


def test_a_single_file_is_known_by_its_references(tmp_path: Path) -> None:
    for name, width in (("real", 2520), ("other", 2304)):
        save_file({"image_index_embedding": torch.zeros(5, width)}, tmp_path / f"{name}.safetensors")
    real, other = (
        OmniGen2(ModelConfig(family="omnigen2", path=str(tmp_path / f"{name}.safetensors")))
        for name in ("real", "other")
    )
    assert real.variant.name == "omnigen2"
    with pytest.raises(UserError, match=r"model\.variant: .*other\.safetensors"):
        _ = other.variant


def config_of(tiny: Path, controls: int, **model: Any) -> Config:
    values = {
        "model": {"family": "omnigen2", "path": str(tiny)} | model,
        "data": {
            "sources": [{"path": "a", "controls": [f"c{i}" for i in range(controls)]}],
            "buckets": {"resolutions": [1024], "frames": [1]},
        },
        "training": {"steps": 1},
    }
    return Config.model_validate(values)


def test_control_pictures_are_optional(tiny: Path, family: OmniGen2) -> None:
    assert family.variant.pictures == (0, 5)
    for count in (0, 1, 2):
        config = config_of(tiny, count)
        OmniGen2(config.model).validate(config)
    with pytest.raises(ConfigError, match=r"data\.sources\.controls: .* 0 to 5 folder\(s\).* 6 given"):
        OmniGen2(config_of(tiny, 6).model).validate(config_of(tiny, 6))
    check_images(family, [])
    with pytest.raises(UserError, match=r"omnigen2 edits pictures: give up to 5 with --image, or none; 6 given"):
        check_images(family, [Path("x.png")] * 6)


def test_guidance_towards_pictures(tiny: Path, family: OmniGen2) -> None:
    """Its authors' where nothing is asked for; refused by models that have none."""
    config = config_of(tiny, 1)
    assert defaults_of_run(config, family).image_guidance == defaults_of_variant(family).image_guidance == 2.0
    asked = config.model_copy(update={"preview": config.preview.model_copy(update={"image_guidance": 2.7})})
    assert defaults_of_run(asked, family).image_guidance == 2.7
    check_image_guidance(family, 2.7)
    wan = open_family(ModelConfig(family="wan", variant="t2v-1.3b"))
    check_image_guidance(wan, None)
    with pytest.raises(UserError, match=r"--image-guidance: t2v-1\.3b has no guidance of its own for pictures"):
        check_image_guidance(wan, 2.7)


def test_text_and_pictures_share_the_positions(tiny: Path) -> None:
    """1023 of them, of which a picture of 1024 pixels takes 64."""
    five = config_of(tiny, 5)
    with pytest.raises(ConfigError, match=r"model\.text_length: 888 .* 5 control pictures take 320.* at most 703"):
        OmniGen2(five.model).validate(five)
    for length, fits in ((703, True), (704, False)):
        config = config_of(tiny, 5, text_length=length)
        if fits:
            OmniGen2(config.model).validate(config)
        else:
            with pytest.raises(ConfigError, match="704 tokens"):
                OmniGen2(config.model).validate(config)
    with pytest.raises(ConfigError, match=r"1024 tokens of text .* at most 1023"):
        OmniGen2(config_of(tiny, 0, text_length=1024).model).validate(config_of(tiny, 0, text_length=1024))
