"""The doctor of a second stage: its latents, its captions, its costs, against numbers counted by hand."""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm import checkpoint
from ldm.cli import doctor as command
from ldm.cli import main, train
from ldm.training import cost, doctor
from ldm.training import trial as trials
from ldm.training.recipe import CaptionReport
from ldm.training.recipes.diffusion import DiffusionRecipe, Schema
from ldm.training.trial import follow
from tests.training import second_stage
from tests.training.killing import alone
from tests.training.second_stage import cached, first_stage, loop_of, recipe_of

ROOT = Path(__file__).parent.parent.parent
CLIP = "conditioner={type: clip, width: 32, layers: 1, heads: 2, length: 24, vocabulary: 600, weights: random}"
PIXELS = ["autoencoder=null", "conditioner=null", "guidance.cfg=1", "backbone.attend=[]"]


@pytest.fixture
def examined(tmp_path, monkeypatch):
    """A report of so many steps that no clock matters, from the command's own parts."""
    monkeypatch.setattr(trials, "TIMED", 3)
    monkeypatch.setattr(trials, "OVERFIT", 40)

    def examine(*overrides: str):
        argv = second_stage.command(tmp_path / "run")
        plan = plan_of(argv[argv.index("--config") + 1], *overrides)
        assert plan.recipe == "diffusion"
        config, _ = plan.load()
        scratch = Path(tempfile.mkdtemp(dir=tmp_path))
        report = doctor.examine(config, command.builder(plan), tmp_path / "run", scratch, minutes=10)
        assert not (tmp_path / "run").exists()
        return report

    return examine


def plan_of(config: str, *overrides: str) -> train.Plan:
    """What the command reads from these words."""
    parser = argparse.ArgumentParser()
    command.options(parser)
    return command.read_plan(parser.parse_args([config, *overrides]))


def within(loop, look):
    """What `look` returns for a loop in training."""

    def script(loop):
        found = look(loop)
        yield
        return found

    return follow(loop, script)


def kinds(report) -> dict[str, str]:
    """What is said of each thing but the loader, which is as fast as this machine happens to be."""
    return {name: finding.kind for finding in report.findings if (name := finding.text.split(":")[0]) != "loader"}


THINGS = ("data", "captions", "dropped", "latents", "memory", "disk", "resume", "one batch")


def test_all_is_well(examined):
    report = examined("optimizer.lr=3e-3", "conditioner.length=77")
    assert kinds(report) == dict.fromkeys(THINGS, "ok")
    assert [(phase.name, phase.first, phase.steps) for phase in report.trial.phases] == [("training", 0, 10)]
    rows = dict(row for row in (*command.data_rows(report), *command.cost_rows(report)) if row[0])
    assert rows["dropped"] == "caption 30% of samples"
    assert rows["latents"].startswith("8 samples: -")


def test_a_cache_is_examined_alike(examined, tmp_path):
    """Its states are of captions that nobody sees any more."""
    report = examined("optimizer.lr=3e-3", *cached(tmp_path, CLIP.replace("vocabulary: 600, ", "")))
    assert kinds(report) == dict.fromkeys([thing for thing in THINGS if thing != "captions"], "ok")
    assert dict(command.data_rows(report))["captions"] == "none"
    assert report.trial.latents.samples == 8


# -------------------------------------------------------------------------------------------------------- the data


def test_latents_are_those_that_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "PIECE", 3)
    loop = loop_of(tmp_path, "trainer.accumulate=2")
    found = within(loop, lambda loop: trials.measure_latents(loop, 60.0))
    batches = doctor.first_batch(loop)
    z = torch.cat([loop.recipe.latents(next(batches)) for _ in range(2)]).double().numpy()  # (8, 4, 8, 8)
    assert found == pytest.approx((8, z.min(), z.max(), z.mean(), z.std(ddof=1)), abs=1e-5)


def test_another_scale_of_latents_is_warned_of(examined, tmp_path):
    second_stage.command(tmp_path / "run")
    loaded = checkpoint.open(tmp_path / "first.safetensors")
    state = {name: x * 3 if name == "autoencoder.scale" else x for name, x in loaded.state.items()}
    node = {"format": 1, "autoencoder": loaded.config["autoencoder"]}
    checkpoint.save(tmp_path / "wrong.safetensors", node, state)
    report = examined(f"autoencoder={tmp_path}/wrong.safetensors", "trainer.steps=2")
    assert kinds(report)["latents"] == "warning"
    assert report.trial.latents.std == pytest.approx(3, abs=0.9)


