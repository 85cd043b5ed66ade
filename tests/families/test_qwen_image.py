"""Qwen-Image: what the suite cannot see."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import save_file
from zoo import Case, batch_of, config_of, recording

from kinema.config.model import PartConfig
from kinema.config.schema import ModelConfig
from kinema.data.batch import Sample
from kinema.errors import ConfigError, UserError
from kinema.families.loading import CONFIGS
from kinema.families.qwen_image import QwenImage
from kinema.families.registry import open_family
from kinema.sampling.pipeline import SampleSettings, sample_many


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return QwenImage.tiny(tmp_path_factory.mktemp("plus"), "edit-plus", seed=3)


def family(directory: Path, variant: str = "edit-plus") -> QwenImage:
    opened = open_family(ModelConfig(family="qwen_image", variant=variant, path=str(directory)))
    assert isinstance(opened, QwenImage)
    return opened


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (fine[0] * 255).to(torch.uint8)[:, None]


@pytest.mark.slow
def test_control_pictures_of_a_million_pixels(plus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size to which the pipeline brings every control picture, ours equal its own: two sizes, of a tall picture,
    for the text encoder and for the latents."""
    from diffusers import QwenImageEditPlusPipeline

    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 1024 * 1024)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 384 * 384)
    ours = family(plus)
    parts = {part: ours.load(part, "cpu", torch.float32) for part in ours.variant.parts}
    picture = smooth(1184, 896)
    sample = Sample("make it green", smooth(32, 32), (picture,))
    encodings = {one.name: one for one in ours.encodings()}
    (text,) = ours.encode(encodings["text"], parts, [sample])
    (controls,) = ours.encode(encodings["controls"], parts, [sample])
    assert controls["control_sizes"].tolist() == [[74, 56]] and controls["controls"].shape == (74 * 56, 64)

    pipeline = QwenImageEditPlusPipeline(**{ours.folder(part): parts[part] for part in ours.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    network = parts["network"]
    monkeypatch.setattr(network, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    calls = []
    network.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    pipeline(
        image=Image.fromarray(picture[:, 0].permute(1, 2, 0).numpy()),
        prompt="make it green", height=32, width=32, num_inference_steps=1, true_cfg_scale=1.0, output_type="latent",
    )  # fmt: skip
    (theirs,) = calls
    torch.testing.assert_close(theirs["encoder_hidden_states"][0], text["text"], rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs["hidden_states"][0, 4:], controls["controls"], rtol=0, atol=1e-5)
    assert theirs["img_shapes"] == [[(1, 2, 2), (1, 74, 56)]]


def test_texts_of_several_lengths_do_not_see_each_other(tmp_path: Path) -> None:
    base = family(QwenImage.tiny(tmp_path, "base"), "base")
    network = base.load("network", "cpu", torch.float32)
    x_t, t = torch.randn(2, 16, 1, 4, 6), torch.tensor([0.3, 0.8])
    rows = [{"text": torch.randn(length, 32), "latents": torch.randn(16, 1, 4, 6)} for length in (3, 7)]
    together = base.prepare(batch_of(*rows))
    assert together.conditioning["encoder_hidden_states_mask"].sum(1).tolist() == [3, 7]
    with torch.no_grad():
        both = base.predict(network, x_t, t, together.conditioning)
        for i, row in enumerate(rows):
            alone = base.predict(network, x_t[i : i + 1], t[i : i + 1], base.prepare(batch_of(row)).conditioning)
            torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)


def test_long_captions_are_cut_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig(
        family="qwen_image", variant="base", path=str(QwenImage.tiny(tmp_path, "base")), text_length=20
    )  # fmt: skip
    base = open_family(model)
    encoding = base.encodings()[0]
    parts = {part: base.load(part, "cpu", torch.float32) for part in encoding.parts}
    with caplog.at_level(logging.WARNING):
        short, long = base.encode(encoding, parts, [Sample("a red ball"), Sample("a red ball " * 30)])
    assert len(caplog.messages) == 1 and "are cut: a red ball" in caplog.messages[0]
    assert short["text"].shape == (8, 32) and long["text"].shape == (20, 32)


def test_wrong_numbers_of_control_pictures(plus: Path, tmp_path: Path) -> None:
    several, one = family(plus), family(plus, "edit")
    text = several.encodings()[0]
    with pytest.raises(UserError, match="one or more control pictures, and a record has 0"):
        several.encode(text, text_parts(several), [Sample("x")])
    pictures = (smooth(32, 32), smooth(32, 32, 1))
    with pytest.raises(UserError, match=r"edits from one control picture, and a record has 2.*edit-plus"):
        one.encode(one.encodings()[0], text_parts(several), [Sample("x", None, pictures)])
    row = {"text": torch.zeros(3, 32), "latents": torch.zeros(16, 1, 4, 4)}
    rows = [
        row | {"controls": torch.zeros(4 * n, 64), "control_sizes": torch.tensor([[2, 2]] * n)} for n in (1, 2)
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"have 1 and 2.*micro_batch_size = 1"):
        several.prepare(batch_of(*rows))


def text_parts(of: QwenImage) -> dict[str, object]:
    return {part: of.load(part, "cpu", torch.float32) for part in of.encodings()[0].parts}


def test_clean_time_for_control_pictures_in_2511(tmp_path: Path) -> None:
    """zero_cond_t reaches the network: its control tokens are modulated apart."""
    late = family(QwenImage.tiny(tmp_path, "edit-2511"), "edit-2511")
    network = late.load("network", "cpu", torch.float32)
    row = {"text": torch.randn(3, 32), "latents": torch.zeros(16, 1, 4, 4)}
    row |= {"controls": torch.randn(4, 64), "control_sizes": torch.tensor([[2, 2]])}
    block = network.get_submodule("transformer_blocks.0")
    with recording(block) as calls, torch.no_grad():
        late.predict(
            network, torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5]), late.prepare(batch_of(row)).conditioning
        )
    assert calls[0]["modulate_index"].tolist() == [[0] * 4 + [1] * 4]


