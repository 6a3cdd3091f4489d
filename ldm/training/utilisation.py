"""How much of what its devices could compute a training does: model FLOPs utilisation (Chowdhery et al. 2022, B)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ldm.training.loop import Stage
from ldm.training.needs import flops_of
from ldm.training.trainer import Plan


class Peak(NamedTuple):
    """Dense TFLOP/s as the maker states them; those of 16 bits with sums in float32."""

    float32: float  # TF32 where the device has it, which is what cuDNN computes float32 convolutions in
    half: float  # float16, and bfloat16 where the device has it


# by the name that torch gives a device; what is not here, or only a part of one (MIG), has no peak that we know of
A100, H100, V100_SXM2, V100_PCIE = Peak(156, 312), Peak(494.7, 989.4), Peak(15.7, 125), Peak(14, 112)
PEAKS = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H100 PCIe": Peak(378, 756),
    "NVIDIA H200": H100,
    "NVIDIA L40S": Peak(183, 362),
    "NVIDIA GeForce RTX 4090": Peak(82.6, 165.2),
    "Tesla V100-SXM2-16GB": V100_SXM2,
    "Tesla V100-SXM2-32GB": V100_SXM2,
    "Tesla V100-PCIE-16GB": V100_PCIE,
    "Tesla V100-PCIE-32GB": V100_PCIE,
}


class Utilisation:
    """The operations that an image costs in each phase of a plan, and the most that all processes do in a second."""

    def __init__(self, flops: dict[int, int], peak: float | None):
        self.flops, self.peak = flops, peak

    @staticmethod
    def of(stage: Stage) -> Utilisation:
        """Counted on one sample, before training; every rank calls, for a loss may average over ranks."""
        name = torch.cuda.get_device_name(stage.device) if stage.device.type == "cuda" else ""
        return Utilisation(counted(stage), peak_of(stage.plan, name))

    def row(self, step: int, images_per_second: float) -> dict[str, float]:
        """What the log says after a step, of all processes together."""
        phase = max((first for first in self.flops if first < max(step, 1)), default=None)
        if phase is None:
            return {}
        done = self.flops[phase] * images_per_second  # FLOP/s
        found = {"tflops_per_second": done / 1e12} | ({"mfu": done / self.peak} if self.peak else {})
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def counted(stage: Stage) -> dict[int, int]:
    """By the first step of each phase that is not over, its operations for an image; none where memory is short."""
    here, found = stage.step, {}
    try:
        for _, first, steps in stage.spans():
            if first + steps > here:
                stage.step = first
                found[first] = flops_of(stage)
    except torch.OutOfMemoryError:  # one sample without gradient checkpointing may be more than a step with it
        return {}
    finally:
        stage.step = here
    return found


def peak_of(plan: Plan, device: str) -> float | None:
    """FLOP/s of all processes on such a device at the precision of training, if we know them."""
    if device not in PEAKS or plan.precision == "64-true":
        return None
    peak = PEAKS[device]
    return 1e12 * plan.ranks * (peak.float32 if plan.precision == "32-true" else peak.half)
