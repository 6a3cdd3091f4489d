"""What each shipped configuration costs, told from its networks on the meta device: no weights, no memory, no GPU.

    python -m benchmarks.configs [--out docs/configs.md] [NAME ...]

The stages are those of `train_autoencoder.py` and `train_ldm.py`, and what is counted is what `ldm doctor` counts: the
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
from ldm.assemble import AutoencoderSchema, DiffusionSchema
from ldm.conditioning.external import LARGEST, encoders
from ldm.conditioning.text import Text
from ldm.config import schema as configuration
from ldm.config.schema import Config
from ldm.data.sampler import SampleId
from ldm.losses.perceptual import FeatureDistance
from ldm.models.empty import empty
from ldm.models.lpips import LPIPS
from ldm.scenes import Scenes
from ldm.training.loop import Stage
from ldm.training.needs import remembered, size, without_checkpointing
from ldm.training.recipes.autoencoder import AutoencoderStage
from ldm.training.recipes.diffusion import LatentDiffusionStage
from ldm.training.run import disk_needed
from ldm.training.sample_grid import SampleGrid
from ldm.training.setup import settings

ROOT = Path(__file__).parent.parent / "configs"
STAGES = {"autoencoder": "First stages", "ldm": "Second stages"}
ONE = ["trainer.devices=1", "trainer.accelerator=cpu"]
SUSTAINED = 100  # TFLOP/s, for which days are told
HEAD = f"""# What the configurations cost

Written by `python -m benchmarks.configs --out docs/configs.md`. **Computed, not measured**: networks are built on the
meta device, where they have shapes and no numbers, and a training step of one sample is counted there, as `ldm doctor`
counts it on yours.

- *trained*: parameters that learn, of all networks.
- *GFLOP*: of one sample, forward and back, a multiplication and an addition being two; with the frozen encoders and the
  perceptual loss, in the phase that costs most; without what checkpointing or fused attention computes again.
