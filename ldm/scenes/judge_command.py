"""Train the judge that reads pictures of scenes, measure the shipped one, or have it say what it sees in a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.scenes.judge import Judge

CHECK_SEED = 2**31  # of scenes that no training sees


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--read", metavar="FILE", help="say what the shipped judge sees in a picture, and stop")
    parser.add_argument("--check", action="store_true", help="measure the shipped judge on new renders, and stop")
    parser.add_argument("--renders", type=int, default=2000, help="for each trial (default 2000)")
    parser.add_argument("--out", default="judge.safetensors", help="where a trained judge goes")
    parser.add_argument("--steps", type=int, default=16_000, help="of training, 16 pictures each (default 16000)")
    parser.add_argument("--pictures", type=int, default=100_000, help="to render and train on (default 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and their order (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")


def run(arguments: argparse.Namespace) -> int:
    """Read, measure, or train and measure."""
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
    """Each object and how it stands to the others."""
    from ldm import pictures
    from ldm.scenes import pretrained
    from ldm.scenes.relations import RELATIONS
    from ldm.scenes.scoring import holds, objects

    seen = objects(pretrained.judge()(pictures.to_tensor(pictures.read(file))))[0]
    for one in seen:
        related = [
            f"{relation} the {other.size} {other.colour} {other.shape}"
            for other in seen
            for relation in RELATIONS
            if other is not one and holds(relation, one, other)
        ]
        print(", ".join([f"a {one.size} {one.material} {one.colour} {one.shape} ({one.score:.0%} sure)", *related]))
    print(f"{len(seen)} object{'s' * (len(seen) != 1)}")
    return 0


def check(judge: Judge, renders: int) -> dict[str, dict[str, float]]:
    """Print how much is read right."""
    from ldm.scenes.judge_accuracy import measures, table

    columns = measures(judge, renders, CHECK_SEED)
    print(table(columns))
    return columns


def train(arguments: argparse.Namespace) -> int:
    """Train, measure what will be stored, store it."""
    out = Path(arguments.out)
    if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
        raise InputError(
            "not a name for a file of weights", "--out", str(out), "NAME.safetensors in a folder that exists"
        )

    from ldm.scenes import judge_training as training
    from ldm.scenes.pretrained import open_judge, save_judge
    from ldm.scenes.statements import NAMES

    chosen = {name: getattr(arguments, name) for name in ("steps", "pictures", "seed")}
    command = " ".join(["ldm judge", *(f"--{name} {value}" for name, value in chosen.items())])
    metadata = {"command": command, "names": json.dumps(NAMES)}
    save_judge(out, training.train(**chosen, device=arguments.device), **metadata)
    judge = open_judge(out)  # as it is stored
    save_judge(out, judge, **metadata, accuracy=json.dumps(check(judge, arguments.renders)))
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
