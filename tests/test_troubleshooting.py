"""The page of errors quotes lines that the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
LINES = [row[0].removeprefix("| ").strip("`") for row in ROWS]
YOURS = re.compile(r"\b(?:KEY|NAME|N|FOLDER)\b(?!=)")


def constants() -> list[str]:
    """The strings in the code, each piece of a formatted one by itself, docstrings left out."""
    found = []
    for file in (ROOT / "ldm").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
        ]
    return found


STRINGS = constants()


def is_said(line: str) -> bool:
    """Whether the code has it: as it stands, without the part of a key that the configuration adds, or its pieces."""
    pieces = [piece for piece in YOURS.split(line) if len(piece) > 2]
    for whole in ([line], [re.sub(r"^\w+\.", "", line)], [re.sub(r"^\w+\.\w+(?=: )", "", line)], pieces):
        if whole and all(any(piece in string for string in STRINGS) for piece in whole):
            return True
    return False


def test_the_page_has_rows():
    assert len(LINES) > 60
    assert len(set(LINES)) == len(LINES)


@pytest.mark.parametrize("line", LINES)
def test_the_code_says_what_is_quoted(line):
    assert is_said(line)


@pytest.mark.parametrize("line", ["no such error", "KEY: no such error at all", "trainer.devices: no such error"])
def test_what_nobody_says_is_noticed(line):
    assert not is_said(line)


def test_the_settings_that_it_recommends_exist():
    """Each `axis.key=` is a setting of some part."""
    settings = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    for axis, key in re.findall(r"`(\w+)\.(\w+)(?==|`)", PAGE):
        if f"\n## {axis}\n" in settings and key != "type":
            section = settings.split(f"\n## {axis}\n")[1].split("\n## ")[0]
            link = re.search(r"The parts of \[(\w+)\]", section)
            section = settings.split(f"\n## {link[1]}\n")[1].split("\n## ")[0] if link else section
            assert f"| `{key}` |" in section, f"{axis}.{key}"
