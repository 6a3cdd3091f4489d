"""Make a picture again from what its PNG stores, and say whether it is the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.cli import plugin_option, sample
from ldm.errors import CheckpointError, InputError


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("image", help="a PNG that `ldm sample` wrote")
    parser.add_argument("--ckpt", metavar="PATH", help="the checkpoint, if it has moved")
    parser.add_argument("--out", default="replayed.png", help="the file of the new picture (default replayed.png)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    plugin_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check everything that the picture depends on, make it again, compare."""
    import numpy as np

    from ldm import pictures

    out, old = sample.png_file(arguments.out), pictures.read(arguments.image)
    record, order = read_record(old, arguments.image)
    for file, digest in record["inputs"].items():
        check_input(file, digest)
    pipe = sample.open_pipeline(order, arguments.device, checkpoint=arguments.ckpt)
    if pipe.loaded is not None and pipe.loaded.hash != record["checkpoint"]:
        got, expected = pipe.loaded.hash[:10], record["checkpoint"][:10]
        raise CheckpointError(
            "not the checkpoint that made this picture", str(pipe.loaded.files[0]), got, expected, "--ckpt PATH"
        )
    settings, (request,), (index, size) = (
        sample.read_settings(pipe, order),
        sample.read_requests(order),
        record["place"],
    )
    image = pipe.images([request] * size, settings)[index]  # a batch as large as then: the last bits depend on it
    sample.Picture(image, request, sample.record(pipe, order, request, settings), (index, size)).write(out)
    distance = int(np.abs(np.asarray(old).astype(int) - np.asarray(image).astype(int)).max())
    print(f"wrote {out}: {'identical' if distance == 0 else f'differs by at most {distance} of 255'}")
    return 0


def read_record(image: Any, file: str) -> tuple[dict[str, Any], sample.Order]:
    """The record that a PNG stores, and the order in it."""
    try:
        record = json.loads(image.text["ldm"])
        return {name: record[name] for name in ("checkpoint", "inputs", "place")}, sample.Order(**record["order"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError("this picture stores no record", file, expected="a PNG that `ldm sample` wrote") from None


def check_input(file: str, digest: str) -> None:
    """Refuse an input file that is gone or has changed."""
    if not Path(file).is_file():
        raise InputError("an input file of this picture is missing", file)
    if sample.file_digest(file) != digest:
        raise InputError("an input file of this picture has changed", file, hint="the original file")
