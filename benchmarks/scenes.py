"""Scenes a second, drawn, captioned and rendered: one process, then as many as there are cores, of one thread each.

python -m benchmarks.scenes [--sizes 64 128] [--seconds 10] [--device cpu] [--batch 64]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from multiprocessing import get_context

import torch

from ldm.scenes import captions, draw, render


def rate(size: int, seconds: float, device: str, batch: int, first: int = 0) -> tuple[float, float, float]:
    """Scenes a second; by the clock, by this thread's time on a core, and without drawing and captions."""
    torch.set_num_threads(1)
    count, rendering, start, cpu = 0, 0.0, 0.0, 0.0
    for number in range(-1, 10**9):  # the first batch warms up
        if number == 0:
            start, cpu, rendering = time.perf_counter(), time.thread_time(), 0.0
        indices = range(first + count, first + count + batch)
        table = draw(0, indices)
        captions(table, 0, indices)
        before = time.perf_counter()
        render(table, size, device)["image"].cpu()
        rendering += time.perf_counter() - before
        if number >= 0:
            count += batch
            if time.perf_counter() - start > seconds:
                break
    return count / (time.perf_counter() - start), count / (time.thread_time() - cpu), count / rendering


def together(size: int, seconds: float, batch: int, processes: int) -> float:
    """Scenes a second of several processes at once."""
    tasks = [(size, seconds, "cpu", batch, 10**6 * i) for i in range(processes)]
    with get_context("spawn").Pool(processes) as pool:
        return sum(row[0] for row in pool.starmap(rate, tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    for size in options.sizes:
        clock, core, rendered = rate(size, options.seconds, options.device, options.batch)
        print(f"{size} px: {clock:.0f}/s by the clock, {core:.0f}/s of a core's time; rendering alone {rendered:.0f}/s")
        if options.device == "cpu":
            runs = [together(size, options.seconds, options.batch, cores) for _ in range(3)]
            low, middle, high = min(runs), statistics.median(runs), max(runs)
            print(f"{size} px: {cores} processes {middle:.0f}/s (three runs, {low:.0f} to {high:.0f})")


if __name__ == "__main__":
    main()
