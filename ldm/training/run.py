"""A run folder: who may write to it, which configuration it has, and the training in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoint import Checkpoint
from ldm.checkpoint.files import replacing
from ldm.config import files, parts
from ldm.config.schema import Config
from ldm.data.latents import flat
from ldm.data.loader import check_same_kind
from ldm.distributed import RANK_VARIABLES
from ldm.errors import InputError, shown
from ldm.training import checkpointing
from ldm.training.callbacks import CODES, RunCallback
from ldm.training.checkpointing import MODEL, Found
from ldm.training.loop import Loop
from ldm.training.recipe import Start
from ldm.training.setup import LOCAL, check_seed, makers
from ldm.training.trainer import TrainerSettings

# settings that may change when a run is resumed: where and how long, never what is learned from what in which order
FREE = {f"trainer.{name}" for name in ("steps", "accumulate", "accelerator", "devices", "nodes", "strategy", "compile")}
FREE |= {f"trainer.{name}_every" for name in ("log", "validate", "save")} | {"trainer.keep", "trainer.validate_images"}
FREE |= {"data.workers", "validation.workers"}
# and where files are, except a conditioner's: its `weights` say which encoder it is
FREE |= {f"{node}.{name}" for node, names in LOCAL.items() if node != "conditioner" for name in names}
SAMPLING = ("guidance", "spacing", "solver", "size")  # how pictures are made may change too
CONFIG = "config.yaml"
PATIENCE = 10.0  # seconds: the workers of a killed run live a little longer
COPIES = 3  # of a trained weight: its average and two moments


def build(config: Config, loaded: Mapping[str, Checkpoint], start: Start) -> Loop:
    """The loop and the recipe that a YAML describes."""
    settings: TrainerSettings = config.build("trainer")
    check_seed(config)
    made = makers(config)
    recipe = parts.find("recipe", config["recipe"]["type"]).build(config, loaded, start, settings)
    return Loop(recipe, settings=settings, **made)


def train(loop: Loop, config: dict[str, Any], folder: Path, found: Found | None) -> int:
    """Train from where the folder stands to the last step or a signal; returns the exit status."""
    main = is_main()
    with locked(folder) if main else nullcontext():
        if main:
            checkpointing.remove_unfinished(folder)
        callback = RunCallback(folder, main, loop.signals, found, partial(store_config, config, folder))
        with callback.handling_signals():
            try:
                loop.settings.trainer([callback], loop.recipe.sometimes_unused).fit(loop)
            except SystemExit:  # Lightning's, at a second Ctrl-C
                return CODES["sigint"] if loop.signals["sigint"] else 1
    if main and callback.code:
        print(f"stopped: step {loop.counters.step} is saved; the same command resumes", flush=True)
    return callback.code


def store_config(config: dict[str, Any], folder: Path) -> None:
    """Write the full configuration of a run."""
    with replacing(folder / CONFIG) as target:
        target.write("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()).encode())


def summary(loop: Loop, folder: Path, found: Found | None) -> str:
    """What will be trained, on what and where."""
    settings, data = loop.settings, loop.recipe.data
    groups = {name: sum(p.numel() for _, p in group) for name, group in loop.recipe.groups().items()}
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in groups.items())
    scanned = ", ".join(f"{count} {what}" for what, count in getattr(data, "counts", {}).items())
    samples = f"{len(data)} samples per epoch" + f" ({scanned})" * bool(scanned)
    micro = settings.accumulate * settings.ranks
    lines = [
        f"trained: {sizes} parameters",
        f"data: {samples}, batch {data.batch_size}" + f" in {micro} micro-batches" * (micro > 1),
        f"plan: {settings.steps} steps on {settings.hardware}",
        f"run: {folder}, {bytes_needed(loop) / 1e6:.0f} MB per checkpoint",
    ]
    if note := check_same_kind(data, loop.recipe.validation_data):
        lines.append(note)
    if found:
        lines.append(f"resumes from step {found[1]['step']}, with the weights of that step")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- the checks


def check(loop: Loop, config: dict[str, Any], folder: Path, found: Found | None) -> None:
    """Refuse a folder that cannot be resumed, or is too small; nothing is written."""
    check_config(folder, loop, config, found is not None)
    if found:
        check_data(loop, *found)
    check_space(folder, loop)
    parent = existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise not_writable(folder, parent)


def check_config(folder: Path, loop: Loop, config: dict[str, Any], resumed: bool) -> None:
    """Refuse a folder that has another configuration, or only exported weights."""
    file, weights = folder / CONFIG, folder / MODEL
    unfinished = any(folder.glob("checkpoints/*"))  # killed while it wrote its first checkpoint
    if weights.exists() and not resumed and not unfinished:
        what, hint = "--run: no checkpoint to resume from, only exported weights", f"--init-from {weights}"
        raise InputError(what, str(folder), weights.name, hint=f"{hint} and another --run")
    if not resumed or not file.exists():
        return
    before, now = flat(Config(files.read(file, []), type(loop.recipe).Schema).values), flat(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    fixed = [key for key in changed if key not in FREE and key.split(".")[0] not in (*SAMPLING, "format")]
    if fixed:
        got = ", ".join(f"{key}={shown(now.get(key))} for {shown(before.get(key))}" for key in fixed)
        hint = f"--config {file} to resume, or another --run"
        if all(key.startswith(("optimizer.", "schedule.", "discriminator_optimizer.")) for key in fixed):
            hint = (
                f"--init-from {weights} and another --run, which starts from its weights; or --config {file} to resume"
            )
        raise InputError("--run: the configuration differs from this run's", str(file), got, hint=hint)


def check_data(loop: Loop, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Refuse other data than the run started with; a source without a digest is compared by its length."""
    now = checkpointing.data_of(loop.recipe)
    for name, words in (("samples", "{} samples per epoch"), ("data", "sha256 {:.10}")):
        before = manifest.get(name)
        if None not in (before, now[name]) and before != now[name]:
            got, expected = words.format(now[name]), f"{words.format(before)}, as before"
            raise InputError("--run: the data differ from this run's", str(checkpoint), got, expected, "another --run")


