"""Flux: what the suite of all families does not see."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.adapters.state import lora_adapter
from kinema.adapters.write import save_adapter
from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Batch, Sample
from kinema.errors import ConfigError, UserError
from kinema.families.flux import Flux
from kinema.families.layout import LoraFactors
from kinema.families.loading import CONFIGS
from kinema.objectives.flow import flow_matching

VARIANTS = ("dev", "schnell", "kontext-dev")
REAL = {"num_layers": 1, "num_single_layers": 1}
"""One block of each kind, at the published width: diffusers' converters have it hard-coded."""


def family(**model: object) -> Flux:
    return Flux(ModelConfig.model_validate({"family": "flux"} | model))


def config(**model: object) -> Config:
    tables = {"data": {"sources": [{"path": "."}]}, "training": {"steps": 1}}
    return Config.model_validate({"model": {"family": "flux"} | model} | tables)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux")
    return {variant: Flux.tiny(root / variant, variant, seed=1) for variant in VARIANTS}


def few_blocks(**overrides: object) -> torch.nn.Module:
    """The dev network with one block of each kind, without weights."""
    from diffusers import FluxTransformer2DModel

    settings = json.loads((CONFIGS / "flux" / "dev" / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(settings, **REAL, **overrides)


@pytest.mark.parametrize("distilled", [True, False])
def test_the_converter_of_diffusers_reads_our_single_file(distilled: bool) -> None:
    """At the published width, but for inputs: the layouts differ in rows alone."""
    draw = torch.Generator().manual_seed(0)
    shapes = few_blocks(guidance_embeds=distilled).state_dict()
    state = {
        name: torch.randn(value.shape[0], *[1] * (value.ndim - 1), generator=draw) for name, value in shapes.items()
    }
    original = family(variant="dev").to_original(state)
    assert original["single_blocks.0.linear1.weight"].shape[0] == 7 * 3072
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert theirs.keys() == state.keys()
    for name, value in theirs.items():
        assert torch.equal(value, state[name]), name
    renamed = {name.replace("_norm.scale", "_norm.weight"): value for name, value in original.items()}
    assert renamed.keys() != original.keys()
    for file in (original, renamed, state):  # published, saved by newer versions of ComfyUI, diffusers'
        ours = Flux.parts["network"].to_ours(dict(file))
        assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)


@pytest.mark.parametrize("part", ["all", "queries"])
def test_kohya_adapters_at_the_published_width(part: str, tmp_path: Path) -> None:
    """Every layer that is adapted by default, or queries alone: the rows of the rest of a fused layer are zero."""
    flux = family(variant="dev")
    layers = {n: m for n, m in few_blocks().named_modules() if isinstance(m, torch.nn.Linear) and "blocks" in n}
    if part == "queries":
        layers = {name: layer for name, layer in layers.items() if name.endswith(("to_q", "add_q_proj"))}
    draw = torch.Generator().manual_seed(1)
    factors = {
        name: LoraFactors(torch.randn(2, 3, generator=draw), torch.randn(layer.out_features, 2, generator=draw), 1.0)
        for name, layer in layers.items()
    }
    assert len(factors) == (20 if part == "all" else 3)
    file = tmp_path / "kohya.safetensors"
    save_adapter(file, "kohya", [lora_adapter(factors, "network")], flux, metadata={})
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(file))
    updates: dict[str, Tensor] = {}
    for name in theirs:
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            updates[layer] = theirs[name.replace("lora_A", "lora_B")] @ theirs[name]
    assert factors.keys() <= updates.keys()
    for name, update in updates.items():
        ours = factors[name].scale * factors[name].B @ factors[name].A if name in factors else torch.zeros(())
        torch.testing.assert_close(
            update, ours.expand_as(update), rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_sizes_are_those_of_the_published_indices() -> None:
    """``total_size`` in the indices of the published shards, which are in bf16."""
    published = {"dev": 23_802_816_640, "schnell": 23_782_357_120, "kontext-dev": 23_802_816_640}
    assert {name: 2 * variant.parameters for name, variant in Flux.variants.items()} == published


def as_published(directory: Path, variant: str, root: Path) -> Path:
    """A directory with the published configuration of the network and no weights of it."""
    shutil.copytree(directory, root, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(CONFIGS / "flux" / variant / "transformer" / "config.json", root / "transformer")
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_of_a_directory(directories: dict[str, Path], tmp_path: Path, variant: str) -> None:
    """By its guidance embedding and the pipeline that its index names, whatever its name."""
    published = as_published(directories[variant], variant, tmp_path / "model")
    assert family(path=str(published)).variant.name == variant


def test_the_variant_of_a_single_file(directories: dict[str, Path], tmp_path: Path) -> None:
    def written(name: str, variant: str, prefix: str = "") -> dict[str, str]:
        state = load_file(directories[variant] / "transformer" / "diffusion_pytorch_model.safetensors")
        original = family(variant=variant).to_original(state)
        save_file({f"{prefix}{k}": v.contiguous() for k, v in original.items()}, tmp_path / name)
        return {"path": str(tmp_path / name)}

    assert family(**written("flux1-schnell.safetensors", "schnell")).variant.name == "schnell"
    assert family(**written("some.safetensors", "schnell", "model.diffusion_model.")).variant.name == "schnell"
    assert family(**written("flux1-dev.safetensors", "dev")).variant.name == "dev"
    assert family(**written("flux1-dev-kontext_fp8.safetensors", "dev")).variant.name == "kontext-dev"
    with pytest.raises(UserError, match=r"does not say which variant of flux.*dev, schnell, kontext-dev"):
        _ = family(**written("mine.safetensors", "dev")).variant
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="looks like an autoencoder, not a Flux network"):
        _ = family(path=str(tmp_path / "vae.safetensors")).variant


def test_the_guidance_embedding_can_be_left_out(directories: dict[str, Path]) -> None:
    """The prediction is that of a network whose guidance embedder gives nothing, and its weights get no gradient."""
    path = str(directories["dev"])
    plain, bypassing = (
        family(path=path, variant="dev", guidance=4.0),
        family(path=path, variant="dev", bypass_guidance=True),
    )
    draw = torch.Generator().manual_seed(2)
    conditioning = {
        "encoder_hidden_states": torch.randn(2, 9, 32, generator=draw),
        "pooled_projections": torch.randn(2, 24, generator=draw),
    }
    x_t, t = torch.randn(2, 16, 1, 4, 6, generator=draw), torch.tensor([0.3, 0.8])
    network = plain.load("network", "cpu", None)
    told = plain.predict(network, x_t, t, conditioning)
    last = network.get_submodule("time_text_embed.guidance_embedder.linear_2")
    last.weight.data.zero_(), last.bias.data.zero_()
    expected = plain.predict(network, x_t, t, conditioning)
    assert (told - expected).abs().max() > 1e-2

    other = bypassing.load("network", "cpu", None).requires_grad_(True)
    predicted = bypassing.predict(other, x_t, t, conditioning)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-6)
    predicted.square().mean().backward()
    without = {name for name, parameter in other.named_parameters() if parameter.grad is None}
    assert (
        without == {name for name, _ in other.named_parameters() if "guidance_embedder" in name} and len(without) == 4
    )


