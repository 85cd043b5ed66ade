"""Files of scaled float8, in the ways that are published, and files that cannot be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.tensors import undo_fp8_scaling
from kinema.networks.mapped import leaving_weights_mapped, settle, tensors
from kinema.networks.unmade import made


def stored(scale: Tensor, ending: str = ".scale_weight") -> tuple[dict[str, Tensor], Tensor]:
    """A file of one layer [6, 8], and its float8 numbers."""
    torch.manual_seed(0)
    numbers = (torch.randn(6, 8) * 50).to(torch.float8_e4m3fn)
    extra = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "a.to_q.input_scale": torch.ones(())}
    return {"a.to_q.weight": numbers, f"a.to_q{ending}": scale, "a.norm.weight": torch.ones(8)} | extra, numbers


@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale", ".weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (6, 2, 1), (6, 2), (2, 3), (3, 1)])
def test_every_weight_has_its_scale(ending: str, shape: tuple[int, ...]) -> None:
    """Of the matrix, its row, its block of 4 in a row, or its tile of 3 rows and 3 columns, the last of which is cut
    off."""
    scale = torch.rand(shape) + 0.5
    state, numbers = stored(scale, ending)
    expected = torch.empty(6, 8)
    rows, columns = (*shape, 1, 1)[:2] if shape else (1, 1)
    for i in range(6):
        for j in range(8):
            at = (i // -(-6 // rows), j // -(-8 // columns), 0)[: len(shape)]
            expected[i, j] = numbers[i, j].float() * scale[at]
    got = undo_fp8_scaling(state, torch.float32)
    assert got.keys() == {"a.to_q.weight", "a.norm.weight"}
    assert got["a.to_q.weight"].is_meta, "no more of a file than a tensor is there in wider types"
    torch.testing.assert_close(made(got["a.to_q.weight"]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["a.weight_scale_2", "a.weight.quant_state.bitsandbytes__nf4", "a.qweight"])
def test_packed_formats_are_refused(name: str) -> None:
    state, _ = stored(torch.ones(()))
    with pytest.raises(UserError, match=rf"{name}: its weights are packed .* bf16, fp16 or float8"):
        undo_fp8_scaling(state | {name: torch.zeros(4)}, torch.float32)


def test_other_files_are_as_they_were() -> None:
    state = {"a.weight": torch.randn(2, 2).bfloat16(), "b": torch.zeros(3, dtype=torch.int64)}
    assert all(value is state[name] for name, value in undo_fp8_scaling(state, torch.float32).items())


def test_a_network_keeps_the_numbers_of_its_file(tmp_path: Path) -> None:
    """`dtype = "fp8"` on a file of scaled float8 with plain names rounds nothing again; nothing is rounded for shapes
    alone, and random weights are rounded too."""
    from safetensors.torch import save_file

    from kinema.families.wan import Wan
    from kinema.networks.quantized import QuantizedLinear

    root = Wan.tiny(tmp_path / "tiny", "t2v-1.3b", seed=1)

    def network(path: Path, dtype: str, device: str = "cpu", **model: Any) -> nn.Module:
        table = {"family": "wan", "variant": "t2v-1.3b", "path": str(root), "network": {"dtype": dtype}} | model
        if path != root:
            table["network"] = {"path": str(path), "dtype": dtype}
        loaded: nn.Module = Wan(ModelConfig.model_validate(table)).load("network", device, torch.float32)
        return loaded

    state, expected = {}, {}
    for name, value in network(root, "fp32").state_dict().items():
        if value.ndim == 2 and ".ffn." in name:
            scale = value.abs().max() / 448
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            state[name.removesuffix(".weight") + ".scale_weight"] = scale
            expected[name] = state[name].float() * scale
        else:
            state[name] = value.clone()
    folder = tmp_path / "scaled"
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text((root / "transformer" / "config.json").read_text())
    loaded = network(folder, "fp8")
    assert len(expected) == 2 * len(loaded.blocks)
    for name, value in expected.items():
        layer = loaded.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, QuantizedLinear)
        torch.testing.assert_close(layer.weight, value, rtol=1e-6, atol=0)
    assert not any(isinstance(one, QuantizedLinear) for one in network(root, "nf4", "meta").modules())
    assert any(isinstance(one, QuantizedLinear) for one in network(root, "nf4", random_weights=True).modules())


def test_fused_layers_wait_in_their_file(tmp_path: Path) -> None:
    """ComfyUI's file of a Flux: layers that the original keeps as one are scaled float8, and so is a modulation whose
    halves are swapped; with one scale each, the parts have it. Loaded at once and left waiting, they are the same."""
    from safetensors.torch import save_file

    from kinema.families.flux import Flux

    root = Flux.tiny(tmp_path / "tiny", "dev", seed=1)
    table: dict[str, Any] = {"family": "flux", "variant": "dev", "path": str(root), "network": {"dtype": "fp32"}}
    plain = Flux(ModelConfig.model_validate(table))
    network = plain.load("network", "cpu", torch.float32)
    state, expected = {}, {}
    for name, value in plain.layout("network").to_original(dict(network.state_dict())).items():
        state[name] = expected[name] = value.contiguous()
        if re.search(r"qkv\.weight|linear1\.weight|final_layer\.adaLN_modulation\.1\.weight", name):
            scale = value.abs().max() / 448
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            state[name.removesuffix(".weight") + ".scale_weight"] = scale
            expected[name] = state[name].float() * scale
    blocks = 2 * len(network.transformer_blocks) + len(network.single_transformer_blocks)
    assert len(state) - len(expected) == blocks + 1
    save_file(state, tmp_path / "flux_fp8_scaled.safetensors")
    table["network"] = {"path": str(tmp_path / "flux_fp8_scaled.safetensors"), "dtype": "fp32"}
    family = Flux(ModelConfig.model_validate(table))
    want = plain.layout("network").from_original(expected)
    at_once = family.load("network", "cpu", torch.float32)
    with leaving_weights_mapped():
        waiting = family.load("network", "cpu", torch.float32)
    assert all(parameter.isnan().all() for parameter in waiting.parameters())
    for found in (at_once.state_dict(), dict(tensors(waiting))):
        assert found.keys() == want.keys()
        assert all(torch.equal(value, want[name]) for name, value in found.items())
    settle(waiting)
    assert all(torch.equal(value, want[name]) for name, value in waiting.state_dict().items())
