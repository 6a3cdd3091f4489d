"""What is stored of a configuration, what a run remembers of its beginning, and what may start it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from ldm import checkpoint
from ldm.cli import main
from ldm.config import schema as configuration
from ldm.errors import InputError
from ldm.training import captions, logs
from ldm.training.recipes.autoencoder import Schema
from ldm.training.run import is_main
from ldm.training.setup import check_launcher, portable
from tests.training import killing, toy
from tests.training.killing import toy_data
from tests.training.second_stage import cached, command

__all__ = ["toy_data"]


def test_folders_of_one_machine_are_left_out():
    text = {"type": "clip", "width": 8, "weights": "/a/b", "tokenizer": "/c"}
    values = {
        "seed": 3,
        "data": {"type": "images", "root": "/d", "manifest": "/e", "flip": True},
        "validation": None,
        "loss": {"vgg": "/f", "l1": 1},
        "conditioner": {"type": "compose", "parts": [text, {"type": "label", "classes": 3}]},
    }
    assert portable(values) == {
        "seed": 3,
        "data": {"type": "images", "flip": True},
        "validation": None,
        "loss": {"l1": 1},
        "conditioner": {
            "type": "compose",
            "parts": [{"type": "clip", "width": 8}, {"type": "label", "classes": 3}],
        },
    }


@pytest.mark.parametrize(
    ("numbers", "main"),
    [
        ({}, True),
        ({"RANK": 1, "LOCAL_RANK": 1}, False),
        ({"SLURM_PROCID": 1, "SLURM_LOCALID": 0}, False),
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "LOCAL_RANK": 0, "SLURM_PROCID": 1},
            True,
        ),  # nodes in torchrun's order
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": 8, "LOCAL_RANK": 0, "SLURM_PROCID": 0}, False),
    ],
)
def test_one_process_writes(numbers, main, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in numbers.items():
        monkeypatch.setenv(name, str(value))
    assert is_main() is main


def test_a_run_learns_its_tokenizer_once(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    argv = command(tmp_path / "run", "schedule.type=constant")[:-1]
    assert main([*argv, "trainer.steps=1"]) == 0
    learned = checkpoint.open(tmp_path / "run" / "model.safetensors").tokenizer
    monkeypatch.setattr(captions, "captions_of", lambda *_: ["another text, another text"])
    assert main([*argv, "trainer.steps=2"]) == 0
    assert checkpoint.open(tmp_path / "run" / "model.safetensors").tokenizer == learned


def test_another_cache_and_other_scenes_are_refused_though_they_are_as_many(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    argv = [*command(tmp_path / "run", "schedule.type=constant")[:-1], "trainer.steps=1"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before, other = cached(tmp_path / "a")[-1], cached(tmp_path / "b", "data.split=validation")[-1]
    assert main([*argv, before]) == 0
    assert main([*argv, before, "--dry-run"]) == 0
    assert main([*argv, other, "--dry-run"]) == 2
    assert "--run: the data differ from this run's" in capsys.readouterr().err
    scenes = [*command(tmp_path / "scenes", "trainer.steps=1")[:-1]]
    assert main(scenes) == 0
    assert main([*scenes, "data.split=validation", "--dry-run"]) == 2
    assert 'data.split="validation" for "train"' in capsys.readouterr().err


def test_how_pictures_are_made_may_change_and_the_file_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    argv = [*command(tmp_path / "run", "schedule.type=constant")[:-1], "trainer.steps=1"]
    assert main(argv) == 0
    other = ["guidance.cfg=3.5", "spacing.steps=4", "solver={type: ddim, eta: 0.5}", "size=32"]
    assert main([*argv, "trainer.steps=2", *other]) == 0, capsys.readouterr().err
    config = checkpoint.open(tmp_path / "run" / "model.safetensors").config
    assert config["guidance"]["cfg"] == 3.5
    assert config["spacing"]["steps"] == 4
    assert config["solver"]["type"] == "ddim"
    assert config["size"] == 32
    assert main([*argv, "trainer.steps=3", "weight.type=min_snr"]) == 2
    assert "the configuration differs from this run's" in capsys.readouterr().err


def test_a_run_says_how_it_is_resumed(tmp_path, monkeypatch, capsys):
    """Without its overrides it names its own configuration; with another learning rate, its weights too."""
    monkeypatch.delenv("RANK", raising=False)
    run, argv = tmp_path / "run", killing.command(tmp_path / "run", "trainer.steps=1")[:-1]
    own = ["schedule={type: constant}", "data.batch_size=4"]
    assert main([*argv, *own]) == 0
    assert f"wrote {run}/model.safetensors; next: python train_ldm.py --config NAME" in capsys.readouterr().out
    assert main(argv) == 2
    assert capsys.readouterr().err.endswith(f"; try --config {run}/config.yaml to resume, or another --run\n")
    again = ["train-autoencoder", "--config", str(run / "config.yaml"), "--run", str(run)]
    assert main([*again, "trainer.steps=2"]) == 0
    assert "resumes from step 1" in capsys.readouterr().out
    assert main([*argv, *own, "optimizer.lr=0.01"]) == 2
    error = capsys.readouterr().err
    assert "got optimizer.lr=0.01 for 0.001; " in error
    assert f"; try --init-from {run}/model.safetensors and another --run, which starts from its weights" in error
    assert f"--config {run}/config.yaml to resume" in error


def test_a_finished_second_stage_says_how_it_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "run" / "model.safetensors"
    assert main([*command(tmp_path / "run")[:-1], "trainer.steps=1"]) == 0
    assert f'wrote {file}; next: python sample.py --ckpt {file} --prompt "..."\n' in capsys.readouterr().out


def test_runs_of_one_name_are_two_for_wandb_and_one_that_goes_on_is_one(tmp_path, monkeypatch):
    inits = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: inits.append(settings)))
    for place in ("a", "b", "a"):
        (tmp_path / place / "run").mkdir(parents=True, exist_ok=True)
        logs.WandB(tmp_path / place / "run", SimpleNamespace(recipe=SimpleNamespace(config={})))
    first, second, again = inits
    assert first["id"] == again["id"] != second["id"]
    assert {settings["name"] for settings in inits} == {"run"}


SLURM = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}


@pytest.mark.parametrize(
    ("environment", "plan", "words"),
    [
        (SLURM, (2, 2), "trainer.devices: not what SLURM starts"),
        (SLURM, (4, 3), "trainer.nodes: not what SLURM starts"),
        (SLURM, (8, 1), "try trainer.nodes=2"),
        ({"SLURM_NTASKS": "2"}, (1, 1), "got 1 processes on 1 nodes; expected 2; try trainer.devices=2"),
        ({"SLURM_NTASKS": "4"}, (4, 1), "try --ntasks-per-node=4"),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, (2, 2), "trainer.nodes: several nodes need a launcher"),
        ({}, (4, 2), "trainer.nodes: several nodes need a launcher"),
        (SLURM, (4, 2), ""),
        ({**SLURM, "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, (2, 1), ""),
        ({"MASTER_ADDR": "first"}, (4, 2), ""),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, (2, 1), ""),
    ],
)
def test_what_starts_the_processes_is_asked_before_anything_is_built(environment, plan, words, tmp_path, monkeypatch):
    for name in [x for x in os.environ if x.startswith(("MASTER_", "NODE_RANK", "TORCHELASTIC", "SLURM"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    numbers = [f"trainer.devices={plan[0]}", f"trainer.nodes={plan[1]}", "trainer.accelerator=cpu"]
    (tmp_path / "config.yaml").write_text(toy.KL)
    config = configuration.load(tmp_path / "config.yaml", numbers, Schema)
    with pytest.raises(InputError, match=re.escape(words)) if words else nullcontext():
        check_launcher(config)
    if "SLURM starts" in words:
        assert SLURMEnvironment.detect()
