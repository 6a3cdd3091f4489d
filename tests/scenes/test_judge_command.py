"""`ldm judge` trains and stores, measures, and says what it sees."""

from __future__ import annotations

import json

import pytest

from ldm import pictures
from ldm.checkpoint.files import open_file
from ldm.cli import main
from ldm.scenes.description import Object, Scene
from ldm.scenes.pretrained import open_judge
from ldm.scenes.render import render


def test_it_trains_measures_and_stores(tmp_path, capsys):
    out = tmp_path / "judge.safetensors"
    assert main(["judge", "--steps", "2", "--pictures", "8", "--renders", "8", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    metadata = open_file(out).metadata
    assert metadata["command"] == "ldm judge --steps 2 --pictures 8 --seed 0"
    columns = json.loads(metadata["accuracy"])
    assert columns.keys() == {
        f"{s}, {w}" for s in ("validation", "held_out") for w in ("clean", "blurred", "noised")
    } | {
        "128 px",
        "256 px",
    }
    assert all(title in printed for title in columns)
    assert open_judge(out).training is False
    assert printed.endswith("MB)\n")


def test_it_says_what_it_sees(tmp_path, capsys):
    objects = (
        Object("sphere", "red", "shiny", "large", -1.2, 0.0, 0.765),
        Object("cube", "blue", "matte", "large", 1.2, 0.0, 0.663),
    )
    image = pictures.to_pil(pictures.to_float(render([Scene(objects)], 128)["image"]))[0]
    pictures.write(image, tmp_path / "scene.png")
    assert main(["judge", "--read", str(tmp_path / "scene.png")]) == 0
    lines = sorted(capsys.readouterr().out.splitlines())
    assert [line.split(" (")[0] for line in lines] == [
        "2 objects",
        "a large matte blue cube",
        "a large shiny red sphere",
    ]
    assert lines[1].endswith("sure), right of the large red sphere")
    assert lines[2].endswith("sure), left of the large blue cube")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--steps", "0"], "error: out of range (--steps); got 0; expected"),
        (["--renders", "0"], "error: out of range (--renders); got 0; expected"),
        (["--seed", "-1"], "error: out of range (--seed); got -1; expected"),
        (["--out", "judge.pt"], "error: --out: the name must end in .safetensors (--out); got judge.pt"),
        (["--out", "nowhere/judge.safetensors"], "error: --out: the name must end in .safetensors (--out)"),
        (["--read", "nothing.png"], "error: no such picture (nothing.png)"),
    ],
)
def test_refusals_come_before_any_work(options, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["judge", *options]) == 2
    assert capsys.readouterr().err.startswith(error)
