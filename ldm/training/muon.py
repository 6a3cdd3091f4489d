"""Muon: steps of matrices whose singular values are all alike, so that what is seldom seen is learned as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ldm.training.optimizers import check_rate, checked

THIN = 16  # a matrix with fewer rows or columns is one that begins or ends a network
ROOM = 2**24  # numbers that are made orthogonal at a time
A, B, C = 3.4445, -4.7750, 2.0315  # of a polynomial that takes (0, 1] near 1 in five rounds (Jordan et al. 2024)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), of AdamW's size (Liu et al. 2025, eq. 4), for matrices and the
    kernels of convolutions; AdamW of the same rate for all else, such as biases and the first and last layers."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,  # the learning rate, which the schedule multiplies
        momentum: float = 0.95,  # how long the average of matrices lasts
        betas: tuple[float, float] = (0.9, 0.99),  # how long both averages of all else last
        weight_decay: float = 0.01,  # a step takes lr times this share of a weight
    ):
        check_rate(lr, weight_decay)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: out of range; got {momentum}; expected 0 <= momentum < 1; try 0.95")
        kinds: tuple[list[Tensor], list[Tensor]] = [], []
        for p in parameters:
            kinds[is_matrix(p)].append(p)
        rest, pair = [{"params": kinds[0]}], checked(betas)
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=pair, weight_decay=weight_decay, fused=True)
        first = {"params": kinds[1], "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([first, *self.adamw.param_groups], {})
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]  # one memory, and one rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nobody asks it for a loss
        """Move every parameter that has a gradient."""
        assert closure is None
        group = self.param_groups[0]
        for matrices in alike([p for p in group["params"] if p.grad is not None]):
            self.move(matrices, group["lr"], group["weight_decay"], group["momentum"])
        self.adamw.step()

    def move(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        """A step of matrices of one shape."""
        wanted = []
        for p in matrices:
            assert p.grad is not None
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            average, gradient = self.state[p]["momentum"], p.grad
            average.lerp_(gradient, 1 - momentum)
            wanted.append(torch.lerp(gradient, average, momentum).flatten(1))  # (R, K), as Nesterov looks ahead
        turned = orthogonal(torch.stack(wanted))  # (N, R, K)
        size = 0.2 * max(turned.shape[1:]) ** 0.5  # its root mean square is then AdamW's, about 0.2
        for p, direction in zip(matrices, turned):
            p.mul_(1 - lr * weight_decay).sub_(direction.reshape(p.shape).to(p), alpha=lr * size)


def is_matrix(p: Tensor) -> bool:
    """Whether both its sides are wide, a kernel being a matrix of its outputs by all that each one reads."""
    return p.ndim > 1 and min(len(p), p[0].numel()) >= THIN


def alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those of one shape, as many as there is room for."""
    for shape in dict.fromkeys(p.shape for p in parameters):
        group, room = [p for p in parameters if p.shape == shape], max(1, ROOM // shape.numel())
        yield from (group[k : k + room] for k in range(0, len(group), room))


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices whose singular values are 1, roughly, of each in (N, R, K): Newton and Schulz' rounds."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()  # (N, S, L), the short side first
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = y @ y.mT  # (N, S, S)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), y, beta=A)
    return y.mT if tall else y
