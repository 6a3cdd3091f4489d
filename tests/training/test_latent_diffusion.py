"""The second stage's training against a loop written out by hand, and on two processes against one."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.cli import main
from ldm.data.loader import loader
from ldm.draws import draw, stream
from tests.training.killing import assert_same_after_kills, manifest, rows, start, wait
from tests.training.rounding import drift
from tests.training.second_stage import FEW_TENSORS, cached, command, loop_of, recipe_of

DOUBLE = ["trainer.precision=64-true"]
V = ["path={type: scaled_linear}", "prediction.type=v", "draw={type: uniform}", "weight={type: min_snr}"]
SPACING = ["spacing={type: leading, steps: 3}", "solver={type: ddim}"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def state_of(run) -> dict[str, torch.Tensor]:
    """Everything in a run's newest checkpoint."""
    return load_file(sorted(run.glob("checkpoints/*/state.safetensors"))[-1])


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], within: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------- by hand


def flow(u, x0, noise):
    """Rectified flow at t = sigmoid(n): its x, what the network is told, its target and weight."""
    t = torch.sigmoid(torch.special.ndtri(u))[:, None, None, None]
    return (1 - t) * x0 + t * noise, 1000 * t.flatten(), noise - x0, torch.ones(len(u))


def v(u, x0, noise):
    """v-prediction on Stable Diffusion's betas with min-SNR weights, as Hang et al. write them."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    k = (u * 1000).long()
    a, s = abar[k].sqrt()[:, None, None, None], (1 - abar[k]).sqrt()[:, None, None, None]
    snr = abar[k] / (1 - abar[k])
    return a * x0 + s * noise, k, a * noise - s * x0, snr.clamp(max=5) / (snr + 1)


def by_hand(recipe, steps: int, formula):
    """The same training, written out: backbone, text encoder and their averages after so many steps."""
    networks = [copy.deepcopy(m).double() for m in (recipe.denoiser.backbone, recipe.conditioner, recipe.autoencoder)]
    backbone, text, autoencoder = networks
    parameters = {f"denoiser.backbone.{name}": p for name, p in backbone.named_parameters()}
    parameters |= {f"conditioner.{name}": p for name, p in text.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    averages = {name: p.detach().clone() for name, p in parameters.items()}
    for step, batch in zip(range(steps), loader(recipe.data, 3)):
        x0 = autoencoder.encode((batch["image"] / 127.5 - 1).double()).detach()
        u, noise = draw(stream(3, "loss"), batch["number"].tolist(), 2, (4, 8, 8))
        captions = ["" if row[1] < 0.3 else caption for row, caption in zip(u.tolist(), batch["caption"])]
        x, t, target, weight = formula(u[:, 0], x0, noise.double())
        told = text.encode(text.tokenize(captions))
        squares = (backbone(x, t.float(), told.tokens, told.mask) - target).square()
        loss = sum(w * each.mean() for w, each in zip(weight, squares)) / len(x)
        optimizer.zero_grad()
        loss.backward()
        rate = (step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos((step - 2) / (steps - 2) * math.pi))
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.step()
        decay = min(0.9, (2 + step) / (11 + step))
        averages = {name: decay * averages[name] + (1 - decay) * p.detach() for name, p in parameters.items()}
    return parameters, averages


@pytest.mark.parametrize(("formula", "overrides"), [(flow, []), (v, [*V, *SPACING])], ids=["flow", "v"])
def test_training_is_the_loop_written_out_by_hand(formula, overrides, tmp_path):
    overrides = [*DOUBLE, *overrides, "trainer.steps=5"]
    assert main(command(tmp_path / "run", *overrides)[:-1]) == 0
    parameters, averages = by_hand(recipe_of(tmp_path, *overrides), 5, formula)
    trained, within = state_of(tmp_path / "run"), drift(5, terms=8 * 8 * 8)  # places of a batch's latents
    for name, p in parameters.items():
        torch.testing.assert_close(trained[f"model/{name}"], p.detach(), rtol=0, atol=within)
        torch.testing.assert_close(trained[f"ema/{name}"], averages[name], rtol=0, atol=within)
    assert {name.partition(".")[0] for name in trained if name.startswith("model/")} == {
        "model/denoiser",
        "model/conditioner",
    }


CLIP = "conditioner={type: clip, width: 32, layers: 1, heads: 2, length: 24, vocabulary: 600, weights: random}"


def test_a_frozen_encoder_is_not_trained_nor_in_checkpoints(tmp_path):
    assert main(command(tmp_path / "run", CLIP, "trainer.steps=2")[:-1]) == 0
    assert not [name for name in state_of(tmp_path / "run") if "conditioner" in name or "autoencoder" in name]
    exported = load_file(tmp_path / "run" / "model.safetensors")
    before = recipe_of(tmp_path, CLIP).conditioner.state_dict()
    assert before
    for name, x in before.items():
        assert torch.equal(x, exported[f"conditioner.{name}"])


def test_a_frozen_encoder_that_a_run_began_with_stays(tmp_path):
    """Whatever the configuration would begin with next time: checkpoints hold no frozen weights."""
    assert main(command(tmp_path / "first", CLIP, "seed=4", "trainer.steps=1")[:-1]) == 0
    first, run = tmp_path / "first/model.safetensors", tmp_path / "run"
    began = command(run, CLIP, "schedule.type=constant", "--init-from", str(first))[:-1]
    for steps in (1, 2):
        assert main([*began, f"trainer.steps={steps}"]) == 0
    theirs, ours = (load_file(file) for file in (first, run / "model.safetensors"))
    names = [name for name in theirs if name.startswith("conditioner.")]
    own = recipe_of(tmp_path, CLIP).conditioner.state_dict()
    assert any(not torch.equal(own[name.removeprefix("conditioner.")], theirs[name]) for name in names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_all_of_a_batch_is_moved_but_its_numbers(tmp_path):
    """Also the states of a cache, which are dictionaries in a dictionary."""
    batch = {"number": torch.zeros(2), "latents": torch.zeros(2), "caption": ["", ""]}
    batch |= {"states": {"caption": {"tokens": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.bool)}}}
    to_device = loop_of(tmp_path).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(to_device["number"], np.ndarray)  # a tensor would be moved by DistributedDataParallel
    assert to_device["latents"].device.type == "meta"
    assert {x.device.type for x in to_device["states"]["caption"].values()} == {"meta"}
    assert to_device["caption"] == batch["caption"]


def test_micro_batches_are_one_batch(tmp_path):
    for count in (1, 4):
        assert main(command(tmp_path / str(count), *DOUBLE, f"trainer.accumulate={count}")[:-1]) == 0
    assert_near(state_of(tmp_path / "1"), state_of(tmp_path / "4"))


def test_a_cache_trains_as_its_pictures_do(tmp_path):
    """In float64 from latents stored in float32."""
    argv = command(tmp_path / "unused")
    config = argv[argv.index("--config") + 1]
    folder = str(tmp_path / "cache")
    assert main(["cache", "--config", config, "--out", folder, "--device", "cpu", "--dtype", "fp32"]) == 0
    data = f"data={{type: latents, root: {folder}, batch_size: 8}}"
    for name, overrides in {"online": [], "cached": [data]}.items():
        assert main(command(tmp_path / name, *DOUBLE, *overrides, "trainer.steps=3")[:-1]) == 0
    ours, theirs = rows(tmp_path / "online"), rows(tmp_path / "cached")
    for name in ("loss/loss", "val/loss", "val/level_0"):
        assert [row[name] and float(row[name]) for row in ours] == [
            row[name] and pytest.approx(float(row[name]), rel=1e-5) for row in theirs
        ]


# ------------------------------------------------------------------------------------------- on several processes


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "accumulate"), [("ddp", 2), ("fsdp2", 1), ("fsdp2", 2)])
def test_two_processes_are_one(strategy, accumulate, tmp_path):
    """Also where a validation with the averaged weights comes between two steps, and no checkpoint after it."""
    between = ["trainer.validate_every=3", "trainer.save_every=100", "trainer.channels_last=true"] * (accumulate == 1)
    between += ["trainer.steps=6", *FEW_TENSORS]
    one = command(tmp_path / "one", *DOUBLE, *between)
    evenly_spaced = ["trainer.devices=2", f"trainer.strategy={strategy}", f"trainer.accumulate={accumulate}"]
    two = command(tmp_path / "two", *DOUBLE, *between, *evenly_spaced)
    assert wait(start(one)) == [0], (tmp_path / "one.log").read_text()
    assert wait(start(two, ranks=2)) == [0, 0], (tmp_path / "two.log").read_text()
    assert_near(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    assert_near(*(load_file(tmp_path / run / "model.safetensors") for run in ("one", "two")))
    assert manifest(tmp_path / "two")["step"] == 6
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        for name in a:
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), abs=1e-8, rel=1e-8)


def test_two_processes_are_one_in_float32(tmp_path):
    """By gradient descent: Adam's first steps divide rounding by rounding."""
    sgd = ["optimizer={type: sgd, lr: 1e-2}", "trainer.steps=5"]
    one = command(tmp_path / "one", *sgd)
    two = command(tmp_path / "two", *sgd, "trainer.devices=2", "trainer.strategy=ddp")
    assert wait(start(one)) == [0], (tmp_path / "one.log").read_text()
    assert wait(start(two, ranks=2)) == [0, 0], (tmp_path / "two.log").read_text()
    ours, theirs = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert_near(ours, theirs, within=1e-6)
    begun = recipe_of(tmp_path, *sgd).denoiser.backbone.out.weight
    assert (ours["model/denoiser.backbone.out.weight"] - begun).abs().max() > 1e-4


