"""Boxes with classes as unordered tokens (GLIGEN, Li et al., 2023, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.values import parsed
from ldm.errors import InputError, shown
from ldm.models.layers import check_positive

FREQUENCIES = 8  # frequencies of the sines and cosines of each coordinate
SHAPE = '{"boxes": [[left, top, right, bottom], ...], "labels": [class, ...]}'


class Layout(Conditioner):
    """One token per box: an MLP on the class's embedding and the sines and cosines of the corners.

    batch["boxes"] (B, N, 4) are left, top, right, bottom in [0, 1]; batch["box_labels"] (B, N) are classes, and -1 for
    no box. There is always a first token for the picture; the null has only this one.
    """

    reads = ("boxes", "box_labels")

    def __init__(
        self,
        *,
        classes: int,  # number of classes
        width: int = 256,  # width of a box's token
        boxes: int = 16,  # most boxes in a picture
        drop: float = 0.1,  # share of samples without their boxes
    ):
        super().__init__("boxes", drop)
        check_positive(classes=classes, width=width, boxes=boxes)
        self.rows, self.boxes, self.context = classes, boxes, width
        self.names = nn.Embedding(classes, width)
        self.first = nn.Parameter(torch.empty(1, 1, width))
        corners = 4 * 2 * FREQUENCIES
        self.mlp = nn.Sequential(nn.Linear(width + corners, width), nn.SiLU(), nn.Linear(width, width))
        self.initialise()

    def initialise(self) -> None:
        """Torch's defaults, and embeddings as small as CLIP's."""
        nn.init.normal_(self.names.weight, std=0.02)
        nn.init.normal_(self.first, std=0.02)

    def encode(self, boxes: Tensor, labels: Tensor) -> Condition:
        """The tokens of all places, the empty ones masked."""
        boxes, labels = boxes.to(self.first), labels.to(self.first.device)
        angles = boxes[..., None] * (math.pi * 2.0 ** torch.arange(FREQUENCIES, device=boxes.device))  # (B, N, 4, F)
        corners = torch.cat((angles.sin(), angles.cos()), -1).flatten(2).to(boxes.dtype)  # (B, N, 8F)
        names = self.names(labels.clamp(min=0))  # (B, N, C)
        tokens = self.mlp(torch.cat((names, corners), -1))  # (B, N, C)
        tokens = torch.cat((self.first.expand(len(tokens), 1, -1), tokens), 1)  # (B, 1 + N, C)
        there = F.pad(labels >= 0, (1, 0), value=True)  # (B, 1 + N)
        empty = self.boxes + 1 - tokens.shape[1]
        return Condition(F.pad(tokens, (0, 0, 0, empty)), F.pad(there, (0, empty)))

    def read(self, batch: Mapping[str, Any]) -> Condition:
        boxes, labels = torch.as_tensor(batch["boxes"]), torch.as_tensor(batch["box_labels"])
        self.check(boxes, labels)
        return self.encode(boxes, labels)

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        corners = torch.zeros(1, self.boxes, 4, device=self.first.device)
        return self.encode(corners, -torch.ones_like(corners[..., 0]).long()).repeat(count)

    def check(self, boxes: Tensor, labels: Tensor) -> None:
        """Refuse anything but boxes with classes."""
        if boxes.ndim != 3 or boxes.shape[2] != 4 or labels.shape != boxes.shape[:2]:
            got = f"boxes of shape {tuple(boxes.shape)} with labels of shape {tuple(labels.shape)}"
            raise ValueError(
                f"boxes: wrong shape; got {got}; expected (B, N, 4) with (B, N); try padding with label -1"
            )
        if boxes.shape[1] > self.boxes:
            count = boxes.shape[1]
            raise InputError("boxes: too many", got=str(count), expected=f"at most {self.boxes}")
        if boxes.device.type != "cpu":  # the check would wait for the device
            return
        inside = boxes[labels >= 0]
        if not ((inside >= 0) & (inside <= 1)).all() or (inside[:, :2] >= inside[:, 2:]).any():
            wrong = next(b for b in inside.tolist() if not (0 <= b[0] < b[2] <= 1 and 0 <= b[1] < b[3] <= 1))
            expected = "left < right and top < bottom, in [0, 1]"
            raise InputError("boxes: not a box", got=str([round(x, 4) for x in wrong]), expected=expected)
        if (labels >= self.rows).any():
            got, expected = str(int(labels.max())), f"0 to {self.rows - 1}, or -1 for no box"
            raise InputError("box_labels: no such class", got=got, expected=expected, hint=str(self.rows - 1))


def read_boxes(given: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
    """One picture's boxes as a batch, from a dictionary or a JSON file of the form SHAPE."""
    file = "" if isinstance(given, Mapping) else str(given)
    node = given if isinstance(given, Mapping) else parsed(Path(given), SHAPE)
    if not isinstance(node, Mapping) or set(node) != {"boxes", "labels"}:
        got = f"the keys {', '.join(map(str, node)) or 'none'}" if isinstance(node, Mapping) else shown(node)
        raise InputError("condition: not boxes with labels", file, got, SHAPE)
    boxes, labels = node["boxes"], node["labels"]
    if not isinstance(boxes, list | tuple) or not isinstance(labels, list | tuple) or len(boxes) != len(labels):
        counts = [len(x) if isinstance(x, list | tuple) else "no list of" for x in (boxes, labels)]
        got = f"{counts[0]} boxes and {counts[1]} labels"
        raise InputError("condition: the numbers of boxes and labels differ", file, got, "two lists of the same length")
    for box in boxes:
        if (
            not isinstance(box, list | tuple)
            or len(box) != 4
            or not all(type(x) in (int, float) and 0 <= x <= 1 for x in box)
        ):
            expected = "four numbers in [0, 1]: left, top, right, bottom"
            raise InputError("condition: not a box", file, shown(box), expected)
    for label in labels:
        if type(label) is not int or not 0 <= label < 2**31:
            raise InputError("condition: not a class", file, shown(label), "a non-negative integer")
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4),
        "box_labels": torch.tensor(labels, dtype=torch.long).reshape(1, -1),
    }
