"""Measure a checkpoint: what its first stage keeps, how far samples are from true pictures, what prompts come to."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli import config_file, config_options, own_parts
from ldm.cli.console import counting_cuts
from ldm.cli.sample import solver_name, writable
from ldm.config import schema as configuration
from ldm.config.parts import TABLES
from ldm.config.schema import Config, Part
from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint
    from ldm.metrics.evaluation import Source, Subject

CURVES = {"prompts": 1, "steps": 2}  # of the prompts, by what they are divided
PARTS = ("first_stage", "samples", "prompts", "steps", "bound")


@dataclass(kw_only=True)
class Schema:
    """What a configuration says of an evaluation."""

    seed: int = 1  # of the first picture
    data: Part
    training: Part | None = None  # what the model learned from, for the nearest
    training_seed: int = 0  # that of its run
    features: Part
    clip: Part | None = None
    samples: int  # pictures that are made and compared; as many are read
    nearest: int = 0  # pictures that are shown beside the nearest of `training`
    prompts: int = 0  # of each kind, where the data are scenes
    cfg: list[float] = (1.0,)  # type: ignore[assignment]  # scales of guidance at which prompts are asked for
    solvers: list[str] = ()  # type: ignore[assignment]  # that are compared with one another
    steps: list[int] = ()  # type: ignore[assignment]  # that each of them takes, in turn
    bound: int = 0  # pictures whose bits per dimension are bounded


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--ckpt", metavar="PATH", help="any checkpoint, a first stage alone too; without it the shipped"
    )
    parser.add_argument("--vae", metavar="PATH", help="another first stage")
    parser.add_argument("--cfg", type=float, help="guidance scale, where the curves have no other")
    parser.add_argument("--steps", type=int, help="how many steps the sampler takes")
    parser.add_argument("--sampler", metavar="NAME", help="a solver by any name that `ldm sample --help` lists")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given several times")
    parser.add_argument("--out", default="report", help="the folder for evaluation.json and index.html")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    config_options(parser, default="scenes")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that costs nothing, then measure, writing after each part what there is."""
    own_parts(arguments)
    config = configuration.load(config_file(arguments.config, "evaluate"), arguments.overrides, Schema)
    check(config)
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    out = writable(Path(arguments.out))
    with counting_cuts():
        measure(config, arguments, out)
    return 0


def measure(config: Config, arguments: argparse.Namespace, out: Path) -> None:
    """Part by part, each written as soon as it is known."""
    from ldm.metrics import report
    from ldm.metrics.sharing import rank

    subject, record = prepare(config, arguments)
    found: dict[str, Any] = {"about": record, "settings": config.values}
    measured = 0
    for name, part in parts(config, subject, arguments.only or PARTS):
        found[name], measured = part, measured + 1
        if rank() == 0:
            report.write(found, out)
            print(report.line(name, part), flush=True)
    if not measured:
        expected = ", ".join(PARTS)
        raise InputError(
            "nothing to measure", "--only", ", ".join(arguments.only or ()), f"one that this model has: {expected}"
        )
    if rank() == 0:
        print(f"wrote {out / 'index.html'} and {out / 'evaluation.json'}")


def check(config: Config) -> None:
    """Refuse numbers that measure nothing."""
    for key, least in {"samples": 2, "nearest": 0, "prompts": 0, "bound": 0}.items():
        if config[key] < least:
            raise config.source.error(f"{key}: out of range", key, got=str(config[key]), expected=f"at least {least}")
    if config["prompts"] and config["data"]["type"] != "scenes":
        what, hint = "prompts: only scenes can be told right from wrong", "prompts=0"
        raise config.source.error(what, "prompts", got=f"data of type {config['data']['type']}", hint=hint)
    if strange := [name for name in config["solvers"] if name not in TABLES["solver"]]:
        raise config.source.error("solvers: unknown", "solvers", got=strange[0], expected=", ".join(TABLES["solver"]))
    for key in ("cfg", *(("steps",) if config["solvers"] else ())):
        if config["prompts"] and not config[key]:
            raise config.source.error(f"{key}: none given", key, expected="one or more")
    if config["bound"] == 1:
        raise config.source.error("bound: one picture says nothing", "bound", got="1", expected="0, or 2 and more")
    if any(count < 1 for count in config["steps"]):
        raise config.source.error("steps: out of range", "steps", expected="at least 1 each")
    if config["nearest"] and not config["training"]:
        raise config.source.error("nearest: no `training` to look in", "nearest", hint="nearest=0")


