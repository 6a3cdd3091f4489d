"""Fetch weights that others published and that measures need, into torch's own cache: VGG16, Inception."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ldm.checkpoint.downloads import DOWNLOADS, Weights, cached
from ldm.errors import DataError, InputError

BLOCK = 2**20


def address(weights: Weights) -> str:
    """Where a file is published."""
    if weights.url != "torchvision":
        return weights.url
    from torchvision.models import VGG16_Weights

    return VGG16_Weights.IMAGENET1K_V1.url


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(DOWNLOADS)}; none lists them")
    parser.add_argument("--file", metavar="PATH", help="take the weights from this file rather than from the network")


def run(arguments: argparse.Namespace) -> int:
    """List what is known, or put it in its place."""
    for name in arguments.names:
        if name not in DOWNLOADS:
            raise InputError("no such weights", "NAME", name, ", ".join(DOWNLOADS))
    if arguments.file and len(arguments.names) != 1:
        raise InputError("a file is of one name", "--file", f"{len(arguments.names)} names", "one")
    for name in arguments.names:
        print(f"{name}: {fetch(DOWNLOADS[name], arguments.file)}")
    for name, weights in {} if arguments.names else DOWNLOADS.items():
        state = "here" if cached(weights).is_file() else "not here"
        print(f"{name}: for {weights.purpose}; {state}: {cached(weights)}; sha256 {weights.sha256}; {address(weights)}")
    return 0


def fetch(weights: Weights, file: str | None = None) -> Path:
    """Put a file in its place, unless it is there; one with another sha256 never gets there."""
    target = cached(weights)
    if target.is_file():
        check(weights, sha256(target), target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with loaded(weights, file) as source, open(unfinished, "wb") as copy:
            for block in blocks(source):
                digest.update(block)
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        check(weights, digest.hexdigest(), file or address(weights))
        os.replace(unfinished, target)
    except OSError as error:
        raise DataError(
            "cannot be fetched", file or address(weights), str(error), hint="ldm fetch NAME --file PATH"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def sha256(path: Path) -> str:
    """A file's sha256."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        for block in blocks(source):
            digest.update(block)
    return digest.hexdigest()


def loaded(weights: Weights, file: str | None) -> BinaryIO:
    """The file at hand, or the published one."""
    from urllib.request import urlopen

    return open(file, "rb") if file else urlopen(address(weights), timeout=60)


def blocks(source: BinaryIO) -> Iterator[bytes]:
    """A file's bytes, a block at a time."""
    while block := source.read(BLOCK):
        yield block


def check(weights: Weights, digest: str, where: object) -> None:
    """Refuse any other file."""
    if digest != weights.sha256:
        got, expected = f"sha256 {digest[:10]}", f"{weights.sha256[:10]}"
        raise DataError("other weights than the published ones", str(where), got, expected, "remove it and fetch again")
