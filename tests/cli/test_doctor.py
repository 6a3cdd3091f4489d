"""`ldm doctor` prints what it found, exits with the first error's status, and leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import signal

import pytest

from ldm.cli import doctor, main
from ldm.training import trial
from tests import waiting
from tests.training import toy
from tests.training.killing import toy_data, wait

__all__ = ["toy_data"]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A configuration, an empty folder for what is temporary, and few steps."""
    monkeypatch.setattr(trial, "TIMED", 3)
    (tmp_path / "toy.yaml").write_text(toy.KL)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    yield
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "toy.yaml"]
    assert not list((tmp_path / "scratch").iterdir())


def test_it_prints_what_it_found(capsys):
    assert main(["doctor", "toy.yaml", "trainer.steps=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = [line[:12].strip() for line in lines if line[:12].strip() and "loader: " not in line]
    assert labels == [
        *("plan", "data", "captions", "loader", "memory", "steps", "steps", "validation", "checkpoint", "time", "disk"),
        *["ok"] * 5,
    ]
    assert lines[0] == "plan        7 steps of 8 images on 1 CPU process, 32-true"
    assert "4 from 0 (no discriminator): " in "\n".join(lines)
    assert "3 from 4 (adversarial): " in "\n".join(lines)


def test_the_same_as_json_with_an_error(capsys, monkeypatch):
    monkeypatch.setattr(trial, "machine_memory", lambda device: 1000)
    assert main(["doctor", "--config", "toy.yaml", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["batch_size"] == 8
    assert found["settings"]["steps"] == 10
    assert found["survey"]["samples"] == 40
    assert [finding["kind"] for finding in found["findings"]] == ["ok", "error"]


def test_print_config_stops(capsys):
    assert main(["doctor", "scenes", "data.batch_size=4", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("name", "stage", "folder", "recipe"),
    [
        ("scenes", None, "autoencoder", "autoencoder"),
        ("scenes", 1, "autoencoder", "autoencoder"),
        ("scenes", 2, "ldm", "diffusion"),
        ("kl_f8", None, "autoencoder", "autoencoder"),
        ("sd15", None, "ldm", "diffusion"),
        ("sd15", 2, "ldm", "diffusion"),
    ],
)
def test_a_name_means_the_first_stage_that_has_it(name, stage, folder, recipe):
    parser = argparse.ArgumentParser()
    doctor.options(parser)
    plan = doctor.read_plan(parser.parse_args([name, *(["--stage", str(stage)] if stage else [])]))
    assert (plan.file.parent.name, plan.file.stem, plan.recipe) == (folder, name, recipe)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "error: exactly one configuration is needed (command line); got none; expected one"),
        (
            ["toy.yaml", "scenes"],
            "error: exactly one configuration is needed (command line); got toy.yaml, scenes; expected one",
        ),
        (
            ["toy.yaml", "--config", "scenes"],
            "error: exactly one configuration is needed (command line); got toy.yaml, scenes;",
        ),
        (
            ["nothing"],
            "error: no such configuration (nothing); expected a .yaml file, or one of celebahq_vq4",
        ),
        (["kl_f8", "--stage", "2"], "error: no such configuration (kl_f8); expected a .yaml file, or one of celebahq"),
        (
            ["toy.yaml", "--stage", "2"],
            "error: --stage: this configuration trains another (toy.yaml); got 2; expected autoencoder",
        ),
        (["toy.yaml", "--minutes", "0"], "error: out of range (--minutes); got 0.0; expected more than 0"),
        (["toy.yaml", "data.resolution=15"], "error: data.resolution: not divisible by the autoencoder's factor"),
        (["toy.yaml", "trainer.devices=3"], "error: a batch cannot be split evenly"),
    ],
)
def test_refusals_come_before_any_work(words, error, capsys):
    assert main(["doctor", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number, tmp_path):
    """The fixture looks for what is left."""
    if not (pid := os.fork()):
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(main(["doctor", "toy.yaml", "trainer.steps=100000", "--minutes", "5"]))
        finally:
            os._exit(1)
    waiting.until(lambda: list(tmp_path.glob("scratch/*/checkpoints")))
    os.kill(pid, number)
    assert wait([pid]) == [128 + number]