def prepare(config: Config, arguments: argparse.Namespace) -> tuple[Subject, dict[str, Any]]:
    """The model and what it is measured with, and a record of both."""
    from ldm import checkpoint, pipeline
    from ldm.checkpoint.downloads import DOWNLOADS, cached
    from ldm.checkpoint.networks import autoencoder_of
    from ldm.checkpoint.vgg import lpips
    from ldm.devices import placement
    from ldm.metrics.evaluation import Subject

    settings = sampling(arguments)
    path = arguments.ckpt or pipeline.SHIPPED
    loaded, pipe = checkpoint.open(path, vae=arguments.vae), None
    device, dtype = placement(arguments.device, arguments.precision)
    if loaded.config.get("backbone"):
        pipe = pipeline.assembled(loaded, str(path), device, dtype)
        pipe.recipe(**settings)  # settings that cannot be are found now
        autoencoder = pipe.autoencoder
    else:
        autoencoder = autoencoder_of(loaded.config["autoencoder"], loaded.state).float().to(device)
    features, clip = config.build("features"), config.build("clip") if config["clip"] else None
    compare = lpips() if cached(DOWNLOADS["vgg16"]).is_file() else None
    for network in filter(None, (features.network, clip and clip.network, compare)):
        network.to(device)
    subject = Subject(autoencoder, pipe, features, clip, compare, device, settings)
    return subject, about(subject, loaded, str(dtype or "float32").removeprefix("torch."))


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line has in the place of the model's own settings."""
    solver = None if arguments.sampler is None else solver_name(arguments.sampler)
    wanted = {"cfg": arguments.cfg, "steps": arguments.steps, "solver": solver}
    return {name: value for name, value in wanted.items() if value is not None}


