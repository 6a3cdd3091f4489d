"""Train the judge that reads pictures of tabletop scenes, check the shipped one, or have it say what it sees."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.errors import InputError


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--check", action="store_true", help="measure the shipped judge on held-out renders, and stop")
    parser.add_argument("--read", metavar="FILE", help="say what the shipped judge sees in a picture, and stop")
    parser.add_argument("--out", default="judge.safetensors", help="where the trained judge goes")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 64 pictures (default 2000)")
    parser.add_argument("--pictures", type=int, default=60_000, help="renders to train on (default 60000)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, the weights and the order (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")


def run(arguments: argparse.Namespace) -> int:
    """Read, check, or train, check and write."""
    if arguments.read:
        return read(arguments.read)
    if arguments.check:
        from ldm.checkpoint import pretrained
        from ldm.training.judge import check

        print(check(pretrained.judge()).table())
        return 0
    return train(arguments)


def read(file: str) -> int:
    """What is seen in a picture, object by object."""
    from ldm import pictures
    from ldm.checkpoint import pretrained
    from ldm.metrics.scenes import holds, objects
    from ldm.data.scenes.relations import RELATIONS

    seen = objects(pretrained.judge()(pictures.to_tensor(pictures.read(file))))[0]
    for i, one in enumerate(seen):
        related = [f"{r} the {b.colour} {b.shape}" for b in seen if b is not one for r in RELATIONS if holds(r, one, b)]
        print(", ".join([f"{i + 1}. {one}", *related]))
    print(f"{len(seen)} object{'s' * (len(seen) != 1)}")
    return 0
