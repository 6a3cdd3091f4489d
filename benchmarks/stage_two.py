"""A training step of the second stage beside that of diffusers' text-to-image example, and a cache beside an encoder.

    python -m benchmarks.stage_two [--channels 128] [--size 16] [--batch 4] [--rounds 10] [--threads 2] [--peak TFLOPS]

Ours is the diffusion recipe as `train_ldm.py` runs it. Inside the timing are the loader's next batch, its way to the
device, Lightning's precision and all of `training_step`: keyed noise and times, the condition, loss, backward pass,
clipping, the one read of norm and losses, schedule, AdamW, average. Outside are Lightning's own loop, logs, validation,
checkpoints, and the reading of files: samples lie in memory for both sides, and benchmarks/data.py times a cache.
Theirs is benchmarks/text_to_image.py, on the same latents and text states; neither side drops any.

Before each pair is timed, losses and gradients must agree at the same weights, noise and times: in float32 within 1e-4
of their size, 5e-2 where a side computes in bfloat16, and each single weight's gradient within ten times as much. The
ratio is their time over ours, from rounds of ours, theirs, theirs, ours, with the lower end of its 95% interval: at
equal precision, and as each side comes. Theirs comes in float32; ours in bfloat16, with channels_last on a GPU and
without it on a CPU, whose GroupNorm takes ten times as long in that order. Memory is the peak of a step together with
what is kept between steps; gradients come as activations go, so that it is less than the sum of its parts.

With a GPU follow images/s, the share of the peak, and the kernels that take most of the time, for Stable Diffusion's
U-Net and DiT-XL/2 at 256 pixels, cached, with the conditioner and the dropping that their configurations have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.device import DEVICE, flops, has_bfloat16, peak, per_second, settled, show_kernels
from benchmarks.networks import fill, paired_ratio, unets, verdict
from benchmarks.text_to_image import ADAMW, CLIP, Example
from ldm.assemble import Model
from ldm.checkpoint.families import backbone_of
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.label import Label
from ldm.conditioning.text import clip
from ldm.data.loader import loader
from ldm.data.sampler import SampleId
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.path import linear, scaled_linear
from ldm.diffusion.prediction import Eps, LearnedRange
from ldm.diffusion.times import Uniform
from ldm.diffusion.weights import Constant
from ldm.draws import draw, stream
from ldm.models.autoencoder import Autoencoder, kl
from ldm.models.dit import DiT
from ldm.models.unet import UNet
from ldm.training.cost import Memory, SavedTensors, peak_flops, size
from ldm.training.ema import EMA
from ldm.training.loop import Loop
from ldm.training.optimizers import adamw, constant
from ldm.training.recipe import Setup
from ldm.training.recipes.diffusion import DENOISER, DiffusionRecipe
from ldm.training.trainer import TrainerSettings

SEED, BATCHES = 0, 8  # of so many batches the set consists
SD15: dict[str, Any] = {"channels": 320, "multipliers": (1, 2, 4, 4), "attend": (1, 2, 4), "heads": 8, "context": 768}
CACHED, MEMORY, AIM = 2.0, 1.0, 0.8  # wanted: a ratio of at least, a peak of at most; and the aim
STEPS = 10  # that a GPU takes between two looks at the clock
TINY = 1e-5  # of all gradients, below which one is 0 but for rounding


class Row(NamedTuple):
    """What each side computes in, how far losses and gradients may be apart, and the ratio that a CPU should reach."""

    ours: Literal["32-true", "bf16-mixed"]
    theirs: torch.dtype
    channels_last: bool
    tolerance: float
    wanted: float


ROWS = {
    "float32": Row("32-true", torch.float32, False, 1e-4, 1.1),
    "bfloat16": Row("bf16-mixed", torch.bfloat16, False, 5e-2, 1.1),
    "defaults": Row("bf16-mixed", torch.float32, DEVICE == "cuda", 5e-2, 1.8),
}


class Shape(NamedTuple):
    """Of the U-Net and its latents."""

    channels: int
    size: int
    batch: int


class Side(NamedTuple):
    """One of two that are compared: its step, and what it keeps from step to step."""

    step: Callable[[], object]
    network: nn.Module
    optimizer: torch.optim.Optimizer
    averages: Iterable[Tensor]


# ---------------------------------------------------------------------------------------------------- both sides


class Ready:
    """Samples that lie in memory, as a cache hands them over."""

    buckets = groups = None
    workers = 0

    def __init__(self, batch_size: int, tokens: Tensor | None = None, **columns: Tensor):
        self.batch_size, self.tokens, self.columns = batch_size, tokens, columns
        self.sizes: list[tuple[int, int]] = []  # of pictures, for which nobody asks

    def __len__(self) -> int:
        return BATCHES * self.batch_size

    def batch(self, sample_ids: Sequence[SampleId], seed: int) -> dict[str, Any]:
        index = torch.tensor([sample_id.index for sample_id in sample_ids])
        batch: dict[str, Any] = {name: x[index] for name, x in self.columns.items()}
        if self.tokens is not None:
            batch["states"] = {"caption": {"tokens": self.tokens[index]}}
        return batch | {"number": torch.tensor([sample_id.number for sample_id in sample_ids]), "index": index}


def cached(shape: Shape, width: int = 512) -> Ready:
    """Latents and 77 text states each."""
    count, generator = BATCHES * shape.batch, torch.Generator().manual_seed(1)
    latents = torch.randn(count, 4, shape.size, shape.size, generator=generator)  # (N, 4, h, w)
    return Ready(shape.batch, torch.randn(count, 77, width, generator=generator), latents=latents)


def loop_of(model: Model, data: Ready, row: Row) -> Loop:
    """A loop with the example's numbers."""
    settings = TrainerSettings(steps=1000, clip=CLIP, precision=row.ours, channels_last=row.channels_last, devices=1)
    recipe = DiffusionRecipe(
        Setup(SEED, settings, data, None, {"left_out": {}}),
        model,
        Uniform(),
        Constant(),
        None,  # type: ignore[arg-type]  # the sampler of validation, which is not done
    )
    return Loop(
        recipe,
        settings=settings,
        optimizers={"": partial(adamw, **ADAMW)},
        schedule=constant,
        ema=partial(EMA, decay=0.9999),
    )


