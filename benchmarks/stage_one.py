"""A training step of the first stage beside CompVis's, and beside diffusers' AutoencoderKL in our own loop.

    python -m benchmarks.stage_one [--size 64] [--channels 64] [--batch 1] [--rounds 10] [--threads 2] [--peak TFLOPS]

CompVis's step is written here from its published form: two passes through the autoencoder, LPIPS in both, and gradients
through LPIPS and the discriminator taken once for the adaptive weight and once more for the update. The networks, the
numbers and the precision are the same on both sides, weights are random. Before anything is timed the losses must agree
and the operations counted must be those expected, within 2%. The ratio is their time over ours, from rounds of ours,
theirs, theirs, ours, with the lower end of its 95% interval. With a GPU the shapes are kl-f8's at 256 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.device import DEVICE, flops, peak, per_second, settled
from benchmarks.networks import fill, paired_ratio
from ldm.checkpoint.autoencoder_keys import write_autoencoder
from ldm.losses.stage_one import Loss
from ldm.models.autoencoder import Autoencoder
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.lpips import LPIPS
from ldm.models.quantize import Bottled, Gaussian

KL_WEIGHT, ADVERSARIAL_WEIGHT, LIMIT = 1e-6, 0.5, 1e4  # kl-f8's; the limit is of losses summed over an image


class Game(NamedTuple):
    """What a step needs: the networks with their optimisers, the loss, and a batch."""

    autoencoder: nn.Module
    discriminator: nn.Module
    loss: Loss
    last: Tensor
    optimizers: list[torch.optim.Optimizer]
    x: Tensor
    noise: Tensor


class Theirs(nn.Module):
    """diffusers' autoencoder with our face."""

    def __init__(self, ours: Autoencoder, channels: int):
        super().__init__()
        self.network = AutoencoderKL(
            block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        self.network.load_state_dict(write_autoencoder(ours.state_dict(), ours, "diffusers"))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Bottled]:
        posterior = self.network.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise
        return self.network.decode(z).sample, Bottled(z, posterior.kl())


def game(channels: int, size: int, batch: int, lr: float, diffusers: bool = False) -> Game:
    """The same networks, numbers and batch at every call."""
    torch.manual_seed(0)
    x, noise = torch.rand(batch, 3, size, size) * 2 - 1, torch.randn(batch, 4, size // 8, size // 8)
    weights = {"penalty_weight": KL_WEIGHT, "perceptual_weight": 0, "adversarial_weight": ADVERSARIAL_WEIGHT}
    loss = Loss(**weights, adaptive_limit=LIMIT / x[0].numel(), start=0)
    loss.perceptual, loss.perceptual_weight = random_lpips(), 1.0
    discriminator = PatchDiscriminator(norm="batch").to(DEVICE)
    ours = Autoencoder(bottleneck=Gaussian(channels=4), channels=channels, multipliers=(1, 2, 4, 4))
    fill(ours)
    autoencoder = (Theirs(ours, channels) if diffusers else ours).to(DEVICE)
    last = (autoencoder.network if diffusers else autoencoder).decoder.conv_out.weight
    optimizers = [torch.optim.Adam(network.parameters(), lr, (0.5, 0.9)) for network in (autoencoder, discriminator)]
    return Game(autoencoder, discriminator, loss.to(DEVICE), last, optimizers, x.to(DEVICE), noise.to(DEVICE))


def random_lpips() -> LPIPS:
    """LPIPS without a file: a random VGG16 costs as much."""
    network = LPIPS()
    for module in network.trunk:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.requires_grad_(False)


# ------------------------------------------------------------------------------------------------- the two steps


def our_step(game: Game) -> tuple[Tensor, Tensor]:
    """One pass through the autoencoder serves both updates."""
    y, bottled = game.autoencoder(game.x, game.noise)
    value, _ = game.loss.generator(game.x, y, bottled, game.discriminator(y), 0, game.last)
    update(game.optimizers[0], value)
    other, _ = game.loss.discriminator(game.discriminator(game.x), game.discriminator(y.detach()))
    update(game.optimizers[1], other)
    return value.detach(), other.detach()


def compvis_step(game: Game) -> tuple[Tensor, Tensor]:
    """Each optimiser's update with a pass of its own, as in LDM's code; the other side's weights are switched off."""
    game.discriminator.requires_grad_(False)
    y, nll, kl = compvis_terms(game)
    against = -game.discriminator(y).mean()
    norms = [torch.autograd.grad(part, game.last, retain_graph=True)[0].norm() for part in (nll, against)]
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, LIMIT).detach() * ADVERSARIAL_WEIGHT
    value = nll + KL_WEIGHT * kl + weight * against
    update(game.optimizers[0], value)
    game.discriminator.requires_grad_(True)
    game.autoencoder.requires_grad_(False)
    y, _, _ = compvis_terms(game)
    real, fake = game.discriminator(game.x), game.discriminator(y.detach())
    other = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    update(game.optimizers[1], other)
    game.autoencoder.requires_grad_(True)
    return value.detach(), other.detach()


