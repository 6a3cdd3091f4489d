"""Train the judge of scenes, measure the accuracy of the shipped one, or print what it sees in a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.scenes.judge import Judge

CHECK_SEED = 2**31  # of scenes that training never shows


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--read", metavar="FILE", help="print what the shipped judge sees in a picture, and exit")
    parser.add_argument("--check", action="store_true", help="measure the shipped judge on new renders, and exit")
    parser.add_argument("--renders", type=int, default=2000, help="renders for each trial (default 2000)")
    parser.add_argument("--out", default="judge.safetensors", help="file of the trained judge")
    parser.add_argument("--steps", type=int, default=16_000, help="training steps of 16 pictures (default 16000)")
    parser.add_argument("--pictures", type=int, default=100_000, help="pictures to train on (default 100000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and order (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")


def run(arguments: argparse.Namespace) -> int:
    """Read a picture, measure the shipped judge, or train and measure one."""
    for name, most in {"renders": 10**6, "steps": 10**6, "pictures": 10**7, "seed": CHECK_SEED - 1}.items():
        if not (name != "seed") <= getattr(arguments, name) <= most:
            raise InputError("out of range", f"--{name}", str(getattr(arguments, name)), f"at most {most}")
    if arguments.read:
        return read(arguments.read)
    if arguments.check:
        from ldm.scenes import pretrained

        check(pretrained.judge(), arguments.renders)
        return 0
    return train(arguments)


def read(file: str) -> int:
    """Print each object and its relations to the others."""
    from ldm import pictures
    from ldm.scenes import pretrained
    from ldm.scenes.relations import RELATIONS
    from ldm.scenes.scoring import holds, objects

    seen = objects(pretrained.judge()(pictures.to_tensor(pictures.read(file))))[0]
    for thing in seen:
        relations = [
            f"{relation} the {other.size} {other.colour} {other.shape}"
            for other in seen
            for relation in RELATIONS
            if other is not thing and holds(relation, thing, other)
        ]
        name = f"a {thing.size} {thing.material} {thing.colour} {thing.shape} ({thing.score:.0%} sure)"
        print(", ".join([name, *relations]))
    print(f"{len(seen)} object{'s' * (len(seen) != 1)}")
    return 0


def check(judge: Judge, renders: int) -> dict[str, dict[str, float]]:
    """Print the accuracy on new renders."""
    from ldm.scenes.judge_accuracy import accuracy, table

    columns = accuracy(judge, renders, CHECK_SEED)
    print(table(columns))
    return columns


def train(arguments: argparse.Namespace) -> int:
    """Train a judge, store it, and store its accuracy beside it."""
    out = Path(arguments.out)
    if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
        raise InputError(
            "--out: the name must end in .safetensors", "--out", str(out), "NAME.safetensors in a folder that exists"
        )

    from ldm.scenes import judge_training as training
    from ldm.scenes.pretrained import open_judge, save_judge
    from ldm.scenes.statements import NAMES

    chosen = {name: getattr(arguments, name) for name in ("steps", "pictures", "seed")}
    command = " ".join(["ldm judge", *(f"--{name} {value}" for name, value in chosen.items())])
    metadata = {"command": command, "names": json.dumps(NAMES)}
    save_judge(out, training.train(**chosen, device=arguments.device), **metadata)
    judge = open_judge(out)  # in half precision, as it is stored
    save_judge(out, judge, **metadata, accuracy=json.dumps(check(judge, arguments.renders)))
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
