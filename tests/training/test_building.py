"""What is stored of a configuration, and what a run remembers of its beginning."""

from __future__ import annotations

from ldm import checkpoint
from ldm.cli import main
from ldm.training import latent_diffusion
from ldm.training.building import portable
from tests.training.second_stage import cached, command


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


def test_a_run_learns_its_tokenizer_once(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    argv = command(tmp_path / "run", "schedule.type=constant")[:-1]
    assert main([*argv, "trainer.steps=1"]) == 0
    learned = checkpoint.open(tmp_path / "run" / "model.safetensors").tokenizer
    monkeypatch.setattr(latent_diffusion, "captions_of", lambda *_: ["another text, another text"])
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
    assert "--run: begun with other data" in capsys.readouterr().err
    scenes = [*command(tmp_path / "scenes", "trainer.steps=1")[:-1]]
    assert main(scenes) == 0
    assert main([*scenes, "data.split=validation", "--dry-run"]) == 2
    assert 'data.split="validation" for "train"' in capsys.readouterr().err