def small(network: UNet, data: Ready, row: Row, autoencoder: Autoencoder | None = None) -> Loop:
    """The loop that is compared: its conditioner has no weights and hands on the states of the data."""
    conditioner = Conditioner("caption", drop=0.0)
    conditioner.freeze()  # as what a cache has the states of
    model = Model(Denoiser(network, scaled_linear(), Eps()), conditioner, autoencoder)
    return loop_of(model, data, row)


class Within(pl.Callback):
    """Work to do where a training would start: the loop is set up, with its optimiser, and takes no step."""

    def __init__(self, work: Callable[[], object]):
        self.work = work

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.work()
        trainer.should_stop = True


def within(loop: Loop, work: Callable[[], object]) -> None:
    """Do something with a loop that Lightning has set up."""
    loop.settings.trainer([Within(work)], loop.recipe.sometimes_unused).fit(loop)


def ours(loop: Loop) -> Side:
    """A loop that is set up; its step is what Lightning's loop calls."""
    batches = iter(loop.train_dataloader())

    def step() -> None:
        batch = loop.transfer_batch_to_device(next(batches), loop.device, 0)
        with loop.trainer.precision_plugin.train_step_context():
            loop.training_step(batch, 0)

    return Side(step, loop, loop.optimizers_by_group()[DENOISER], loop.ema.shadows.values())


def pair(shape: Shape, row: Row) -> tuple[Loop, Example]:
    """Both with the same weights and samples."""
    mine, other = unets(shape.channels)
    batches = iter(loader(cached(shape), SEED))
    return small(mine, cached(shape), row), Example(other.to(DEVICE), batches, row.theirs)


