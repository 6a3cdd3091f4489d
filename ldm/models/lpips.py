"""LPIPS (Zhang et al. 2018): a perceptual distance of pictures from the features of VGG16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.condition import at_least_float32

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width and number of convolutions


def vgg16() -> nn.Sequential:
    """The convolutions of VGG16 (Simonyan and Zisserman 2015, table 1, D), numbered as torchvision's `features`."""
    layers: list[nn.Module] = []
    before = 3
    for width, count in STAGES:
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1])  # the last pooling is not used


def unit(features: Tensor) -> Tensor:
    """Feature vectors of length one; the constant keeps gradients of zero vectors finite."""
    features = at_least_float32(features)
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()  # (B, C, h, w)


def channel_distances(a: Tensor, b: Tensor) -> Tensor:
    """The squared difference of unit feature vectors, averaged over the picture."""
    return (unit(a) - unit(b)).square().mean((2, 3))  # (B, C)


class LPIPS(nn.Module):
    """LPIPS of pictures in [-1, 1]: eq. 1 of the paper, with VGG16 as the network and a learned weight per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = vgg16()
        self.heads = nn.ParameterList([torch.full((width,), 1 / width) for width, _ in STAGES])
        for name, values in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)  # ImageNet's

    def features(self, x: Tensor) -> list[Tensor]:
        """The map at the end of each stage: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 16:
            got, expected = tuple(x.shape), "(B, 3, H, W) of 16 pixels or more"
            raise ValueError(f"x: not a picture for VGG16; got shape {got}; expected {expected}; try a larger picture")
        maps, h = [], (x - self.shift) / self.scale  # (B, 3, H, W)
        for layer in self.trunk:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(h)
            h = layer(h)  # (B, C, h, w)
        return [*maps, h]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.features(x), self.features(y), self.heads)
        return torch.stack([(channel_distances(a, b) * head).sum(1) for a, b, head in pairs]).sum(0)  # (B,)
