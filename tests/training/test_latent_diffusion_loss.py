"""The second stage's loss beside diffusers' formula, what is drawn for it, and what a validation measures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm.cli import main
from ldm.conditioning.compose import Compose
from ldm.conditioning.label import Label
from ldm.conditioning.layout import Layout
from ldm.data.derived import rectangles, with_derived
from ldm.draws import draw, stream
from ldm.training.loop import SCALE
from ldm.training.recipes import diffusion
from ldm.training.validation import BINS, LossByLevel
from tests.training.killing import rows
from tests.training.second_stage import command, loop_of, recipe_of

ASKS = [(i, i, 0) for i in range(8)]
TEXT = "{type: joint_text, width: 32, layers: 1, heads: 2, vocabulary: 600}"
TABLE = ["path={type: scaled_linear}", "draw={type: uniform}", "spacing={type: leading, steps: 3}"]


def prepared(recipe, batch):
    """A batch as the loader's workers leave it."""
    return recipe.preparation()(batch)


def theirs(recipe, batch, kind: str):
    """diffusers' text-to-image example: its scheduler's noise and velocity, its min-SNR weights."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    x0, condition = recipe.latents(batch), recipe.conditioner(batch)
    u, noise = draw(stream(3, "loss"), batch["number"].tolist(), 2, x0.shape[1:])
    dropped = u[:, 1] < 0.3
    empty = recipe.conditioner({"caption": [""] * len(x0)})
    tokens = torch.where(dropped[:, None, None], empty.tokens, condition.tokens)
    mask = torch.where(dropped[:, None], empty.mask, condition.mask)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    k = (u[:, 0] * 1000).long()
    x = scheduler.add_noise(x0, noise, k)
    target = noise if kind == "eps" else scheduler.get_velocity(x0, noise, k)
    snr = compute_snr(scheduler, k)
    weight = torch.stack([snr, 5.0 * torch.ones_like(k)], dim=1).min(dim=1)[0] / (snr + (kind == "v"))
    y = recipe.denoiser.backbone(x, k, tokens, mask)
    loss = nn.functional.mse_loss(y.float(), target.float(), reduction="none")
    return (loss.mean(dim=list(range(1, len(loss.shape)))) * weight).mean()


def gradients(recipe, loss) -> list[torch.Tensor]:
    parameters = [p for _, p in recipe.groups()["denoiser"]]
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_loss_and_gradients_are_those_of_diffusers_with_min_snr(kind, tmp_path):
    recipe = recipe_of(tmp_path, *TABLE, f"prediction.type={kind}", "weight={type: min_snr}")
    for p in recipe.denoiser.parameters():
        nn.init.normal_(p, std=0.05)  # or the network's last layer is zero
    batch = recipe.data.batch(ASKS, 3)
    loss, report = recipe.loss(prepared(recipe, batch), ("denoiser",))
    expected = theirs(recipe, batch, kind)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert report["loss/unweighted"].item() != pytest.approx(loss.item(), rel=1e-2)
    ours, others = (torch.cat([g.flatten() for g in gradients(recipe, each)]) for each in (loss, expected))
    assert (ours - others).norm() < 1e-5 * others.norm()


def test_each_part_is_dropped_at_its_own_rate_and_keyed(tmp_path):
    """And what is dropped is the same whatever the batch."""
    recipe = recipe_of(tmp_path, "conditioner=null", "data.batch_size=4")
    recipe.conditioner = Compose(
        parts=[Label(classes=5, null=4, width=8, drop=0.2), Layout(classes=3, width=8, drop=0.7)]
    )
    recipe.drops = recipe.conditioner.parts
    seen: dict[str, list[torch.Tensor]] = {"label": [], "boxes": []}
    recipe.condition = lambda batch, x0, drop: [seen[part].append(drop[part]) for part in drop] and None
    recipe.denoiser.loss = lambda x0, *_: x0.mean((1, 2, 3))
    for start in range(0, 4000, 500):
        batch = {"number": torch.arange(start, start + 500), "latents": torch.zeros(500, 4, 2, 2)}
        recipe.loss(prepared(recipe, batch), ("denoiser",))
    label, boxes = (torch.cat(flags) for flags in seen.values())
    assert label.double().mean() == pytest.approx(0.2, abs=0.02)
    assert boxes.double().mean() == pytest.approx(0.7, abs=0.02)
    assert (label & boxes).double().mean() == pytest.approx(0.14, abs=0.02)
    u, _ = draw(stream(3, "loss"), [1234], 3, ())
    assert (label[1234], boxes[1234]) == (u[0, 1] < 0.2, u[0, 2] < 0.7)


# ------------------------------------------------------------------------------------------- what is measured


class Knowing(nn.Module):
    """A flow that has seen the answers: its error is a known function of t."""

    def __init__(self, error):
        super().__init__()
        self.error, self.answer = error, torch.zeros(())

    def forward(self, x, t, **_):
        return self.answer + self.error(t / 1000)[:, None, None, None]


@torch.no_grad()
def validation_loss(recipe) -> dict[str, float]:
    """What a validation logs of the loss."""
    return recipe.loss_by_level.measure(recipe.validation_losses, recipe.rank)


def test_the_loss_by_level_is_that_of_the_level(tmp_path):
    recipe = recipe_of(tmp_path, "draw={type: uniform}", "trainer.validate_images=64", "data.size=640")
    knowing = Knowing(lambda t: t)
    loss = recipe.denoiser.loss

    def answering(x0, level, noise, condition):
        knowing.answer = noise - x0
        return loss(x0, level, noise, condition)

    recipe.denoiser.backbone, recipe.denoiser.loss = knowing, answering
    found = validation_loss(recipe)
    for part in range(BINS):  # the mean of t^2 over a part of time, from eight draws in it
        assert found[f"val/level_{part}"] == pytest.approx((3 * part**2 + 3 * part + 1) / (3 * BINS**2), abs=0.05)
        assert (part / BINS) ** 2 <= found[f"val/level_{part}"] <= ((part + 1) / BINS) ** 2
    parts = [found[f"val/level_{part}"] for part in range(BINS)]
    assert found["val/unweighted"] == pytest.approx(sum(parts) / BINS) == found["val/loss"]
    assert validation_loss(recipe) == found


class Sorted(list):
    """A source of ten classes of 400 samples, one after the other, in pictures of two sizes."""

    buckets = np.arange(4000) // 200 % 2


def test_what_is_measured_and_shown_is_of_all_classes():
    loss_by_level = LossByLevel(Sorted(range(4000)), 40, 0)
    measured = [sample_id.index // 400 for sample_ids in loss_by_level.batches for sample_id in sample_ids]
    assert sorted(measured) == sorted([*range(10)] * 4)
    assert len({sample_id.index // 400 for sample_id in loss_by_level.shown}) == 8
    assert len({sample_id.bucket for sample_id in loss_by_level.shown}) == 1


def test_the_loss_is_weighted_as_it_is_trained(tmp_path):
    overrides = [*TABLE, "prediction.type=v", "weight={type: min_snr, gamma: 2}"]
    found = validation_loss(recipe_of(tmp_path, *overrides))
    assert found["val/loss"] < 0.9 * found["val/unweighted"]


class Gaussian(nn.Module):
    """The best flow for data whose numbers are normal and independent (by Bayes' rule, in closed form)."""

    def __init__(self, x0):
        super().__init__()
        self.mean, self.variance = x0.mean(0), x0.var(0)

    def forward(self, x, t, **_):
        t = (t / 1000)[:, None, None, None].to(x)
        a, s = 1 - t, t
        x0 = self.mean + a * self.variance / (a**2 * self.variance + s**2) * (x - a * self.mean)
        return (x - a * x0) / s - x0


@pytest.mark.long
def test_a_short_training_beats_the_best_gaussian_without_correlations(tmp_path):
    """On latents of scenes, at the same images, levels and noise; unconditional, to be short."""
    overrides = ["conditioner=null", "backbone.attend=[]", "backbone.multipliers=[1, 1]", "optimizer.lr=4e-3"]
    overrides += [
        "trainer.validate_images=128",
        "data.size=100_000",
        "data.batch_size=16",
        "trainer.validate_every=999",
    ]
    recipe = recipe_of(tmp_path, *overrides)
    batches = [recipe.data.batch([(i, i, 0) for i in range(k, k + 256)], 3) for k in range(0, 2048, 256)]
    recipe.denoiser.backbone = Gaussian(torch.cat([recipe.latents(batch) for batch in batches]))
    bound = validation_loss(recipe)["val/loss"]
    assert main(command(tmp_path / "run", *overrides, "trainer.steps=200")[:-1]) == 0
    assert float(rows(tmp_path / "run")[-1]["val/loss"]) < bound


# ------------------------------------------------------------------------------------- what a picture alone tells


def test_masks_are_rectangles_of_the_size_that_is_drawn():
    u = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.5, 0.0]], dtype=torch.float64)
    mask = rectangles(u, torch.zeros(2, 3, 16, 32))
    assert mask.shape == (2, 1, 16, 32)
    assert mask[0, 0].nonzero().amin(0).tolist() == [0, 8]
    assert mask[0, 0].nonzero().amax(0).tolist() == [3, 31]
    assert mask[1, 0].nonzero().amin(0).tolist() == [2, 0]
    assert mask[1, 0].nonzero().amax(0).tolist() == [13, 7]


