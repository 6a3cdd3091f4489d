"""Say before hours are spent what a training will cost, whether it can work, and what stands in its way."""

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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ldm.cli import config_file, config_options, own_parts
from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint
    from ldm.config.schema import Config
    from ldm.training.doctor import Report
    from ldm.training.loop import Stage

Rows = Iterator[tuple[str, str]]
FOLDERS = {1: "autoencoder", 2: "ldm"}  # of the shipped configurations, by stage
ENDINGS = {1: "", 2: "_ldm"}  # of a run directory's name, as the training commands have them


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser)
    stages = "of a name that both stages have, which one is meant (default 1)"
    parser.add_argument("--stage", type=int, choices=FOLDERS, help=stages)
    parser.add_argument("--run", metavar="DIR", help="where the run will be (default as for training)")
    parser.add_argument("--init-from", metavar="CKPT", help="begin with the weights of this checkpoint")
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long this may take (default 5)")
    parser.add_argument("--json", action="store_true", help="print all that was found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Try it out, and print what was found; the exit status is the first error's."""
    own_parts(arguments)
    name, overrides = named(arguments)
    file, stage = which(name, arguments.stage)
    config = load(stage, file, overrides)[0]
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    if not arguments.minutes > 0:
        raise InputError("out of range", "--minutes", str(arguments.minutes), "more than 0")
    from ldm.training import doctor  # Lightning is only paid for once the configuration is right

    folder = Path(arguments.run or f"runs/{file.stem}{ENDINGS[stage]}").expanduser()
    print(f"trying {file} (stage {stage}) for about {arguments.minutes:g} minutes", file=sys.stderr)
    build = builder(stage, file, overrides, arguments.init_from)
    with TemporaryDirectory(prefix="ldm-doctor-") as scratch, signals_clear(Path(scratch)):
        report = doctor.examine(config, build, folder, Path(scratch), arguments.minutes)
    print(json.dumps(as_json(report), indent=2) if arguments.json else as_text(report))
    return next((verdict.code for verdict in report.verdicts if verdict.kind == "error"), 0)


def named(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The configuration, which may be the first word, and the overrides."""
    words = [word for word in arguments.overrides if "=" not in word]
    names = [*words, *filter(None, [arguments.config])]
    if len(names) != 1:
        expected = "one configuration: a YAML file, or the name of a shipped one"
        raise InputError("which configuration?", "command line", ", ".join(names) or "none", expected, "scenes")
    return names[0], [word for word in arguments.overrides if word not in words]


def which(name: str, stage: int | None) -> tuple[Path, int]:
    """The configuration's file and which stage it trains: what has a backbone trains the second."""

    from ldm.config import files

    folders = FOLDERS.values() if stage is None else [FOLDERS[stage]]
    file = config_file(name, *folders)
    found = 2 if "backbone" in files.read(file, []).values else 1
    if stage not in (None, found):
        raise InputError("--stage: the configuration is of the other one", str(file), str(stage), str(found))
    return file, found


def load(stage: int, file: Path, overrides: list[str]) -> tuple[Config, dict[str, Checkpoint]]:
    """The checked configuration, and the checkpoints that it names."""
    from ldm import assemble
    from ldm.config import schema

    if stage == 1:
        return schema.load(file, overrides, assemble.AutoencoderSchema), {}
    return assemble.load(file, overrides, assemble.DiffusionSchema)


def builder(stage: int, file: Path, overrides: list[str], init_from: str | None) -> Callable[[Config], Stage]:
    """What builds a stage; each with tensors of its own, for those of an opened checkpoint are trained in place."""
    from ldm.training.recipes import autoencoder, diffusion

    if stage == 1:
        return partial(autoencoder.build, init_from=init_from)

    def build(config: Config) -> Stage:
        return diffusion.build(config, load(stage, file, overrides)[1], init_from)

    return build


@contextmanager
def signals_clear(folder: Path) -> Iterator[None]:
    """A signal removes the folder and ends the process: an exception may be lost where Python runs within torch."""

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
    """Every number, and the verdicts."""
    found = asdict(report) | {"verdicts": [verdict._asdict() for verdict in report.verdicts]}
    if report.trial:
        found |= {"seconds": report.seconds, "images_per_second": report.images_per_second}
    return found


def as_text(report: Report) -> str:
    """Aligned lines, the verdicts last."""
    rows = [*plan_rows(report), *data_rows(report), *cost_rows(report)]
    lines = [f"{label:12}{text}" for label, text in rows]
    return "\n".join([*lines, "", *(f"{verdict.kind:12}{verdict.text}" for verdict in report.verdicts)])


def plan_rows(report: Report) -> Rows:
    plan = report.plan
    where = f"{plan.ranks} {'GPU' if plan.on_gpu else 'CPU'} process{'es' * (plan.ranks > 1)}, {plan.precision}"
    yield "plan", f"{plan.steps} steps of {report.batch_size} images on {where}"


def data_rows(report: Report) -> Rows:
    found = report.survey
    if found is None:
        return
    (height, width), more = found.sizes[0], len(found.sizes) - 1
    scanned = "".join(f", {count} {what}" for what, count in found.counts.items())
    yield "data", f"{found.samples} samples{scanned}; {height}x{width}" + f" and {more} other sizes" * (more > 0)
    mean, std = (" ".join(f"{x:.2f}" for x in numbers) for numbers in (found.mean, found.std))
    yield "", f"{found.looked_at} looked at: {found.least:.2f} to {found.most:.2f}, mean {mean}, deviation {std}"
    if found.captions:
        words = (
            "{:g} to {:g} words, half of them {:g} or less".format(*(found.words[i] for i in (0, 2, 1)))
            if found.words
            else "no words"
        )
        yield "captions", f"{found.captions - found.empty} of {found.captions} are there: {words}"
    else:
        yield "captions", "none"
    if found.told and found.told.room and found.captions:
        yield "", f"{found.told.longer} are longer than the {found.told.room} tokens that are read of each"
    if found.told and found.told.drops:
        rates = ", ".join(f"{part} {rate:.0%}" for part, rate in found.told.drops.items())
        yield "dropped", f"{rates} of samples"
    yield "loader", f"{found.images_per_second:.1f} images/s for each process, with nothing else to do"


def cost_rows(report: Report) -> Rows:
    found, plan = report.trial, report.plan
    if found is None:
        return
    if z := found.latents:
        of = f"{z.samples} looked at: {z.least:.2f} to {z.most:.2f}, mean {z.mean:.3f}, deviation {z.std:.3f}"
        yield "latents", of
    parts = ", ".join(f"{name} {amount(count)}" for name, count in vars(found.needs).items())
    yield "memory", f"{amount(found.needs.total)} for each process: {parts}"
    yield "", f"{amount(found.peak)} at most in real steps, {amount(found.before)} before them"
    for phase in found.phases:
        images = report.batch_size / plan.ranks
        speed = f"{images / phase.seconds:.1f} images/s, {phase.seconds:.3g} s a step"
        yield "steps", f"{phase.steps} from {phase.first} ({phase.name}): {speed}, for each process"
        step, image = phase.flops / 1e12, phase.flops / images / 1e9
        yield "", f"{image:.4g} GFLOP an image, {step:.3g} TFLOP a step: {step / phase.seconds:.3g} TFLOP/s"
    yield "validation", f"{found.validation_seconds:.1f} s every {plan.validate_every} steps"
    yield "checkpoint", f"{found.checkpoint_seconds:.1f} s every {plan.save_every} steps"
    hours = report.seconds / 3600
    yield "time", f"{hours:.2f} hours, {hours / 24:.2f} days: {report.images_per_second:.1f} images/s in all"
    yield "disk", f"{amount(found.checkpoint_bytes)} a checkpoint, {amount(found.model_bytes)} the model"


def amount(count: int) -> str:
    """Bytes in a unit that suits them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
