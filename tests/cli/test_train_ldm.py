"""`ldm train-ldm`: what it says before it begins, and everything that it refuses before it writes."""

from __future__ import annotations

import json

import pytest

import ldm
from ldm import checkpoint
from ldm.cli import main
from ldm.scenes.source import Scenes
from tests.data.photographs import photograph
from tests.training.second_stage import cached, command, first_stage

TEXT = "{type: joint_text, width: 32, layers: 1, heads: 2, vocabulary: "
SEGMENTS, BOXES = "conditioner={type: segmentation, classes: ", "conditioner={type: layout, width: 32, classes: "


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["autoencoder=missing.safetensors"], 4, "no such file (missing.safetensors)"),
        (["autoencoder={type: kl}"], 2, "autoencoder: has no weights"),
        (["conditioner=CKPT"], 4, "conditioner: not in this checkpoint"),
        (["path={type: scaled_linear, zero_terminal_snr: true}", "prediction.type=eps"], 2, "prediction.type: eps"),
        (
            ["prediction={type: learned_range, of: {type: eps}}", "path.type=cosine", "weight.type=min_snr"],
            2,
            "got min_snr; try constant",
        ),
        (["conditioner={type: label}"], 2, "data: no label, which the conditioner reads"),
        (["data.resolution=18"], 2, "data.resolution: not divisible by the networks' factor"),
        (["trainer.accumulate=3"], 2, "a batch cannot be split evenly"),
        (["seed=-1"], 2, "seed: out of range"),
        (["ema.decay=2"], 2, "ema.decay: out of range"),
        (["spacing.steps=0"], 2, "spacing.steps"),
        (["trainer={steps: 1, precision: 16-mixed, strategy: fsdp2, devices: 2}"], 2, "trainer.precision: FSDP2"),
        (["data={type: latents, root: nowhere, batch_size: 8}"], 3, "no cache (nowhere)"),
        (["prediction.type=v", "path.type=cosine", "solver={type: ddpm, noise_var: learned}"], 2, "solver.noise_var: "),
        ([f"conditioner={{type: compose, parts: [{TEXT}600}}, {TEXT}700}}]}}"], 2, "got 2 that differ; expected one"),
        ([SEGMENTS + "3}", "data.adds=[segmentation]"], 2, "segmentation: no such class; got 0 to 4; expected 0 to 2"),
        ([BOXES + "2, boxes: 8}", "data.adds=[boxes]"], 2, "box_labels: no such class"),
        ([BOXES + "4, boxes: 2}", "data.adds=[boxes]"], 2, "boxes: too many; got 3; expected at most 2"),
        (["--init-from", "CKPT"], 4, "--init-from: no denoiser in this file"),
        (["--run", "CKPT"], 2, "--run: not writable"),
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
    assert "captions: 38% are truncated to the text encoder's 30 tokens" in said
    assert "size: " not in said
    assert not (tmp_path / "run").exists()