def test_what_a_batch_lacks_is_keyed_by_number():
    image = (torch.rand(6, 3, 16, 16) * 255).to(torch.uint8)
    batch = {"image": image, "number": torch.arange(10, 16)}
    reads, x0 = ("image", "mask", "low_resolution", "noise_level", "low_resolution_noise"), torch.zeros(6, 4, 4, 4)
    whole = with_derived(batch, reads, x0, 3)
    half = with_derived({name: x[4:] for name, x in batch.items()}, reads, x0[4:], 3)
    for name in reads:
        assert torch.equal(whole[name][4:], half[name])
        assert not torch.equal(whole[name][:2], whole[name][4:])
    torch.testing.assert_close(
        whole["low_resolution"], whole["image"].unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    )
    assert whole["image"].min() >= -1
    assert with_derived(batch | {"mask": 0}, ("mask", "image"), x0, 3)["mask"] == 0
    pixels = with_derived(batch, reads, torch.zeros(6, 3, 16, 16), 3, 4)  # without an autoencoder
    assert torch.equal(pixels["low_resolution"], whole["low_resolution"])
    assert pixels["low_resolution_noise"].shape == (6, 3, 16, 16)


CONDITIONS = [
    ("{type: masked_image}", "[mask]"),
    ("{type: masked_image}", "[]"),
    ("{type: low_resolution}", "[]"),
    ("{type: segmentation, classes: 6}", "[segmentation]"),
    ("{type: layout, classes: 4, width: 32, boxes: 8}", "[boxes]"),
    (f"{{type: compose, parts: [{TEXT}, {{type: edit}}]}}", "[source]"),
]


