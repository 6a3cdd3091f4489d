"""`ldm train-ldm`: what it says before it begins, and everything that it refuses before it writes."""

from __future__ import annotations

import json

import pytest

from ldm.cli import main
from tests.data.photographs import photograph
from tests.training.second_stage import cached, command, first_stage


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["autoencoder=missing.safetensors"], 4, "no such file (missing.safetensors)"),
        (["autoencoder={type: kl}"], 2, "autoencoder: has no weights"),
        (["conditioner=CKPT"], 4, "conditioner: none inside"),
        (["path={type: scaled_linear, zero_terminal_snr: true}", "prediction.type=eps"], 2, "prediction.type: eps"),
        (["conditioner={type: label}"], 2, "data: no label, which the conditioner reads"),
        (["data.resolution=18"], 2, "data.resolution: not divisible by the networks' factor"),
        (["trainer.accumulate=3"], 2, "a batch cannot be split evenly"),
        (["seed=-1"], 2, "seed: out of range"),
        (["ema.decay=2"], 2, "ema.decay: out of range"),
        (["spacing.steps=0"], 2, "spacing.steps"),
        (["trainer={steps: 1, precision: 16-mixed, strategy: fsdp2, devices: 2}"], 2, "trainer.precision: FSDP2"),
        (["data={type: latents, root: nowhere, batch_size: 8}"], 3, "no cache (nowhere)"),
        (["--init-from", "CKPT"], 4, "--init-from: no denoiser inside"),
        (["--run", "CKPT"], 2, "--run: cannot be written to"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(overrides, code, words, tmp_path, capsys):
    argv = command(tmp_path / "run")
    overrides = [word.replace("CKPT", str(tmp_path / "first.safetensors")) for word in overrides]
    assert main([*argv[:-1], *overrides]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_pictures_without_captions_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        photograph(32, 32, i).save(tmp_path / "pictures" / f"{i}.png")
    data = f"data={{type: images, root: {tmp_path / 'pictures'}, resolution: 16, batch_size: 8, workers: 0}}"
    assert main([*command(tmp_path / "run", data)[:-1]]) == 3
    assert "no caption" in capsys.readouterr().err


def test_captions_that_are_cut_off_are_counted_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        photograph(32, 32, i).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text("a ball " * (40 if i < 3 else 2))
    data = f"data={{type: images, root: {tmp_path / 'pictures'}, resolution: 16, batch_size: 8, workers: 0}}"
    assert main([*command(tmp_path / "run", data)[:-1], "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "dropped: caption 30% of samples" in said
    assert "captions: 3 are longer than the 30 tokens that are read of each" in said
    assert not (tmp_path / "run").exists()


def test_another_first_stage_than_the_run_s_or_the_cache_s_is_refused(tmp_path, capsys):
    overrides = [*cached(tmp_path), "trainer.steps=1"]
    online = command(tmp_path / "run", "trainer.steps=1")[:-1]
    assert main(online) == 0
    first_stage(tmp_path / "first.safetensors", seed=1)
    assert main([*online, "trainer.steps=2"]) == 4
    assert "autoencoder: not the one that the denoiser was trained with" in capsys.readouterr().err
    assert main(command(tmp_path / "other", *overrides)[:-1]) == 3
    assert "the cache is stale: autoencoder differs" in capsys.readouterr().err
    file = str(tmp_path / "run" / "model.safetensors")
    assert main([*command(tmp_path / "other")[:-1], "--init-from", file]) == 4
    assert "autoencoder: not the one" in capsys.readouterr().err


def test_weights_alone_are_no_run_to_go_on_with(tmp_path, capsys):
    argv = command(tmp_path / "run", "trainer.steps=1")[:-1]
    assert main(argv) == 0
    released = tmp_path / "released"
    released.mkdir()
    (tmp_path / "run" / "model.safetensors").rename(released / "model.safetensors")
    argv[argv.index("--run") + 1] = str(released)
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--run: weights alone are no run to go on with" in error
    assert f"try --init-from {released / 'model.safetensors'} and another --run" in error


def test_print_config_has_the_first_stage_in_its_place(tmp_path, capsys):
    assert main([*command(tmp_path / "run")[:-1], "--print-config"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["autoencoder"]["channels"] == 32
    assert values["trainer"]["accumulate"] == 1
