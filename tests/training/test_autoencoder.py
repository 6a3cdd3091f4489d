"""The first stage's training against a loop written out by hand, on one process and on two."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from ldm import checkpoint
from ldm.cli import main
from ldm.config import schema as configuration
from ldm.data.loader import loader
from ldm.distributed import Rank
from ldm.draws import draw, stream
from ldm.models.autoencoder import kl
from ldm.models.quantize import VectorQuantizer
from ldm.pictures import to_float
from ldm.training import codebook, cost
from ldm.training.latent_statistics import measure
from ldm.training.recipe import Start
from ldm.training.recipes.autoencoder import AutoencoderRecipe, Schema
from ldm.training.run import build
from tests.training import toy
from tests.training.killing import command, manifest, rows, start, toy_data, wait
from tests.training.rounding import drift

__all__ = ["toy_data"]

DOUBLE = ["trainer.precision=64-true", "data.length=16", "loss.start=2"]


def state_of(run) -> dict[str, torch.Tensor]:
    """Everything in a run's newest checkpoint."""
    return load_file(sorted(run.glob("checkpoints/*/state.safetensors"))[-1])


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], within: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}")


def loop_of(tmp_path, *overrides):
    """A loop that Lightning has not seen."""
    file = tmp_path / "config.yaml"
    file.write_text(toy.KL)
    return build(configuration.load(file, overrides, Schema), {}, Start())


def recipe_of(tmp_path, *overrides) -> AutoencoderRecipe:
    """Its recipe."""
    recipe = loop_of(tmp_path, *overrides).recipe
    assert isinstance(recipe, AutoencoderRecipe)
    return recipe


def by_hand(recipe, steps: int, two_forwards: bool, clip: float | None):
    """The same training, written out: both networks after so many steps."""
    ae, disc, loss = (copy.deepcopy(m).double() for m in (recipe.autoencoder, recipe.discriminator, recipe.criterion))
    players = {network: torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.5, 0.9)) for network in (ae, disc)}
    for step, batch in zip(range(steps), loader(recipe.data, recipe.seed)):
        learns = step >= 2
        x = to_float(batch["image"]).double()
        noise = draw(stream(3, "loss"), batch["number"].tolist(), 0, (4, 8, 8))[1].double() if step >= 2 else None
        y, bottled = ae(x, noise)
        total, _ = loss.generator(x, y, bottled, disc(y) if learns else None, step, ae.decoder.conv_out.weight)
        gradients = {ae: torch.autograd.grad(total, list(ae.parameters()))}
        if two_forwards:
            finish(ae, players[ae], gradients[ae], step, clip)
            y, _ = ae(x, noise)
        if learns:
            total, _ = loss.discriminator(disc(x), disc(y.detach()))
            gradients[disc] = torch.autograd.grad(total, list(disc.parameters()))
            finish(disc, players[disc], gradients[disc], step, clip)
        if not two_forwards:
            finish(ae, players[ae], gradients[ae], step, clip)
    return ae, disc


def finish(network, optimizer, gradients, step: int, clip: float | None) -> None:
    """A step of an optimiser on a cosine of 6 steps with a warm-up of 2."""
    for p, gradient in zip(network.parameters(), gradients):
        p.grad = gradient
    if clip:
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.param_groups[0]["lr"] = 1e-3 * (
        (step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos((step - 2) / 4 * math.pi))
    )
    optimizer.step()


@pytest.mark.parametrize("two_forwards", [False, True])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_training_is_the_loop_written_out_by_hand(two_forwards, clip, tmp_path):
    overrides = [*DOUBLE, "trainer.steps=6", f"recipe.two_forwards={str(two_forwards).lower()}"]
    overrides += [f"trainer.clip={clip}"] if clip else []
    assert main(command(tmp_path / "run", *overrides)[:-1]) == 0
    ae, disc = by_hand(recipe_of(tmp_path, *overrides), 6, two_forwards, clip=clip)
    trained, within = state_of(tmp_path / "run"), drift(6, terms=8 * 16 * 16)  # pixels of a batch
    for name, network in {"autoencoder": ae, "discriminator": disc}.items():
        for key, p in network.named_parameters():
            torch.testing.assert_close(trained[f"model/{name}.{key}"], p.detach(), rtol=0, atol=within)