def test_pixels_are_no_latents(tmp_path):
    loop = loop_of(tmp_path, *PIXELS)
    assert within(loop, lambda loop: trials.measure_latents(loop, 60.0)) is None
    assert loop.recipe.caption_report([]) is None


def test_captions_are_counted_in_the_encoder_s_tokens(tmp_path):
    recipe = recipe_of(tmp_path, "conditioner.length=8")
    tokenizer = recipe.conditioner.require_tokenizer()
    words = ["a", "red", "cube", "and", "a", "red", "cube", "and", "a", "red", "cube"]
    fits = next(n for n in range(len(words), 0, -1) if len(tokenizer.encode(" ".join(words[:n]))) <= 6)
    captions = ["", " ".join(words[:fits]), " ".join(words[: fits + 1]), " ".join(words)]
    expected = CaptionReport(max_tokens=6, truncated=2, drops={"caption": 0.3}, guided=True)
    assert recipe.caption_report(captions) == expected
    tokenizer.start = None  # as T5 has it: a token more is read
    assert recipe.caption_report(captions).max_tokens == 7


@pytest.mark.parametrize(
    ("empty", "captions", "expected"),
    [
        (10, CaptionReport(77, 10, {"caption": 0.1}, True), ["ok", "ok"]),
        (11, CaptionReport(77, 0, {"caption": 0.1}, True), ["warning", "ok"]),
        (0, CaptionReport(77, 11, {"caption": 0.1}, True), ["warning", "ok"]),
        (0, CaptionReport(77, 0, {"caption": 0.0}, True), ["ok", "warning"]),
        (0, CaptionReport(77, 0, {"caption": 0.0}, False), ["ok", "ok"]),
        (0, CaptionReport(0, 0, {"label": 0.1}, True), ["ok"]),
        (100, None, []),
    ],
)
def test_what_is_missing_from_captions_is_warned_of(empty, captions, expected, tmp_path):
    loop = loop_of(tmp_path)
    found = doctor.survey(loop, 0.01)
    found.captions, found.empty, found.caption_report = 100, empty, captions
    report = doctor.Report(loop.settings, 8)
    doctor.check_captions(report, found)
    assert [finding.kind for finding in report.findings] == expected


# ----------------------------------------------------------------------------------------------- memory and speed


