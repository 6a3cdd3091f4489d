"""Short names of parts -> "module:name". Data chooses from these tables and from nothing else."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from ldm.errors import InputError, nearest

# axis -> {type: target}; an axis with a single target has no `type`
TABLES: dict[str, dict[str, str] | str] = {
    "path": {
        "linear": "ldm.diffusion.path:linear",
        "scaled_linear": "ldm.diffusion.path:scaled_linear",
        "cosine": "ldm.diffusion.path:cosine",
        "table": "ldm.diffusion.path:Table",
        "vp_sde": "ldm.diffusion.path:VPSDE",
        "ve": "ldm.diffusion.path:VE",
        "flow": "ldm.diffusion.path:Flow",
    },
    "prediction": {
        "eps": "ldm.diffusion.prediction:Eps",
        "x0": "ldm.diffusion.prediction:X0",
        "v": "ldm.diffusion.prediction:V",
        "flow": "ldm.diffusion.prediction:Flow",
        "edm": "ldm.diffusion.prediction:EDM",
        "learned_range": "ldm.diffusion.prediction:LearnedRange",
    },
    "backbone": {
        "unet": "ldm.models.unet:UNet",
        "dit": "ldm.models.dit:DiT",
        "mlp": "ldm.models.mlp:MLP",
    },
    "conditioner": {
        "clip": "ldm.conditioning.text:clip",
        "open_clip": "ldm.conditioning.text:open_clip",
        "joint_text": "ldm.conditioning.text:joint_text",
        "t5": "ldm.conditioning.t5:t5",
        "label": "ldm.conditioning.label:Label",
        "layout": "ldm.conditioning.layout:Layout",
        "segmentation": "ldm.conditioning.spatial:Segmentation",
        "masked_image": "ldm.conditioning.spatial:MaskedImage",
        "low_resolution": "ldm.conditioning.spatial:LowResolution",
        "edit": "ldm.conditioning.spatial:Edit",
        "compose": "ldm.conditioning.compose:Compose",
    },
    "autoencoder": {
        "kl": "ldm.models.autoencoder:kl",
        "vq": "ldm.models.autoencoder:vq",
    },
    "draw": {
        "uniform": "ldm.diffusion.times:Uniform",
        "logit_normal": "ldm.diffusion.times:LogitNormal",
        "log_normal": "ldm.diffusion.times:LogNormal",
    },
    "weight": {
        "constant": "ldm.diffusion.weights:Constant",
        "snr": "ldm.diffusion.weights:SNR",
        "min_snr": "ldm.diffusion.weights:MinSNR",
        "edm": "ldm.diffusion.weights:EDM",
    },
    "spacing": {
        "trailing": "ldm.diffusion.spacing:Trailing",
        "linspace": "ldm.diffusion.spacing:Linspace",
        "leading": "ldm.diffusion.spacing:Leading",
        "log_snr": "ldm.diffusion.spacing:LogSNR",
        "karras": "ldm.diffusion.spacing:Karras",
        "explicit": "ldm.diffusion.spacing:Explicit",
    },
    "solver": {
        "ddim": "ldm.diffusion.solvers:ddim",
        "ddpm": "ldm.diffusion.solvers:ddpm",
        "euler": "ldm.diffusion.solvers:euler",
        "euler_ancestral": "ldm.diffusion.solvers:euler_ancestral",
        "heun": "ldm.diffusion.solvers:heun",
        "dpmpp_2s": "ldm.diffusion.solvers:dpmpp_2s",
        "dpmpp_3s": "ldm.diffusion.solvers:dpmpp_3s",
        "dpmpp_2m": "ldm.diffusion.solvers:dpmpp_2m",
        "dpmpp_2m_sde": "ldm.diffusion.solvers:dpmpp_2m_sde",
        "dpmpp_3m": "ldm.diffusion.solvers:dpmpp_3m",
        "unipc": "ldm.diffusion.solvers:unipc",
    },
    "recipe": {
        "autoencoder": "ldm.training.recipes.autoencoder:AutoencoderRecipe",
        "diffusion": "ldm.training.recipes.diffusion:DiffusionRecipe",
    },
    "loss": "ldm.losses.stage_one:Loss",
    "discriminator": "ldm.models.discriminator:PatchDiscriminator",
    "optimizer": {
        "adamw": "ldm.training.optimizers:adamw",
        "muon": "ldm.training.muon:Muon",
        "sgd": "ldm.training.optimizers:sgd",
    },
    "schedule": {
        "constant": "ldm.training.optimizers:constant",
        "cosine": "ldm.training.optimizers:cosine",
    },
    "ema": "ldm.training.ema:EMA",
    "trainer": "ldm.training.trainer:TrainerSettings",
    "guidance": "ldm.diffusion.guidance:Guidance",
    "data": {
        "images": "ldm.data.images:Images",
        "latents": "ldm.data.latents:Latents",
        "scenes": "ldm.scenes:Scenes",
    },
    "features": {
        "judge": "ldm.scenes.features:JudgeFeatures",
        "inception": "ldm.metrics.features:InceptionFeatures",
        "dinov2": "ldm.metrics.features:DINOv2Features",
    },
    "clip": "ldm.metrics.clip_score:CLIPScore",
    "verifier": {"scenes": "ldm.scenes.verifier:Verifier"},  # by the type of the data
}
TABLES["discriminator_optimizer"] = TABLES["optimizer"]
TABLES["validation"] = TABLES["training"] = TABLES["data"]  # other sources of the same kinds

# networks that ship with the package, for losses and metrics; a configuration chooses none of them by target
SHIPPED = {"judge": "ldm.scenes.pretrained:judge"}

# families of published checkpoints; the last is asked first, so that a plugin's are asked before these
FAMILIES: dict[str, str] = {
    "first_stage": "ldm.checkpoint.families.first_stage:FIRST_STAGES",
    "ldm_kl": "ldm.checkpoint.families.ldm:KL",
    "ldm_vq": "ldm.checkpoint.families.ldm:VQ",
    "ldm_class": "ldm.checkpoint.families.ldm:CLASS",
    "ldm_text": "ldm.checkpoint.families.ldm:TEXT",
    "sd2": "ldm.checkpoint.families.sd:SD2",
    "sd1": "ldm.checkpoint.families.sd:SD1",
    "dit": "ldm.checkpoint.families.dit:DIT",
}

# parameters that the assembly supplies -> who owns the fact; nobody writes them in YAML
GIVEN: dict[str, dict[str, str]] = {
    "prediction": {"sigma_data": "path.sigma_data"},
    "weight": {"sigma_data": "path.sigma_data"},
    "backbone": {
        "in_channels": "the data",
        "extra_channels": "the conditioner",
        "context": "the conditioner",
        "pooled": "the conditioner",
        "classes": "the conditioner",
        "vectors": "the conditioner",
        "learned_sigma": "the prediction",
    },
    "discriminator": {"in_channels": "the data"},
    "conditioner": {
        "encode": "the autoencoder",
        "posterior": "the autoencoder",
        "latent_channels": "the autoencoder",
        "latent_factor": "the autoencoder",
    },
}


def load(target: str) -> Any:
    """The object behind "module:name"."""
    module, _, name = target.partition(":")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise InputError("no such part", module, name, "a name in this module", nearest(name, dir(found)))
    return getattr(found, name)


def find(axis: str, name: str = "") -> Any:
    """The object of that name on an axis."""
    table = TABLES[axis]
    return load(table if isinstance(table, str) else table[name])


def plug(module: str) -> None:
    """Add a user's parts, PARTS = {axis: {name: "module:name"}} of a module that the command line names."""
    try:
        tables = {axis: dict(table) for axis, table in importlib.import_module(module).PARTS.items()}
    except Exception as error:  # a user's module may raise anything
        expected, missing = "a module with PARTS = {axis: {...}}", getattr(error, "name", "") in module.split(".")
        hint = "PYTHONPATH=FOLDER, and its name without .py" if missing else ""
        raise InputError("cannot plug in", module, str(error), expected, hint) from error
    for axis, table in tables.items():
        known = FAMILIES if axis == "family" else TABLES.setdefault(axis, {})
        if isinstance(known, str) or any(known.get(name, own) != own for name, own in table.items()):
            raise InputError(f"{axis}: this name is taken", module, ", ".join(table), hint="another name")
        known.update(table)


def plug_installed() -> None:
    """Add the tables of installed packages that declare an entry point in the group `ldm.parts`."""
    for entry in entry_points(group="ldm.parts"):
        plug(entry.value)
