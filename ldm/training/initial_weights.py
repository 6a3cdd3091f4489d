"""What a denoiser begins with where `--init-from` names a checkpoint: its weights, if they fit what is trained here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from ldm import assemble
from ldm.assemble import Model
from ldm.checkpoint import Checkpoint, load_weights, networks
from ldm.config.schema import Config, Part, stored
from ldm.errors import CheckpointError, shown


@dataclass(kw_only=True)
class Learned:
    """What of a configuration says what a denoiser's numbers mean."""

    path: Part
    prediction: Part


def begin(model: Model, loaded: Checkpoint, fingerprint: str | None, where: str, begun: bool) -> None:
    """Give the denoiser, and a conditioner if there is one inside or left out, the weights of a checkpoint.

    If the run has `begun`, they are its own.
    """
    if not loaded.config.get("backbone"):
        raise CheckpointError("--init-from: no denoiser inside", where, loaded.family, "a second stage")
    check_same_latents(loaded, fingerprint, where, begun)
    load_weights(model.denoiser.backbone, loaded.state, "backbone")
    inside = any(name.startswith("conditioner.") for name in (*loaded.state, *loaded.config.get("left_out", ())))
    if model.conditioner is not None and (inside or any(p.requires_grad for p in model.conditioner.parameters())):
        assemble.fill_part(model.conditioner, loaded, "conditioner")


def check_same_latents(loaded: Checkpoint, fingerprint: str | None, where: str, begun: bool) -> None:
    """Refuse a denoiser of another first stage's latents, or of pictures; who says nothing of it is believed."""
    own = loaded.config.get("autoencoder")
    theirs = loaded.config.get("fingerprint", networks.fingerprint(own, loaded.state) if own else fingerprint)
    if theirs != fingerprint:
        got, expected = (f"fingerprint {x[:10]}" if x else "none" for x in (fingerprint, theirs))
        hint = "another --run" if begun else f"autoencoder={where}" if own else ""
        raise CheckpointError("autoencoder: not the one that the denoiser was trained with", where, got, expected, hint)


def differences(config: Config, loaded: Checkpoint, where: str) -> Iterator[str]:
    """What the denoiser of a checkpoint has learned otherwise than it is trained here."""
    keys = [field.name for field in fields(Learned)]
    if all(loaded.config.get(key) for key in keys):
        theirs = stored({key: loaded.config[key] for key in keys}, where, (), Learned)
        for key in keys:
            if theirs[key] != config[key]:
                yield f"--init-from: {key} is {shown(theirs[key])} in the file and {shown(config[key])} here"
