"""Encode a data set once, to latents and text states that training reads instead of pictures and captions."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import config_file, config_options
from ldm.cli.console import count_truncations
from ldm.cli.sample import writable
from ldm.config.schema import Config
from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint
    from ldm.data.latents_writer import Cache

NOT_SAMPLES = ("root", "manifest", "batch_size", "workers", "bad")  # keys of data that do not change the samples
DTYPES = ("fp32", "bf16", "fp16")


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    config_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the cache; an unfinished one is resumed")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of the stored numbers (default bf16)")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the encoding (default 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--rank", type=int, help="this process's rank (default: torchrun's, or 0)")
    parser.add_argument("--ranks", type=int, help="number of processes that share the work (default: torchrun's, or 1)")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that is cheap to check, then encode what is missing."""
    rank, ranks = rank_of(arguments)
    if arguments.config is None:
        raise InputError("--config: missing", "command line", expected="stage two's configuration")
    from ldm import assemble  # imports torch, so not before the options are checked
    from ldm.training.recipes.diffusion import Schema

    config, loaded = assemble.load(config_file(arguments.config, "ldm"), arguments.overrides, Schema)
    assemble.check_first_stage(config, loaded)
    check(config)
    if arguments.print_config:
        print(json.dumps(config.values, indent=2))
        return 0
    out = writable(Path(arguments.out))
    from ldm.data import latents_writer

    with count_truncations():
        cache = prepare(config, loaded, out, arguments)
        missing = latents_writer.write(cache, rank, ranks)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e9
    written = f"{len(cache.shards) - len(missing)} of {len(cache.shards)} shards, {size:.2f} GB"
    print(f"{out}: {written}; {f'{len(missing)} missing' if missing else f'{len(cache.source)} samples, complete'}")
    return 0


def rank_of(arguments: argparse.Namespace) -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    rank = int(os.environ.get("RANK", 0)) if arguments.rank is None else arguments.rank
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if arguments.ranks is None else arguments.ranks
    if not 0 <= rank < ranks:
        raise InputError("--rank: out of range", "command line", str(rank), f"0 to {ranks - 1}, below --ranks")
    if arguments.batch_size < 1:
        raise InputError("--batch-size: out of range", "command line", str(arguments.batch_size), "at least 1")
    return rank, ranks


def check(config: Config) -> None:
    """Refuse what cannot be cached."""
    data, error = config["data"], config.source.error
    if config["autoencoder"] is None:
        raise error(
            "autoencoder: missing, so there are no latents to cache", "autoencoder", expected="a checkpoint's path"
        )
    if data["type"] == "latents":
        raise error("data.type: already a cache", "data.type", got="latents", hint="images")
    if data.get("crop") == "random":
        what, hint = "data.crop: random crops cannot be cached", "center"
        raise error(what, "data.crop", got="random", expected="center", hint=hint)
    if not 0 <= config["seed"] < 2**32:
        raise error("seed: out of range", "seed", got=str(config["seed"]), expected="0 to below 2**32")


def prepare(config: Config, loaded: dict[str, Checkpoint], out: Path, arguments: argparse.Namespace) -> Cache:
    """The source, the encoders, and everything that the cache depends on."""
    import torch

    from ldm import assemble
    from ldm.data import latents, latents_writer
    from ldm.devices import placement
    from ldm.draws import stream

    flip = bool(config["data"].get("flip"))
    source = (config.amended(["data.flip=false"]) if flip else config).build("data")
    device, _ = placement(arguments.device, "fp32")
    torch.manual_seed(stream(config["seed"], "init"))  # random weights are the same as in training
    autoencoder, conditioner = assemble.encoders(config, loaded)
    assert autoencoder is not None  # checked above
    assemble.check_encoders(config, conditioner)
    for module in (autoencoder, conditioner):
        if module is not None:
            module.eval().requires_grad_(False).to(device)
    texts, keeps = latents.identities(conditioner, config["conditioner"])
    check_encodable(config, source, autoencoder.factor, keeps)
    key: dict[str, Any] = {
        "autoencoder": autoencoder.fingerprint(),
        "texts": texts,
        "keeps": keeps,
        "dtype": arguments.dtype,
        "flip": flip,
        "sizes": [list(size) for size in source.sizes],
        "count": len(source),
        "source": getattr(source, "digest", f"seed {config['seed']}"),  # scenes are a function of the seed
        "data": {name: value for name, value in config["data"].items() if name not in NOT_SAMPLES},
    }
    encoders = {name: text for name, (text, _) in latents.frozen_texts(conditioner, config["conditioner"]).items()}
    return latents_writer.Cache(out, source, config["seed"], autoencoder, encoders, key, arguments.batch_size, device)


def check_encodable(config: Config, source: Any, factor: int, keeps: list[str]) -> None:
    """Refuse pictures that the autoencoder cannot divide, and a conditioner that reads more than a cache keeps."""
    from ldm.data.latents_writer import KEEPS

    for height, width in source.sizes:
        if height % factor or width % factor:
            got, expected = f"{height}x{width}", f"multiples of {factor}"
            raise config.source.error("data.resolution: not divisible", "data.resolution", got=got, expected=expected)
    if others := [name for name in keeps if name not in KEEPS]:
        what, expected = f"conditioner: reads {others[0]}, which is not cached", f"one that reads {' or '.join(KEEPS)}"
        raise config.source.error(what, "conditioner", expected=expected, hint="training on pictures")
