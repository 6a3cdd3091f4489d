"""Noise schedules of other programs: tables of betas, and diffusers' schedulers in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.networks import LARGEST, check_size
from ldm.diffusion.path import Table, cosine
from ldm.errors import CheckpointError

Node = dict[str, Any]
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SOLVERS = {  # diffusers' class -> our solver, and the class's default spacing
    "DDIMScheduler": ("ddim", "leading"),
    "DDPMScheduler": ("ddpm", "leading"),
    "EulerDiscreteScheduler": ("euler", "linspace"),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", "linspace"),
    "HeunDiscreteScheduler": ("heun", "linspace"),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace"),
    "UniPCMultistepScheduler": ("unipc", "linspace"),
}
SPACINGS = ("leading", "linspace", "trailing")
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # they take N of N + 1 steps
KARRAS = (*MULTISTEP, "EulerDiscreteScheduler", "HeunDiscreteScheduler")  # they read `use_karras_sigmas`
DPM_SOLVERS = {  # (algorithm_type, solver_order) -> our solver
    ("dpmsolver++", 1): {"type": "ddim"},
    ("dpmsolver++", 2): {"type": "dpmpp_2m"},
    ("dpmsolver++", 3): {"type": "dpmpp_3m"},
    ("sde-dpmsolver++", 2): {"type": "dpmpp_2m_sde"},
}
WRITTEN: dict[str, Node] = {ours: {"_class_name": theirs} for theirs, (ours, _) in SOLVERS.items()} | {
    node["type"]: {"_class_name": MULTISTEP[0], "algorithm_type": algorithm, "solver_order": order}
    for (algorithm, order), node in DPM_SOLVERS.items()
    if order > 1
}
UNSUPPORTED = {  # options that we ignore, and their values that do nothing
    "clip_sample": False,
    "thresholding": False,
    "predict_x0": True,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "euler_at_final": False,
}
ROUNDED = {torch.float16: (3, 2e-3), torch.bfloat16: (2, 2e-2)}  # significant digits, relative error
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}


def path_of_betas(betas: Tensor) -> Node:
    """The path of a table of betas, by its name if it has one."""
    digits, rtol = ROUNDED.get(betas.dtype, (6, 1e-4))  # 6 of float32
    betas = betas.double()
    start, end = (float(f"{betas[index].item():.{digits}g}") for index in (0, -1))
    roots = torch.linspace(start**0.5, end**0.5, len(betas), dtype=torch.float64)
    known = {"linear": torch.linspace(start, end, len(betas), dtype=torch.float64), "scaled_linear": roots.square()}
    for kind, table in known.items():
        if torch.allclose(table, betas, rtol=rtol, atol=1e-7):
            return {"type": kind, "start": start, "end": end} | ({} if len(betas) == 1000 else {"steps": len(betas)})
    return {"type": "table", "betas": betas.tolist()}


def read_scheduler(scheduler: Mapping[str, Any], notes: list[str]) -> dict[str, Node]:
    """The path, prediction, spacing and solver of a scheduler's configuration."""
    kind = scheduler.get("_class_name", "DDIMScheduler")
    if kind not in SOLVERS and "beta_schedule" not in scheduler:
        expected = ", ".join(SOLVERS)
        raise CheckpointError("a scheduler of another kind of noise", "scheduler_config.json", kind, expected)
    if kind not in SOLVERS:
        notes.append(f"{kind} is not supported: DPM-Solver++ 2M replaces it")
    ignored = {name: scheduler[name] for name, idle in UNSUPPORTED.items() if scheduler.get(name, idle) != idle}
    notes += [f"the scheduler's {name}={value} is ignored" for name, value in ignored.items()]
    _, spacing = SOLVERS.get(kind, ("", "leading"))
    prediction: Node = {"type": known("prediction_type", scheduler.get("prediction_type", "epsilon"), PREDICTIONS)}
    variance = VARIANCES.get(scheduler.get("variance_type") or "", "small")
    if variance == "learned":
        prediction = {"type": "learned_range", "of": prediction}
    return {
        "path": read_path(scheduler),
        "prediction": prediction,
        "spacing": read_spacing(scheduler, spacing),
        "solver": read_solver(scheduler, kind, variance, notes),
    }


def read_solver(scheduler: Mapping[str, Any], kind: str, variance: str, notes: list[str]) -> Node:
    """The solver of a scheduler, whose order and kind of process are options in diffusers."""
    solver, _ = SOLVERS.get(kind, ("dpmpp_2m", ""))
    if solver == "ddpm":
        return {"type": solver, "noise_var": variance}
    if kind == "UniPCMultistepScheduler" and scheduler.get("solver_order", 2) != 2:
        return {"type": solver, "order": scheduler["solver_order"]}
    if kind == "DPMSolverMultistepScheduler":
        which = scheduler.get("algorithm_type", "dpmsolver++"), scheduler.get("solver_order", 2)
        if which not in DPM_SOLVERS:
            notes.append(f"{which[0]} of order {which[1]} is not supported: DPM-Solver++ 2M replaces it")
        return dict(DPM_SOLVERS.get(which, {"type": solver}))
    return {"type": solver}


def known(name: str, value: Any, table: Mapping[str, str]) -> str:
    """Our name of a value, or an error that lists the supported ones."""
    if value not in table:
        raise CheckpointError(f"unsupported {name}", "scheduler_config.json", str(value), ", ".join(table))
    return table[value]


