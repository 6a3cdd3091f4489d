"""The shipped judge, and reading and writing of judges."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ldm.checkpoint.files import check_digest, open_file, write_file
from ldm.scenes.judge import Judge

FOLDER = Path(__file__).parent.parent / "pretrained"


@cache
def judge() -> Judge:
    """The shipped judge, frozen; every call returns the same object."""
    return open_judge(FOLDER / "judge.safetensors")


def open_judge(path: Path) -> Judge:
    """A judge from its file, whose digest is checked."""
    check_digest(path)
    tensors = open_file(path)
    judge = Judge()
    judge.load_state_dict({name: x.float() for name, x in tensors.items()})
    return judge.eval().requires_grad_(False)


def save_judge(path: Path, judge: Judge, **metadata: str) -> str:
    """Write a judge in half precision with this metadata; return the digest."""
    return write_file(path, judge.state_dict(), metadata, torch.float16)