def test_training_tells_a_guidance_of_one(directories: dict[str, Path]) -> None:
    told: list[Any] = []
    for variant, guidance in (("dev", None), ("dev", 0.0), ("schnell", None)):
        flux = family(path=str(directories[variant]), variant=variant, guidance=guidance)
        network = flux.load("network", "cpu", None)
        network.register_forward_pre_hook(lambda _m, _a, kwargs: told.append(kwargs["guidance"]), with_kwargs=True)
        conditioning = {"encoder_hidden_states": torch.zeros(2, 3, 32), "pooled_projections": torch.zeros(2, 24)}
        flux.predict(network, torch.zeros(2, 16, 1, 4, 4), torch.tensor([0.2, 0.4]), conditioning)
    assert torch.equal(told[0], torch.ones(2)) and torch.equal(told[1], torch.zeros(2)) and told[2] is None


def test_the_shift_grows_with_the_picture() -> None:
    for variant in ("dev", "kontext-dev"):
        law = flow_matching(config(variant=variant).objective, family(variant=variant)).law
        for tokens in (256, 1024, 4096, 6000):
            assert law.shift_for(tokens) == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-12)
    assert flow_matching(config(variant="schnell").objective, family(variant="schnell")).law.shift_for(4096) == 1.0
    assert family(variant="dev").tokens(torch.zeros(1, 16, 1, 128, 96)) == 64 * 48


def test_a_record_to_edit_has_one_picture(directories: dict[str, Path]) -> None:
    flux = family(path=str(directories["kontext-dev"]), variant="kontext-dev")
    autoencoder = flux.load("autoencoder", "cpu", None)
    (encoding,) = (one for one in flux.encodings() if one.controls)
    picture = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    for pictures in ((), (picture, picture)):
        with pytest.raises(UserError, match=rf"one control picture, and a record has {len(pictures)}"):
            flux.encode(encoding, {"autoencoder": autoencoder}, [Sample("a ball", picture, pictures)])
    (row,) = flux.encode(encoding, {"autoencoder": autoencoder}, [Sample("a ball", picture, (picture,))])
    assert row["control"].shape == (16, 1, 4, 4) and set(row) == {"control"}


