"""An optimiser put together from parts: a first moment, a second moment, and what becomes of them.

For the blocks' matrices each part has forms that take less memory than AdamW's two moments, or that use the matrix as a
whole; what else trains has AdamW's update, with the moments that are left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from kinema.config.optimizer import OptimizerConfig
from kinema.optim.gradients import local_part
from kinema.optim.groups import grouped
from kinema.optim.muon import Orthogonal, State, alike, laid_out_like, whole
from kinema.optim.optimizers import Parameters, check_rounding
from kinema.optim.projections import Kind, choose, down, side, up
from kinema.optim.rounding import COMPENSATION, Rounding, add_updates, is_short, noise
from kinema.optim.stepping import Stepping, with_gradients
from kinema.randomness import generator

SUBSPACE = ("basis", "lines", "signs")
"""Keys of the state that name a subspace."""


@dataclass(frozen=True)
class Forms:
    """What a parameter's moments are, and what becomes of them; see `Generic`."""

    first: Literal["full", "subspace", "none"] = "full"
    second: Literal["full", "subset_norm", "none"] = "full"
    projection: Kind = "svd"
    rank: int = 128
    refresh_steps: int = 200
    orthogonal: Orthogonal | None = None

    @property
    def of_others(self) -> Forms:
        """Those of parameters that are no matrices of blocks: each moment is there or not."""
        kept = {"full": "full", "subspace": "full", "subset_norm": "full", "none": "none"}
        return replace(self, first=kept[self.first], second=kept[self.second], orthogonal=None)  # type: ignore[arg-type]


