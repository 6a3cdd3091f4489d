"""Evaluate a checkpoint: its autoencoder, its samples, and its pictures of prompts; write a report."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli import config_file, config_options
from ldm.cli.console import count_truncations
from ldm.cli.sample import writable
from ldm.config import samplers
from ldm.config import schema as configuration
from ldm.config.parts import TABLES
from ldm.config.schema import Config, Part
from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint
    from ldm.metrics.comparison import ReferenceSet
    from ldm.metrics.evaluation import Subject

CURVES = {"prompts": 1, "steps": 2}  # part -> divisor of the number of prompts
PARTS = ("first_stage", "samples", "prompts", "steps", "bound")


@dataclass(kw_only=True)
class Schema:
    """The configuration of an evaluation."""

    seed: int = 1  # seed of noise and generated data
    data: Part
    training: Part | None = None  # the training data, for `nearest`
    training_seed: int = 0  # seed of the training run
    features: Part
    clip: Part | None = None
    samples: int  # pictures to sample, and to compare with
    nearest: int = 0  # samples shown beside their nearest training pictures
    prompts: int = 0  # number of prompts of each kind, for data with a verifier, such as scenes
    cfg: list[float] = (1.0,)  # type: ignore[assignment]  # guidance scales for `prompts`
    solvers: list[str] = ()  # type: ignore[assignment]  # solvers to compare
    steps: list[int] = ()  # type: ignore[assignment]  # numbers of steps of each solver
    bound: int = 0  # pictures for the bound on bits per dimension


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--ckpt", metavar="PATH", help="any checkpoint, or an autoencoder (default: the shipped model)")
    parser.add_argument("--vae", metavar="PATH", help="another autoencoder")
    parser.add_argument("--cfg", type=float, help="guidance scale, except for `prompts`")
    parser.add_argument("--steps", type=int, help="number of sampling steps, except for `steps`")
    parser.add_argument("--sampler", metavar="NAME", help="a sampler that `ldm sample --help` lists")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part only; may be repeated")
    parser.add_argument("--out", default="report", help="folder for evaluation.json and index.html")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    config_options(parser, default="scenes")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that is cheap to check; then measure part by part, and write the report after each."""
    config = configuration.load(config_file(arguments.config, "evaluate"), arguments.overrides, Schema)
    check(config)
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    from ldm.distributed import torchrun_rank
    from ldm.metrics import report

    out, wanted, first = writable(Path(arguments.out)), arguments.only or PARTS, torchrun_rank().number == 0
    with count_truncations():
        subject, about = prepare(config, arguments)
        evaluation: dict[str, Any] = {"about": about, "settings": config.values}
        for name, part in parts(config, subject, wanted):
            evaluation[name] = part
            if first:
                report.write(evaluation, out)
                print(report.summary(name, part), flush=True)
    if len(evaluation) == 2:
        expected = f"one that this model has: {', '.join(PARTS)}"
        raise InputError("nothing to measure", "--only", ", ".join(wanted), expected)
    if first:
        print(f"wrote {out / 'index.html'} and {out / 'evaluation.json'}")
    return 0


def check(config: Config) -> None:
    """Refuse settings that measure nothing."""
    error, prompts, data = config.source.error, config["prompts"], config["data"]["type"]
    for key, least in {"samples": 2, "nearest": 0, "prompts": 0, "bound": 0}.items():
        if config[key] < least:
            raise error(f"{key}: out of range", key, got=str(config[key]), expected=f"at least {least}")
    if prompts and data not in TABLES["verifier"]:
        what, expected = "prompts: these captions cannot be verified", f"data of type {', '.join(TABLES['verifier'])}"
        raise error(what, "prompts", got=f"data of type {data}", expected=expected, hint="prompts=0")
    if unknown := [name for name in config["solvers"] if name not in TABLES["solver"]]:
        raise error("solvers: unknown", "solvers", got=unknown[0], expected=", ".join(TABLES["solver"]))
    for key in ("cfg", *(("steps",) if config["solvers"] else ())):
        if prompts and not config[key]:
            raise error(f"{key}: none given", key, expected="one or more")
    if config["bound"] == 1:
        raise error("bound: too few pictures", "bound", got="1", expected="0, or at least 2")
    if any(count < 1 for count in config["steps"]):
        raise error("steps: out of range", "steps", expected="at least 1 each")
    if config["nearest"] and not config["training"]:
        raise error("nearest: needs `training`", "nearest", hint="nearest=0")


def prepare(config: Config, arguments: argparse.Namespace) -> tuple[Subject, dict[str, Any]]:
    """The model with the networks that measure it, and a record of both."""
    from ldm import checkpoint, pipeline
    from ldm.checkpoint.downloads import DOWNLOADS, cached
    from ldm.checkpoint.networks import autoencoder_of
    from ldm.checkpoint.vgg import lpips
    from ldm.devices import placement
    from ldm.metrics.evaluation import Subject

    settings = {"cfg": arguments.cfg, "steps": arguments.steps, "solver": arguments.sampler}
    settings = {name: value for name, value in settings.items() if value is not None}
    if arguments.sampler is not None:
        samplers.parse(arguments.sampler)  # refuses an unknown name before anything is loaded
    loaded, pipe = checkpoint.open(arguments.ckpt or pipeline.SHIPPED, vae=arguments.vae), None
    device, dtype = placement(arguments.device, arguments.precision)
    if loaded.config.get("backbone"):
        pipe = pipeline.load(loaded, device=arguments.device, precision=arguments.precision)
        pipe.settings(**settings)  # refuses impossible settings
        autoencoder = pipe.autoencoder
    else:
        autoencoder = autoencoder_of(loaded.config["autoencoder"], loaded.state).float().to(device)
    features, clip = config.build("features"), config.build("clip") if config["clip"] else None
    compare = lpips() if cached(DOWNLOADS["vgg16"]).is_file() else None
    for network in filter(None, (features.network, clip and clip.network, compare)):
        network.to(device)
    subject = Subject(autoencoder, pipe, features, clip, compare, device, settings)
    return subject, about(subject, loaded, str(dtype or "float32").removeprefix("torch."))


