"""What each optimiser keeps, in bytes for each weight that trains, and how long its step takes beside fused AdamW's.

The weights are those of two blocks of a transformer of width 1024; state is counted tensor storage after three steps.
Fused AdamW in float32 and the optimiser take turns, step by step, with the same gradients; the ratio is the median of
pairs. A step of training is mostly forward and backward passes, of which the ratio says nothing.

    python bench/optimizers.py [--width 1024] [--pairs 15] [--device cuda]

On a CPU it uses one thread, and counts that thread's time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.numbers import tensors_of
from kinema.optim.optimizers import build_optimizers

FP32, BF16 = torch.float32, torch.bfloat16
ROWS: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("adamw", {}, FP32),
    ("adamw", {}, BF16),
    ('adamw, rounding = "stochastic"', {"rounding": "stochastic"}, BF16),
    ('adamw, rounding = "kahan"', {"rounding": "kahan"}, BF16),
    ("adamw8bit", {"type": "adamw8bit"}, FP32),
    ('adamw8bit, rounding = "stochastic"', {"type": "adamw8bit", "rounding": "stochastic"}, BF16),
    ('adamw8bit, rounding = "kahan"', {"type": "adamw8bit", "rounding": "kahan"}, BF16),
    ("automagic", {"type": "automagic"}, FP32),
    ('automagic, rounding = "kahan"', {"type": "automagic", "rounding": "kahan"}, BF16),
    ("muon", {"type": "muon"}, FP32),
    ("muon, normuon", {"type": "muon", "variant": "normuon"}, FP32),
    ("generic, subset_norm", {"type": "generic", "second_moment": "subset_norm"}, FP32),
    ("generic, subset_norm, subspace (128)",
     {"type": "generic", "second_moment": "subset_norm", "first_moment": "subspace"}, FP32),
    ("lion", {"type": "lion"}, FP32),
    ("adafactor", {"type": "adafactor"}, FP32),
    ("schedulefree", {"type": "schedulefree"}, FP32),
    ("prodigy", {"type": "prodigy"}, FP32),
]  # fmt: skip


def weights(width: int, dtype: torch.dtype, device: str) -> dict[str, torch.nn.Parameter]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(2):
        for name in ("to_q", "to_k", "to_v", "to_out"):
            shapes |= {f"network.{block}.{name}.weight": (width, width), f"network.{block}.{name}.bias": (width,)}
        shapes |= {f"network.{block}.up.weight": (4 * width, width), f"network.{block}.down.weight": (width, 4 * width)}
        shapes |= {f"network.{block}.norm.weight": (width,)}
    draw = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(s, generator=draw).to(device, dtype)) for n, s in shapes.items()}


class Stepper:
    """An optimiser over weights of its own, with one gradient."""

    def __init__(self, settings: dict[str, Any], width: int, dtype: torch.dtype, device: str) -> None:
        self.weights, self.device = weights(width, dtype, device), device
        matrices = {name for name, weight in self.weights.items() if weight.ndim == 2}
        self.optimizers = build_optimizers(self.weights, matrices, OptimizerConfig(**settings))
        for weight in self.weights.values():
            weight.grad = torch.randn_like(weight)
        for _ in range(3):
            self.step()

    def step(self) -> float:
        clock = time.perf_counter if self.device == "cuda" else time.thread_time  # others may use the CPU too
        self._finish()
        started = clock()
        for optimizer in self.optimizers:
            optimizer.step()
        self._finish()
        return clock() - started

    def _finish(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def bytes_each(self) -> float:
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        kept = sum(tensor.nbytes for state in states for tensor in tensors_of(state).values())
        return kept / sum(weight.numel() for weight in self.weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    plain = Stepper({}, given.width, FP32, given.device)
    print("| optimiser | weights | state, bytes a weight | weights, gradients and state | step over fused AdamW's |")
    print("|---|---|---|---|---|")
    for name, settings, dtype in ROWS:
        one = Stepper(settings, given.width, dtype, given.device)
        ratio = statistics.median(one.step() / plain.step() for _ in range(given.pairs))
        each = one.bytes_each()
        kind = "fp32" if dtype == FP32 else "bf16"
        print(f"| {name} | {kind} | {each:.2f} | {each + 2 * dtype.itemsize:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
