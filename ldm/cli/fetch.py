"""Download the weights that LPIPS and FID need, VGG16 and Inception, into torch's cache."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from ldm.checkpoint.downloads import DOWNLOADS, Weights, cached
from ldm.errors import DataError, InputError

BLOCK = 2**20


def address(weights: Weights) -> str:
    """The URL of a file."""
    if weights.url != "torchvision":
        return weights.url
    from torchvision.models import VGG16_Weights

    return VGG16_Weights.IMAGENET1K_V1.url


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(DOWNLOADS)}; without a name, list them"
    )
    parser.add_argument("--file", metavar="PATH", help="copy the weights from this file instead of downloading them")


def run(arguments: argparse.Namespace) -> int:
    """List the files, or fetch some of them."""
    for name in arguments.names:
        if name not in DOWNLOADS:
            raise InputError("no such weights", "NAME", name, ", ".join(DOWNLOADS))
    if arguments.file and len(arguments.names) != 1:
        raise InputError("one file has the weights of one name", "--file", f"{len(arguments.names)} names", "one")
    for name in arguments.names:
        print(f"{name}: {fetch(DOWNLOADS[name], arguments.file)}")
    for name, weights in {} if arguments.names else DOWNLOADS.items():
        state = "here" if cached(weights).is_file() else "not here"
        print(f"{name}: for {weights.purpose}; {state}: {cached(weights)}; sha256 {weights.sha256}; {address(weights)}")
    return 0


def fetch(weights: Weights, file: str | None = None) -> Path:
    """Fetch a file into the cache, unless it is there; a file with the wrong sha256 is never installed."""
    target = cached(weights)
    if target.is_file():
        with open(target, "rb") as there:
            check(weights, hashlib.file_digest(there, "sha256").hexdigest(), target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with open_source(weights, file) as source, open(unfinished, "wb") as copy:
            while block := source.read(BLOCK):
                digest.update(block)
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        check(weights, digest.hexdigest(), file or address(weights))
        os.replace(unfinished, target)
    except OSError as error:
        hint = "ldm fetch NAME --file PATH"
        raise DataError("cannot be fetched", file or address(weights), str(error), hint=hint) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def open_source(weights: Weights, file: str | None) -> BinaryIO:
    """The given file, or the download."""
    from urllib.request import urlopen

    return open(file, "rb") if file else urlopen(address(weights), timeout=60)


def check(weights: Weights, digest: str, place: object) -> None:
    """Refuse a file with the wrong sha256."""
    if digest != weights.sha256:
        got, expected = f"sha256 {digest[:10]}", f"{weights.sha256[:10]}"
        raise DataError("not the published weights", str(place), got, expected, "remove it and fetch again")
