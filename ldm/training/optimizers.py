"""Optimisers and schedules of the learning rate: thin functions whose keyword arguments are the YAML's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def adamw(
    parameters: Iterable[Tensor],
    *,
    lr: float,  # the learning rate, which the schedule multiplies
    betas: tuple[float, float] = (0.9, 0.999),  # how long both averages last
    eps: float = 1e-8,  # keeps small gradients from large steps
    weight_decay: float = 0.01,  # a step takes lr times this share of a weight
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); with weight_decay 0 it is Adam."""
    check_rate(lr, weight_decay)
    if eps <= 0:
        raise ValueError(f"eps: out of range; got {eps}; expected > 0; try 1e-8")
    pair = checked(betas)
    return torch.optim.AdamW(parameters, lr=lr, betas=pair, eps=eps, weight_decay=weight_decay, fused=True)


def sgd(
    parameters: Iterable[Tensor],
    *,
    lr: float,  # the learning rate, which the schedule multiplies
    momentum: float = 0.0,  # how long the average lasts
    weight_decay: float = 0.0,  # added to the gradient, in units of the weight
) -> torch.optim.Optimizer:
    """Stochastic gradient descent."""
    check_rate(lr, weight_decay)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: out of range; got {momentum}; expected 0 <= momentum < 1; try 0.9")
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def constant(
    step: int,
    steps: int,
    *,
    warmup: int = 0,  # steps
) -> float:
    """What the learning rate is multiplied by at a step, counted from 0: a line up to 1, then 1."""
    check_warmup(warmup)
    return min(1.0, (step + 1) / (warmup + 1))


def cosine(
    step: int,
    steps: int,
    *,
    warmup: int = 0,  # steps
    final: float = 0.0,  # share of the learning rate that is left at the last step
) -> float:
    """A line up to 1, then half a cosine down to `final` at the last step (Loshchilov and Hutter 2017, eq. 5)."""
    check_warmup(warmup)
    if not 0 <= final <= 1:
        raise ValueError(f"final: must be a fraction of the learning rate; got {final}; expected 0 to 1; try 0")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def check_rate(lr: float, weight_decay: float) -> None:
    """Refuse what no optimiser here can mean."""
    if lr < 0:
        raise ValueError(f"lr: must not be negative; got {lr}; expected >= 0; try 1e-4")
    if weight_decay < 0:
        raise ValueError(f"weight_decay: must not be negative; got {weight_decay}; expected >= 0; try 0.01")


def checked(betas: Sequence[float]) -> tuple[float, float]:
    """Adam's two, or an error."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: out of range; got {list(betas)}; expected two of 0 <= beta < 1; try [0.9, 0.999]")
    return betas[0], betas[1]


def check_warmup(warmup: int) -> None:
    """Refuse a warm-up that ends before it begins."""
    if warmup < 0:
        raise ValueError(f"warmup: must be a number of steps; got {warmup}; expected >= 0; try 0")
