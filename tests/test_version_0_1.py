"""Files that version 0.1 wrote open, sample and go on: tests/version_0_1/make.py made them with that version.

Only the command line and public functions are called here, so that the tests outlive every restructuring.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import re
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import checkpoint
from ldm.cli import main
from ldm.data.latents import Latents
from ldm.data.loader import loader

HERE = Path(__file__).parent / "version_0_1"
EXPECTED = json.loads((HERE / "expected.json").read_text())
CLOCKED = ("images_per_second", "tflops_per_second", "mfu")
MODELS = {  # each file and the words that its picture was made with
    "second_stage/model.safetensors": ["--prompt", "a large red sphere", "--negative", "a blue cube", "--cfg", "3"],
    "model_super_resolution.safetensors": ["--condition", "low.png"],
    "model_text_and_label.safetensors": ["--prompt", "a large red sphere", "--label", "1"],
    "model_external.safetensors": ["--prompt", "a large red sphere", "conditioner.weights=encoder"],
}


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """The archive's files, which nobody changes."""
    folder = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(HERE / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def files(unpacked, tmp_path, monkeypatch):
    """A copy of the files, as the current folder."""
    monkeypatch.delenv("RANK", raising=False)
    shutil.copytree(unpacked, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def processor() -> str:
    """What decides how sums are rounded."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def assert_same_rows(run: Path, expected: list[dict[str, str]]) -> None:
    """Bit for bit where torch and the processor are those of the stored losses, else up to rounding."""
    with open(run / "metrics.csv", encoding="utf-8") as file:
        found = [{name: x for name, x in row.items() if name not in CLOCKED} for row in csv.DictReader(file)]
    if (torch.__version__, processor()) == (EXPECTED["torch"], EXPECTED["processor"]):
        assert found == expected
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected):
        for name, x in theirs.items():
            assert ours[name] == x == "" or float(ours[name]) == pytest.approx(float(x), rel=1e-6, abs=1e-6), name


# --------------------------------------------------------------------------------------------------------- training


def test_a_first_stage_resumes_to_the_losses_of_version_0_1(files):
    assert main(["train-autoencoder", "--config", "first.yaml", "--run", "first_stage"]) == 0
    assert_same_rows(files / "first_stage", EXPECTED["first_stage"]["rows"])


def test_a_second_stage_resumes_to_the_losses_of_version_0_1(files):
    """By its own config.yaml, too, which says what the first stage was instead of where it is."""
    where = "autoencoder=first_stage/model.safetensors"
    assert main(["train-ldm", "--config", "second_stage/config.yaml", "--run", "second_stage", where]) == 0
    assert_same_rows(files / "second_stage", EXPECTED["second_stage"]["rows"])


def test_other_settings_are_no_resume(files, capsys):
    assert main(["train-ldm", "--config", "second.yaml", "--run", "second_stage", "optimizer.lr=2e-3"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ cache


def batch_digest(batch: dict) -> str:
    """Of latents, text states and numbers."""
    found = hashlib.sha256()
    tensors = [batch["latents"], batch["number"], batch["index"]]
    tensors += [x for name in sorted(batch["states"]) for _, x in sorted(batch["states"][name].items())]
    for x in tensors:
        found.update(torch.as_tensor(x).double().numpy().tobytes())
    return found.hexdigest()


def test_a_cache_gives_the_batches_of_version_0_1(files):
    batches = islice(loader(Latents(root="cache", batch_size=4), 3), 7)
    assert [batch_digest(batch) for batch in batches] == EXPECTED["cache"]["batches"]


def test_a_cache_is_complete_and_another_is_not_mixed_in(files, capsys):
    argv = ["cache", "--config", "cached.yaml", "--out", "cache", "--device", "cpu", "data.size=12"]
    before = {file.name: file.read_bytes() for file in Path("cache").iterdir()}
    assert main(argv) == 0
    assert {file.name: file.read_bytes() for file in Path("cache").iterdir()} == before
    assert main([*argv, "data.resolution=16"]) == 3
    assert "the cache is stale" in capsys.readouterr().err


def test_a_cache_trains_to_the_losses_of_version_0_1(files):
    data = "data={type: latents, root: cache, batch_size: 4, workers: 0}"
    short = ["trainer.steps=2", "trainer.validate_every=2", "--init-from", "model_external.safetensors"]
    assert main(["train-ldm", "--config", "cached.yaml", "--run", "run", data, *short]) == 0
    assert_same_rows(files / "run", EXPECTED["cache"]["rows"])


# --------------------------------------------------------------------------------------------------------- pictures


def picture_of(file: str) -> str:
    """The stored picture of a model."""
    return f"picture_{Path(file).parts[0].removesuffix('.safetensors').removeprefix('model_')}.png"


def distance(one: str | Path, other: str | Path) -> int:
    """The largest difference of two pictures' pixels, of 255."""
    a, b = (np.asarray(Image.open(file)).astype(int) for file in (one, other))
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("file", MODELS)
def test_a_file_makes_the_picture_of_version_0_1(file, files):
    made = ["--out", "out", "--device", "cpu", "--precision", "fp32", "--seed", "5"]
    assert main(["sample", "--ckpt", file, *MODELS[file], *made]) == 0
    (picture,) = Path("out").glob("*.png")
    assert distance(picture, picture_of(file)) <= 1


@pytest.mark.parametrize("file", MODELS)
def test_a_picture_of_version_0_1_is_replayed(file, files, capsys):
    assert main(["replay", picture_of(file), "--device", "cpu", "--out", "again.png"]) == 0
    assert distance("again.png", picture_of(file)) <= 1
    with Image.open("again.png") as new, Image.open(picture_of(file)) as old:
        assert json.loads(new.text["ldm"])["checkpoint"] == json.loads(old.text["ldm"])["checkpoint"]


def test_an_encoder_that_a_file_leaves_out_is_asked_for(files, capsys):
    assert main(["sample", "--ckpt", "model_external.safetensors", "--prompt", "a cube", "--out", "out"]) == 4
    assert "conditioner.weights=FOLDER" in capsys.readouterr().err
    assert main(["sample", "--ckpt", "model_external.safetensors", "conditioner.weights=first_stage"]) != 0


@pytest.mark.parametrize("file", ["first_stage/model.safetensors", *MODELS])
def test_what_a_file_says_of_itself(file, files):
    opened = checkpoint.open(file)
    assert opened.config["format"] == 1
    assert opened.config["fingerprint"] == checkpoint.open("first_stage/model.safetensors").config["fingerprint"]
    assert all(x.isfinite().all() for x in opened.state.values())
    if "backbone" in opened.config:
        more = ["conditioner.weights=encoder"] * ("external" in file)
        assert ldm.load(file, overrides=more, device="cpu").autoencoder.fingerprint() == opened.config["fingerprint"]
