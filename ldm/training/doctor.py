"""What a training will cost and whether it can work, found out before hours are spent."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.config.schema import Config
from ldm.data.loader import loader
from ldm.errors import CheckpointError, DataError, InputError, LdmError
from ldm.pictures import to_float
from ldm.training.caption_report import Told
from ldm.training.loop import Stage
from ldm.training.run import existing
from ldm.training.trainer import Plan
from ldm.training.trial import LEARNED, LEAST, State, Trial, Values, follow, learned, resumed, together, trial

LOOKED_AT = 320  # samples
FLAT = 0.02  # a channel's standard deviation, where pictures go from -1 to 1
ENOUGH = 1.1  # of what training takes, what a loader should make that has a processor for itself
FEW = 0.1  # of the captions, as many as are dropped on purpose
NEAR, NARROW, WIDE = 0.3, 0.7, 1.4  # of latents: how far their mean may be from 0, and their deviation from 1
FALL = 0.8  # the part of the loss that is left at most when one batch has been learned by heart
ROOM = 0.9  # of the memory


class Verdict(NamedTuple):
    """A line in plain words; an error has the exit status that training would end with."""

    kind: Literal["ok", "warning", "error"]
    text: str
    code: int = 0


@dataclass
class Survey:
    """What samples are like, and how fast they come when nothing else is done."""

    samples: int
    sizes: list[tuple[int, int]]
    counts: dict[str, int]  # of a source that was scanned: seen, used, skipped, filtered
    looked_at: int
    least: float  # as the networks see it
    most: float
    mean: list[float]  # by channel
    std: list[float]
    captions: int
    empty: int
    words: list[float]  # least, median and most of the captions that are not empty
    images_per_second: float
    told: Told | None = None  # of the captions, where there is a condition


@dataclass
class Report:
    """All that was found; what could not be tried is None or empty."""

    plan: Plan
    batch_size: int
    survey: Survey | None = None
    trial: Trial | None = None
    losses: list[float] = field(default_factory=list)  # of one batch that comes again and again
    disk: int = 0  # bytes of what is kept, and of the next checkpoint
    free: int = 0
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of the whole plan, with its validations and checkpoints."""
        assert self.trial
        steps, plan = sum(phase.steps * phase.seconds for phase in self.trial.phases), self.plan
        validations, checkpoints = -(-plan.steps // plan.validate_every), -(-plan.steps // plan.save_every)
        return steps + validations * self.trial.validation_seconds + checkpoints * self.trial.checkpoint_seconds

    @property
    def images_per_second(self) -> float:
        """Of all processes, over the whole plan."""
        return self.plan.steps * self.batch_size / self.seconds

    @contextmanager
    def check(self) -> Iterator[None]:
        """One thing to find out; an error that is written for people is its verdict."""
        try:
            yield
        except LdmError as error:
            self.verdicts.append(Verdict("error", str(error), error.code))
        except torch.OutOfMemoryError as error:
            self.verdicts.append(self.too_large(str(error).splitlines()[0]))

    def too_large(self, said: str) -> Verdict:
        """What it means that a GPU had no room: where weights are to be sharded, one process alone proves little."""
        if self.plan.strategy == "fsdp2" and self.plan.ranks > 1:
            text = "memory: one process with all weights has no room, and what shards need was not tried"
            return Verdict("warning", f"{text}; {said}")
        hint = "try a larger trainer.accumulate, a smaller data.batch_size or data.resolution"
        return Verdict("error", f"memory: the GPU has no room for a step; {said}; {hint}", 2)

    def say(self, text: str, good: bool = True, why: str = "") -> None:
        """That something is well, or a warning and why."""
        self.verdicts.append(Verdict("ok", text) if good else Verdict("warning", f"{text}; {why}"))


def examine(config: Config, build: Callable[[Config], Stage], run: Path, scratch: Path, minutes: float) -> Report:
    """Try one process of a training out, in an empty folder and within about so many minutes."""
    whole, seconds = build(config), 60 * minutes
    plan, data = whole.plan, whole.data
    report = Report(plan, data.batch_size)
    if plan.ranks > 1:
        share = f"data.batch_size={data.batch_size // plan.ranks}"
        config = config.amended([share, "trainer.devices=1", "trainer.nodes=1"])
    with report.check():
        report.survey = survey(whole, seconds / 10)
        look_at_data(report, report.survey)
        look_at_captions(report, report.survey)
    if report.survey:
        try_out(report, partial(build, config), run, scratch, seconds)
    return report


def try_out(report: Report, build: Callable[[], Stage], run: Path, scratch: Path, seconds: float) -> None:
    """The trials, each of a stage that nothing has happened to."""
    plan = report.plan
    with report.check():
        report.trial, state = follow(build(), partial(trial, plan=plan, folder=scratch, seconds=seconds / 2))
    if report.trial is None:
        return
    if report.trial.latents:
        look_at_latents(report, report.trial.latents)
    with report.check():
        look_at_costs(report, report.trial)
    with report.check():
        look_at_disk(report, report.trial, run)
    with report.check():
        look_at_resume(report, state, follow(build(), partial(resumed, folder=scratch)))
    with report.check():
        stage = build()
        report.losses = follow(stage, partial(learned, seconds=seconds / 3), first_batch(stage))
        look_at_losses(report, stage.telling)


def first_batch(stage: Stage) -> Iterator[dict[str, Any]]:
    """The micro-batches of the first batch, again and again."""
    parts = stage.plan.accumulate
    return cycle(list(islice(loader(stage.data, stage.seed, accumulate=parts), parts)))


def survey(stage: Stage, seconds: float) -> Survey:
    """Look at some hundred samples as the loader of one process makes them."""
    data, plan = stage.data, stage.plan
    batches = iter(loader(data, stage.seed, ranks=plan.ranks, accumulate=plan.accumulate))
    queue = max(1, 2 * data.workers)  # what the workers have ready when they need not wait
    for _ in range(queue):
        next(batches)
    begun, count, parts, captions = time.perf_counter(), 0, list[Tensor](), list[str]()
    while not parts or (time.perf_counter() - begun < seconds and (count < LOOKED_AT or len(parts) < queue)):
        batch = next(batches)
        x = to_float(batch["image"]) if "image" in batch else batch["latents"]  # (B, C, H, W)
        count += len(x)
        each = (x.mean((0, 2, 3)), x.square().mean((0, 2, 3)), x.amin((0, 2, 3)), x.amax((0, 2, 3)))
        parts.append(torch.stack(each))
        captions += batch.get("caption", [])
    speed = count / (time.perf_counter() - begun)
    mean, square, least, most = torch.stack(parts).unbind(1)  # (batches, C) each
    std = (square.mean(0) - mean.mean(0).square()).clamp(min=0).sqrt()
    words = [float(len(caption.split())) for caption in captions if caption.strip()]
    return Survey(
        samples=len(data),
        sizes=list(data.sizes),
        counts=getattr(data, "counts", {}),
        looked_at=count,
        least=least.min().item(),
        most=most.max().item(),
        mean=mean.mean(0).tolist(),
        std=std.tolist(),
        captions=len(captions),
        empty=len(captions) - len(words),
        words=[min(words), statistics.median(words), max(words)] if words else [],
        images_per_second=speed,
        told=stage.told(captions),
    )


# ----------------------------------------------------------------------------------------------------- the verdicts


def look_at_data(report: Report, found: Survey) -> None:
    """Finite numbers, some contrast, and few left out."""
    if not torch.tensor(found.std).isfinite().all():
        raise DataError("data: not all values are finite", "", f"standard deviations {found.std}", "numbers")
    flat = [str(channel) for channel, std in enumerate(found.std) if std < FLAT]
    text = f"data: values from {found.least:.2f} to {found.most:.2f}"
    report.say(text, not flat, f"channel {', '.join(flat)} hardly varies: are these the pictures that you mean?")
    if found.counts.get("skipped"):
        text = f"data: {found.counts['skipped']} of {found.counts['seen']} samples are skipped"
        report.say(text, False, "skipped.jsonl beside their manifest names each")


def look_at_captions(report: Report, found: Survey) -> None:
    """Few are missing, few are longer than what is read of them, and some are dropped where guidance needs it."""
    if (told := found.told) is None:
        return
    if told.room and found.captions:
        text = f"captions: {found.empty} of {found.captions} are empty, {told.longer} longer than {told.room} tokens"
        why = "who has none teaches nothing of the words, and the ends of long ones are not read"
        report.say(text, max(found.empty, told.longer) <= FEW * found.captions, why)
    if told.drops:
        rates = ", ".join(f"{part} of {rate:.0%} of samples" for part, rate in told.drops.items())
        why = "guidance needs what was trained without a condition too: try conditioner.drop=0.1, or guidance.cfg=1"
        report.say(f"dropped: {rates}", any(told.drops.values()) or not told.guided, why)


def look_at_latents(report: Report, found: Values) -> None:
    """About N(0, 1), as paths and predictions take them to be."""
    text = f"latents: mean {found.mean:.2f}, deviation {found.std:.2f}"
    good = abs(found.mean) < NEAR and NARROW < found.std < WIDE
    report.say(text, good, "they should be near 0 and 1: was this first stage trained on pictures like these?")


def look_at_costs(report: Report, found: Trial) -> None:
    """Room in memory, and a loader that keeps up."""
    used = found.peak * together(report.plan)
    text = f"memory: {used / 1e9:.1f} of {found.memory / 1e9:.1f} GB"
    report.say(text, used < ROOM * found.memory, "little is left: try a larger trainer.accumulate")
    if report.survey:
        made, taken = report.survey.images_per_second, report.images_per_second / report.plan.ranks
        text = f"loader: {made:.0f} images/s alone, {taken:.0f} are trained on"
        report.say(text, made > ENOUGH * taken, "training waits for it: try more data.workers, or smaller files")


def look_at_disk(report: Report, found: Trial, run: Path) -> None:
    """Room for the checkpoints that are kept, the next one, and the model beside its successor."""
    count = report.plan.keep + 1
    report.disk = count * found.checkpoint_bytes + 2 * found.model_bytes
    place = existing(run)
    report.free = shutil.disk_usage(place).free
    need, free = f"{report.disk / 1e9:.2f} GB for {count} checkpoints", f"{report.free / 1e9:.2f} GB free"
    if report.free < report.disk:
        hint = "another --run, or a smaller trainer.keep"
        raise InputError("disk: too small for the checkpoints", str(place), free, need, hint)
    report.say(f"disk: {need}, {free}")


def look_at_resume(report: Report, straight: State, again: State) -> None:
    """The same step from a checkpoint as without one."""
    different = [name for name, x in straight.items() if not torch.equal(x, again[name])]
    if different and not report.plan.on_gpu:
        got = f"{len(different)} tensors differ, such as {different[0]}"
        raise CheckpointError("resume: a step from a checkpoint is another one", "", got, "the same, bit for bit")
    text = "resume: a step from a checkpoint is the one that would have come, bit for bit"
    text += f", but for {len(different)} of {len(straight)} tensors" * bool(different)
    report.say(text, not different, "a GPU may add in another order each time")


def look_at_losses(report: Report, name: str) -> None:
    """A model that can learn learns one batch by heart."""
    first, last = (statistics.mean(part) for part in (report.losses[:LEAST], report.losses[-LEAST:]))
    text = f"one batch: {name} from {first:.4g} to {last:.4g} in {len(report.losses)} steps"
    why = "it should fall by a fifth at least: the learning rate is too low or too high, or something is not connected"
    report.say(text, last < FALL * first, why if len(report.losses) >= LEARNED // 2 else "so few steps prove nothing")