def check_space(folder: Path, loop: Loop) -> None:
    """Refuse a disk that has no room for one checkpoint."""
    needed, free = bytes_needed(loop), shutil.disk_usage(existing(folder)).free
    if free < needed:
        got, expected = f"{free / 1e6:.0f} MB free", f"{needed / 1e6:.0f} MB for one checkpoint"
        raise InputError("--run: the disk is too small", str(folder), got, expected, "another --run")


def bytes_needed(loop: Loop) -> int:
    """The size of a checkpoint, about: trained weights, what is kept of them, and the exported model."""
    recipe = loop.recipe
    learned = sum(p.numel() * p.element_size() for p in recipe.parameters() if p.requires_grad)
    model = {name: x for name, x in recipe.state_dict().items() if not name.startswith(recipe.external)}
    return COPIES * learned + sum(
        x.numel() * x.element_size() for x in (*recipe.stored_state().values(), *model.values())
    )


def existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def not_writable(folder: Path, parent: Path, got: str = "") -> InputError:
    """The error about a run folder that cannot be written to."""
    hint = f"--init-from {parent}" if parent.is_file() else ""
    return InputError("--run: not writable", str(folder), got, "a folder that you can write to", hint)


# ------------------------------------------------------------------------------------------------------- the lock


def is_main() -> bool:
    """True in the process that writes, whichever launcher started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun orders nodes itself, and SLURM's numbers may differ
        return int(os.environ["RANK"]) == 0
    return all(int(os.environ.get(name, 0)) == 0 for name in RANK_VARIABLES)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The run folder, created if necessary, for one run at a time."""
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise not_writable(folder, folder, error.strerror or "") from None
    with lock:
        deadline = time.monotonic() + PATIENCE
        while not take_lock(lock.fileno()):
            if time.monotonic() > deadline:
                raise InputError(
                    "--run: another process is training in this folder", str(folder), hint="another --run, or wait"
                )
            time.sleep(0.2)
        yield


def take_lock(handle: int) -> bool:
    """Take the lock if it is free; it ends with this process."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
