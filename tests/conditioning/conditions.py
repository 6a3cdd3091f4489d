"""One small conditioner of every kind, a batch for it, and a batch that differs; and a U-Net that reads any of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ldm.conditioning.compose import Compose
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.label import Label
from ldm.conditioning.layout import Layout
from ldm.conditioning.spatial import Edit, LowResolution, MaskedImage, Segmentation
from ldm.conditioning.t5 import t5
from ldm.conditioning.text import Text, clip, joint_text, open_clip
from ldm.conditioning.tokenizer import Foreign
from ldm.models.unet import UNet
from tests.models.backbones import TINY
from tests.models.first_stages import fill, small

CAPTIONS = [
    f"a {a} {b} left of a {c} ball" for a in ("red", "green") for b in ("cube", "cone") for c in ("red", "blue")
]
TEXTS = {"caption": ["a red cube", "a green cone left of a blue ball"]}
OTHER_TEXTS = {"caption": ["a blue ball", "two red cubes"]}
T5_NUMBERS = {"width": 12, "layers": 2, "heads": 2, "head_width": 6, "hidden": 24, "vocabulary": 40, "length": 36}


def unigram() -> Tokenizer:
    """A little T5 tokenizer, made in memory."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -2.0), ("▁red", -2.5), ("▁cube", -2.5), ("▁", -3.0)]
    theirs = Tokenizer(models.Unigram([*pieces, *((letter, -6.0) for letter in "abcdefgrsu<>/pdlnot")], unk_id=2))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    theirs.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return theirs


def small_t5(**options: Any) -> Text:
    """A T5 of random weights with a tokenizer."""
    text = fill(t5(**{**T5_NUMBERS, **options}))
    text.use(Foreign(unigram().to_str()))
    return text


def small_joint(**options: Any) -> Text:
    """A text encoder to train, with a tokenizer learned from captions."""
    text = fill(joint_text(**{"width": 12, "layers": 2, "heads": 2, "length": 16, "vocabulary": 560, **options}))
    text.learn(CAPTIONS)
    return text


def first_stage() -> Any:
    """An autoencoder that halves sides twice and normalises its latents."""
    autoencoder = fill(small()).requires_grad_(False).eval()
    autoencoder.set_statistics(0.25, 0.7)
    return autoencoder


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def masked() -> MaskedImage:
    autoencoder = first_stage()
    return MaskedImage(encode=autoencoder.encode, latent_channels=4, drop=0.1)


def upscaler(**options: Any) -> LowResolution:
    """A low-resolution condition of the latents' size."""
    return LowResolution(latent_factor=4, **options)


def low_resolution(seed: int) -> dict[str, Any]:
    batch = {"low_resolution": images(seed, 2, 3, 4, 4), "low_resolution_noise": images(9, 2, 3, 4, 4)}
    return batch | {"noise_level": torch.tensor([20, 350])}


def boxes(*rows: tuple[float, float, float, float, int]) -> dict[str, Any]:
    corners = torch.tensor([row[:4] for row in rows])[None].repeat(2, 1, 1)
    return {"boxes": corners, "box_labels": torch.tensor([row[4] for row in rows])[None].repeat(2, 1)}


