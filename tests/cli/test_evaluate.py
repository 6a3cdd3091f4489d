"""`ldm evaluate` measures any checkpoint, says how, and refuses what would measure nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm
from ldm import checkpoint
from ldm.cli import main
from ldm.diffusion.bound import bits_per_dim
from ldm.metrics.images import psnr
from ldm.pictures import to_float, to_pil
from ldm.pipeline import SHIPPED
from ldm.scenes import captions, draw, render
from ldm.scenes.verifier import KINDS, PromptSet
from tests import forking
from tests.cli.test_sample import LABEL, write_model

ROOT = Path(__file__).parents[2]
FEW = ["samples=12", "training.size=20", "nearest=2", "prompts=1", "cfg=[1, 2]", "solvers=[ddim]", "steps=[1]"]
QUICK = ["--steps", "2", "--cfg", "2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def evaluate(out, *words: str) -> dict:
    """What it found."""
    assert main(["evaluate", "--out", str(out), *words]) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_the_shipped_model_gets_a_page(tmp_path, capsys):
    found = evaluate(tmp_path / "one", *QUICK, *FEW)
    printed = capsys.readouterr().out
    for part in ("first_stage", "yardsticks", "samples", "nearest", "prompts", "steps"):
        assert f"{part}: " in printed
    assert found["about"]["checkpoint"]["sha256"] == checkpoint.open(SHIPPED).hash
    sampling = found["about"]["sampling"]
    assert (sampling["spacing"]["steps"], sampling["guidance"]["cfg"]) == (2, 2)
    assert found["about"]["features"]["resize"] == "64x64, bilinear, antialiased"
    assert found["samples"]["made"] == found["samples"]["true"] == 12
    assert found["samples"]["indicative"] is True  # twelve pictures are few
    assert found["yardsticks"]["two true sets"] > 0
    assert [row["cfg"] for row in found["prompts"]] == [1, 2]
    assert {kind["whole"][1] for kind in found["prompts"][0]["alignment"].values()} == {1}
    assert [(row["solver"], row["steps"]) for row in found["steps"]] == [("ddim", 1)]
    assert {kind["whole"][1] for kind in found["steps"][0]["alignment"].values()} == {1}
    page = (tmp_path / "one" / "index.html").read_text()
    assert page.count("data:image/png;base64,") >= 12
    assert "http://www.w3.org/2000/svg" in page
    assert 'src="http' not in page
    assert "href" not in page  # it needs nothing beside it
    assert list((tmp_path / "cache" / "ldm" / "features").glob("*.safetensors"))
    again = evaluate(tmp_path / "two", *QUICK, *FEW, "--only", "samples")
    for each in (found, again):
        each["samples"].pop("seconds")
    assert again["samples"] == found["samples"]
    assert "prompts" not in again


@pytest.mark.long
def test_two_processes_find_what_one_finds(tmp_path):
    """Of seven pictures, two at a time: one has four, the other three."""
    words = ["--only", "samples", "samples=7", "nearest=0", "data.batch_size=2", "--steps", "1"]
    argv = ["evaluate", "--out", str(tmp_path / "two"), *words]
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    assert forking.wait(forking.ranks([partial(main, argv)] * 2, logs)) == [0, 0], [log.read_text() for log in logs]
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    one = evaluate(tmp_path / "one", *words)
    for name in ("prompts", "alignment", "made"):
        assert one["samples"][name] == two["samples"][name]
    for name in ("frechet", "precision", "recall", "density", "coverage"):
        assert one["samples"][name] == pytest.approx(two["samples"][name], rel=1e-3)


def test_a_first_stage_alone_is_measured_by_hand(tmp_path):
    """Its PSNR is that of pictures sent through the network by hand."""
    loaded = checkpoint.open(SHIPPED)
    config = {"format": 1, "autoencoder": loaded.config["autoencoder"]}
    state = {name: x.float() for name, x in loaded.state.items() if name.startswith("autoencoder.")}
    checkpoint.save(tmp_path / "first.safetensors", config, state)
    found = evaluate(tmp_path / "report", "--ckpt", str(tmp_path / "first.safetensors"), "samples=4", "nearest=0")
    from ldm.checkpoint.networks import autoencoder_of

    size = 1_000_000
    x = to_float(render(draw(1, [i * size // 4 for i in range(4)], "validation"), 64)["image"])
    autoencoder = autoencoder_of(config["autoencoder"], state)
    y = ((autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert found["first_stage"]["psnr"]["mean"] == pytest.approx(psnr(x, y).mean().item(), abs=1e-3)
    assert found["first_stage"]["frechet"] > 0
    assert "samples" not in found


@pytest.mark.long
def test_photographs_are_compared_with_inception_of_a_file(tmp_path):
    from ldm.metrics.inception import Inception

    torch.manual_seed(0)
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(to_pil(to_float(render(draw(3, range(6)), 64)["image"]))):
        image.save(tmp_path / "photos" / f"{number}.png")
    words = ["--config", "images", f"data.root={tmp_path / 'photos'}", "data.resolution=64", "data.batch_size=2"]
    words += ["data.workers=0", "samples=3", f"features.weights={tmp_path / 'inception.pth'}", *QUICK]
    words += ["--only", "samples"]  # an sFID takes seconds
    found = evaluate(tmp_path / "report", *words)
    assert found["about"]["features"]["resize"] == "299x299, tensorflow"
    assert found["samples"]["sfrechet"] > 0
    assert "alignment" not in found["samples"]
    assert "two true sets" in found["yardsticks"]  # the three pictures that lie between


def test_a_model_of_pixels_has_a_bound(tmp_path):
    """That of the core's function, with other noise."""
    unet = "backbone={type: unet, channels: 32, multipliers: [1], blocks: 1, heads: 1, attend: []}"
    small = ["size=8", "data={type: scenes, resolution: 8, batch_size: 4, workers: 0}", "trainer.steps=1", unet]
    small += ["path.steps=20", "spacing.steps=20", "trainer.precision=32-true"]
    assert main(["train-ldm", "--config", "ddpm_cifar10", "--run-dir", str(tmp_path / "run"), *small]) == 0
    file = str(tmp_path / "run" / "model.safetensors")
    found = evaluate(tmp_path / "report", "--ckpt", file, "data.resolution=8", "samples=8", "nearest=0", "bound=8")
    x = to_float(render(draw(1, [i * 1_000_000 // 8 for i in range(8)], "validation"), 8)["image"])
    bound = bits_per_dim(ldm.load(file).denoiser, x, lambda: torch.randn(x.shape)).total
    assert found["bound"]["mean"] == pytest.approx(bound.mean().item(), rel=0.05)
    assert found["bound"]["error"] > 0


def test_a_perfect_model_is_found_perfect(tmp_path, monkeypatch):
    """True renders in the place of its pictures: nothing is wrong, nothing apart, and copies are found."""
    size, split, seed = 40, "train", 0  # the pictures that are compared with are those that were learned from
    told = []

    def rendered(pipe, requests, recipe, on_step=None):
        told.extend(request.prompt for request in requests)
        return to_pil(to_float(torch.stack([true[request.prompt] for request in requests])))

    true = {}
    for which in KINDS.values():
        asked = PromptSet(10, *which, seed)
        true |= zip(asked.captions, render(asked.table, 64)["image"])
    table = draw(seed, range(size), split)
    true |= zip(captions(table, seed, range(size)), render(table, 64)["image"])
    monkeypatch.setattr(ldm.Pipeline, "images", rendered)
    same = f"{{type: scenes, resolution: 64, batch_size: 8, split: {split}, size: {size}, workers: 0}}"
    words = [f"data={same}", f"training={same}", f"seed={seed}", "samples=20", "nearest=3", "prompts=10", "cfg=[1]"]
    found = evaluate(tmp_path / "report", *words, "--only", "samples", "--only", "prompts")
    assert told[0] == captions(table, seed, range(size))[0]
    assert found["samples"]["frechet"] == pytest.approx(0, abs=1e-4)
    assert found["samples"]["precision"] == found["samples"]["recall"] == found["samples"]["coverage"] == 1
    right, of = found["samples"]["alignment"]["whole"]
    assert (of, right >= 19) == (20, True)
    assert [apart for (apart,) in found["nearest"]] == pytest.approx([0, 0, 0], abs=1e-4)
    for kind in found["prompts"][0]["alignment"].values():  # the judge errs in one of a hundred
        assert (kind["whole"][1], kind["whole"][0] >= 9) == (10, True)
    assert found["prompts"][0]["frechet"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["inpainting", "super_resolution"])
def test_what_a_model_is_told_beside_texts_is_made_from_the_pictures(name, tmp_path, monkeypatch):
    """Masks and small pictures; what a mask leaves stays as it was, to the byte."""
    unet = "backbone={type: unet, channels: 32, multipliers: [1], blocks: 1, heads: 1, attend: []}"
    small = ["size=64", "data={type: scenes, resolution: 64, batch_size: 4, workers: 0}", "trainer.steps=1", unet]
    words = ["--config", name, "--run-dir", str(tmp_path / "run"), f"autoencoder={SHIPPED}", *small]
    assert main(["train-ldm", *words, "trainer.precision=32-true"]) == 0
    recipes, made = [], []
    images = ldm.Pipeline.images

    def listened(pipe, requests, recipe, on_step=None):
        recipes.append(recipe)
        made.append(images(pipe, requests, recipe, on_step))
        return made[-1]

    monkeypatch.setattr(ldm.Pipeline, "images", listened)
    file = str(tmp_path / "run" / "model.safetensors")
    found = evaluate(tmp_path / "report", "--ckpt", file, "--only", "samples", "samples=4", "nearest=0", *QUICK)
    assert found["samples"]["frechet"] > 0
    (recipe,), (painted,) = recipes, made
    true = render(draw(1, [i * 250_000 for i in range(4)], "validation"), 64)["image"]  # (4, 3, 64, 64) bytes
    if name == "super_resolution":
        small = torch.nn.functional.avg_pool2d(to_float(true), 4)
        torch.testing.assert_close(recipe.inputs["low_resolution"], small)
        return
    mask = recipe.inputs["mask"] > 0  # (4, 1, 64, 64)
    assert {bool(each.any()) for each in mask} == {True}
    assert len({each.sum().item() for each in mask}) > 1  # each has its own
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in painted])
    assert torch.equal(pixels.where(~mask, 0), true.where(~mask, 0))
    assert not torch.equal(pixels, true)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["samples=1"], "error: samples: out of range (command line); got 1; expected at least 2"),
        (["data={type: images, root: .}"], "error: data.resolution: missing"),
        (
            ["data={type: images, root: ., resolution: 64, batch_size: 2}"],
            "error: prompts: these captions cannot be verified (",
        ),
        (["solvers=[fast]"], "error: solvers: unknown (command line); got fast; expected ddim, "),
        (["steps=[0]"], "error: steps: out of range (command line); expected at least 1 each"),
        (["training=null"], "error: nearest: needs `training`"),
        (["samples=3000000"], "error: samples: more than the data have (command line); got 3000000; expected at most"),
        (
            ["data.resolution=32", "--only", "samples", "samples=2", "nearest=0"],
            "error: data.resolution: differs from",
        ),
        (["features.type=inception"], "error: features.weights: no such file"),
        (["features={type: dinov2, weights: nowhere}"], "error: features.weights: no such model (nowhere)"),
        (["clip={model: ViT-B-32, weights: nowhere.pt}"], "error: clip.weights: no such file (nowhere.pt)"),
        (
            ["bound=2"],
            "error: bound: this model has none (command line); got latents; expected a pixel-space model",
        ),
        (["cfg=[]"], "error: cfg: none given (command line); expected one or more"),
        (["bound=1"], "error: bound: too few pictures (command line); got 1"),
        (["--only", "bound"], "error: nothing to measure (--only); got bound; expected one that this model has: "),
        (["cfg=[.nan]"], "error: cfg.0: wrong value (command line); got NaN"),
        (["--only", "prompts", "data.resolution=32", "samples=2"], "error: data.resolution: differs from"),
        (
            ["--config", "images", "data.root=photos", "features.type=judge"],
            "error: no such folder or file (data.root)",
        ),
        (["--sampler", "fast"], "error: sampler: unknown"),
        (["--ckpt", "nowhere.safetensors"], "error: "),
    ],
)
def test_what_would_measure_nothing_is_one_line(tmp_path, capsys, words, error):
    assert main(["evaluate", "--out", str(tmp_path / "report"), *words]) in (2, 4)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(error)


def test_pictures_without_what_a_model_reads_are_refused(tmp_path, capsys):
    file = str(write_model(tmp_path / "label.safetensors", LABEL))
    words = ["--out", str(tmp_path / "report"), "--only", "samples", "samples=2", "nearest=0", "prompts=0"]
    assert main(["evaluate", "--ckpt", file, *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: data: missing a condition that this model reads (")
    assert said.endswith("; got no label; expected data with it")
