"""Samplers by the names of other programs."""

from __future__ import annotations

import pytest

from ldm.config import parts, samplers
from ldm.config.samplers import parse
from ldm.diffusion.path import scaled_linear
from ldm.errors import InputError


@pytest.mark.parametrize(
    ("name", "solver", "spacing"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", {"type": "karras"}),
        ("dpmpp_2m_karras", "dpmpp_2m", {"type": "karras"}),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde", {"type": "karras"}),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", {"type": "log_snr"}),
        ("Euler a", "euler_ancestral", {}),
        ("Euler Simple", "euler", {"type": "trailing"}),
        ("Heun Normal", "heun", {"type": "linspace", "spare": 0}),
        ("Euler SGM Uniform", "euler", {"type": "linspace", "spare": 1}),
        ("ddim DDIM uniform", "ddim", {"type": "leading"}),
        ("DDIM", "ddim", {}),
        ("UniPC", "unipc", {}),
    ],
)
def test_what_a_name_means(name, solver, spacing):
    assert parse(name) == (solver, spacing)


@pytest.mark.parametrize("name", parts.TABLES["solver"])
def test_our_own_names_are_themselves(name):
    assert parse(name) == (name, {})
    assert parse(name.upper().replace("_", " ")) == (name, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LMS", "sampler: unknown; got LMS; expected one of ddim, .*; try dpmpp_2m$"),
        ("LMS Karras", "sampler: unknown; got LMS Karras; .*; try dpmpp_2m$"),
        ("DPM++ SDE", "sampler: unknown; got DPM.*; try dpmpp_2m_sde$"),
        ("DPM2 a", ".*; try euler_ancestral$"),
        ("eular", ".*; try euler$"),
        ("xxxxxxxx", "sampler: unknown; got xxxxxxxx; expected one of ddim, [^;]*$"),
        ("Euler Beta", "sampler: no spacing beta; got Euler Beta; expected one of karras, .*; try euler karras$"),
        ("Euler Align Your Steps", "sampler: no spacing align_your_steps; got Euler Align.*"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(name, message):
    with pytest.raises(InputError, match=message):
        parse(name)


def test_every_similar_solver_and_every_spacing_exist():
    assert {*samplers.SIMILAR.values(), *samplers.SOLVERS.values()} <= {*parts.TABLES["solver"]}
    assert not {*samplers.SIMILAR} & {*samplers.SOLVERS, *parts.TABLES["solver"]}
    for node in samplers.SPACINGS.values():
        settings = {name: value for name, value in node.items() if name != "type"}
        grid = parts.find("spacing", node["type"])(steps=5, **settings).grid(scaled_linear())
        assert len(grid.t) == 6


def test_the_levels_of_sgm_uniform_and_normal_are_those_of_comfyui():
    """linspace over the table's steps: N + 1 levels without the last, and N down to the least noisy."""
    path = scaled_linear()
    sgm = parts.find("spacing", "linspace")(steps=4, spare=1).grid(path).t
    normal = parts.find("spacing", "linspace")(steps=4, spare=0).grid(path).t
    assert sgm.tolist()[:4] == [999, 749, 500, 250]
    assert normal.tolist()[:4] == [999, 666, 333, 0]