def about(subject: Subject, loaded: Checkpoint, precision: str) -> dict[str, Any]:
    """Everything that the numbers depend on beside the configuration."""
    import torch

    from ldm.checkpoint.downloads import DOWNLOADS
    from ldm.metrics.classes import PARTS as SCORED
    from ldm.metrics.kernel import MOST, SUBSETS
    from ldm.metrics.prdc import NEIGHBOURS

    features, pipe = subject.features, subject.pipe
    found: dict[str, Any] = {
        "checkpoint": {
            "file": " + ".join(x.name for x in loaded.files),
            "family": loaded.family,
            "sha256": loaded.hash,
        },
        "features": {"name": features.name, "resize": features.resize, "identity": features.identity},
        "clip": subject.clip and subject.clip.identity,
        "lpips": subject.lpips and DOWNLOADS["vgg16"].sha256,
        "constants": {"neighbours": NEIGHBOURS, "subsets": SUBSETS, "of": MOST, "parts": SCORED},
        "precision": {"sampling": precision, "first_stage": "float32"},
        "device": str(subject.device),
        "versions": {"ldm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if pipe is not None:
        settled = pipe.settled(**subject.settings)
        found["sampling"] = {name: settled[name] for name in ("guidance", "spacing", "solver")}
    return found


def parts(config: Config, subject: Subject, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Every part that this model and this configuration have."""
    from ldm.metrics import evaluation

    source, other, training = sources(config)
    if subject.pipe is not None and {*wanted} - {"first_stage"}:
        check_settings(config, subject, wanted)
        check_data(config, subject, source)
    if subject.autoencoder is not None and "first_stage" in wanted:
        yield "first_stage", evaluation.first_stage(subject, source)
    if subject.pipe is None:
        return
    if "samples" in wanted:
        yield "yardsticks", evaluation.yardsticks(subject, source, other)
        yield "samples", (made := evaluation.samples(subject, source))
        if training is not None and config["nearest"]:
            yield "nearest", evaluation.closest(subject, made["features"][: config["nearest"]], training)
    for name in (name for name in CURVES if name in wanted and subject.promptable):
        if (points := curve(config, name)) and (count := -(-config["prompts"] // CURVES[name])):
            kinds = evaluation.kinds(count, source)
            yield name, [evaluation.asked(subject, kinds, **settings) for settings in points]
    if config["bound"] and "bound" in wanted:
        few = evaluation.spread_source(source.data, source.about, config["bound"], source.seed)
        yield "bound", evaluation.bound(subject, few)


def sources(config: Config) -> tuple[Source, Source | None, Source | None]:
    """What is compared with, as many others of it if there are any, and what was learned from."""
    from ldm.metrics.evaluation import spread_source

    data, seed, count = config.build("data"), config["seed"], config["samples"]
    if len(data) < count:
        what, hint = "samples: more than the data have", f"samples={len(data)}"
        raise config.source.error(what, "samples", got=str(count), expected=f"at most {len(data)}", hint=hint)
    about = samples_of(config["data"])
    other = spread_source(data, about, count, seed, disjoint=True) if len(data) >= 2 * count else None
    training = None
    if config["training"] and config["nearest"]:
        learned = config.build("training")
        training = spread_source(learned, samples_of(config["training"]), len(learned), config["training_seed"])
    return spread_source(data, about, count, seed), other, training


def samples_of(node: dict[str, Any]) -> dict[str, Any]:
    """Of the data's node, what says which samples these are."""
    return {name: value for name, value in node.items() if name not in ("batch_size", "workers")}


def curve(config: Config, name: str) -> list[dict[str, Any]]:
    """The settings of each point of a curve."""
    if name == "prompts":
        return [{"cfg": cfg} for cfg in config["cfg"]]
    return [{"solver": solver, "steps": steps} for solver in config["solvers"] for steps in config["steps"]]


def check_data(config: Config, subject: Subject, source: Source) -> None:
    """Refuse true pictures that do not fit the model, before any work."""
    from ldm.data.derived import MADE
    from ldm.data.sampler import SampleId

    pipe = subject.pipe
    assert pipe is not None
    first = source.data.batch([SampleId(source.indices[0], source.indices[0], 0)], source.seed)
    if lacking := [name for name in subject.reads if name not in {*first, *MADE}]:
        what, expected = "data: lack what this model reads", "data with it"
        raise config.source.error(what, "data", got=f"no {', '.join(lacking)}", expected=expected)
    if subject.clip is not None and not (subject.captioned and any(first["caption"])):
        raise config.source.error("clip: scores pictures by their captions", "clip", got="none", hint="clip=null")
    size, recipe = source.data.sizes[0], pipe.recipe()
    if size != (recipe.height, recipe.width):
        what, key = "data.resolution: not what the model makes", "data.resolution"
        got, expected = f"{size[0]}x{size[1]}", f"{recipe.height}x{recipe.width}"
        raise config.source.error(what, key, got=got, expected=expected, hint=f"{key}={recipe.height}")


def check_settings(config: Config, subject: Subject, wanted: Sequence[str]) -> None:
    """Refuse points of curves, and a bound, that the model cannot have."""
    from ldm.diffusion.path import Table

    pipe = subject.pipe
    assert pipe is not None
    for name in (name for name in CURVES if name in wanted and subject.promptable):
        for settings in curve(config, name):
            subject.recipe(**settings)
    if config["bound"] and (pipe.autoencoder is not None or not isinstance(pipe.denoiser.path, Table)):
        got = "latents" if pipe.autoencoder is not None else f"path {pipe.config['path']['type']}"
        expected = "a model of pixels on a table of betas"
        raise config.source.error("bound: this model has none", "bound", got=got, expected=expected, hint="bound=0")
