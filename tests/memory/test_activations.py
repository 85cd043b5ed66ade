from __future__ import annotations

from typing import Any

import pytest
import torch
from lagging import LaggingCopies
from test_checkpointing import network, run, run_no_grad
from torch import Tensor

from kinema.config.memory import Checkpointing
from kinema.memory.activations import offload_activations
from kinema.memory.checkpointing import checkpoint_blocks
from kinema.memory.compile import compile_blocks
from kinema.memory.copy_engine import engine_of

SMALLEST = 1000


@pytest.mark.parametrize("kind", [False, True, "selective", "nested", 2], ids=str)
def test_the_same_to_the_bit_with_two_blocks_on_the_device(kind: Checkpointing) -> None:
    plain, offloaded = network(dropout=0.3), network(dropout=0.3)
    if kind:
        checkpoint_blocks({"blocks": offloaded.blocks}, kind)
    engine = LaggingCopies()
    offload = offload_activations({"blocks": offloaded.blocks}, engine, SMALLEST)
    output, gradients = run(plain)
    for _ in range(2):
        same_output, same_gradients = run(offloaded)
        assert torch.equal(output, same_output)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, same_gradients[name]), name
        assert engine.live == 0 and not engine.pending  # nothing is left behind
        offloaded.zero_grad()
    # Three of four blocks are copied out, in each of two steps; two of the three are on the device at once.
    assert 0 < engine.peak <= (0.7 if kind != 2 else 1.0) * offload.moved_bytes / 2


class AtOnce(LaggingCopies):
    """Copies at once, and keeps no source, as a GPU's engine does once it is done."""

    def copy(self, source: Tensor, target: Tensor) -> Any:
        target.copy_(source)

    def wait(self, ticket: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [False, 2], ids=str)
def test_an_address_that_is_given_again_is_another_storage(kind: Checkpointing) -> None:
    plain, offloaded = network(), network()
    if kind:
        checkpoint_blocks({"blocks": offloaded.blocks}, kind)
    offload_activations({"blocks": offloaded.blocks}, AtOnce(), SMALLEST)
    output, gradients = run(plain)
    same_output, same_gradients = run(offloaded)
    assert torch.equal(output, same_output)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name


def test_inputs_of_checkpointed_blocks_alone_are_moved() -> None:
    """The hidden states of three blocks, [2, 32, 24] in float32; what all blocks are told (text, time) is moved once,
    by the first."""
    wan = network()
    checkpoint_blocks({"blocks": wan.blocks})
    offload = offload_activations({"blocks": wan.blocks}, LaggingCopies(), SMALLEST)
    run(wan)
    hidden = 2 * 32 * 24 * 4
    shared = offload.moved_bytes - 3 * hidden
    assert 0 <= shared <= hidden  # rotary tables, and the projected times


def test_two_passes_before_their_backward() -> None:
    """As in a pipeline: micro-batches whose backward passes come in either order."""
    plain, offloaded = network(), network()
    engine = LaggingCopies()
    offload_activations({"blocks": offloaded.blocks}, engine, SMALLEST)
    x, text = torch.randn(2, 4, 2, 8, 8), torch.randn(2, 5, 16)
    for order in ((0, 1), (1, 0)):
        for wan in (plain, offloaded):
            wan.zero_grad()
            losses = [
                wan(x + i, torch.tensor([9.0, 700.0]), text, return_dict=False)[0].square().mean() for i in (0, 1)
            ]
            for i in order:
                losses[i].backward()
        for (name, one), other in zip(plain.named_parameters(), offloaded.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name
    assert engine.live == 0 and not engine.pending


def test_without_gradients_nothing_moves() -> None:
    wan = network()
    offload = offload_activations({"blocks": wan.blocks}, LaggingCopies(), SMALLEST)
    with torch.no_grad():
        run_no_grad(wan)
    assert offload.moved_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [False, True], ids=str)
def test_compiled_blocks(kind: Checkpointing) -> None:
    torch._dynamo.reset()
    plain, compiled = network(), network()
    if kind:
        checkpoint_blocks({"blocks": compiled.blocks}, kind)
    compile_blocks({"blocks": compiled.blocks}, backend="aot_eager")
    offload = offload_activations({"blocks": compiled.blocks}, LaggingCopies(), SMALLEST)
    expected, got = run(plain)[1], run(compiled)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)
    assert offload.moved_bytes > 0


@pytest.mark.gpu
def test_on_a_gpu_it_takes_less_memory() -> None:
    device = torch.device("cuda", 0)
    peaks, results = [], []
    for offloads in (False, True):
        wan = network().to(device)
        if offloads:
            offload_activations({"blocks": wan.blocks}, engine_of(device), 0)
        x, text = (torch.randn(size, device=device) for size in ((8, 4, 9, 64, 64), (8, 5, 16)))
        torch.cuda.reset_peak_memory_stats(device)
        output = wan(x * 0 + 1, torch.full((8,), 100.0, device=device), text * 0 + 1, return_dict=False)[0]
        output.square().mean().backward()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
        results.append([p.grad.clone() for p in wan.parameters() if p.grad is not None])
        del wan, output
    assert peaks[1] < 0.8 * peaks[0]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
