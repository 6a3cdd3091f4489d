"""The first stage's loss: every term by hand, CompVis's formula, and who gets which gradient."""

from __future__ import annotations

import copy
import math
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.config import parts
from ldm.errors import InputError
from ldm.losses.stage_one import FeatureDistance, Loss, adaptive_weight, hinge, reconstruction_loss, vanilla
from ldm.models.autoencoder import Autoencoder
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.quantize import Gaussian, VectorQuantizer

PIXELS = {"perceptual_weight": 0.0, "start": 0}  # what needs no other network, the discriminator at once


class Edges(nn.Module):
    """Feature maps of a fixed random convolution, a stand-in for the judge."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, dtype=torch.float64).requires_grad_(False)

    def features(self, x):
        return [x, self.conv(x).relu()]


class Game:
    """A small autoencoder and discriminator in float64, a batch, and one forward pass of each."""

    def __init__(self, bottleneck=None):
        torch.manual_seed(0)
        bottleneck = Gaussian(channels=4) if bottleneck is None else bottleneck
        numbers = {"channels": 32, "multipliers": [1, 1], "blocks": 1}
        self.autoencoder = Autoencoder(bottleneck=bottleneck, mid_attention=False, **numbers).double()
        self.critic = PatchDiscriminator(channels=16, layers=1).double()
        self.x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
        self.noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        self.last = self.autoencoder.decoder.conv_out.weight
        self.reconstruction, self.bottled = self.autoencoder(self.x, self.noise)

    def generator(self, loss: Loss, step: int = 0, **options):
        logits = self.critic(self.reconstruction)
        return loss.generator(self.x, self.reconstruction, self.bottled, logits, step, self.last, **options)

    def gradients(self, module: nn.Module) -> list[torch.Tensor | None]:
        return [parameter.grad for parameter in module.parameters()]


def with_features(**options) -> Loss:
    loss = Loss(**{"penalty_weight": 1e-2, **PIXELS, **options})
    loss.perceptual, loss.perceptual_weight = FeatureDistance(Edges()), 0.7
    return loss


# ----------------------------------------------------------------------------------------------- terms by hand


def test_pixels_by_hand():
    x = torch.zeros(2, 1, 2, 2)
    y = torch.stack((torch.tensor([[[0.0, 1.0], [0.0, 3.0]]]), torch.full((1, 2, 2), 2.0)))
    assert reconstruction_loss(x, y, 1, 0, 0).tolist() == [1.0, 2.0]
    assert reconstruction_loss(x, y, 0, 1, 0).tolist() == [2.5, 4.0]
    assert reconstruction_loss(x, y, 0, 0, 1).tolist() == [(0 + 2) / 2 + (1 + 3) / 2, 0.0]  # down, then right
    assert reconstruction_loss(x, y, 1, 3, 0.5).tolist() == [1 + 7.5 + 1.5, 2 + 12]
    assert reconstruction_loss(x, y.bfloat16(), 1, 0, 0).dtype == torch.float32


def test_hinge_and_vanilla_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.25])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.25) / 3))
    cross = [-math.log(1 / (1 + math.exp(-v))) for v in (2.0, 0.5, -1.0)]
    cross += [-math.log(1 - 1 / (1 + math.exp(-v))) for v in (-3.0, 0.0, 0.25)]
    assert vanilla(real, fake).item() == pytest.approx(0.5 * sum(cross) / 3)


def test_logits_that_are_good_enough_do_not_pull_under_hinge_only():
    for loss, pulls in ((hinge, False), (vanilla, True)):
        real, fake = torch.tensor([1.5], requires_grad=True), torch.tensor([-1.5], requires_grad=True)
        loss(real, fake).backward()
        assert (real.grad.item() < 0, fake.grad.item() > 0) == (pulls, pulls)


def test_the_penalty_per_sample():
    game, loss = Game(), Loss(penalty_weight=0.3, **PIXELS)
    expected = 0.3 * game.bottled.penalty / (3 * 16 * 16)  # nats per value of the image
    torch.testing.assert_close(loss.penalty(game.bottled, game.x), expected)
    codes = Game(VectorQuantizer(codes=8, channels=4))
    torch.testing.assert_close(loss.penalty(codes.bottled, codes.x), 0.3 * codes.bottled.penalty)


def test_the_distance_of_features_ignores_brightness_and_sees_direction():
    distance = FeatureDistance(type("Same", (nn.Module,), {"features": lambda self, x: [x]})())
    x = torch.rand(2, 3, 8, 8) + 0.1
    torch.testing.assert_close(distance(x, 5 * x), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(distance(x, -x), torch.full((2,), 4.0))  # |u - (-u)|^2


# -------------------------------------------------------------------------------------------- CompVis's formulas


def compvis_kl(game: Game, loss: Loss, kl_weight: float, weight: float, limit: float = 1e4):
    """LDM's published loss, which sums over the values of an image: its value, its gradients, its adaptive weight."""
    reconstruction, bottled = game.autoencoder(game.x, game.noise)
    pixels = (game.x - reconstruction).abs()
    features = loss.perceptual_weight * loss.perceptual(game.x, reconstruction)[:, None, None, None]
    nll = (pixels + features).sum() / len(game.x)
    against = -game.critic(reconstruction).mean()
    last = game.autoencoder.decoder.conv_out.weight
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (nll, against)]
    adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0, limit).detach() * weight
    total = nll + kl_weight * bottled.penalty.sum() / len(game.x) + adaptive * against
    return total, torch.autograd.grad(total, list(game.autoencoder.parameters())), adaptive