def about(subject: Subject, loaded: Checkpoint, precision: str) -> dict[str, Any]:
    """What the results depend on besides the configuration."""
    import torch

    from ldm.checkpoint.downloads import DOWNLOADS
    from ldm.metrics import feature_metrics as m

    features, file = subject.features, " + ".join(x.name for x in loaded.files)
    found: dict[str, Any] = {
        "checkpoint": {"file": file, "family": loaded.family, "sha256": loaded.hash},
        "features": {"name": features.name, "resize": features.resize, "identity": features.identity},
        "clip": subject.clip and subject.clip.identity,
        "lpips": subject.lpips and DOWNLOADS["vgg16"].sha256,
        "constants": {"neighbours": m.NEIGHBOURS, "subsets": m.SUBSETS, "of": m.MOST, "parts": m.PARTS},
        "precision": {"sampling": precision, "first_stage": "float32"},
        "device": str(subject.device),
        "versions": {"ldm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if subject.pipe is not None:
        settings = subject.sampling().config
        found["sampling"] = {name: settings[name] for name in ("guidance", "spacing", "solver")}
    return found


def parts(config: Config, subject: Subject, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The results of each part that this model and this configuration have."""
    from ldm.metrics import evaluation

    reference, other, training = references(config)
    if subject.pipe is not None and {*wanted} - {"first_stage"}:
        check_model(config, subject, reference, wanted)
    if subject.autoencoder is not None and "first_stage" in wanted:
        yield "first_stage", evaluation.first_stage(subject, reference)
    if subject.pipe is None:
        return
    if "samples" in wanted:
        yield "yardsticks", evaluation.yardsticks(subject, reference, other)
        yield "samples", (samples := evaluation.samples(subject, reference))
        if training is not None:
            rows = samples["features"][: config["nearest"]]
            yield "nearest", evaluation.nearest_pictures(subject, rows, training)
    for name, points in curves(config, subject, wanted).items():
        if reference.verifier and (count := -(-config["prompts"] // CURVES[name])):
            sets = {kind: evaluation.prompt_set(kind, count, reference) for kind in reference.verifier.kinds}
            yield name, [evaluation.prompts(subject, sets, **point) for point in points]
    if config["bound"] and "bound" in wanted:
        few = evaluation.spread(reference.data, config["data"], config["bound"], reference.seed)
        yield "bound", evaluation.bound(subject, few)


def references(config: Config) -> tuple[ReferenceSet, ReferenceSet | None, ReferenceSet | None]:
    """Pictures to compare with, as many other ones if the data have them, and the training pictures."""
    from ldm.metrics.evaluation import spread

    data, seed, count = config.build("data"), config["seed"], config["samples"]
    if len(data) < count:
        what, expected, hint = "samples: more than the data have", f"at most {len(data)}", f"samples={len(data)}"
        raise config.source.error(what, "samples", got=str(count), expected=expected, hint=hint)
    other = spread(data, config["data"], count, seed, between=True) if len(data) >= 2 * count else None
    training = None
    if config["nearest"]:
        learned = config.build("training")
        training = spread(learned, config["training"], len(learned), config["training_seed"])
    return spread(data, config["data"], count, seed), other, training


def curves(config: Config, subject: Subject, wanted: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The settings of each point of the wanted curves."""
    points: dict[str, list[dict[str, Any]]] = {
        "prompts": [{"cfg": cfg} for cfg in config["cfg"]],
        "steps": [{"solver": solver, "steps": steps} for solver in config["solvers"] for steps in config["steps"]],
    }
    return {name: points[name] for name in CURVES if name in wanted and subject.promptable and points[name]}


def check_model(config: Config, subject: Subject, reference: ReferenceSet, wanted: Sequence[str]) -> None:
    """Refuse settings and data that do not fit the model."""
    from ldm.data.derived import DERIVED
    from ldm.data.sampler import SampleId
    from ldm.diffusion.path import Table

    pipe, error, index = subject.pipe, config.source.error, reference.indices[0]
    assert pipe is not None
    for points in curves(config, subject, wanted).values():
        for point in points:
            subject.sampling(**point)
    if config["bound"] and (pipe.autoencoder is not None or not isinstance(pipe.denoiser.path, Table)):
        got = "latents" if pipe.autoencoder is not None else f"path {pipe.config['path']['type']}"
        expected = "a pixel-space model on a table of betas"
        raise error("bound: this model has none", "bound", got=got, expected=expected, hint="bound=0")
    batch = reference.data.batch([SampleId(index, index, 0)], reference.seed)
    if lacking := [name for name in subject.reads if name not in {*batch, *DERIVED}]:
        what, expected = "data: missing a condition that this model reads", "data with it"
        raise error(what, "data", got=f"no {', '.join(lacking)}", expected=expected)
    if subject.clip is not None and not (subject.captioned and any(batch["caption"])):
        raise error("clip: needs captions", "clip", got="none", hint="clip=null")
    (height, width), settings, key = reference.data.sizes[0], pipe.settings(), "data.resolution"
    if (height, width) != (settings.height, settings.width):
        expected = f"{settings.height}x{settings.width}"
        hint = f"{key}={settings.height}"
        raise error(f"{key}: differs from the model's", key, got=f"{height}x{width}", expected=expected, hint=hint)
