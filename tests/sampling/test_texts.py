"""Texts are encoded apart from the pipeline's call for every model that allows it, and the samples are the same to the
bit as with the words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kinema.config.schema import ModelConfig
from kinema.families.base import Family
from kinema.families.registry import family_class, family_names, open_family
from kinema.sampling.pipeline import SampleSettings, sample_many
from kinema.sampling.texts import Texts
from kinema.sampling.weights import Weights, load_parts

SEES_PICTURES = {
    ("hunyuan_video", "i2v"),
    ("hunyuan_video", "i2v-33ch"),
    ("qwen_image", "edit"),
    ("qwen_image", "edit-2511"),
    ("qwen_image", "edit-plus"),
}
"""Whose text encoder reads the text together with the pictures: they are given the words. As docs/guides/sampling.md
and docs/guides/recipes.md say."""
VARIANTS = [(name, variant) for name in family_names() for variant in family_class(name).variants]
FIRST = {name: next(iter(family_class(name).variants)) for name in family_names()}
FAST = ("flux", "hidream", "qwen_image", "lumina2")
"""Pooled embeddings; four encoders, one with layers before the batch; a mask that may be None; a template that the
negative text has not."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Family, dict[str, Any]]]:
    def make(name: str, variant: str) -> tuple[Family, dict[str, Any]]:
        directory = family_class(name).tiny(tmp_path_factory.mktemp(name), variant)
        family = open_family(ModelConfig(family=name, variant=variant, path=str(directory)))
        parts = load_parts(Weights(family, "tiny"), "cpu", torch.float32)
        if name.startswith("cosmos"):
            from kinema.families.cosmos_tiny import Unguarded

            parts["safety_checker"] = Unguarded()
        return family, parts

    return make


def pipeline_of(family: Family, parts: dict[str, Any]) -> Any:
    pipeline = family.pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def of_variant(family: Family, tmp_path: Path, prompt: str = "a red ball", **changes: Any) -> SampleSettings:
    unit = family.grid
    height, width = -(-32 // unit) * unit, -(-48 // unit) * unit
    Image.effect_noise((width, height), 90).convert("RGB").save(tmp_path / "given.png")
    frames = 1 if family.variant.modality == "image" else 9
    images = (tmp_path / "given.png",) * family.variant.pictures[0]
    usual = {"steps": 2, "guidance": 4.0, "negative": "blue box", "images": images, "text_length": family.text_length}
    return SampleSettings(prompt, height, width, frames, **{**usual, **changes})


@pytest.mark.parametrize(
    "name, variant",
    [
        pytest.param(*one, marks=[] if one[0] in FAST and one[1] == FIRST[one[0]] else [pytest.mark.slow])
        for one in VARIANTS
    ],
)
def test_samples_are_those_of_the_words(name: str, variant: str, opened: Any, tmp_path: Path) -> None:
    family, parts = opened(name, variant)
    settings = [of_variant(family, tmp_path)]
    if variant == FIRST[name]:
        settings.append(of_variant(family, tmp_path, guidance=1.0, seed=1))
    pipeline = pipeline_of(family, parts)
    texts = Texts(family, pipeline)
    assert texts.apart == ((name, variant) not in SEES_PICTURES)
    if not texts.apart:
        return
    words = Texts(family, pipeline)
    words.apart = False
    expected = list(sample_many(family, pipeline, settings, texts=words))
    texts.encode(settings)
    parts = {part: None if part in family.text_encoders else one for part, one in parts.items()}
    pipeline = pipeline_of(family, parts)
    drawn = list(sample_many(family, pipeline, settings, texts=texts))
    for ours, theirs in zip(drawn, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.std() > 0.005


@pytest.mark.parametrize("name", ["hidream", "qwen_image"])
def test_prompts_of_a_call_are_joined(name: str, opened: Any, tmp_path: Path) -> None:
    """Of texts of several lengths the shorter ones are padded, and layers stay before the batch."""
    family, parts = opened(name, FIRST[name])
    settings = [of_variant(family, tmp_path, prompt=prompt, seed=i) for i, prompt in enumerate(["a", "blue box " * 9])]
    pipeline = pipeline_of(family, parts)
    together = list(sample_many(family, pipeline, settings, batch=2))
    for one, drawn in zip(settings, together, strict=True):
        alone = next(sample_many(family, pipeline, [one]))
        assert (drawn - alone).abs().max() <= 2e-5
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_text_is_encoded_once_and_a_negative_one_its_own_way(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, parts = opened("lumina2", FIRST["lumina2"])
    pipeline, encoded = pipeline_of(family, parts), []
    own = pipeline._get_gemma_prompt_embeds
    monkeypatch.setattr(
        pipeline, "_get_gemma_prompt_embeds", lambda prompt, **rest: (encoded.append(prompt), own(prompt, **rest))[1]
    )
    changes = [{}, {"seed": 1}, {"prompt": "blue box"}]
    Texts(family, pipeline).encode([of_variant(family, tmp_path, **one) for one in changes])
    assert sorted(len(texts) for texts in encoded) == [1, 1, 1]
    assert sum("<Prompt Start>" in text for (text,) in encoded) == 2  # the template of prompts, and of them alone
