"""What the suite over all families cannot see of Stable Diffusion 3: sizes by hand, variants told apart, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Sample
from kinema.errors import ConfigError, UserError
from kinema.families.layout import LoraFactors
from kinema.families.sd3 import SD3
from kinema.families.sd3_layout import network_layout


def by_hand(width: int, blocks: int, dual: int, normed: bool) -> int:
    """Parameters of a network from the paper's description: 64-wide heads, feed-forward four times as wide."""
    square = width * width + width
    forward = 8 * width * width + 5 * width
    norms = 4 * 64 if normed else 0
    block = 2 * 6 * square + 8 * square + 2 * forward + norms
    last = block - 4 * square - square - forward  # text is modulated before attention alone, and goes no further
    second = 3 * square + 4 * square + (2 * 64 if normed else 0)
    inputs = 64 * width + width + 256 * width + width + 2048 * width + width + 2 * square + 4096 * width + width
    return inputs + (blocks - 1) * block + last + dual * second + 2 * square + width * 64 + 64


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("sd3-medium", by_hand(1536, 24, 0, False)),
        ("sd3.5-medium", by_hand(1536, 24, 13, True)),
        ("sd3.5-large", by_hand(2432, 38, 0, True)),
    ],
)
def test_published_sizes(variant: str, expected: int) -> None:
    assert SD3.variants[variant].parameters == expected


@pytest.mark.parametrize("variant", list(SD3.variants))
def test_variants_are_told_apart(variant: str, tmp_path: Path) -> None:
    """By a directory's configuration, and by the names in a single file."""
    directory = SD3.tiny(tmp_path / "tiny", variant)
    family = SD3(ModelConfig(family="sd3", path=str(directory)))
    assert family.variant.name == variant
    state = family.load("network", "cpu", torch.float32).state_dict()
    original = {f"model.diffusion_model.{name}": value for name, value in family.to_original(state).items()}
    save_file({name: value.contiguous() for name, value in original.items()}, tmp_path / "one.safetensors")
    assert SD3(ModelConfig(family="sd3", path=str(tmp_path / "one.safetensors"))).variant.name == variant


def test_an_unknown_file_is_no_variant(tmp_path: Path) -> None:
    save_file({"double_blocks.0.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"does not say which variant of sd3"):
        _ = SD3(ModelConfig(family="sd3", path=str(tmp_path / "flux.safetensors"))).variant


def test_adapters_of_the_last_modulation_are_reordered() -> None:
    """Rows (shift, scale) of the original are (scale, shift) in diffusers, in the last block and the output alone."""
    layout = network_layout(3)
    factors = LoraFactors(torch.zeros(1, 4), torch.arange(8.0)[:, None], 1.0)
    for layer, theirs, moved in (
        ("transformer_blocks.2.norm1_context.linear", "joint_blocks.2.context_block.adaLN_modulation.1", True),
        ("transformer_blocks.1.norm1_context.linear", "joint_blocks.1.context_block.adaLN_modulation.1", False),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", True),
    ):
        original = layout.adapter_to_original({layer: factors})
        expected = [4, 5, 6, 7, 0, 1, 2, 3] if moved else list(range(8))
        assert original[theirs].B[:, 0].tolist() == expected
        assert torch.equal(layout.adapter_from_original(original)[layer].B, factors.B)


def config_of(directory: Path, buckets: dict, **model: object) -> Config:
    values = {
        "model": {"family": "sd3", "path": str(directory), **model},
        "data": {"sources": [{"path": "."}], "buckets": buckets},
        "training": {"steps": 1},
    }
    return Config.model_validate(values)


@pytest.mark.parametrize(
    ("buckets", "model", "message"),
    [
        ({"sizes": [[64, 512]]}, {}, r"data\.buckets\.sizes: a side of 512 pixels .* which is 256"),
        ({"resolutions": [224]}, {}, r"data\.buckets\.resolutions: a side of 320 pixels"),
        ({"sizes": [[64, 100]]}, {}, r"100 is no multiple of 16"),
        ({"sizes": [[64, 64]]}, {"text_length": 600}, r"model\.text_length: .* at most 512 tokens of T5, not 600"),
    ],
)
def test_validate_refuses(buckets: dict, model: dict, message: str, tmp_path: Path) -> None:
    config = config_of(SD3.tiny(tmp_path / "tiny", "sd3-medium"), buckets, **model)
    with pytest.raises(ConfigError, match=message):
        SD3(config.model).validate(config)
    SD3(config.model.model_copy(update={"text_length": None})).validate(
        config.model_copy(update={"data": config_of(tmp_path / "tiny", {"sizes": [[64, 256]]}).data})
    )


def test_long_captions_are_cut_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture, caplog: Any) -> None:
    """Of T5, which sees the whole caption; the pipeline's own, for each encoder, would repeat it three times."""
    family = SD3(ModelConfig(family="sd3", path=str(SD3.tiny(tmp_path / "tiny", "sd3-medium")), text_length=6))
    caption = "a red ball moves left over the box and " * 20
    rows = {}
    for encoding in family.encodings()[:3]:
        parts = {part: family.load(part, "cpu", torch.float32) for part in encoding.parts}
        capsys.readouterr()
        rows |= family.encode(encoding, parts, [Sample(caption)])[0]
        assert "truncated" not in capsys.readouterr().err
    shapes = {"clip_l": (77, 16), "pooled_l": (16,), "clip_g": (77, 20), "pooled_g": (20,), "t5": (6, 48)}
    assert {name: tuple(value.shape) for name, value in rows.items()} == shapes
    assert [record.message for record in caplog.records if "are cut" in record.message] == [
        f"a caption has 181 tokens, the last 175 are cut: {caption[:60]}..."
    ]
