"""Class labels as a condition: integers for the backbone's table, or a token from a table here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioning.conditioner import Conditioner
from ldm.errors import InputError
from ldm.models.layers import check_positive


class Label(Conditioner):
    """One class label per sample, from a table of `classes` rows with a null row.

    DiT and ADM have the table themselves and read integers; with a `width` it is here, and each label becomes a token
    (LDM's class-conditional models: 1001 rows of 512). The defaults are DiT's.
    """

    reads = ("label",)

    def __init__(
        self,
        *,
        classes: int = 1001,  # rows of the table, with the null row
        null: int | None = 1000,  # the null row, for no class; null has none
        width: int | None = None,  # width of a label's token; null: the backbone has the table
        drop: float | None = None,  # share of samples without their label; null is 0.1, or 0 without a null row
    ):
        super().__init__("label", (0.1 if null is not None else 0.0) if drop is None else drop)
        check_positive(classes=classes)
        if null is not None and not 0 <= null < classes:
            nearest = min(max(null, 0), classes - 1)
            raise ValueError(f"null: no such row; got {null}; expected 0 to {classes - 1} or null; try {nearest}")
        if null is None and self.drop:
            raise ValueError(
                f"drop: needs a null row; got {self.drop}; expected 0; try drop=0, or one more class and null={classes}"
            )
        self.rows, self.row = classes, null
        self.classes = classes if width is None else None
        self.context = width
        self.table = nn.Embedding(classes, width) if width is not None else None

    def encode(self, labels: Tensor) -> Condition:
        """The condition of integer labels (B,)."""
        if self.table is None:
            return Condition(pooled=labels)
        return Condition(tokens=self.table(labels.to(self.table.weight.device))[:, None])  # (B, 1, C)

    def read(self, batch: Mapping[str, Any]) -> Condition:
        labels = torch.as_tensor(batch["label"])
        if labels.ndim != 1 or labels.is_floating_point():
            got = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
            raise ValueError(f"label: not one integer per sample; got {got}; expected integers of shape (B,)")
        if labels.device.type == "cpu":  # on a GPU the check would wait for the device
            self.check_range(labels)
        return self.encode(labels)

    def check_range(self, labels: Tensor) -> None:
        """Refuse labels without a row."""
        for label in labels.tolist():
            if not 0 <= label < self.rows:
                nearest = str(min(max(label, 0), self.rows - 1))
                raise InputError("label: no such class", got=str(label), expected=f"0 to {self.rows - 1}", hint=nearest)

    def check_data(self, labels: Tensor) -> None:
        """Refuse a dataset's labels that have no row, or the null row."""
        self.check_range(labels)
        if self.row is not None and (labels == self.row).any():
            expected, hint = f"0 to {self.rows - 1} but {self.row}", "another null row, or more classes"
            raise InputError("label: is the null row", got=str(self.row), expected=expected, hint=hint)

    def null(self, count: int, size: tuple[int, int] = (1, 1)) -> Condition:
        if self.row is None:
            raise InputError("label: guidance needs a null row", got="none", expected="a null row", hint="cfg=1")
        device = None if self.table is None else self.table.weight.device
        return self.encode(torch.full((count,), self.row, device=device))
