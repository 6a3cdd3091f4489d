"""Trials of a training in its own loop: phases timed, a checkpoint resumed, one batch learned by heart."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor

from ldm.data.sampler import Order
from ldm.errors import InputError
from ldm.training import checkpointing
from ldm.training.checkpointing import COUNTERS, MODEL
from ldm.training.loop import Stage
from ldm.training.needs import Needs, fetched, flops_of, machine_memory, needs_of, peak, precisely
from ldm.training.trainer import Plan

T = TypeVar("T")
State = dict[str, Tensor]
Course = Generator[None, None, T]  # each `yield` is a step of the training
WARM, LEAST, TIMED, LEARNED = 4, 3, 24, 60  # steps
LATENTS, PIECE = 64, 8  # samples: whose latents are looked at, and as many of them at once
RISE = 10  # steps: a schedule's own warm-up may be longer than a trial


class Values(NamedTuple):
    """Of so many samples' latents: least, most, mean and standard deviation."""

    samples: int
    least: float
    most: float
    mean: float
    std: float


@dataclass
class Phase:
    """Steps of one kind: which of the plan's, and what one costs a process."""

    name: str
    first: int
    steps: int
    flops: float
    seconds: float


@dataclass
class Trial:
    """What a few steps of a training cost one process."""

    needs: Needs
    memory: int  # bytes that the machine or its GPU has
    before: int  # of them, the most that this process had had before its first step
    peak: int  # and after real steps
    phases: list[Phase]
    validation_seconds: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    model_bytes: int
    latents: Values | None = None  # where they are what is learned from


class Between(Callback):
    """Follows a course through a training, which ends with it."""

    def __init__(self, course: Callable[[Stage], Course[Any]]):
        self.begin = course
        self.result: Any = None

    def on_fit_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """What comes before the data are asked for."""
        assert isinstance(stage, Stage)
        self.course = self.begin(stage)
        self.go_on(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """What comes after a step."""
        assert isinstance(stage, Stage)
        if stage.report:
            self.go_on(trainer)

    def go_on(self, trainer: pl.Trainer) -> None:
        """Up to the next step."""
        try:
            next(self.course)
        except StopIteration as end:
            self.result, trainer.should_stop = end.value, True


def follow(stage: Stage, course: Callable[[Stage], Course[T]], batches: Any = None) -> T:
    """Train along a course, on these batches if there are any; returns what it returns."""
    between = Between(course)
    stage.plan.trainer([between], stage.unused).fit(stage, batches)
    return between.result


# ------------------------------------------------------------------------------------------------------ the courses


def trial(stage: Stage, plan: Plan, folder: Path, seconds: float) -> Course[tuple[Trial, State]]:
    """Some steps of each phase, a validation, a checkpoint, and one step more: what they cost, and the last state.

    The stage is one of the plan's processes, and alone here.
    """
    kinds = stage.spans()
    stage.step = kinds[-1][1]  # of the phases the one that needs most
    needs, memory = needs_of(stage, plan.ranks), machine_memory(stage.device)
    check_memory(needs, plan, memory)
    latents = latents_of(stage, seconds / 6)
    before, phases = peak(stage.device), []
    for name, first, steps in kinds:
        stage.step = first
        flops = flops_of(stage) * stage.data.batch_size
        each = yield from timed(stage, seconds / len(kinds))
        phases.append(Phase(name, first, steps, flops, each))
    most = peak(stage.device)
    (folder / "samples").mkdir()
    found = Trial(
        needs=needs,
        memory=memory,
        before=before,
        peak=most,
        phases=phases,
        validation_seconds=clocked(lambda: stage.validate(folder / "samples")) / plan.ranks,  # which share it
        checkpoint_seconds=clocked(lambda: checkpointing.write(folder, stage)),
        checkpoint_bytes=sum(file.stat().st_size for file in folder.glob("checkpoints/*/*")),
        model_bytes=(folder / MODEL).stat().st_size,
        latents=latents,
    )
    yield
    return found, state_of(stage)


@torch.no_grad()
def latents_of(stage: Stage, seconds: float) -> Values | None:
    """Of the first samples, as many as this time allows; None where no denoiser learns from latents."""
    data, parts, begun = stage.data, list[Tensor](), time.perf_counter()
    sample_ids = Order(len(data), data.batch_size, stage.seed, data.buckets, data.groups).batch(0)[:LATENTS]
    piece = min(PIECE, data.batch_size // stage.plan.accumulate)
    for start in range(0, len(sample_ids), piece):
        with precisely(stage):
            z = stage.diffused(fetched(stage, sample_ids[start : start + piece]))  # (B, C, h, w)
        if z is None:
            return None
        parts.append(z.double().cpu())
        if time.perf_counter() - begun > seconds:
            break
    z = torch.cat(parts)
    return Values(len(z), z.min().item(), z.max().item(), z.mean().item(), z.std().item())


def check_memory(needs: Needs, plan: Plan, there: int) -> None:
    """Refuse a step that no machine like this one can take."""
    need, activations = (count * together(plan) / 1e9 for count in (needs.total, needs.activations))
    if need * 1e9 > there:
        got = f"about {need:.2f} GB, {activations:.2f} of it activations"
        hint = "a larger trainer.accumulate, a smaller data.batch_size or data.resolution"
        raise InputError("memory: a step needs more than there is", "", got, f"at most {there / 1e9:.2f} GB", hint)


def together(plan: Plan) -> int:
    """How many processes have one memory."""
    return 1 if plan.on_gpu else plan.devices_per_node


def clocked(work: Callable[[], Any]) -> float:
    """The seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def state_of(stage: Stage) -> State:
    """Copies of everything that a checkpoint holds, and the counters."""
    counters = {name: torch.tensor(getattr(stage, name)) for name in COUNTERS}
    return counters | {name: x.detach().to("cpu", copy=True) for name, x in checkpointing.tensors_of(stage).items()}


def timed(stage: Stage, seconds: float) -> Course[float]:
    """Seconds of a step at which this stage is held, once the loader's queue is what it will be."""
    held, warm = stage.step, WARM + 2 * stage.data.workers // stage.plan.accumulate
    for least, most, share in ((1, warm, seconds / 3), (LEAST, TIMED, seconds * 2 / 3)):
        begun, count = time.perf_counter(), 0
        while count < least or (count < most and time.perf_counter() - begun < share):
            yield
            stage.step = held
            count += 1
    return (time.perf_counter() - begun) / count


def resumed(stage: Stage, folder: Path) -> Course[State]:
    """The state one step after the newest checkpoint."""
    found = checkpointing.newest(folder)
    assert found
    checkpointing.restore(*found, stage)
    yield
    return state_of(stage)


def learned(stage: Stage, seconds: float) -> Course[list[float]]:
    """What is logged of each step while the same batch comes again and again, at the full learning rate."""
    stage.schedule = lambda step, steps: min(1.0, (step + 1) / RISE)
    begun, losses = time.perf_counter(), list[float]()
    while len(losses) < 2 * LEAST or (len(losses) < LEARNED and time.perf_counter() - begun < seconds):
        yield
        losses.append(stage.report[stage.telling])
    return losses
