"""A training step of the second stage beside that of diffusers' text-to-image example, and a cache beside an encoder.

    python -m benchmarks.stage_two [--channels 128] [--size 16] [--batch 4] [--rounds 10] [--threads 2] [--peak TFLOPS]

Theirs is written from the example's steps: noise and times from torch's own stream, UNet2DConditionModel, the mean
squared error, clipping, AdamW, EMAModel, and the loss read once. Ours draws by sample number, and has fused AdamW and
our average. Weights, latents and text states are the same. Before anything is timed, losses and gradients at the same
noise and times must agree. The ratio is their time over ours, from rounds of ours, theirs, theirs, ours, with the lower
end of its 95% interval: at equal precision, and at what each does unless told otherwise (bfloat16 and channels_last;
float32). With a GPU it also says images/s and the share of the peak for Stable Diffusion's U-Net and DiT-XL/2 at 256
pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.networks import fill, paired_ratio
from benchmarks.stage_one import DEVICE, flops, peak, per_second
from ldm.checkpoint.backbone_keys import write_backbone
from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import linear, scaled_linear
from ldm.diffusion.prediction import Eps, LearnedRange
from ldm.diffusion.times import Uniform
from ldm.draws import draw, stream
from ldm.models.autoencoder import kl
from ldm.models.dit import DiT
from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.optimizers import adamw

CLIP = 1.0
SD15 = {"channels": 320, "multipliers": (1, 2, 4, 4), "attend": (1, 2, 4), "heads": 8, "context": 768}


class Learner(NamedTuple):
    """What a step needs: a network, its optimiser and average, latents and text states."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | EMAModel
    x0: Tensor
    condition: Condition


class Shape(NamedTuple):
    """Of the U-Net and its latents."""

    channels: int
    size: int
    batch: int


def unet(channels: int) -> UNet:
    """A U-Net with random numbers everywhere, the same at every call."""
    torch.manual_seed(0)
    network = UNet(channels=channels, multipliers=(1, 2, 2, 2), attend=(2, 4), heads=8, context=512)
    fill(network)
    return network


def inputs(shape: Shape, width: int = 512) -> tuple[Tensor, Condition]:
    """Latents and 77 text states each."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(shape.batch, 4, shape.size, shape.size, generator=generator)
    return x0.to(DEVICE), Condition(tokens=torch.randn(shape.batch, 77, width, generator=generator).to(DEVICE))


def ours(shape: Shape, channels_last: bool = False) -> Learner:
    """Our U-Net as a denoiser."""
    return learner(Denoiser(unet(shape.channels), scaled_linear(), Eps()), *inputs(shape), channels_last)


def learner(denoiser: Denoiser, x0: Tensor, condition: Condition, channels_last: bool) -> Learner:
    """A denoiser with what trains it."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    denoiser, x0 = denoiser.to(DEVICE, memory_format=memory), x0.contiguous(memory_format=memory)
    return Learner(denoiser, adamw(denoiser.parameters(), lr=1e-5), EMA(denoiser.named_parameters()), x0, condition)


def theirs(shape: Shape) -> Learner:
    """diffusers' U-Net with the same weights."""
    own, width = unet(shape.channels), shape.channels
    network = UNet2DConditionModel(
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=512,
    )
    network.load_state_dict(write_backbone(own.state_dict(), own, "diffusers"))
    network.to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=1e-2)
    return Learner(network, optimizer, EMAModel(network.parameters()), *inputs(shape))


# ------------------------------------------------------------------------------------------------- the two losses

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def our_loss(one: Learner, u: Tensor, noise: Tensor) -> Tensor:
    """The mean of the denoiser's losses at keyed levels."""
    level = Uniform()(one.network.path, u).map(lambda x: x.to(DEVICE))
    return one.network.loss(one.x0, level, noise.to(DEVICE), one.condition).mean()


def their_loss(one: Learner, steps: Tensor, noise: Tensor) -> Tensor:
    """The example's."""
    noisy = SCHEDULER.add_noise(one.x0, noise, steps)
    return F.mse_loss(one.network(noisy, steps, one.condition.tokens, return_dict=False)[0].float(), noise.float())


def our_step(one: Learner, number: list[int]) -> None:
    """Draw, learn, average; the norm of the gradient is what is read."""
    u, noise = draw(stream(0, "loss"), range(number[0], number[0] + len(one.x0)), 2, one.x0.shape[1:])
    our_loss(one, u[:, 0], noise).backward()
    float(nn.utils.clip_grad_norm_(one.network.parameters(), CLIP))
    one.optimizer.step()
    one.optimizer.zero_grad(set_to_none=True)
    number[0] += len(one.x0)
    one.ema.update(number[0])


def their_step(one: Learner) -> None:
    """The same in the example's order; the loss is what is read."""
    noise = torch.randn_like(one.x0)
    loss = their_loss(one, torch.randint(0, 1000, (len(noise),), device=DEVICE), noise)
    loss.backward()
    nn.utils.clip_grad_norm_(one.network.parameters(), CLIP)
    one.optimizer.step()
    one.optimizer.zero_grad()
    one.ema.step(one.network.parameters())
    float(loss)


