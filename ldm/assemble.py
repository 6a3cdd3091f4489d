"""From a checked configuration and opened checkpoints to the objects that need one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm import checkpoint
from ldm.checkpoint import Checkpoint, load_weights
from ldm.conditioning import external
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.text import tokenizer_owners
from ldm.conditioning.tokenizer import from_checkpoint
from ldm.config import files, parts
from ldm.config import schema as configuration
from ldm.config.schema import Config, Part, stored
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import Level, Path
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.solvers import Step, check
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder
from ldm.models.empty import empty

Checkpoints = Mapping[str, Checkpoint]  # by the key of the node that named them
NONE: Checkpoints = MappingProxyType({})
PATHS = ("autoencoder", "conditioner", "backbone")  # nodes that may be the path of a checkpoint
DENOISER = ("path", "prediction")  # nodes without which a backbone's weights mean nothing


@dataclass(kw_only=True)
class Schema:
    """The model's part of a configuration: stored in its checkpoint, and all that sampling needs."""

    path: Part
    prediction: Part
    backbone: Part
    conditioner: Part | None = None
    autoencoder: Part | None = None
    guidance: Part
    spacing: Part
    solver: Part
    channels: int = 3  # of the pictures, where there is no autoencoder
    size: int = 512  # height and width of the pictures, unless a call says otherwise


class Model(NamedTuple):
    """The networks of a text-to-image model; it may lack a conditioner or an autoencoder."""

    denoiser: Denoiser
    conditioner: Conditioner | None
    autoencoder: Autoencoder | None


class Encoders(NamedTuple):
    """The networks that make a denoiser's inputs from pictures and captions; a model may lack either."""

    autoencoder: Autoencoder | None
    conditioner: Conditioner | None


