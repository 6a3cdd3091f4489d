"""The demo learns, samples and draws."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import assemble
from ldm.cli import config_file, demo, main, swiss_roll
from ldm.config import schema as configuration
from ldm.draws import draw

FAST = ["steps=200", "batch_size=64", "backbone.width=32", "spacing.steps=4"]


def config(*overrides: str) -> configuration.Config:
    return configuration.load(config_file("swiss_roll", "demo"), list(overrides), demo.Schema)


def test_it_draws_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(swiss_roll, "POINTS", 300)
    assert main(["demo", "--out", str(tmp_path / "roll.png"), *FAST]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'roll.png'}\n"
    picture = np.array(Image.open(tmp_path / "roll.png"))
    height = swiss_roll.PANEL + swiss_roll.MARGIN
    for row in range(2):
        for column in range(4):
            panel = picture[
                row * height : (row + 1) * height, column * swiss_roll.PANEL : (column + 1) * swiss_roll.PANEL
            ]
            assert (panel[swiss_roll.MARGIN :] < 200).any(), "every panel shows points"


@pytest.mark.parametrize(
    "axes",
    [
        ["path.type=cosine", "prediction.type=v"],
        ["path.type=linear", "prediction.type=eps", "weight.type=min_snr"],
        ["path.type=ve", "prediction.type=edm", "draw.type=log_normal", "weight.type=edm", "spacing.type=karras"],
        ["path.type=vp_sde", "prediction.type=x0", "weight.type=snr"],
        ["path.type=scaled_linear", "path.zero_terminal_snr=true", "prediction.type=flow", "draw.type=logit_normal"],
    ],
)
def test_any_axes_combine_and_learn(axes, monkeypatch):
    """After 200 steps the loss at fixed draws is well below its beginning."""
    monkeypatch.setattr(swiss_roll, "POINTS", 200)
    settings = config(*FAST, *axes, "spacing.steps=4")
    u, noise = draw(5, range(500), 3, (2,))
    level = settings.build("draw")(assemble.denoiser(settings, in_channels=2).path, u[:, 0])

    def loss(denoiser):
        with torch.no_grad():
            weight = assemble.weight(settings, denoiser.path)(denoiser.prediction, level)
            return (weight * denoiser.loss(swiss_roll.roll(u[:, 1:]), level, noise)).mean().item()

    torch.manual_seed(settings["seed"])
    before, learned = loss(assemble.denoiser(settings, in_channels=2)), swiss_roll.learn(settings)
    assert loss(learned) < 0.8 * before
    for panel in swiss_roll.samples(learned, assemble.grid(settings, learned.path), 0):
        assert panel.points.isfinite().all()


def test_the_energy_distance_tells_distributions_apart():
    a, b, c = (torch.randn(1500, 2) for _ in range(3))
    assert abs(swiss_roll.energy_distance(a, b)) < 0.01
    assert swiss_roll.energy_distance(a, 1.5 * c) > 0.03


def distance_to_the_spiral(points: torch.Tensor) -> torch.Tensor:
    angle = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 2000)[:, None]
    return torch.cdist(points, angle * torch.cat([angle.cos(), angle.sin()], 1) / 6.8).min(1).values


@pytest.mark.slow
def test_the_shipped_demo_learns_the_roll():
    """The roll is 0.04 thick; four in five samples of each solver lie within 0.15 of its line, and cover all of it."""
    settings = config()
    denoiser = swiss_roll.learn(settings)
    truth = swiss_roll.roll(draw(50, range(6000), 2, ())[0])
    assert (distance_to_the_spiral(truth) < 0.15).double().mean() > 0.99
    for panel in swiss_roll.samples(denoiser, assemble.grid(settings, denoiser.path), 0):
        assert (distance_to_the_spiral(panel.points) < 0.15).double().mean() > 0.8
        assert swiss_roll.energy_distance(panel.points, truth) < 0.002
