"""What the choices of a latent diffusion model are worth: each trained on scenes for as long, then measured alike.

python -m benchmarks.choices --kl runs/scenes/model.safetensors --vq runs/scenes_vq/model.safetensors --minutes 30

A row each: the U-Net on KL latents, the same one on VQ latents, a DiT on KL latents, and a U-Net on pixels. Every one
has the same data, rendered as it goes, conditioner, path, draw, optimiser and batch, a constant learning rate, one
thread and no other process, and the same wall time, which ends by SIGTERM; then `ldm evaluate` makes as many samples of
each and compares them by the judge's features. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIT = "{type: dit, width: 256, depth: 8, heads: 8, patch: 2}"
PIXELS = "{type: unet, channels: 32, multipliers: [1, 2, 3, 5], blocks: 1, attend: [4, 8], head_width: 32}"
ALIKE = [
    "schedule={type: constant, warmup: 200}",
    "trainer.steps=1000000",
    "trainer.validate_every=1000000",
    "data.workers=0",
]


def variants(kl: Path, vq: Path) -> dict[str, list[str]]:
    """By name, what of `scenes` each changes."""
    return {
        "U-Net, KL latents": [f"autoencoder={kl}"],
        "U-Net, VQ latents": [f"autoencoder={vq}"],
        "DiT, KL latents": [f"autoencoder={kl}", f"backbone={DIT}"],
        "U-Net, pixels": ["autoencoder=null", f"backbone={PIXELS}", "channels=3"],
    }


def ldm(*words: str) -> list[str]:
    """The command of this checkout."""
    return [sys.executable, "-m", "ldm", *words]


def trained(overrides: list[str], folder: Path, seconds: float) -> tuple[str, int]:
    """Train for so long; returns how large the denoiser is, and the steps that were taken."""
    command = ldm("train-ldm", "--config", "scenes", "--run", str(folder), *ALIKE, *overrides)
    with open(f"{folder}.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        if process.wait() not in (0, 128 + signal.SIGTERM):
            raise SystemExit(Path(f"{folder}.log").read_text(errors="replace")[-2000:])
    size = re.search(r"denoiser ([\d.]+ M)", Path(f"{folder}.log").read_text())
    newest = max((folder / "checkpoints").iterdir())
    return size[1] if size else "", int(newest.name)


def measured(folder: Path, samples: int) -> dict:
    """What `ldm evaluate` says of its samples."""
    words = ["--ckpt", str(folder / "model.safetensors"), "--only", "samples", "--out", f"{folder}_report"]
    command = ldm("evaluate", *words, f"samples={samples}", "nearest=0", "--precision", "bf16")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(Path(f"{folder}_report", "evaluation.json").read_text())


def main() -> None:
    """Train, measure and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl", type=Path, required=True)
    parser.add_argument("--vq", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/choices"))
    parser.add_argument("--only", nargs="+", help="these rows alone")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.only:
        parser.error(f"{arguments.out} exists, and its runs would go on: --out another folder")
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"| {arguments.minutes:g} minutes each | parameters | steps | Frechet distance | colours right | all right |")
    print("| --- " * 6 + "|", flush=True)
    for name, overrides in variants(arguments.kl.resolve(), arguments.vq.resolve()).items():
        if arguments.only and name not in arguments.only:
            continue
        folder = (arguments.out / name.replace(", ", "_").replace(" ", "_")).resolve()
        size, steps = trained(overrides, folder, 60 * arguments.minutes)
        found = measured(folder, arguments.samples)["samples"]
        shares = [found["alignment"][part] for part in ("colour", "whole")]
        right = " | ".join(f"{100 * a / b:.1f}%" for a, b in shares)
        print(f"| {name} | {size} | {steps} | {found['frechet']:.2f} | {right} |", flush=True)


if __name__ == "__main__":
    main()
