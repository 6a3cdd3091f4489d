"""The doctor's numbers against numbers counted by hand, and what it says of trainings that are ill."""

from __future__ import annotations

import csv
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import schema as configuration
from ldm.data.loader import loader
from ldm.errors import DataError
from ldm.training import checkpointing, cost, doctor
from ldm.training import trial as trials
from ldm.training.loop import Loop
from ldm.training.recipe import Start
from ldm.training.recipes.autoencoder import AutoencoderRecipe, Schema
from ldm.training.run import build as build_run
from ldm.training.trainer import TrainerSettings
from ldm.training.trial import Phase, Trial, follow
from tests.training import toy
from tests.training.killing import alone, toy_data

__all__ = ["toy_data"]
ROOT = Path(__file__).parent.parent.parent


def build(config) -> Loop:
    """A fresh loop."""
    return build_run(config, {}, Start())


@pytest.fixture
def config_of(tmp_path):
    """A checked configuration of a tiny first stage."""

    def config(*overrides: str):
        file = tmp_path / "config.yaml"
        file.write_text(toy.KL)
        return configuration.load(file, overrides, Schema)

    return config


@pytest.fixture
def examined(config_of, tmp_path, monkeypatch):
    """A report of so many steps that no clock matters."""
    monkeypatch.setattr(trials, "TIMED", 3)
    monkeypatch.setattr(trials, "OVERFIT", 40)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))

    def examine(*overrides: str):
        scratch = Path(tempfile.mkdtemp(dir=tmp_path))
        report = doctor.examine(config_of(*overrides), build, tmp_path / "runs" / "toy", scratch, minutes=10)
        assert not (tmp_path / "runs").exists()
        return report

    return examine


def within(config, look, step: int = 0):
    """What `look` returns for a loop in training, at this step."""

    def script(loop):
        loop.counters.step = step
        found = look(loop)
        yield
        return found

    return follow(build(config), script)


def kinds(report) -> dict[str, str]:
    """What is said of each thing but the loader, which is as fast as this machine happens to be."""
    return {name: finding.kind for finding in report.findings if (name := finding.text.split(":")[0]) != "loader"}


def test_all_is_well(examined):
    report = examined()
    assert kinds(report) == dict.fromkeys(("data", "memory", "disk", "resume", "one batch"), "ok")
    assert [(phase.first, phase.steps) for phase in report.trial.phases] == [(0, 4), (4, 6)]


# --------------------------------------------------------------------------------------------------------- the data


def test_the_survey_is_that_of_the_samples(config_of, monkeypatch):
    loop = build(config_of())
    words = ["", "  ", "a red cube", "one two three four five", "no"]
    batch = toy.Toy.batch

    def captioned(self, sample_ids, seed):
        return {**batch(self, sample_ids, seed), "caption": [words[sample_id.number % 5] for sample_id in sample_ids]}

    monkeypatch.setattr(toy.Toy, "batch", captioned)
    found = doctor.survey(loop, 60.0)
    batches = iter(loader(loop.recipe.data, loop.recipe.seed))
    next(batches)
    x = torch.cat([next(batches)["image"] for _ in range(40)]).numpy() / 127.5 - 1
    assert (found.samples, found.looked_at, found.captions, found.empty) == (40, 320, 320, 128)
    assert found.words == [1, 3, 5]
    assert found.mean == pytest.approx(x.mean((0, 2, 3)), abs=1e-6)
    assert found.std == pytest.approx(x.std((0, 2, 3)), abs=1e-6)
    assert (found.least, found.most) == pytest.approx((x.min(), x.max()), abs=1e-6)


def test_a_gray_channel_and_skipped_samples_are_warned_of(config_of):
    loop = build(config_of())
    found = doctor.survey(loop, 0.01)
    found.std[1], found.counts = 0.001, {"seen": 9, "used": 7, "skipped": 2, "filtered": 0}
    report = doctor.Report(loop.settings, 8)
    doctor.check_data(report, found)
    assert [finding.kind for finding in report.findings] == ["warning", "warning"]
    assert "channel 1 is almost constant" in report.findings[0].text
    assert "2 of 9 samples" in report.findings[1].text
    found.std[1] = float("nan")
    with pytest.raises(DataError, match="finite"):
        doctor.check_data(report, found)


