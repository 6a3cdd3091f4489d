"""What a step takes of the device that there is: operations, memory, images a second, and the kernels of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = 15  # that are shown


def has_bfloat16() -> bool:
    """Whether the device computes in it, rather than pretends to."""
    if DEVICE == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def settled(step: Callable[[], object]) -> Callable[[], None]:
    """A step until the device is done with it."""

    def run() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak(run: Callable[[], None]) -> float:
    """The most memory that a step takes, in MiB."""
    if DEVICE == "cpu":
        return peak_bytes(run) / 2**20
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def per_second(run: Callable[[], None], batch: int, rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    return batch * rounds / (time.perf_counter() - start)


def show_kernels(step: Callable[[], None], milliseconds: float) -> None:
    """The kernels that take most of a step of so many milliseconds; what is missing to all of it, the device waits."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    events = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    kernels = [(x.self_device_time_total / 1e3, x.count, x.key) for x in events if not x.is_user_annotation]
    print(f"  kernels take {sum(took for took, *_ in kernels):.1f} ms of a step of {milliseconds:.1f} ms")
    for took, count, name in sorted(kernels, reverse=True)[:KERNELS]:
        print(f"  {took / milliseconds:6.1%}{took:9.2f} ms{count:6d} times  {name[:80]}")
