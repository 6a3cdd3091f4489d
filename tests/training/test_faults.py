"""Signals, full disks, gradients that are not finite, a second run, another configuration."""

from __future__ import annotations

import errno
import os
import shutil
import signal

import pytest
import torch
from PIL import Image

from ldm import checkpoint
from ldm.checkpoint import files
from ldm.cli import main
from ldm.models.autoencoder import Autoencoder
from ldm.training import checkpointing, cost, logs, run
from ldm.training.loop import Loop
from tests.data.photographs import photograph
from tests.training import second_stage
from tests.training.killing import await_step, command, last_step, manifest, rows, start, started, toy_data, wait

__all__ = ["toy_data"]
VQ = ["autoencoder={type: vq, codes: 64, channels: 32, multipliers: [1, 1], blocks: 1, mid_attention: false}"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(number, code, tmp_path):
    straight, broken = command(tmp_path / "straight", "trainer.steps=25"), command(tmp_path / "run", "trainer.steps=25")
    assert wait(start(straight)) == [0]
    (pid,) = start(broken)
    await_step(tmp_path / "run", 13, pid)
    os.kill(pid, number)
    assert wait([pid]) == [code]
    assert 13 <= (step := manifest(tmp_path / "run")["step"]) == last_step(tmp_path / "run") < 25
    assert f"stopped: step {step} is saved; the same command resumes\n" in (tmp_path / "run.log").read_text()
    assert wait(start(broken)) == [0]
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert manifest(tmp_path / "run") == manifest(tmp_path / "straight")


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    argv = command(tmp_path / "run", "trainer.steps=100000", "trainer.devices=2")
    pids = start(argv, ranks=2)
    await_step(tmp_path / "run", 3, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    assert wait(pids) == [143, 143]


def test_a_second_run_in_the_folder_is_refused(tmp_path, monkeypatch, capsys):
    argv = command(tmp_path / "run", "trainer.steps=100000")
    (pid,) = start(argv)
    await_step(tmp_path / "run", 1, pid)
    monkeypatch.setattr("ldm.training.run.PATIENCE", 0.3)
    assert main(argv[:-1]) == 2
    assert "another process is training in this folder" in capsys.readouterr().err
    os.kill(pid, signal.SIGTERM)
    assert wait([pid]) == [143]


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path, monkeypatch, capsys):
    argv, write_file = command(tmp_path / "run"), files.write_file

    def full(path, state, *others):
        if "00000010" in str(path):
            write_file(path, dict(list(state.items())[:3]), *others)
            raise files.CheckpointError("cannot be written", str(path), os.strerror(errno.ENOSPC))
        return write_file(path, state, *others)

    monkeypatch.setattr(checkpointing, "write_file", full)
    assert main(argv[:-1]) == 4
    text = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in text
    assert "the last valid checkpoint is" in text
    assert "00000005" in text
    found = checkpointing.newest(tmp_path / "run")
    assert found
    assert found[1]["step"] == 5
    monkeypatch.undo()
    assert main(argv[:-1]) == 0
    assert manifest(tmp_path / "run")["step"] == 10


@pytest.mark.parametrize("write", ["metrics.csv", "00000010.png"])
def test_a_full_disk_is_named_wherever_it_is_met(write, tmp_path, monkeypatch, capsys):
    def full(self, *others, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), write)

    argv = command(tmp_path / "run")
    assert main([*argv[:-1], "trainer.steps=5"]) == 0
    monkeypatch.setattr(*((logs.Table, "add", full) if write == "metrics.csv" else (Image.Image, "save", full)))
    assert main(argv[:-1]) == 4
    text = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in text
    assert "the last valid checkpoint is" in text


