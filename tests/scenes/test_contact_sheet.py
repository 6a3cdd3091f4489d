"""`ldm demo scenes`."""

import numpy as np
from PIL import Image

from ldm.cli import main
from ldm.scenes import draw, render


def test_it_shows_the_scenes(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["demo", "scenes", "seed=5", "split=held_out", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    page = np.array(Image.open(out))
    first = render(draw(5, [0], "held_out"), 256)["image"][0].permute(1, 2, 0).numpy()
    assert np.array_equal(page[:252, :252], first[:252, :252])
    assert page.shape[1] == 1024


def test_its_settings_are_checked(capsys):
    assert main(["demo", "scenes", "--print-config"]) == 0
    capsys.readouterr()
    assert main(["demo", "scenes", "split=test"]) == 2
    assert "split" in capsys.readouterr().err
    assert main(["demo", "scenes", "steps=3"]) == 2
    assert capsys.readouterr().err.startswith("error: steps: unknown key")
