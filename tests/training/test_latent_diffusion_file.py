"""What a second stage's training hands over: one file that samples as it is, here and in diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import ldm
from ldm import checkpoint, pictures
from ldm.cli import main
from ldm.conditioning.tokenizer import BPE, clip_tokenizer
from ldm.models.autoencoder import Autoencoder
from tests.data.photographs import photograph
from tests.test_pipeline import ask_ours, ask_theirs, distance
from tests.training.second_stage import command, first_stage

CLIP = "conditioner={type: clip, width: 32, layers: 1, heads: 2, length: 77, weights: random}"
SD = ["path={type: scaled_linear}", "prediction.type=eps", "draw={type: uniform}", CLIP]
SD += ["spacing={type: leading, steps: 3}", "solver={type: ddim}", "trainer.steps=3"]


def same(a, b) -> int:
    """The largest difference of two pictures, in 1/255."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def test_the_file_makes_the_pictures_that_the_averages_made_in_memory(tmp_path, monkeypatch):
    made, decode = [], Autoencoder.decode

    def watched(self, z):
        made.append(decode(self, z))
        return made[-1]

    monkeypatch.setattr(Autoencoder, "decode", watched)
    assert main(command(tmp_path / "run", "trainer.steps=10", "optimizer.lr=1e-2")[:-1]) == 0
    file = tmp_path / "run" / "model.safetensors"
    shown = pictures.to_pil(made[-1])  # of the last validation
    captions = pictures.read(tmp_path / "run" / "samples" / "00000010.png").text["captions"].split("\n")
    pipe = ldm.load(file, device="cpu")
    again = pipe(captions, seed=0, batch_size=8)
    assert len(again) == len(shown) == 8
    assert max(same(a, b) for a, b in zip(again, shown)) <= 1
    assert max(same(a, b) for a, b in zip(again, shown[1:])) > 3
    ema = load_file(tmp_path / "run" / "checkpoints" / "00000010" / "state.safetensors")
    stored = load_file(file)
    for name, x in stored.items():
        if name.startswith("backbone."):
            assert torch.equal(x, ema[f"ema/denoiser.{name}"])
            assert not torch.equal(x, ema[f"model/denoiser.{name}"])


def test_the_file_needs_nothing_else_and_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "pictures").mkdir()
    for i, text in enumerate(["a red ball", "a blue ball"] * 20):
        photograph(16, 16, i).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(text)
    tokenizer = BPE.train(["a red ball", "a blue ball"], 530)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer.ids))
    (tmp_path / "tokenizer" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokenizer.merges))
    places = [f"data={{type: images, root: {tmp_path / 'pictures'}, resolution: 16, batch_size: 8, workers: 0}}"]
    places += [f"data.manifest={tmp_path / 'manifest'}", f"conditioner.tokenizer={tmp_path / 'tokenizer'}"]
    assert main(command(tmp_path / "run", "trainer.steps=2", *places)[:-1]) == 0
    assert str(tmp_path / "pictures") in (tmp_path / "run" / "config.yaml").read_text()
    assert str(tmp_path / "tokenizer") in (tmp_path / "run" / "config.yaml").read_text()
    loaded = checkpoint.open(tmp_path / "run" / "model.safetensors")
    assert str(tmp_path) not in (tmp_path / "run" / "model.safetensors").read_bytes().decode("latin-1")
    assert loaded.config["autoencoder"]["type"] == "kl"
    first = checkpoint.open(tmp_path / "first.safetensors")
    assert loaded.config["fingerprint"] == first.config["fingerprint"]
    for name, x in first.state.items():
        assert torch.equal(loaded.state[name], x)
    (tmp_path / "first.safetensors").unlink()
    assert ldm.load(tmp_path / "run" / "model.safetensors", device="cpu")("a red ball", steps=2, height=24)


def test_diffusers_makes_the_same_picture(tmp_path):
    argv = command(tmp_path / "run", *SD, "size=32", "optimizer.lr=1e-2")
    assert main(argv[:-1]) == 0
    ours = ldm.load(tmp_path / "run" / "model.safetensors", device="cpu")
    theirs = ours.to_diffusers()
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32}
    assert distance(ask_ours(ours, **size), ask_theirs(theirs, **size)) <= 1


def test_init_from_begins_with_the_weights_of_a_file(finished_second_stage, tmp_path, capsys):
    file = str(finished_second_stage / "model.safetensors")
    still = ["optimizer.lr=0", "trainer.steps=1", "--init-from", file]
    assert main(command(tmp_path / "second", *still)[:-1]) == 0
    before, after = load_file(file), load_file(tmp_path / "second" / "model.safetensors")
    for name, x in before.items():
        torch.testing.assert_close(after[name], x)
    assert main(command(tmp_path / "wide", "backbone.channels=64", "--init-from", file)[:-1]) == 4
    error = capsys.readouterr().err
    assert "tensors of another shape in the backbone" in error
    assert "encoder.0.main.weight (32, 4, 3, 3) for (64, 4, 3, 3)" in error
    *table, line = error[error.index("             tensor  ") :].splitlines()
    assert line.startswith("error: ")
    assert any(
        row.split()[2:] == ["encoder.0.main.weight", *["(64,", "4,", "3,", "3)", "(32,", "4,", "3,", "3)"]]
        for row in table
    )
    assert len(table) == 14
    no_denoiser = str(tmp_path / "first.safetensors")
    assert main(command(tmp_path / "none", "--init-from", no_denoiser)[:-1]) == 4
    assert "--init-from: no denoiser in this file" in capsys.readouterr().err


def test_a_published_file_is_believed_no_autoencoder_but_its_own(tmp_path, capsys):
    """It has no fingerprint; its path and prediction are told, for the weights know no others."""
    argv = command(tmp_path / "run", *SD, "trainer.steps=1", "schedule.type=constant")
    assert main(argv[:-1]) == 0
    ours = checkpoint.open(tmp_path / "run" / "model.safetensors")
    theirs = str(tmp_path / "theirs")
    checkpoint.write_diffusers(Path(theirs), ours.config, ours.state, clip_tokenizer())
    assert "fingerprint" not in checkpoint.open(theirs).config
    begun = [*SD[1:], "trainer.steps=1", "schedule.type=constant", "--init-from", theirs]
    its_own = f"autoencoder={theirs}"
    capsys.readouterr()
    assert main(command(tmp_path / "same", SD[0], its_own, *begun)[:-1]) == 0
    assert "--init-from" not in capsys.readouterr().out
    assert main(command(tmp_path / "otherwise", "path={type: linear}", its_own, *begun, "--dry-run")[:-1]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--init-from")]
    start = '--init-from: path is {"type": "scaled_linear", "start": 0.00085, '
    assert len(said) == 1
    assert said[0].startswith(start)
    first_stage(tmp_path / "other.safetensors", seed=1)
    other = f"autoencoder={tmp_path / 'other.safetensors'}"
    assert main(command(tmp_path / "another", SD[0], other, *begun)[:-1]) == 4
    line = capsys.readouterr().err
    assert line.startswith(f"error: autoencoder: not the one the denoiser was trained with ({theirs}); got ")
    assert line.endswith(f"; try autoencoder={theirs}\n")
    assert main(command(tmp_path / "same", SD[0], other, *begun)[:-1]) == 4
    assert capsys.readouterr().err.endswith("; try another --run\n")
