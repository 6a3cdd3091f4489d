"""A run directory: who may write to it, which configuration it has, and the training in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoint.files import replacing
from ldm.config import files
from ldm.data.latents import flat
from ldm.distributed import RANK_VARIABLES
from ldm.errors import InputError, shown
from ldm.training import checkpointing
from ldm.training.callbacks import CODES, Run
from ldm.training.checkpointing import Found
from ldm.training.loop import Stage
from ldm.training.setup import LOCAL

# what may change between two runs in one folder: where and how long, never what is learned from what in which order
FREE = {f"trainer.{name}" for name in ("steps", "accumulate", "accelerator", "devices", "nodes", "strategy", "compile")}
FREE |= {f"trainer.{name}_every" for name in ("log", "validate", "save")} | {"trainer.keep", "trainer.validate_images"}
FREE |= {"data.workers", "validation.workers"}
# and where files lie, but for a conditioner's: its `weights` say which encoder it is
FREE |= {f"{node}.{name}" for node, names in LOCAL.items() if node != "conditioner" for name in names}
SAMPLING = ("guidance", "spacing", "solver", "size")  # and how pictures are made, by the first parts of keys
CONFIG = "config.yaml"
PATIENCE = 10.0  # seconds: a killed run's workers live on for some
MEMORIES = 3  # of a trained weight, beside itself: its average and two moments


def train(stage: Stage, config: dict[str, Any], folder: Path, begun: Found | None) -> int:
    """Train from where the folder stands until the plan is done or a signal comes; returns the exit status."""
    main = is_main()
    with claimed(folder) if main else nullcontext():
        if main:
            checkpointing.clear(folder)
        callback = Run(folder, main, stage.stop, begun, partial(remember, config, folder))
        with callback.listening():
            try:
                stage.plan.trainer([callback], stage.unused).fit(stage)
            except SystemExit:  # Lightning's, at a second Ctrl-C
                return CODES["sigint"] if stage.stop["sigint"] else 1
    if main and callback.code:
        print(f"stopped: step {stage.step} is saved, and the same command goes on", flush=True)
    return callback.code


def remember(config: dict[str, Any], folder: Path) -> None:
    """Write down the whole configuration of a run."""
    with replacing(folder / CONFIG) as target:
        target.write("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()).encode())


def check(stage: Stage, config: dict[str, Any], folder: Path, begun: Found | None) -> None:
    """Refuse a folder that cannot be gone on with, or has no room; nothing is written."""
    agree(folder, config, begun is not None)
    if begun:
        check_data(stage, *begun)
    check_space(folder, stage)
    there = existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        hint = f"--init-from {there}" if there.is_file() else ""
        raise InputError("--run: cannot be written to", str(folder), expected="a folder of yours", hint=hint)


def existing(folder: Path) -> Path:
    """The folder, or the one above it that is there already."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def is_main() -> bool:
    """Whether this is the process that writes, however processes were started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun orders nodes as it likes, SLURM's numbers may be others
        return int(os.environ["RANK"]) == 0
    return all(int(os.environ.get(name, 0)) == 0 for name in RANK_VARIABLES)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for one run at a time."""
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        hint = f"--init-from {folder}" if folder.is_file() else ""
        got, expected = error.strerror or "", "a folder of yours"
        raise InputError("--run: cannot be written to", str(folder), got, expected, hint) from None
    with lock:
        patience = time.monotonic() + PATIENCE
        while not take(lock.fileno()):
            if time.monotonic() > patience:
                raise InputError("--run: another process trains here", str(folder), hint="another --run, or waiting")
            time.sleep(0.2)
        yield


def take(handle: int) -> bool:
    """Take the lock if it is free; it ends with this process, however that ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False


def agree(folder: Path, config: dict[str, Any], begun: bool) -> None:
    """Refuse a folder that was begun with another configuration, or never here."""
    file, weights = folder / CONFIG, folder / checkpointing.MODEL
    unfinished = any(folder.glob("checkpoints/*"))  # killed in writing its first one
    if weights.exists() and not begun and not unfinished:
        hint = f"--init-from {weights} and another --run"
        raise InputError("--run: weights alone are no run to go on with", str(folder), weights.name, hint=hint)
    if not begun or not file.exists():
        return
    before, now = flat(files.read(file, []).values), flat(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    fixed = [key for key in changed if key not in FREE and key.split(".")[0] not in SAMPLING]
    if different := [key for key in fixed if key != "format"]:
        words = [f"{key}={shown(now.get(key))} for {shown(before.get(key))}" for key in different]
        raise InputError("--run: begun with another configuration", str(file), ", ".join(words), hint="another --run")


def check_data(stage: Stage, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Refuse other data than a run began with; those of a source without a digest are told by their number alone."""
    now = checkpointing.data_of(stage)
    for name, words in (("samples", "{} samples an epoch"), ("data", "sha256 {:.10}")):
        before = manifest.get(name)
        if None not in (before, now[name]) and before != now[name]:
            got, expected = words.format(now[name]), f"{words.format(before)}, as before"
            raise InputError("--run: begun with other data", str(checkpoint), got, expected, "another --run")


def check_space(folder: Path, stage: Stage) -> None:
    """Refuse a disk that has no room for one checkpoint."""
    needed, free = disk_needed(stage), shutil.disk_usage(existing(folder)).free
    if free < needed:
        got, expected = f"{free / 1e6:.0f} MB free", f"{needed / 1e6:.0f} MB for one checkpoint"
        raise InputError("--run: the disk is too small", str(folder), got, expected, "another --run")


def disk_needed(stage: Stage) -> int:
    """The bytes of a checkpoint, about: what is trained, what is remembered of it, and the model's own file."""
    frozen = tuple(f"{name}." for name in stage.frozen)
    sizes = {name: x.numel() * x.element_size() for name, x in stage.state_dict().items()}
    state = sum(size for name, size in sizes.items() if not name.startswith(frozen))
    model = sum(size for name, size in sizes.items() if not name.startswith(stage.left_out))
    learned = sum(p.numel() * p.element_size() for p in stage.parameters() if p.requires_grad)
    return state + MEMORIES * learned + model


def summary(stage: Stage, folder: Path, begun: Found | None) -> str:
    """What is going to be trained, on what and where."""
    groups = {name: sum(p.numel() for _, p in group) for name, group in stage.groups().items()}
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in groups.items())
    plan, data = stage.plan, stage.data
    scanned = ", ".join(f"{count} {what}" for what, count in getattr(data, "counts", {}).items())
    samples = f"{len(data)} samples an epoch" + f" ({scanned})" * bool(scanned)
    where = f"{plan.ranks} {'GPU' if plan.on_gpu else 'CPU'} process{'es' * (plan.ranks > 1)}, {plan.precision}"
    lines = [
        f"trained: {sizes}",
        f"data: {samples}, {data.batch_size} a step in {plan.accumulate * plan.ranks} parts",
        f"plan: {plan.steps} steps on {where}",
        f"run: {folder}, {disk_needed(stage) / 1e6:.0f} MB a checkpoint",
    ]
    if begun:
        lines += [f"goes on from step {begun[1]['step']}, with the weights of that step"]
    return "\n".join(lines)
