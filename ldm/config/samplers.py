"""Other programs' names of samplers, such as "DPM++ 2M Karras", and of a pipeline's arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.config import parts
from ldm.errors import InputError, nearest

# in lower case, with _ for blanks and hyphens
SOLVERS = {
    "k_euler": "euler",
    "euler_a": "euler_ancestral",
    "k_euler_a": "euler_ancestral",
    "k_heun": "heun",
    "dpm++_2s": "dpmpp_2s",
    "dpm++_3s": "dpmpp_3s",
    "dpm++_2m": "dpmpp_2m",
    "k_dpmpp_2m": "dpmpp_2m",
    "dpm++_2m_sde": "dpmpp_2m_sde",
    "dpm++_3m": "dpmpp_3m",
    "unipc_2": "unipc",
}
SIMILAR = {  # solvers that do not exist here -> the most similar one that does
    **dict.fromkeys(("dpm++_sde", "dpm++_2s_a", "dpm++_3m_sde", "dpm++_2m_sde_heun", "restart"), "dpmpp_2m_sde"),
    **dict.fromkeys(("lms", "k_lms", "plms", "pndm", "ddim_cfg++", "dpm_fast", "dpm_adaptive"), "dpmpp_2m"),
    **dict.fromkeys(("dpm2", "k_dpm_2"), "dpmpp_2s"),
    **dict.fromkeys(("dpm2_a", "k_dpm_2_a", "lcm"), "euler_ancestral"),
}
SPACINGS: dict[str, dict[str, Any]] = {
    "karras": {"type": "karras"},
    "exponential": {"type": "log_snr"},
    "simple": {"type": "trailing"},
    "normal": {"type": "linspace", "spare": 0},
    "uniform": {"type": "linspace", "spare": 0},
    "sgm_uniform": {"type": "linspace", "spare": 1},
    "ddim_uniform": {"type": "leading"},
}
MISSING = ("polyexponential", "beta", "kl_optimal", "align_your_steps", "ays", "turbo")  # spacings of other programs

ARGUMENTS = {  # arguments of diffusers' pipelines and of our command line -> our pipeline's
    "sampler": "solver",
    "guidance_scale": "cfg",
    "num_inference_steps": "steps",
    "negative_prompt": "negative",
    "num_images_per_prompt": "n",
    "generator": "seed",
}


def check_arguments(given: Mapping[str, Any], *functions: Callable[..., Any]) -> None:
    """Refuse arguments that none of these functions has, and name those that were probably meant."""
    known = [name for function in functions for name in inspect.signature(function).parameters]
    for name in given:
        if name not in known:
            meant = ARGUMENTS.get(name) or nearest(name, known)
            raise InputError(f"{name}: no such argument of a pipeline", hint=f"{meant}=" if meant else "")


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """The solver that a name means, and the settings of its spacing if the name ends in one."""
    if name in parts.TABLES["solver"]:
        return name, {}
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower())
    found = re.fullmatch(rf"(.+?)_({'|'.join(sorted([*SPACINGS, *MISSING], key=len, reverse=True))})", plain)
    solver, spacing = found.groups() if found else (plain, "")
    if spacing in MISSING:
        expected = f"one of {', '.join(SPACINGS)} after the solver"
        raise InputError(f"sampler: no spacing {spacing}", "", name, expected, f"{solver} karras")
    known = {**dict(zip(parts.TABLES["solver"], parts.TABLES["solver"])), **SOLVERS}
    if solver not in known:
        hint = SIMILAR.get(solver) or nearest(solver, known)
        raise InputError("sampler: unknown", "", name, f"one of {', '.join(parts.TABLES['solver'])}", hint)
    return known[solver], SPACINGS.get(spacing, {})


def overrides(
    cfg: float | None, steps: int | None, solver: str | None, extra: Sequence[str], now: Mapping[str, Any]
) -> list[str]:
    """Short settings as overrides of the spacing `now`; they win over `extra`, and a new spacing keeps its steps."""
    name, spacing = (None, {}) if solver is None else parse(solver)
    kept = [f"spacing.steps={now.get('steps') or len(now['times'])}"] if spacing else []
    wanted = {"guidance.cfg": cfg, "solver.type": name, **{f"spacing.{key}": value for key, value in spacing.items()}}
    wanted["spacing.steps"] = steps
    return [*kept, *extra, *(f"{key}={value}" for key, value in wanted.items() if value is not None)]
