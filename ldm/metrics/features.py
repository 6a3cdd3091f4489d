"""What pictures are compared by: the features of a network that reads them, and how pictures are made its size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.downloads import DOWNLOADS, cached
from ldm.checkpoint.files import check_digest, file_hash, is_pickle, open_file, open_pickle
from ldm.checkpoint.networks import load_weights
from ldm.errors import CheckpointError, InputError
from ldm.models.inception import SIDE, Inception
from ldm.scenes import pretrained

Resize = Literal["tensorflow", "bicubic"]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet's pictures


class Embedded(NamedTuple):
    """What a network makes of pictures; not all have a map or classes."""

    vectors: Tensor  # (B, D)
    spatial: Tensor | None = None  # (B, S)
    logits: Tensor | None = None  # (B, classes)


class Features(Protocol):
    """A network that reads pictures: `identity` is its weights' digest, `resize` what is done to a picture before."""

    name: str
    resize: str
    identity: str
    network: nn.Module

    def __call__(self, x: Tensor) -> Embedded:
        """Of pictures (B, 3, H, W) in [-1, 1], as they would be saved."""
        ...


class JudgeFeatures:
    """The judge's own, which come along and know scenes; pictures are compared at 64 x 64."""

    def __init__(self) -> None:
        self.name, self.resize = "judge", "64x64, bilinear, antialiased"
        self.network = copy.deepcopy(pretrained.judge())  # that one stays where it is
        self.identity = f"judge {check_digest(pretrained.FOLDER / 'judge.safetensors')}"

    def __call__(self, x: Tensor) -> Embedded:
        return Embedded(self.network.pooled(x))


class InceptionFeatures:
    """Those of FID, sFID, KID and the Inception score; `resize` is TensorFlow's, as published, or antialiased."""

    def __init__(
        self,
        *,
        weights: str | None = None,  # file; null is where `ldm fetch` puts it
        resize: Resize = "tensorflow",  # the kernel
    ):
        file = Path(weights).expanduser() if weights else cached(DOWNLOADS["inception"])
        if not file.is_file():
            hint = f"`ldm fetch inception`, or features.weights=FILE with {DOWNLOADS['inception'].file}"
            raise InputError("features.weights: no such file", str(file), expected="Inception's weights", hint=hint)
        self.network = Inception().eval().requires_grad_(False)
        tensors = open_pickle(file) if is_pickle(file) else open_file(file)
        counts = {name: x for name, x in self.network.state_dict().items() if name.endswith("num_batches_tracked")}
        load_weights(self.network, {**counts, **tensors})  # which not every file has, and nothing here reads
        self.name, self.resize = "inception", f"{SIDE}x{SIDE}, {resize}"
        self.kernel = tensorflow if resize == "tensorflow" else bicubic
        self.identity = f"inception {file_hash(file)}"

    def __call__(self, x: Tensor) -> Embedded:
        pixels = self.kernel((x + 1) * 127.5, SIDE)  # 0 to 255, (B, 3, 299, 299)
        return Embedded(*self.network((pixels - 128) / 128))


class DINOv2Features:
    """The class token of a DINOv2 from a folder of transformers' (Stein et al. 2023)."""

    def __init__(
        self,
        *,
        weights: str,  # folder of transformers'
        side: int = 224,  # that pictures are scaled to
    ):
        folder = Path(weights).expanduser()
        if not (folder / "config.json").is_file():
            expected = "a folder with config.json and model.safetensors"
            raise InputError("features.weights: no such model", str(folder), expected=expected)
        open_file(folder / "model.safetensors")  # or a line that says what is wrong with it
        self.network = dinov2(folder)
        self.side = side
        self.name, self.resize = "dinov2", f"{side}x{side}, bicubic"
        self.identity = f"dinov2 {file_hash(folder / 'model.safetensors')}"

    def __call__(self, x: Tensor) -> Embedded:
        pixels = bicubic((x + 1) / 2, self.side, white=1)  # (B, 3, S, S)
        mean, std = (numbers.to(x)[:, None, None] for numbers in (MEAN, STD))
        return Embedded(self.network((pixels - mean) / std).last_hidden_state[:, 0])


def dinov2(folder: Path) -> Any:
    """transformers' own, or a line that says why not."""
    from transformers import Dinov2Model

    try:
        loaded: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError("features.weights: no DINOv2", str(folder), str(error).splitlines()[0]) from error
    found, info = loaded
    wrong = [str(name) for problem in info.values() for name in problem if "mask_token" not in str(name)]
    if wrong:
        got = f"{len(wrong)} tensors that do not fit, such as {wrong[0]}"
        raise CheckpointError("features.weights: no DINOv2", str(folder), got)
    return found.eval().requires_grad_(False)


def as_saved(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] with the 256 values that a file has."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def bicubic(x: Tensor, side: int, white: float = 255) -> Tensor:
    """Made so large or small without aliases, and without what the kernel adds beyond black and white."""
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, white)


def tensorflow(x: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 had it: pixel i of n is read at i * size / n, and nothing is smoothed."""
    return halfway(halfway(x, side).mT, side).mT


def halfway(x: Tensor, side: int) -> Tensor:
    """The last axis (..., W) at `side` places."""
    at = torch.arange(side, device=x.device) * (x.shape[-1] / side)
    low = at.long()  # (side,)
    high = (low + 1).clamp(max=x.shape[-1] - 1)
    return torch.lerp(x[..., low], x[..., high], (at - low).to(x))
