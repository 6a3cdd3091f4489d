"""Options reach what they are for."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ldm import checkpoint
from ldm.cli import config_file, evaluate, fetch, main
from ldm.config import schema as configuration
from ldm.draws import mix32, stream
from ldm.errors import DataError
from ldm.pipeline import SHIPPED, Pipeline
from ldm.scenes import judge_training
from ldm.training import doctor, run
from tests.training import toy
from tests.training.killing import toy_data

__all__ = ["toy_data"]


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 5), (3, [3, 2])])
def test_sample_batch_size(size, expected, tmp_path, monkeypatch):
    seen: list[int] = []

    def images(self, requests, *_):
        seen.append(len(requests))
        return [Image.new("RGB", (8, 8))] * len(requests)

    monkeypatch.setattr(Pipeline, "images", images)
    assert main(["sample", "--prompt", "a red cube", "-n", "5", "--batch-size", str(size), "--out", str(tmp_path)]) == 0
    assert seen == expected


def test_fetch_looks_at_what_is_there_already(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    target = fetch.cached(fetch.DOWNLOADS["vgg16"])
    target.parent.mkdir(parents=True)
    target.write_bytes(b"half of it")
    with pytest.raises(DataError, match="not the published weights"):
        fetch.fetch(fetch.DOWNLOADS["vgg16"])


def test_judge(tmp_path, monkeypatch):
    seen: dict[str, object] = {}

    def train(**numbers):
        seen.update(numbers)
        raise KeyboardInterrupt

    monkeypatch.setattr(judge_training, "train", train)
    options = ("--seed", "3", "--steps", "5", "--pictures", "7", "--out", str(tmp_path / "judge.safetensors"))
    assert main(["judge", *options]) == 130
    assert seen == {"seed": 3, "steps": 5, "pictures": 7, "device": "cpu"}


def test_doctor(tmp_path, monkeypatch):
    (tmp_path / "toy.yaml").write_text(toy.KL)
    seen: list[object] = []

    def examine(config, build, run, scratch, minutes):
        seen.extend((build(config), str(run), minutes))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "build", lambda config, loaded, start: start.init_from)
    monkeypatch.setattr(doctor, "examine", examine)
    assert (
        main(["doctor", str(tmp_path / "toy.yaml"), "--run", "R", "--minutes", "2", "--init-from", str(SHIPPED)]) == 130
    )
    assert seen == [str(SHIPPED), "R", 2.0]


def evaluated(tmp_path, monkeypatch, *words: str) -> tuple[dict, list[int]]:
    """The report of four samples that are not made, and the seeds that they were asked for with."""
    seeds: list[int] = []

    def images(self, requests, *_):
        seeds.extend(request.seed for request in requests)
        return [Image.new("RGB", (64, 64))] * len(requests)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Pipeline, "images", images)
    few = ("samples=4", "nearest=0", "data.batch_size=2", "data.workers=0")
    assert main(["evaluate", "--only", "samples", *few, "--out", str(tmp_path / "out"), *words]) == 0
    return json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8")), seeds


def test_evaluate(tmp_path, monkeypatch):
    found, seeds = evaluated(tmp_path, monkeypatch, "--precision", "bf16", "--sampler", "heun")
    assert seeds == [mix32(stream(1, "evaluation"), i) for i in range(4)]
    assert found["about"]["precision"]["sampling"] == "bfloat16"
    assert found["about"]["sampling"]["solver"]["type"] == "heun"


def test_evaluate_vae(tmp_path, monkeypatch):
    loaded = checkpoint.open(SHIPPED)
    state = {name: x for name, x in loaded.state.items() if name.startswith("autoencoder.")}
    state["autoencoder.decoder.conv_out.bias"] = state["autoencoder.decoder.conv_out.bias"] + 1
    checkpoint.save(tmp_path / "vae.safetensors", {"format": 1, "autoencoder": loaded.config["autoencoder"]}, state)
    words = ("--only", "first_stage", "--vae", str(tmp_path / "vae.safetensors"))
    assert evaluated(tmp_path, monkeypatch, *words)[0]["first_stage"]["psnr"]["mean"] < 20


def test_evaluate_training_seed():
    config = configuration.load(config_file("scenes", "evaluate"), ["seed=1", "training_seed=7"], evaluate.Schema)
    source, _, training = evaluate.references(config)
    assert (source.seed, training.seed) == (1, 7)
