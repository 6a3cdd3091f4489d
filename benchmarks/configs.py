"""What each shipped configuration costs, told from its networks on the meta device: no weights, no memory, no GPU.

    python -m benchmarks.configs [--out docs/configs.md] [NAME ...]

The recipes are those of `train_autoencoder.py` and `train_ldm.py`, and what is counted is what `ldm doctor` counts: the
operations of one sample, forward and back, encoders and losses included; the bytes of one process before activations;
the bytes of a checkpoint. Pictures are scenes of each configuration's own size, whose contents do not change the count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from ldm import assemble
from ldm.conditioning.external import LARGEST, encoders
from ldm.conditioning.text import Text
from ldm.config import schema as configuration
from ldm.config.schema import Config
from ldm.data.sampler import SampleId
from ldm.losses.stage_one import FeatureDistance
from ldm.models.empty import empty
from ldm.models.lpips import LPIPS
from ldm.scenes import Scenes
from ldm.training.cost import optimizer_bytes, size, without_checkpointing
from ldm.training.loop import Loop
from ldm.training.recipe import Recipe, Setup
from ldm.training.recipes import autoencoder, diffusion
from ldm.training.run import bytes_needed
from ldm.training.setup import makers

ROOT = Path(__file__).parent.parent / "configs"
STAGES = {"autoencoder": "First stages", "ldm": "Second stages"}
ONE = ["trainer.devices=1", "trainer.accelerator=cpu"]
SUSTAINED = 100  # TFLOP/s, for which days are told
HEAD = f"""# What the configurations cost

Written by `python -m benchmarks.configs --out docs/configs.md`. **Computed, not measured**: the networks are built on
the meta device, which needs no memory, and the operations of a training step are counted there, as `ldm doctor` counts
them on your machine. `finetune` is not listed: it takes its networks from a checkpoint.

- *trained*: trainable parameters of all networks.
- *GFLOP*: operations per sample, forward and backward; a multiplication and an addition are two operations. Frozen
  encoders and the perceptual loss are included. The most expensive phase is counted. What checkpointing and fused
  attention recompute is not.