@pytest.mark.parametrize("variant", ["base", "edit", "edit-plus", "edit-2511"])
def test_variant_of_a_directory(tmp_path: Path, variant: str) -> None:
    """From its index and the configuration of its network; older configurations do not know zero_cond_t."""
    shipped = CONFIGS / "qwen_image" / ("edit-2511" if variant == "edit-2511" else "") / "transformer/config.json"
    (tmp_path / "transformer").mkdir()
    shutil.copy(shipped, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": QwenImage.variants[variant].pipeline}))
    assert open_family(ModelConfig(family="qwen_image", path=str(tmp_path))).variant.name == variant
    described = json.loads(shipped.read_text())
    if not described.pop("zero_cond_t"):
        (tmp_path / "transformer/config.json").write_text(json.dumps(described))
        assert open_family(ModelConfig(family="qwen_image", path=str(tmp_path))).variant.name == variant
    (tmp_path / "model_index.json").unlink()
    if variant != "edit-2511":
        with pytest.raises(UserError, match="Name one: base, edit, edit-plus"):
            _ = open_family(ModelConfig(family="qwen_image", path=str(tmp_path))).variant


def test_the_release_2511_in_a_single_file(tmp_path: Path) -> None:
    """ComfyUI's file has an empty tensor that says which it is, and that is no weight."""
    directory = QwenImage.tiny(tmp_path / "tiny", "edit-2511")
    network = family(directory, "edit-2511").load("network", "cpu", torch.float32)
    state = {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()}
    file = tmp_path / "qwen_image_edit_2511_bf16.safetensors"
    save_file(state | {"model.diffusion_model.__index_timestep_zero__": torch.zeros(0)}, file)
    assert open_family(ModelConfig(family="qwen_image", path=str(file))).variant.name == "edit-2511"
    model = ModelConfig(
        family="qwen_image", variant="edit-2511", path=str(directory), network=PartConfig(path=str(file))
    )
    back = open_family(model).load("network", "cpu", torch.float32).state_dict()
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())


def test_text_length_is_checked(plus: Path, tmp_path: Path) -> None:
    for variant, length, message in (("edit-plus", 100, "part of the text"), ("base", 2000, "1024")):
        sources = [{"path": str(tmp_path), "controls": [str(tmp_path)] * (variant == "edit-plus")}]
        case, tables = Case(family="qwen_image", variant=variant), {"data": {"sources": sources}}
        config = config_of(case, plus, tmp_path, model={"text_length": length}, **tables)
        with pytest.raises(ConfigError, match=message):
            open_family(config.model).validate(config)


def test_samples_equal_the_pipelines_own(plus: Path, tmp_path: Path) -> None:
    """Guidance is what the pipeline calls true_cfg_scale; each edit gets a call of its own."""
    ours = family(plus)
    parts = {part: ours.load(part, "cpu", torch.float32) for part in ours.variant.parts}
    pipeline = ours.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    shown = Image.fromarray(smooth(32, 64)[:, 0].permute(1, 2, 0).numpy())
    shown.save(tmp_path / "shown.png")
    one = SampleSettings(
        "make it green", 32, 64, 1, steps=2, guidance=4.0, negative="blue", images=(tmp_path / "shown.png",) * 2
    )
    settings = [one, replace(one, prompt="make it larger than it was", seed=1)]
    for sample, wanted in zip(sample_many(ours, pipeline, settings), settings, strict=True):
        theirs = pipeline(
            [shown, shown], wanted.prompt, negative_prompt=wanted.negative, height=32, width=64, true_cfg_scale=4.0,
            num_inference_steps=2, generator=torch.Generator().manual_seed(wanted.seed), output_type="pt",
        ).images[0]  # fmt: skip
        torch.testing.assert_close(sample[:, 0], theirs * 2 - 1, rtol=0, atol=2e-4)


def test_sources_with_different_numbers_of_pictures(plus: Path, tmp_path: Path) -> None:
    case = Case(family="qwen_image", variant="edit-plus")
    sources = [{"path": str(tmp_path), "controls": [str(tmp_path)] * n} for n in (1, 2)]
    for size, fits in ((1, True), (2, False)):
        config = config_of(case, plus, tmp_path, data={"sources": sources}, training={"steps": 1, "batch_size": size})
        check = open_family(config.model).validate
        if fits:
            check(config)
        else:
            with pytest.raises(ConfigError, match=r"1 and 2 control pictures.*micro_batch_size = 1"):
                check(config)
