"""Muon (Jordan et al. 2024): momentum whose matrix updates are orthogonalised, and its variants with second moments.

torch's own class iterates in bf16, one matrix after the other; most CPUs have no bf16 arithmetic, and a network's
blocks repeat a few shapes. This one iterates in fp32 off the GPU and takes many matrices of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from kinema.optim.gradients import local_part
from kinema.optim.stepping import Stepping

Method = Literal["newton_schulz", "polar_express"]
Variant = Literal["muon", "adamuon", "normuon"]
State = dict[str, Tensor]

POLYNOMIALS: dict[Method, tuple[tuple[float, float, float], ...]] = {
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
"""a, b, c of each iteration X <- a X + (b X X^T + c (X X^T)^2) X. Newton-Schulz: one quintic, chosen by Jordan for the
steepest slope at zero. Polar Express (Amsel et al. 2025): the best quintic for what the one before it leaves, here for
singular values that are at least 0.001 of the norm, with their safety factor of 0.02."""
SHRINK: dict[Method, float] = {"newton_schulz": 1.0, "polar_express": 1.02}
"""How far below 1 the norm starts, so that rounding takes no singular value beyond the polynomials' range."""
PIECE_BYTES = 2**28
"""Matrices that are stacked at once, counted in fp32: the iteration needs a few times this."""
RMS = 0.2
"""Root mean square of an update, about that of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training"), so that
both take one learning rate."""


def orthogonalise(matrices: Tensor, method: Method = "newton_schulz", eps: float = 1e-7) -> Tensor:
    """Bring the singular values of each matrix of a stack [N, rows, columns] near 1: to about 0.7 to 1.2."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (SHRINK[method] * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=eps)
    for a, b, c in POLYNOMIALS[method]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


@dataclass(frozen=True)
class Orthogonal:
    """How momenta of matrices become updates, O being the orthogonalised momentum:

    - ``muon``: 0.2 sqrt(max(rows, columns)) O;
    - ``adamuon`` (Si et al. 2025): v <- beta2 v + (1 - beta2) O^2 by element; O / (sqrt(v) + eps), scaled to a root
      mean square of 0.2;
    - ``normuon`` (Li et al. 2025): v <- beta2 v + (1 - beta2) mean(O^2) for each line along the longer side, those
      along the shorter have one norm already; O / (sqrt(v) + eps), scaled back to the norm of O, then as ``muon``.
    """

    variant: Variant = "muon"
    method: Method = "newton_schulz"
    beta2: float = 0.99
    eps: float = 1e-8

    def updates(self, parameters: Sequence[Tensor], momenta: Sequence[Tensor], states: Sequence[State]) -> list[Tensor]:
        """Updates of matrices of one shape, before the learning rate, laid out like the parameters.

        Shards are gathered: each process works on whole matrices. The variants keep their second moment in the states.
        """
        stacked = orthogonalise(torch.stack([whole(momentum) for momentum in momenta]), self.method)
        step = {"muon": self._muon, "adamuon": self._adamuon, "normuon": self._normuon}[self.variant]
        return [step(o, p, state) for o, p, state in zip(stacked, parameters, states, strict=True)]

    def _muon(self, o: Tensor, parameter: Tensor, state: State) -> Tensor:
        return laid_out_like(o * (RMS * max(o.shape) ** 0.5), parameter)

    def _adamuon(self, o: Tensor, parameter: Tensor, state: State) -> Tensor:
        update = laid_out_like(o, parameter)
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(parameter, dtype=torch.float32)
        mine, v = local_part(update), local_part(state["second_moment"])
        v.lerp_(mine.float().square(), 1 - self.beta2)
        mine.div_(v.sqrt().add_(self.eps))
        square = update.to(_device_type(update)).square().sum()
        norm = (square.full_tensor() if isinstance(square, DTensor) else square).sqrt()
        mine.mul_((RMS * o.numel() ** 0.5 / norm.clamp(min=1e-10)).to(mine.device))
        return update

    def _normuon(self, o: Tensor, parameter: Tensor, state: State) -> Tensor:
        mean = o.float().square().mean(dim=-1 if o.shape[0] >= o.shape[1] else -2, keepdim=True)
        if "line_moment" not in state:
            state["line_moment"] = torch.zeros_like(mean, device=parameter.device)
        state["line_moment"].lerp_(mean.to(parameter.device), 1 - self.beta2)
        scaled = o / (state["line_moment"].to(o.device).sqrt() + self.eps).to(o.dtype)
        scaled *= o.norm() / scaled.norm().clamp(min=1e-10)
        return self._muon(scaled, parameter, state)


class Muon(Stepping):
    """Muon with Nesterov momentum, for 2-D parameters.

    m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m;  w <- (1 - lr decay) w - lr U(u), where U is `Orthogonal`'s.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        how: Orthogonal | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.how = how or Orthogonal()
        for group in self.param_groups:
            for p in group["params"]:
                assert p.ndim == 2, f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}"

    def update(self) -> None:
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [local_part(self.state[p]["momentum"]) for p in parameters]
        torch._foreach_lerp_(buffers, [local_part(p.grad) for p in parameters], 1 - group["momentum"])
        torch._foreach_mul_([local_part(p) for p in parameters], 1 - group["lr"] * group["weight_decay"])
        for piece in alike(parameters):
            states = [self.state[p] for p in piece]
            buffers = [state["momentum"] for state in states]
            momenta = torch._foreach_lerp([p.grad for p in piece], buffers, group["momentum"])
            for p, update in zip(piece, self.how.updates(piece, momenta, states), strict=True):
                p.add_(update, alpha=-group["lr"])


def alike(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape, mesh and device together, PIECE_BYTES of them at most."""
    by_shape: dict[tuple[torch.Size, Any, torch.device], list[Tensor]] = defaultdict(list)
    for p in parameters:
        by_shape[p.shape, getattr(p, "device_mesh", None), p.device].append(p)
    for (shape, *_), members in by_shape.items():
        count = max(1, PIECE_BYTES // (4 * max(1, shape.numel())))
        for start in range(0, len(members), count):
            yield members[start : start + count]


def whole(tensor: Tensor) -> Tensor:
    """On the mesh's device, where shards are sent from and matrices multiplied, also of shards in the host's memory."""
    return tensor.to(_device_type(tensor)).full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, as the parameter is sharded and where it is."""
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)


def _device_type(tensor: Tensor) -> str:
    return tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device.type
