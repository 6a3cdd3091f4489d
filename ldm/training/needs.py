"""What a step needs of a machine, told from one sample and two: memory by part, and floating-point operations."""

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
from ldm.training.loop import Stage


@dataclass
class Needs:
    """Bytes of one process, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def needs_of(stage: Stage, ranks: int) -> Needs:
    """Of a stage that stands for one of so many processes, at the step where it is."""
    trained = [p for group in stage.groups().values() for _, p in group]
    evenly_spaced = {p for module in (*stage.roots(), *stage.blocks()) for p in module.parameters()}
    whole = [x for x in (*stage.parameters(), *stage.buffers()) if x not in evenly_spaced]
    shards = ranks if stage.plan.strategy == "fsdp2" else 1
    one, two = held(stage, 1), held(stage, 2)  # some of it, such as weights in bfloat16, does not grow with a batch
    return Needs(
        weights=size(whole) + size(evenly_spaced) // shards,
        gradients=size(trained) // shards,
        optimizer=round(size(trained) * remembered(stage)) // shards,
        averages=size(stage.ema.shadows.values()) // shards,
        activations=one + (stage.data.batch_size // stage.plan.accumulate - 1) * (two - one),
    )


def size(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def remembered(stage: Stage) -> float:
    """How many bytes an optimiser keeps for one of a weight."""
    p = torch.zeros(100, 100, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = stage.make_optimizer([p])
    optimizer.step()
    return size(x for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.ndim) / size([p])


def flops_of(stage: Stage) -> int:
    """The operations of one sample, forward and back, a multiplication and an addition being two.

    What gradient checkpointing computes again is no work of the model's, and left out.
    """
    with without_checkpointing(stage), FlopCounterMode(display=False) as counter:
        propagate(stage, 1)
    return counter.get_total_flops()


@contextmanager
def without_checkpointing(stage: Stage) -> Iterator[None]:
    """Nothing is computed twice."""
    modules: list[Any] = [m for m in stage.modules() if getattr(m, "checkpointing", False)]
    for module in modules:
        module.checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.checkpointing = True


def held(stage: Stage, samples: int) -> int:
    """The most bytes that wait for a backward pass at any time, weights left out."""
    waiting = Waiting(stage)
    with torch.autograd.graph.saved_tensors_hooks(waiting.pack, lambda kept: kept.x):
        propagate(stage, samples)
    return waiting.most


class Waiting:
    """Bytes of the tensors that a graph holds, each storage counted once."""

    def __init__(self, module: nn.Module):
        self.owned = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
        self.times: Counter[int] = Counter()
        self.now = self.most = 0

    def pack(self, x: Tensor) -> Kept:
        return Kept(x, self)

    def count(self, x: Tensor, by: int) -> None:
        """One holder more or less."""
        place = x.untyped_storage().data_ptr()
        before, after = self.times[place], self.times[place] + by
        self.times[place] = after
        if place not in self.owned and bool(before) != bool(after):
            self.now += by * x.untyped_storage().nbytes()
            self.most = max(self.most, self.now)


class Kept:
    """A tensor for as long as a graph holds it."""

    def __init__(self, x: Tensor, waiting: Waiting):
        self.x, self.waiting = x, waiting
        waiting.count(x, 1)

    def __del__(self) -> None:
        self.waiting.count(self.x, -1)


def propagate(stage: Stage, samples: int) -> None:
    """The losses of the first sample, so many times, forward and back, without a step; nothing changes by it."""
    bucket = 0 if stage.data.buckets is None else int(stage.data.buckets[0])
    batch = fetched(stage, [SampleId(number, 0, bucket) for number in range(samples)])
    with untouched(stage), precisely(stage):
        for turn in stage.turns():
            back(stage, stage.loss(batch, turn)[0])


def back(stage: Stage, loss: Tensor) -> None:
    """All gradients, for nobody: DDP, which would remember whose came, is not told; FSDP2 has hooks to be run."""
    if stage.plan.strategy == "fsdp2" and stage.trainer.world_size > 1:
        loss.backward()
    else:
        torch.autograd.grad(loss, [p for p in stage.parameters() if p.requires_grad], allow_unused=True)


def fetched(stage: Stage, sample_ids: Sequence[SampleId]) -> dict[str, Any]:
    """Training samples where they are used."""
    return stage.transfer_batch_to_device(stage.data.batch(sample_ids, stage.seed), stage.device, 0)


@contextmanager
def precisely(stage: Stage) -> Iterator[None]:
    """The precision of training; what will be compiled is not yet."""
    with stage.trainer.precision_plugin.train_step_context(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def untouched(stage: Stage) -> Iterator[None]:
    """Afterwards counts and statistics in buffers and the state of generators are as before, and no gradients left."""
    before = [(x, x.clone()) for x in stage.buffers()]
    try:
        with torch.random.fork_rng(devices=[stage.device] if stage.device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)
        stage.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------------------ the machine


def machine_memory(device: torch.device) -> int:
    """All the bytes there are, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak(device: torch.device) -> int:
    """The most bytes that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
