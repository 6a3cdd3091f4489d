"""The one place where parts meet: from a checked configuration to the objects that need one another."""

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
from ldm.config import schema as configuration
from ldm.config.schema import Config, Part, stored
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import Level, Path
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.solvers import Step, check
from ldm.errors import CheckpointError
from ldm.models.autoencoder import Autoencoder
from ldm.models.empty import empty


@dataclass(kw_only=True)
class Schema:
    """What the configuration of a model says: stored in its checkpoint, and all that sampling needs."""

    path: Part
    prediction: Part
    backbone: Part
    conditioner: Part | None = None
    autoencoder: Part | None = None
    guidance: Part
    spacing: Part
    solver: Part
    channels: int = 3  # of the pictures, where there is no autoencoder
    size: int = 512  # of the pictures' sides, where nobody says otherwise


class Model(NamedTuple):
    """The networks of a text-to-image model, two of which it may lack."""

    denoiser: Denoiser
    conditioner: Conditioner | None
    autoencoder: Autoencoder | None


class Encoders(NamedTuple):
    """What turns pictures and what is said of them into what a denoiser reads; a model may lack either."""

    autoencoder: Autoencoder | None
    conditioner: Conditioner | None


def configure(values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """What the configuration of a checkpoint says of the model, checked, with overrides in the place of it."""
    known = {name: values[name] for name in ("format", *(field.name for field in fields(Schema))) if name in values}
    return stored(known, origin, overrides, Schema)


def load(file: str | FilePath, overrides: Sequence[str], schema: type) -> tuple[Config, dict[str, Checkpoint]]:
    """A configuration where `autoencoder: PATH` or `conditioner: PATH` is what a checkpoint has there, and these."""
    loaded: dict[str, Checkpoint] = {}

    def resolve(key: str, path: str) -> Any:
        """The node of a checkpoint in the place of its path."""
        if key not in ("autoencoder", "conditioner"):
            return path
        loaded[key] = checkpoint.open(path)
        if not loaded[key].config.get(key):
            raise CheckpointError(f"{key}: none inside", path, loaded[key].family, "a checkpoint with one")
        return loaded[key].config[key]

    return configuration.load(file, overrides, schema, resolve), loaded


def check_first_stage(config: Config, loaded: Mapping[str, Checkpoint]) -> None:
    """Refuse a first stage that nobody has trained."""
    if config["autoencoder"] and "autoencoder" not in loaded:
        node, expected = config["autoencoder"]["type"], "the path of a checkpoint"
        raise config.source.error("autoencoder: has no weights", "autoencoder", got=node, expected=expected)


def check_encoders(config: Config, conditioner: Conditioner | None) -> None:
    """Refuse a frozen text encoder that neither a name nor a checkpoint filled; random weights have to be asked for."""
    for key, _, text in external.encoders(conditioner):
        if text.needs_weights:
            what, expected = f"{key}: missing, and the encoder is not trained", "a folder, a file, a Hub id or random"
            raise config.source.error(what, key, got="none", expected=expected, hint=f"{key}=FOLDER")


def model(config: Config, loaded: Mapping[str, Checkpoint] = MappingProxyType({})) -> Model:
    """All networks of a configuration; under `torch.device("meta")`, without memory for their weights."""
    autoencoder, conditioner = encoders(config, loaded)
    channels = config["channels"] if autoencoder is None else autoencoder.latent_channels
    given = {name: getattr(conditioner, name, None) for name in ("context", "pooled", "classes", "vectors")}
    extra = 0 if conditioner is None else conditioner.concat_channels
    built = denoiser(config, in_channels=channels, extra_channels=extra, **given)
    with config.blame("backbone"):
        built.check([] if conditioner is None else conditioner.gives())
    return Model(built, conditioner, autoencoder)


def encoders(config: Config, loaded: Mapping[str, Checkpoint] = MappingProxyType({})) -> Encoders:
    """The encoders of a configuration, with the weights of what was opened for them."""

    def build(key: str, **given: Any) -> Any:
        """One of the two; what a checkpoint fills needs no first numbers."""
        if not config[key] or key not in loaded:
            return config.build(key, **given) if config[key] else None
        with empty():
            module = config.build(key, **given)
        fill_part(module, loaded[key], key)
        return module.float()

    autoencoder = build("autoencoder")
    channels = config["channels"] if autoencoder is None else autoencoder.latent_channels
    return Encoders(autoencoder, build("conditioner", **first_stage(autoencoder, channels)))


def first_stage(autoencoder: Autoencoder | None, channels: int) -> dict[str, Any]:
    """What conditions on images need of the first stage; without one, pictures are their own latents."""
    if autoencoder is None:
        identity = {"encode": lambda x: x, "posterior": lambda x: (x, None)}
        return {**identity, "latent_channels": channels, "latent_factor": 1}
    given = {name: getattr(autoencoder, name) for name in ("encode", "posterior", "latent_channels")}
    return {**given, "latent_factor": autoencoder.factor}


def fill(model: Model, loaded: Checkpoint) -> None:
    """Give a model without memory the weights of an opened checkpoint."""
    modules = {
        "backbone": model.denoiser.backbone,
        "conditioner": model.conditioner,
        "autoencoder": model.autoencoder,
    }
    for prefix, module in modules.items():
        if module is not None:
            fill_part(module, loaded, prefix)


def fill_part(module: nn.Module, loaded: Checkpoint, prefix: str) -> None:
    """Give a network its weights, and its tokenizer if it reads text; it has read by name what the file leaves out."""
    load_weights(module, external.restore(loaded, module).state if prefix == "conditioner" else loaded.state, prefix)
    for encoder in external.encoders(module):
        encoder.text.needs_weights = False
        if encoder.key not in loaded.config.get("left_out", ()):
            encoder.text.weights = None  # they are the file's now
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


def denoiser(config: Config, **shapes: Any) -> Denoiser:
    """The backbone on its path with its prediction; `shapes` is what the data and the condition say of its ends."""
    with torch.device("cpu"):  # a path's numbers are wanted also where the networks' weights are not yet
        path = config.build("path")
    prediction = config.build("prediction", sigma_data=path.sigma_data)
    backbone: nn.Module = config.build("backbone", learned_sigma=prediction.channels == 2, **shapes)
    with config.blame("prediction"), torch.device("cpu"):
        return Denoiser(backbone, path, prediction)


def weight(config: Config, path: Path):
    """The weight of the loss by level; a learned variance brings its own, which another would distort."""
    if config["prediction"]["type"] == "learned_range" and config["weight"]["type"] != "constant":
        got = config["weight"]["type"]
        raise config.source.error(
            "weight.type: does not go with learned_range", "weight.type", got=got, hint="constant"
        )
    return config.build("weight", sigma_data=path.sigma_data)


def grid(config: Config, path: Path) -> Level:
    """The levels that a solver walks down."""
    spacing = config.build("spacing")
    with config.blame("spacing"):
        return spacing.grid(path)


def sampler(config: Config, path: Path) -> Sampler:
    """The sampling loop that a configuration describes: its guidance, its solver and its grid on this path."""
    return Sampler(config.build("guidance"), solver(config), grid(config, path))


def solver(config: Config) -> Callable[..., Iterator[Step]]:
    """The solver with its settings, their ranges checked before anything runs."""
    chosen = config.build("solver")
    with config.blame("solver"):
        numbers = {name: chosen.keywords[name] for name in ("eta", "order", "noise_var") if name in chosen.keywords}
        check(**numbers, noise=torch.Tensor)
        if numbers.get("noise_var") == "learned" and config["prediction"]["type"] != "learned_range":
            got = f"learned with prediction {config['prediction']['type']}"
            raise ValueError(f"noise_var: nothing learns a variance; got {got}; expected learned_range; try small")
    return chosen
