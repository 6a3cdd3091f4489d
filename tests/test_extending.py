"""The parts of docs/extending.md train and are used, and README's loop learns."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm import checkpoint, pictures
from ldm.checkpoint.networks import fingerprint
from ldm.cli import main
from ldm.config import parts
from ldm.pipeline import SHIPPED

ROOT = Path(__file__).parent.parent


def blocks(page: Path) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


(BACKBONE, FIRST_STAGE, RECIPE), (*_, LOOP) = blocks(ROOT / "docs/extending.md"), blocks(ROOT / "README.md")
SMALL = ["trainer.steps=1", "data.batch_size=4", "data.workers=0", "validation.workers=0", "trainer.validate_images=4"]


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    """The modules of the page, and the tables as they were, afterwards."""
    (tmp_path / "my_backbone.py").write_text(BACKBONE)
    (tmp_path / "my_first_stage.py").write_text(FIRST_STAGE)
    (tmp_path / "my_recipe.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for axis in ("backbone", "autoencoder", "solver", "recipe"):
        monkeypatch.setitem(parts.TABLES, axis, dict(parts.TABLES[axis]))
    yield
    parts.TABLES.pop("network", None)
    for name in ("my_backbone", "my_first_stage", "my_recipe"):
        sys.modules.pop(name, None)


def test_the_backbone_of_the_page_trains_samples_and_is_converted(plugged, tmp_path, capsys):
    command = [
        "train-ldm",
        "--config",
        "scenes",
        "--plugin",
        "my_backbone",
        "backbone={type: plain, width: 32}",
        *SMALL,
    ]
    run = tmp_path / "run"
    assert main([*command, "--run-dir", str(run), f"autoencoder={SHIPPED}"]) == 0
    file, fresh = str(run / "model.safetensors"), dict(parts.TABLES["backbone"])
    sample = ["sample", "--ckpt", file, "--prompt", "a red cube", "--steps", "1", "--out", str(tmp_path / "out")]
    del parts.TABLES["backbone"]["plain"]  # as in another process
    assert main(sample) == 2
    assert "backbone.type: unknown name" in capsys.readouterr().err
    assert main([*sample, "--plugin", "my_backbone"]) == 0
    (picture,) = (tmp_path / "out").glob("*.png")
    again = str(tmp_path / "again.png")
    del parts.TABLES["backbone"]["plain"]
    assert main(["replay", str(picture), "--out", again]) == 2
    assert "backbone.type: unknown name" in capsys.readouterr().err
    assert main(["replay", str(picture), "--out", again, "--plugin", "my_backbone"]) == 0
    assert capsys.readouterr().out.endswith("again.png: identical\n")
    assert parts.TABLES["backbone"] == fresh
    assert main(["convert", file, str(tmp_path / "half.safetensors"), "--dtype", "float16"]) == 0
    assert main(["convert", file, str(tmp_path / "folder")]) == 4
    assert "error: other programs have no such backbone; got plain; expected dit or unet" in capsys.readouterr().err


def test_a_wrong_width_is_told_in_its_words(plugged, capsys):
    argv = ["train-ldm", "--config", "scenes", "--plugin", "my_backbone", "backbone={type: plain, width: 33}"]
    assert main([*argv, f"autoencoder={SHIPPED}", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: backbone.width: not divisible into 8 groups (command line); got 33; try 40")


def test_the_first_stage_of_the_page_trains_is_converted_and_used(plugged, tmp_path, capsys):
    plugin = ["--plugin", "my_first_stage"]
    train = ["train-autoencoder", "--config", "scenes", *plugin, "autoencoder={type: light, width: 8}", *SMALL]
    assert main([*train, "--run-dir", str(tmp_path / "run")]) == 0
    file, half = str(tmp_path / "run/model.safetensors"), str(tmp_path / "half.safetensors")
    convert = ["convert", file, half, "--dtype", "float16"]
    del parts.TABLES["autoencoder"]["light"]  # as in another process
    assert main(convert) == 4
    said = "error: autoencoder.type: unknown name; got light; expected one of kl, vq; try --plugin"
    assert said in capsys.readouterr().err
    assert main([*convert, *plugin]) == 0
    loaded = checkpoint.open(half)
    assert loaded.config["fingerprint"] != checkpoint.open(file).config["fingerprint"]
    assert loaded.config["fingerprint"] == fingerprint(loaded.config["autoencoder"], loaded.state)
    assert main(["train-ldm", "--config", "scenes", *plugin, f"autoencoder={half}", *SMALL, "--dry-run"]) == 0
    whole = ["--vae", half, *plugin]
    assert main(["sample", *whole, "--prompt", "a red cube", "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    assert len([*(tmp_path / "out").glob("*.png")]) == 1
    assert main(["convert", file, str(tmp_path / "x.safetensors"), "--to", "compvis"]) == 4
    assert "error: other programs have no such first stage; got light; expected kl or vq" in capsys.readouterr().err


def test_a_first_stage_of_other_latents_is_refused(plugged, tmp_path, capsys):
    train = ["train-autoencoder", "--config", "scenes", "--plugin", "my_first_stage", *SMALL]
    assert main([*train, "autoencoder={type: light, latent: 3}", "--run-dir", str(tmp_path)]) == 0
    sample = [
        "sample",
        "--plugin",
        "my_first_stage",
        "--vae",
        str(tmp_path / "model.safetensors"),
        "--prompt",
        "a cube",
    ]
    assert main(sample) == 4
    assert "error: the autoencoder has other latent channels" in (said := capsys.readouterr().err)
    assert "got 3 latent channels; expected 4" in said


def test_the_recipe_of_the_page_trains_and_resumes(plugged, tmp_path, capsys):
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (line,) = [line for line in text.splitlines() if line.startswith("$ ldm train ")]
    (tmp_path / "cleaning.yaml").write_text(yaml)
    words = (
        line.replace("cleaning.yaml", str(tmp_path / "cleaning.yaml")).replace("runs/", f"{tmp_path}/runs/").split()[2:]
    )
    few = ["data.batch_size=4", "data.resolution=16", "data.workers=0", "schedule={type: constant}"]
    more = [*few, "optimizer.lr=1e-2", "trainer.log_every=1", "ema.decay=0.5"]
    for steps in (10, 30):
        assert main([*words, *more, f"trainer.steps={steps}"]) == 0
    assert "resumes from step 10" in capsys.readouterr().out
    run = tmp_path / "runs" / "cleaning"
    with open(run / "metrics.csv", encoding="utf-8") as file:
        losses = [float(row["loss/loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 2
    assert load_file(run / "model.safetensors")["0.weight"].shape == (16, 3, 3, 3)
    assert main([*words, *few, "recipe.strenght=1"]) == 2
    assert "error: recipe.strenght: unknown key (command line)" in (said := capsys.readouterr().err)
    assert said.endswith("; try strength\n")


def test_a_sampler_of_ones_own_is_asked_for_by_its_name(plugged, tmp_path):
    text = 'from ldm.diffusion.solvers import euler as mine\nPARTS = {"solver": {"My-Own": "my_sampler:mine"}}\n'
    (tmp_path / "my_sampler.py").write_text(text)
    argv = ["sample", "--prompt", "a red cube", "--steps", "2", "--out"]
    assert main([*argv, str(tmp_path / "own"), "--plugin", "my_sampler", "--sampler", "My-Own"]) == 0
    assert main([*argv, str(tmp_path / "ours"), "--sampler", "euler"]) == 0
    (own,), (ours,) = (tmp_path.glob(f"{folder}/*.png") for folder in ("own", "ours"))
    assert pictures.read(own).tobytes() == pictures.read(ours).tobytes()
    sys.modules.pop("my_sampler", None)


def test_a_name_that_a_module_does_not_have_is_said(plugged, tmp_path, capsys):
    (tmp_path / "my_first_stage.py").write_text(FIRST_STAGE.replace(":Light", ":Lihgt"))
    argv = ["train-autoencoder", "--config", "scenes", "--plugin", "my_first_stage", "autoencoder={type: light}"]
    assert main(argv) == 2
    said = "error: no such part (my_first_stage); got Lihgt; expected a name in this module; try Light\n"
    assert capsys.readouterr().err == said


def test_the_loop_of_the_readme_learns():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(1, 2, 1, 1))

        def forward(self, x, t):
            return x * 0 + self.shift

    network, target = Network(), torch.tensor([3.0, -2.0]).view(1, 2, 1, 1)
    batches = [(target.expand(16, 2, 4, 4), None)] * 40
    exec(LOOP.replace("lr=1e-3", "lr=0.1"), {"my_network": network, "my_batches": batches})
    assert torch.allclose(network.shift, -target, atol=0.3)  # flow: E[noise - x0]