# ------------------------------------------------------------------------------------------- gates and measures


def check(loop: Loop, example: Example, tolerance: float) -> str:
    """Stop unless both have one loss and the same gradients at the same noise and times; says how near they are."""
    recipe: Any = loop.recipe
    batch = loop.transfer_batch_to_device(next(iter(loop.train_dataloader())), loop.device, 0)
    x0, tokens = batch["latents"], batch["states"]["caption"]["tokens"].to(DEVICE)
    u, noise = draw(stream(SEED, "loss"), batch["number"].tolist(), 1 + len(recipe.drops), x0.shape[1:])
    steps = recipe.draw(recipe.denoiser.path, u[:, 0]).t.long()  # (B,)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with loop.trainer.precision_plugin.train_step_context():
            mine = recipe.loss(batch, (DENOISER,))[0]
            loop.manual_backward(mine)
        other = example.loss(x0, tokens, steps.to(DEVICE), noise.to(DEVICE))
        other.backward()
    apart = {
        "loss": abs(mine.item() - other.item()) / other.item(),
        **gradients_apart(recipe.denoiser.backbone, example.network),
    }
    for network in (loop, example.network):
        network.zero_grad(set_to_none=True)
    for name, difference in apart.items():
        limit = tolerance * (1 if name in ("loss", "gradient") else 10)
        if not difference <= limit:
            raise SystemExit(f"{name}: ours and theirs are {difference:.1e} apart, not {limit:.0e}: nothing to time")
    return f"losses {apart['loss']:.1e} apart, gradients {apart['gradient']:.1e}, at most {max(apart.values()):.1e}"


def gradients_apart(backbone: nn.Module, other: nn.Module) -> dict[str, float]:
    """How far, as a part of their size, the whole gradients are apart, and those of each weight by its name there."""
    kind = backbone_of("unet" if isinstance(backbone, UNet) else "dit")
    assert kind is not None
    mine = kind.keys(backbone, "diffusers").write({name: p.grad for name, p in backbone.named_parameters()})
    norms = {name: (float((mine[name] - p.grad).norm()), float(p.grad.norm())) for name, p in other.named_parameters()}
    difference, whole = torch.tensor(list(norms.values())).norm(dim=0).tolist()
    return {"gradient": difference / whole} | {name: a / max(b, TINY * whole) for name, (a, b) in norms.items()}


def compare(name: str, shape: Shape, rounds: int) -> None:
    """Gate, ratio and memory of one pair of precisions."""
    row = ROWS[name]
    loop, example = pair(shape, row)

    def work() -> None:
        print(f"{name}: {check(loop, example, row.tolerance)}", flush=True)
        a, b = ours(loop), Side(example.step, example.network, example.optimizer, example.ema.shadow_params)
        ratio, low = paired_ratio(settled(a.step), settled(b.step), rounds)
        words = verdict(ratio, row.wanted) if DEVICE == "cpu" else "no target on a GPU"
        print(f"  ratio {ratio:.3f}, at least {low:.3f}; {words}")
        compare_memory(a, b)

    within(loop, work)


def compare_memory(a: Side, b: Side) -> None:
    """Of both sides the parts and the peak, in MiB."""
    table = {}
    for name, side in {"ours": a, "theirs": b}.items():
        parts = {part: count / 2**20 for part, count in vars(memory_of(side)).items()}
        step = peak(settled(side.step))
        kept = parts["weights"] + parts["optimizer"] + parts["averages"]
        table[name] = {**parts, "of a step": step, "peak": kept + step}
    print("  MiB     " + "".join(f"{part:>12}" for part in table["ours"]))
    for name, row in table.items():
        print(f"  {name:8}" + "".join(f"{figure:12.1f}" for figure in row.values()))
    ratio = table["ours"]["peak"] / table["theirs"]["peak"]
    print(f"  peak {ratio:.3f} of theirs; {verdict(ratio, MEMORY, most=True)}; the aim is {AIM}", flush=True)


