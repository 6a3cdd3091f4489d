"""The Inception score (Salimans et al. 2016): how sure a classifier is of each picture, and how unlike they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.metrics.kernel import Estimate

PARTS = 10


def inception_score(logits: Tensor, parts: int = PARTS) -> Estimate:
    """exp E KL(p(y|x) || p(y)) of logits (N, classes), over so many consecutive parts."""
    if len(logits) < parts:
        raise ValueError(f"logits: too few for {parts} parts; got {len(logits)}; expected {parts} or more")
    scores = [score(part.double().log_softmax(1)) for part in logits.tensor_split(parts)]
    values = torch.tensor(scores, dtype=torch.float64)
    return Estimate(values.mean().item(), values.std(correction=0).item())


def score(log_p: Tensor) -> float:
    """Of one part, (N, classes)."""
    p = log_p.exp()
    mean = p.mean(0).log()  # (classes,)
    return (p * (log_p - mean)).sum(1).mean().exp().item()
