"""`ldm demo gallery` makes the documentation's pictures, and tables of what an evaluation found."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.cli import main
from ldm.cli.contact_sheet import WIDTH

FEW = ["prompts=[a green cone, a red ball]", "cfg=[1, 4]", "solvers=[ddim]", "steps=[1, 2]", "seed=7"]
COUNTS = {"count": [1, 2], "whole": [1, 2]}
ROW: dict = {
    "made": 4,
    "indicative": True,
    "alignment": {"one object": COUNTS, "two objects": {"count": [2, 2], "whole": [0, 2]}},
    "frechet": 1.5,
}
FOUND = {
    "about": {
        "checkpoint": {"file": "x.safetensors", "sha256": "ab"},
        "sampling": {"solver": {"type": "ddim"}, "steps": 7},
    },
    "settings": {},
    "samples": {"made": 9, "true": 8, "frechet": 2.0, "indicative": True},
    "yardsticks": {"two true sets": 0.5},
    "prompts": [{"cfg": 1, **ROW}, {"cfg": 4, **ROW}],
}


def test_pictures_and_tables(tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text(json.dumps(FOUND))
    out = tmp_path / "docs"
    assert main(["demo", "gallery", *FEW, f"report={tmp_path / 'evaluation.json'}", "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {
        *(f"{name}.png" for name in ("samples", "guidance", "samplers")),
        *("results.md", "guidance_alignment.svg", "guidance_distance.svg"),
    }
    page = (out / "results.md").read_text()
    assert "| one object | 50.0% of 2 | 50.0% of 2 |" in page
    assert "| two objects | 0.0% of 2 | 0.0% of 2 |" in page
    assert "| two true sets | 0.5 | 400.0% |" in page
    assert "9 pictures against 8 (too few" in page
    assert "![guidance alignment](guidance_alignment.svg)" in page
    assert capsys.readouterr().out.count("wrote ") == 4
    columns = np.asarray(Image.open(out / "guidance.png"))  # two of half the width, two rows
    own = ldm.load()("a green cone", cfg=4, seed=7)[0].resize((WIDTH // 2, WIDTH // 2), Image.Resampling.LANCZOS)
    shown = columns[: WIDTH // 2 - 4, WIDTH // 2 : WIDTH - 4].astype(int)
    assert abs(shown - np.asarray(own)[:-4, :-4]).max() <= 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["report=nowhere.json"], "error: report: no evaluation (nowhere.json); got "),
        (["steps=[0]"], "error: steps: must be at least 1 (command line); got 0"),
        (["cfg=[high]"], 'error: cfg.0: wrong value (command line); got "high"'),
        (["fps=3"], "error: fps: unknown key"),
    ],
)
def test_what_it_cannot_draw_is_one_line(tmp_path, capsys, words, error):
    assert main(["demo", "gallery", "--out", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err.startswith(error)