def read_path(scheduler: Mapping[str, Any]) -> Node:
    """The path of a scheduler's betas."""
    steps, zero = scheduler.get("num_train_timesteps", 1000), bool(scheduler.get("rescale_betas_zero_snr"))
    check_size("num_train_timesteps: too large", steps, LARGEST, "scheduler_config.json")
    stretched = {"zero_terminal_snr": True} if zero else {}
    if scheduler.get("trained_betas") is not None:
        return path_of_betas(torch.tensor(scheduler["trained_betas"], dtype=torch.float64)) | stretched
    node: Node = {"type": known("beta_schedule", scheduler.get("beta_schedule", "linear"), BETA_SCHEDULES)}
    if node["type"] == "cosine" and zero:
        return {"type": "table", "betas": betas_of(cosine(steps=steps))} | stretched
    if node["type"] != "cosine":
        node |= {"start": scheduler.get("beta_start", 1e-4), "end": scheduler.get("beta_end", 0.02)} | stretched
    return node | ({} if steps == 1000 else {"steps": steps})


def betas_of(path: Table) -> list[float]:
    """The betas of a table: 1 - beta is what each step leaves of alpha squared."""
    return (1 - (path.alpha[1:] / path.alpha[:-1]) ** 2).tolist()


def read_spacing(scheduler: Mapping[str, Any], default: str) -> Node:
    """The spacing of a scheduler; diffusers' pipelines take 50 steps by default."""
    kind = scheduler.get("_class_name", "DDIMScheduler")
    if scheduler.get("use_karras_sigmas") and kind in KARRAS:
        return {"type": "karras", "steps": 50}
    node: Node = {"type": scheduler.get("timestep_spacing", default), "steps": 50}
    if node["type"] == "leading" and scheduler.get("steps_offset", 0) != 1:  # ours is Stable Diffusion's
        node["offset"] = scheduler.get("steps_offset", 0)
    if kind in MULTISTEP and node["type"] != "trailing":
        node["spare"] = 1
    # only DDIM reads the first key, though `from_config` hands it on to every other class
    stays = kind == "DDIMScheduler" and scheduler.get("set_alpha_to_one") is False
    if stays or scheduler.get("final_sigmas_type") == "sigma_min":
        node["end"] = "table"
    return node


def written_as(solver: Node, spacing: Node, notes: list[str]) -> Node:
    """diffusers' class for a solver and its spacing, with notes of what it does differently."""
    name, eta = solver["type"], solver.get("eta", 0.0)
    if name == "dpmpp_2m" and eta == 1:
        name, eta = "dpmpp_2m_sde", 0.0
    written = dict(WRITTEN.get(name, WRITTEN["ddim"]))
    kind = written["_class_name"]
    if name not in WRITTEN:
        notes.append(f"diffusers has no scheduler for solver {name}: DDIM replaces it")
    if name == "unipc":
        written["solver_order"] = solver.get("order", 2)
    if eta:
        notes.append(f"diffusers' {kind} has no eta, which is {eta} in this file")
    if spacing["type"] not in (*SPACINGS, *(["karras"] if kind in KARRAS else [])):
        notes.append(f"diffusers' {kind} has no spacing {spacing['type']}: leading replaces it")
    elif spacing["type"] in ("leading", "linspace") and spacing.get("spare", 0) != (kind in MULTISTEP):
        spare = int(kind in MULTISTEP)
        notes.append(f"diffusers' {kind} uses spacing.spare={spare}, unlike this file")
    return written


def write_scheduler(config: Mapping[str, Any], notes: list[str]) -> Node:
    """The configuration of a scheduler with our path, prediction, spacing and solver, as diffusers stores it."""
    path, spacing, solver = config["path"], config["spacing"], config["solver"]
    prediction = config["prediction"]
    learned = prediction["type"] == "learned_range"
    kind = prediction["of"]["type"] if learned else prediction["type"]
    kinds = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    paths = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()} | {"table": "linear"}
    if kind not in kinds or path["type"] not in paths:
        got = f"{path['type']} with {kind}"
        raise CheckpointError(
            "diffusers has no scheduler for this", "path, prediction", got, ", ".join(paths), "our format"
        )
    defaults = {"scaled_linear": (0.00085, 0.012)}.get(path["type"], (1e-4, 0.02))
    unlike = path["type"] == "cosine" and {"offset", "max_beta"} & path.keys()  # squaredcos_cap_v2 has no options
    betas = betas_of(cosine(**{key: x for key, x in path.items() if key != "type"})) if unlike else path.get("betas")
    node = written_as(solver, spacing, notes)
    node |= {
        "num_train_timesteps": len(betas) if betas else path.get("steps", 1000),
        "beta_schedule": paths[path["type"]],
        "beta_start": path.get("start", defaults[0]),
        "beta_end": path.get("end", defaults[1]),
        "trained_betas": betas,
        "prediction_type": kinds[kind],
        "timestep_spacing": spacing["type"] if spacing["type"] in SPACINGS else "leading",
        "steps_offset": spacing.get("offset", 1),
        "rescale_betas_zero_snr": path.get("zero_terminal_snr", False),
        "use_karras_sigmas": spacing["type"] == "karras" and node["_class_name"] in KARRAS,
    }
    ends = spacing.get("end") == "table"
    node |= {"final_sigmas_type": "sigma_min" if ends else "zero"} if node["_class_name"] in MULTISTEP else {}
    node |= {"clip_sample": False, "set_alpha_to_one": not ends}
    variances = {"learned": "learned_range", "large": "fixed_large", "small": "fixed_small"}
    if solver["type"] == "ddpm" or learned:
        node["variance_type"] = "learned_range" if learned else variances[solver.get("noise_var", "large")]
    return node
