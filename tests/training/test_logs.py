"""What a run says, where it says it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ldm.cli import main
from ldm.training import logs
from tests.training import second_stage
from tests.training.killing import command, rows, toy_data
from tests.training.test_autoencoder import recipe_of

__all__ = ["toy_data"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_weights_and_biases_are_asked_only_by_who_wants_them(tmp_path, monkeypatch):
    modes: list[str] = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **said: modes.append(said["mode"])))
    logs.WandB(tmp_path, SimpleNamespace(recipe=SimpleNamespace(config={})))
    monkeypatch.setenv("WANDB_MODE", "online")
    logs.WandB(tmp_path, SimpleNamespace(recipe=SimpleNamespace(config={})))
    assert modes == ["offline", "online"]


def test_tensorboard_has_the_rows_of_the_table(finished_first_stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_first_stage)).Reload()
    expected = [float(row["loss/loss"]) for row in rows(finished_first_stage)]
    assert [event.value for event in events.Scalars("loss/loss")] == pytest.approx(expected)


def test_a_recipe_warns_of_its_game(tmp_path):
    row = {"loss/discriminator": 0.01, "loss/logits_real": 3.0, "loss/logits_fake": 0.0, "step": 1}
    recipe = recipe_of(tmp_path)
    assert sum("overpowers" in line for _ in range(10) for line in recipe.warnings(row)) == 1


def test_the_bar_shows_the_loss_of_the_step_before_it(tmp_path, monkeypatch):
    """Of each step, although few of them have a row."""
    shown = []
    monkeypatch.setattr(logs.tqdm, "set_postfix", lambda bar, words, **_: shown.append((bar.n, words.get("loss"))))
    assert main(command(tmp_path / "all", "trainer.steps=4", "trainer.validate_every=9")[:-1]) == 0
    expected = [f"{float(row['loss/loss']):.4g}" for row in rows(tmp_path / "all")]
    shown.clear()
    few = ("trainer.steps=4", "trainer.log_every=4", "trainer.validate_every=9")
    assert main(command(tmp_path / "few", *few)[:-1]) == 0
    assert len({*expected}) == 4
    assert shown[:4] == [*enumerate(expected)]


def test_a_run_without_a_name_is_called_by_its_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for make, name in ((command, "config"), (second_stage.command, "config_ldm")):
        assert main([*make(tmp_path / "x")[:3], "--dry-run"]) == 0
        assert f"run: runs/{name}, " in capsys.readouterr().out


def test_a_condition_that_is_never_dropped_is_told(tmp_path, capsys):
    assert main([*second_stage.command(tmp_path / "run", "conditioner.drop=0")[:-1], "--dry-run"]) == 0
    assert "dropped: 0%, so only cfg 1 works\n" in capsys.readouterr().out
