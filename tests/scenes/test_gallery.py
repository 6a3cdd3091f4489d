"""`ldm demo gallery` makes the documentation's pictures, and tables of what an evaluation found."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.cli import main
from ldm.scenes.contact_sheet import WIDTH

FEW = ["prompts=[a green cone, a red ball]", "cfg=[1, 4]", "solvers=[ddim]", "steps=[1, 2]", "seed=7", "demos=[scenes]"]
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
    files = [tmp_path / "words.csv", tmp_path / "run" / "metrics.csv"]
    files[1].parent.mkdir()
    for file in files:
        file.write_text("step,loss/loss,val/loss\n25,0.9,\n50,0.8,0.75\n100,0.5,0.25\n")
    out, told = tmp_path / "docs", [f"report={tmp_path / 'evaluation.json'}", f"metrics=[{', '.join(map(str, files))}]"]
    assert main(["demo", "gallery", *FEW, *told, "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {
        *(f"{name}.png" for name in ("samples", "guidance", "samplers", "scenes")),
        *("results.md", "guidance_alignment.svg", "guidance_distance.svg", "training.svg"),
    }
    page = (out / "results.md").read_text()
    assert "| one object | 50.0% of 2 | 50.0% of 2 |" in page
    assert "| two objects | 0.0% of 2 | 0.0% of 2 |" in page
    assert "| two true sets | 0.5 | 4 times |" in page
    assert "9 pictures against 8 (too few" in page
    assert "![guidance alignment](guidance_alignment.svg)" in page
    assert capsys.readouterr().out.count("wrote ") == 6
    curve = (out / "training.svg").read_text()
    assert curve.count("<circle") == 2 * 2  # validations, and no steps between them
    assert (">words<" in curve, ">run<" in curve) == (True, True)
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', curve)]
    low, high = (float(re.search(rf'y="([\d.]+)"[^>]*>{mark}<', curve)[1]) - 4 for mark in ("0.2", "0.8"))
    assert heights[:2] == pytest.approx([low + (high - low) * (loss - 0.2) / 0.6 for loss in (0.75, 0.25)], abs=0.2)
    columns = np.asarray(Image.open(out / "guidance.png"))  # two of half the width, two rows
    own = ldm.load()("a green cone", cfg=4, seed=7)[0].resize((WIDTH // 2, WIDTH // 2), Image.Resampling.LANCZOS)
    shown = columns[: WIDTH // 2 - 4, WIDTH // 2 : WIDTH - 4].astype(int)
    assert abs(shown - np.asarray(own)[:-4, :-4]).max() <= 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["report=nowhere.json"], "error: report: cannot read it (nowhere.json); got "),
        (["metrics=[nowhere.csv]"], "error: metrics: cannot read them (nowhere.csv); got "),
        (["steps=[0]"], "error: steps: must be at least 1 (command line); got 0"),
        (["cfg=[high]"], 'error: cfg.0: wrong value (command line); got "high"'),
        (["fps=3"], "error: fps: unknown key"),
    ],
)
def test_what_it_cannot_draw_is_one_line(tmp_path, capsys, words, error):
    assert main(["demo", "gallery", "--out", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err.startswith(error)