@pytest.mark.parametrize("limit", [1e4, 5.0])
def test_is_compvis_kl_loss_divided_by_the_values_of_an_image(limit):
    """With the same numbers; only their clamp, which acts on sums, is divided too."""
    game, values = Game(), 3 * 16 * 16
    loss = with_features(penalty_weight=1e-2, adversarial_weight=0.5, adaptive_limit=limit / values)
    ours, scalars = game.generator(loss)
    ours.backward()
    theirs, gradients, adaptive = compvis_kl(game, loss, 1e-2, 0.5, limit)
    assert (adaptive == 0.5 * limit) == (limit == 5.0)
    torch.testing.assert_close(ours * values, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(scalars["adversarial_weight"] * values, adaptive)
    for mine, other in zip(game.gradients(game.autoencoder), gradients):
        torch.testing.assert_close(mine * values, other, rtol=1e-5, atol=1e-9)


def test_is_compvis_vq_loss():
    """nll + codebook_weight * codebook loss + adaptive weight * 0.75 * adversarial loss, all of them means."""
    game = Game(VectorQuantizer(codes=8, channels=4))
    loss = with_features(penalty_weight=1.0, adversarial_weight=0.75)
    ours, _ = game.generator(loss)
    ours.backward()
    reconstruction, bottled = game.autoencoder(game.x)
    features = 0.7 * loss.perceptual(game.x, reconstruction)[:, None, None, None]
    nll, against = ((game.x - reconstruction).abs() + features).mean(), -game.critic(reconstruction).mean()
    norms = [torch.autograd.grad(part, game.last, retain_graph=True)[0].norm() for part in (nll, against)]
    theirs = nll + bottled.penalty.mean() + 0.75 * (norms[0] / (norms[1] + 1e-4)).detach() * against
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(theirs, list(game.autoencoder.parameters()))
    for mine, other in zip(game.gradients(game.autoencoder), gradients):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------------------ who gets what


def test_each_side_leaves_the_other_alone():
    game, loss = Game(), Loss(penalty_weight=1e-6, **PIXELS)
    value, _ = game.generator(loss)
    value.backward()
    assert all(gradient is None for gradient in game.gradients(game.critic))
    assert all(gradient.abs().max() > 0 for gradient in game.gradients(game.autoencoder))
    before = copy.deepcopy(game.gradients(game.autoencoder))
    value, _ = loss.discriminator(game.critic(game.x), game.critic(game.reconstruction.detach()))
    value.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, game.gradients(game.autoencoder)))
    assert all(gradient.abs().max() > 0 for gradient in game.gradients(game.critic)[:-1])


def test_the_generator_feels_the_discriminator_from_its_start_on():
    game = Game()
    loss = Loss(penalty_weight=1e-6, perceptual_weight=0, start=10, warmup=4)
    assert [loss.discriminator_learns(step) for step in (5, 6, 10)] == [False, True, True]
    assert [loss.discriminator_counts(step) for step in (6, 9, 10)] == [False, False, True]
    slopes = {}
    for step in (0, 9, 10):
        value, scalars = game.generator(loss, step)
        assert ("adversarial" in scalars) == (step == 10)
        slopes[step] = torch.autograd.grad(value, game.reconstruction, retain_graph=True)[0]
    assert torch.equal(slopes[0], slopes[9])
    assert not torch.allclose(slopes[9], slopes[10], rtol=0.1)
    off = Loss(penalty_weight=1e-6, perceptual_weight=0, start=0, adversarial_weight=0)
    assert not off.discriminator_learns(0)
    assert not off.discriminator_counts(0)


def test_the_adaptive_weight_by_its_definition():
    game, loss = Game(), with_features(adversarial_weight=0.8)
    _, scalars = game.generator(loss)
    near = sum(distance.mean() for distance in loss.distances(game.x, game.reconstruction))
    against = -game.critic(game.reconstruction).mean()
    norms = [torch.autograd.grad(part, game.last, retain_graph=True)[0].norm() for part in (near, against)]
    torch.testing.assert_close(scalars["adversarial_weight"], 0.8 * norms[0] / (norms[1] + 1e-4))
    assert 0 < scalars["adversarial_weight"] < 1e4


def test_the_adaptive_weight_is_clamped():
    near, nothing = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert adaptive_weight(near, torch.tensor([0.0, 2.0]), 1e4).item() == pytest.approx(5 / 2.0001)
    assert adaptive_weight(near, nothing, 1e4).item() == 1e4  # 5 / 1e-4 otherwise
    assert adaptive_weight(nothing, near, 1e4).item() == 0


