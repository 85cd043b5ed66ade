from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.config.memory import Checkpointing
from kinema.errors import ConfigError
from kinema.memory.checkpointing import check_lists, checkpoint_blocks, chosen_blocks, parts_of
from kinema.memory.dry_run import LiveBytes


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    )
    for module in wan.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return wan.train()


def run(wan: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one step on fixed inputs, under a fixed state of the generators."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 2, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, 5, 16, generator=generator).to(dtype)
    torch.manual_seed(2)
    output = wan(x, torch.tensor([100.0, 700.0]), text, return_dict=False)[0]
    torch.manual_seed(3)  # what happens between forward and backward must not matter
    output.square().mean().backward()
    return output, {name: p.grad.clone() for name, p in wan.named_parameters() if p.grad is not None}


KINDS = [True, "selective", "nested", 2, {"blocks": 0.5}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_gradients(dropout: float, dtype: torch.dtype, kind: Checkpointing) -> None:
    plain, checkpointed = network(dropout).to(dtype), network(dropout).to(dtype)
    checkpoint_blocks({"blocks": checkpointed.blocks}, kind)
    output, gradients = run(plain, dtype)
    same_output, same_gradients = run(checkpointed, dtype)
    assert torch.equal(output, same_output)
    assert gradients.keys() == same_gradients.keys() and len(gradients) == len(list(plain.parameters()))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name
    if dropout:
        assert not torch.equal(output, run(network().to(dtype), dtype)[0])


def saved_bytes(wan: nn.Module) -> int:
    """Bytes of distinct activations that autograd keeps for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in wan.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept: list[Any] = []  # freed storages would give their addresses to others
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), pack(t))[1], lambda t: t):
        wan(torch.randn(2, 4, 2, 8, 8), torch.tensor([1.0, 2.0]), torch.randn(2, 5, 16), return_dict=False)
    return sum(seen.values())


def test_activations_shrink() -> None:
    plain, checkpointed = network(), network()
    checkpoint_blocks({"blocks": checkpointed.blocks})
    assert saved_bytes(checkpointed) < 0.3 * saved_bytes(plain)


@dataclass
class Measured:
    between: int
    """Bytes alive between the passes."""
    peak: int
    products: int
    """Of matrices, computed in both."""


def measured(kind: Checkpointing) -> Measured:
    """Of a step."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    wan, live, products = network(), LiveBytes(), Products()
    if kind:
        checkpoint_blocks({"blocks": wan.blocks}, kind)
    live.exclude(wan.parameters())
    inputs = torch.randn(2, 4, 2, 8, 8), torch.tensor([100.0, 700.0]), torch.randn(2, 5, 16)
    with live, products:
        output = wan(*inputs, return_dict=False)[0].square().mean()
        between = live.live
        output.backward()
    return Measured(between, live.peak, products.count)


def test_what_each_kind_keeps_and_computes_again() -> None:
    none, all_, some, half, parts = (measured(kind) for kind in (False, True, "selective", 2, "nested"))
    assert all_.between < 0.15 * none.between and all_.between < some.between < 0.75 * none.between
    assert 0.4 * none.between < half.between < 0.65 * none.between and parts.between == all_.between
    assert some.products == none.products  # none is computed twice
    again = all_.products - none.products
    assert again > 0 and half.products - none.products == again // 2  # of every second block alone
    # Once more of the parts of each of four blocks, but for the last of each part, whose result nothing keeps: queries,
    # keys and values of two attentions, and the first product of the feed-forward part.
    assert parts.products == all_.products + 4 * (3 + 3 + 1)


def test_nested_keeps_what_one_part_does() -> None:
    none, all_, parts = (measured(kind) for kind in (False, True, "nested"))
    assert parts.peak < 0.8 * all_.peak and all_.peak < 0.5 * none.peak


def test_parts_of_a_block() -> None:
    """What keeps more than its input; the only module of a block stands for it; lists are what is in them."""
    block = network().blocks[0]
    names = {id(module): name for name, module in block.named_modules()}
    assert [names[id(part)] for part in parts_of(block)] == ["norm1", "attn1", "attn2", "norm2", "ffn", "norm3"]
    assert parts_of(nn.ModuleList([block])) == parts_of(block)
    norm = nn.LayerNorm(4)
    inner = nn.ModuleDict({"a": nn.ModuleList([norm, nn.Linear(4, 4)]), "b": nn.Conv2d(4, 4, 1)})
    assert parts_of(inner) == [norm]


def test_which_blocks() -> None:
    lists = {"double": 5, "single": 3}
    assert chosen_blocks(lists, True) == chosen_blocks(lists, "selective") == chosen_blocks(lists, 1) == [True] * 8
    assert chosen_blocks(lists, 3) == [True, False, False, True, False, False, True, False]
    assert chosen_blocks(lists, {"double": 0.42, "single": 1.0}) == [True] * 2 + [False] * 3 + [True] * 3
    assert sum(chosen_blocks({"double_blocks": 19}, {"double_blocks": 0.42})) == 8  # Open-Sora's (8, 100)
    assert chosen_blocks(lists, {"single": 0.5}) == [False] * 5 + [True, True, False]
    with pytest.raises(ConfigError, match="no list of blocks is called 'singel'; did you mean 'single'"):
        check_lists({"singel": 1.0}, list(lists))


def test_names_copies_and_inference() -> None:
    wan = network()
    names = list(wan.state_dict())
    checkpoint_blocks({"blocks": wan.blocks})
    assert list(wan.state_dict()) == names
    twin = copy.deepcopy(wan)
    before = run(wan)[0]
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.zero_()
        assert torch.equal(run_no_grad(wan), before)
        assert not torch.equal(run_no_grad(twin), before)  # the copy runs its own blocks
    with pytest.raises(AssertionError, match="already overridden"):
        checkpoint_blocks({"blocks": wan.blocks})


def run_no_grad(wan: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 2, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return wan(x, torch.tensor([100.0, 700.0]), text, return_dict=False)[0]