def another(name: str, x):
    """Other conditions of the same kind."""
    if name == "boxes":
        return 0.9 * x
    if name == "box_labels":
        return torch.where(x < 0, x, (x + 1) % 4)
    return x[::-1] if name == "caption" else x.flip(0)


@pytest.mark.parametrize(("conditioner", "adds"), CONDITIONS)
def test_every_condition_has_a_loss_with_gradients(conditioner, adds, tmp_path, monkeypatch):
    backbone = [f"backbone.attend={'[2]' if 'width' in conditioner else '[]'}"]
    recipe = recipe_of(tmp_path, f"conditioner={conditioner}", f"data.adds={adds}", *backbone)
    for p in recipe.denoiser.backbone.parameters():
        if not p.any() and p.ndim > 1:
            nn.init.normal_(p, std=0.1)  # what begins at zero hides what is before it
    batch = prepared(recipe, recipe.data.batch(ASKS, 3))
    loss, _ = recipe.loss(batch, ("denoiser",))
    found = zip(recipe.groups()["denoiser"], gradients(recipe, loss))
    missing = [name for (name, _), g in found if not g.isfinite().all() or not g.any()]
    assert math.isfinite(loss)
    assert [name for name in missing if "k.bias" not in name] == []
    inputs = with_derived(batch, recipe.conditioner.reads, recipe.latents(batch), 3)
    for name in recipe.conditioner.reads:  # each that is read counts
        other = inputs | {name: another(name, inputs[name])}
        other |= recipe.preparation()(other) if name == "caption" else {}  # whose tokens are read
        monkeypatch.setattr(diffusion, "with_derived", lambda *_, other=other: other)
        changed, _ = recipe.loss(batch, ("denoiser",))
        assert abs(changed - loss) > 1e-7, name


# ------------------------------------------------------------------------------------------------------ float16


def test_the_scale_halves_where_gradients_overflow_and_grows_again(tmp_path, monkeypatch):
    loop = loop_of(tmp_path, "trainer.precision=16-mixed")
    counters = loop.counters
    assert counters.scale == SCALE
    loop.failed = True
    for _ in range(15):
        loop._rescale(finite=False)
        loop._count({})
        assert counters.skipped_in_row == 0  # no fault of the training's
    assert counters.scale == 1
    loop._rescale(finite=False)
    loop._count({})
    assert (counters.scale, counters.skipped_in_row, counters.skipped) == (1, 1, 16)
    monkeypatch.setattr("ldm.training.loop.SCALE_GROWTH_STEPS", 2)
    loop._rescale(finite=True)
    loop._rescale(finite=True)
    assert (counters.scale, counters.scaled) == (2, 0)