def test_one_forward_and_two_differ(tmp_path):
    """Or the test above could not tell them apart."""
    for name in ("false", "true"):
        assert main(command(tmp_path / name, *DOUBLE, f"recipe.two_forwards={name}")[:-1]) == 0
    assert rows(tmp_path / "false") != rows(tmp_path / "true")


def test_micro_batches_are_one_batch(tmp_path):
    """With a fixed adversarial weight; an adaptive one is each micro-batch's own."""
    for count in (1, 4):
        overrides = [*DOUBLE, "loss.adaptive=false", f"trainer.accumulate={count}"]
        assert main(command(tmp_path / str(count), *overrides)[:-1]) == 0
    assert_near(state_of(tmp_path / "1"), state_of(tmp_path / "4"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one(strategy, tmp_path):
    one = command(tmp_path / "one", *DOUBLE)
    two = command(tmp_path / "two", *DOUBLE, "trainer.devices=2", f"trainer.strategy={strategy}")
    assert wait(start(one)) == [0]
    assert wait(start(two, ranks=2)) == [0, 0], (tmp_path / "two.log").read_text()
    assert_near(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    assert manifest(tmp_path / "two")["step"] == 10
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        for name in a.keys() - {"latents/std"}:  # an average of each rank's own
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), abs=1e-8, rel=1e-8)


def test_begun_sharded_on_two_goes_on_alone(tmp_path):
    overrides = [*DOUBLE, "schedule.type=constant"]
    once, run = command(tmp_path / "once", *overrides), tmp_path / "run"
    begun = command(run, *overrides, "trainer.steps=5", "trainer.devices=2", "trainer.strategy=fsdp2")
    assert wait(start(begun, ranks=2)) == [0, 0], (tmp_path / "run.log").read_text()
    assert wait(start(command(run, *overrides))) == [0]
    assert wait(start(once)) == [0]
    assert_near(state_of(tmp_path / "once"), state_of(run))


def test_exported_file_opens_here_and_in_diffusers(finished_first_stage, tmp_path):
    from diffusers import AutoencoderKL

    file = str(finished_first_stage / "model.safetensors")
    loaded = checkpoint.open(file)
    ours = kl(channels=32, multipliers=(1, 1), blocks=1, mid_attention=False)
    checkpoint.load_weights(ours, loaded.state, "autoencoder")
    assert loaded.config["fingerprint"] == ours.fingerprint()
    assert loaded.config["optimizer"]["lr"] == 1e-3
    assert main(["convert", file, str(tmp_path / "theirs")]) == 0
    assert main(["convert", file, str(tmp_path / "compvis.safetensors"), "--to", "compvis"]) == 0
    theirs = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    z = torch.randn(2, 4, 8, 8)
    decoded = theirs.decode(z / theirs.config.scaling_factor).sample
    torch.testing.assert_close(ours.decode(z), decoded, rtol=1e-4, atol=1e-4)
    ema = {
        name.removeprefix("ema/autoencoder."): x for name, x in state_of(finished_first_stage).items() if "ema/" in name
    }
    for name, p in ours.named_parameters():
        assert torch.equal(p, ema[name])


def test_an_autoencoder_of_diffusers_is_trained_on(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    shape = {"block_out_channels": (32, 32), "layers_per_block": 1, "mid_block_add_attention": False}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = AutoencoderKL(latent_channels=4, sample_size=16, **shape, **blocks).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    begin = ["--init-from", str(tmp_path / "theirs")]
    z, decoded = torch.randn(2, 4, 8, 8), {}
    for rate in ("0", "1e-3"):
        argv = command(tmp_path / rate, f"optimizer.lr={rate}", "optimizer.weight_decay=0", "trainer.steps=3")
        assert main([*argv[:-1], *begin]) == 0
        ours = kl(channels=32, multipliers=(1, 1), blocks=1, mid_attention=False)
        checkpoint.load_weights(ours, checkpoint.open(tmp_path / rate / "model.safetensors").state, "autoencoder")
        with torch.no_grad():
            decoded[rate] = ours.decoder(ours.post_quant(z))
    expected = theirs.decode(z).sample
    torch.testing.assert_close(decoded["0"], expected, rtol=1e-4, atol=1e-4)
    assert (decoded["1e-3"] - expected).abs().mean() > 1e-3


def test_statistics_are_those_of_the_latents(tmp_path):
    recipe = recipe_of(tmp_path)
    latents = []

    def encode(image):
        latents.append(recipe.autoencoder.posterior(image / 127.5 - 1)[0].double() * 3 + 1)
        return latents[-1]

    for like in (torch.zeros(()), torch.zeros(4, 1, 1)):
        latents.clear()
        shift, scale = measure(encode, recipe.data, 0, 32, like, Rank())
        z = torch.cat(latents)
        dims = (0, 2, 3) if like.ndim else None
        torch.testing.assert_close(shift, z.mean(dims).view(-1))
        torch.testing.assert_close(scale, 1 / z.std(dims, correction=0).view(-1))
        assert len(z) == 32


def test_a_decoder_alone_keeps_latents_and_fingerprint(finished_first_stage, tmp_path, capsys):
    file = finished_first_stage / "model.safetensors"
    before = checkpoint.open(file)
    argv = [*command(tmp_path / "second", "recipe.train=decoder", "trainer.steps=4", "loss.start=2")[:-1]]
    assert main(argv) == 2
    assert "--init-from" in capsys.readouterr().err
    assert main([*argv, "--init-from", str(file)]) == 0
    after = checkpoint.open(tmp_path / "second" / "model.safetensors")
    assert after.config["fingerprint"] == before.config["fingerprint"]
    changed = {name.split(".")[1] for name, x in before.state.items() if not torch.equal(x, after.state[name])}
    assert changed == {"decoder", "post_quant"}


def test_init_from_another_shape_is_refused(finished_first_stage, tmp_path, capsys):
    file = str(finished_first_stage / "model.safetensors")
    assert main(command(tmp_path / "second", "autoencoder.latent=8", "--init-from", file)[:-1]) == 4
    assert "tensors of another shape" in capsys.readouterr().err


VQ = ["autoencoder.type=vq", "autoencoder.channels=32", "autoencoder.multipliers=[1, 1]", "autoencoder.blocks=1"]
VQ += ["autoencoder.mid_attention=false", "autoencoder.latent=4", "autoencoder.codes=64"]
VQ += ["recipe.revive=3", "recipe.sample_from=0"]


@pytest.fixture
def revivals(monkeypatch):
    """What was there before and after each revival."""
    seen, revive = [], codebook.revive

    def watched(bottleneck, rows, usage, average, memory, *others):
        before, counted = bottleneck.codebook.detach().clone(), usage.clone()
        revive(bottleneck, rows, usage, average, memory, *others)
        after = {"average": average, **memory}
        copies = {name: x.clone() for name, x in after.items()}
        seen.append((before, counted, bottleneck.codebook.detach().clone(), copies))

    monkeypatch.setattr(codebook, "revive", watched)
    return seen


def test_dead_codes_come_back_and_nothing_remembers_them(tmp_path, revivals):
    argv = command(tmp_path / "run", *VQ, "trainer.steps=7")
    assert main(argv[:-1]) == 0
    before, usage, after, memory = revivals[0]
    dead = usage == 0
    assert 0 < dead.sum() < 64
    assert usage.sum() == 3 * 8 * 64
    assert ((before != after).any(1) == dead).all()
    assert torch.equal(memory["average"][dead], after[dead])
    assert not torch.equal(memory["average"][~dead], after[~dead])
    assert memory["exp_avg"][dead].abs().max() == 0
    assert memory["exp_avg_sq"][dead].abs().max() == 0
    assert memory["exp_avg"][~dead].abs().min(1).values.max() > 0
    used = [float(row["latents/codes_used"]) for row in rows(tmp_path / "run")]
    assert used[3] > used[2]
    assert len(revivals) == 2


def test_codes_begin_as_latents_where_quantising_begins(tmp_path, revivals, monkeypatch):
    """Until then nothing looks them up, and nothing pulls latents towards them."""
    quantised, forward = [], VectorQuantizer.forward
    monkeypatch.setattr(VectorQuantizer, "forward", lambda self, *x: quantised.append(self) or forward(self, *x))
    monkeypatch.setattr(cost, "flops_by_phase", lambda loop: {})  # which passes forward too
    late = ["recipe.sample_from=4", "recipe.revive=0", "trainer.steps=6", "trainer.validate_every=6"]
    assert main(command(tmp_path / "run", *VQ, *late)[:-1]) == 0
    ((before, usage, after, memory),) = revivals
    assert usage.sum() == 0
    assert after.std() > 10 * before.std()  # latents of random weights, where codes begin within 1/64
    assert (before != after).any(1).all()
    assert torch.equal(memory["average"], after)
    assert [row["latents/codes_used"] != "" for row in rows(tmp_path / "run")] == [False] * 4 + [True] * 2
    assert [float(row["loss/penalty"]) > 0 for row in rows(tmp_path / "run")] == [False] * 4 + [True] * 2
    assert len(quantised) == 2 + 1  # two steps, one validation


def test_trained_codes_are_not_put_out_of_their_place(tmp_path, capsys):
    first = command(tmp_path / "first", *VQ, "trainer.steps=1")[:-1]
    assert main(first) == 0
    argv = command(tmp_path / "run", *VQ, "trainer.steps=1", "--init-from", str(tmp_path / "first/model.safetensors"))
    assert main([*argv[:-1], "recipe.sample_from=2"]) == 2
    assert "recipe.sample_from: would replace trained codes" in capsys.readouterr().err
    assert main(argv[:-1]) == 0


def test_codes_come_back_alike_on_two_processes_that_stop_in_between(tmp_path):
    """A checkpoint between two revivals holds what both have counted."""
    overrides = [*VQ, *DOUBLE, "schedule.type=constant"]
    one, two = command(tmp_path / "one", *overrides), command(tmp_path / "two", *overrides, "trainer.devices=2")
    assert wait(start(one)) == [0]
    for steps in (5, 10):
        assert wait(start([*two, f"trainer.steps={steps}"], ranks=2)) == [0, 0], (tmp_path / "two.log").read_text()
    assert_near(state_of(tmp_path / "one"), state_of(tmp_path / "two"))


OLD = {"sample_from": 2, "two_forwards": True, "revive": 0, "train": "all"}  # keys of version 0.1


def test_keys_of_version_0_1_still_work(tmp_path, capsys):
    """In a file and on the command line; errors call them by their new names."""
    argv = command(tmp_path / "run", "--print-config")[:-1]
    assert main([*argv, *(f"recipe.{key}={json.dumps(value)}" for key, value in OLD.items())]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["recipe"] == {"type": "autoencoder", **OLD}
    file = tmp_path / "config.yaml"
    new = "recipe: {type: autoencoder, sample_from: 2}\n"
    file.write_text(toy.KL.replace(new, ""))
    assert main([*argv, *(f"{key}={json.dumps(value)}" for key, value in OLD.items())]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    file.write_text(toy.KL.replace(new, "".join(f"{key}: {json.dumps(value)}\n" for key, value in OLD.items())))
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out) == expected
    file.write_text(toy.KL.replace(new, "revive: -1\n"))
    assert main([*argv[:-1], "--dry-run"]) == 2
    assert f"error: recipe.revive: there are no codes ({file}:4)" in capsys.readouterr().err
    assert main([*argv[:-1], "--dry-run", "revive=0", "sample_from=-1"]) == 2
    assert "error: recipe.sample_from: must be a number of steps (command line); got -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.resolution=17"], "data.resolution: not divisible by the autoencoder's factor"),
        (["data.resolution=4"], "data.resolution: too small for the discriminator"),
        (["loss.perceptual_weight=1", "loss.perceptual=lpips", "loss.vgg=nowhere.pth"], "nowhere.pth"),
        (["loss.adversarial=wgan"], "loss.adversarial"),
        (["data.batch_size=9", "trainer.devices=2"], "a batch cannot be split evenly"),
        (["data.batch_size=8", "trainer.accumulate=3"], "a batch cannot be split evenly"),
        (["data.batch_size=41"], "the set is smaller than one batch"),
        (["trainer.precision=16-mixed"], "trainer.precision: float16 is not supported"),
        (["recipe.revive=5"], "recipe.revive: there are no codes"),
        (
            ["recipe.two_forwards=true", "trainer.accumulate=2"],
            "trainer.accumulate: recipe.two_forwards needs the whole batch",
        ),
        (["discriminator_optimizer={type: adamw, lr: -1}"], "discriminator_optimizer.lr: must not be negative"),
        (["trainer.accelerator=gpu"], "trainer.accelerator: there is no GPU here"),
        (["trainer.keep=1"], "trainer.keep"),
        (["trainer.steps=0"], "trainer.steps"),
        (["optimizer.lr=-1"], "optimizer.lr: must not be negative"),
        (["schedule.warmup=-1"], "schedule.warmup"),
        (["ema.decay=1"], "ema.decay"),
        (["seed=-1"], "seed: out of range"),
        (["discriminator.in_channels=3"], "discriminator.in_channels: is set by the data"),
        ([*VQ, "trainer.devices=2", "trainer.strategy=fsdp2"], "a codebook cannot be sharded"),
        (["optimizer={type: muon, lr: 1}", "trainer.strategy=fsdp2"], "optimizer: muon needs whole matrices"),
        (["optimizer={type: muon, lr: 1, betas: [1, 1]}"], "optimizer.betas"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(overrides, words, tmp_path, capsys):
    assert main(command(tmp_path / "run", *overrides)[:-1]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_starts_other_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(tmp_path / "run")[:-1]) == 2
    assert "trainer.devices: not what torchrun starts" in (error := capsys.readouterr().err)
    assert "try trainer.devices=2" in error


def test_bfloat16_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    assert main(command(tmp_path / "run", "trainer.precision=bf16-mixed")[:-1]) == 2
    assert "trainer.precision: this GPU does not support bfloat16" in capsys.readouterr().err
    assert main(command(tmp_path / "run", "trainer.devices=2")[:-1]) == 2
    assert "trainer.devices: more than there are" in capsys.readouterr().err


def test_dry_run_builds_and_writes_nothing(tmp_path, capsys):
    assert main([*command(tmp_path / "run")[:-1], "--dry-run"]) == 0
    assert "generator 0.21 M" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_print_config_is_complete_and_plain(tmp_path, capsys):
    assert main([*command(tmp_path / "run")[:-1], "--print-config"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["trainer"]["accumulate"] == 1
    assert values["seed"] == 3


def test_bf16_compile_free_settings_train(tmp_path):
    overrides = ["trainer.precision=bf16-mixed", "trainer.channels_last=true", "autoencoder.checkpointing=true"]
    assert main(command(tmp_path / "run", *overrides)[:-1]) == 0
    assert {x.dtype for x in state_of(tmp_path / "run").values()} == {torch.float32}
