"""The small models that ship with the package."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ldm.checkpoint.files import check_digest, open_file
from ldm.models.judge import Judge

FOLDER = Path(__file__).parent.parent / "pretrained"


@cache
def judge() -> Judge:
    """The judge, frozen; one object for all who ask."""
    return open_judge(FOLDER / "judge.safetensors")


def open_judge(path: Path) -> Judge:
    """A judge from its file, whatever type it is stored in."""
    tensors = open_file(path)
    check_digest(path)
    judge = Judge(**json.loads(tensors.metadata["judge"]))
    judge.load_state_dict({name: x.float() for name, x in tensors.items()})
    return judge.eval().requires_grad_(False)
