"""What training costs: memory by part, floating-point operations, and the share of the device's peak that is used."""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.data.sampler import SampleId
from ldm.training.loop import Loop
from ldm.training.trainer import TrainerSettings


@dataclass
class Memory:
    """Bytes of one process by their use."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def memory_of(loop: Loop, ranks: int) -> Memory:
    """The memory of a step at the loop's current phase, for one of `ranks` processes."""
    recipe, settings = loop.recipe, loop.settings
    trained = [p for group in recipe.groups().values() for _, p in group]
    sharded = {p for module in (*recipe.roots(), *recipe.blocks()) for p in module.parameters()}
    unsharded = [x for x in (*recipe.parameters(), *recipe.buffers()) if x not in sharded]
    shards = ranks if settings.strategy == "fsdp2" else 1
    one, two = (
        saved_bytes(loop, 1),
        saved_bytes(loop, 2),
    )  # a part, such as bfloat16 weights, is independent of the batch
    return Memory(
        weights=size(unsharded) + size(sharded) // shards,
        gradients=size(trained) // shards,
        optimizer=round(size(trained) * optimizer_bytes(loop)) // shards,
        averages=size(loop.ema.shadows.values()) // shards,
        activations=one + (recipe.data.batch_size // settings.accumulate - 1) * (two - one),
    )


def size(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def optimizer_bytes(loop: Loop) -> float:
    """Bytes that the optimiser keeps for each byte of a weight."""
    p = torch.zeros(100, 100, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = loop.make_optimizers[""]([p])
    optimizer.step()
    return size(x for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.ndim) / size([p])


def flops_of(loop: Loop) -> int:
    """The operations of one sample, forward and backward; a multiplication and an addition are two.

    What gradient checkpointing computes again does not count.
    """
    with without_checkpointing(loop), FlopCounterMode(display=False) as counter:
        propagate(loop, 1)
    return counter.get_total_flops()


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is off."""
    modules: list[Any] = [m for m in module.modules() if getattr(m, "checkpointing", False)]
    for m in modules:
        m.checkpointing = False
    try:
        yield
    finally:
        for m in modules:
            m.checkpointing = True


# ------------------------------------------------------------------------------------------- activations in memory


def saved_bytes(loop: Loop, samples: int) -> int:
    """The most bytes that are saved for the backward pass at any time, without weights."""
    counter = SavedTensors(loop)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda saved: saved.x):
        propagate(loop, samples)
    return counter.most


class SavedTensors:
    """Counts the bytes of the tensors that a graph saves, each storage once."""

    def __init__(self, module: nn.Module):
        self.owned = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
        self.users: Counter[int] = Counter()
        self.now = self.most = 0

    def pack(self, x: Tensor) -> Saved:
        return Saved(x, self)

    def count(self, x: Tensor, change: int) -> None:
        """One user of a storage more or less."""
        storage = x.untyped_storage()
        before, after = self.users[storage.data_ptr()], self.users[storage.data_ptr()] + change
        self.users[storage.data_ptr()] = after
        if storage.data_ptr() not in self.owned and bool(before) != bool(after):
            self.now += change * storage.nbytes()
            self.most = max(self.most, self.now)


class Saved:
    """A tensor that is counted for as long as a graph holds it."""

    def __init__(self, x: Tensor, counter: SavedTensors):
        self.x, self.counter = x, counter
        counter.count(x, 1)

    def __del__(self) -> None:
        self.counter.count(self.x, -1)


# --------------------------------------------------------------------------------------------- a step without effect


def propagate(loop: Loop, samples: int) -> None:
    """Forward and backward of the first sample, repeated `samples` times, without a step; nothing changes."""
    data = loop.recipe.data
    bucket = 0 if data.buckets is None else int(data.buckets[0])
    batch = fetch(loop, [SampleId(number, 0, bucket) for number in range(samples)])
    with unchanged(loop), precision_of_training(loop):
        for turn in loop.recipe.turns():
            backward(loop, loop.recipe.loss(batch, turn)[0])


def backward(loop: Loop, loss: Tensor) -> None:
    """Compute all gradients; DDP does not see them, but FSDP2's hooks must run."""
    if loop.settings.strategy == "fsdp2" and loop.rank.of > 1:
        loss.backward()
    else:
        torch.autograd.grad(loss, [p for p in loop.parameters() if p.requires_grad], allow_unused=True)


def fetch(loop: Loop, sample_ids: Sequence[SampleId]) -> dict[str, Any]:
    """A prepared batch of these training samples, on the device."""
    batch, prepare = loop.recipe.data.batch(sample_ids, loop.recipe.seed), loop.recipe.preparation()
    return loop.transfer_batch_to_device(batch if prepare is None else prepare(batch), loop.device, 0)


@contextmanager
def precision_of_training(loop: Loop) -> Iterator[None]:
    """The precision of training, without compilation."""
    with loop.trainer.precision_plugin.train_step_context(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unchanged(loop: Loop) -> Iterator[None]:
    """Buffers and generators are restored afterwards, and gradients removed."""
    before = [(x, x.clone()) for x in loop.buffers()]
    try:
        with torch.random.fork_rng(devices=[loop.device] if loop.device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)
        loop.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------------------ the machine


def machine_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# dense TFLOP/s as the makers state them, by torch's name of the device: float32 (TF32 where there is one), and 16 bits
# with float32 accumulation; other devices, and parts of a device (MIG), have no known peak
A100, H100, V100_SXM2, V100_PCIE = (156, 312), (494.7, 989.4), (15.7, 125), (14, 112)
PEAKS = {
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), A100),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), A100),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), H100),
    **dict.fromkeys(("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), V100_SXM2),
    **dict.fromkeys(("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), V100_PCIE),
    **{"NVIDIA H100 PCIe": (378, 756), "NVIDIA L40S": (183, 362), "NVIDIA GeForce RTX 4090": (82.6, 165.2)},
}


class Utilisation:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), from the operations of a sample by phase."""

    def __init__(self, flops: dict[int, int], peak: float | None):
        self.flops, self.peak = flops, peak

    @staticmethod
    def of(loop: Loop) -> Utilisation:
        """Counted on one sample before training; every rank calls, since a loss may average over ranks."""
        name = torch.cuda.get_device_name(loop.device) if loop.device.type == "cuda" else ""
        return Utilisation(flops_by_phase(loop), peak_flops(loop.settings, name))

    def row(self, step: int, images_per_second: float) -> dict[str, float]:
        """What the log shows after a step, for all processes together."""
        phase = max((first for first in self.flops if first < max(step, 1)), default=None)
        if phase is None:
            return {}
        flops = self.flops[phase] * images_per_second  # FLOP/s
        found = {"tflops_per_second": flops / 1e12} | ({"mfu": flops / self.peak} if self.peak else {})
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def flops_by_phase(loop: Loop) -> dict[int, int]:
    """The operations of a sample in every phase that is not over, by its first step; empty if memory is short."""
    current, found = loop.counters.step, {}
    try:
        for _, first, steps in loop.spans():
            if first + steps > current:
                loop.counters.step = first
                found[first] = flops_of(loop)
    except torch.OutOfMemoryError:  # a sample without gradient checkpointing may need more than a step with it
        return {}
    finally:
        loop.counters.step = current
    return found


def peak_flops(settings: TrainerSettings, device: str) -> float | None:
    """FLOP/s of all processes on such a device in the precision of training, if they are known."""
    if device not in PEAKS or settings.precision == "64-true":
        return None
    return 1e12 * settings.ranks * PEAKS[device][settings.precision != "32-true"]
