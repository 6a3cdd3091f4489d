"""Model FLOPs utilisation by hand, and that counting operations leaves a training as it was, bit for bit."""

from __future__ import annotations

import csv

import pytest
import torch

from ldm.cli import main
from ldm.training import cost
from ldm.training.cost import Utilisation, flops_by_phase, peak_flops
from ldm.training.trainer import TrainerSettings
from ldm.training.trial import follow
from tests.training import killing, second_stage
from tests.training.killing import manifest, rows, start, toy_data, wait
from tests.training.second_stage import loop_of

__all__ = ["toy_data"]
VQ = ["autoencoder={type: vq, channels: 32, multipliers: [1, 1], blocks: 1, mid_attention: false, codes: 32}"]
VQ += ["recipe.sample_from=0", "recipe.revive=5", "loss.penalty_weight=1", "loss.start=2"]
BATCH_NORM = ["discriminator={channels: 16, layers: 1, norm: batch}", "loss.start=2"]
DROPOUT = ["backbone.dropout=0.3", "backbone.checkpointing=true"]
COMPILED = ["trainer.compile=true", "trainer.steps=2"]


def both(tmp_path, monkeypatch, begin, overrides, ranks=1):
    """The same training with and without a count of its operations: the runs' folders."""
    more = ["trainer.steps=3", *overrides, f"trainer.devices={ranks}"]
    assert wait(start(begin(tmp_path / "counted", *more), ranks)) == [0] * ranks, (tmp_path / "counted.log").read_text()
    monkeypatch.setattr(cost, "flops_by_phase", lambda loop: {})
    assert wait(start(begin(tmp_path / "plain", *more), ranks)) == [0] * ranks, (tmp_path / "plain.log").read_text()
    return tmp_path / "counted", tmp_path / "plain"


@pytest.mark.long
@pytest.mark.parametrize(
    ("begin", "overrides", "ranks"),
    [
        (killing.command, VQ, 1),
        (killing.command, BATCH_NORM, 1),
        (second_stage.command, DROPOUT, 1),
        pytest.param(second_stage.command, COMPILED, 1, marks=pytest.mark.slow),
        (killing.command, ["loss.start=2"], 2),
        (killing.command, ["loss.start=2", "trainer.strategy=fsdp2"], 2),
        (second_stage.command, ["trainer.accumulate=2", *DROPOUT], 2),
        (second_stage.command, ["trainer.strategy=fsdp2", *DROPOUT, *second_stage.FEW_TENSORS], 2),
    ],
    ids=["vq", "batch norm", "dropout", "compiled", "ddp", "fsdp2", "second ddp", "second fsdp2"],
)
def test_counting_changes_nothing(begin, overrides, ranks, tmp_path, monkeypatch):
    run, plain = both(tmp_path, monkeypatch, begin, overrides, ranks)
    assert manifest(run) == manifest(plain)
    assert rows(run) == rows(plain)
    with open(run / "metrics.csv", encoding="utf-8") as file:
        assert all(float(row["tflops_per_second"]) > 0 for row in csv.DictReader(file))


def test_nothing_is_left_of_a_count(tmp_path):
    """Neither gradients nor a step, and random numbers go on where they were."""

    def script(loop):
        before = {name: x.clone() for name, x in loop.state_dict().items()}
        state, step = torch.get_rng_state(), loop.counters.step
        assert list(flops_by_phase(loop)) == [0]
        assert all(p.grad is None for p in loop.parameters())
        assert torch.equal(torch.get_rng_state(), state)
        assert loop.counters.step == step
        assert loop.recipe.denoiser.backbone.checkpointing
        for name, x in loop.state_dict().items():
            assert torch.equal(x, before[name])
        yield

    follow(loop_of(tmp_path, *DROPOUT), script)


def test_the_log_says_what_is_done_by_hand(finished_second_stage, tmp_path):
    found = []
    follow(loop_of(tmp_path), lambda loop: found.append(cost.flops_of(loop)) or iter([None]))
    with open(finished_second_stage / "metrics.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            said = float(row["images_per_second"]) * found[0] / 1e12
            assert float(row["tflops_per_second"]) == pytest.approx(said, rel=2e-3)
            assert "mfu" not in row  # of a processor nobody knows the peak


def test_each_phase_has_its_own_count_and_mfu_is_a_part_of_the_peak():
    found = Utilisation({0: 10**9, 4: 3 * 10**9}, peak=6e12)
    assert found.row(0, 1000.0) == found.row(1, 1000.0) == found.row(4, 1000.0)
    assert found.row(4, 1000.0) == {"tflops_per_second": 1.0, "mfu": 0.1667}
    assert found.row(5, 1000.0) == {"tflops_per_second": 3.0, "mfu": 0.5}
    assert Utilisation({0: 10**9}, None).row(5, 1000.0) == {"tflops_per_second": 1.0}
    assert Utilisation({}, 1e12).row(5, 1000.0) == {}


@pytest.mark.parametrize(
    ("device", "precision", "ranks", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 1, 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 1, 156e12),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 8, 8 * 989.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", 1, None),
        ("NVIDIA RTX A1000", "bf16-mixed", 1, None),
        ("NVIDIA H200", "64-true", 1, None),
        ("", "32-true", 1, None),
    ],
)
def test_peaks_are_of_whole_devices_that_we_know(device, precision, ranks, expected):
    settings = TrainerSettings(steps=1, accelerator="cpu", devices=ranks, precision=precision)
    assert peak_flops(settings, device) == (None if expected is None else pytest.approx(expected))


def test_where_memory_is_short_nothing_is_said(tmp_path, monkeypatch):
    def short(loop):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cost, "flops_of", short)
    assert main(second_stage.command(tmp_path / "run", "trainer.steps=1")[:-1]) == 0
    assert "tflops_per_second" not in (tmp_path / "run" / "metrics.csv").read_text()
