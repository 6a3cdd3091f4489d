"""Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of one set among another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS, ROWS = 5, 1024  # whose distance is a sample's radius; rows of distances at a time


class PRDC(NamedTuple):
    """Shares, but density, which may exceed one."""

    precision: float  # of the made, in the reach of a true one
    recall: float  # of the true, in the reach of a made one
    density: float  # by how many true ones a made one is reached, over k
    coverage: float  # of the true, that reach a made one


def prdc(true: Tensor, made: Tensor, k: int = NEIGHBOURS) -> PRDC:
    """Of features (N, D) and (M, D); a sample reaches as far as its k-th nearest neighbour in its own set."""
    if min(len(true), len(made)) <= k:
        got = min(len(true), len(made))
        raise ValueError(f"features: too few for {k} neighbours; got {got}; expected {k + 1} or more")
    reach, theirs = radii(true, k), radii(made, k)  # (N,), (M,)
    precise, dense, recalled, covered = [], 0.0, [], []
    for _, apart in distances(made, true):  # (b, N) of some of the made
        within = apart < reach
        precise.append(within.any(1))
        dense += within.sum().item()
    for part, apart in distances(true, made):  # (b, M) of some of the true
        recalled.append((apart < theirs).any(1))
        covered.append(apart.amin(1) < reach[part])
    precision, recall, coverage = (torch.cat(found).double().mean().item() for found in (precise, recalled, covered))
    return PRDC(precision, recall, dense / (k * len(made)), coverage)


def radii(x: Tensor, k: int) -> Tensor:
    """(N,) each one's distance to its k-th nearest other one."""
    return torch.cat([apart.kthvalue(k + 1, 1).values for _, apart in distances(x, x)])  # the nearest is itself


def distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of (N, M) at a time; by products, which in float64 lose nothing that counts here."""
    middle = y.double().mean(0)  # so that they are as small as can be
    x, y = x.double() - middle, y.double() - middle
    for start in range(0, len(x), ROWS):
        part = slice(start, start + ROWS)
        yield part, torch.cdist(x[part], y, compute_mode="use_mm_for_euclid_dist")


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of (N, D) its distance to the nearest of (M, D), and which one that is."""
    found = [apart.min(1) for _, apart in distances(x, y)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
