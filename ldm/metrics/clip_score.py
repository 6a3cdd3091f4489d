"""How well pictures fit their prompts by a CLIP (Hessel et al. 2021): 100 cos(picture, prompt), no less than 0."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.files import file_hash
from ldm.errors import CheckpointError, InputError


class CLIPScore:
    """open_clip's own model of this name with weights from a file, and its own way of reading a picture."""

    def __init__(
        self,
        *,
        model: str,  # a name of open_clip's
        weights: str,  # file of it
    ):
        import open_clip

        file = Path(weights).expanduser()
        if not file.is_file():
            raise InputError("clip.weights: no such file", str(file), expected=f"weights of {model}")
        if model not in open_clip.list_models():
            raise ValueError(f"model: unknown; got {model}; expected one of open_clip's, such as ViT-B-32-quickgelu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that its own table has otherwise
            self.network, self.preprocess = loaded(model, file)
        self.tokenize = open_clip.get_tokenizer(model)
        self.name, self.identity = model, f"{model} {file_hash(file)}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,)"""
        device = next(self.network.parameters()).device
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        seen = self.network.encode_image(pixels.to(device), normalize=True)  # (B, D)
        said = self.network.encode_text(self.tokenize(list(prompts)).to(device), normalize=True)
        return 100 * (seen * said).sum(1).clamp(min=0).cpu()


def loaded(model: str, file: Path) -> tuple[Any, Any]:
    """The network, frozen, and what makes pictures its size."""
    import open_clip

    try:
        network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=str(file))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"clip.weights: not of {model}", str(file), str(error).splitlines()[0]) from error
    return network.eval().requires_grad_(False), preprocess
