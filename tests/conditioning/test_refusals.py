"""What makes no sense as a condition is refused in one line."""

import pytest
import torch

from ldm.conditioning.compose import Compose
from ldm.conditioning.label import Label
from ldm.conditioning.layout import Layout
from ldm.conditioning.spatial import LowResolution, Segmentation
from ldm.conditioning.text import clip
from ldm.errors import InputError
from tests.conditioning.conditions import (
    BOXES,
    KINDS,
    MASKED,
    SEGMENTS,
    TEXTS,
    upscaler,
)

ALL, NONE, FIRST = torch.tensor([True, True]), torch.tensor([False, False]), torch.tensor([True, False])


def refusal(call) -> str:
    with pytest.raises((ValueError, InputError)) as error:
        call()
    return str(error.value)


def layout_with(**changes):
    return lambda: Layout(classes=3, width=12, boxes=5)({**BOXES, **changes})


BOX = torch.tensor([[[0.5, 0.1, 0.4, 0.5]]])
REFUSALS = [
    (lambda: Label(classes=7, null=7), "null: no such row; got 7; expected 0 to 6 or null; try 6"),
    (
        lambda: Label(classes=7, null=None, drop=0.1),
        "drop: needs a null row; got 0.1; expected 0; try drop=0, or one more class and null=7",
    ),
    (lambda: Label(drop=1.5), "drop: out of range; got 1.5; expected 0 <= drop < 1; try 0.1"),
    (lambda: Label(drop=float("nan")), "drop: out of range; got nan; expected 0 <= drop < 1; try 0.1"),
    (
        lambda: Label()({"label": torch.tensor([5, 1001])}),
        "label: no such class; got 1001; expected 0 to 1000; try 1000",
    ),
    (lambda: Label()({"label": torch.tensor([-1])}), "label: no such class; got -1; expected 0 to 1000; try 0"),
    (
        lambda: Label()({"label": torch.tensor([1.5])}),
        "label: not one integer per sample; got float32 of shape (1,); expected integers of shape (B,)",
    ),
    (
        lambda: Label(classes=10, null=None).null(1),
        "label: guidance needs a null row; got none; expected a null row; try cfg=1",
    ),
    (lambda: Label()({"caption": ["x"]}), "batch: has no 'label'; got caption; expected label; try adding 'label'"),
    (
        lambda: Label()({"label": torch.tensor([1])}, {"caption": FIRST}),
        "drop: no such part; got caption; expected label; try label",
    ),
    (
        lambda: Label()({"label": torch.tensor([1])}, {"label": FIRST}),
        "drop.label: not a flag per sample; got bool of shape (2,); expected bool of shape (1,)",
    ),
    (
        lambda: KINDS["compose_tokens"].make()(KINDS["compose_tokens"].batch, {"captions": FIRST}),
        "drop: no such part; got captions; expected caption, label, masked_image; try caption",
    ),
    (
        lambda: KINDS["masked_image"].make()({**MASKED, "mask": torch.ones(2, 1, 8, 8)}),
        "mask: not of the image's size; got shape (2, 1, 8, 8); expected (2, 1, 16, 16)",
    ),
    (
        lambda: KINDS["masked_image"].make()({"image": MASKED["image"]}),
        "batch: has no 'mask'; got image; expected image, mask; try adding 'mask'",
    ),
    (
        lambda: Segmentation(latent_factor=4, classes=2)(SEGMENTS),
        "segmentation: no such class; got -1 to 2; expected 0 to 1, or -1 for none",
    ),
    (
        lambda: Segmentation(latent_factor=4, classes=3)({"segmentation": torch.zeros(1, 15, 18).long()}),
        "segmentation: size not divisible by the network's factor; got 15x18; expected multiples of 4; try 16x16",
    ),
    (
        lambda: Segmentation(latent_factor=4, classes=3)({"segmentation": torch.zeros(1, 3, 16, 16)}),
        "segmentation: not a map of classes; got float32 of shape (1, 3, 16, 16); expected integers of shape (B, H, W)",
    ),
    (
        lambda: LowResolution(latent_factor=1),
        "factor: too small; got 1; expected 2 or more, as there is no autoencoder; try 4",
    ),
    (
        lambda: Compose(parts=[Label(), upscaler()]),
        "parts: vectors need different names, and one label table at most; got noise_level, label",
    ),
    (
        lambda: Compose(parts=[upscaler(table=False), upscaler(table=False)]),
        "parts: vectors need different names, and one label table at most; got noise_level, noise_level",
    ),
    (
        lambda: upscaler(start=-1.0),
        "start: not a noise schedule; got -1.0 to end 0.02; expected 0 < start <= end < 1",
    ),
    (
        lambda: upscaler()(KINDS["low_resolution"].batch | {"noise_level": torch.tensor([20, 1000])}),
        "noise_level: no such level; got 20 to 1000; expected 0 to 999; try 20",
    ),
    (
        lambda: upscaler()(KINDS["low_resolution"].batch | {"noise_level": torch.tensor([20])}),
        "noise_level: not one integer per image; got int64 of shape (1,); expected shape (2,)",
    ),
    (
        lambda: upscaler()(KINDS["low_resolution"].batch | {"low_resolution_noise": torch.zeros(2, 3, 8, 8)}),
        "low_resolution_noise: not of the latents' size; got (2, 3, 8, 8); expected (2, 3, 4, 4)",
    ),
    (
        layout_with(box_labels=torch.tensor([[2, 3, -1]] * 2)),
        "box_labels: no such class; got 3; expected 0 to 2, or -1 for no box; try 2",
    ),
    (
        layout_with(boxes=BOX, box_labels=torch.tensor([[1]])),
        "boxes: not a box; got [0.5, 0.1, 0.4, 0.5]; expected left < right and top < bottom, in [0, 1]",
    ),
    (
        layout_with(boxes=torch.zeros(2, 3, 5)),
        "boxes: wrong shape; got boxes of shape (2, 3, 5) with labels of shape (2, 3); expected (B, N, 4) with (B, N); "
        "try padding with label -1",
    ),
    (
        layout_with(boxes=torch.zeros(1, 6, 4), box_labels=-torch.ones(1, 6).long()),
        "boxes: too many; got 6; expected at most 5",
    ),
    (lambda: Compose(parts=[]), "parts: empty; got []; expected conditioners; try one or more"),
    (
        lambda: Compose(parts=[Label(width=8), Label(width=12)]),
        "parts: tokens differ in width; got [8, 12]; expected one width; try by: channels",
    ),
    (
        lambda: Compose(parts=[Label(), Label()]),
        "parts: labels and pooled vectors cannot be combined; got 2 with labels, 0 with pooled vectors; "
        "try a width for labels",
    ),
    (
        lambda: Compose(parts=[clip(width=12, layers=1, heads=2), Label(width=8)], by="channels")(
            TEXTS | {"label": torch.tensor([1, 2])}
        ),
        "parts: numbers of tokens differ; got 77 and 1; expected one number; try by: tokens",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[message.split(";")[0] for _, message in REFUSALS])
def test_what_makes_no_sense_is_refused(call, message):
    assert refusal(call) == message
