"""The commands of the guides are understood: each names a command, options and configurations that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ldm.cli import command, config_file

DOCS = Path(__file__).parent.parent / "docs"
SCRIPTS = {f"{name.replace('-', '_')}.py": name for name in ("train-autoencoder", "train-ldm", "sample")}


def commands(page: str) -> list[str]:
    """The lines behind a prompt, continued ones joined."""
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(r"^\$ ((?:ldm|python \w+\.py) .*)$", text, re.MULTILINE)


PAGES = ("tutorial.md", "first_stage.md", "latent_diffusion.md", "data.md")
LINES = [line for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_understood(line):
    first, *words = shlex.split(line)
    name = words.pop(0)
    arguments = command(name if first == "ldm" else SCRIPTS[name])[1].parse_intermixed_args(words)
    if getattr(arguments, "config", None) not in (None, "CONFIG"):
        folder = "autoencoder" if name.endswith("autoencoder.py") else "ldm"
        assert config_file(arguments.config, folder).suffix == ".yaml"


def test_the_tutorial_has_commands():
    assert len(commands("tutorial.md")) > 15
