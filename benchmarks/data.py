"""What a sample costs: ours beside PIL + torchvision in a DataLoader, and webdataset; caches, scenes, a long index.

python -m benchmarks.data [--rounds 10] [--workers 0] [--json FILE]     from the root of the repository

Theirs is the loop of diffusers' text-to-image example: Resize (bilinear), CenterCrop, ToTensor, Normalize. Both give
float32 in [-1, 1], which must agree first. The ratio is their time over ours, from rounds of ours, theirs, theirs,
ours; its lower bound is the end of a 95% bootstrap interval. Without workers times are CPU seconds of one thread, which
hold on a busy machine too; with workers they are read off the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.start_up import measure
from ldm.checkpoint.files import DIGEST, open_file, write_file
from ldm.data.images import Images
from ldm.data.latents import FORMAT, MANIFEST, Latents
from ldm.data.latents_writer import caption_bytes, joined
from ldm.data.loader import Data, Loader, loader
from ldm.data.sampler import by_bucket
from ldm.pictures import to_float
from ldm.scenes import Scenes
from tests.data.photographs import encoded, photograph

SIDE, BATCH = 256, 16
THEIR_WAY = transforms.Compose(
    [
        transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(SIDE),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
)


class Line(NamedTuple):
    """One line of the table."""

    what: str
    figure: float
    wanted: float
    words: str

    def passed(self) -> bool:
        return self.figure >= self.wanted


# ------------------------------------------------------------------------------------------------ pictures


class Photographs(Dataset):
    """Their data set: a list of files, each opened, converted and transformed by itself."""

    def __init__(self, root: Path):
        self.files = sorted(root.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return THEIR_WAY(image.convert("RGB"))


def their_folder(root: Path, workers: int) -> DataLoader:
    return DataLoader(Photographs(root), batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)


def first(sample: dict[str, Any]) -> Tensor:
    return THEIR_WAY(sample["jpg"].convert("RGB"))


def their_tars(root: Path, workers: int) -> DataLoader:
    shards = [str(path) for path in sorted(root.glob("*.tar"))]
    files = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").map(first)
    return DataLoader(files, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)


def write_folder(root: Path, height: int, width: int, count: int) -> None:
    for i in range(count):
        (root / f"{i:03}.jpg").write_bytes(encoded(photograph(height, width, seed=i)))
        (root / f"{i:03}.txt").write_text(f"photograph {i}")


def write_tars(root: Path, height: int, width: int, count: int) -> None:
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(shard * count // 2, (shard + 1) * count // 2):
                members = {"jpg": encoded(photograph(height, width, seed=i)), "txt": f"photograph {i}".encode()}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{i:03}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))


def floats(batches: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    return (to_float(batch["image"]) for batch in batches)


def epoch(batches: Iterable[Tensor]) -> None:
    for _ in batches:
        pass


def compare_pictures(
    what: str,
    write: Callable[..., None],
    theirs: Callable[..., DataLoader],
    size: tuple[int, int],
    wanted: float,
    options: argparse.Namespace,
) -> Line:
    """One kind of picture, read both ways."""
    with tempfile.TemporaryDirectory() as name:
        root, count = Path(name) / "pictures", 32 if size[0] > 1000 else 128
        root.mkdir()
        write(root, *size, count)
        data = Images(
            root=str(root), resolution=SIDE, batch_size=BATCH, workers=options.workers, manifest=f"{name}/index"
        )
        mine = Loader(data, 0, list(by_bucket(range(len(data)), BATCH, data.buckets)))
        other = theirs(root, options.workers)
        difference = max(float((a - b).abs().mean()) for a, b in zip(floats(mine), other, strict=True)) * 127.5
        if difference >= 2:
            raise SystemExit(f"{what}: pictures differ by {difference:.2f} of 255 on average")
        ratio, low, us = paired(lambda: epoch(floats(mine)), lambda: epoch(other), options)
    words = (
        f"at least {low:.2f}; {us[0] / count:.0f} us a picture, theirs {us[1] / count:.0f}, {difference:.2f}/255 apart"
    )
    return Line(what, ratio, wanted, words)


def paired(
    ours: Callable[[], None], theirs: Callable[[], None], options: argparse.Namespace
) -> tuple[float, float, Any]:
    """The median of their time over ours, the lower end of its 95% bootstrap interval, and both times in us."""
    clock, times = perf_counter if options.workers else process_time, []
    for _ in range(options.rounds + 1):
        a, b, c, d = (seconds(run, clock) for run in (ours, theirs, theirs, ours))
        times.append((a + d, b + c))
    mine, other = torch.tensor(times[1:]).T  # the first round warms up
    ratios = other / mine
    draws = torch.randint(len(ratios), (10_000, len(ratios)), generator=torch.Generator().manual_seed(0))
    us = [1e6 * both.median().item() / 2 for both in (mine, other)]
    return ratios.median().item(), ratios[draws].median(1).values.quantile(0.025).item(), us


def seconds(run: Callable[[], None], clock: Callable[[], float]) -> float:
    begin = clock()
    run()
    return clock() - begin


# ------------------------------------------------------------------------------------------------ rates


def rate(what: str, data: Data, wanted: float, options: argparse.Namespace, batches: int = 20) -> Line:
    """Samples that one core makes in a second: the median of rounds of so many batches."""
    stream, figures = iter(loader(data, 0)), []
    for _ in range(options.rounds + 1):
        took = seconds(lambda: [next(stream) for _ in range(batches)], process_time)
        figures.append(batches * data.batch_size / took)
    low, *_, high = sorted(figures[1:])
    return Line(what, float(np.median(figures[1:])), wanted, f"samples/s of a core, {low:.0f} to {high:.0f}")


def write_cache(root: Path, count: int, tokens: bool, captions: Sequence[str] = ()) -> None:
    """A cache of random numbers, as `ldm cache` lays it out."""
    rows = []
    for number in range(count // 1024):
        shard = {"index": torch.arange(number * 1024, (number + 1) * 1024), "captions": torch.arange(1025)}
        shard |= {name: torch.zeros(1024, 2, dtype=torch.int64) for name in ("original_size", "crop")}
        shard["latents"] = torch.randn(1024, 1, 4, 32, 32).bfloat16()
        if tokens:
            shard["caption.tokens"] = torch.randn(1024, 77, 768).bfloat16()
        if captions:
            shard |= joined([caption_bytes(captions[number * 1024 : (number + 1) * 1024])])
        file = f"{number:05}.safetensors"
        write_file(root / file, shard, {})
        rows.append({"file": file, "bucket": 0, "samples": 1024, DIGEST: open_file(root / file).metadata[DIGEST]})
    texts, keeps = {"caption": {}} if tokens else {}, ["caption"] if captions else []
    key = {"sizes": [[256, 256]], "count": count, "texts": texts, "keeps": keeps, "flip": False}
    (root / MANIFEST).write_text(json.dumps({"format": FORMAT, "key": key, "shards": rows}))


def latents(what: str, count: int, tokens: bool, wanted: float, options: argparse.Namespace) -> Line:
    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name), count, tokens)
        return rate(what, Latents(root=name, batch_size=64), wanted, options)


def scenes(what: str, side: int, wanted: float, options: argparse.Namespace) -> Line:
    """Twice what one thread makes is what two cores do: scenes know nothing of each other."""
    return rate(what, Scenes(resolution=side, batch_size=64, workers=0), wanted / 2, options, batches=2)


def start_up(*_: Any) -> list[Line]:
    took, megabytes = measure()
    return [
        Line("an index of a million", 2 / took, 1, f"times faster than 2 s: {took:.2f} s"),
        Line("  its memory", 200 / megabytes, 1, f"times less than 200 MB: {megabytes:.0f} MB"),
    ]


def lines(options: argparse.Namespace) -> Iterable[Line]:
    folder, tars = (write_folder, their_folder), (write_tars, their_tars)
    yield compare_pictures("JPEG 1536 x 1536", *folder, (1536, 1536), 2, options)
    yield compare_pictures("JPEG 640 x 480", *folder, (480, 640), 1.2, options)
    yield compare_pictures("tars of 640 x 480", *tars, (480, 640), 1.2, options)
    yield latents("latents 32 x 32 x 4", 16_384, False, 10_000, options)
    yield latents("  and 77 x 768 states", 2048, True, 3000, options)
    yield scenes("scenes of 64 px", 64, 400, options)
    yield scenes("scenes of 128 px", 128, 100, options)
    yield from start_up()


def main() -> int:
    """0 if every target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of A B B A, or of a rate")
    parser.add_argument("--workers", type=int, default=0, help="of each loader of pictures")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {options.workers} workers")
    print(f"{'':22}{'figure':>9}{'wanted':>8}  pass")
    made = []
    for line in lines(options):
        made.append(line)
        verdict = "yes" if line.passed() else "NO"
        print(f"{line.what:22}{line.figure:9.2f}{line.wanted:8g}  {verdict:4}  {line.words}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([line._asdict() for line in made], indent=2) + "\n")
    return 0 if all(line.passed() for line in made) else 1


if __name__ == "__main__":
    sys.exit(main())
