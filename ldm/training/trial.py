"""Short trials in the real training loop: phases are timed, a checkpoint is resumed, one batch is overfitted."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor

from ldm.data.sampler import Order
from ldm.errors import InputError
from ldm.training import checkpointing
from ldm.training.checkpointing import MODEL
from ldm.training.cost import Memory, fetch, flops_of, machine_memory, memory_of, peak_memory, precision_of_training
from ldm.training.loop import Loop
from ldm.training.trainer import TrainerSettings

T = TypeVar("T")
State = dict[str, Tensor]
Script = Generator[None, None, T]  # every `yield` is a step of the training
WARM, LEAST, TIMED, OVERFIT = 4, 3, 24, 60  # steps
LATENTS, PIECE = 64, 8  # samples whose latents are measured, and how many at once
WARMUP = 10  # steps: a schedule's own warm-up may be longer than a trial


class Values(NamedTuple):
    """The range, mean and standard deviation of some samples' latents."""

    samples: int
    least: float
    most: float
    mean: float
    std: float


@dataclass
class Phase:
    """A phase of training: its steps, and what one of them costs a process."""

    name: str
    first: int
    steps: int
    flops: float
    seconds: float


@dataclass
class Trial:
    """What a few steps of training cost one process."""

    needs: Memory
    memory: int  # bytes of the machine or its GPU
    before: int  # peak memory of this process before its first step
    peak: int  # and after real steps
    phases: list[Phase]
    validation_seconds: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    model_bytes: int
    latents: Values | None = None  # if a denoiser learns from latents


class ScriptCallback(Callback):
    """Runs a script step by step; the training ends with it."""

    def __init__(self, script: Callable[[Loop], Script[Any]]):
        self.make = script
        self.result: Any = None

    def on_fit_start(self, trainer: pl.Trainer, loop: pl.LightningModule) -> None:
        assert isinstance(loop, Loop)
        self.script = self.make(loop)
        self.advance(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, loop: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        assert isinstance(loop, Loop)
        if loop.report:
            self.advance(trainer)

    def advance(self, trainer: pl.Trainer) -> None:
        """Continue the script up to its next step."""
        try:
            next(self.script)
        except StopIteration as end:
            self.result, trainer.should_stop = end.value, True


def follow(loop: Loop, script: Callable[[Loop], Script[T]], batches: Any = None) -> T:
    """Train along a script, on these batches if they are given; returns the script's result."""
    callback = ScriptCallback(script)
    loop.settings.trainer([callback], loop.recipe.sometimes_unused).fit(loop, batches)
    return callback.result


def first_batch(loop: Loop) -> Iterator[dict[str, Any]]:
    """The micro-batches of the first batch, again and again."""
    return cycle(list(islice(loop.recipe.stream(0, loop.settings.accumulate), loop.settings.accumulate)))


# ------------------------------------------------------------------------------------------------------ the scripts


def trial(loop: Loop, settings: TrainerSettings, folder: Path, seconds: float) -> Script[tuple[Trial, State]]:
    """Some steps of each phase, a validation, a checkpoint and one more step: their costs, and the last state.

    The loop is one of the processes of `settings`, and alone here.
    """
    spans = loop.spans()
    loop.counters.step = spans[-1][1]  # the phase that needs most
    needs, memory = memory_of(loop, settings.ranks), machine_memory(loop.device)
    check_memory(needs, settings, memory)
    latents = measure_latents(loop, seconds / 6)
    before, phases = peak_memory(loop.device), []
    for name, first, steps in spans:
        loop.counters.step = first
        flops = flops_of(loop) * loop.recipe.data.batch_size
        each = yield from timed(loop, seconds / len(spans))
        phases.append(Phase(name, first, steps, flops, each))
    peak = peak_memory(loop.device)
    (folder / "samples").mkdir()
    found = Trial(
        needs=needs,
        memory=memory,
        before=before,
        peak=peak,
        phases=phases,
        validation_seconds=clocked(lambda: loop.validate(folder / "samples")) / settings.ranks,  # which share it
        checkpoint_seconds=clocked(lambda: checkpointing.write(folder, loop)),
        checkpoint_bytes=sum(file.stat().st_size for file in folder.glob("checkpoints/*/*")),
        model_bytes=(folder / MODEL).stat().st_size,
        latents=latents,
    )
    yield
    return found, state_of(loop)


def resume(loop: Loop, folder: Path) -> Script[State]:
    """The state one step after the newest checkpoint."""
    found = checkpointing.newest(folder)
    assert found
    checkpointing.restore(*found, loop)
    yield
    return state_of(loop)


def overfit(loop: Loop, seconds: float) -> Script[list[float]]:
    """The logged loss of each step while the same batch is repeated at the full learning rate."""
    loop.schedule = lambda step, steps: min(1.0, (step + 1) / WARMUP)
    start, losses = time.perf_counter(), list[float]()
    while len(losses) < 2 * LEAST or (len(losses) < OVERFIT and time.perf_counter() - start < seconds):
        yield
        losses.append(loop.report[loop.recipe.monitor])
    return losses


# ------------------------------------------------------------------------------------------------------- their parts


@torch.no_grad()
def measure_latents(loop: Loop, seconds: float) -> Values | None:
    """The values of the first samples' latents; None if no denoiser learns from latents."""
    data, parts, start = loop.recipe.data, list[Tensor](), time.perf_counter()
    order = Order(len(data), data.batch_size, loop.recipe.seed, data.buckets, data.groups)
    sample_ids = order.batch(0)[:LATENTS]
    piece = min(PIECE, data.batch_size // loop.settings.accumulate)
    for first in range(0, len(sample_ids), piece):
        with precision_of_training(loop):
            z = loop.recipe.latents(fetch(loop, sample_ids[first : first + piece]))  # (B, C, h, w)
        if z is None:
            return None
        parts.append(z.double().cpu())
        if time.perf_counter() - start > seconds:
            break
    z = torch.cat(parts)
    return Values(len(z), z.min().item(), z.max().item(), z.mean().item(), z.std().item())


def check_memory(needs: Memory, settings: TrainerSettings, available: int) -> None:
    """Refuse a step that does not fit into memory."""
    need, activations = (count * processes_per_memory(settings) / 1e9 for count in (needs.total, needs.activations))
    if need * 1e9 > available:
        got = f"about {need:.2f} GB, {activations:.2f} of it activations"
        hint = "a larger trainer.accumulate, a smaller data.batch_size or data.resolution"
        raise InputError("memory: a step does not fit", "", got, f"at most {available / 1e9:.2f} GB", hint)


def processes_per_memory(settings: TrainerSettings) -> int:
    """How many processes share one memory."""
    return 1 if settings.on_gpu else settings.devices_per_node


def clocked(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def state_of(loop: Loop) -> State:
    """Copies of everything that a checkpoint holds, and the counters."""
    counters = {name: torch.tensor(value) for name, value in asdict(loop.counters).items()}
    return counters | {name: x.detach().to("cpu", copy=True) for name, x in checkpointing.tensors_of(loop).items()}


def timed(loop: Loop, seconds: float) -> Script[float]:
    """Seconds of a step at the loop's current phase, once the loader's queue is in its steady state."""
    step, warm = loop.counters.step, WARM + 2 * loop.recipe.data.workers // loop.settings.accumulate
    for least, most, share in ((1, warm, seconds / 3), (LEAST, TIMED, seconds * 2 / 3)):
        start, count = time.perf_counter(), 0
        while count < least or (count < most and time.perf_counter() - start < share):
            yield
            loop.counters.step = step
            count += 1
    return (time.perf_counter() - start) / count
