"""The two bottlenecks of an autoencoder: a diagonal Gaussian (KL) and a codebook (VQ).

Both have `channels`, `moments`, `posterior`, `sample`, `forward` and `snap`, so that the autoencoder treats them alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.layers import check_not_negative, check_positive


class Bottled(NamedTuple):
    """A bottleneck's output in training: latents for the decoder, a penalty per sample, and VQ's codes."""

    z: Tensor  # (B, C, H, W)
    penalty: Tensor  # (B,)
    codes: Tensor | None = None  # (B, H, W)


class Gaussian(nn.Module):
    """The diagonal Gaussian posterior of a VAE (Kingma and Welling 2014, appendix B)."""

    def __init__(self, *, channels: int = 4):
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels
        self.moments = 2 * channels

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance; the latter is clamped so that its exponential is finite in float32."""
        mean, logvar = h.chunk(2, dim=1)  # (B, C, H, W) each
        return mean, logvar.clamp(-30.0, 20.0)

    def sample(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise, or the mean without noise."""
        mean, logvar = self.posterior(h)
        if noise is None:
            return mean
        if noise.shape != mean.shape:  # it would broadcast
            got, expected = tuple(noise.shape), tuple(mean.shape)
            raise ValueError(f"noise: wrong shape; got {got}; expected {expected}; try that shape")
        return mean + (0.5 * logvar).exp() * noise  # (B, C, H, W)

    def forward(self, h: Tensor, noise: Tensor | None = None) -> Bottled:
        """The sample, and KL(posterior || N(0, 1)) in nats, summed over each image's latents."""
        mean, logvar = (half.float() for half in self.posterior(h))
        penalty = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))  # (B,)
        return Bottled(self.sample(h, noise), penalty)

    def snap(self, z: Tensor) -> Tensor:
        """The nearest valid input of the decoder: z itself."""
        return z


class VectorQuantizer(nn.Module):
    """The codebook of a VQ-VAE (van den Oord et al. 2017): nearest codes, straight-through gradients (section 3.2).

    The penalty is the paper's equation 3, |sg(z) - e|^2 + commitment |z - sg(e)|^2, with the factor on the encoder's
    term. CompVis's default ("legacy") has it on the codebook's term; this changes training, not the weights' format.
    """

    def __init__(self, *, codes: int = 8192, channels: int = 3, commitment: float = 0.25):
        super().__init__()
        check_positive(codes=codes, channels=channels)
        check_not_negative(commitment=commitment)
        self.channels = self.moments = channels
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.empty(codes, channels))
        nn.init.uniform_(self.codebook, -1 / codes, 1 / codes)

    def posterior(self, h: Tensor) -> tuple[Tensor, None]:
        """A point: diffusion runs on the latents before quantisation (LDM, section 3.2)."""
        return h, None

    def sample(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """The point itself."""
        return h  # (B, C, H, W)

    def nearest(self, z: Tensor) -> Tensor:
        """The index of the nearest code for each latent vector, compared in float32 even under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            rows = z.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (B*H*W, C)
            book = self.codebook.detach().float()  # (K, C)
            # |z - e|^2 without |z|^2, which is the same for all codes
            distance = torch.addmm(book.square().sum(1), rows, book.T, alpha=-2)  # (B*H*W, K)
        return distance.argmin(1).view(z.shape[0], *z.shape[2:])  # (B, H, W)

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors of codes."""
        return self.codebook[codes].permute(0, 3, 1, 2)  # (B, C, H, W)

    def forward(self, h: Tensor, noise: Tensor | None = None) -> Bottled:
        """The nearest codes with straight-through gradients, and equation 3 per sample; noise is unused."""
        codes = self.nearest(h)  # (B, H, W)
        e = self.lookup(codes)  # (B, C, H, W)
        to_codes = (h.detach().float() - e.float()).square().mean(dim=(1, 2, 3))  # (B,)
        to_encoder = (h.float() - e.detach().float()).square().mean(dim=(1, 2, 3))  # (B,)
        return Bottled(straight_through(h, e), to_codes + self.commitment * to_encoder, codes)

    def snap(self, z: Tensor) -> Tensor:
        """The nearest valid input of the decoder: a code at each place."""
        return straight_through(z, self.lookup(self.nearest(z)))  # (B, C, H, W)

    def count(self, codes: Tensor) -> Tensor:
        """How often each code occurs; sum over steps and ranks for `perplexity` and `revive`."""
        codes = codes.flatten()  # bincount would wait for the GPU
        return codes.new_zeros(len(self.codebook)).scatter_add_(0, codes, torch.ones_like(codes))  # (K,)

    @torch.no_grad()
    def revive(self, counts: Tensor, samples: Tensor) -> Tensor:
        """Replace the unused codes by latent vectors, the rows of `samples`, in order and as far as they go."""
        dead = counts == 0
        turn = dead.cumsum(0) - 1  # the dead codes' numbers, without host synchronisation
        changed = dead & (turn < len(samples))
        fresh = samples[turn.clamp(0, len(samples) - 1)].to(self.codebook.dtype)  # (K, C)
        self.codebook.copy_(torch.where(changed[:, None], fresh, self.codebook))
        return changed  # (K,) codes whose optimiser state is stale now


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """Exactly e in the forward pass, and the identity in z for gradients."""
    return (z - z.detach()) + e.detach()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the usage of codes: the effective number of codes."""
    p = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(p).sum().exp()