def test_bytes_by_part_and_by_rank(tmp_path):
    """What is frozen has no gradients and is not sharded."""

    def look(loop):
        loop.settings.__dict__["strategy"] = "fsdp2"
        return cost.memory_of(loop, 1), cost.memory_of(loop, 4)

    loop = loop_of(tmp_path, CLIP)
    recipe = loop.recipe
    one, four = within(loop, look)
    trained = 4 * sum(p.numel() for p in recipe.denoiser.backbone.parameters())
    held = [x for m in (recipe.autoencoder, recipe.conditioner) for x in (*m.parameters(), *m.buffers())]
    frozen = sum(x.nbytes for x in held)
    buffers = sum(x.nbytes for x in recipe.denoiser.buffers())
    assert (one.weights, four.weights) == (trained + frozen + buffers, trained // 4 + frozen + buffers)
    assert (one.gradients, one.optimizer, one.averages) == (trained, 2 * trained, trained)
    assert (four.gradients, four.optimizer, four.averages) == (trained // 4, trained // 2, trained // 4)
    assert four.activations == one.activations


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_operations_are_an_encoding_and_three_passes_of_what_learns(checkpointing, tmp_path):
    """Less the gradients of latents and of times, which nobody asks for."""
    loop = loop_of(tmp_path, f"backbone.checkpointing={checkpointing}")
    recipe, text = loop.recipe, loop.recipe.conditioner
    x, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    with torch.no_grad():
        states = text.encode(text.tokenize(["a red cube"]))
        found, attention = {}, {}
        for name, work in {
            "encode": lambda: recipe.autoencoder.encode(torch.zeros(1, 3, 16, 16)),
            "text": lambda: text.encode(text.tokenize(["a red cube"])),
            "backbone": lambda: recipe.denoiser.backbone(x, t, tokens=states.tokens, mask=states.mask),
        }.items():
            with FlopCounterMode(display=False) as counter:
                work()
            found[name], by_kind = counter.get_total_flops(), counter.get_flop_counts()["Global"]
            attention[name] = sum(count for kind, count in by_kind.items() if "dot_product" in str(kind))
    conv, linear = 2 * 8 * 8 * 32 * 4 * 9, 2 * 32 * 128  # the backbone's first ones
    expected = found["encode"] + 2 * 3 * found["text"] + 3 * found["backbone"] - conv - linear  # and the null text
    again = attention["text"] + attention["backbone"] // 2  # products of queries and keys, in the backward pass
    assert within(loop, cost.flops_of) == expected + again


def test_one_of_two_processes_is_tried(examined, tmp_path):
    report = examined("trainer.devices=2", "trainer.steps=4", "optimizer.lr=3e-3", "conditioner.length=77")
    (phase,) = report.trial.phases
    assert phase.flops == 4 * within(loop_of(tmp_path, "conditioner.length=77"), cost.flops_of)
    assert report.images_per_second == pytest.approx(4 * 8 / report.seconds)
    assert set(kinds(report).values()) == {"ok"}


# --------------------------------------------------------------------------------------------------- the other trials


def test_each_trial_begins_with_the_weights_of_the_file(tmp_path):
    """A text encoder from a checkpoint takes the file's tensors as its own, and is trained in place."""
    argv = second_stage.command(tmp_path / "run", "trainer.steps=1")
    assert main(argv[:-1]) == 0
    file = tmp_path / "run" / "model.safetensors"
    overrides = [f"conditioner={file}", f"autoencoder={file}", "optimizer.lr=1"]
    plan = plan_of(argv[argv.index("--config") + 1], *overrides)
    (checked, _), build = plan.load(), command.builder(plan)
    before = {name: x.clone() for name, x in build(checked).recipe.conditioner.state_dict().items()}
    trained = build(checked)
    follow(trained, partial(trials.overfit, seconds=0))
    assert not torch.equal(trained.recipe.conditioner.transformer.tokens.weight, before["transformer.tokens.weight"])
    for name, x in build(checked).recipe.conditioner.state_dict().items():
        assert torch.equal(x, before[name])


def test_what_does_not_learn_is_warned_of(examined):
    assert kinds(examined("optimizer.lr=0", "trainer.steps=4"))["one batch"] == "warning"


@pytest.mark.slow
def test_the_next_200_steps_are_as_fast_as_was_said(tmp_path):
    """On scenes, by the log of a training."""
    first_stage(tmp_path / "first.safetensors")
    quiet = ["trainer.validate_every=10000", "trainer.save_every=10000", f"autoencoder={tmp_path}/first.safetensors"]
    quiet += ["data.batch_size=16", "trainer.validate_images=16"]
    file = ROOT / "configs" / "ldm" / "scenes.yaml"
    plan = plan_of(str(file), *quiet)
    config, _ = plan.load()
    (tmp_path / "scratch").mkdir()
    report = doctor.examine(config, command.builder(plan), tmp_path / "run", tmp_path / "scratch", minutes=4)
    said = 16 / report.trial.phases[0].seconds
    argv = ["train-ldm", "--config", str(file), "--run", str(tmp_path / "run"), *quiet]
    assert alone([*argv, "trainer.steps=226"]) == 0
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as log:
        speeds = [float(row["images_per_second"]) for row in csv.DictReader(log) if 25 < int(row["step"]) <= 225]
    assert len(speeds) == 8
    took = statistics.harmonic_mean(speeds)  # each is of 25 steps
    print(f"said {said:.1f} images/s, took {took:.1f}")
    assert abs(said / took - 1) < 0.2


def test_the_recipe_is_the_one_of_training(tmp_path):
    argv = second_stage.command(tmp_path / "run")
    plan = plan_of(argv[argv.index("--config") + 1])
    checked, _ = plan.load()
    assert checked.schema is Schema
    assert isinstance(command.builder(plan)(checked).recipe, DiffusionRecipe)
