"""What the suite over all families cannot see of AuraFlow: sizes by hand, fal's own files, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kinema.config.schema import Config, ModelConfig
from kinema.data.batch import Sample
from kinema.errors import ConfigError
from kinema.families.aura_flow import AuraFlow
from kinema.families.tensors import read_tensors


def test_published_sizes() -> None:
    """6.8 billion: 4 joint and 32 single blocks of width 3072, gated feed-forward of width 8192."""
    width, hidden = 3072, 8192
    joint = 2 * 6 * width**2 + 8 * width**2 + 2 * 3 * width * hidden
    single = 6 * width**2 + 4 * width**2 + 3 * width * hidden
    time = 256 * width + width + width**2 + width
    inputs = 16 * width + width + 2048 * width + 8 * width + time
    without_positions = 4 * joint + 32 * single + inputs + 2 * width**2 + 16 * width
    assert AuraFlow.variants["v0.2"].parameters == without_positions + 4096 * width
    assert AuraFlow.variants["v0.3"].parameters == without_positions + 9216 * width
    family = AuraFlow(ModelConfig(family="aura_flow", variant="v0.3"))
    layer = 4 * 2048**2 + 3 * 2048 * 5120 + 2 * 2048 + 32 * 32
    text = sum(p.numel() for p in family.empty("text_encoder").parameters())
    assert text == 32128 * 2048 + 24 * layer + 2048


@pytest.mark.parametrize("positions", [4096, 9216])
def test_fals_own_file_of_a_whole_model(positions: int, tmp_path: Path) -> None:
    """Network below ``model.``, text encoder and autoencoder beside it; the version by the table of positions."""
    directory = AuraFlow.tiny(tmp_path / "tiny", "v0.2")
    family = AuraFlow(ModelConfig(family="aura_flow", path=str(directory)))
    assert family.variant.name == "v0.2"
    network, text, vae = (family.load(p, "cpu", torch.float32) for p in ("network", "text_encoder", "autoencoder"))
    state = family.to_original(network.state_dict())
    whole = {f"model.{name}": value for name, value in state.items()}
    whole |= {f"text_encoders.pile_t5xl.transformer.{name}": v for name, v in text.state_dict().items()}
    whole |= {f"vae.{name}": value for name, value in vae.state_dict().items()}
    file = tmp_path / "aura_flow_0.x.safetensors"
    save_file({name: value.clone() for name, value in whole.items()}, file)
    configured = {part: {"path": str(directory / folder)} for part, folder in (("tokenizer", "tokenizer"),)}
    single = AuraFlow(
        ModelConfig.model_validate({"family": "aura_flow", "variant": "v0.2", "path": str(file)} | configured)
    )
    for part, expected in (("network", network), ("text_encoder", text), ("autoencoder", vae)):
        spec, found = single.parts[part], single._find(part)
        assert found is not None
        loaded = spec.to_ours(read_tensors(found.files, spec.inside))
        wanted = {name: v for name, v in expected.state_dict().items() if name != "encoder.embed_tokens.weight"}
        assert wanted.keys() <= loaded.keys()
        assert all(torch.equal(loaded[name], value) for name, value in wanted.items())

    state["positional_encoding"] = torch.zeros(1, positions, 1)
    save_file({f"model.{n}": v.clone() for n, v in state.items()}, tmp_path / "positions.safetensors")
    found_variant = AuraFlow(ModelConfig(family="aura_flow", path=str(tmp_path / "positions.safetensors"))).variant
    assert found_variant.name == ("v0.2" if positions == 4096 else "v0.3")


def test_padding_is_not_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = AuraFlow.tiny(tmp_path / "tiny", "v0.3")
    for length, tokens in ((None, 4), (3, 3)):
        family = AuraFlow(ModelConfig(family="aura_flow", path=str(directory), text_length=length))
        encoding = family.encodings()[0]
        parts = {part: family.load(part, "cpu", torch.float32) for part in encoding.parts}
        (row,) = family.encode(encoding, parts, [Sample("a red ball")])
        assert row["text"].shape == (tokens, 24)
    assert "4 tokens, the last 1 are cut" in caplog.text


def test_sides_beyond_the_positions_are_refused(tmp_path: Path) -> None:
    directory = AuraFlow.tiny(tmp_path / "tiny", "v0.2")  # 8 x 8 positions
    values = {
        "model": {"family": "aura_flow", "path": str(directory)},
        "data": {"sources": [{"path": "."}], "buckets": {"sizes": [[64, 144]]}},
        "training": {"steps": 1},
    }
    config = Config.model_validate(values)
    with pytest.raises(ConfigError, match=r"data\.buckets\.sizes: a side of 144 pixels .* which is 128"):
        AuraFlow(config.model).validate(config)
