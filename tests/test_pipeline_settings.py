"""The settings and arguments of a pipeline: other programs' names, samplers with spacings, the progress bar."""

import pytest

from ldm.errors import InputError
from tests.test_pipeline import PROMPT, ask_ours, distance, sd1

__all__ = ["sd1"]  # a fixture

KARRAS = {"rho": 7.0, "end": "zero"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sampler", "solver="),
        ("guidance_scale", "cfg="),
        ("num_inference_steps", "steps="),
        ("negative_prompt", "negative="),
        ("num_images_per_prompt", "n="),
        ("generator", "seed="),
        ("stpes", "steps="),
    ],
)
def test_arguments_of_other_pipelines_are_told_ours(name, meant, sd1):
    with pytest.raises(InputError, match=f"^{name}: no such argument of a pipeline; try {meant}$"):
        sd1(PROMPT, **{name: 1})


def test_a_sampler_with_its_spacing_keeps_the_model_s_steps(sd1):
    """As other programs name it; the spacing of a name is the same as one in an override."""
    config = sd1.settings(solver="DPM++ 2M Karras").config
    assert (config["solver"]["type"], config["spacing"]) == ("dpmpp_2m", {"type": "karras", "steps": 50} | KARRAS)
    assert sd1.settings(solver="Euler a", overrides=["spacing.steps=9"]).config["spacing"]["steps"] == 9
    assert sd1.settings(solver="Euler Karras", overrides=["spacing.steps=9"]).config["spacing"]["steps"] == 9
    assert sd1.settings(solver="Euler Karras", steps=7, overrides=["spacing.steps=9"]).config["spacing"]["steps"] == 7
    wanted = ["solver.type=dpmpp_2m", "spacing.type=karras", "spacing.steps=6"]
    a, b = (ask_ours(sd1, **asked) for asked in ({"solver": "DPM++ 2M Karras", "steps": 6}, {"overrides": wanted}))
    assert distance(a, ask_ours(sd1, overrides=wanted, steps=6)) == 0
    assert distance(a, b) > 3, "without steps=6 there are ten"
    sd1.config = sd1.config.amended(["spacing.type=explicit", "spacing.times=[900, 500, 9]"])
    spacing = sd1.settings(solver="Heun SGM Uniform").config["spacing"]
    assert spacing == {"type": "linspace", "steps": 3, "spare": 1, "end": "zero"}


def test_the_progress_bar_is_for_terminals(sd1, capsys, monkeypatch):
    sd1(PROMPT, steps=2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sd1(PROMPT, steps=2, n=2, batch_size=1)
    assert "0/4" in capsys.readouterr().err
    sd1(PROMPT, steps=2, progress=False)
    assert capsys.readouterr() == ("", "")