def labelled(folder, labels: list[int]) -> str:
    """The node of pictures with these labels."""
    folder.mkdir()
    lines = []
    for i, label in enumerate(labels):
        photograph(32, 32, i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a ball", "label": label}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return f"data={{type: images, root: {folder}, resolution: 16, batch_size: 8, workers: 0}}"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (9, "label: no such class; got 9; expected 0 to 4"),
        (4, "label: is the null row; got 4"),
        (3, ""),
    ],
)
def test_labels_are_looked_at_before_training(label, words, tmp_path, monkeypatch, capsys):
    """All of them: the one that is wrong is not among the first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data = labelled(tmp_path / "pictures", [*[i % 4 for i in range(12)], label, *[0] * 27])
    label_of_5 = "conditioner={type: label, classes: 5, null: 4, width: 32}"
    assert main([*command(tmp_path / "run", data, label_of_5)[:-1], "--dry-run"]) == (2 if words else 0)
    assert words in capsys.readouterr().err


def test_what_a_conditioner_cannot_read_is_an_error_of_the_configuration(tmp_path, monkeypatch, capsys):
    batch = Scenes.batch
    floats = lambda *args: (made := batch(*args)) | {"segmentation": made["segmentation"].float()}  # noqa: E731
    monkeypatch.setattr(Scenes, "batch", floats)
    argv = command(tmp_path / "run", SEGMENTS + "5}", "data.adds=[segmentation]")[:-1]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: conditioner.segmentation: not a map of classes (command line); got float32")
    assert not (tmp_path / "run").exists()


def test_two_encoders_share_a_tokenizer_that_both_would_learn(tmp_path):
    argv = command(tmp_path / "run", f"conditioner={{type: compose, parts: [{TEXT}600}}, {TEXT}600}}]}}")[:-1]
    assert main([*argv, "trainer.steps=1"]) == 0
    pipe = ldm.load(tmp_path / "run" / "model.safetensors", device="cpu")
    first, second = (member.require_tokenizer().to_json() for member in pipe.conditioner.members)
    assert first == second
    assert pipe("a red ball", steps=2, cfg=1)


def test_another_size_than_the_data_s_is_said(tmp_path, capsys):
    assert main([*command(tmp_path / "run", "size=32")[:-1], "--dry-run"]) == 0
    assert "size: sample.py will make 32x32 pictures; the data have 16x16; try size=16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["path.type=ve", "prediction.type=edm"], "path.sigma_data: latents have a standard deviation of 1, not 0.5"),
        (["path.type=ve", "prediction.type=edm", "path.sigma_data=1"], ""),
        (
            ["path={type: linear, zero_terminal_snr: true}", "prediction.type=v", "weight.type=min_snr"],
            "weight: the loss at pure noise, where sampling starts, has weight 0",
        ),
        (["path.type=linear", "prediction.type=v", "weight.type=min_snr"], ""),
    ],
)
def test_noise_that_does_not_suit_is_said(overrides, said, tmp_path, capsys):
    assert main([*command(tmp_path / "run", *overrides)[:-1], "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert said or not ("sigma_data" in out or "weight: " in out)


def test_a_denoiser_of_pictures_is_none_of_latents(tmp_path, capsys):
    argv = command(tmp_path / "run", "trainer.steps=1")[:-1]
    assert main(argv) == 0
    loaded = checkpoint.open(tmp_path / "run" / "model.safetensors")
    assert loaded.config["fingerprint"]
    for name, stored in {"ours": {"fingerprint": None}, "theirs": {}}.items():
        config = {key: x for key, x in loaded.config.items() if key != "fingerprint"} | stored
        checkpoint.save(tmp_path / f"{name}.safetensors", config, loaded.state, loaded.tokenizer)
    begin = [*command(tmp_path / "again")[:-1], "--dry-run", "--init-from"]
    assert main([*begin, str(tmp_path / "ours.safetensors")]) == 4
    assert "autoencoder: not the one the denoiser was trained with" in capsys.readouterr().err
    assert main([*begin, str(tmp_path / "theirs.safetensors")]) == 0


def test_another_first_stage_than_the_run_s_or_the_cache_s_is_refused(tmp_path, capsys):
    overrides = [*cached(tmp_path), "trainer.steps=1"]
    online = command(tmp_path / "run", "trainer.steps=1")[:-1]
    assert main(online) == 0
    first_stage(tmp_path / "first.safetensors", seed=1)
    assert main([*online, "trainer.steps=2"]) == 4
    assert "autoencoder: not the one the denoiser was trained with" in capsys.readouterr().err
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
    assert "--run: no checkpoint to resume from, only exported weights" in error
    assert f"try --init-from {released / 'model.safetensors'} and another --run" in error


def test_print_config_has_the_first_stage_in_its_place(tmp_path, capsys):
    assert main([*command(tmp_path / "run")[:-1], "--print-config"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["autoencoder"]["channels"] == 32
    assert values["trainer"]["accumulate"] == 1
