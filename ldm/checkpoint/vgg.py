"""LPIPS with its published weights: VGG16 from a local file, a weight per channel from torchmetrics' package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from ldm.checkpoint.downloads import DOWNLOADS, cached
from ldm.checkpoint.files import is_pickle, open_file, open_pickle
from ldm.checkpoint.networks import load_weights
from ldm.checkpoint.rename import rename
from ldm.errors import InputError
from ldm.models.lpips import LPIPS, STAGES

WITHOUT = "loss.perceptual=judge, or loss.perceptual_weight=0"


def lpips(file: str | Path | None = None) -> LPIPS:
    """LPIPS, frozen; VGG16 is read from torchvision's file, by default the one of `ldm fetch vgg16`."""
    network = LPIPS()
    load_weights(network, {**trunk(cached(DOWNLOADS["vgg16"]) if file is None else Path(file)), **heads()})
    return network.eval().requires_grad_(False)


def trunk(file: Path) -> dict[str, Tensor]:
    """VGG16's convolutions in our names; the classifier is not read."""
    if not file.is_file():
        hint = f"`ldm fetch vgg16`, loss.vgg=FILE, or without it {WITHOUT}"
        raise InputError("LPIPS needs the weights of VGG16", str(file), "no such file", DOWNLOADS["vgg16"].file, hint)
    tensors = open_pickle(file) if is_pickle(file) else open_file(file)
    names = [name for name in tensors if name.startswith("features.")]
    return {name.replace("features.", "trunk.", 1): tensors[name] for name in names}


def heads() -> dict[str, Tensor]:
    """The learned weight of each channel, as torchmetrics ships them."""
    spec = find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        hint = f"pip install -e '.[metrics]', or without it {WITHOUT}"
        raise InputError("LPIPS needs weights that torchmetrics ships", got="no torchmetrics", hint=hint)
    tensors = open_pickle(Path(spec.origin).parent / "functional/image/lpips_models/vgg.pth")
    renamed = rename(tensors, [(f"lin{i}.model.1.weight", f"heads.{i}") for i in range(len(STAGES))])
    return {name: weight.flatten() for name, weight in renamed.items()}  # (1, C, 1, 1) to (C,)
