"""Check in minutes what a training run will cost, whether it can work, and what would stop it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ldm.cli import config_options, train
from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.config.schema import Config
    from ldm.training.doctor import Report
    from ldm.training.loop import Loop

Rows = Iterator[tuple[str, str]]
STAGES = {1: "autoencoder", 2: "diffusion"}


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser, words="CONFIG|key=value")
    help = "the stage to check, if both have a configuration of this name (default 1)"
    parser.add_argument("--stage", type=int, choices=STAGES, help=help)
    parser.add_argument("--run", metavar="DIR", help="run folder (default: as for training)")
    parser.add_argument("--init-from", metavar="CKPT", help="start from the weights of this checkpoint")
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long this may take (default 5)")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Try it out and print the findings; the exit status is the first error's."""
    plan = read_plan(arguments)
    config = plan.load()[0]
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    if not arguments.minutes > 0:
        raise InputError("out of range", "--minutes", str(arguments.minutes), "more than 0")
    from ldm.training import doctor  # Lightning is slow to import

    print(f"trying {plan.file} ({plan.recipe}) for about {arguments.minutes:g} minutes", file=sys.stderr)
    with TemporaryDirectory(prefix="ldm-doctor-") as scratch, removed_on_signal(Path(scratch)):
        folder = plan.run_folder(arguments.run)
        report = doctor.examine(config, builder(plan), folder, Path(scratch), arguments.minutes)
    print(json.dumps(as_json(report), indent=2) if arguments.json else as_text(report))
    return next((finding.code for finding in report.findings if finding.kind == "error"), 0)


def read_plan(arguments: argparse.Namespace) -> train.Plan:
    """The YAML, which may be the first word, and its recipe."""
    words = [word for word in arguments.overrides if "=" not in word]
    names = [*words, *filter(None, [arguments.config])]
    if len(names) != 1:
        expected = "one configuration: a YAML file, or the name of a shipped one"
        raise InputError(
            "exactly one configuration is needed", "command line", ", ".join(names) or "none", expected, "scenes"
        )
    arguments.config = names[0]
    arguments.overrides = [word for word in arguments.overrides if word not in words]
    if arguments.stage is None:
        return train.read_plan(arguments, None)
    plan = train.read_plan(arguments, STAGES[arguments.stage])
    if (found := train.recipe_of(plan.file, None)) != STAGES[arguments.stage]:
        raise InputError("--stage: this configuration trains another", str(plan.file), str(arguments.stage), found)
    return plan


def builder(plan: train.Plan) -> Callable[[Config], Loop]:
    """A function that builds a loop, each time with its own tensors: those of a checkpoint are trained in place."""
    from ldm.training import run
    from ldm.training.recipe import Start

    return lambda config: run.build(config, plan.load()[1], Start(plan.init_from))


@contextmanager
def removed_on_signal(folder: Path) -> Iterator[None]:
    """A signal removes the folder and ends the process: an exception may be lost inside torch."""

    def leave(number: int, frame: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- what is printed


def as_json(report: Report) -> dict[str, object]:
    """All numbers and findings."""
    found = asdict(report) | {"findings": [finding._asdict() for finding in report.findings]}
    if report.trial:
        found |= {"seconds": report.seconds, "images_per_second": report.images_per_second}
    return found


def as_text(report: Report) -> str:
    """Aligned lines, the findings last."""
    settings = report.settings
    rows = [("plan", f"{settings.steps} steps of {report.batch_size} images on {settings.hardware}")]
    rows += [*data_rows(report), *cost_rows(report)]
    lines = [f"{label:12}{text}" for label, text in rows]
    return "\n".join([*lines, "", *(f"{finding.kind:12}{finding.text}" for finding in report.findings)])


def data_rows(report: Report) -> Rows:
    """The samples, their captions, and the loader's speed."""
    found = report.survey
    if found is None:
        return
    (height, width), more = found.sizes[0], len(found.sizes) - 1
    scanned = "".join(f", {count} {what}" for what, count in found.counts.items())
    yield "data", f"{found.samples} samples{scanned}; {height}x{width}" + f" and {more} other sizes" * (more > 0)
    mean, std = (" ".join(f"{x:.2f}" for x in numbers) for numbers in (found.mean, found.std))
    values = f"{found.least:.2f} to {found.most:.2f}, mean {mean}, standard deviation {std}"
    yield "", f"{found.looked_at} samples: {values}"
    words = "no words"
    if found.words:
        words = f"{found.words[0]:g} to {found.words[2]:g} words, median {found.words[1]:g}"
    yield "captions", f"{found.captions - found.empty} of {found.captions}: {words}" if found.captions else "none"
    if (captions := found.caption_report) and captions.max_tokens and found.captions:
        yield "", f"{captions.truncated} are truncated to {captions.max_tokens} tokens"
    if captions and captions.drops:
        yield "dropped", ", ".join(f"{part} {rate:.0%}" for part, rate in captions.drops.items()) + " of samples"
    yield "loader", f"{found.images_per_second:.1f} images/s per process, without training"


def cost_rows(report: Report) -> Rows:
    """Memory, time and disk."""
    found, settings = report.trial, report.settings
    if found is None:
        return
    if z := found.latents:
        values = f"{z.least:.2f} to {z.most:.2f}, mean {z.mean:.3f}, standard deviation {z.std:.3f}"
        yield "latents", f"{z.samples} samples: {values}"
    parts = ", ".join(f"{name} {amount(count)}" for name, count in vars(found.needs).items())
    yield "memory", f"{amount(found.needs.total)} per process: {parts}"
    yield "", f"peak {amount(found.peak)} in real steps ({amount(found.before)} before them)"
    images = report.batch_size / settings.ranks
    for phase in found.phases:
        speed = f"{images / phase.seconds:.1f} images/s, {phase.seconds:.3g} s per step"
        yield "steps", f"{phase.steps} from {phase.first} ({phase.name}): {speed}, per process"
        step, image = phase.flops / 1e12, phase.flops / images / 1e9
        yield "", f"{image:.4g} GFLOP per image, {step:.3g} TFLOP per step: {step / phase.seconds:.3g} TFLOP/s"
    yield "validation", f"{found.validation_seconds:.1f} s every {settings.validate_every} steps"
    yield "checkpoint", f"{found.checkpoint_seconds:.1f} s every {settings.save_every} steps"
    hours = report.seconds / 3600
    yield "time", f"{hours:.2f} hours, {hours / 24:.2f} days: {report.images_per_second:.1f} images/s in all"
    yield "disk", f"{amount(found.checkpoint_bytes)} a checkpoint, {amount(found.model_bytes)} the model"


def amount(count: int) -> str:
    """Bytes in a suitable unit."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
