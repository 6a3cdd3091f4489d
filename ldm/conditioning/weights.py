"""Weights of text encoders: from a folder, a file, or a hub where its id was written out."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoint.files import raw
from ldm.checkpoint.text_keys import find_text, read_text
from ldm.errors import CheckpointError
from ldm.models.transformer import TextTransformer

if TYPE_CHECKING:
    from torch import Tensor, nn

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ("model.safetensors", "open_clip_model.safetensors", "text_encoder/model.safetensors")
ASKED = ["*.json", "*.txt", "*/*.safetensors", "diffusion_pytorch_model*.safetensors", FILES[0]]  # of a hub's models
UNREAD, VARIANTS = ["safety_checker/*", "image_encoder/*"], ["*.*.safetensors"]  # those in fp16, or not averaged


def given(weights: str | None) -> bool:
    """Whether there is anything to read."""
    return weights not in (None, "random")


def on_hub(weights: str) -> bool:
    """Whether this is a hub's id: it looks like one, and is nothing that lies here."""
    return HUB_ID.fullmatch(weights) is not None and not Path(weights).exists()


def local(path: str | Path) -> Path:
    """The file or folder itself; a hub is asked only for what looks like its id and is not here."""
    if not on_hub(str(path)):
        return Path(path)
    folder = snapshot(str(path), ASKED, UNREAD + VARIANTS)
    if not all(next(part.parent.glob("*.safetensors"), None) for part in folder.rglob("config.json")):
        folder = snapshot(str(path), ASKED, UNREAD)
    pipeline = (folder / "model_index.json").is_file()
    return folder / FILES[0] if not pipeline and (folder / FILES[0]).is_file() else folder


def snapshot(identity: str, asked: list[str], ignored: list[str] | None = None) -> Path:
    """The folder in the hub's cache with those files of a model that are asked for; without a network, as it is."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(identity, allow_patterns=asked, ignore_patterns=ignored))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        expected = "a file, a folder or a hub's id"
        raise CheckpointError("neither here nor to be had from a hub", identity, expected=expected) from error


def digest(encoder: nn.Module) -> str:
    """The sha256 of an encoder's tensors, in float32 whatever they are stored in."""
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(raw(tensor.float()))
    return total.hexdigest()


def load_text(transformer: TextTransformer, weights: str) -> None:
    """Fill a text encoder, even one without memory, with the weights in a folder, in a file, or on a hub."""
    layout, state = find_text(read(find(weights)))
    state = read_text(state, transformer, layout)
    for name, parameter in transformer.state_dict().items():
        if state[name].shape != parameter.shape:
            got, expected = f"{name} of shape {tuple(state[name].shape)}", str(tuple(parameter.shape))
            raise CheckpointError("another encoder's weights", weights, got, expected, "its width, length, vocabulary")
    transformer.load_state_dict(state, assign=any(x.is_meta for x in transformer.parameters()))


def find(weights: str) -> Path:
    """The file with the weights; a hub is asked only for what looks like its id and is not here."""
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"weights: nothing in the folder; got {weights}; expected {FILES[0]}; try another folder")
    if on_hub(weights):
        return fetch(weights)
    raise ValueError(
        f"weights: no such folder or file; got {weights}; expected a folder, a file, a hub's id or random; try random"
    )


def fetch(identity: str) -> Path:
    """The file of a model on a hub, through its cache: transformers' kind of file, or open_clip's."""
    with suppress(CheckpointError):
        for name in FILES:
            if (file := snapshot(identity, [name]) / name).is_file():
                return file
    raise ValueError(
        f"weights: neither here nor to be had from a hub; got {identity}; expected a folder, a file or a hub's id; "
        "try a folder that has the weights"
    )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        hint = "ldm convert" if path.suffix in (".ckpt", ".pt", ".bin", ".pth") else "another file"
        raise CheckpointError("not a safetensors file", str(path), str(error), hint=hint) from error