BOXES = boxes((0.1, 0.1, 0.5, 0.5, 2), (0.4, 0.2, 0.9, 0.8, 0), (0.0, 0.0, 0.0, 0.0, -1))
SEGMENTS = {"segmentation": (torch.arange(2 * 16 * 16).reshape(2, 16, 16) // 5) % 4 - 1}


class Kind(NamedTuple):
    """How to make a conditioner, what it may read, and something else that it must tell apart from that."""

    make: Callable[[], Conditioner]
    batch: dict[str, Any]
    other: dict[str, Any]


TEXT_AND_LABEL = [TEXTS | {"label": torch.tensor([1, 2])}, OTHER_TEXTS | {"label": torch.tensor([3, 0])}]
MASKED = {"image": images(0, 2, 3, 16, 16), "mask": (images(1, 2, 1, 16, 16) > 0).float()}
KINDS = {
    "clip": Kind(lambda: fill(clip(width=12, layers=2, heads=2)), TEXTS, OTHER_TEXTS),
    "clip_pooled": Kind(lambda: fill(clip(width=12, layers=2, heads=2, projection=6)), TEXTS, OTHER_TEXTS),
    "clip_chunks": Kind(lambda: fill(clip(width=12, layers=2, heads=2, chunks=2)), TEXTS, OTHER_TEXTS),
    "open_clip": Kind(lambda: fill(open_clip(width=12, layers=3, heads=2)), TEXTS, OTHER_TEXTS),
    "joint_text": Kind(small_joint, TEXTS, OTHER_TEXTS),
    "joint_pooled": Kind(lambda: small_joint(projection=6), TEXTS, OTHER_TEXTS),
    "t5": Kind(small_t5, TEXTS, OTHER_TEXTS),
    "label": Kind(lambda: Label(classes=7, null=6), {"label": torch.tensor([1, 2])}, {"label": torch.tensor([2, 0])}),
    "label_token": Kind(
        lambda: fill(Label(classes=7, null=6, width=12)),
        {"label": torch.tensor([1, 2])},
        {"label": torch.tensor([2, 0])},
    ),
    "layout": Kind(
        lambda: fill(Layout(classes=3, width=12, boxes=5)), BOXES, BOXES | {"boxes": BOXES["boxes"] * 0.9 + 0.05}
    ),
    "segmentation": Kind(
        lambda: Segmentation(latent_factor=4, classes=3), SEGMENTS, {"segmentation": SEGMENTS["segmentation"].flip(1)}
    ),
    "masked_image": Kind(masked, MASKED, MASKED | {"image": images(2, 2, 3, 16, 16)}),
    "mask": Kind(masked, MASKED, MASKED | {"mask": 1 - MASKED["mask"]}),
    "edit": Kind(
        lambda: Edit(posterior=first_stage().posterior, latent_channels=4),
        {"source": images(0, 2, 3, 16, 16)},
        {"source": images(1, 2, 3, 16, 16)},
    ),
    "low_resolution": Kind(upscaler, low_resolution(0), low_resolution(1)),
    "noise_level": Kind(upscaler, low_resolution(0), low_resolution(0) | {"noise_level": torch.tensor([21, 349])}),
    "compose_tokens": Kind(
        lambda: fill(Compose(parts=[small_joint(), Label(classes=7, null=6, width=12), masked()])),
        TEXT_AND_LABEL[0] | MASKED,
        TEXT_AND_LABEL[1] | MASKED,
    ),
    "compose_channels": Kind(
        lambda: fill(
            Compose(
                parts=[
                    clip(width=8, layers=2, heads=2, projection=6),
                    clip(width=4, layers=2, heads=2, projection=2),
                ],
                by="channels",
            )
        ),
        TEXTS,
        OTHER_TEXTS,
    ),
}


def backbone(conditioner: Conditioner) -> UNet:
    """A small U-Net built from what a conditioner says of itself, random everywhere.

    Two channels to a norm's group: with one, norms would take away what the embedding adds.
    """
    numbers = {**TINY, "channels": 64, "multipliers": (1, 1), "heads": 2, "context": conditioner.context}
    numbers |= {"extra_channels": conditioner.concat_channels, "pooled": conditioner.pooled}
    numbers |= {"vectors": conditioner.vectors}
    return fill(UNet(**numbers, classes=conditioner.classes))


@torch.no_grad()
def output(unet: UNet, condition) -> torch.Tensor:
    """What the U-Net says under a condition of always the same noise."""
    x, t = images(5, 2, 4, 4, 4), torch.tensor([10, 600])
    x = x if condition.concat is None else torch.cat((x, condition.concat.expand(-1, -1, 4, 4)), 1)
    fields = {name: value for name, value in condition.items() if name != "concat"}
    return unet(x, t, **fields)