def compvis_terms(game: Game) -> tuple[Tensor, Tensor, Tensor]:
    """A pass through the autoencoder and LPIPS: reconstructions, and both terms summed over an image's values."""
    y, bottled = game.autoencoder(game.x, game.noise)
    distance = (game.x - y.float()).abs() + game.loss.perceptual(game.x, y)[:, None, None, None]
    return y, distance.sum() / len(y), bottled.penalty.mean()


def update(optimizer: torch.optim.Optimizer, value: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------- gates and measures


def check_losses(shape: tuple[int, int, int]) -> None:
    """Stop unless the three steps have the same losses; with a learning rate of 0 their order does not matter."""
    ours = our_step(game(*shape, lr=0.0))
    values = 3 * shape[1] ** 2
    theirs = compvis_step(game(*shape, lr=0.0))
    for name, pair in {
        "CompVis": (theirs[0] / values, theirs[1]),
        "diffusers": our_step(game(*shape, 0.0, True)),
    }.items():
        for mine, other in zip(ours, pair):
            if abs(float(mine - other)) > 1e-4 * abs(float(mine)):
                raise SystemExit(f"{name}: a loss of {float(other):.6g} beside {float(mine):.6g}: nothing to time")
    print(f"losses agree within 1e-4: generator {float(ours[0]):.5f}, discriminator {float(ours[1]):.5f}")


def check_flops(shape: tuple[int, int, int]) -> int:
    """Stop unless the steps cost what their descriptions say; a backward pass is two forward ones, or one to inputs."""
    one = game(*shape, lr=0.0)
    autoencoder, critic = flops(lambda: one.autoencoder(one.x, one.noise)), flops(lambda: one.discriminator(one.x))
    trunk = flops(lambda: one.loss.perceptual.features(one.x))
    steps = {
        "ours": (our_step, 3 * autoencoder + 3 * trunk + (2 + 2 * 3) * critic),
        "CompVis's": (compvis_step, 4 * autoencoder + (3 + 2 + 1) * trunk + (3 + 2 * 3) * critic),
    }
    for name, (step, expected) in steps.items():
        counted = flops(lambda step=step: step(one))
        print(f"{name} step: {counted / 1e9:.1f} GFLOP, {counted / expected:.3f} of what is expected")
        if abs(counted / expected - 1) > 0.02:
            raise SystemExit(f"{name} step: not what its description says")
    return steps["ours"][1]


def job(step: Callable[[Game], object], players: Game, dtype: torch.dtype) -> Callable[[], None]:
    """One step to time."""

    def run() -> None:
        with torch.autocast(DEVICE, dtype) if dtype != torch.float32 else nullcontext():
            step(players)
        for optimizer in players.optimizers:
            optimizer.zero_grad(set_to_none=True)  # what a call holds afterwards cannot be counted in the next

    return settled(run)


def compare(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, operations: int, best: float) -> None:
    """Two lines for a precision: beside CompVis's step, beside diffusers' network."""
    ours = job(our_step, game(*shape, lr=4.5e-6), dtype)
    others = {
        "CompVis's step": job(compvis_step, game(*shape, lr=4.5e-6), dtype),
        "diffusers' AutoencoderKL": job(our_step, game(*shape, lr=4.5e-6, diffusers=True), dtype),
    }
    for name, theirs in others.items():
        (ratio, low), peaks = paired_ratio(ours, theirs, rounds), [peak(ours), peak(theirs)]
        print(f"{str(dtype)[6:]} beside {name}: ratio {ratio:.3f}, at least {low:.3f}", end="; ")
        print(f"peak {peaks[0]:.1f} MiB, theirs {peaks[1]:.1f} MiB", flush=True)
    speed = per_second(ours, shape[2], rounds)
    used = f", {operations / shape[2] * speed / best / 1e12:.1%} of the peak" if best else ""
    print(f"{str(dtype)[6:]}: {speed:.2f} images/s{used}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = DEVICE == "cpu"
    parser.add_argument("--size", type=int, default=64 if cpu else 256)
    parser.add_argument("--channels", type=int, default=64 if cpu else 128)
    parser.add_argument("--batch", type=int, default=1 if cpu else 8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", type=float, default=0.0, help="the device's best TFLOP/s, for the share of it used")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.channels, arguments.size, arguments.batch)
    print(
        f"torch {torch.__version__}, {DEVICE}, {arguments.threads} threads, {arguments.rounds} rounds, kl-f8 of",
        end=" ",
    )
    print("{} channels at {} px, batch {}".format(*shape), flush=True)
    check_losses(shape)
    operations = check_flops(shape)
    for dtype in (torch.float32, torch.bfloat16):
        compare(shape, dtype, arguments.rounds, operations, arguments.peak)


if __name__ == "__main__":
    main()
