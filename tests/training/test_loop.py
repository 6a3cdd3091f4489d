"""What both stages promise of a run: settings that reach the networks, averages that are measured, one read a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm import checkpoint
from ldm.cli import main
from ldm.distributed import Rank
from ldm.models.autoencoder import Autoencoder, kl
from ldm.models.unet import UNet
from ldm.pictures import to_float
from ldm.training import cost
from ldm.training.latent_statistics import measure
from ldm.training.loop import Loop
from ldm.training.recipes.diffusion import DiffusionRecipe
from ldm.training.validation import ReconstructionMetrics
from tests.training import second_stage
from tests.training.host_reads import HostReads
from tests.training.killing import command, manifest, rows, toy_data
from tests.training.test_autoencoder import recipe_of, state_of
from tests.training.test_faults import poison

__all__ = ["toy_data"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


# --------------------------------------------------------------------------------------------------- the averages


def test_scale_and_measures_are_those_of_the_weights_in_the_file(tmp_path):
    assert main(command(tmp_path / "run", "ema.decay=0.99", "optimizer.lr=1e-2")[:-1]) == 0
    ours = kl(channels=32, multipliers=(1, 1), blocks=1, mid_attention=False)
    checkpoint.load_weights(ours, checkpoint.open(tmp_path / "run" / "model.safetensors").state, "autoencoder")
    data = recipe_of(tmp_path).data
    ours.requires_grad_(False)
    _, scale = measure(lambda x: ours.posterior(to_float(x))[0].double(), data, 3, 32, ours.shift, Rank())
    assert scale.item() == pytest.approx(ours.scale.item(), rel=1e-5)
    same = ReconstructionMetrics(data, 8, 3)
    found = same.measure(lambda x: (to_float(x), ours(to_float(x))[0]), None, tmp_path / "grid.png", Rank())
    assert float(rows(tmp_path / "run")[-1]["val/psnr"]) == pytest.approx(found["val/psnr"], rel=1e-5)


def test_a_denoiser_is_measured_by_its_average_and_without_dropout(tmp_path, monkeypatch):
    seen, validate = [], DiffusionRecipe.validation_losses
    loops, make = [], Loop.configure_optimizers

    def watched(self, batch, part):
        averages = [torch.equal(p, loops[-1].ema.shadows[name]) for name, p in self.groups()["denoiser"]]
        seen.append((self.training, all(averages)))
        return validate(self, batch, part)

    monkeypatch.setattr(Loop, "configure_optimizers", lambda loop: loops.append(loop) or make(loop))
    monkeypatch.setattr(DiffusionRecipe, "validation_losses", watched)
    assert main(second_stage.command(tmp_path / "run", "trainer.steps=2")[:-1]) == 0
    assert {*seen} == {(False, True)}


def test_what_is_measured_may_be_another_source(tmp_path):
    first = recipe_of(tmp_path, "validation={type: toy, resolution: 24}")
    assert first.metrics.data.sizes == [(24, 24)]
    node = "validation={type: scenes, resolution: 16, batch_size: 8, size: 12, split: validation}"
    assert second_stage.recipe_of(tmp_path, node).loss_by_level.data.split == "validation"


# --------------------------------------------------------------------------------------------------- the settings


def test_precision_and_memory_format_reach_a_first_stage(tmp_path, monkeypatch):
    seen, forward = [], Autoencoder.forward

    def watched(self, x, noise=None):
        last = self.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        seen.append((last, torch.is_autocast_enabled("cpu")))
        return forward(self, x, noise)

    monkeypatch.setattr(Autoencoder, "forward", watched)
    plan = ("trainer.precision=bf16-mixed", "trainer.channels_last=true", "trainer.steps=1")
    assert main(command(tmp_path / "run", *plan)[:-1]) == 0
    assert {*seen} == {(True, True)}


def test_float16_reaches_a_denoiser(tmp_path, monkeypatch):
    seen, forward = [], UNet.forward

    def watched(self, *given, **named):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(self, *given, **named)

    monkeypatch.setattr(UNet, "forward", watched)
    plan = ("trainer.precision=16-mixed", "trainer.steps=1")
    assert main(second_stage.command(tmp_path / "run", *plan)[:-1]) == 0
    assert {*seen} == {torch.float16}


def test_rows_that_differ_may_all_be_compiled(tmp_path, monkeypatch):
    """They are one function to the compiler, which gives up after eight of its kind."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    loop = second_stage.loop_of(tmp_path, "trainer.compile=true", "backbone.blocks=3")
    loop.configure_model()
    kinds = {tuple(p.shape for p in block.parameters()) for block in loop.recipe.blocks()}
    assert len(kinds) > 2
    assert torch._dynamo.config.recompile_limit >= 4 * len(kinds) > 8  # with and without gradients, and two batches