def test_a_fixed_weight_is_the_number_it_says():
    game, loss = Game(), Loss(penalty_weight=0, adversarial_weight=0.25, adaptive=False, **PIXELS)
    value, scalars = game.generator(loss)
    assert scalars["adversarial_weight"].item() == 0.25
    against = game.critic(game.reconstruction).mean().item()
    assert value.item() == pytest.approx((game.x - game.reconstruction).abs().mean().item() - 0.25 * against)


def test_the_adaptive_weight_of_halves_averaged_is_that_of_the_whole():
    """Two ranks with half of the batch each, whose gradients are averaged."""
    game, loss = Game(), Loss(penalty_weight=0, **PIXELS)
    _, whole = game.generator(loss)
    seen: list[list[torch.Tensor]] = []

    def rank(i: int, average) -> torch.Tensor:
        x = game.x[i : i + 1]
        y, bottled = game.autoencoder(x, game.noise[i : i + 1])
        return loss.generator(x, y, bottled, game.critic(y), 0, game.last, average=average)[1]["adversarial_weight"]

    for i in range(2):
        seen.append([])
        rank(i, lambda gradient: seen[-1].append(gradient) or gradient)
    means = [(a + b) / 2 for a, b in zip(*seen)]
    for i in range(2):
        turns = iter(means)
        torch.testing.assert_close(rank(i, lambda _, turns=turns: next(turns)), whole["adversarial_weight"])
    alone = rank(0, lambda gradient: gradient)
    assert not torch.allclose(alone, whole["adversarial_weight"], rtol=1e-3)


def test_one_forward_pass_serves_both_updates_under_autocast():
    game, loss = Game(), Loss(penalty_weight=1e-6, **PIXELS)
    autoencoder, critic, x = game.autoencoder.float(), game.critic.float(), game.x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, bottled = autoencoder(x, game.noise.float())
        value, scalars = loss.generator(x, y, bottled, critic(y), 0, autoencoder.decoder.conv_out.weight)
        other, more = loss.discriminator(critic(x), critic(y.detach()))
    assert y.dtype == torch.bfloat16
    assert {v.dtype for v in (value, other, *scalars.values())} == {torch.float32}
    value.backward()
    other.backward()
    assert all(p.grad.isfinite().all() for p in (*autoencoder.parameters(), *critic.parameters()))
    assert not any(v.requires_grad for v in (scalars | more).values())


def test_the_weight_of_a_part_scales_its_gradient_with_the_loss():
    """Micro-batches divide the scalar; what was computed at the reconstruction must be divided too."""
    game, loss = Game(), with_features()
    value, _ = game.generator(loss)
    whole = torch.autograd.grad(value, game.last, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value / 4, game.last)[0], whole / 4)


def test_discriminator_scalars():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    value, scalars = Loss(penalty_weight=0, **PIXELS).discriminator(real, fake)
    assert value.item() == scalars["discriminator"].item() == 0.25
    assert (scalars["logits_real"].item(), scalars["logits_fake"].item()) == (2.0, -0.5)
    value, _ = Loss(penalty_weight=0, adversarial="vanilla", **PIXELS).discriminator(real, fake)
    assert value.item() == pytest.approx(0.5 * (F.softplus(-real) + F.softplus(fake)).mean().item())


# --------------------------------------------------------------------------------------------------- the part


def test_holds_no_weight_that_learns():
    loss = with_features()
    assert [name for name, parameter in loss.named_parameters() if parameter.requires_grad] == []
    assert parts.find("loss") is Loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty_weight": -1.0}, "penalty_weight: must not be negative; got -1.0; expected 0 or more; try 0"),
        ({"start": -1}, "start: must not be negative; got -1; expected 0 or more; try 0"),
        ({"l1": 0.0}, "l1: no pixel loss; got l1=0 and l2=0; expected one of them above 0; try l1=1.0"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Loss(**{"penalty_weight": 1.0, **PIXELS, **arguments})


def test_lpips_without_its_file_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"VGG16 .*/vgg16-397923af\.pth\).* loss\.perceptual=judge"):
        Loss(penalty_weight=1e-6)
    assert Loss(penalty_weight=1e-6, perceptual_weight=0).perceptual is None


def test_the_judge_is_copied_before_the_loss_moves_it(monkeypatch):
    one = Edges()
    monkeypatch.setitem(sys.modules, "ldm.scenes.pretrained", types.SimpleNamespace(judge=lambda: one))
    loss = Loss(penalty_weight=1e-6, perceptual="judge", perceptual_weight=2.0).to(torch.float32)
    assert one.conv.weight.dtype == torch.float64
    x, y = torch.rand(2, 2, 3, 8, 8)
    _, features = loss.distances(x, y)
    torch.testing.assert_close(features, 2 * FeatureDistance(one.float())(x, y))
