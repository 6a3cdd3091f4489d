"""Make a picture again from what its PNG remembers, and say whether it is the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.cli import own_parts, plugin_option, sample
from ldm.errors import CheckpointError, InputError


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("image", help="a PNG that `ldm sample` wrote")
    parser.add_argument("--ckpt", metavar="PATH", help="the checkpoint, if it lies elsewhere now")
    parser.add_argument("--out", default="replayed.png", help="where the new picture goes (default replayed.png)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    plugin_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check all that made it, make it again, compare."""
    own_parts(arguments)
    import numpy as np

    from ldm import pictures, pipeline

    out, old = Path(arguments.out), pictures.read(arguments.image)
    if out.suffix.lower() != ".png" or out.is_dir() or not out.parent.is_dir():
        raise InputError("cannot write the picture", str(out), expected="a .png file in a folder that exists")
    record, order = remembered(old, arguments.image)
    for file, digest in record["inputs"].items():
        check_input(file, digest)
    checkpoint = arguments.ckpt or order.checkpoint
    pipe = pipeline.load(
        checkpoint, vae=order.vae, overrides=order.overrides, device=arguments.device, precision=order.precision
    )
    if pipe.loaded is not None and pipe.loaded.hash != record["checkpoint"]:
        got, expected = pipe.loaded.hash[:10], record["checkpoint"][:10]
        raise CheckpointError("another checkpoint", str(checkpoint), got, expected, "--ckpt PATH")
    picture = again(pipe, order, *record["place"])
    picture.write(out)
    distance = int(np.abs(np.asarray(old).astype(int) - np.asarray(picture.image).astype(int)).max())
    print(f"wrote {out}: {'identical' if distance == 0 else f'off by at most {distance} of 255'}")
    return 0


def remembered(image: Any, file: str) -> tuple[dict[str, Any], sample.Order]:
    """The record in a PNG, and the order in it."""
    try:
        record = json.loads(image.text["ldm"])
        return {name: record[name] for name in ("checkpoint", "inputs", "place")}, sample.Order(**record["order"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError("this picture remembers nothing", file, expected="a PNG that `ldm sample` wrote") from None


def check_input(file: str, digest: str) -> None:
    """Refuse to go on without the file of that time."""
    if not Path(file).is_file():
        raise InputError("an input of this picture is not there", file)
    if sample.file_digest(file) != digest:
        raise InputError("an input of this picture has changed", file, hint="the file of that time")


def again(pipe: Any, order: sample.Order, index: int, size: int) -> sample.Picture:
    """The picture in a batch of as many as then, for the last bits of a sum depend on it."""
    recipe, (request,) = sample.read_recipe(pipe, order), sample.read_requests(order)
    image = pipe.images([request] * size, recipe)[index]
    return sample.Picture(image, request, sample.record(pipe, order, request, recipe), (index, size))