def configure(values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The model's part of a checkpoint's configuration, with overrides."""
    known = {name: values[name] for name in ("format", *(field.name for field in fields(Schema))) if name in values}
    return stored(known, origin, overrides, Schema)


def load(
    file: str | FilePath, overrides: Sequence[str], schema: type, init_from: str | FilePath | None = None
) -> tuple[Config, dict[str, Checkpoint]]:
    """A training configuration, and the checkpoints that it names, by the keys that name them.

    Every key is checked before a file is opened. `autoencoder: FILE`, `conditioner: FILE` and `backbone: FILE` take
    that node from a checkpoint; `model` fills the network with its weights. `backbone: FILE` also brings the
    checkpoint's path and prediction, and `init_from` all of its model, wherever the YAML and the overrides do not say
    otherwise: a node that is written wins, and a node without `type`, such as {checkpointing: true}, changes single
    settings of the checkpoint's. The checkpoint of `init_from` is returned under the key "init_from"; its weights are
    for the caller to load.
    """
    loaded: dict[str, Checkpoint] = {}

    def complete(source: files.Source) -> None:
        """Open the checkpoints and fill in the nodes that they have."""
        for key in PATHS:
            name = source.values.get(key)
            if isinstance(name, str) and name in parts.TABLES[key] and not FilePath(name).exists():
                expected = "a checkpoint, or a node {type: NAME, ...}"
                raise source.error(f"{key}: wrong value", key, got=name, expected=expected, hint=f"{{type: {name}}}")
        for key in PATHS:
            if isinstance(name := source.values.get(key), str):
                loaded[key] = checkpoint.open(name)
                if not loaded[key].config.get(key):
                    raise CheckpointError(
                        f"{key}: not in this checkpoint", name, loaded[key].family, "a checkpoint with one"
                    )
                source.set(key, loaded[key].config[key], name)
        if "backbone" in loaded:
            fill_in(source, loaded["backbone"], DENOISER)
        if init_from is not None:
            loaded["init_from"] = checkpoint.open(init_from)
            known = configuration.keywords(schema)
            fill_in(source, loaded["init_from"], [field.name for field in fields(Schema) if field.name in known])

    pending = (*PATHS, *DENOISER) if init_from is None else [field.name for field in fields(Schema)]
    return configuration.load(file, overrides, schema, pending, complete), loaded


def fill_in(source: files.Source, loaded: Checkpoint, keys: Sequence[str]) -> None:
    """Take nodes of a checkpoint's configuration, except what the source says itself."""
    for key in keys:
        node, own = loaded.config.get(key), source.values.get(key)
        if key in loaded.config and key not in source.values:
            source.set(key, node, str(loaded.files[0]))
        elif node and isinstance(own, dict) and "type" not in own:
            source.values[key] = {**node, **own}


def check_first_stage(config: Config, loaded: Checkpoints) -> None:
    """Refuse an autoencoder that is not from a checkpoint."""
    if config["autoencoder"] and "autoencoder" not in loaded:
        node, expected = config["autoencoder"]["type"], "the path of a checkpoint"
        raise config.source.error("autoencoder: has no weights", "autoencoder", got=node, expected=expected)


def check_encoders(config: Config, conditioner: Conditioner | None) -> None:
    """Refuse a frozen text encoder without weights; random weights must be asked for."""
    for key, _, text in external.encoders(conditioner):
        if text.needs_weights:
            what, expected = f"{key}: missing, and the encoder is not trained", "a folder, a file, a Hub id or random"
            raise config.source.error(what, key, got="none", expected=expected, hint=f"{key}=FOLDER")


def build(config: Config, loaded: Checkpoints, key: str, **given: Any) -> Any:
    """A network of the configuration, or None; with the weights of the checkpoint that its node names, if any."""
    if not config[key] or key not in loaded:
        return config.build(key, **given) if config[key] else None
    with empty():
        module = config.build(key, **given)
    fill_part(module, loaded[key], key)
    return module.float()


def model(config: Config, loaded: Checkpoints = NONE) -> Model:
    """All networks of a configuration; under `torch.device("meta")`, without memory for their weights."""
    autoencoder, conditioner = encoders(config, loaded)
    shapes = {name: getattr(conditioner, name, None) for name in ("context", "pooled", "classes", "vectors")}
    shapes["extra_channels"] = 0 if conditioner is None else conditioner.concat_channels
    shapes["in_channels"] = config["channels"] if autoencoder is None else autoencoder.latent_channels
    built = denoiser(config, loaded, **shapes)
    with config.blame("backbone"):
        built.check([] if conditioner is None else conditioner.gives())
    return Model(built, conditioner, autoencoder)


def encoders(config: Config, loaded: Checkpoints = NONE) -> Encoders:
    """The encoders of a configuration."""
    autoencoder = build(config, loaded, "autoencoder")
    return Encoders(autoencoder, build(config, loaded, "conditioner", **first_stage(autoencoder, config["channels"])))


def first_stage(autoencoder: Autoencoder | None, channels: int) -> dict[str, Any]:
    """What conditions on images need of the autoencoder; without one, pictures are their own latents."""
    if autoencoder is None:
        identity = {"encode": lambda x: x, "posterior": lambda x: (x, None)}
        return {**identity, "latent_channels": channels, "latent_factor": 1}
    given = {name: getattr(autoencoder, name) for name in ("encode", "posterior", "latent_channels")}
    return {**given, "latent_factor": autoencoder.factor}


def fill(model: Model, loaded: Checkpoint) -> None:
    """Load the weights of a checkpoint into a model without memory."""
    fill_part(model.denoiser.backbone, loaded, "backbone")
    for prefix, module in (("conditioner", model.conditioner), ("autoencoder", model.autoencoder)):
        if module is not None:
            fill_part(module, loaded, prefix)


def fill_part(module: nn.Module, loaded: Checkpoint, prefix: str) -> None:
    """Load a network's weights and tokenizer; an encoder that the file leaves out has read its own by name."""
    load_weights(module, external.restore(loaded, module).state if prefix == "conditioner" else loaded.state, prefix)
    for encoder in external.encoders(module):
        encoder.text.needs_weights = False
        if encoder.key not in loaded.config.get("left_out", ()):
            encoder.text.weights = None  # the file has them
    for text in tokenizer_owners(module):
        if loaded.tokenizer is not None:
            text.use(from_checkpoint(loaded.tokenizer))


def whole(loaded: Checkpoint, overrides: Sequence[str]) -> Checkpoint:
    """A checkpoint with the encoders that it leaves out, found by name or where the overrides say."""
    if not loaded.config.get("left_out"):
        return loaded
    with empty():
        conditioner = encoders(configure(loaded.config, str(loaded.files[0]), overrides)).conditioner
    assert conditioner is not None
    return external.restore(loaded, conditioner)


def denoiser(config: Config, loaded: Checkpoints = NONE, **shapes: Any) -> Denoiser:
    """The backbone on its path with its prediction; `shapes` are those of the data and the condition."""
    with torch.device("cpu"):  # a path's numbers are needed even where weights have no memory
        path = config.build("path")
    prediction = config.build("prediction", sigma_data=path.sigma_data)
    backbone: nn.Module = build(config, loaded, "backbone", learned_sigma=prediction.channels == 2, **shapes)
    with config.blame("prediction"), torch.device("cpu"):
        return Denoiser(backbone, path, prediction)


def weight(config: Config, path: Path) -> Any:
    """The weight of the loss by level; a learned variance allows only a constant one."""
    node = config["weight"]["type"]
    if config["prediction"]["type"] == "learned_range" and node != "constant":
        what = "weight.type: does not go with learned_range"
        raise config.source.error(what, "weight.type", got=node, hint="constant")
    return config.build("weight", sigma_data=path.sigma_data)


def sampler(config: Config, path: Path) -> Sampler:
    """The sampling loop that a configuration describes: its guidance, its solver and its grid on this path."""
    return Sampler(config.build("guidance"), solver(config), grid(config, path))


def grid(config: Config, path: Path) -> Level:
    """The N + 1 levels of sampling."""
    spacing = config.build("spacing")
    with config.blame("spacing"):
        return spacing.grid(path)


def solver(config: Config) -> Callable[..., Iterator[Step]]:
    """The solver with its settings; their ranges are checked before anything runs."""
    chosen = config.build("solver")
    with config.blame("solver"):
        numbers = {name: chosen.keywords[name] for name in ("eta", "order", "noise_var") if name in chosen.keywords}
        check(**numbers, noise=torch.Tensor)
        if numbers.get("noise_var") == "learned" and config["prediction"]["type"] != "learned_range":
            got = f"learned with prediction {config['prediction']['type']}"
            raise ValueError(f"noise_var: nothing learns a variance; got {got}; expected learned_range; try small")
    return chosen
