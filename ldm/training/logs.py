"""The logs of a run: metrics.csv, a progress bar, and TensorBoard and W&B if they are installed."""

from __future__ import annotations

import csv
import io
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.checkpoint.files import replacing
from ldm.training.cost import Utilisation
from ldm.training.loop import Loop

IDENTITY = "wandb_id"
FIRST = ("step", "images_seen", "skipped", "images_per_second")
SHOWN = {  # in the progress bar: column -> (name, format)
    "images_per_second": ("images/s", "{:.1f}"),
    "tflops_per_second": ("TFLOP/s", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "loss/loss": ("loss", "{:.4g}"),
    "val/psnr": ("psnr", "{:.4g}"),
    "val/loss": ("val loss", "{:.4g}"),
}


def row_is_due(loop: Loop, ended: bool) -> bool:
    """True at intervals, after a validation, and when a step was skipped."""
    validated = any(name.startswith("val/") for name in loop.report)
    return ended or validated or not loop.advanced or loop.counters.step % loop.settings.log_every == 0


class Logs:
    """The rows of a run: metrics.csv, the progress bar, and other loggers; only the first rank has them."""

    def __init__(self, run: Path):
        self.run, self.file = run, run / "metrics.csv"
        self.sinks: list[Any] = []
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def start(self, loop: Loop, utilisation: Utilisation) -> None:
        """Continue the log from the checkpoint: later rows will be written again."""
        counters, self.utilisation = loop.counters, utilisation
        self.table = Table(self.file, counters.images_seen)
        self.sinks = [sink(self.run, loop) for sink in (TensorBoard, WandB) if find_spec(sink.package)]
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=loop.settings.steps, initial=counters.step, unit="step", mininterval=interval)
        self.since = time.perf_counter(), counters.images_seen

    def progress(self, loop: Loop) -> None:
        """Update the progress bar with the current step's loss."""
        self.shown |= shown(loop.report)
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(loop.counters.step - self.bar.n)

    def add_row(self, loop: Loop) -> None:
        counters = loop.counters
        now = time.perf_counter(), counters.images_seen
        speed = (now[1] - self.since[1]) / max(now[0] - self.since[0], 1e-9)
        self.since = now
        row = {**loop.report, "images_per_second": round(speed, 2), **self.utilisation.row(counters.step, speed)}
        self.table.add(row)
        for sink in self.sinks:
            sink.add(row, counters.step)
        self.shown |= shown(row)
        self.bar.set_postfix(self.shown, refresh=False)
        if not loop.advanced:
            self.print(f"step {counters.step} skipped: its gradient is not finite")
        for line in loop.recipe.warnings(row):
            self.print(line)

    def print(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """The time that this takes does not count in images per second."""
        start = time.perf_counter()
        yield
        self.since = self.since[0] + time.perf_counter() - start, self.since[1]

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for sink in self.sinks:
            sink.close()


def shown(row: Mapping[str, float]) -> dict[str, str]:
    """What of a row the progress bar shows."""
    return {name: form.format(row[key]) for key, (name, form) in SHOWN.items() if key in row}


class Table:
    """A CSV file that adds columns when they first occur, and drops rows after a given sample."""

    def __init__(self, file: Path, images_seen: int):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half a line
        rows = [row for row in csv.DictReader(whole) if int(row["images_seen"]) <= images_seen]
        self.columns = list(csv.DictReader(whole).fieldnames or FIRST)
        self._write(rows)

    def add(self, row: dict[str, Any]) -> None:
        if new := [name for name in row if name not in self.columns]:
            with open(self.file, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._write([*rows, row])
            return
        with open(self.file, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self.file) as file:
            file.write(text.getvalue().encode())


class TensorBoard:
    """Events for TensorBoard in the run directory."""

    package = "tensorboard"

    def __init__(self, run: Path, loop: Loop):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run), purge_step=loop.counters.step + 1 if loop.counters.step else None)

    def add(self, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def identity(run: Path) -> str:
    """A random id of the run, stored in its folder."""
    file = run / IDENTITY
    if not file.exists():
        with replacing(file) as target:
            target.write(secrets.token_hex(8).encode())
    return file.read_text(encoding="utf-8").strip()


class WandB:
    """Weights & Biases, offline unless WANDB_MODE says otherwise, in the project `ldm` unless WANDB_PROJECT does."""

    package = "wandb"

    def __init__(self, run: Path, loop: Loop):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ldm"),
            name=run.resolve().name,
            id=identity(run),  # two runs may have the same name, and `resume` would join them
            dir=str(run),
            config=loop.recipe.config,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        )

    def add(self, row: dict[str, Any], step: int) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        self.run.finish()