@pytest.mark.long
def test_begun_sharded_on_two_goes_on_alone(tmp_path):
    overrides, run = [*DOUBLE, *FEW_TENSORS, "schedule.type=constant", "trainer.steps=6"], tmp_path / "run"
    begun = command(run, *overrides, "trainer.steps=3", "trainer.devices=2", "trainer.strategy=fsdp2")
    assert wait(start(begun, ranks=2)) == [0, 0], (tmp_path / "run.log").read_text()
    assert wait(start(command(run, *overrides))) == [0], (tmp_path / "run.log").read_text()
    assert wait(start(command(tmp_path / "once", *overrides))) == [0]
    assert_near(state_of(tmp_path / "once"), state_of(run))


# -------------------------------------------------------------------------------------------------------- killed


@pytest.mark.long
def test_killed_twice_on_a_cache_in_accumulation(tmp_path):
    overrides = [*cached(tmp_path), "trainer.accumulate=4", "trainer.validate_every=20"]
    assert_same_after_kills(tmp_path, 2, overrides, steps=30, begin=command)


@pytest.mark.slow
def test_killed_ten_times_on_a_cache_with_workers_and_accumulation(tmp_path):
    overrides = [*cached(tmp_path), "trainer.accumulate=4", "data.workers=2", "trainer.validate_every=50"]
    assert_same_after_kills(tmp_path, 10, overrides, steps=200, begin=command)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["trained", "frozen"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["pictures", "cache"])
