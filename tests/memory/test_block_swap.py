from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from lagging import LaggingCopies
from test_checkpointing import network, run, run_no_grad
from torch import nn

from kinema.config.memory import SLOTS
from kinema.memory.block_swap import BlockSwap, Home, blocks_to_offload, host_weights, spread
from kinema.memory.checkpointing import checkpoint_blocks
from kinema.memory.compile import compile_blocks
from kinema.memory.copy_engine import engine_of


def trained(wan: nn.Module, lora: bool) -> list[nn.Parameter]:
    """Like an adapter: what is small in the blocks trains, the matrices are frozen. Otherwise all trains."""
    for name, parameter in wan.named_parameters():
        parameter.requires_grad_(not lora or parameter.ndim == 1 or "blocks" not in name)
    return [parameter for parameter in wan.parameters() if parameter.requires_grad]


def swapped(wan: nn.Module, count: int) -> tuple[BlockSwap, LaggingCopies, list[Home]]:
    engine = LaggingCopies()
    homes = host_weights(wan, {"blocks": wan.blocks}, count)
    return BlockSwap({"blocks": wan.blocks}, homes, engine), engine, homes


def seen(wan: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return run_no_grad(wan)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("count", [3, 4])
def test_three_steps_with_two_micro_batches_are_those_without(count: int, lora: bool, checkpointing: bool) -> None:
    """To the bit: outputs, gradients, weights, and what is seen between steps. At most two blocks are on the device;
    frozen weights are never written."""
    plain, moving = network(), network()
    steps = [torch.optim.AdamW(trained(wan, lora), lr=1e-2) for wan in (plain, moving)]
    if checkpointing:
        checkpoint_blocks({"blocks": moving.blocks})
    swap, engine, homes = swapped(moving, count)
    before = [home.flat.clone() for home in homes]
    largest = max(home.size for home in homes)
    for _ in range(3):
        for _ in range(2):
            assert torch.equal(run(plain)[0], run(moving)[0])
        for (name, one), other in zip(plain.named_parameters(), moving.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]
        assert torch.equal(seen(plain), seen(moving))
        for one in steps:
            one.step()
            one.zero_grad()
        assert torch.equal(seen(plain), seen(moving))
        assert torch.equal(seen(plain), seen(moving))
    for (name, one), other in zip(plain.named_parameters(), moving.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert engine.peak == SLOTS * largest and len(homes) == count
    assert all(torch.equal(home.flat, flat) for home, flat in zip(homes, before, strict=True)) == lora
    if not lora:  # all of it is at home between passes
        assert swap.holds == [None] * SLOTS
        for home in homes:
            for parameter, view in zip(home.parameters, home.here, strict=True):
                assert parameter.data_ptr() == view.data_ptr()


def test_each_block_is_fetched_while_the_one_before_computes() -> None:
    """The order of copies and of the blocks' computing, in a step and in a pass without gradients."""
    wan = network()
    trained(wan, lora=True)
    homes = host_weights(wan, {"blocks": wan.blocks}, 3)
    numbers = [home.number for home in homes]
    assert numbers == spread(4, 3) == [0, 2, 3]
    log: list[str] = []
    for number, block in enumerate(wan.blocks):
        block.register_forward_hook(lambda *_, number=number: log.append(f"block {number}"))

    class Logging(LaggingCopies):
        def copy(self, source: torch.Tensor, target: torch.Tensor) -> object:
            owner = next(home.number for home in homes if home.flat.data_ptr() == source.data_ptr())
            log.append(f"fetch {owner}")
            return super().copy(source, target)

    BlockSwap({"blocks": wan.blocks}, homes, Logging())
    run(wan)
    forward = ["fetch 0", "fetch 2", "block 0", "fetch 3", "block 1", "block 2", "block 3"]
    assert log == [*forward, "fetch 0"]  # blocks 2 and 3 are there still when the backward pass begins
    log.clear()
    run(wan)
    assert log == ["block 0", *forward[3:], "fetch 0"]
    log.clear()
    seen(wan)
    assert log == ["block 0", *forward[3:], "fetch 0"]  # for the next pass of a sampler; block 2 is there


def test_using_a_block_that_has_not_arrived_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of these tests finds a missing wait."""
    wan = network()
    _, engine, _ = swapped(wan, 4)
    monkeypatch.setattr(engine, "wait", lambda ticket: None)
    assert seen(wan).isnan().all()


def test_parameters_that_blocks_share_stay() -> None:
    wan = network()
    wan.blocks[1].ffn = wan.blocks[2].ffn
    homes = host_weights(wan, {"blocks": wan.blocks}, 4)
    names = {id(parameter): name for name, parameter in wan.named_parameters(remove_duplicate=False)}
    moved = {names[id(parameter)] for home in homes for parameter in home.parameters}
    assert moved and not any(".ffn." in name and name.startswith(("blocks.1", "blocks.2")) for name in moved)


def test_spread() -> None:
    assert spread(40, 40) == list(range(40)) and spread(40, 20) == list(range(1, 40, 2))
    for count in (4, 19, 57):
        for travelling in range(1, count + 1):
            numbers = spread(count, travelling)
            assert len(set(numbers)) == travelling and numbers == sorted(numbers) and numbers[-1] < count
            gaps = [later - earlier for earlier, later in pairwise(numbers)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_fewest_that_fit() -> None:
    def choose(room: int) -> int | None:
        return blocks_to_offload(lambda number: 100 - 2 * max(0, number - SLOTS) <= room, 40)

    assert [choose(room) for room in (100, 99, 98, 90, 24, 23)] == [0, 3, 3, 7, 40, None]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_compiled(lora: bool) -> None:
    torch._dynamo.reset()
    plain, moving = network(), network()
    for wan in (plain, moving):
        trained(wan, lora)
    compile_blocks({"blocks": moving.blocks}, backend="aot_eager")
    swapped(moving, 4)
    for _ in range(2):
        expected, got = run(plain)[1], run(moving)[1]
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)
        plain.zero_grad()
        moving.zero_grad()


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_on_a_gpu(lora: bool) -> None:
    """The same gradients and weights, in pinned memory, with two blocks' weights on the device."""
    device = torch.device("cuda", 0)
    plain, moving = network(), network()
    for wan in (plain, moving):
        trained(wan, lora)
    homes = host_weights(moving, {"blocks": moving.blocks}, 4)
    away = {parameter for home in homes for parameter in home.parameters}
    plain.to(device)
    for parameter in moving.parameters():
        if parameter not in away:
            parameter.data = parameter.data.to(device)
    for module in moving.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    BlockSwap({"blocks": moving.blocks}, homes, engine_of(device))
    assert all(home.flat.is_pinned() for home in homes)
    x, text = torch.randn(2, 4, 2, 8, 8, device=device), torch.randn(2, 5, 16, device=device)
    for _ in range(3):
        for wan in (plain, moving):
            wan.zero_grad()
            wan(x, torch.tensor([9.0, 700.0], device=device), text, return_dict=False)[0].square().mean().backward()
        for (name, one), other in zip(plain.named_parameters(), moving.parameters(), strict=True):
            if one.grad is not None:
                assert other.grad is not None and (lora or other.grad.device == other.device), name
                torch.testing.assert_close(other.grad.to(device), one.grad, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for parameter in (*plain.parameters(), *moving.parameters()):
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
