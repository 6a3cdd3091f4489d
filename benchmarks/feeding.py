"""What a training step costs the process that feeds the device, apart from the network.

    python -m benchmarks.feeding [--batch 256] [--workers 2] [--rounds 10] [--steps 20]

Data are a made-up cache of 4x32x32 latents with captions. A step takes the loader's next batch, with what the
diffusion recipe prepares (noise, levels, weights, dropped parts and token ids), and copies every tensor to the device
(on a CPU: into other memory). These are made in the loader's workers, or in the training process as in version 0.1;
both must give the same batch first.

Times are CPU seconds of the training process, so that waiting for workers does not count and a busy machine matters
less. The ratio is the time of version 0.1 over ours, from rounds of ours, theirs, theirs, ours.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import write_cache
from benchmarks.networks import verdict
from ldm.condition import to_device
from ldm.conditioning.tokenization import Tokenization
from ldm.conditioning.tokenizer import BPE
from ldm.data.latents import Latents
from ldm.data.loader import loader
from ldm.diffusion.path import Flow
from ldm.diffusion.prediction import Flow as FlowPrediction
from ldm.diffusion.times import Uniform
from ldm.diffusion.weights import Constant
from ldm.training.recipes.diffusion import Preparation

SEED, LENGTH, VOCABULARY, CHANNELS, SIDE = 0, 64, 1024, 4, 32
SAMPLES = 8192
WANTED = 2.0
WORDS = "a small large red blue green shiny dull ball cube cone stands lies left right of behind on the wooden floor"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Step = Callable[[], object]


def preparation(tokenizer: BPE) -> Preparation:
    """What the diffusion recipe adds to a batch: draws, levels, weights, flags of dropped parts and token ids."""
    return Preparation(
        seed=SEED,
        channels=CHANNELS,
        factor=8,
        drops={"caption": 0.1},
        levels=(Uniform(), Flow()),
        weight=(Constant(), FlowPrediction()),
        reads=("caption",),
        tokenizations={"caption": Tokenization(tokenizer, LENGTH)},
    )


def captions(count: int) -> list[str]:
    """Captions of 5 to 30 words."""
    words, chosen = WORDS.split(), random.Random(SEED)
    return [" ".join(chosen.choices(words, k=chosen.randint(5, 30))) for _ in range(count)]


def moved(x: Any) -> Any:
    """A batch on the device."""
    if isinstance(x, Mapping):
        return {name: moved(value) for name, value in x.items()}
    if not isinstance(x, Tensor):
        return x
    return x.clone() if DEVICE.type == "cpu" else to_device(x, DEVICE)


def seconds(step: Step, steps: int) -> float:
    """CPU seconds of this process per step."""
    begin = process_time()
    for _ in range(steps):
        step()
    return (process_time() - begin) / steps


def feed(batches: Iterator[dict[str, Any]], prepare: Preparation | None = None) -> dict[str, Any]:
    """One step of the training process; with `prepare` it draws and tokenises itself."""
    batch = next(batches)
    return moved(batch if prepare is None else prepare(batch))


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Both must feed the same numbers."""
    for name in ("latents", "noise", "weight"):
        if not torch.equal(ours[name], theirs[name]):
            raise SystemExit(f"{name} differ")
    if not torch.equal(ours["ids"]["caption"], theirs["ids"]["caption"]):
        raise SystemExit("token ids differ")


def compare(ours: Step, theirs: Step, rounds: int, steps: int) -> float:
    """Print both times and return the median ratio of paired rounds A B B A; one more round warms up."""
    pairs = []
    for _ in range(rounds + 1):
        a, b, c, d = (seconds(step, steps) for step in (ours, theirs, theirs, ours))
        pairs.append(((a + d) / 2, (b + c) / 2))
    for name, times in zip(("in the workers", "in the training process"), zip(*pairs[1:], strict=True)):
        low, median = 1e3 * min(times), 1e3 * statistics.median(times)
        print(f"prepared {name:24} minimum {low:7.2f} ms   median {median:7.2f} ms per step")
    ratios = sorted(b / a for a, b in pairs[1:])
    ratio = statistics.median(ratios)
    print(f"ratio {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); {verdict(ratio, WANTED)}")
    return ratio


def main() -> int:
    """0 if the training process's own time falls at least by half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="samples of a step")
    parser.add_argument("--workers", type=int, default=2, help="of each loader")
    parser.add_argument("--rounds", type=int, default=10, help="of A B B A")
    parser.add_argument("--steps", type=int, default=20, help="per time that is taken")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = captions(SAMPLES)
    prepare = preparation(BPE.train(texts, VOCABULARY))
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), SAMPLES, tokens=False, captions=texts)
        data = Latents(root=folder, batch_size=options.batch, workers=options.workers)
        prepared, bare = iter(loader(data, SEED, prepare=prepare)), iter(loader(data, SEED))
        check_same(feed(prepared), feed(bare, prepare))
        print(f"torch {torch.__version__}, {DEVICE}, batch {options.batch}, {options.workers} workers")
        ratio = compare(lambda: feed(prepared), lambda: feed(bare, prepare), options.rounds, options.steps)
    return 0 if ratio >= WANTED else 1


if __name__ == "__main__":
    raise SystemExit(main())