def memory_of(side: Side) -> Memory:
    """The bytes of each part; activations are the most that is saved for the backward pass, without weights."""
    counter = SavedTensors(side.network)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda saved: saved.x):
        side.step()
    states = side.optimizer.state.values()
    return Memory(
        weights=size((*side.network.parameters(), *side.network.buffers())),
        gradients=size(p for p in side.network.parameters() if p.requires_grad),
        optimizer=size(x for state in states for x in state.values() if isinstance(x, Tensor)),
        averages=size(side.averages),
        activations=counter.most,
    )


def compare_cached(shape: Shape, row: Row, rounds: int) -> None:
    """Our step on cached latents beside the same with kl-f8's encoder before it."""
    data, pixels, encoder = cached(shape), 8 * shape.size, kl()
    fill(encoder)
    pictures = torch.randint(256, (len(data), 3, pixels, pixels), dtype=torch.uint8)  # (N, 3, H, W)
    a = small(unets(shape.channels)[0], data, row)
    b = small(unets(shape.channels)[0], Ready(shape.batch, data.tokens, image=pictures), row, encoder)

    def work() -> None:
        ratio, low = paired_ratio(settled(ours(a).step), settled(ours(b).step), rounds)
        print(f"cached latents beside {pixels} px through kl-f8, {row.ours}:", end=" ")
        print(f"ratio {ratio:.3f}, at least {low:.3f}; {verdict(ratio, CACHED)}", flush=True)

    within(a, lambda: within(b, work))


# --------------------------------------------------------------------------------------------------------- on a GPU


def large(name: str) -> Loop:
    """Stable Diffusion 1.5's or DiT-XL/2's loop at 256 pixels."""
    data = cached(Shape(320, 32, 32), 768)
    with torch.device(DEVICE):
        network = UNet(**SD15) if name == "SD 1.5" else DiT(classes=1001)
    if name == "SD 1.5":
        model = Model(Denoiser(network, scaled_linear(), Eps()), clip(weights="random"), None)
        return loop_of(model, data, ROWS["defaults"])
    labelled = Ready(data.batch_size, label=torch.arange(len(data)), **data.columns)
    model = Model(Denoiser(network, linear(), LearnedRange(of=Eps())), Label(), None)
    return loop_of(model, labelled, ROWS["bfloat16"])


def speed(name: str, loop: Loop, best: float | None, rounds: int) -> None:
    """Images/s, how much of the device's peak that is, and where the time goes."""
    step, batch = ours(loop).step, loop.recipe.data.batch_size
    operations = flops(step) / batch
    many = settled(lambda: [step() for _ in range(STEPS)])
    many()
    rate = per_second(many, STEPS * batch, rounds)
    used = f", {operations * rate / best:.1%} of the peak" if best else ""
    print(f"{name} at 256 px, bfloat16, batch {batch}: {rate:.1f} images/s{used}", flush=True)
    show_kernels(settled(step), 1e3 * batch / rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = DEVICE == "cpu"
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, default=16 if cpu else 32)
    parser.add_argument("--batch", type=int, default=4 if cpu else 32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", type=float, default=0.0, help="the device's best TFLOP/s, where it is not known here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape, rounds = Shape(arguments.channels, arguments.size, arguments.batch), arguments.rounds
    print(f"torch {torch.__version__}, {DEVICE}, {arguments.threads} threads, {rounds} rounds,", end=" ")
    print("a U-Net of {} channels on latents of side {}, batch {}".format(*shape), flush=True)
    names = list(ROWS) if has_bfloat16() else ["float32"]
    for name in names:
        compare(name, shape, rounds)
    compare_cached(shape, ROWS[names[-1]], rounds)
    for name in () if cpu else ("SD 1.5", "DiT-XL/2"):
        loop = large(name)
        best = 1e12 * arguments.peak or peak_flops(loop.settings, torch.cuda.get_device_name())
        within(loop, partial(speed, name, loop, best, rounds))


if __name__ == "__main__":
    main()
