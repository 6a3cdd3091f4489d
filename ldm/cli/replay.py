"""Make a picture again from what its PNG remembers, and say whether it is the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.errors import CheckpointError, InputError


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("image", help="a PNG that `ldm sample` wrote")
    parser.add_argument("--ckpt", metavar="PATH", help="the checkpoint, if it lies elsewhere now")
    parser.add_argument("--out", default="replayed.png", help="where the new picture goes")
    parser.add_argument("--device", default="auto")


def run(arguments: argparse.Namespace) -> int:
    """Check all that made it, make it again, compare."""
    import numpy as np

    from ldm import pictures, pipeline
    from ldm.cli.sample import Order, file_digest, make

    old = pictures.read(arguments.image)
    record = remembered(old, arguments.image)
    for file, digest in record["inputs"].items():
        if not Path(file).is_file() or file_digest(file) != digest:
            raise InputError("an input of this picture is not what it was", file, hint="the file of that time")
    order = Order(**record["order"])
    pipe = pipeline.load(
        arguments.ckpt or order.checkpoint, vae=order.vae, overrides=order.overrides, device=arguments.device
    )
    if pipe.opened is not None and pipe.opened.hash != record["checkpoint"]:
        got, expected = pipe.opened.hash[:10], record["checkpoint"][:10]
        raise CheckpointError(
            "another checkpoint", str(arguments.ckpt or order.checkpoint), got, expected, "--ckpt PATH"
        )
    (picture,) = make(pipe, order, silent=True)
    pictures.write(picture.image, Path(arguments.out), "", picture.record)
    distance = int(np.abs(np.asarray(old).astype(int) - np.asarray(picture.image).astype(int)).max())
    print(f"wrote {arguments.out}: {'identical' if distance == 0 else f'off by at most {distance} of 255'}")
    return 0


def remembered(image: Any, file: str) -> dict[str, Any]:
    """The record in a PNG."""
    try:
        return json.loads(image.text["ldm"])
    except (AttributeError, KeyError, ValueError):
        raise InputError("this picture remembers nothing", file, expected="a PNG that `ldm sample` wrote") from None
