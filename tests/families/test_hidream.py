"""What the suite over all families cannot see of HiDream: sizes by hand, its two modes, pictures longer than it pads
to, the size of previews, variants told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kinema.config.model import PartConfig
from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Sample
from kinema.errors import ConfigError, UserError
from kinema.families.hidream import HiDream, unpadded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return HiDream.tiny(tmp_path_factory.mktemp("hidream") / "tiny", "full", seed=2)


def open_tiny(tiny: Path) -> tuple[HiDream, Any, dict[str, Tensor]]:
    family = HiDream(ModelConfig(family="hidream", path=str(tiny)))
    draw = torch.Generator().manual_seed(1)
    conditioning = {
        "encoder_hidden_states_t5": torch.randn(2, 5, 24, generator=draw),
        "encoder_hidden_states_llama3": torch.randn(3, 2, 5, 32, generator=draw),
        "pooled_embeds": torch.randn(2, 28, generator=draw),
    }
    return family, family.load("network", "cpu", torch.float32), conditioning


def latents(height: int, width: int) -> Tensor:
    return torch.randn(2, 16, 1, height, width, generator=torch.Generator().manual_seed(height))


def test_published_sizes() -> None:
    """17 billion: 16 blocks of two streams and 32 of one, width 2560, four experts, 49 projections of text."""
    width, hidden, shared = 2560, 6912, 3584
    square = width**2 + width
    attention = 4 * square + 2 * width
    mixture = 3 * width * (shared + 4 * hidden) + 4 * width
    single = 6 * square + attention + mixture
    double = 12 * square + 2 * attention + mixture + 3 * width * hidden
    inputs = 256 * width + width + square + 2048 * width + width + square + 64 * width + width
    outputs = 2 * square + 64 * width + 64
    expected = 16 * double + 32 * single + 49 * 4096 * width + inputs + outputs
    assert {variant.parameters for variant in HiDream.variants.values()} == {expected}
    family = HiDream(ModelConfig(family="hidream", variant="full"))
    for part, dim, layers in (("text_encoder", 768, 12), ("text_encoder_2", 1280, 32)):
        layer = 4 * (dim**2 + dim) + 8 * dim**2 + 5 * dim + 4 * dim
        count = sum(p.numel() for p in family.empty(part).parameters())
        assert count == (49408 + 248) * dim + layers * layer + 2 * dim + dim**2


@pytest.mark.parametrize("size", [(6, 6), (4, 6), (10, 12)], ids=["square", "padded", "unpadded"])
def test_training_mode_predicts_the_same(tiny: Path, size: tuple[int, int]) -> None:
    """diffusers' network has one code for inference, and one for training that passes gradients through the experts."""
    family, network, conditioning = open_tiny(tiny)
    x_t, t = latents(*size), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        evaluated = family.predict(network, x_t, t, conditioning)
    network.train().requires_grad_(True)
    trained = family.predict(network, x_t, t, conditioning)
    assert trained.shape == evaluated.shape == x_t.shape
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=2e-5)
    trained.square().sum().backward()
    experts = [p for name, p in network.named_parameters() if ".experts." in name or ".gate." in name]
    assert len(experts) == 4 * (4 * 3 + 1) and all(p.grad is not None for p in experts)
    assert sum(bool(p.grad.any()) for p in experts) > 0.8 * len(experts)


