"""Chroma: what the suite of all families does not see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Batch, Sample
from kinema.errors import ConfigError
from kinema.families.chroma import Chroma
from kinema.families.loading import CONFIGS
from kinema.objectives.flow import flow_matching


def family(**model: object) -> Chroma:
    return Chroma(ModelConfig.model_validate({"family": "chroma"} | model))


def config(**model: object) -> Config:
    tables = {"data": {"sources": [{"path": "."}]}, "training": {"steps": 1}}
    return Config.model_validate({"model": {"family": "chroma"} | model} | tables)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Chroma.tiny(tmp_path_factory.mktemp("chroma") / "tiny", "hd", seed=1)


def test_the_converter_of_diffusers_reads_our_single_file() -> None:
    """At the published width, which it has hard-coded, but for inputs, with one block of each kind."""
    from diffusers import ChromaTransformer2DModel

    settings = json.loads((CONFIGS / "chroma" / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        shapes = ChromaTransformer2DModel.from_config(settings, num_layers=1, num_single_layers=1).state_dict()
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape[0], *[1] * (value.ndim - 1), generator=draw) for name, value in shapes.items()
    }
    original = family(variant="hd").to_original(state)
    theirs = convert_chroma_transformer_checkpoint_to_diffusers(dict(original))
    assert theirs.keys() == state.keys()
    for name, value in theirs.items():
        assert torch.equal(value, state[name]), name
    renamed = {name.replace(".scale", ".weight"): value for name, value in original.items()}
    assert len(renamed.keys() - original.keys()) == 6 + 5
    for file in (original, renamed, state):  # published, saved by newer versions of ComfyUI, diffusers'
        ours = Chroma.parts["network"].to_ours(dict(file))
        assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)


def test_times_are_drawn_as_in_its_training() -> None:
    """The authors draw from a table of 2 - 7.7 (t - 1/2)^2; no shift follows."""
    law = flow_matching(config(variant="hd").objective, family(variant="hd")).law
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    drawn = law.quantile(u, tokens=4096)
    assert torch.equal(law.quantile(u, tokens=256), drawn)
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = -7.7 * (t - 0.5) ** 2 + 2
    middles = (density[1:] + density[:-1]) / 2
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), middles.cumsum(0)]) / middles.sum()
    nearest = t[torch.searchsorted(cumulative, u).clamp(max=len(t) - 1)]
    torch.testing.assert_close(drawn, nearest, rtol=0, atol=2e-5)
    assert drawn[0] == pytest.approx(0, abs=1e-12) and drawn[-1] == pytest.approx(1, abs=1e-12)


def test_a_batch_of_captions_of_different_lengths(directory: Path) -> None:
    """Each sample's prediction and the gradients are those that it has alone; nothing becomes nan behind the mask."""
    chroma = family(path=str(directory), variant="hd")
    parts = {part: chroma.load(part, "cpu", None) for part in ("text_encoder", "tokenizer", "network")}
    network = parts["network"].requires_grad_(True)
    captions = ["a red ball moves left over the box", "ball", ""]
    text = [row["text"] for row in chroma.encode(chroma.encodings()[0], parts, [Sample(one) for one in captions])]
    assert [len(one) for one in text] == [10, 3, 2]  # the end of the text, and one token of padding
    draw = torch.Generator().manual_seed(3)
    latents = [torch.randn(16, 1, 4, 6, generator=draw) for _ in captions]
    t = torch.tensor([0.2, 0.5, 0.9])

    def run(rows: list[int]) -> torch.Tensor:
        tensors = {"text": [text[i] for i in rows], "latents": [latents[i] for i in rows]}
        batch = Batch(0, tensors, [captions[i] for i in rows], rows, [1 / len(rows)] * len(rows))
        prepared = chroma.prepare(batch)
        assert (prepared.conditioning["text_mask"] is None) == (len(rows) == 1)
        return chroma.predict(network, prepared.latents, t[rows], prepared.conditioning)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        network.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    together, alone = run([0, 1, 2]), torch.cat([run([i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    ours, theirs = gradients(together.square().sum()), gradients(alone.square().sum())
    assert len(ours) == len(theirs) == len(list(network.parameters()))
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm().clamp(min=1e-3), name


def test_samples_are_drawn_with_a_mask(directory: Path) -> None:
    """diffusers' own pipeline shows the network the padding: what it gives depends on how long the padding is."""
    import diffusers

    chroma = family(path=str(directory), variant="hd")
    parts = {part: chroma.load(part, "cpu", None) for part in chroma.variant.parts}
    plain = diffusers.ChromaPipeline.from_pretrained(directory)
    ours: Any = chroma.pipeline(parts)
    assert type(ours).__name__ == "ChromaPipeline"  # which the index of a saved pipeline names

    def change(pipeline: Any) -> float:
        pipeline.set_progress_bar_config(disable=True)
        pictures = [
            pipeline(
                "a red ball", negative_prompt="green", height=32, width=32, num_inference_steps=2, guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=length,
            ).images
            for length in (64, 512)
        ]  # fmt: skip
        return float((pictures[0] - pictures[1]).abs().max())

    assert change(ours) < 1e-4 and change(plain) > 1e-2


def test_the_variant_is_in_the_name(directory: Path, tmp_path: Path) -> None:
    state = load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")
    original = {name: value.contiguous() for name, value in family(variant="hd").to_original(state).items()}
    for name, variant in (("Chroma1-HD.safetensors", "hd"), ("Chroma1-Base.safetensors", "base"), ("mine.st", "hd")):
        file = (tmp_path / name).with_suffix(".safetensors")
        save_file(original, file)
        assert family(path=str(file)).variant.name == variant
    assert family(variant="hd").variant.parameters == family(variant="base").variant.parameters


def test_text_that_is_too_long_is_refused(directory: Path) -> None:
    wanted = config(variant="hd", path=str(directory), text_length=513)
    with pytest.raises(ConfigError, match="513 is more than the 512 tokens"):
        Chroma(wanted.model).validate(wanted)
