"""AdamW for weights in a short type, and with moments of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinema.optim.gradients import local_part
from kinema.optim.low_bit import decode, encode, takes_codes, zero_codes
from kinema.optim.rounding import COMPENSATION, Rounding, add_updates, is_short, noise
from kinema.optim.stepping import Stepping, with_gradients

PIECE_BYTES = 2**26
"""Weights that are updated at once, counted in float32: a few times this is needed beside the state."""
MOMENTS = (("exp_avg", True), ("root_avg_sq", False))
"""Keys of the moments that are kept as codes, and whether they have a sign."""


class AdamW(Stepping):
    """AdamW (Loshchilov and Hutter 2019), computed in float32 whatever the weights' type.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    w <- round(w - lr decay w - lr m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps)).

    ``rounding``: see `kinema.optim.rounding.add_updates`. Moments are kept in float32, or with ``bits`` = 8 as codes
    (`kinema.optim.low_bit`): m, and the root of v, so that both reach equally far down; an update takes the moments
    before they are rounded. Vectors and small parameters keep float32 moments. Each rank updates its own shard.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rounding: Rounding = "none",
        bits: Literal[8, 32] = 32,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.rounding, self.bits = rounding, bits

    def update(self) -> None:
        for group in self.param_groups:
            named = with_gradients(group)
            for _, parameter in named:
                self._make_state(parameter)
            for piece in pieces(named):
                self._step_piece(piece, group)

    def _make_state(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if state:
            return
        state["step"] = torch.zeros(())
        if self.bits == 8 and takes_codes(parameter):
            for key, signed in MOMENTS:
                state[key], state[f"{key}_scale"] = zero_codes(parameter, signed)
        else:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        if self.rounding == "kahan" and is_short(parameter):
            state[COMPENSATION] = torch.zeros_like(parameter, requires_grad=False)

    def _step_piece(self, named: list[tuple[str, nn.Parameter]], group: dict[str, Any]) -> None:
        """One update of parameters whose shards this rank holds."""
        states = [self.state[p] for _, p in named]
        for state in states:
            state["step"] += 1
        counts = [int(state["step"]) for state in states]
        (beta1, beta2), lr = group["betas"], group["lr"]
        weights = [local_part(p) for _, p in named]
        gradients = [local_part(p.grad).float() for _, p in named]

        first, second = self._decoded(states)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

        roots = torch._foreach_sqrt(second)
        self._encode(states, first, roots)
        torch._foreach_div_(roots, [(1 - beta2**n) ** 0.5 for n in counts])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, roots)
        torch._foreach_mul_(updates, [-lr / (1 - beta1**n) for n in counts])
        if group["weight_decay"]:
            torch._foreach_add_(updates, [weight.float() for weight in weights], alpha=-lr * group["weight_decay"])

        compensations = [local_part(s[COMPENSATION]) if COMPENSATION in s else None for s in states]
        seed = group.get("seed", 0)
        draws = [partial(noise, p.detach(), seed, name, n, "rounding")
                 for (name, p), n in zip(named, counts, strict=True)]  # fmt: skip
        add_updates(weights, updates, self.rounding, compensations, draws)

    def _decoded(self, states: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """The moments in float32: those that are kept so themselves."""
        first, second = [], []
        for state in states:
            if "root_avg_sq" in state:
                m, root = (decode(local_part(state[key]), local_part(state[f"{key}_scale"]), signed)
                           for key, signed in MOMENTS)  # fmt: skip
                first.append(m)
                second.append(root.square_())
            else:
                first.append(local_part(state["exp_avg"]))
                second.append(local_part(state["exp_avg_sq"]))
        return first, second

    def _encode(self, states: list[dict[str, Tensor]], first: list[Tensor], roots: list[Tensor]) -> None:
        for state, m, root in zip(states, first, roots, strict=True):
            for (key, signed), values in zip(MOMENTS, (m, root), strict=True):
                if f"{key}_scale" in state:
                    encode(values, local_part(state[key]), local_part(state[f"{key}_scale"]), signed)


def pieces(named: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Runs of neighbours of at most `PIECE_BYTES` together, or of one parameter."""
    piece: list[tuple[str, nn.Parameter]] = []
    filled = 0
    for one in named:
        size = 4 * local_part(one[1]).numel()
        if piece and filled + size > PIECE_BYTES:
            yield piece
            piece, filled = [], 0
        piece.append(one)
        filled += size
    if piece:
        yield piece
