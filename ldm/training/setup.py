"""What every recipe is built from: data, optimisers, schedules, and the checks that they share."""

from __future__ import annotations

import os
from typing import Any

import torch

from ldm.config.schema import Config
from ldm.data.loader import Data
from ldm.data.sampler import MicroBatches, Order
from ldm.errors import InputError
from ldm.training.recipe import Setup
from ldm.training.trainer import TrainerSettings

LOCAL = {  # by node, the keys that name a place on one machine
    "data": ("root", "manifest"),
    "validation": ("root", "manifest"),
    "loss": ("vgg",),
    "conditioner": ("weights", "tokenizer"),
}
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning does not take SLURM for the launcher
BY_HAND = {"MASTER_ADDR", "NODE_RANK"}  # what Lightning reads where a user starts each node's processes


def check_launcher(config: Config) -> None:
    """Refuse a launcher that starts other processes than the plan has, and many nodes where nothing starts them."""
    settings: TrainerSettings = config.build("trainer")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        check_started(config, settings, "torchrun", "WORLD_SIZE")
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE:
        check_slurm(config, settings)
    elif settings.nodes > 1 and not BY_HAND & os.environ.keys():
        key, expected = "trainer.nodes", "a launcher that starts this command on every node"
        what, hint = f"{key}: several nodes need a launcher", "torchrun or srun, as in docs/first_stage.md"
        raise config.source.error(what, key, got=f"{settings.nodes} and no launcher", expected=expected, hint=hint)


def check_slurm(config: Config, settings: TrainerSettings) -> None:
    """Refuse tasks that Lightning refuses, but in our words, and another number of them than it would wait for."""
    for name, key, planned in (
        ("SLURM_NNODES", "trainer.nodes", settings.nodes),
        ("SLURM_NTASKS_PER_NODE", "trainer.devices", settings.devices_per_node),
    ):
        if (there := int(os.environ.get(name, planned))) != planned:
            what, expected = f"{key}: not what SLURM starts", f"{there}, as {name} says"
            raise config.source.error(what, key, got=str(planned), expected=expected, hint=f"{key}={there}")
    check_started(config, settings, "SLURM", "SLURM_NTASKS")
    if settings.ranks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        got, hint = f"SLURM_NTASKS {settings.ranks} alone", f"--ntasks-per-node={settings.devices_per_node}"
        raise InputError("SLURM: --ntasks-per-node is not set", "environment", got, "SLURM_NTASKS_PER_NODE too", hint)


def check_started(config: Config, settings: TrainerSettings, launcher: str, name: str) -> None:
    """Refuse another number of processes than the plan has."""
    if (started := int(os.environ[name])) != settings.ranks:
        key, got = "trainer.devices", f"{settings.ranks} processes on {settings.nodes} nodes"
        what, hint = f"{key}: not what {launcher} starts", f"trainer.devices={max(1, started // settings.nodes)}"
        raise config.source.error(what, key, got=got, expected=str(started), hint=hint)


def check_seed(config: Config) -> None:
    """Refuse a seed that no generator takes."""
    if not 0 <= config["seed"] < 2**32:
        raise config.source.error("seed: out of range", "seed", got=str(config["seed"]), expected="0 to 2**32 - 1")


def makers(config: Config) -> dict[str, Any]:
    """The makers of optimisers, schedule and averages, each tried once, so that wrong values are found now.

    A group's own optimiser is the axis GROUP_optimizer; "" is the optimiser of all other groups.
    """
    ending = "_optimizer"
    own = {key.removesuffix(ending): key for key, node in config.values.items() if key.endswith(ending) and node}
    return {
        "optimizers": {group: optimizer(config, key) for group, key in {"": "optimizer", **own}.items()},
        "schedule": tried(config, "schedule", 0, 1),
        "ema": tried(config, "ema", []),
    }


def optimizer(config: Config, key: str) -> Any:
    """The maker of an optimiser, tried once."""
    if config[key]["type"] == "muon" and config["trainer"].get("strategy") == "fsdp2":
        what, hint = f"{key}: muon needs whole matrices", f"{key}.type=adamw"
        raise config.source.error(what, key, got="shards (trainer.strategy fsdp2)", expected="ddp", hint=hint)
    return tried(config, key, [torch.zeros(1, requires_grad=True)])


def tried(config: Config, key: str, *sample: Any) -> Any:
    """The function that a node describes, after it was called with a sample of its arguments."""
    made = config.build(key)
    with config.blame(key):
        made(*sample)
    return made


def prepare(config: Config, settings: TrainerSettings) -> Setup:
    """The data, if their batches can be split among the ranks, and what else a recipe needs."""
    data = config.build("data")
    MicroBatches(Order(len(data), data.batch_size, 0), ranks=settings.ranks, accumulate=settings.accumulate)  # or error
    kept_apart = getattr(data, "validation", lambda: None)  # by data.split
    validation = config.build("validation") if config["validation"] else kept_apart()
    return Setup(config["seed"], settings, data, validation, portable(config.values))


def check_divisible(config: Config, key: str, data: Data, factor: int, whose: str) -> None:
    """Refuse pictures whose sides the networks cannot divide."""
    for height, width in data.sizes:
        if height % factor or width % factor:
            near = str(max(factor, round(height / factor) * factor))
            what, got = f"{key}.resolution: not divisible by {whose} factor", f"{height}x{width}"
            expected = f"multiples of {factor}"
            raise config.source.error(what, f"{key}.resolution", got=got, expected=expected, hint=near)


def portable(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the places of the machine that it was used on."""
    return {key: without(node, LOCAL.get(key, ())) for key, node in values.items()}


def without(node: Any, names: tuple[str, ...]) -> Any:
    """A node, and those in it, without some keys."""
    if isinstance(node, list):
        return [without(each, names) for each in node]
    if not isinstance(node, dict):
        return node
    return {name: without(x, names) for name, x in node.items() if name not in names}
