"""Our networks beside diffusers', same weights and precision, on the CPU: speed as a paired ratio, and peak memory.

    python -m benchmarks.networks [--network unet|autoencoder] [--rounds 20] [--threads 2]

The ratio is their time over ours, from rounds of ours, theirs, theirs, ours; its lower bound is the end of a 95%
bootstrap interval. Memory is the peak of what the allocator handed out during one call. Outputs must agree first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ldm.checkpoint.autoencoder_keys import write_autoencoder
from ldm.checkpoint.unet_keys import unet_keys
from ldm.models.autoencoder import Autoencoder
from ldm.models.quantize import Gaussian
from ldm.models.unet import UNet


class Pair(NamedTuple):
    """Two networks as functions of one input, and the modules that hold their weights."""

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]
    modules: tuple[nn.Module, nn.Module]
    x: Tensor


def fill(module: nn.Module) -> None:
    """Random numbers everywhere, norms near one: fresh networks end in zeros."""
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
        parameter.data.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)


def unets(channels: int) -> tuple[UNet, UNet2DConditionModel]:
    """One U-Net twice, with random numbers everywhere, the same at every call: ours and diffusers'."""
    torch.manual_seed(0)
    ours = UNet(channels=channels, multipliers=(1, 2, 2, 2), attend=(2, 4), heads=8, context=512)
    fill(ours)
    theirs = UNet2DConditionModel(
        block_out_channels=(channels, 2 * channels, 2 * channels, 2 * channels),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=512,
    )
    theirs.load_state_dict(unet_keys(ours, "diffusers").write(ours.state_dict()))
    return ours, theirs


def unet() -> Pair:
    """A U-Net of 50 M parameters on latents of 32 x 32, with 77 tokens."""
    ours, theirs = unets(128)
    t, tokens = torch.tensor([500, 20]), torch.randn(2, 77, 512)
    return Pair(
        lambda x: ours(x, t, tokens), lambda x: theirs(x, t, tokens).sample, (ours, theirs), torch.randn(2, 4, 32, 32)
    )


def autoencoder() -> Pair:
    """The autoencoder kl-f8 of Stable Diffusion, 83.7 M parameters, there and back on one picture of 128 px."""
    ours = Autoencoder(bottleneck=Gaussian(channels=4), multipliers=(1, 2, 4, 4))
    fill(ours)
    theirs = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    theirs.load_state_dict(write_autoencoder(ours.state_dict(), ours, "diffusers"))
    return Pair(
        lambda x: ours.decode(ours.encode(x)),
        lambda x: theirs.decode(theirs.encode(x).latent_dist.mode()).sample,
        (ours, theirs),
        torch.randn(1, 3, 128, 128),
    )


NETWORKS: dict[str, Callable[[], Pair]] = {"unet": unet, "autoencoder": autoencoder}


def job(network: Callable[[Tensor], Tensor], pair: Pair, dtype: torch.dtype, backward: bool) -> Callable[[], None]:
    """One call to time: forward alone, or forward and the gradients of all weights."""

    def run() -> None:
        precision = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
        with torch.set_grad_enabled(backward), precision:
            out = network(pair.x)
        if backward:
            out.float().square().mean().backward()
            for module in pair.modules:
                module.zero_grad(set_to_none=True)

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired_ratio(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> tuple[float, float]:
    """The median of their time over ours, and the lower end of its 95% bootstrap interval."""
    ratios = []
    for _ in range(rounds + 1):
        a, b, c, d = seconds(ours), seconds(theirs), seconds(theirs), seconds(ours)
        ratios.append((b + c) / (a + d))
    measured = torch.tensor(ratios[1:])  # the first round warms up
    draws = torch.randint(rounds, (10_000, rounds), generator=torch.Generator().manual_seed(0))
    return measured.median().item(), measured[draws].median(1).values.quantile(0.025).item()


def verdict(figure: float, wanted: float, most: bool = False) -> str:
    """A target, and whether it is met."""
    met = figure <= wanted if most else figure >= wanted
    return f"wanted {'at most' if most else 'at least'} {wanted:.1f}: {'pass' if met else 'MISS'}"


def peak_bytes(run: Callable[[], None]) -> int:
    """The most memory that was handed out at once during a call, beyond what was held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


def compare(name: str, rounds: int) -> None:
    """Print one line for each precision and direction of one network."""
    pair = NETWORKS[name]()
    with torch.no_grad():
        a, b = pair.ours(pair.x), pair.theirs(pair.x)
    difference = float((a - b).abs().max() / b.abs().max())
    if difference > 1e-4:
        raise SystemExit(f"{name}: outputs differ by {difference:.1e}, so there is nothing to time")
    count = sum(p.numel() for p in pair.modules[0].parameters()) / 1e6
    print(f"{name}: {count:.1f} M parameters, outputs differ by {difference:.1e}")
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            ours, theirs = (job(network, pair, dtype, backward) for network in (pair.ours, pair.theirs))
            ratio, low = paired_ratio(ours, theirs, rounds)
            peaks = [peak_bytes(run) / 2**20 for run in (ours, theirs)]
            what = f"{str(dtype).removeprefix('torch.')} {'forward+backward' if backward else 'forward'}"
            print(
                f"  {what:26} ratio {ratio:.3f}, at least {low:.3f}; peak {peaks[0]:.1f} MiB, theirs {peaks[1]:.1f} MiB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, help="one only")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    for name in [arguments.network] if arguments.network else NETWORKS:
        compare(name, arguments.rounds)


if __name__ == "__main__":
    main()
