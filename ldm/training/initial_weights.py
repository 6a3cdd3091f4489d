"""Weights to start from: `--init-from` gives a denoiser the weights of a checkpoint, if they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from ldm import assemble
from ldm.assemble import Model
from ldm.checkpoint import Checkpoint, load_weights, networks
from ldm.config.schema import Config, Part, stored
from ldm.errors import CheckpointError, shown


@dataclass(kw_only=True)
class Meaning:
    """The parts of a configuration that say what a denoiser's output means."""

    path: Part
    prediction: Part


def has_autoencoder(loaded: Checkpoint, config: Config) -> bool:
    """Whether a whole model's autoencoder is the one of a configuration."""
    whole = loaded.config.get("backbone") and loaded.config.get("autoencoder")
    return bool(whole) and assemble.configure(loaded.config, "")["autoencoder"] == config["autoencoder"]


def load_initial_weights(model: Model, loaded: Checkpoint, fingerprint: str | None, file: str, resumed: bool) -> None:
    """Give the denoiser, and the conditioner if the file has one, the weights of a checkpoint.

    If the run is `resumed`, the file is its own.
    """
    if not loaded.config.get("backbone"):
        raise CheckpointError("--init-from: no denoiser in this file", file, loaded.family, "a second stage")
    check_same_latents(loaded, fingerprint, file, resumed)
    load_weights(model.denoiser.backbone, loaded.state, "backbone")
    stored_names = (*loaded.state, *loaded.config.get("left_out", ()))
    has_conditioner = any(name.startswith("conditioner.") for name in stored_names)
    if model.conditioner is not None:
        trained = any(p.requires_grad for p in model.conditioner.parameters())
        if has_conditioner or trained:
            assemble.fill_part(model.conditioner, loaded, "conditioner")


def check_same_latents(loaded: Checkpoint, fingerprint: str | None, file: str, resumed: bool) -> None:
    """Refuse a denoiser of another autoencoder's latents; a file that does not say which is accepted."""
    own = loaded.config.get("autoencoder")
    stored_print = loaded.config.get("fingerprint", networks.fingerprint(own, loaded.state) if own else fingerprint)
    if stored_print != fingerprint:
        got, expected = (f"fingerprint {x[:10]}" if x else "none" for x in (fingerprint, stored_print))
        hint = "another --run" if resumed else f"autoencoder={file}" if own else ""
        raise CheckpointError("autoencoder: not the one the denoiser was trained with", file, got, expected, hint)


def config_notes(config: Config, loaded: Checkpoint, file: str) -> Iterator[str]:
    """Where path or prediction differ between the file and this configuration."""
    keys = [field.name for field in fields(Meaning)]
    if all(loaded.config.get(key) for key in keys):
        other = stored({key: loaded.config[key] for key in keys}, file, (), Meaning)
        for key in keys:
            if other[key] != config[key]:
                yield f"--init-from: {key} is {shown(other[key])} in the file and {shown(config[key])} here"