def test_killed_three_times(text, workers, source, tmp_path):
    clip = "conditioner={type: clip, width: 32, layers: 1, heads: 2, length: 32, drop: 0.3, weights: random}"
    overrides = [clip] if text == "frozen" else []
    overrides = cached(tmp_path, *overrides) if source == "cache" else overrides
    more = [f"data.workers={workers}", "trainer.validate_every=20"]
    assert_same_after_kills(tmp_path, 3, [*overrides, *more], begin=command)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_killed_three_times_on_two_processes(strategy, tmp_path):
    overrides = [f"trainer.strategy={strategy}", "trainer.validate_every=20"]
    assert_same_after_kills(tmp_path, 3, overrides, ranks=2, begin=command)


@pytest.mark.long
def test_float16_is_near_and_goes_on_where_it_stopped(tmp_path):
    """Its scale is a counter like the others."""
    half = ["trainer.precision=16-mixed", "schedule.type=constant"]
    assert main(command(tmp_path / "whole", "schedule.type=constant", "trainer.steps=4")[:-1]) == 0
    assert main(command(tmp_path / "once", *half, "trainer.steps=4")[:-1]) == 0
    for steps in (2, 4):
        assert main(command(tmp_path / "run", *half, f"trainer.steps={steps}")[:-1]) == 0
    assert manifest(tmp_path / "run")["sha256"] == manifest(tmp_path / "once")["sha256"]
    assert manifest(tmp_path / "run")["scaled"] == 4
    ours, exact = (state_of(tmp_path / run) for run in ("once", "whole"))
    assert {x.dtype for x in ours.values()} == {torch.float32}
    for name, norm in [(row["val/loss"], row["grad_norm/denoiser"]) for row in rows(tmp_path / "once")][-1:]:
        expected = rows(tmp_path / "whole")[-1]
        assert float(name) == pytest.approx(float(expected["val/loss"]), rel=1e-2)
        assert float(norm) == pytest.approx(float(expected["grad_norm/denoiser"]), rel=2e-2)
    assert ours.keys() == exact.keys()
