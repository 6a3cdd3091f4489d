"""The CLIP score (Hessel et al. 2021): 100 max(cos(picture, prompt), 0)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.files import file_hash
from ldm.errors import CheckpointError, InputError


class CLIPScore:
    """One of open_clip's models, with weights from a file and open_clip's own preprocessing."""

    def __init__(
        self,
        *,
        model: str,  # name in open_clip
        weights: str,  # file of this model
    ):
        import open_clip

        file = Path(weights).expanduser()
        if not file.is_file():
            raise InputError("clip.weights: no such file", str(file), expected=f"weights of {model}")
        if model not in open_clip.list_models():
            raise ValueError(f"model: unknown; got {model}; expected one of open_clip's, such as ViT-B-32-quickgelu")
        try:
            with warnings.catch_warnings(action="ignore"):  # open_clip warns of settings that differ from its table
                network, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained=str(file))
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"clip.weights: not of {model}", str(file), str(error).splitlines()[0]) from error
        self.network, self.tokenize = network.eval().requires_grad_(False), open_clip.get_tokenizer(model)
        self.name, self.identity = model, f"{model} {file_hash(file)}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """The score of each picture with its prompt, (B,)."""
        device = next(self.network.parameters()).device
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        x = self.network.encode_image(pixels.to(device), normalize=True)  # (B, D)
        y = self.network.encode_text(self.tokenize(list(prompts)).to(device), normalize=True)  # (B, D)
        return 100 * (x * y).sum(1).clamp(min=0).cpu()
