"""What building a stage of either kind from its configuration has in common: all that can be wrong is found here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ldm.config.schema import Config
from ldm.data.sampler import MicroBatches, Order
from ldm.errors import InputError
from ldm.training.trainer import Plan

if TYPE_CHECKING:
    from ldm.data.loader import Data

LOCAL = {  # by node, the keys that name a place on one machine
    "data": ("root", "manifest"),
    "validation": ("root", "manifest"),
    "loss": ("vgg",),
    "conditioner": ("weights", "tokenizer"),
}
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning does not take SLURM for the launcher
BY_HAND = {"MASTER_ADDR", "NODE_RANK"}  # what Lightning reads where a user starts each node's processes


class Sources(NamedTuple):
    """What is learned from, and what is measured, if that is another source."""

    data: Data
    validation: Data | None

    def by_key(self) -> list[tuple[str, Data]]:
        """Those that there are, with their nodes' names."""
        return [(key, source) for key, source in zip(self._fields, self) if source is not None]


def check_launcher(config: Config) -> None:
    """Refuse a launcher that starts other processes than the plan has, and many nodes where nothing starts them."""
    plan: Plan = config.build("trainer")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        check_started(config, plan, "torchrun", "WORLD_SIZE")
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE:
        check_slurm(config, plan)
    elif plan.nodes > 1 and not BY_HAND & os.environ.keys():
        key, expected = "trainer.nodes", "a launcher that starts this command on every node"
        what, hint = f"{key}: the other nodes would be waited for", "torchrun or srun, as docs/first_stage.md has it"
        raise config.source.error(what, key, got=f"{plan.nodes} and no launcher", expected=expected, hint=hint)


def check_slurm(config: Config, plan: Plan) -> None:
    """Refuse tasks that Lightning refuses, but in our words, and another number of them than it would wait for."""
    for name, key, planned in (
        ("SLURM_NNODES", "trainer.nodes", plan.nodes),
        ("SLURM_NTASKS_PER_NODE", "trainer.devices", plan.devices_per_node),
    ):
        if (there := int(os.environ.get(name, planned))) != planned:
            what, expected = f"{key}: not what SLURM starts", f"{there}, as {name} says"
            raise config.source.error(what, key, got=str(planned), expected=expected, hint=f"{key}={there}")
    check_started(config, plan, "SLURM", "SLURM_NTASKS")
    if plan.ranks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        got, hint = f"SLURM_NTASKS {plan.ranks} alone", f"--ntasks-per-node={plan.devices_per_node}"
        raise InputError("SLURM: tasks are not counted by node", "environment", got, "SLURM_NTASKS_PER_NODE too", hint)


def check_started(config: Config, plan: Plan, launcher: str, name: str) -> None:
    """Refuse another number of processes than the plan has."""
    if (started := int(os.environ[name])) != plan.ranks:
        key, got = "trainer.devices", f"{plan.ranks} processes on {plan.nodes} nodes"
        what, hint = f"{key}: not what {launcher} starts", f"trainer.devices={max(1, started // plan.nodes)}"
        raise config.source.error(what, key, got=got, expected=str(started), hint=hint)


def check_seed(config: Config) -> None:
    """Refuse a seed that no generator takes."""
    if not 0 <= config["seed"] < 2**32:
        raise config.source.error("seed: out of range", "seed", got=str(config["seed"]), expected="0 to 2**32 - 1")


def settings(config: Config) -> dict[str, Any]:
    """The makers of optimiser, schedule and average, each tried once, so that wrong numbers are found now."""
    samples: dict[str, Any] = {"schedule": (0, 1), "ema": ([],)}
    return {"optimizer": optimizer(config, "optimizer")} | {
        name: tried(config, name, *sample) for name, sample in samples.items()
    }


def optimizer(config: Config, key: str) -> Any:
    """The maker of an optimiser, tried once."""
    if config[key]["type"] == "muon" and config["trainer"].get("strategy") == "fsdp2":
        what, hint = f"{key}: muon needs whole matrices", f"{key}.type=adamw"
        raise config.source.error(what, key, got="parts of them (trainer.strategy fsdp2)", expected="ddp", hint=hint)
    return tried(config, key, [torch.zeros(1, requires_grad=True)])


def tried(config: Config, key: str, *sample: Any) -> Any:
    """What a node makes, after it has been called with a sample of what it will be given."""
    made = config.build(key)
    with config.blame(key):
        made(*sample)
    return made


def sources(config: Config, plan: Plan) -> Sources:
    """The data, if their batches can be split."""
    data = config.build("data")
    MicroBatches(Order(len(data), data.batch_size, 0), ranks=plan.ranks, accumulate=plan.accumulate)  # or an error
    return Sources(data, config.build("validation") if config["validation"] else None)


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