def test_gradients_are_those_of_the_mixture(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode, against every expert computed for every token and weighted as the gate weighs the best two."""
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    def dense(self: Any, x: Tensor) -> Tensor:
        scores = (x @ self.gate.weight.T).softmax(-1)
        kept = scores >= scores.topk(2, dim=-1).values[..., 1:]
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * (scores * kept)[..., None, :]).sum(-1) + self.shared_experts(x)

    def gradients() -> dict[str, Tensor]:
        family, network, conditioning = open_tiny(tiny)
        network = network.train().requires_grad_(True)
        family.predict(network, latents(4, 6), torch.tensor([0.3, 0.8]), conditioning).square().sum().backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    theirs = gradients()
    monkeypatch.setattr(MOEFeedForwardSwiGLU, "forward", dense)
    for name, value in gradients().items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            theirs[name], value, rtol=0, atol=1e-4 * max(scale, 1e-3), msg=lambda m, n=name: n + m
        )


def test_pictures_longer_than_the_padding(tiny: Path) -> None:
    """At the length itself nothing is padded: there, tokens that we hand over are those that the network makes."""
    family, network, conditioning = open_tiny(tiny)
    assert network.max_seq == 16
    x_t = latents(4, 16)  # 2 x 8 tokens
    text = {name: value for name, value in conditioning.items()}
    with torch.no_grad():
        expected = family.predict(network, x_t, torch.tensor([0.3, 0.8]), conditioning)
        times = torch.tensor([300.0, 800.0])
        (ours,) = network(**unpadded(x_t[:, :, 0]), timesteps=times, **text, return_dict=False)
        torch.testing.assert_close(ours[:, :, None], expected, rtol=0, atol=1e-5)
        longer = family.predict(network, latents(10, 12), torch.tensor([0.3, 0.8]), conditioning)
        assert longer.shape == (2, 16, 1, 10, 12) and longer.isfinite().all()
        with pytest.raises(RuntimeError):
            network(hidden_states=latents(10, 12)[:, :, 0], timesteps=times, **text)


@pytest.mark.parametrize(
    ("asked", "made"), [((32, 48), (32, 48)), ((80, 80), (80, 80)), ((64, 128), (32, 80))], ids=str
)
def test_previews_have_the_size_that_is_asked_for(tiny: Path, asked: tuple[int, int], made: tuple[int, int]) -> None:
    """A picture that is not square has at most the 16 tokens, of 16 x 16 pixels, that the network pads to."""
    import inspect

    from diffusers import HiDreamImagePipeline

    family = HiDream(ModelConfig(family="hidream", path=str(tiny)))
    parts = {part: family.load(part, "cpu", torch.float32) for part in family.variant.parts}
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, HiDreamImagePipeline)
    assert inspect.signature(type(pipeline).__call__) == inspect.signature(HiDreamImagePipeline.__call__)
    height, width = asked
    result = pipeline(prompt="a ball", height=height, width=width, num_inference_steps=1, output_type="pt")
    assert tuple(result.images.shape[-2:]) == made


@pytest.mark.parametrize("variant", list(HiDream.variants))
def test_variants_are_told_apart(variant: str, tmp_path: Path) -> None:
    """By the scheduler of a directory, by the name of a file; a file of another name is asked about."""
    directory = HiDream.tiny(tmp_path / "tiny", variant)
    assert HiDream(ModelConfig(family="hidream", path=str(directory))).variant.name == variant
    for name in (f"hidream_i1_{variant}_fp16.safetensors", "mine.safetensors"):
        save_file({"x_embedder.proj.weight": torch.zeros(1)}, tmp_path / name)
    family = HiDream(ModelConfig(family="hidream", path=str(tmp_path / f"hidream_i1_{variant}_fp16.safetensors")))
    assert family.variant.name == variant
    with pytest.raises(UserError, match="Name one: full, dev, fast"):
        _ = HiDream(ModelConfig(family="hidream", path=str(tmp_path / "mine.safetensors"))).variant


def test_llama_layers_are_stored_once(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Up to the last that the network sees; the cache key says how many."""
    family = HiDream(ModelConfig(family="hidream", path=str(tiny), text_length=4))
    encoding = next(one for one in family.encodings() if one.name == "llama")
    parts = {part: family.load(part, "cpu", torch.float32) for part in encoding.parts}
    (row,) = family.encode(encoding, parts, [Sample("a red ball moves left")])
    assert row["llama"].shape == (3, 4, 32)
    assert "tokens, the last" in caplog.text

    fewer = tmp_path / "transformer"
    fewer.mkdir()
    config = json.loads((tiny / "transformer" / "config.json").read_text())
    (fewer / "config.json").write_text(json.dumps(config | {"llama_layers": [0, 1, 1, 1]}))
    model = {"family": "hidream", "variant": "full", "path": str(tiny), "text_length": 4, "random_weights": True}
    other = HiDream(ModelConfig.model_validate(model | {"network": {"path": str(tmp_path)}}))
    (shorter,) = other.encode(encoding, parts, [Sample("a red ball moves left")])
    assert torch.equal(shorter["llama"], row["llama"][:2])
    assert next(one for one in other.encodings() if one.name == "llama").settings != encoding.settings


def test_llama_is_not_published_with_the_others(tiny: Path) -> None:
    values = {
        "model": {"family": "hidream", "variant": "full", "path": "HiDream-ai/HiDream-I1-Full"},
        "data": {"sources": [{"path": "."}]},
        "training": {"steps": 1},
    }
    config = Config.model_validate(values)
    with pytest.raises(ConfigError, match=r"model\.text_encoder_4\.path: .* meta-llama/Llama-3\.1-8B-Instruct"):
        HiDream(config.model).validate(config)
    given = config.model.model_copy(update={"text_encoder_4": PartConfig(path=str(tiny / "text_encoder_4"))})
    HiDream(given).validate(config.model_copy(update={"model": given}))