def test_what_is_kept_and_what_is_logged(tmp_path):
    plan = ("trainer.save_every=2", "trainer.keep=3", "trainer.log_every=4", "trainer.validate_every=10")
    assert main(command(tmp_path / "run", *plan)[:-1]) == 0
    assert [int(folder.name) for folder in sorted((tmp_path / "run/checkpoints").iterdir())] == [6, 8, 10]
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [4, 8, 10]


def test_the_discriminator_has_an_optimiser_of_its_own(tmp_path):
    second = "discriminator_optimizer={type: sgd, lr: 0}"
    assert main(command(tmp_path / "run", "loss.start=0", "trainer.steps=2", second)[:-1]) == 0
    assert {float(row["lr/discriminator"]) for row in rows(tmp_path / "run")} == {0.0}
    before, state = recipe_of(tmp_path).discriminator.state_dict(), state_of(tmp_path / "run")
    assert all(torch.equal(state[f"model/discriminator.{name}"], x) for name, x in before.items())


@pytest.mark.parametrize("other", ["trainer.precision=bf16-mixed", "trainer.clip=1", "data.batch_size=4", "seed=4"])
def test_what_is_learned_in_which_order_may_not_change_within_a_run(other, tmp_path, capsys):
    assert main(command(tmp_path / "run", "trainer.steps=1")[:-1]) == 0
    assert main(command(tmp_path / "run", "trainer.steps=2", other)[:-1]) == 2
    assert other.split("=")[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ the steps


def test_dropout_is_keyed_by_the_sample_stream(tmp_path, monkeypatch):
    """Another one in each micro-batch, and the same ones where a run was stopped."""
    seeds, loss = [], DiffusionRecipe.loss
    monkeypatch.setattr(cost, "flops_by_phase", lambda loop: {})  # which asks for a loss too
    monkeypatch.setattr(DiffusionRecipe, "loss", lambda *given: seeds.append(torch.initial_seed()) or loss(*given))
    more = ["backbone.dropout=0.3", "schedule.type=constant", "trainer.accumulate=2"]
    for run, stops in {"once": [4], "twice": [2, 4]}.items():
        for steps in stops:
            assert main(second_stage.command(tmp_path / run, *more, f"trainer.steps={steps}")[:-1]) == 0
    assert manifest(tmp_path / "once")["sha256"] == manifest(tmp_path / "twice")["sha256"]
    assert len({*seeds[:8]}) == 8
    assert seeds[:8] == seeds[8:]


def test_steps_skipped_apart_end_nothing(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3, 5, 7, 9, 11})
    assert main(command(tmp_path / "run")[:-1]) == 0
    assert manifest(tmp_path / "run")["skipped"] == 6


READS = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "if": lambda x: 1 if (x > 2).any() else 0,
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "index": lambda x: [1, 2, 3, 4, 5, 6, 7][x.sum().int()],
    "numpy": lambda x: x.cpu().numpy(),
    "asarray": lambda x: np.asarray(x, dtype=np.float32),
    "format": lambda x: f"{x.sum():.3f}",
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_noticed(read):
    x = torch.arange(4.0)
    with HostReads() as reads:
        y = torch.where(x > 1, x, 0).sum()
        torch.nn.Linear(4, 2)(x).sum().backward()
        x + y
    assert reads.count == 0
    with HostReads() as reads:
        read(x)
    assert reads.count == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_step_reads_its_row_at_once_and_no_number_alone(first, tmp_path, monkeypatch):
    step, counts = Loop.training_step, []

    def watched(self, batch, index):
        with HostReads() as reads:
            step(self, batch, index)
        counts.append(reads.count)

    monkeypatch.setattr(Loop, "training_step", watched)
    begun = command(tmp_path / "run", "trainer.steps=3", "loss.start=0") if first else None
    assert main((begun or second_stage.command(tmp_path / "run", "trainer.steps=3"))[:-1]) == 0
    assert counts == [1] * 3
