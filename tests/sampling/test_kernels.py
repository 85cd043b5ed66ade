"""Other kernels while sampling: what can be had is installed, what cannot is said before anything is loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.registry import open_family
from kinema.families.wan import Wan
from kinema.memory import attention
from kinema.sampling.kernels import Kernels

CPU = torch.device("cpu")


def test_networks_compute_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prediction with fused projections and another kernel, here torch's plain one."""
    monkeypatch.setitem(attention.KERNELS, "sage", "_native_math")
    monkeypatch.setattr(attention, "_IN_32_BITS", ("_native_math",))
    family = open_family(ModelConfig(family="wan", path=str(Wan.tiny(tmp_path / "tiny", "t2v-1.3b", seed=1))))
    plain = family.load("network", "cpu", torch.float32)
    other = copy.deepcopy(plain)
    kernels = Kernels("sage", fuse=True)
    kernels.install(family, {"network": other})
    draw = torch.Generator().manual_seed(0)
    text, x_t = torch.randn(1, 512, 32, generator=draw), torch.randn(1, 16, 3, 4, 6, generator=draw)
    with torch.no_grad():
        expected, got = (
            family.predict(one, x_t, torch.tensor([0.4]), {"encoder_hidden_states": text}) for one in (plain, other)
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert kernels.facts == {"attention": "sage", "fuse_qkv": True} and Kernels().facts == {}


def test_refused_before_anything_is_loaded() -> None:
    family = open_family(ModelConfig(family="wan", variant="t2v-1.3b"))
    Kernels(fuse=True).check(family, CPU, torch.float32, None)
    with pytest.raises(UserError, match="--attention-backend: sage runs on NVIDIA GPUs, and this is cpu"):
        Kernels("sage").check(family, CPU, torch.float32, None)
    with pytest.raises(UserError, match="--attention-backend cudnn: not with --sp-attention ring"):
        Kernels("cudnn").check(family, torch.device("cuda"), torch.bfloat16, "ring")
    other = open_family(ModelConfig(family="z_image", variant="base"))
    with pytest.raises(UserError, match="--fuse-qkv: no attention of z_image"):
        Kernels(fuse=True).check(other, CPU, torch.float32, None)