def job(step: Callable[[], None], dtype: torch.dtype) -> Callable[[], None]:
    """One step to time, in a precision."""

    def run() -> None:
        with torch.autocast(DEVICE, dtype) if dtype != torch.float32 else nullcontext():
            step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def our_job(one: Learner, dtype: torch.dtype) -> Callable[[], None]:
    number = [0]
    return job(lambda: our_step(one, number), dtype)


def their_job(one: Learner, dtype: torch.dtype) -> Callable[[], None]:
    return job(lambda: their_step(one), dtype)


# ------------------------------------------------------------------------------------------- gates and measures


def check_losses(shape: Shape) -> None:
    """Stop unless both have one loss and gradients of one size at the same noise and times."""
    a, b = ours(shape), theirs(shape)
    u, noise = draw(0, range(shape.batch), 1, a.x0.shape[1:])
    steps = (u[:, 0] * 1000 - 1e-9).ceil().clamp(1, 1000).long() - 1
    pair = our_loss(a, u[:, 0], noise), their_loss(b, steps.to(DEVICE), noise.to(DEVICE))
    norms = []
    for loss, one in zip(pair, (a, b)):
        loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in one.network.parameters()]))
    for name, (mine, other) in {"loss": pair, "gradient": norms}.items():
        if abs(float(mine - other)) > 1e-4 * abs(float(mine)):
            raise SystemExit(f"{name}: {float(other):.6g} beside {float(mine):.6g}: nothing to time")
    print(f"losses and gradients agree within 1e-4: {float(pair[0]):.5f}, norm {float(norms[0]):.5f}")


def compare(shape: Shape, rounds: int) -> None:
    """A line for each pair of precisions, the last one what each side does by itself."""
    pairs = {"float32": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16)}
    pairs["defaults"] = (torch.bfloat16, torch.float32)
    for name, (mine, other) in pairs.items():
        a = our_job(ours(shape, channels_last=name == "defaults"), mine)
        b = their_job(theirs(shape), other)
        (ratio, low), peaks = paired_ratio(a, b, rounds), [peak(a), peak(b)]
        print(f"{name}: ratio {ratio:.3f}, at least {low:.3f}; peak {peaks[0]:.1f} MiB, theirs {peaks[1]:.1f} MiB")


def compare_cached(shape: Shape, rounds: int) -> None:
    """Our step on cached latents beside the same with kl-f8's encoder before it."""
    cached, online = ours(shape), ours(shape)
    encoder = kl().to(DEVICE).requires_grad_(False)
    fill(encoder)
    x = torch.rand(shape.batch, 3, 8 * shape.size, 8 * shape.size, device=DEVICE) * 2 - 1
    number = [0]

    def step() -> None:
        with torch.no_grad():
            z = encoder.encode(x).float()
        our_step(online._replace(x0=z), number)

    ratio, low = paired_ratio(our_job(cached, torch.bfloat16), job(step, torch.bfloat16), rounds)
    print(f"cached latents beside online ones, bfloat16: ratio {ratio:.3f}, at least {low:.3f}")


def large(name: str) -> tuple[Learner, int]:
    """Stable Diffusion 1.5's or DiT-XL/2's learner at 256 pixels, and its batch."""
    shape = Shape(320, 32, 32)
    x0, condition = inputs(shape, 768)
    with torch.device(DEVICE):
        if name == "SD 1.5":
            return learner(Denoiser(UNet(**SD15), scaled_linear(), Eps()), x0, condition, True), shape.batch
        dit = Denoiser(DiT(classes=1001), linear(), LearnedRange(of=Eps()))
        return learner(dit, x0, Condition(pooled=torch.arange(shape.batch)), False), shape.batch


def speeds(best: float, rounds: int) -> None:
    """Images/s of the large networks on a GPU, and how much of its peak that is."""
    for name in ("SD 1.5", "DiT-XL/2"):
        one, batch = large(name)
        run = our_job(one, torch.bfloat16)
        operations = flops(run)
        speed = per_second(run, batch, rounds)
        used = f", {operations / batch * speed / best / 1e12:.1%} of the peak" if best else ""
        print(f"{name} at 256 px, bfloat16, batch {batch}: {speed:.1f} images/s{used}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = DEVICE == "cpu"
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, default=16 if cpu else 32)
    parser.add_argument("--batch", type=int, default=4 if cpu else 32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", type=float, default=0.0, help="the device's best TFLOP/s, for the share of it used")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape(arguments.channels, arguments.size, arguments.batch)
    print(f"torch {torch.__version__}, {DEVICE}, {arguments.threads} threads, {arguments.rounds} rounds,", end=" ")
    print("a U-Net of {} channels on latents of side {}, batch {}".format(*shape), flush=True)
    check_losses(shape)
    compare(shape, arguments.rounds)
    compare_cached(shape, arguments.rounds)
    if DEVICE == "cuda":
        speeds(arguments.peak, arguments.rounds)


if __name__ == "__main__":
    main()
