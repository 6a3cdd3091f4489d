"""The judge's features: small, shipped, and made for pictures of scenes."""

from __future__ import annotations

import copy

from torch import Tensor

from ldm.checkpoint.files import check_digest
from ldm.metrics.features import Embedded
from ldm.scenes import pretrained


class JudgeFeatures:
    """Pooled features of the shipped judge, which knows scenes; it compares pictures at 64 x 64."""

    def __init__(self) -> None:
        self.name, self.resize = "judge", "64x64, bilinear, antialiased"
        self.network = copy.deepcopy(pretrained.judge())  # the caller may move it to another device
        self.identity = f"judge {check_digest(pretrained.FOLDER / 'judge.safetensors')}"

    def __call__(self, x: Tensor) -> Embedded:
        return Embedded(self.network.pooled(x))