@pytest.mark.parametrize(
    ("place", "name", "begin"),
    [
        (logs.Table, "__init__", command),
        (logs.Table, "add", command),
        (Image.Image, "save", command),
        (Image.Image, "save", second_stage.command),
        (checkpointing, "write_file", command),
    ],
)
def test_what_the_first_process_cannot_write_ends_the_others_too(place, name, begin, tmp_path, monkeypatch):
    def full(*others, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    monkeypatch.setattr(place, name, full)
    argv = begin(tmp_path / "run", "trainer.steps=2", "trainer.devices=2")
    statuses = wait(start(argv, ranks=2))
    text = (tmp_path / "run.log").read_text()
    assert statuses == [4, 4], text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 2, text
    assert all("No space left" in error for error in errors), text


def damage(run, step: int) -> None:
    """One bit of a checkpoint."""
    state = run / "checkpoints" / f"{step:08d}" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.*is damaged and was skipped")
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    argv = command(tmp_path / "run")
    assert main(argv[:-1]) == 0
    before = manifest(tmp_path / "run")
    damage(tmp_path / "run", 10)
    with pytest.warns(UserWarning, match="00000010 is damaged and was skipped"):
        assert checkpointing.newest(tmp_path / "run")[1]["step"] == 5
    capsys.readouterr()
    assert main(argv[:-1]) == 0
    assert "resumes from step 5" in capsys.readouterr().out
    assert manifest(tmp_path / "run") == before


@pytest.mark.parametrize(("damaged", "there"), [((10,), "step 5 with"), ((), "none")])
def test_processes_that_find_different_checkpoints_do_not_begin(damaged, there, tmp_path, capsys):
    """The folder that the other process sees is another one, or damaged."""
    argvs = [command(tmp_path / name, "trainer.steps=12", "trainer.devices=2") for name in ("run", "other")]
    assert main([*argvs[0][:-1], "trainer.steps=10", "trainer.devices=1"]) == 0
    if damaged:
        shutil.copytree(tmp_path / "run", tmp_path / "other")
    for step in damaged:
        damage(tmp_path / "other", step)
    before = manifest(tmp_path / "run")
    statuses = wait(started(argvs))
    assert statuses == [4, 4], [(tmp_path / f"{name}.log").read_text() for name in ("run", "other")]
    for name in ("run", "other"):
        error = (tmp_path / f"{name}.log").read_text().splitlines()[-1]
        assert f"({tmp_path / name}); got {there}" in error
        assert f"by process 1; expected step 10 with sha256 {before['sha256']['state.safetensors'][:10]}" in error
        assert error.endswith("try a --run folder that all processes share")
    assert manifest(tmp_path / "run") == before


@pytest.mark.parametrize("broken", ["run", "other"])
def test_where_one_process_can_read_no_checkpoint_none_begins(broken, tmp_path, capsys):
    """Nor waits for it; all say the same."""
    argvs = [command(tmp_path / name, "trainer.steps=12", "trainer.devices=2") for name in ("run", "other")]
    assert main([*argvs[0][:-1], "trainer.steps=10", "trainer.devices=1"]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    files_before = {file: file.read_bytes() for name in ("run", "other") for file in (tmp_path / name).glob("*.*")}
    for step in (5, 10):
        damage(tmp_path / broken, step)
    statuses = wait(started(argvs))
    assert statuses == [4, 4], [(tmp_path / f"{name}.log").read_text() for name in ("run", "other")]
    errors = {(tmp_path / f"{name}.log").read_text().splitlines()[-1] for name in ("run", "other")}
    rank = ("run", "other").index(broken)
    got = f"process {rank}: all checkpoints are damaged ({tmp_path / broken}); got 00000010, 00000005; expected"
    assert len(errors) == 1
    assert errors.pop().startswith(f"error: {got}")
    assert {file: file.read_bytes() for file in files_before} == files_before


@pytest.mark.filterwarnings("ignore:.*is damaged and was skipped")
def test_nothing_begins_anew_on_top_of_what_cannot_be_read(tmp_path, capsys):
    argv = command(tmp_path / "run")
    assert main(argv[:-1]) == 0
    files_before = {file: file.read_bytes() for file in (tmp_path / "run").glob("*.*")}
    damage(tmp_path / "run", 5)
    damage(tmp_path / "run", 10)
    capsys.readouterr()
    assert main(argv[:-1]) == 4
    assert "all checkpoints are damaged" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in files_before} == files_before


def test_weights_without_checkpoints_are_no_run_to_go_on_with(tmp_path, capsys):
    """But what a process left that was killed in writing its first checkpoint is."""
    argv = command(tmp_path / "run", "trainer.steps=5")
    assert main(argv[:-1]) == 0
    whole = manifest(tmp_path / "run")
    (tmp_path / "run/checkpoints/00000005/manifest.json").unlink()
    assert main(argv[:-1]) == 0
    assert manifest(tmp_path / "run") == whole
    shutil.rmtree(tmp_path / "run/checkpoints")
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    for more in ([], ["--dry-run"]):
        assert main([*argv[:-1], *more]) == 2
        assert "no checkpoint to resume from, only exported weights" in capsys.readouterr().err
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_other_data_are_refused(tmp_path, capsys):
    argv = command(tmp_path / "run", "trainer.steps=5")
    assert main(argv[:-1]) == 0
    said = tmp_path / "run/checkpoints/00000005/manifest.json"
    said.write_text(said.read_text().replace('"samples": 40', '"samples": 41'))
    assert main([*argv[:-1], "trainer.steps=6"]) == 2
    error = capsys.readouterr().err
    assert "the data differ from this run's" in error
    assert "got 40 samples per epoch; expected 41 samples per epoch, as before" in error


def pictures(folder, caption: str = "a ball") -> str:
    """The node of eight pictures, one of them with this caption."""
    folder.mkdir()
    for i in range(8):
        photograph(16, 16, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cube" if i else caption)
    return f"data={{type: images, root: {folder}, resolution: 16, batch_size: 8, workers: 0}}"


def test_other_pictures_are_refused_though_they_are_as_many(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before, to_device, other = pictures(tmp_path / "a"), pictures(tmp_path / "b"), pictures(tmp_path / "c", "a cone")
    argv = command(tmp_path / "run", "schedule.type=constant")[:-1]
    assert main([*argv, before, "trainer.steps=1"]) == 0
    assert main([*argv, to_device, "trainer.steps=2"]) == 0
    digest = manifest(tmp_path / "run")["data"]
    capsys.readouterr()
    monkeypatch.setattr("ldm.data.decode.picture", None)  # no picture is read
    for more in (["trainer.steps=3"], ["--dry-run"]):
        assert main([*argv, other, *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: --run: the data differ from this run's")
        assert f"expected sha256 {digest[:10]}, as before" in error


def test_a_signal_before_the_first_step_saves_too(tmp_path, monkeypatch):
    def early(folder, found, stage):
        restore(folder, found, stage)
        os.kill(os.getpid(), signal.SIGTERM)

    argv, restore = command(tmp_path / "run"), checkpointing.restore
    assert main([*argv[:-1], "trainer.steps=5"]) == 0
    monkeypatch.setattr(checkpointing, "restore", early)
    assert main(argv[:-1]) == 143
    assert manifest(tmp_path / "run")["step"] == 6


def test_the_scale_of_latents_is_the_same_wherever_a_run_stood(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.latent_statistics.SHARE", 1)
    monkeypatch.setattr("ldm.training.latent_statistics.BATCH", 8)
    for name, stops in {"straight": [10], "broken": [4, 9, 10]}.items():
        for steps in stops:
            assert main(command(tmp_path / name, "schedule.type=constant", f"trainer.steps={steps}")[:-1]) == 0
    straight, broken = (checkpoint.open(tmp_path / name / "model.safetensors") for name in ("straight", "broken"))
    assert broken.state["autoencoder.scale"] == straight.state["autoencoder.scale"]
    assert broken.config["fingerprint"] == straight.config["fingerprint"]


@pytest.mark.parametrize("change", [[], ["recipe.train=decoder", "discriminator=null"], VQ])
def test_a_checkpoint_is_as_large_as_was_said(change, tmp_path, monkeypatch):
    first = command(tmp_path / "first", "trainer.steps=1")
    decoder = ["--init-from", str(tmp_path / "first/model.safetensors")] if "recipe.train=decoder" in change else []
    assert not decoder or main(first[:-1]) == 0
    said, needed = [], run.bytes_needed
    monkeypatch.setattr(run, "bytes_needed", lambda loop: said.append(needed(loop)) or said[-1])
    assert main([*command(tmp_path / "run", *change, "trainer.steps=5")[:-1], *decoder]) == 0
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert said[0] == pytest.approx(written, rel=0.1)


def test_an_unwritable_folder_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "run").write_text("a file where the folder should be")
    assert main(command(tmp_path / "run")[:-1]) == 2
    assert "--run: not writable" in capsys.readouterr().err


def test_a_disk_too_small_for_a_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    assert main(command(tmp_path / "run")[:-1]) == 2
    assert "the disk is too small" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


class Usage:
    """A full disk."""

    free = 10_000


def poison(monkeypatch, steps: set[int]) -> None:
    """Reconstructions that are not finite in these forward passes in training, counted from 0."""
    forward, count = Autoencoder.forward, [0]

    def broken(self, x, noise=None):
        reconstruction, bottled = forward(self, x, noise)
        if torch.is_grad_enabled():
            bad, count[0] = count[0] in steps, count[0] + 1
            reconstruction = reconstruction * (float("inf") if bad else 1.0)
        return reconstruction, bottled

    monkeypatch.setattr(Autoencoder, "forward", broken)
    monkeypatch.setattr(cost, "flops_by_phase", lambda loop: {})  # which passes forward too


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(tmp_path, monkeypatch):
    poison(monkeypatch, {3, 6, 7})
    assert main(command(tmp_path / "run")[:-1]) == 0
    counters = manifest(tmp_path / "run")
    assert (counters["step"], counters["images_seen"], counters["skipped"]) == (10, 13 * 8, 3)
    steps = [int(row["step"]) for row in rows(tmp_path / "run")]
    assert steps == [1, 2, 3, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10]


def test_a_second_turn_without_a_finite_gradient_counts_too(tmp_path, monkeypatch, capsys):
    """A discriminator that never learns must not go unnoticed."""
    clip = Loop._clip

    def broken(self, optimizer):
        norm = clip(self, optimizer)
        return norm * float("inf") if optimizer is self.optimizers_by_group()["discriminator"] else norm

    monkeypatch.setattr(Loop, "_clip", broken)
    assert main(command(tmp_path / "run", "recipe.two_forwards=true")[:-1]) == 5
    assert "5 steps in a row without a finite gradient" in capsys.readouterr().err


def test_five_in_a_row_stop_and_name_the_samples(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, set(range(7, 12)))
    assert main(command(tmp_path / "run")[:-1]) == 5
    assert "samples 56 to 95" in capsys.readouterr().err.splitlines()[-1]
    loaded = checkpoint.open(tmp_path / "run" / "model.safetensors")
    assert all(x.isfinite().all() for x in loaded.state.values())
    assert checkpointing.newest(tmp_path / "run")[1]["step"] == 5


def test_weights_that_are_not_finite_are_never_written(tmp_path, monkeypatch, capsys):
    from ldm.training.ema import EMA

    update = EMA.update

    def broken(self, step):
        update(self, step)
        if step == 8:
            next(iter(self.shadows.values())).fill_(float("nan"))

    monkeypatch.setattr(EMA, "update", broken)
    assert main(command(tmp_path / "run")[:-1]) == 5
    assert "weights are not finite, nothing was saved" in capsys.readouterr().err
    assert checkpointing.newest(tmp_path / "run")[1]["step"] == 5


def test_another_configuration_is_refused_and_says_what_differs(finished_first_stage, capsys):
    assert main(command(finished_first_stage, "optimizer.lr=0.5", "trainer.save_every=7")[:-1]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "optimizer.lr=0.5 for 0.001" in error
    assert "save_every" not in error
    assert "steps" not in error


def test_more_steps_go_on(tmp_path):
    assert main(command(tmp_path / "run", "schedule.type=constant", "trainer.steps=4")[:-1]) == 0
    assert main(command(tmp_path / "run", "schedule.type=constant", "trainer.steps=9")[:-1]) == 0
    assert main(command(tmp_path / "once", "schedule.type=constant", "trainer.steps=9")[:-1]) == 0
    assert manifest(tmp_path / "run")["sha256"] == manifest(tmp_path / "once")["sha256"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "00000003"
    folder.mkdir(parents=True)
    left = [tmp_path / "run" / ".model.safetensors.1.tmp", folder / ".state.safetensors.1.tmp"]
    for file in left:
        file.write_bytes(b"half")
    assert main(command(tmp_path / "run", "trainer.steps=2")[:-1]) == 0
    assert not any(file.exists() for file in left)
