"""The Inception score (Salimans et al. 2016): how sure a classifier is of each picture, and how unlike they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.metrics.kernel import Estimate

PARTS = 10


def inception_score(logits: Tensor, parts: int = PARTS) -> Estimate:
    """exp E KL(p(y|x) || p(y)) of logits (N, classes), over so many random parts."""
    if len(logits) < parts:
        raise ValueError(f"logits: too few for {parts} parts; got {len(logits)}; expected {parts} or more")
    mixed = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))  # classes may come one by one
    scores = [score(logits[part].double().softmax(1)) for part in mixed.tensor_split(parts)]
    values = torch.tensor(scores, dtype=torch.float64)
    return Estimate(values.mean().item(), values.std(correction=0).item())


def score(p: Tensor) -> float:
    """Of the probabilities of one part, (N, classes); those of classes that it lacks may be 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp().item()