def test_control_pictures_of_another_size_than_what_is_made(directories: dict[str, Path]) -> None:
    """Their tokens come last and are dropped from the prediction; their places count from their own corner."""
    flux = family(path=str(directories["kontext-dev"]), variant="kontext-dev")
    network = flux.load("network", "cpu", None)
    calls: list[dict[str, Any]] = []
    network.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    tensors = {
        "text": [torch.zeros(3, 32)],
        "pooled": [torch.zeros(24)],
        "latents": [torch.zeros(16, 1, 4, 6)],
        "control": [torch.ones(16, 1, 8, 4)],
    }
    prepared = flux.prepare(Batch(0, tensors, [""], [0], [1.0]))
    predicted = flux.predict(network, prepared.latents, torch.tensor([0.5]), prepared.conditioning)
    assert predicted.shape == (1, 16, 1, 4, 6)
    assert torch.equal(calls[0]["hidden_states"][0, :, 0], torch.tensor([0.0] * 6 + [1.0] * 8))
    places = calls[0]["img_ids"].tolist()
    assert places[:6] == [[0, row, column] for row in range(2) for column in range(3)]
    assert places[6:] == [[1, row, column] for row in range(4) for column in range(2)]


def test_captions_are_cut_with_a_warning(directories: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    flux = family(path=str(directories["schnell"]), variant="schnell", text_length=6)
    parts = {part: flux.load(part, "cpu", None) for part in ("text_encoder_2", "tokenizer_2")}
    usual = family(path=str(directories["schnell"]), variant="schnell").encodings()[0]
    assert flux.encodings()[0].settings != usual.settings == "length 256"
    assert family(variant="dev").encodings()[0].settings == "length 512"
    (row,) = flux.encode(flux.encodings()[0], parts, [Sample("a red ball moves left over the box")])
    assert row["text"].shape == (6, 32)
    assert "9 tokens, the last 3 are cut" in caplog.text


def test_clip_sees_the_beginning_and_nobody_complains(
    directories: dict[str, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    flux = family(path=str(directories["dev"]), variant="dev")
    parts = {part: flux.load(part, "cpu", None) for part in ("text_encoder", "tokenizer")}
    long = "a red ball " * 30  # 90 tokens of CLIP
    capfd.readouterr()
    beginning, whole = (flux.encode(flux.encodings()[1], parts, [Sample(one)])[0] for one in (long[:-44], long))
    assert torch.equal(beginning["pooled"], whole["pooled"])
    assert "truncated" not in capfd.readouterr().err + caplog.text


@pytest.mark.parametrize(
    ("variant", "model", "message"),
    [
        ("dev", {"text_length": 600}, "600 is more than the 512 tokens"),
        ("schnell", {"guidance": 3.5}, "schnell has no guidance embedding"),
        ("schnell", {"bypass_guidance": True}, "schnell has no guidance embedding"),
        ("dev", {"bypass_guidance": True, "guidance": 1.0}, "leaves out what would read it"),
    ],
)
def test_what_is_refused(directories: dict[str, Path], variant: str, model: dict[str, object], message: str) -> None:
    wanted = config(variant=variant, path=str(directories[variant]), **model)
    with pytest.raises(ConfigError, match=message):
        Flux(wanted.model).validate(wanted)


def test_samples_are_guided_as_the_network_is(directories: dict[str, Path]) -> None:
    """By an input where it is distilled; by classifier-free guidance where its embedding is left out."""
    dev = family(path=str(directories["dev"]), variant="dev")
    assert dev.sampling_arguments(3.5, [], 512) == {"guidance_scale": 3.5, "max_sequence_length": 512}
    bypassing = family(path=str(directories["dev"]), variant="dev", bypass_guidance=True)
    assert bypassing.sampling_arguments(3.5, [], None) == {"true_cfg_scale": 3.5}


def test_edited_pictures_have_the_size_that_is_asked_for(directories: dict[str, Path], tmp_path: Path) -> None:
    """The pipeline alone would draw 1024 x 1024. Two samples of one call equal what each is alone."""
    from kinema.sampling.pipeline import SampleSettings, sample_many

    flux = family(path=str(directories["kontext-dev"]), variant="kontext-dev")
    pipeline = flux.pipeline({part: flux.load(part, "cpu", None) for part in flux.variant.parts})
    pipeline.set_progress_bar_config(disable=True)
    Image.effect_noise((70, 50), 60).convert("RGB").save(tmp_path / "noise.png")
    wanted = [
        SampleSettings(prompt, 32, 48, 1, steps=2, guidance=2.5, seed=seed, images=(tmp_path / "noise.png",))
        for seed, prompt in enumerate(("a red ball", "the blue box"))
    ]
    together = list(sample_many(flux, pipeline, wanted))
    alone = [next(iter(sample_many(flux, pipeline, [one]))) for one in wanted]
    assert together[0].shape == (3, 1, 32, 48)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_other_families_refuse_what_they_do_not_read(tmp_path: Path) -> None:
    from kinema.families.chroma import Chroma

    tables = {"data": {"sources": [{"path": "."}]}, "training": {"steps": 1}}
    wanted = Config.model_validate({"model": {"family": "chroma", "variant": "hd", "guidance": 2.0}} | tables)
    with pytest.raises(ConfigError, match=r"model\.guidance: chroma has nothing that reads it"):
        Chroma(wanted.model).validate(wanted)