def generic(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The optimiser of ``type = "generic"``; ``block_matrices``: names of the parameters that its forms are for."""
    check_rounding(parameters, config)
    inside = {name: p for name, p in parameters.items() if name in block_matrices}
    outside = {name: p for name, p in parameters.items() if name not in block_matrices}
    orthogonal = None
    if config.variant is not None:
        orthogonal = Orthogonal(config.variant, config.orthogonalisation, config.betas[1], config.eps)
    forms = Forms(
        config.first_moment,
        config.second_moment,
        config.projection,
        config.rank,
        config.refresh_steps,
        orthogonal,
    )
    groups = [
        group | {"matrices": matrices}
        for members, matrices in ((inside, True), (outside, False))
        for group in grouped(members, config)
    ]
    return [Generic(groups, config.lr, forms, config.betas, config.eps, rounding=config.rounding)]


class Generic(Stepping):
    """w <- round(w - lr (u + decay w)), with u of the moments' forms, in step t of a parameter with gradient g:

    - ``first``: ``full``, m <- b1 m + (1 - b1) g and n = m / (1 - b1^t); ``none``, n = g; ``subspace``, the same of
      R g alone, R being a projection of ``rank`` rows (`kinema.optim.projections`), and n = R^T m / (1 - b1^s) + g
      - R^T R g. Every ``refresh_steps`` R is chosen anew and m begins at zero; s counts the steps since then.
    - ``second``: ``full``, v <- b2 v + (1 - b2) g^2 and u = n / (sqrt(v / (1 - b2^t)) + eps); ``subset_norm``, the same
      with the mean of g^2 over the shorter side of a matrix, one v for each line along the longer; ``none``, u = n.
    - ``orthogonal``: instead of dividing by a second moment, u is the update of Muon or a variant, of n.

    Where ``rank`` is not below the side that is projected, the first moment is kept whole. Moments are in fp32, beside
    the parameter; what is smaller than it is whole on every process. A group's ``matrices`` says whether its
    parameters have these forms, or those ``of_others``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        forms: Forms | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: Rounding = "none",
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, matrices=True))
        self.forms, self.betas, self.eps, self.rounding = forms or Forms(), betas, eps, rounding

    def update(self) -> None:
        for group in self.param_groups:
            named = {parameter: name for name, parameter in with_gradients(group)}
            for piece in alike(named):
                self._step_piece(piece, group, named)

    def _step_piece(self, piece: list[Tensor], group: dict[str, Any], names: dict[Tensor, str]) -> None:
        """Update parameters of one shape."""
        forms = self.forms if group["matrices"] else self.forms.of_others
        states, seed = [self.state[p] for p in piece], group.get("seed", 0)
        for state in states:
            state.setdefault("step", torch.zeros(())).add_(1)
        moments = [self._first(p, s, forms, (seed, names[p])) for p, s in zip(piece, states, strict=True)]
        if forms.orthogonal is None:
            updates = [self._divided(*one, forms) for one in zip(piece, moments, states, strict=True)]
        else:
            updates = [local_part(update) for update in forms.orthogonal.updates(piece, moments, states)]
        decay, draws = group["lr"] * group["weight_decay"], []
        for p, state in zip(piece, states, strict=True):
            if self.rounding == "kahan" and is_short(p) and COMPENSATION not in state:
                state[COMPENSATION] = torch.zeros_like(p)
            draws.append(partial(noise, p.detach(), seed, names[p], int(state["step"]), "rounding"))
        weights = [local_part(p) for p in piece]
        changes = [
            weight.float().mul(-decay).add_(update, alpha=-group["lr"])
            for weight, update in zip(weights, updates, strict=True)
        ]
        compensations = [local_part(s[COMPENSATION]) if COMPENSATION in s else None for s in states]
        add_updates(weights, changes, self.rounding, compensations, draws)

    def _first(self, p: Tensor, state: State, forms: Forms, key: tuple[int, str]) -> Tensor:
        """n in fp32, laid out like the parameter."""
        assert p.grad is not None
        if forms.first == "none":
            return p.grad.float()
        if forms.first == "subspace" and p.shape[side(forms.projection, p.shape)] > forms.rank:
            return laid_out_like(self._in_subspace(p, state, forms, key), p)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
        local_part(state["momentum"]).lerp_(local_part(p.grad).float(), 1 - self.betas[0])
        moment: Tensor = state["momentum"] / (1 - self.betas[0] ** int(state["step"]))
        return moment

    def _in_subspace(self, p: Tensor, state: State, forms: Forms, key: tuple[int, str]) -> Tensor:
        """n of the whole matrix."""
        assert p.grad is not None
        gradient, step, beta = whole(p.grad).float(), int(state["step"]), self.betas[0]
        since = (step - 1) % forms.refresh_steps
        if since == 0:
            seed, name = key
            draw = generator(seed, step, name, "projection")
            chosen = choose(forms.projection, gradient, forms.rank, draw)
            state.update({name: part.to(p.device) for name, part in chosen.items()})
        subspace = {name: state[name].to(gradient.device) for name in SUBSPACE if name in state}
        low = down(forms.projection, subspace, gradient)
        if since == 0:
            state["momentum"] = torch.zeros_like(low, device=p.device)
        moment = state["momentum"].to(low.device).lerp_(low, 1 - beta)
        state["momentum"].copy_(moment)
        change = moment / (1 - beta ** (since + 1)) - low
        return gradient + up(forms.projection, subspace, change, tuple(gradient.shape))

    def _divided(self, p: Tensor, moment: Tensor, state: State, forms: Forms) -> Tensor:
        """This process's part of the moment over the root of the second moment."""
        assert p.grad is not None
        mine, beta = local_part(moment), self.betas[1]
        if forms.second == "none":
            return mine
        if forms.second == "full":
            if "second_moment" not in state:
                state["second_moment"] = torch.zeros_like(p, dtype=torch.float32)
            squares = local_part(p.grad).float().square()
        else:
            mean = _mean_square(p.grad)
            if "second_moment" not in state:
                state["second_moment"] = torch.zeros_like(mean)
            squares = local_part(mean)
        v = local_part(state["second_moment"])
        v.lerp_(squares, 1 - beta)
        return mine / (v / (1 - beta ** int(state["step"]))).sqrt_().add_(self.eps)


def _mean_square(gradient: Tensor) -> Tensor:
    """The mean of squares over the shorter side, [rows, 1] or [1, columns], fp32; of shards, this process's lines."""
    short = 1 if gradient.shape[0] >= gradient.shape[1] else 0
    if not isinstance(gradient, DTensor):
        return gradient.float().square().mean(short, keepdim=True)
    home = gradient.to_local().device
    total = gradient.to(gradient.device_mesh.device_type).float().square().sum(short, keepdim=True)
    total = total.redistribute(placements=[Replicate() if one.is_partial() else one for one in total.placements])
    return (total / gradient.shape[short]).to(home)
