"""From the start of a process to its first picture, beside diffusers: the same small random model, on the CPU.

    python -m benchmarks.sampling [--rounds 5] [--steps 10] [--threads 1]

Three programs: ours and diffusers' open the same folder, with CLIP's text encoder; ours again opens one file of ours,
in which a joint text encoder of the same size reads the prompt. The ratio is our time over theirs, from rounds of ours,
theirs, theirs, ours. Pictures of the first two must agree first, within 1 of 255.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ldm import assemble, checkpoint
from ldm.conditioning.tokenizer import BPE, clip_tokenizer

ROOT = Path(__file__).parent.parent
PROMPT = "a shiny red sphere left of a small blue cube"
TEXT = {"width": 64, "layers": 2, "heads": 8}
THEIRS = """
import sys, torch
from diffusers import StableDiffusionPipeline
folder, prompt, steps, file = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
start = torch.Generator().manual_seed(0)
pipe(prompt, num_inference_steps=int(steps), guidance_scale=7.5, generator=start).images[0].save(file)
"""


def fill(module: nn.Module) -> nn.Module:
    """Random numbers everywhere, norms near one: fresh networks end in zeros."""
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
        parameter.data.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return module


def make(conditioner: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A random latent-diffusion model whose pictures are 64 pixels wide: its configuration and weights."""
    values = {
        "format": 1,
        "path": {"type": "scaled_linear", "start": 0.00085, "end": 0.012},
        "prediction": {"type": "eps"},
        "backbone": {"type": "unet", "channels": 32, "multipliers": [1, 2], "blocks": 1, "attend": [1], "heads": 8},
        "conditioner": conditioner,
        "guidance": {"cfg": 7.5},
        "spacing": {"type": "leading", "steps": 50, "end": "table"},
        "solver": {"type": "ddim"},
        "autoencoder": {"type": "kl", "channels": 32, "multipliers": [1, 2, 2, 2], "blocks": 1},
        "size": 64,
    }
    config = assemble.configure(values, "benchmark")
    model = assemble.model(config)
    assert model.conditioner is not None
    assert model.autoencoder is not None
    networks = {
        "backbone": model.denoiser.backbone,
        "conditioner": model.conditioner,
        "autoencoder": model.autoencoder,
    }
    states = {part: fill(network).state_dict() for part, network in networks.items()}
    return config.values, {f"{part}.{name}": x for part, state in states.items() for name, x in state.items()}


def programs(folder: Path, steps: int) -> dict[str, list[str]]:
    """Three command lines, and the models that they open; each appends the file or folder of its picture."""
    config, state = make({"type": "clip", **TEXT})
    checkpoint.write_diffusers(folder / "clip", config, state, clip_tokenizer())
    config, state = make({"type": "joint_text", **TEXT, "vocabulary": 2048})
    tokenizer = BPE.train([PROMPT, "a shiny red cube right of a small blue sphere"] * 2, 2048)
    checkpoint.save(folder / "joint.safetensors", config, state, tokenizer.to_json())
    ours = [str(ROOT / "sample.py"), "--prompt", PROMPT, "--steps", str(steps), "--device", "cpu", "--json"]
    return {
        "diffusers": ["-c", THEIRS, str(folder / "clip"), PROMPT, str(steps), str(folder / "theirs.png")],
        "clip": [*ours, "--ckpt", str(folder / "clip"), "--out", str(folder / "ours")],
        "joint": [*ours, "--ckpt", str(folder / "joint.safetensors"), "--out", str(folder / "joint")],
    }


def seconds(command: list[str], threads: int) -> float:
    """How long a fresh interpreter takes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"failed: {' '.join(command)[:200]}\n{ended.stderr}")
    return time.perf_counter() - begun


def difference(folder: Path) -> int:
    """Between the pictures of the two that went through CLIP."""
    (ours,) = (folder / "ours").glob("*.png")
    a, b = (np.asarray(Image.open(file)).astype(int) for file in (ours, folder / "theirs.png"))
    if a.std() < 10:
        raise SystemExit("the picture is flat, so there is nothing to compare")
    return int(abs(a - b).max())


def report(name: str, rounds: list[list[float]]) -> None:
    """One line of medians."""
    ours = statistics.median(t for a, _, _, d in rounds for t in (a, d))
    theirs = statistics.median(t for _, b, c, _ in rounds for t in (b, c))
    ratios = [(a + d) / (b + c) for a, b, c, d in rounds]
    evenly_spaced = f"{min(ratios):.3f} to {max(ratios):.3f} in {len(rounds)} rounds"
    print(f"  {name:6} ratio {statistics.median(ratios):.3f} ({evenly_spaced}); {ours:.2f} s, diffusers {theirs:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        commands = programs(Path(name), arguments.steps)
        for command in commands.values():  # once unmeasured, for the disk's sake
            seconds(command, arguments.threads)
        off = difference(Path(name))
        if off > 1:
            raise SystemExit(f"pictures differ by {off} of 255, so there is nothing to time")
        print(f"torch {torch.__version__}, {arguments.threads} threads; pictures differ by {off} of 255")
        for name in ("clip", "joint"):
            order = (commands[name], commands["diffusers"], commands["diffusers"], commands[name])
            rounds = [[seconds(command, arguments.threads) for command in order] for _ in range(arguments.rounds)]
            report(name, rounds)


if __name__ == "__main__":
    main()
