"""The two bottlenecks of an autoencoder: a diagonal Gaussian (KL) and a codebook (VQ).

Both offer `channels`, `moments`, `posterior`, `sample`, `forward` and `snap`, so that the autoencoder need not ask
which one it holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.models.layers import check_positive


class Bottled(NamedTuple):
    """What training needs of a bottleneck: latents for the decoder, a penalty per sample, and the codes of VQ."""

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
        """Mean and log-variance, the latter kept where its exponential is a finite float32."""
        mean, logvar = h.chunk(2, dim=1)  # (B, C, H, W) each
        return mean, logvar.clamp(-30.0, 20.0)

    def sample(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise, or the mean where no noise is given."""
        mean, logvar = self.posterior(h)
        return mean if noise is None else mean + (0.5 * logvar).exp() * noise  # (B, C, H, W)

    def forward(self, h: Tensor, noise: Tensor | None = None) -> Bottled:
        """The sample, and KL(posterior || N(0, 1)) in nats summed over each image's latents."""
        mean, logvar = (half.float() for half in self.posterior(h))
        penalty = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))  # (B,)
        return Bottled(self.sample(h, noise), penalty)

    def snap(self, z: Tensor) -> Tensor:
        """What the decoder may see: every z."""
        return z


class VectorQuantizer(nn.Module):
    """The codebook of a VQ-VAE (van den Oord et al. 2017): nearest codes, straight-through gradients (section 3.2).

    The penalty is the paper's equation 3, |sg(z) - e|^2 + commitment |z - sg(e)|^2: the factor belongs to the encoder.
    CompVis's quantizer puts it on the codebook's term by default ("legacy"); weights load alike, only training differs.
    """

    def __init__(self, *, codes: int = 8192, channels: int = 3, commitment: float = 0.25):
        super().__init__()
        check_positive(codes=codes, channels=channels)
        if commitment < 0:
            raise ValueError(f"commitment: a weight is never negative; got {commitment}; expected >= 0; try 0.25")
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
        """The number of the code nearest to each latent vector, compared in float32 even under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            rows = z.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (B*H*W, C)
            book = self.codebook.detach().float()  # (K, C)
            # |z - e|^2 without |z|^2, which is the same for every code
            distance = torch.addmm(book.square().sum(1), rows, book.T, alpha=-2)  # (B*H*W, K)
        return distance.argmin(1).view(z.shape[0], *z.shape[2:])  # (B, H, W)

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors that codes stand for."""
        return self.codebook[codes].permute(0, 3, 1, 2)  # (B, C, H, W)

    def forward(self, h: Tensor, noise: Tensor | None = None) -> Bottled:
        """The nearest codes with straight-through gradients, and equation 3 averaged over a sample; noise is unused."""
        codes = self.nearest(h)  # (B, H, W)
        e = self.lookup(codes)  # (B, C, H, W)
        to_codes = (h.detach().float() - e.float()).square().mean(dim=(1, 2, 3))  # (B,)
        to_encoder = (h.float() - e.detach().float()).square().mean(dim=(1, 2, 3))  # (B,)
        return Bottled(straight_through(h, e), to_codes + self.commitment * to_encoder, codes)

    def snap(self, z: Tensor) -> Tensor:
        """What the decoder may see: codes only."""
        return straight_through(z, self.lookup(self.nearest(z)))  # (B, C, H, W)

    def count(self, codes: Tensor) -> Tensor:
        """How often each code occurs: sum it over steps and ranks, then ask for `perplexity` or `revive`."""
        codes = codes.flatten()  # and no bincount, for which a GPU is waited for
        return codes.new_zeros(len(self.codebook)).scatter_add_(0, codes, torch.ones_like(codes))  # (K,)

    @torch.no_grad()
    def revive(self, counts: Tensor, samples: Tensor) -> Tensor:
        """Put one given latent vector (row of `samples`, chosen by a key) in place of each unused code, in order.

        More dead codes than samples: the rest wait. Returns which codes changed, whose optimiser state is then stale.
        """
        if counts.shape != (len(self.codebook),):
            got, expected = tuple(counts.shape), (len(self.codebook),)
            raise ValueError(
                f"counts: one number per code is needed; got shape {got}; expected {expected}; try count()"
            )
        if samples.ndim != 2 or samples.shape[1] != self.channels or len(samples) == 0:
            raise ValueError(
                f"samples: rows of latent vectors are needed; got shape {tuple(samples.shape)}; "
                f"expected (N, {self.channels}) with N > 0; try z.permute(0, 2, 3, 1).flatten(0, 2)"
            )
        dead = counts == 0
        turn = dead.cumsum(0) - 1  # the how-manieth dead code; no host synchronisation
        changed = dead & (turn < len(samples))
        fresh = samples[turn.clamp(0, len(samples) - 1)].to(self.codebook.dtype)  # (K, C)
        self.codebook.copy_(torch.where(changed[:, None], fresh, self.codebook))
        return changed


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """Exactly e on the way forward, and the identity in z for gradients."""
    return (z - z.detach()) + e.detach()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the use of codes: the number of codes that would be used, were all used alike."""
    p = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(p).sum().exp()
