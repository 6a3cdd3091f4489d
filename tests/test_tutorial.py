"""The commands of the guides are accepted by the real parsers and configurations, and links have targets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ldm.cli import command, config_file

DOCS = Path(__file__).parent.parent / "docs"
SCRIPTS = {f"{name.replace('-', '_')}.py": name for name in ("train-autoencoder", "train-ldm", "sample")}


def commands(page: str) -> list[str]:
    """The lines after a prompt, with continued lines joined."""
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(r"^\$ ((?:ldm|python \w+\.py) .*)$", text, re.MULTILINE)


PAGES = ("../README.md", "data.md", "evaluation.md", "extending.md", "first_stage.md", "latent_diffusion.md")
PAGES += ("sampling.md", "scenes.md", "tutorial.md")
LINES = [line for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_understood(line):
    first, *words = shlex.split(line)
    name = words.pop(0)
    arguments = command(name if first == "ldm" else SCRIPTS[name])[1].parse_intermixed_args(words)
    if getattr(arguments, "config", None) not in (None, "CONFIG"):
        folder = "autoencoder" if name.endswith("autoencoder.py") else name if name in ("evaluate", "demo") else "ldm"
        assert config_file(arguments.config, folder).suffix == ".yaml"


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), *DOCS.parent.glob("*.md")])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> list[str]:
    """The anchors that web pages give to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_tutorial_has_commands():
    assert len(commands("tutorial.md")) > 15