- *latents*: the part of GFLOP that encodes the picture, which a [cache](latent_diffusion.md#from-a-cache) saves.
- *memory*: weights, gradients, optimiser moments and averages of one process in float32, unsharded. Activations come
  on top: they depend on the device and the precision, and `ldm doctor` measures them.
- *checkpoint*: size of one checkpoint on disk, with the exported model. The newest `trainer.keep` are kept while the
  next is written.
- *EFLOP*: 1e18 operations, for all steps and phases of the configuration. On N devices that sustain X TFLOP/s each,
  they take EFLOP / (0.0864 X N) days.
- *days*: for X = {SUSTAINED} and N = 1. The log of a run shows what your device sustains (`tflops_per_second`).
  Validation and checkpoints come on top."""


class Source:
    """Scenes with labels, so that each conditioner finds what it reads."""

    def __init__(self, node: dict[str, Any]):
        self.batch_size, self.buckets, self.groups, self.workers = node["batch_size"], None, None, 0
        self.scenes = Scenes(resolution=node["resolution"], batch_size=1, adds=node.get("adds", ()))
        self.sizes = self.scenes.sizes

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        """As a training's."""
        return {**self.scenes.batch(sample_ids, seed), "label": torch.zeros(len(sample_ids), dtype=torch.int64)}


class Cost(NamedTuple):
    """What a configuration costs."""

    trained: int
    flops: int  # of a sample, where it costs most
    encoding: int  # of them, those of the picture's latents
    batch: int
    steps: int
    total: int  # operations of all steps
    memory: int  # bytes
    checkpoint: int


# ----------------------------------------------------------------------------------------------------- the loops


def setup_of(config: Config) -> Setup:
    """What both recipes are built from."""
    source = Source(config["data"])
    return Setup(config["seed"], config.build("trainer"), source, None, {**config.values, "left_out": {}})


def loop_of(config: Config, recipe: Recipe) -> Loop:
    """The loop that runs a recipe."""
    return Loop(recipe, settings=recipe.settings, **makers(config))


def first_stage(file: Path) -> Loop:
    """An autoencoder and its adversary, with the perceptual loss that they are trained with."""
    values = yaml.safe_load(file.read_text())
    given = ["data.root=DIR"] if values["data"]["type"] == "images" else []
    config = configuration.load(file, [*given, *ONE], autoencoder.Schema)
    loss = config.amended(["loss.perceptual_weight=0"]).build("loss")
    loss.perceptual_weight = config["loss"]["perceptual_weight"]
    with empty():
        network = config.build("autoencoder")
        discriminator = config.build("discriminator", in_channels=3) if config["discriminator"] else None
        if config["loss"]["perceptual"] == "lpips" and loss.perceptual_weight:
            loss.perceptual = LPIPS().requires_grad_(False)
    if config["loss"]["perceptual"] == "judge" and loss.perceptual_weight:
        built: FeatureDistance = config.build("loss").perceptual
        loss.perceptual = built.to("meta")
    recipe = config.build("recipe")(setup_of(config), network, discriminator, loss)
    recipe.describe = lambda z, codes: {}  # counts codes, which have no values here
    return loop_of(config, recipe)


def second_stage(file: Path) -> Loop:
    """A denoiser, with the first stage that its file's default path names and the text encoder of its name."""
    values = yaml.safe_load(file.read_text())
    given = ["data.root=DIR"] if values["data"]["type"] == "images" else []
    if path := values.get("autoencoder"):
        node = yaml.safe_load((ROOT / "autoencoder" / f"{Path(path).parent.name}.yaml").read_text())["autoencoder"]
        given += [f"autoencoder={json.dumps(node)}"]
    if (values.get("conditioner") or {}).get("weights"):
        given += ["conditioner.weights=random"]
    config = configuration.load(file, [*given, *ONE], diffusion.Schema)
    with empty():
        model = assemble.model(config)
    large = [x for x in encoders(model.conditioner) if size(x.text.transformer.parameters()) > LARGEST]
    for module in () if model.conditioner is None else model.conditioner.modules():
        if isinstance(module, Text) and module.tokenizer is None:
            module.learn(["a large green cone"])  # which words do not change the count
    path = model.denoiser.path
    weight, sampler = assemble.weight(config, path), assemble.sampler(config, path)
    recipe = config.build("recipe")(setup_of(config), model, config.build("draw"), weight, sampler)
    recipe.external = tuple(x.prefix for x in large)
    return loop_of(config, recipe)


# ------------------------------------------------------------------------------------------------------ the costs


def cost_of(loop: Loop) -> Cost:
    """The cost of all phases."""
    recipe, settings = loop.recipe, loop.settings
    trained = [p for group in recipe.groups().values() for _, p in group]
    flops, total, batch = 0, 0, recipe.data.batch_size
    for _, first, steps in loop.spans():
        loop.counters.step = first
        flops = operations(loop)
        total += flops * steps * batch
    main = [p for _, p in recipe.groups()[loop.main_group]]
    memory = size([*recipe.parameters(), *recipe.buffers(), *trained, *main])
    memory += round(size(trained) * optimizer_bytes(loop))
    parameters = sum(p.numel() for p in trained)
    return Cost(parameters, flops, encoding(loop), batch, settings.steps, total, memory, bytes_needed(loop))


def sample(loop: Loop) -> dict[str, Any]:
    """The first one, on the meta device."""
    recipe = loop.recipe
    batch, prepare = recipe.data.batch([SampleId(0, 0, 0)], recipe.seed), recipe.preparation()
    return loop.transfer_batch_to_device(batch if prepare is None else prepare(batch), torch.device("meta"), 0)


def no_autocast() -> Any:
    """The meta device has none, and it changes no count."""
    return mock.patch.object(torch, "autocast", return_value=nullcontext())


def operations(loop: Loop) -> int:
    """The operations of one sample, forward and backward."""
    recipe = loop.to("meta").recipe
    parameters = [p for p in recipe.parameters() if p.requires_grad]
    with no_autocast(), without_checkpointing(loop), FlopCounterMode(display=False) as counter:
        for turn in recipe.turns():
            torch.autograd.grad(recipe.loss(sample(loop), turn)[0], parameters, allow_unused=True)
    return counter.get_total_flops()


def encoding(loop: Loop) -> int:
    """The operations that encode one picture, if a frozen first stage does; latents of pixels cost none."""
    with no_autocast(), FlopCounterMode(display=False) as counter:
        loop.recipe.latents(sample(loop))
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------- the page


def files(folder: str) -> list[Path]:
    """The configurations that have networks of their own: not those that take them from a checkpoint."""
    found = sorted((ROOT / folder).glob("*.yaml"))
    return [file for file in found if {"autoencoder", "backbone"} & yaml.safe_load(file.read_text()).keys()]


def page(names: Sequence[str]) -> Iterator[str]:
    """The explanation, and a table for each stage."""
    yield HEAD
    columns = [
        "configuration",
        "trained",
        "GFLOP",
        "latents",
        "batch",
        "steps",
        "memory",
        "checkpoint",
        "EFLOP",
        "days",
    ]
    for folder, title in STAGES.items():
        rows = []
        for file in files(folder):
            if not names or file.stem in names:
                loop = first_stage(file) if folder == "autoencoder" else second_stage(file)
                rows.append(row(file.stem, cost_of(loop)))
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        yield f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(name: str, cost: Cost) -> list[str]:
    """Numbers as they are read."""
    days = cost.total / (SUSTAINED * 1e12 * 86_400)
    return [
        f"`{name}`",
        f"{cost.trained / 1e6:.1f} M",
        f"{cost.flops / 1e9:,.1f}",
        f"{cost.encoding / 1e9:,.1f}" if cost.encoding else "",
        f"{cost.batch:,}",
        f"{cost.steps:,}",
        f"{cost.memory / 1e9:.2f} GB",
        f"{cost.checkpoint / 1e9:.2f} GB",
        f"{cost.total / 1e18:,.3g}" if cost.total < 1e21 else f"{cost.total / 1e18:,.0f}",
        f"{days:,.3g}" if days < 1000 else f"{days:,.0f}",
    ]


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of these configurations alone")
    parser.add_argument("--out", type=Path, help="write to this file")
    arguments = parser.parse_args()
    text = "\n\n".join(page(arguments.names))
    if arguments.out:
        arguments.out.write_text(f"{text}\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
