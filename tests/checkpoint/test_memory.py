"""A large file is opened without holding it twice."""

import subprocess
import sys

import pytest
import torch

from ldm.checkpoint import files

MEASURE = """
import sys
import torch
from ldm import checkpoint
from ldm.checkpoint.networks import build_autoencoder
def peak():  # of this process; getrusage's would be its parent's, were that the larger
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
torch.zeros(1)
before = peak()
opened = checkpoint.open(sys.argv[1])
network = build_autoencoder(opened.config["autoencoder"])
checkpoint.load_weights(network, opened.state, "autoencoder")
assert not network.quant.weight.is_meta
if len(sys.argv) > 2:
    checkpoint.save(sys.argv[2], opened.config, opened.state, dtype=torch.float16)
print(peak() - before)
"""
LARGE = {"type": "kl", "latent": 4, "channels": 128, "multipliers": [1, 2, 4, 5], "blocks": 2, "attend": []}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A first stage of about 400 MB."""
    from ldm import checkpoint
    from ldm.checkpoint.networks import build_autoencoder

    network = build_autoencoder(LARGE | {"mid_attention": True})
    state = {f"autoencoder.{name}": torch.ones(x.shape) for name, x in network.state_dict().items()}
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    checkpoint.save(path, {"format": 1, "autoencoder": LARGE | {"mid_attention": True}}, state)
    return path


@pytest.mark.parametrize("also_written", [False, True])
def test_peak_memory_is_one_file_and_not_two(large, also_written, tmp_path):
    size = large.stat().st_size / 2**20
    assert 380 < size < 480
    arguments = [tmp_path / "half.safetensors"] if also_written else []
    command = [sys.executable, "-c", MEASURE, large, *arguments]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{grown:.0f} MB for a file of {size:.0f} MB")
    assert 0.9 * size < grown < 1.15 * size
    if also_written:
        assert dict(files.open_file(arguments[0]))["autoencoder.quant.bias"].dtype == torch.float16
