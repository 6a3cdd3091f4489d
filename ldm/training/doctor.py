"""What a training will cost and whether it can work, found in a few minutes before hours are spent."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.config.schema import Config
from ldm.errors import CheckpointError, DataError, InputError, LdmError
from ldm.pictures import to_float
from ldm.training.loop import Loop
from ldm.training.recipe import CaptionReport
from ldm.training.run import existing
from ldm.training.trainer import TrainerSettings
from ldm.training.trial import (
    LEAST,
    OVERFIT,
    State,
    Trial,
    Values,
    first_batch,
    follow,
    overfit,
    processes_per_memory,
    resume,
    trial,
)

SAMPLES = 320  # that are looked at
FLAT = 0.02  # a channel's standard deviation, for pictures in [-1, 1]
MARGIN = 1.1  # of the loader's speed over the training's
FEW = 0.1  # of the captions, as many as are dropped on purpose
NEAR, NARROW, WIDE = 0.3, 0.7, 1.4  # of latents: limits of their mean and standard deviation
FALL = 0.8  # the share of the loss that is left at most after overfitting one batch
ROOM = 0.9  # of the memory


class Finding(NamedTuple):
    """A line in plain words; an error has the exit status that training would end with."""

    kind: Literal["ok", "warning", "error"]
    text: str
    code: int = 0


@dataclass
class Survey:
    """What samples are like, and how fast the loader makes them."""

    samples: int
    sizes: list[tuple[int, int]]
    counts: dict[str, int]  # of a scanned source: seen, used, skipped, filtered
    looked_at: int
    least: float  # as the networks see it
    most: float
    mean: list[float]  # by channel
    std: list[float]
    captions: int
    empty: int
    words: list[float]  # least, median and most of the captions that are not empty
    images_per_second: float
    caption_report: CaptionReport | None = None  # if there is a condition


@dataclass
class Report:
    """All findings; what could not be tried is None or empty."""

    settings: TrainerSettings
    batch_size: int
    survey: Survey | None = None
    trial: Trial | None = None
    losses: list[float] = field(default_factory=list)  # of one batch that is repeated
    disk: int = 0  # bytes of the checkpoints that are kept, and of the next one
    free: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        assert self.trial
        steps, settings = sum(phase.steps * phase.seconds for phase in self.trial.phases), self.settings
        validations, checkpoints = (
            -(-settings.steps // settings.validate_every),
            -(-settings.steps // settings.save_every),
        )
        return steps + validations * self.trial.validation_seconds + checkpoints * self.trial.checkpoint_seconds

    @property
    def images_per_second(self) -> float:
        return self.settings.steps * self.batch_size / self.seconds

    @contextmanager
    def check(self) -> Iterator[None]:
        """One check; an error for people becomes a finding."""
        try:
            yield
        except LdmError as error:
            self.findings.append(Finding("error", str(error), error.code))
        except torch.OutOfMemoryError as error:
            self.findings.append(self.out_of_memory(str(error).splitlines()[0]))

    def out_of_memory(self, message: str) -> Finding:
        """What it means that a GPU is too small: with sharded weights, one process alone proves little."""
        if self.settings.strategy == "fsdp2" and self.settings.ranks > 1:
            text = "memory: the weights do not fit in one process; sharding was not tried"
            return Finding("warning", f"{text}; {message}")
        hint = "try a larger trainer.accumulate, a smaller data.batch_size or data.resolution"
        return Finding("error", f"memory: a step does not fit on the GPU; {message}; {hint}", 2)

    def add(self, text: str, good: bool = True, why: str = "") -> None:
        """Add a finding: ok, or a warning with its reason."""
        self.findings.append(Finding("ok", text) if good else Finding("warning", f"{text}; {why}"))


def examine(config: Config, build: Callable[[Config], Loop], run: Path, scratch: Path, minutes: float) -> Report:
    """Try one process of a training in an empty folder, in about this many minutes."""
    loop, seconds = build(config), 60 * minutes
    settings, batch_size = loop.settings, loop.recipe.data.batch_size
    report = Report(settings, batch_size)
    if settings.ranks > 1:
        share = f"data.batch_size={batch_size // settings.ranks}"
        config = config.amended([share, "trainer.devices=1", "trainer.nodes=1"])
    with report.check():
        report.survey = survey(loop, seconds / 10)
        check_data(report, report.survey)
        check_captions(report, report.survey)
    if report.survey:
        try_out(report, partial(build, config), run, scratch, seconds)
    return report


def try_out(report: Report, build: Callable[[], Loop], run: Path, scratch: Path, seconds: float) -> None:
    """The trials, each with a fresh loop."""
    with report.check():
        script = partial(trial, settings=report.settings, folder=scratch, seconds=seconds / 2)
        report.trial, state = follow(build(), script)
    if report.trial is None:
        return
    if report.trial.latents:
        check_latents(report, report.trial.latents)
    with report.check():
        check_costs(report, report.trial)
    with report.check():
        check_disk(report, report.trial, run)
    with report.check():
        check_resume(report, state, follow(build(), partial(resume, folder=scratch)))
    with report.check():
        loop = build()
        report.losses = follow(loop, partial(overfit, seconds=seconds / 3), first_batch(loop))
        check_losses(report, loop.recipe.monitor)


def survey(loop: Loop, seconds: float) -> Survey:
    """Look at some hundred samples as the loader of one process makes them."""
    recipe, settings = loop.recipe, loop.settings
    data, parts, captions, count = recipe.data, list[Tensor](), list[str](), 0
    batches = iter(recipe.stream(0, settings.accumulate * settings.ranks))
    queue = max(1, 2 * data.workers)  # batches that the workers have ready
    for _ in range(queue):
        next(batches)
    start = time.perf_counter()
    while not parts or (time.perf_counter() - start < seconds and (count < SAMPLES or len(parts) < queue)):
        batch = next(batches)
        x = to_float(batch["image"]) if "image" in batch else batch["latents"]  # (B, C, H, W)
        count += len(x)
        parts.append(torch.stack((x.mean((0, 2, 3)), x.square().mean((0, 2, 3)), x.amin((0, 2, 3)), x.amax((0, 2, 3)))))
        captions += batch.get("caption", [])
    speed = count / (time.perf_counter() - start)
    mean, square, least, most = torch.stack(parts).unbind(1)  # (batches, C) each
    words = [float(len(caption.split())) for caption in captions if caption.strip()]
    return Survey(
        samples=len(data),
        sizes=list(data.sizes),
        counts=getattr(data, "counts", {}),
        looked_at=count,
        least=least.min().item(),
        most=most.max().item(),
        mean=mean.mean(0).tolist(),
        std=(square.mean(0) - mean.mean(0).square()).clamp(min=0).sqrt().tolist(),
        captions=len(captions),
        empty=len(captions) - len(words),
        words=[min(words), statistics.median(words), max(words)] if words else [],
        images_per_second=speed,
        caption_report=recipe.caption_report(captions),
    )


# ------------------------------------------------------------------------------------------------------- the checks


def check_data(report: Report, found: Survey) -> None:
    """Values are finite and vary, and few samples are skipped."""
    if not torch.tensor(found.std).isfinite().all():
        raise DataError("data: not all values are finite", "", f"standard deviations {found.std}", "finite numbers")
    flat = [str(channel) for channel, std in enumerate(found.std) if std < FLAT]
    text = f"data: values from {found.least:.2f} to {found.most:.2f}"
    report.add(text, not flat, f"channel {', '.join(flat)} is almost constant; check the pictures")
    if found.counts.get("skipped"):
        text = f"data: {found.counts['skipped']} of {found.counts['seen']} samples are skipped"
        report.add(text, False, "skipped.jsonl beside their manifest lists them")


def check_captions(report: Report, found: Survey) -> None:
    """Few captions are missing or truncated, and some are dropped if guidance needs it."""
    if (captions := found.caption_report) is None:
        return
    if captions.max_tokens and found.captions:
        text = f"captions: {found.empty} of {found.captions} are empty, {captions.truncated} longer than "
        text += f"{captions.max_tokens} tokens"
        why = "empty captions teach nothing; long ones are truncated"
        report.add(text, max(found.empty, captions.truncated) <= FEW * found.captions, why)
    if captions.drops:
        rates = ", ".join(f"{part} of {rate:.0%} of samples" for part, rate in captions.drops.items())
        why = "guidance needs samples without a condition: try conditioner.drop=0.1, or guidance.cfg=1"
        report.add(f"dropped: {rates}", any(captions.drops.values()) or not captions.guided, why)


def check_latents(report: Report, found: Values) -> None:
    """Latents are about N(0, 1), as paths and predictions assume."""
    text = f"latents: mean {found.mean:.2f}, standard deviation {found.std:.2f}"
    good = abs(found.mean) < NEAR and NARROW < found.std < WIDE
    report.add(text, good, "they should be near 0 and 1: was this first stage trained on similar pictures?")


def check_costs(report: Report, found: Trial) -> None:
    """A step fits into memory, and the loader is fast enough."""
    used = found.peak * processes_per_memory(report.settings)
    text = f"memory: {used / 1e9:.1f} of {found.memory / 1e9:.1f} GB"
    report.add(text, used < ROOM * found.memory, "little is left: try a larger trainer.accumulate")
    if report.survey:
        made, trained = report.survey.images_per_second, report.images_per_second / report.settings.ranks
        text = f"loader: {made:.0f} images/s, training needs {trained:.0f}"
        report.add(text, made > MARGIN * trained, "training waits for it; try more data.workers or smaller files")


def check_disk(report: Report, found: Trial, run: Path) -> None:
    """The disk has room for the checkpoints that are kept, the next one, and two models."""
    count, folder = report.settings.keep + 1, existing(run)
    report.disk, report.free = count * found.checkpoint_bytes + 2 * found.model_bytes, shutil.disk_usage(folder).free
    need, free = f"{report.disk / 1e9:.2f} GB for {count} checkpoints", f"{report.free / 1e9:.2f} GB free"
    if report.free < report.disk:
        hint = "another --run, or a smaller trainer.keep"
        raise InputError("disk: too small for the checkpoints", str(folder), free, need, hint)
    report.add(f"disk: {need}, {free}")


def check_resume(report: Report, straight: State, resumed: State) -> None:
    """A step after a checkpoint is the same as without the checkpoint."""
    different = [name for name, x in straight.items() if not torch.equal(x, resumed[name])]
    if different and not report.settings.on_gpu:
        got = f"{len(different)} tensors differ, such as {different[0]}"
        raise CheckpointError("resume: a step from a checkpoint is different", "", got, "the same, bit for bit")
    text = "resume: a step from a checkpoint is the same, bit for bit"
    text += f", except {len(different)} of {len(straight)} tensors" * bool(different)
    report.add(text, not different, "sums on a GPU are not deterministic")


def check_losses(report: Report, name: str) -> None:
    """A model that can learn overfits one batch."""
    first, last = (statistics.mean(part) for part in (report.losses[:LEAST], report.losses[-LEAST:]))
    text = f"one batch: {name} from {first:.4g} to {last:.4g} in {len(report.losses)} steps"
    why = "it should fall by at least a fifth: the learning rate is too low or too high, or a part gets no gradient"
    few = "too few steps to tell"
    report.add(text, last < FALL * first, why if len(report.losses) >= OVERFIT // 2 else few)