- *latents*: of these, what encoding the picture takes, and a [cache](latent_diffusion.md#from-a-cache) saves.
- *memory*: weights, gradients, moments and averages of one process in float32, unsharded. Activations come on top: they
  depend on the device and the precision, and `ldm doctor` counts them.
- *checkpoint*: what one takes on disk, with the model's own file; `trainer.keep` of them stay, and the next is written.
- *EFLOP*: 1e18 operations, of all steps of the configuration, phase by phase. With X sustained TFLOP/s on each of N
  devices they take EFLOP / (0.0864 X N) days.
- *days*: that, for X = {SUSTAINED} and N = 1. What a device of yours sustains, the log of a run says
  (`tflops_per_second`); validation and checkpoints come on top."""


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


# ---------------------------------------------------------------------------------------------------- the stages


def common(config: Config) -> dict[str, Any]:
    """What both stages are told."""
    return {
        "plan": config.build("trainer"),
        "data": Source(config["data"]),
        "config": {**config.values, "left_out": {}},
        "seed": config["seed"],
        **settings(config),
    }


def first_stage(file: Path) -> AutoencoderStage:
    """An autoencoder and its adversary, with the perceptual loss that they are trained with."""
    values = yaml.safe_load(file.read_text())
    given = ["data.root=DIR"] if values["data"]["type"] == "images" else []
    config = configuration.load(file, [*given, *ONE], AutoencoderSchema)
    loss = config.amended(["loss.perceptual_weight=0"]).build("loss")
    loss.perceptual_weight = config["loss"]["perceptual_weight"]
    with empty():
        autoencoder = config.build("autoencoder")
        discriminator = config.build("discriminator", in_channels=3) if config["discriminator"] else None
        if config["loss"]["perceptual"] == "lpips" and loss.perceptual_weight:
            loss.perceptual = LPIPS().requires_grad_(False)
    if config["loss"]["perceptual"] == "judge" and loss.perceptual_weight:
        built: FeatureDistance = config.build("loss").perceptual
        loss.perceptual = built.to("meta")
    names = ("train", "sample_from", "two_forwards", "revive")
    players = {"autoencoder": autoencoder, "discriminator": discriminator, "loss": loss}
    stage = AutoencoderStage(**players, **{name: config[name] for name in names}, **common(config))
    stage.describe = lambda z, chosen: {}  # type: ignore[method-assign] # counts codes, which have no values here
    return stage


def second_stage(file: Path) -> LatentDiffusionStage:
    """A denoiser, with the first stage that its file's default path names and the text encoder of its name."""
    values = yaml.safe_load(file.read_text())
    given = ["data.root=DIR"] if values["data"]["type"] == "images" else []
    if path := values.get("autoencoder"):
        node = yaml.safe_load((ROOT / "autoencoder" / f"{Path(path).parent.name}.yaml").read_text())["autoencoder"]
        given += [f"autoencoder={json.dumps(node)}"]
    if (values.get("conditioner") or {}).get("weights"):
        given += ["conditioner.weights=random"]
    config = configuration.load(file, [*given, *ONE], DiffusionSchema)
    with empty():
        model = assemble.model(config)
    large = [x for x in encoders(model.conditioner) if size(x.text.transformer.parameters()) > LARGEST]
    for module in () if model.conditioner is None else model.conditioner.modules():
        if isinstance(module, Text) and module.tokenizer is None:
            module.learn(["a large green cone"])  # which words do not change the count
    weight, level = assemble.weight(config, model.denoiser.path), config.build("draw")
    samples = SampleGrid(config, model.denoiser.path)
    stage = LatentDiffusionStage(model=model, level=level, weight=weight, samples=samples, **common(config))
    stage.left_out = tuple(x.prefix for x in large)
    return stage


# ------------------------------------------------------------------------------------------------------ the costs


def cost_of(stage: Stage) -> Cost:
    """Of all phases of its plan."""
    stage.trainer = stage.plan.trainer([], stage.unused)
    trained = [p for group in stage.groups().values() for _, p in group]
    flops, total = 0, 0
    for _, first, steps in stage.spans():
        stage.step = first
        flops = operations(stage)
        total += flops * steps * stage.data.batch_size
    main = [p for _, p in stage.groups()[stage.main]]
    memory = size([*stage.parameters(), *stage.buffers(), *trained, *main]) + round(size(trained) * remembered(stage))
    parameters = sum(p.numel() for p in trained)
    plan, batch = stage.plan, stage.data.batch_size
    return Cost(parameters, flops, encoding(stage), batch, plan.steps, total, memory, disk_needed(stage))


def sample(stage: Stage) -> dict[str, Any]:
    """The first one, on the meta device."""
    return stage.transfer_batch_to_device(stage.data.batch([SampleId(0, 0, 0)], stage.seed), torch.device("meta"), 0)


def no_autocast() -> Any:
    """The meta device has none, and it changes no count."""
    return mock.patch.object(torch, "autocast", return_value=nullcontext())


def operations(stage: Stage) -> int:
    """Of one sample, forward and back."""
    stage.to("meta")
    parameters = [p for p in stage.parameters() if p.requires_grad]
    with no_autocast(), without_checkpointing(stage), FlopCounterMode(display=False) as counter:
        for turn in stage.turns():
            torch.autograd.grad(stage.loss(sample(stage), turn)[0], parameters, allow_unused=True)
    return counter.get_total_flops()


def encoding(stage: Stage) -> int:
    """Of one picture to its latents, where that is no training."""
    if not isinstance(stage, LatentDiffusionStage):
        return 0
    with no_autocast(), FlopCounterMode(display=False) as counter:
        stage.latents(sample(stage))
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------- the page


def page(names: Sequence[str]) -> Iterator[str]:
    """The explanation, and a table of each stage."""
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
        for file in sorted((ROOT / folder).glob("*.yaml")):
            if not names or file.stem in names:
                stage = first_stage(file) if folder == "autoencoder" else second_stage(file)
                rows.append(row(file.stem, cost_of(stage)))
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
