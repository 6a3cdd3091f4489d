"""A conditioner, a recipe and a family are one file each, which only a table names: they train, save, open, sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import pipeline
from ldm.cli import main
from ldm.config import parts
from ldm.errors import InputError
from tests.seams import toy_conditioner, toy_family, toy_recipe
from tests.training import killing, second_stage

TOYS = {module.__name__: module for module in (toy_conditioner, toy_recipe, toy_family)}
AXES = "\n".join(f"{axis}: {json.dumps(node)}" for axis, node in toy_family.published().items() if axis != "backbone")
YAML = f"""
recipe: {{type: absolute, gain: 2}}
{AXES}
backbone: {{type: unet, channels: 32, multipliers: [1], blocks: 1, attend: [], heads: 1}}
optimizer: {{type: adamw, lr: 1e-3}}
schedule: {{type: constant}}
ema: {{decay: 0.5}}
data: {{type: scenes, resolution: 16, batch_size: 4, size: 12, workers: 0}}
trainer: {{steps: 4, log_every: 1, save_every: 2}}
"""


@pytest.fixture(autouse=True)
def clean_tables(monkeypatch):
    """Tables as they were, afterwards."""
    monkeypatch.delenv("RANK", raising=False)
    for axis in ("conditioner", "recipe"):
        monkeypatch.setitem(parts.TABLES, axis, dict(parts.TABLES[axis]))
    monkeypatch.setattr(parts, "FAMILIES", dict(parts.FAMILIES))


def sampled(file: Path, out: Path, *words: str) -> np.ndarray:
    """The picture that `ldm sample` makes of a file."""
    assert main(["sample", "--ckpt", str(file), "--out", str(out), "--device", "cpu", *words]) == 0
    (picture,) = out.glob("*.png")
    return np.asarray(Image.open(picture)).astype(int)


@pytest.mark.parametrize("name", TOYS)
def test_no_module_of_ours_names_them(name):
    root = Path(parts.__file__).parents[1]
    last = name.rpartition(".")[2]
    assert [file for file in root.rglob("*.py") if last in file.read_text(encoding="utf-8")] == []


def test_a_conditioner_trains_saves_opens_and_samples(tmp_path, capsys):
    plugin, node = ["--plugin", toy_conditioner.__name__], "conditioner={type: words, drop: 0.5}"
    fresh = dict(parts.TABLES["conditioner"])
    argv = second_stage.command(tmp_path / "run", node, "optimizer.lr=1e-2", "trainer.steps=5")[:-1]
    assert main([*argv, *plugin]) == 0
    file = tmp_path / "run" / "model.safetensors"
    one, many, again = (
        sampled(file, tmp_path / out, "--prompt", prompt, *plugin)
        for out, prompt in {"one": "cube", "many": "a cube on the left", "again": "cone"}.items()
    )
    assert np.abs(one - again).max() == 0  # one word each
    assert np.abs(one - many).max() > 0
    assert "conditioner.gain" in load_file(file)
    parts.TABLES["conditioner"] = fresh
    assert main(["sample", "--ckpt", str(file), "--prompt", "a cube"]) == 2
    error = capsys.readouterr().err
    assert "conditioner.type: unknown name" in error
    assert error.endswith("; try --plugin MODULE, if it is your own\n")


def test_a_conditioner_is_given_its_own_numbers(tmp_path, capsys):
    plugin = ["--plugin", toy_conditioner.__name__]
    argv = second_stage.command(tmp_path / "run", "conditioner={type: corner}", "optimizer.lr=1e-2")[:-1]
    assert main([*argv, *plugin]) == 0
    file, made = tmp_path / "run" / "model.safetensors", []
    assert f"next: python sample.py --ckpt {file} --condition FILE\n" in capsys.readouterr().out
    for name, node in {"near": {"crop": [1, 2]}, "far": {"crop": [90, 2]}, "same": {"crop": [1, 2]}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(node))
        made.append(sampled(file, tmp_path / name, "--condition", str(tmp_path / f"{name}.json"), *plugin))
    assert np.abs(made[0] - made[1]).max() > 0
    assert np.abs(made[0] - made[2]).max() == 0
    pipe = pipeline.load(file, device="cpu")
    (picture,) = pipe(condition={"crop": [1, 2]}, seed=0)
    assert np.array_equal(picture, made[0])
    with pytest.raises(InputError, match=r"crop: required by this model; try --condition FILE\.json"):
        pipe()
    for wrong, why in (
        ({"corp": 1}, "got the keys corp; expected a mapping of crop"),
        ({"crop": ["a"]}, "not numbers"),
    ):
        with pytest.raises(InputError, match=f"condition: .*{why}"):
            pipe(condition=wrong)


@pytest.fixture
def recipe_run(tmp_path):
    """The folder of a run of the toy recipe."""
    (tmp_path / "toy.yaml").write_text(YAML)
    return trained(tmp_path, "run")


def trained(folder: Path, run: str, *words: str) -> Path:
    """The folder of a run of this configuration."""
    argv = ["train", "--config", str(folder / "toy.yaml"), "--run", str(folder / run), *words]
    assert main([*argv, "--plugin", toy_recipe.__name__]) == 0
    return folder / run


def test_a_recipe_trains_saves_resumes_opens_and_samples(recipe_run, tmp_path):
    trained(tmp_path, "twice", "trainer.steps=2")
    trained(tmp_path, "twice")
    assert killing.rows(tmp_path / "twice") == killing.rows(recipe_run)
    assert killing.manifest(tmp_path / "twice")["sha256"] == killing.manifest(recipe_run)["sha256"]
    losses = [float(row["loss/loss"]) for row in killing.rows(recipe_run)]
    assert len({*losses}) == 4
    assert sampled(recipe_run / "model.safetensors", tmp_path / "out").shape == (16, 16, 3)


def test_a_family_is_recognised_opened_converted_and_sampled(recipe_run, tmp_path, capsys):
    ours = load_file(recipe_run / "model.safetensors")
    theirs, plugin = tmp_path / "theirs.safetensors", ["--plugin", toy_family.__name__]
    save_file({name.removeprefix("backbone.").upper(): x for name, x in ours.items()}, theirs)
    assert main(["sample", "--ckpt", str(theirs)]) == 4
    assert "unknown architecture" in capsys.readouterr().err
    made = sampled(theirs, tmp_path / "theirs", *plugin)
    assert np.abs(made - sampled(recipe_run / "model.safetensors", tmp_path / "ours")).max() == 0
    assert main(["convert", str(theirs), str(tmp_path / "converted.safetensors"), *plugin]) == 0
    assert "Capitals" in capsys.readouterr().out
    assert load_file(tmp_path / "converted.safetensors").keys() == ours.keys()
