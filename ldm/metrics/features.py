"""Features by which sets of pictures are compared: networks that embed pictures, and the resizing before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.downloads import DOWNLOADS, cached
from ldm.checkpoint.files import file_hash, is_pickle, open_file, open_pickle
from ldm.checkpoint.networks import load_weights
from ldm.errors import CheckpointError, InputError

Resize = Literal["tensorflow", "bicubic"]
SIDE = 299  # of Inception's pictures
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's


class Embedded(NamedTuple):
    """The features of pictures; not every network has a spatial map or classes."""

    vectors: Tensor  # (B, D)
    spatial: Tensor | None = None  # (B, S)
    logits: Tensor | None = None  # (B, classes)


class Features(Protocol):
    """A network that embeds pictures."""

    name: str
    resize: str  # how pictures are resized
    identity: str  # digest of the weights
    network: nn.Module

    def __call__(self, x: Tensor) -> Embedded:
        """The features of pictures (B, 3, H, W) in [-1, 1]."""


class InceptionFeatures:
    """Inception's features, for FID, sFID, KID and the Inception score."""

    def __init__(
        self,
        *,
        weights: str | None = None,  # file; null is where `ldm fetch` puts it
        resize: Resize = "tensorflow",  # kernel: tensorflow as published, or bicubic without aliasing
    ):
        from ldm.metrics.inception import Inception

        file = Path(weights).expanduser() if weights else cached(DOWNLOADS["inception"])
        if not file.is_file():
            hint = f"`ldm fetch inception`, or features.weights=FILE with {DOWNLOADS['inception'].file}"
            raise InputError("features.weights: no such file", str(file), expected="Inception's weights", hint=hint)
        self.network = Inception().eval().requires_grad_(False)
        tensors = open_pickle(file) if is_pickle(file) else open_file(file)
        counts = {name: x for name, x in self.network.state_dict().items() if name.endswith("num_batches_tracked")}
        load_weights(self.network, {**counts, **tensors})  # some files lack these counts, which are not used
        self.name, self.resize = "inception", f"{SIDE}x{SIDE}, {resize}"
        self.kernel = tensorflow if resize == "tensorflow" else bicubic
        self.identity = f"inception {file_hash(file)}"

    def __call__(self, x: Tensor) -> Embedded:
        pixels = self.kernel((x + 1) * 127.5, SIDE)  # 0 to 255, (B, 3, 299, 299)
        return Embedded(*self.network((pixels - 128) / 128))


class DINOv2Features:
    """The class token of a DINOv2 in transformers' format (Stein et al. 2023)."""

    def __init__(
        self,
        *,
        weights: str,  # folder in transformers' format
        side: int = 224,  # of the resized pictures
    ):
        folder = Path(weights).expanduser()
        if not (folder / "config.json").is_file():
            expected = "a folder with config.json and model.safetensors"
            raise InputError("features.weights: no such model", str(folder), expected=expected)
        open_file(folder / "model.safetensors")  # reports a damaged file
        from transformers import Dinov2Model

        try:
            loaded: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            got = str(error).splitlines()[0]
            raise CheckpointError("features.weights: not a DINOv2", str(folder), got) from error
        network, info = loaded
        if wrong := [str(name) for names in info.values() for name in names if "mask_token" not in str(name)]:
            got = f"{len(wrong)} tensors that do not fit, such as {wrong[0]}"
            raise CheckpointError("features.weights: not a DINOv2", str(folder), got)
        self.network, self.side = network.eval().requires_grad_(False), side
        self.name, self.resize = "dinov2", f"{side}x{side}, bicubic"
        self.identity = f"dinov2 {file_hash(folder / 'model.safetensors')}"

    def __call__(self, x: Tensor) -> Embedded:
        pixels = bicubic((x + 1) / 2, self.side, white=1)  # (B, 3, S, S)
        mean, std = (numbers.to(x)[:, None, None] for numbers in (MEAN, STD))
        return Embedded(self.network((pixels - mean) / std).last_hidden_state[:, 0])


def as_saved(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], rounded to the 256 values of a file."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def bicubic(x: Tensor, side: int, white: float = 255) -> Tensor:
    """Antialiased bicubic resizing; values beyond black and white are clipped."""
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, white)


def tensorflow(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear resizing: pixel i of n samples position i * size / n, without antialiasing."""
    return resize_width(resize_width(x, side).mT, side).mT


def resize_width(x: Tensor, side: int) -> Tensor:
    """The last axis (..., W), interpolated at `side` positions."""
    at = torch.arange(side, device=x.device) * (x.shape[-1] / side)
    low = at.long()  # (side,)
    high = (low + 1).clamp(max=x.shape[-1] - 1)
    return torch.lerp(x[..., low], x[..., high], (at - low).to(x))
