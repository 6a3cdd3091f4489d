"""The pages of settings and of commands: up to date, of every part and every option, and one part alone."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from ldm.cli import COMMANDS, command, main, reference
from ldm.config import parts

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = {"reference.md": [], "commands.md": ["--commands"]}


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """The tables as they are shipped, whatever is installed here and other tests have plugged in."""
    monkeypatch.setattr(parts, "TABLES", runpy.run_path(parts.__file__)["TABLES"])
    monkeypatch.setattr(parts, "plug_installed", lambda: None)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_what_the_command_writes(page, tmp_path, capsys):
    """If this fails: `ldm reference --out docs/reference.md`, `ldm reference --commands --out docs/commands.md`."""
    assert main(["reference", *PAGES[page], "--out", str(tmp_path / page)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / page}\n"
    assert (tmp_path / page).read_text(encoding="utf-8") == (DOCS / page).read_text(encoding="utf-8")


def test_the_page_of_settings_has_every_part():
    page = (DOCS / "reference.md").read_text(encoding="utf-8").splitlines()
    for axis, table in parts.TABLES.items():
        assert f"## {axis}" in page
        if isinstance(table, dict) and axis not in ("discriminator_optimizer", "validation", "training"):
            assert all(f"### {axis}.{name}" in page for name in table)


def test_the_page_of_commands_has_every_option():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        text = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        names = {option for action in command(name)[1]._actions for option in action.option_strings}
        assert names - {"-h", "--help"} <= set(re.findall(r"(?<=[` ])--?[\w-]+(?=[` ,])", text))


def test_a_part_alone(capsys):
    assert main(["reference", "unet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("### backbone.unet\n\nU-Net that predicts")
    assert "\n| `multipliers` | a list, each an integer | `[1, 2, 4, 4]` | channels of each level, " in said
    assert "| `context` |" not in said
    assert "Set by the program: " in said
    assert "`context` by the conditioner" in said


def test_every_setting_says_what_it_means():
    """But for nodes, which have a section of their own."""
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    rows = [re.split(r" (?<!\\)\| ?", line) for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if len(row) != 5 or not row[3]] == []


def test_a_comment_is_what_a_setting_means(capsys):
    assert main(["reference", "trainer"]) == 0
    assert "\n| `clip` | a finite number or null | `null` | largest norm of a gradient |\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("cosine", ["### path.cosine", "### schedule.cosine"]),
        ("path.cosine", ["### path.cosine"]),
        ("adamw", ["### optimizer.adamw"]),
        ("schedule", ["## schedule", "### schedule.constant", "### schedule.cosine"]),
        ("validation", ["## validation"]),
    ],
)
def test_a_name_is_an_axis_or_every_part_of_it(name, titles, capsys):
    assert main(["reference", name]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")] == titles


def test_what_a_partial_has_fixed_is_said():
    """And is no setting."""
    said, none = [*reference.part("solver", "dpmpp_2m_sde")][1:]
    assert said.endswith(" Here `order` is 2. Here `eta` is 1.0.")
    assert none == "No settings."


@pytest.mark.parametrize(("name", "meant"), [("untt", "unet"), ("backbon", "backbone"), ("path.cosin", "path.cosine")])
def test_an_unknown_name_is_told_the_nearest(name, meant, capsys):
    assert main(["reference", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: no such part (NAME); got {name}; expected a part, or one of path, prediction, ")
    assert err.endswith(f"; try {meant}\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["unet", "--commands"], "--commands: cannot be combined with NAME (NAME); got unet; try one of the two"),
        (["--out", "no/page.md"], "--out: cannot be written to (no/page.md); got No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reference", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
