"""What the suite over all families cannot see of Lumina-Image 2.0: its size by hand, names against diffusers at real
width (its converters know no other), which captions get the system prompt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lumina2_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Sample
from kinema.errors import ConfigError
from kinema.families.layout import LoraFactors
from kinema.families.lumina2 import Lumina2

FULL = Lumina2(ModelConfig(family="lumina2", variant="image-2.0"))


def test_published_size() -> None:
    """2.6 billion: 26 layers of width 2304 and two refiners of two, 24 heads of queries and 8 of keys and values."""
    width, keys, hidden, time = 2304, 768, 9216, 1024
    block = 2 * width**2 + 2 * width * keys + 2 * 96 + 3 * width * hidden + 4 * width
    modulation = time * 4 * width + 4 * width
    inputs = 64 * width + width + 256 * time + time + time**2 + time + 2304 + 2304 * width + width
    outputs = time * width + width + 64 * width + 64
    assert Lumina2.variants["image-2.0"].parameters == 30 * block + 28 * modulation + inputs + outputs


def test_names_at_full_size_are_those_that_diffusers_converts() -> None:
    """Of the whole network without memory, and the values of the fused layer at its real height."""
    state = FULL.empty("network").state_dict()
    original = FULL.to_original(state)
    assert {"layers.25.attention.qkv.weight", "context_refiner.0.attention_norm1.weight"} <= original.keys()
    theirs = convert_lumina2_to_diffusers({**original, "norm_final.weight": torch.zeros(1)})
    assert {name: value.shape for name, value in theirs.items()} == {name: v.shape for name, v in state.items()}

    layer = {f"layers.3.attn.to_{part}.weight": torch.randn(2304 if part == "q" else 768, 2) for part in "qkv"}
    fused = FULL.to_original(layer)
    assert {name: tuple(value.shape) for name, value in fused.items()} == {"layers.3.attention.qkv.weight": (3840, 2)}
    for names in (convert_lumina2_to_diffusers(dict(fused)), FULL.from_original(fused)):
        assert names.keys() == layer.keys() and all(torch.equal(names[name], value) for name, value in layer.items())


def test_adapters_under_comfyuis_names_are_those_that_diffusers_converts() -> None:
    """The default targets, of one block of each kind at real width: the same update of every layer."""
    targets = [re.compile(target) for target in FULL.adapter_targets()]
    draw = torch.Generator().manual_seed(0)
    layers: dict[str, LoraFactors] = {}
    for name, module in FULL.empty("network").named_modules():
        if "." in name and re.search(r"\.[01]\.", name) and any(target.fullmatch(name) for target in targets):
            out_features, in_features = module.weight.shape  # type: ignore[union-attr]
            factors = (torch.randn(2, in_features, generator=draw), torch.randn(out_features, 2, generator=draw))
            layers[name] = LoraFactors(*factors, alpha=2.0)
    assert len(layers) == 6 * 7 + 4
    original = FULL.layout().adapter_to_original(layers)
    assert all(factors.scale == 1 for factors in original.values())
    state = {}
    for name, factors in original.items():
        state[f"diffusion_model.{name}.lora_A.weight"] = factors.A
        state[f"diffusion_model.{name}.lora_B.weight"] = factors.B
    theirs = _convert_non_diffusers_lumina2_lora_to_diffusers(state)
    assert len(theirs) == 2 * len(layers)
    for name, factors in layers.items():
        update = theirs[f"transformer.{name}.lora_B.weight"][:64] @ theirs[f"transformer.{name}.lora_A.weight"][:, :64]
        torch.testing.assert_close(update, factors.B[:64] @ factors.A[:, :64], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Lumina2.tiny(tmp_path_factory.mktemp("lumina2") / "tiny", "image-2.0")


def test_which_captions_get_the_system_prompt(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All but the empty one, which stands for no text, and those that bring one."""
    family = Lumina2(ModelConfig(family="lumina2", path=str(tiny)))
    encoding = family.encodings()[0]
    parts = {part: family.load(part, "cpu", torch.float32) for part in encoding.parts}
    system = family.text_pipeline(parts).system_prompt
    captions = ("a red ball", f"{system} <Prompt Start> a red ball", "other <Prompt Start> a red ball", "")
    plain, whole, other, empty = (family.encode(encoding, parts, [Sample(one)])[0]["text"] for one in captions)
    assert torch.equal(plain, whole)
    assert len(empty) == 1 and 3 < len(other) < len(plain)  # the beginning of a text is a token
    assert not caplog.records
    short = Lumina2(ModelConfig(family="lumina2", path=str(tiny), text_length=len(plain) - 1))
    (row,) = short.encode(short.encodings()[0], parts, [Sample("a red ball")])
    assert torch.equal(row["text"], plain[:-1])
    assert f"{len(plain)} tokens, the last 1 are cut: a red ball" in caplog.text


def test_text_leaves_a_position_to_the_picture(tiny: Path) -> None:
    values = {
        "model": {"family": "lumina2", "path": str(tiny), "text_length": 300},
        "data": {"sources": [{"path": "."}], "buckets": {"sizes": [[64, 64]]}},
        "training": {"steps": 1},
    }
    config = Config.model_validate(values)
    with pytest.raises(ConfigError, match=r"model\.text_length: .* at most 299, not 300"):
        Lumina2(config.model).validate(config)
    fits = Config.model_validate(values | {"model": {**values["model"], "text_length": 299}})
    Lumina2(fits.model).validate(fits)
