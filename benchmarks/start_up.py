"""What start-up costs: of commands beyond a bare interpreter, of a million pictures' index beyond the imports.

python -m benchmarks.start_up
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ldm.data import manifest
from ldm.data.shards import Shards

CAPTION = "a small photograph of a red house by the sea, number {}, with a caption of the usual length, in soft light"
FRESH = """
import resource, time
from ldm.data.images import Images
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6
before, begin = resident(), time.perf_counter()
images = Images(root={root!r}, resolution=256, batch_size=256, aspect=2.0, captions="required", manifest={index!r})
print(time.perf_counter() - begin, resident() - before, len(images))
"""


def fabricate(folder: Path, count: int, shards: int = 100) -> None:
    """A manifest of so many pictures in shards of which only the sizes are real."""
    files = [folder / f"{shard:05}.tar" for shard in range(shards)]
    for file in files:
        with open(file, "wb") as tar:
            tar.truncate(100_000 * count // shards)
    random, per_shard = np.random.default_rng(0), count // shards
    scan = manifest.Scan()
    number = np.arange(count)
    texts = [CAPTION.format(i).encode() for i in range(count)]
    keys = [f"{i // per_shard:05}.tar/{i:09}.jpg".encode() for i in range(count)]
    scan.key_text, scan.caption_text = bytearray(b"".join(keys)), bytearray(b"".join(texts))
    scan.caption.frombytes(np.cumsum([len(text) for text in texts]).tobytes())
    columns = {"key": np.cumsum([len(key) for key in keys]), "captions": number + 1, "label": np.full(count, -1)}
    columns |= {"group": number // per_shard, "offset": number % per_shard * 100_000, "size": np.full(count, 90_000)}
    columns |= {"modified": 0 * number, "verdict": 0 * number}
    columns |= {side: random.integers(256, 2048, count) for side in ("height", "width")}
    for name, column in columns.items():
        scan.numbers[name].frombytes(column.astype(manifest.COLUMNS[name]).tobytes())
    options = {"image": None, "caption": None, "captions": "required"}
    about = {"format": manifest.FORMAT, "options": options, "stamps": Shards(files).stamps(), "classes": []}
    manifest.write(folder, scan, about)


def measure(count: int = 1_000_000) -> tuple[float, float]:
    """(seconds, MB) that a fresh process takes to begin with an index of so many pictures."""
    with tempfile.TemporaryDirectory() as folder:
        fabricate(Path(folder), count)
        command = [sys.executable, "-c", FRESH.format(root=folder, index=folder)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, megabytes, length = map(float, output.split())
    assert length == count
    return seconds, megabytes


def beyond(*arguments: str, pairs: int = 9) -> float:
    """Seconds that a fresh interpreter takes for these beyond an empty one: the median of pairs that alternate."""

    def seconds(*words: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        return time.perf_counter() - begin

    return statistics.median(-seconds("-c", "pass") + seconds(*arguments) for _ in range(pairs))


if __name__ == "__main__":
    print(f"import ldm: {beyond('-c', 'import ldm'):.2f} s beyond a bare interpreter (wanted: 0.1 s)")
    print(f"sample.py --help: {beyond('sample.py', '--help'):.2f} s (wanted: 0.3 s)")
    seconds, megabytes = measure()
    print(f"a million pictures: {seconds:.2f} s and {megabytes:.0f} MB beyond imports (wanted: 2 s, 200 MB)")
