"""Gradient release: each parameter is updated inside the backward pass as soon as its gradient is there, and the
gradient is let go (Lv et al. 2023, "LOMO"; here with any optimiser that takes parameters one after the other).

Never are all gradients in memory at once; in exchange nothing can be known of all of them before the first update:
their common norm cannot clip them, and a second micro-batch would come too late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kinema.optim.apart import Part, parts
from kinema.optim.gradients import local_part


class GradientRelease:
    """Updates parameters while `updating`; outside of it their gradients are left alone.

    A gradient that is not finite updates nothing: its parameter alone is skipped.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], hooks: bool = True) -> None:
        """``hooks``: notice gradients by oneself; else somebody calls `update` with them, once they are summed."""
        self._parts: dict[torch.Tensor, Part] = {}
        self._active = False
        self._square = 0.0
        self.skipped = 0
        """Parameters whose update was skipped since `updating` was entered."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for part in parts(optimizer, group):
                    parameter = part.parameters[0]
                    self._parts[parameter] = part
                    if hooks:
                        parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[attr-defined]

    @property
    def norm(self) -> float:
        """The 2-norm of all gradients since `updating` was entered; not finite if one of them was not."""
        return math.sqrt(self._square)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Parameters are updated in the one backward pass inside."""
        self._square, self.skipped = 0.0, 0
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _ready(self, parameter: nn.Parameter) -> None:
        if self._active:
            self.update([parameter])

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        """Update parameters whose gradients are complete, and let the gradients go."""
        trained = [p for p in parameters if p.grad is not None]
        if not trained:
            return
        gradients = [local_part(p.grad) for p in trained if p.grad is not None]
        exact = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=exact)).tolist()
        for parameter, norm in zip(trained, norms, strict=True):
            self._square += norm * norm
            if math.isfinite(norm):
                self._parts[parameter].step()
            else:
                self.skipped += 1
            parameter.grad = None