@pytest.mark.parametrize(("plan", "kind", "code"), [([], "error", 2), (["strategy=fsdp2", "devices=2"], "warning", 0)])
def test_a_gpu_without_room_is_a_finding(plan, kind, code, examined, monkeypatch):
    """Not the end of the report; and of a sharded training nothing is proved."""

    def full(loop, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        yield

    monkeypatch.setattr(doctor, "trial", full)
    report = examined(*(f"trainer.{word}" for word in plan))
    assert report.survey
    finding = report.findings[-1]
    assert (finding.kind, finding.code) == (kind, code)
    assert ("the weights do not fit in one process" if plan else "a step does not fit on the GPU") in finding.text
    assert finding.text.endswith("Tried to allocate 2 GiB." if plan else "or data.resolution")


def test_data_that_cannot_be_read_end_it(examined, monkeypatch):
    def broken(self, sample_ids, seed):
        raise DataError("the picture is gone", "a.png")

    monkeypatch.setattr(toy.Toy, "batch", broken)
    report = examined()
    assert [(finding.kind, finding.code) for finding in report.findings] == [("error", 3)]


# ---------------------------------------------------------------------------------------------------------- memory


def test_bytes_by_part_are_those_of_a_training(config_of):
    """Against the parameters counted one by one and what the optimisers hold after real steps."""

    def script(loop):
        found = cost.memory_of(loop, 1)
        loop.counters.step = 4
        yield
        states = [state for each in loop.optimizers_by_group().values() for state in each.state.values()]
        kept = sum(x.nbytes for state in states for x in state.values() if x.ndim)
        return found, kept

    loop = build(config_of())
    count = sum(p.numel() for p in loop.parameters())
    averaged = sum(p.numel() for p in loop.recipe.autoencoder.parameters())
    found, kept = follow(loop, script)
    shift_and_scale = 8
    assert found.weights == 4 * count + shift_and_scale
    assert found.gradients == 4 * count
    assert found.averages == 4 * averaged
    assert found.optimizer == kept == 8 * count


def test_activations_grow_with_the_batch_and_fall_with_accumulation(config_of):
    def look(loop):
        return cost.memory_of(loop, 1).activations, cost.saved_bytes(loop, 8)

    activations, held = within(config_of(), look, step=4)
    assert activations == held > within(config_of(), look, step=0)[1]
    assert within(config_of("trainer.accumulate=2"), look, step=4)[0] < 0.6 * held


def test_what_waits_for_a_backward_pass_by_hand():
    """exp keeps its result, a product both factors; views and weights cost nothing, and all is let go."""
    weight = torch.nn.Parameter(torch.ones(1000))
    module = torch.nn.Module()
    module.weight = weight
    counter = cost.SavedTensors(module)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda saved: saved.x):
        x = torch.ones(1000, requires_grad=True)
        y = x.exp()  # keeps y
        z = y.view(10, 100).reshape(1000) * weight  # keeps y once more, and the weight
        assert counter.now == 4000
        w = z.exp()  # keeps w
        assert counter.now == 8000
        w.sum().backward()
    assert (counter.now, counter.most) == (0, 8000)


def test_sharding_divides_what_can_be_divided(config_of):
    def look(loop):
        loop.settings.__dict__["strategy"] = "fsdp2"
        return cost.memory_of(loop, 1), cost.memory_of(loop, 4)

    one, four = within(config_of(), look)
    shift_and_scale = 8
    one.weights -= shift_and_scale
    four.weights -= shift_and_scale
    assert vars(four) == {name: x if name == "activations" else x // 4 for name, x in vars(one).items()}


def test_a_step_that_does_not_fit_is_refused_before_it_is_taken(examined, monkeypatch):
    steps = []
    monkeypatch.setattr(trials, "machine_memory", lambda device: 1_000_000)
    monkeypatch.setattr(AutoencoderRecipe, "after_step", lambda *_: steps.append(1))
    report = examined()
    (error,) = (finding for finding in report.findings if finding.kind == "error")
    assert error.code == 2
    assert "memory: a step does not fit; got about 0.0" in error.text
    assert not steps
    assert report.trial is None


# ------------------------------------------------------------------------------------------------- speed and phases


def test_operations_are_three_forward_passes_less_the_gradient_of_the_images(config_of):
    recipe = build(config_of()).recipe
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        recipe.autoencoder(torch.zeros(1, 3, 16, 16))
    first = 2 * 16 * 16 * 32 * 3 * 9  # of a convolution from 3 to 32 channels
    assert within(config_of(), cost.flops_of) == 3 * forward.get_total_flops() - first
    assert within(config_of(), cost.flops_of, step=4) > 3 * forward.get_total_flops()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss.start=4"], [(0, 4), (4, 6)]),
        (["loss.start=6", "loss.warmup=4"], [(0, 2), (2, 4), (6, 4)]),
        (["loss.start=3", "loss.warmup=9"], [(0, 3), (3, 7)]),
        (["loss.start=0"], [(0, 10)]),
        (["loss.start=10", "loss.warmup=3"], [(0, 7), (7, 3)]),
        (["loss.start=50001"], [(0, 10)]),
        (["loss.adversarial_weight=0"], [(0, 10)]),
        (["discriminator=null"], [(0, 10)]),
    ],
)
def test_phases_cover_the_plan(overrides, expected, config_of):
    loop = build(config_of(*overrides))
    recipe, turns = loop.recipe, []
    assert [(first, steps) for _, first, steps in loop.spans()] == expected
    for _, first, steps in loop.spans():
        for step in range(first, first + steps):
            recipe.counters.step = step
            turns.append((recipe.turns(), recipe.criterion.discriminator_counts(step) and bool(recipe.discriminator)))
        assert len(set(map(str, turns[first:]))) == 1
    assert len(turns) == 10


