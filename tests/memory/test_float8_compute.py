"""Products in float8, emulated: torchao rounds as float8 does and multiplies in float32."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch

from kinema.config.schema import Config, ModelConfig
from kinema.errors import ConfigError
from kinema.families.registry import open_family
from kinema.memory.checkpointing import checkpoint_blocks
from kinema.memory.compile import compile_blocks
from kinema.memory.float8_compute import Recipe, check_float8, compute_in_float8

BOUND = {"tensorwise": 0.08, "rowwise": 0.08}
"""Relative error of a gradient, over all weights: each number is within 2^-4, gradients (e5m2) within 2^-3."""


def network_of(width: int = 32) -> Any:
    """Wan's, of sizes that float8 takes."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": width // 2, "ffn_dim": 64, "num_layers": 2}
    return WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=16, **sizes)


def gradients(network: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 3, 4, 6, generator=draw), torch.randn(1, 16, 16, generator=draw)
    network(x, torch.tensor([400.0]), text, return_dict=False)[0].square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "recipe", [pytest.param(one, marks=[] if one == "tensorwise" else pytest.mark.slow) for one in get_args(Recipe)]
)
def test_near_the_plain_one(recipe: Recipe) -> None:
    """With checkpointing and compiled blocks too; weights keep their names and types."""
    pytest.importorskip("torchao")
    plain = network_of()
    rounded = copy.deepcopy(plain)
    count = compute_in_float8({"blocks": rounded.blocks}, recipe, emulate=True)
    assert count == 2 * 10  # q, k, v, out twice; two of the feed-forward
    assert {n: p.dtype for n, p in rounded.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    changed = copy.deepcopy(rounded)
    checkpoint_blocks({"blocks": changed.blocks})
    compile_blocks({"blocks": changed.blocks}, "aot_eager")
    expected, got = gradients(plain), gradients(rounded)
    error = float((got - expected).norm() / expected.norm())
    assert 1e-3 < error < BOUND[recipe], error
    torch.testing.assert_close(gradients(changed), got, rtol=1e-4, atol=1e-6)


def test_small_and_sensitive_layers_are_left() -> None:
    pytest.importorskip("torchao")
    block = torch.nn.ModuleDict({
        "odd": torch.nn.Linear(24, 32), "norm1": torch.nn.Linear(32, 32), "to_q": torch.nn.Linear(32, 16),
    })  # fmt: skip
    assert compute_in_float8({"blocks": torch.nn.ModuleList([block])}, "tensorwise", emulate=True) == 1
    assert [name for name, layer in block.items() if type(layer) is not torch.nn.Linear] == ["to_q"]
    with pytest.raises(ConfigError, match=r"no linear layer .* multiples of 16"):
        compute_in_float8({"blocks": network_of(24).blocks[:0]}, "tensorwise", emulate=True)


def test_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    family = open_family(ModelConfig(family="wan", variant="t2v-1.3b"))

    def refusal(device: str = "cuda", **tables: Any) -> str:
        training = {"steps": 1, "float8": "rowwise"} | tables.pop("training", {})
        data = {"sources": [{"path": "."}]}
        config = Config.model_validate({"model": family.config, "data": data, "training": training} | tables)
        with pytest.raises(ConfigError) as error:
            check_float8(config, family, torch.device(device))
        return str(error.value)

    assert 'training.float8 = "rowwise" needs a Hopper or newer GPU, and this is cpu' in refusal("cpu")
    assert 'not with training.precision = "fp32": products' in refusal(training={"precision": "fp32"})
    assert 'Set training.float8 = "none". model.network.dtype = "fp8"' in refusal(adapter={})
    assert "not with training.fuse_qkv" in refusal(training={"fuse_qkv": True})
    assert "parallel.tp = 2" in refusal(parallel={"tp": 2})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    assert "Hopper or newer GPU, and this is NVIDIA L4" in refusal()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'kinema[quant]'" in refusal()
