"""The patch discriminator of the first stage's adversarial loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ldm.models.layers import check_multiple, check_positive, group_norm


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, section 3.2): one logit for each overlapping patch, 70 pixels wide with 3 layers.

    The default is GroupNorm, which neither couples the samples of a batch nor needs synchronisation between ranks.
    CompVis trained BatchNorm, and their weights load into it by name.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 64,  # channels of the first layer
        layers: int = 3,  # strided layers; 3 give a patch 70 pixels wide
        norm: Literal["group", "batch"] = "group",  # GroupNorm, or BatchNorm as in CompVis
    ):
        super().__init__()
        if norm not in ("group", "batch"):
            raise ValueError(f"norm: unknown; got {norm!r}; expected 'group' or 'batch'; try 'group'")
        check_positive(in_channels=in_channels, layers=layers)
        if norm == "group":
            check_multiple("channels", channels, 16, "twice it cannot be split into 32 norm groups")
        self.in_channels, self.layers = in_channels, layers
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            normalise = group_norm(widths[i + 1], eps=1e-5) if norm == "group" else nn.BatchNorm2d(widths[i + 1])
            # no bias: the norm after it removes or replaces it
            stack += [nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False), normalise]
            stack += [nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self._initialise()

    def _initialise(self) -> None:
        """pix2pix's initialisation: convolutions N(0, 0.02), norm weights N(1, 0.02), zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """One logit per patch."""
        smallest = 3 * 2**self.layers  # two stride-1 convolutions take a pixel each
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f"x: too small for a patch; got {x.shape[2]}x{x.shape[3]}; expected at least {smallest}x{smallest}; "
                f"try {smallest}x{smallest} or layers={max(1, self.layers - 1)}"
            )
        return self.main(x)  # (B, 1, H/2^layers - 2, W/2^layers - 2)