def test_a_phase_takes_the_time_that_its_steps_take(config_of, tmp_path, monkeypatch):
    """By a clock that only steps, a validation and a checkpoint advance; the first steps are slow."""
    now, taken = [0.0], []

    def work(recipe, *_):
        taken.append(recipe.counters.step - 1)
        now[0] += (1.0 if recipe.counters.step > 4 else 0.5) + 9.0 * (taken.count(taken[-1]) < 4)

    def advance(seconds):
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    write = checkpointing.write
    monkeypatch.setattr(trials, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(AutoencoderRecipe, "after_step", work)
    monkeypatch.setattr(Loop, "validate", advance(2.0))
    monkeypatch.setattr(checkpointing, "write", lambda *arguments: (write(*arguments), advance(3.0)()))
    loop = build(config_of("data.batch_size=4"))
    found, _ = follow(loop, partial(trials.trial, settings=loop.settings, folder=tmp_path, seconds=600))
    assert [phase.seconds for phase in found.phases] == [0.5, 1.0]
    assert (found.validation_seconds, found.checkpoint_seconds) == (2.0, 3.0)
    assert taken == [0] * 28 + [4] * 29


def test_a_slow_step_is_taken_only_a_few_times(config_of, tmp_path, monkeypatch):
    now, taken = [0.0], []

    def work(recipe, *_):
        taken.append(recipe.counters.step - 1)
        now[0] += 30.0

    monkeypatch.setattr(trials, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(AutoencoderRecipe, "after_step", work)
    loop = build(config_of())
    found, _ = follow(loop, partial(trials.trial, settings=loop.settings, folder=tmp_path, seconds=60))
    assert [phase.seconds for phase in found.phases] == [30.0, 30.0]
    assert taken == [0] * 4 + [4] * 5


@pytest.fixture
def report():
    """A report of 100 steps of 16 images, 60 of them in half a second each and 40 in a whole one."""
    settings = TrainerSettings(steps=100, validate_every=40, save_every=50)
    costs = {"validation_seconds": 2.0, "checkpoint_seconds": 3.0, "checkpoint_bytes": 0, "model_bytes": 0}
    phases = [Phase("", 0, 60, 0, 0.5), Phase("", 60, 40, 0, 1.0)]
    found = Trial(cost.Memory(0, 0, 0, 0, 0), memory=100, before=0, peak=50, phases=phases, **costs)
    speed = {"images_per_second": 30.0}
    lists = {name: [] for name in ("sizes", "mean", "std", "words")}
    none = dict.fromkeys(("samples", "looked_at", "least", "most", "captions", "empty"), 0)
    return doctor.Report(settings, 16, trial=found, survey=doctor.Survey(**none, **lists, **speed, counts={}))


def test_the_plan_s_time_is_the_sum_of_its_parts(report):
    assert report.seconds == 60 * 0.5 + 40 * 1.0 + 3 * 2.0 + 2 * 3.0
    assert report.images_per_second == pytest.approx(1600 / 82)


@pytest.mark.parametrize(("speed", "peak", "expected"), [(30, 50, "ok"), (20, 50, "loader"), (30, 95, "memory")])
def test_a_slow_loader_and_a_full_memory_are_warned_of(speed, peak, expected, report):
    report.survey.images_per_second, report.trial.peak = speed, peak
    doctor.check_costs(report, report.trial)
    warned = [finding.text.split(":")[0] for finding in report.findings if finding.kind == "warning"]
    assert warned == [expected] * (expected != "ok")


def test_one_of_two_processes_is_tried(examined, config_of):
    report = examined("trainer.devices=2", "trainer.steps=4")
    (phase,) = report.trial.phases
    assert report.batch_size == 8
    assert phase.flops == 4 * within(config_of(), cost.flops_of)
    assert report.images_per_second == pytest.approx(4 * 8 / report.seconds)
    assert set(kinds(report).values()) == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize("game", [[], ["loss.start=0", "loss.warmup=0"]], ids=["no discriminator", "against it"])
def test_the_next_200_steps_are_as_fast_as_was_said(game, tmp_path):
    """On scenes, by the log of a training."""
    quiet = ["trainer.validate_every=10000", "trainer.save_every=10000"]
    config = configuration.load(ROOT / "configs" / "autoencoder" / "scenes.yaml", [*quiet, *game], Schema)
    (tmp_path / "scratch").mkdir()
    report = doctor.examine(config, build, tmp_path / "run", tmp_path / "scratch", minutes=4)
    said = 32 / report.trial.phases[0].seconds
    argv = ["train-autoencoder", "--config", "scenes", "--run", str(tmp_path / "run"), *quiet, *game]
    assert alone([*argv, "trainer.steps=226"]) == 0
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        speeds = [float(row["images_per_second"]) for row in csv.DictReader(file) if 25 < int(row["step"]) <= 225]
    assert len(speeds) == 8
    took = statistics.harmonic_mean(speeds)  # each is of 25 steps
    print(f"said {said:.1f} images/s, took {took:.1f}")
    assert abs(said / took - 1) < 0.2


# ------------------------------------------------------------------------------------------------- the other trials


def test_a_resume_that_forgets_is_an_error(examined, monkeypatch):
    restore = checkpointing.restore

    def forgetful(folder, manifest, loop):
        restore(folder, manifest, loop)
        for shadow in loop.ema.shadows.values():
            shadow.mul_(1.001)

    monkeypatch.setattr(checkpointing, "restore", forgetful)
    report = examined("trainer.steps=4")
    (error,) = (finding for finding in report.findings if finding.kind == "error")
    assert error.code == 4
    assert "such as ema/autoencoder" in error.text
    assert kinds(report)["one batch"] == "ok"


def test_a_resume_keeps_the_layout_of_memory(examined):
    """Or a fused optimiser would read its moments in another order than it wrote them."""
    assert kinds(examined("trainer.channels_last=true", "trainer.steps=4"))["resume"] == "ok"


def test_what_does_not_learn_is_warned_of(examined):
    report = examined("optimizer.lr=0", "trainer.steps=4")
    assert kinds(report)["one batch"] == "warning"
    assert report.losses[0] == pytest.approx(report.losses[-1], rel=0.2)


@pytest.mark.parametrize(("steps", "why"), [(6, "too few steps to tell"), (60, "it should fall by at least a fifth")])
def test_a_loss_that_stays_says_more_after_many_steps(steps, why):
    report = doctor.Report(TrainerSettings(steps=1), batch_size=1, losses=[1.0] * steps)
    doctor.check_losses(report, "loss")
    (finding,) = report.findings
    assert finding.kind == "warning"
    assert why in finding.text


def test_the_batch_that_comes_again_is_the_first(config_of, monkeypatch):
    seen = []
    loss = AutoencoderRecipe.loss

    def seeing(self, batch, turn):
        seen.append(batch["number"].tolist())
        return loss(self, batch, turn)

    monkeypatch.setattr(AutoencoderRecipe, "loss", seeing)
    config = config_of("trainer.accumulate=2")
    losses = follow(build(config), partial(trials.overfit, seconds=0), doctor.first_batch(build(config)))
    assert len(losses) == 6
    assert seen == 6 * [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert losses[-1] < losses[0]


def test_gradients_that_are_not_finite_are_an_error(examined):
    report = examined("optimizer.lr=1e30", "trainer.steps=4")
    assert {finding.code for finding in report.findings if finding.kind == "error"} == {5}


def test_a_small_disk_is_an_error(examined, monkeypatch):
    class Usage:
        free = 10_000

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    report = examined("trainer.steps=4")
    (error,) = (finding for finding in report.findings if finding.kind == "error")
    assert (error.code, error.text.split(" (")[0]) == (2, "disk: too small for the checkpoints")
    assert report.disk == 3 * report.trial.checkpoint_bytes + 2 * report.trial.model_bytes
    assert kinds(report)["resume"] == "ok"
