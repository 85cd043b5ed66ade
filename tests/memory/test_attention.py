"""Attention by other kernels. Here torch's plain one stands for them: what is proven is that each block's attention
goes to the kernel that was asked for, in the second run of a checkpointed block too, and nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.config.memory import Checkpointing
from kinema.config.schema import ModelConfig
from kinema.errors import ConfigError, UserError
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.families.wan import Wan
from kinema.memory import attention
from kinema.memory.attention import attend_with, check_attention
from kinema.memory.checkpointing import checkpoint_blocks

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = Wan.tiny(tmp_path_factory.mktemp("wan") / "tiny", "t2v-1.3b", seed=1)
    return open_family(ModelConfig(family="wan", path=str(directory)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that come to the kernel, which is torch's plain one."""
    from diffusers.models import attention_dispatch

    monkeypatch.setitem(attention.KERNELS, "flash", "_native_math")
    monkeypatch.setattr(attention, "_IN_32_BITS", ("_native_math",))
    found: list[tuple[int, ...]] = []
    theirs = attention_dispatch.dispatch_attention_fn

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("backend") is not None:
            found.append(tuple(query.shape))
        return theirs(query, *args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", counted)
    return found


def loss(family: Family, network: torch.nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(1, 512, 32, generator=draw)
    x_t = torch.randn(1, 16, 3, 4, 6, generator=draw)
    return family.predict(network, x_t, torch.tensor([0.4]), {"encoder_hidden_states": text}).square().mean()


@pytest.mark.parametrize(("kind", "runs"), [(True, 2), ("nested", 3)])
def test_blocks_attend_with_it(family: Family, calls: list[tuple[int, ...]], kind: Checkpointing, runs: int) -> None:
    plain = family.load("network", "cpu", torch.float32).requires_grad_(True)
    other = copy.deepcopy(plain)
    blocks = family.blocks(other)
    attend_with(blocks, "flash")
    checkpoint_blocks(blocks, kind)
    expected = loss(family, plain)
    assert calls == []
    got = loss(family, other)
    count = 2 * sum(map(len, blocks.values()))  # of the video to itself and to the text
    assert len(calls) == count and calls[0][1] == 3 * 2 * 3  # kernels have [B, L, H, D]
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    assert len(calls) == runs * count
    for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_compiled_blocks_attend_with_it(family: Family, calls: list[tuple[int, ...]]) -> None:
    from kinema.memory.compile import compile_blocks

    network = family.load("network", "cpu", torch.float32)
    expected = loss(family, network)
    attend_with(family.blocks(network), "flash")
    compile_blocks(family.blocks(network), "aot_eager")
    torch._dynamo.reset()
    torch.testing.assert_close(loss(family, network), expected)
    assert calls


def test_masks_stay_with_torch(calls: list[tuple[int, ...]]) -> None:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    class Block(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            return sdpa(x, x, x, mask)

    block = Block()
    x, mask = torch.randn(1, 2, 5, 4), torch.tensor([[True, True, True, False, False]])
    expected = [block(x, one) for one in (None, mask)]
    attend_with({"blocks": torch.nn.ModuleList([block])}, "flash")
    torch.testing.assert_close([block(x, one) for one in (None, mask)], expected)
    assert len(calls) == 1


def test_fp32_stays_with_torch(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels for 16 bits; what autocast would make 16 bits goes to them."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sdpa(x, x, x)

    monkeypatch.setattr(attention, "_IN_32_BITS", ())
    block, x = Block(), torch.randn(1, 2, 5, 4)
    attend_with({"blocks": torch.nn.ModuleList([block])}, "flash")
    assert block(x).dtype == torch.float32 and calls == []
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16 and len(calls) == 1


def test_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(name: str, device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16, **more: Any) -> str:
        with pytest.raises(UserError) as error:
            check_attention(name, "training.attention", device, dtype, **{"trains": True, **more})
        return str(error.value)

    assert "flash runs on NVIDIA GPUs, and this is cpu" in refusal("flash", CPU)
    assert "flash computes in bf16 or fp16, and this run computes in fp32" in refusal("flash", dtype=torch.float32)
    assert "sage has no backward pass: it is for sampling" in refusal("sage")
    assert "run.deterministic" in refusal("cudnn", deterministic=True)
    assert "take flash_hub, which needs no building" in refusal("flash")
    assert "pip install xformers" in refusal("xformers", dtype=torch.float32)
    assert "pip install -U kernels" in refusal("flash3_hub")
    assert "pip install sageattention" in refusal("sage", trains=False)
    assert "did you mean 'flash'" in refusal("flahs")
    check_attention("sdpa", "training.attention", CPU, torch.float32, trains=True, deterministic=True)
    check_attention("cudnn", "training.attention", GPU, torch.bfloat16, trains=True)


def test_every_kernel_is_the_dispatchers() -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    assert all(attention._kernel(name) in _AttentionBackendRegistry._backends for name in attention.KERNELS.values())
    assert issubclass(ConfigError, UserError)
