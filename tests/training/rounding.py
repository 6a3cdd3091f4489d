"""How far two float64 trainings may drift apart that differ in nothing but the order of their sums."""

from __future__ import annotations

import math

UNIT = 2.0**-53  # half of float64's spacing at one


def drift(steps: int, terms: int, lr: float = 1e-3, eps: float = 1e-8) -> float:
    """The largest difference of a weight after so many steps of Adam on gradients that are sums of so many terms.

    Two orders of summing n terms of order one give results sqrt(n) units apart. Adam divides by |g| + eps, so that an
    error of a gradient near zero reaches the weight multiplied by lr / eps, once in every step. The order is not ours:
    the matrix product chooses it by how the memory of its operands is aligned.
    """
    return steps * lr / eps * math.sqrt(terms) * UNIT
