"""What a run says while it trains: metrics.csv, a progress line, TensorBoard and W&B where they are installed."""

from __future__ import annotations

import csv
import io
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.checkpoint.files import replacing
from ldm.training.loop import Stage
from ldm.training.utilisation import Utilisation

IDENTITY = "wandb_id"
FIRST = ("step", "images_seen", "skipped", "images_per_second")
SHOWN = {  # beside the progress, each with its name there
    "images_per_second": ("images/s", "{:.1f}"),
    "tflops_per_second": ("TFLOP/s", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "loss/loss": ("loss", "{:.4g}"),
    "val/psnr": ("psnr", "{:.4g}"),
    "val/loss": ("val loss", "{:.4g}"),
}


def due(stage: Stage, ended: bool) -> bool:
    """Whether a step has a row: at intervals, where there was a validation, and where it was skipped."""
    validated = any(name.startswith("val/") for name in stage.report)
    return ended or validated or not stage.advanced or stage.step % stage.plan.log_every == 0


class Logs:
    """The rows of a run; only its first process has them."""

    def __init__(self, run: Path):
        self.run, self.file = run, run / "metrics.csv"
        self.sinks: list[Any] = []
        self.bar: Any = None

    def begin(self, stage: Stage, images_seen: int, utilisation: Utilisation) -> None:
        """Take up the log where the checkpoint was written: later rows will be written again."""
        self.utilisation = utilisation
        self.table = Table(self.file, images_seen)
        self.sinks = [sink(self.run, stage) for sink in (TensorBoard, WandB) if find_spec(sink.package)]
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=stage.plan.steps, initial=stage.step, unit="step", mininterval=interval)
        self.since = time.perf_counter(), images_seen

    def progress(self, stage: Stage) -> None:
        """Show where the training stands."""
        self.bar.update(stage.step - self.bar.n)

    def step(self, stage: Stage) -> None:
        """Log a row."""
        now = time.perf_counter(), stage.images_seen
        speed = (now[1] - self.since[1]) / max(now[0] - self.since[0], 1e-9)
        self.since = now
        row = {**stage.report, "images_per_second": round(speed, 2), **self.utilisation.row(stage.step, speed)}
        self.table.add(row)
        for sink in self.sinks:
            sink.add(row, stage.step)
        self.bar.set_postfix({name: form.format(row[key]) for key, (name, form) in SHOWN.items() if key in row}, False)
        if not stage.advanced:
            self.say(f"step {stage.step} skipped: its gradient is not finite")
        for line in stage.verdicts(row):
            self.say(line)

    def say(self, line: str) -> None:
        """A line above the progress."""
        tqdm.write(line, file=sys.stderr)

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """What happens now is no training and has no part in images per second."""
        began = time.perf_counter()
        yield
        self.since = self.since[0] + time.perf_counter() - began, self.since[1]

    def close(self) -> None:
        """Close what is open."""
        if self.bar is not None:
            self.bar.close()
        for sink in self.sinks:
            sink.close()


class Table:
    """A CSV file that gains columns when they first occur, and forgets rows after a given sample."""

    def __init__(self, file: Path, images_seen: int):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half a line
        rows = [row for row in csv.DictReader(whole) if int(row["images_seen"]) <= images_seen]
        self.columns = list(csv.DictReader(whole).fieldnames or FIRST)
        self._write(rows)

    def add(self, row: dict[str, Any]) -> None:
        """One more row, on the disk when this returns."""
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

    def __init__(self, run: Path, stage: Stage):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run), purge_step=stage.step + 1 if stage.step else None)

    def add(self, row: dict[str, Any], step: int) -> None:
        """One row."""
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def identity(run: Path) -> str:
    """What tells a run from all others, kept in its folder."""
    file = run / IDENTITY
    if not file.exists():
        with replacing(file) as target:
            target.write(secrets.token_hex(8).encode())
    return file.read_text(encoding="utf-8").strip()


class WandB:
    """Weights & Biases, offline unless WANDB_MODE says otherwise, in the project `ldm` unless WANDB_PROJECT does."""

    package = "wandb"

    def __init__(self, run: Path, stage: Stage):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ldm"),
            name=run.resolve().name,
            id=identity(run),  # a name may be that of other runs, which `resume` would go on with
            dir=str(run),
            config=stage.config,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        )

    def add(self, row: dict[str, Any], step: int) -> None:
        """One row."""
        self.run.log(row, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()
