"""The second stage: a denoiser of latents under a condition (Rombach et al. 2022, eq. 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import assemble, checkpoint
from ldm.assemble import Model
from ldm.checkpoint import Checkpoint
from ldm.condition import Condition
from ldm.conditioning import external
from ldm.conditioning.conditioner import Conditioner, unguided
from ldm.conditioning.label import Label
from ldm.conditioning.text import text_in
from ldm.conditioning.tokenization import Tokenization, TruncatedText
from ldm.config.schema import Config, Part
from ldm.data.derived import DERIVED, derived_draws, with_derived
from ldm.data.latents import Latents
from ldm.data.loader import Data
from ldm.data.sampler import SampleId, by_bucket, evenly_spaced
from ldm.diffusion.path import Level, Table
from ldm.diffusion.path import Path as NoisePath
from ldm.diffusion.prediction import Target
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.times import Uniform
from ldm.distributed import first_process, full_state
from ldm.draws import draw, stream
from ldm.models.tiling import sliced
from ldm.models.transformer import TextTransformer
from ldm.pictures import to_float
from ldm.training import captions
from ldm.training.initial_weights import config_notes, has_autoencoder, load_initial_weights
from ldm.training.recipe import (
    CaptionReport,
    Network,
    Prepare,
    Recipe,
    Report,
    Setup,
    Start,
    TrainingSchema,
    Turn,
    batch_to_device,
)
from ldm.training.setup import check_divisible, portable, prepare
from ldm.training.trainer import TrainerSettings
from ldm.training.validation import BINS, LossByLevel, draw_pairs, seeded_noise

DENOISER = "denoiser"
CHECKED = 8  # samples whose conditions are read before training
Draw = Callable[[NoisePath, Tensor], Level]  # uniform numbers to training levels
Weight = Callable[[Target, Level], Tensor]


@dataclass(kw_only=True)
class Schema(TrainingSchema, assemble.Schema):
    """A YAML that trains a second stage; the model's part of it is stored with the weights."""

    recipe: Part = "diffusion"  # type: ignore[assignment]  # which recipe trains the model
    draw: Part  # distribution of noise levels in training
    weight: Part


class DiffusionRecipe(Recipe):
    """Trains a denoiser, and a conditioner that is not frozen, on the weighted loss at keyed levels."""

    Schema = Schema

    def __init__(
        self, setup: Setup, model: Model, draw: Draw, weight: Weight, sampler: Sampler, notes: Sequence[str] = ()
    ):
        super().__init__(setup)
        self.denoiser, self.conditioner, self.autoencoder = model
        self.draw, self.weight, self.sampler, self.initial_notes = draw, weight, sampler, notes
        self.drops = {} if self.conditioner is None else self.conditioner.parts
        self.loss_by_level = LossByLevel(setup.validation or setup.data, self.settings.validate_images, self.seed)
        if self.autoencoder is not None:
            self.autoencoder.requires_grad_(False)
        encoders = external.encoders(self.conditioner)
        self.external = tuple(encoder.prefix for encoder in encoders if encoder.key in self.config["left_out"])
        self.tokenizer = next(iter(captions.tokenizers(self.conditioner)), None)
        warnings.simplefilter("ignore", TruncatedText)  # a note counts them before training

    @classmethod
    def build(
        cls, config: Config, loaded: Mapping[str, Checkpoint], start: Start, settings: TrainerSettings
    ) -> DiffusionRecipe:
        """The recipe that a YAML describes.

        A run that is resumed takes its frozen encoders from its own exported file.
        """
        first = start.exported or start.init_from
        initial = checkpoint.open(first) if first else None
        if initial and "autoencoder" not in loaded and has_autoencoder(initial, config):
            loaded = {**loaded, "autoencoder": initial}
        assemble.check_first_stage(config, loaded)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(config["seed"], "init"))
            model = assemble.model(config, loaded)
        weight, levels = assemble.weight(config, model.denoiser.path), config.build("draw")
        fingerprint = None if model.autoencoder is None else model.autoencoder.fingerprint()
        notes: list[str] = []
        if initial:
            load_initial_weights(model, initial, fingerprint, str(first), resumed=start.exported is not None)
            notes += config_notes(config, initial, str(first))
        assemble.check_encoders(config, model.conditioner)
        setup = prepare(config, settings)
        captions.learn_tokenizers(model.conditioner, setup.data, config)
        for key, data in (("data", setup.data), ("validation", setup.validation)):
            if data is not None:
                check_source(config, key, data, model)
        stored = {**external.record(portable(config.values), model.conditioner), "fingerprint": fingerprint}
        sampler = assemble.sampler(config, model.denoiser.path)
        return config.build("recipe")(setup._replace(config=stored), model, levels, weight, sampler, notes)

    # --------------------------------------------------------------------------------------------- what is trained

    def networks(self) -> dict[str, Network]:
        """The denoiser is trained, a conditioner too unless it is frozen, the autoencoder never."""
        networks = {DENOISER: Network(self.denoiser, "trained")}
        if self.conditioner is not None:
            for name, m in self.conditioner.named_modules(prefix="conditioner"):
                if isinstance(m, Conditioner) and (m.frozen or name == "conditioner"):
                    networks[name] = Network(m, "frozen" if m.frozen else "trained")
        if self.autoencoder is not None:
            networks["autoencoder"] = Network(self.autoencoder, "frozen")
        return networks

    def turns(self) -> list[Turn]:
        return [(DENOISER,)]

    def blocks(self) -> list[nn.Module]:
        """The blocks of the backbone and of text encoders that are trained."""
        texts = [m for root in self.roots()[1:] for m in root.modules() if isinstance(m, TextTransformer)]
        owners = [self.denoiser.backbone, *(m for m in texts if any(p.requires_grad for p in m.parameters()))]
        lists = [child for owner in owners for child in owner.children() if isinstance(child, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def roots(self) -> list[nn.Module]:
        trained = self.conditioner is not None and any(p.requires_grad for p in self.conditioner.parameters())
        return [self.denoiser.backbone, *([self.conditioner] if self.conditioner is not None and trained else [])]

    # ---------------------------------------------------------------------------------------------------- the loss

    def preparation(self) -> Prepare:
        conditioner, autoencoder = self.conditioner, self.autoencoder
        return Preparation(
            seed=self.seed,
            channels=None if autoencoder is None else autoencoder.latent_channels,
            factor=1 if autoencoder is None else autoencoder.factor,
            drops=dict(self.drops),
            levels=(self.draw, self.denoiser.path),
            weight=(self.weight, self.denoiser.prediction),
            reads=() if conditioner is None else conditioner.reads,
            tokenizations={} if conditioner is None else conditioner.tokenizations(),
        )

    def loss(self, batch: dict[str, Any], turn: Turn) -> tuple[Tensor, Report]:
        x0 = self.clean(batch)  # (B, C, h, w)
        condition = self.condition(batch, x0, batch["drop"])
        plain = self.denoiser.loss(x0, batch["level"], batch["noise"].to(x0.dtype), condition)  # (B,)
        weighted = batch["weight"].to(x0.dtype) * plain
        return weighted.mean(), {"loss/loss": weighted.mean(), "loss/unweighted": plain.mean()}

    def latents(self, batch: Mapping[str, Any]) -> Tensor | None:
        """x0, unless it is pictures."""
        return None if self.autoencoder is None else self.clean(batch)

    @torch.no_grad()
    def clean(self, batch: Mapping[str, Any]) -> Tensor:
        """x0: cached latents, the posterior's mean, or pictures if there is no autoencoder."""
        if "latents" in batch:
            return self.memory_format(batch["latents"].to(self.dtype))  # (B, C, h, w)
        x = self.memory_format(to_float(batch["image"]).to(self.dtype))  # (B, 3, H, W)
        return self.memory_format(
            (x if self.autoencoder is None else sliced(self.autoencoder.encode, x)).to(self.dtype)
        )

    def condition(self, batch: Mapping[str, Any], x0: Tensor, drop: Mapping[str, Tensor]) -> Condition | None:
        """The condition of a batch, with the null in place of what is dropped."""
        if self.conditioner is None:
            return None
        factor = self.conditioner.low_resolution_factor
        inputs = with_derived(batch, self.conditioner.reads, x0, self.seed, factor)
        condition = self.conditioner(inputs, {part: self.to_device(flags) for part, flags in drop.items()})
        return condition.map(lambda x: self.to_device(x.to(self.dtype) if x.dtype == torch.float32 else x))

    # --------------------------------------------------------------------------------------- what others see of it

    def next_command(self, model: Path) -> str:
        reads = () if self.conditioner is None else self.conditioner.reads
        given = {"caption": '--prompt "..."', "label": "--label 0"}
        words = [given.get(name, "--condition FILE") for name in reads]
        return " ".join([f"python sample.py --ckpt {model}", *dict.fromkeys(words)])

    def notes(self) -> Iterable[str]:
        yield from self.initial_notes
        if self.drops:
            rates = ", ".join(f"{part} {rate:.0%}" for part, rate in self.drops.items())
            dropped = any(self.drops.values())
            yield f"dropped: {rates} of samples" if dropped else "dropped: 0%, so only cfg 1 works"
        if note := unguided(self.conditioner, self.sampler.guidance.cfg):
            yield f"guidance: {note}"
        size, sizes = self.config["size"], self.data.sizes
        if (size, size) not in sizes:
            height, width = sizes[0]
            yield f"size: sample.py will make {size}x{size} pictures; the data have {height}x{width}; try size={height}"
        yield from self.scale_notes()
        yield from captions.length_notes(self.conditioner, self.data, self.seed)

    def scale_notes(self) -> Iterable[str]:
        """Noise or weights that do not suit the data."""
        path = self.denoiser.path
        if self.autoencoder is not None and path.sigma_data != 1:
            got = f"{path.sigma_data:g}"
            yield f"path.sigma_data: latents have a standard deviation of 1, not {got}; try path.sigma_data=1"
        noisiest = path.level(torch.ones(1, dtype=torch.float64))
        if isinstance(path, Table) and not self.weight(self.denoiser.prediction, noisiest).any():
            yield "weight: the loss at pure noise, where sampling starts, has weight 0; try weight.type=constant"

    def caption_report(self, texts: Sequence[str]) -> CaptionReport | None:
        if self.conditioner is None:
            return None
        text, guided = text_in(self.conditioner), self.sampler.guidance.cfg != 1
        if text is None:
            return CaptionReport(0, 0, self.drops, guided)
        return CaptionReport(
            text.tokenization.max_tokens, sum(map(text.tokenization.truncates, texts)), self.drops, guided
        )

    def validate(self, folder: Path) -> dict[str, float]:
        self.draw_samples(folder / f"{self.counters.step:08d}.png")
        return self.loss_by_level.measure(self.validation_losses, self.rank)

    def validation_losses(self, batch: dict[str, Any], part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) each: weighted and plain at training levels of a part of time, and plain at even levels."""
        batch = batch_to_device(batch, self.device)
        x0 = self.clean(batch)  # (B, C, h, w)
        condition, path = self.condition(batch, x0, {}), self.denoiser.path
        u, noise = draw(stream(self.seed, "validation"), batch["number"].tolist(), 1, x0.shape[1:])
        time, noise = (part + u[:, 0]) / BINS, self.to_device(noise).to(x0.dtype)  # (B,), (B, C, h, w)
        level, even = self.draw(path, time), Uniform()(path, time)
        plain, at_even = (self.denoiser.loss(x0, at.map(self.to_device), noise, condition) for at in (level, even))
        return self.to_device(self.weight(self.denoiser.prediction, level)).to(x0.dtype) * plain, plain, at_even

    def draw_samples(self, file: Path) -> None:
        """Pairs of a validation sample and a picture made from its condition; every rank samples, the first writes."""
        batch = self.loss_by_level.data.batch(self.loss_by_level.shown, self.seed)
        texts, batch = batch.get("caption", []), batch_to_device(batch, self.device)
        x0 = self.clean(batch)  # (B, C, h, w)
        made = self.sample(batch, x0)
        true, made = (x if self.autoencoder is None else self.autoencoder.decode(x) for x in (x0, made))
        first_process(lambda: draw_pairs(true, made, texts, file), self.rank)

    def sample(self, batch: dict[str, Any], x0: Tensor) -> Tensor:
        """One picture for each condition of a batch, in latents."""
        guided = self.sampler.guidance.cfg != 1 and self.conditioner is not None
        parts = self.conditioner.guided() if guided and self.conditioner is not None else []
        drop = {part: torch.ones(len(x0), dtype=torch.bool) for part in parts}
        condition, negative = self.condition(batch, x0, {}), self.condition(batch, x0, drop) if drop else None
        noise = seeded_noise(x0)
        x = self.denoiser.path.prior(noise())
        for step in self.sampler.steps(self.denoiser, x, noise, condition, negative):
            x = step.x
        return x.to(x0.dtype)

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that sampling needs; very large frozen encoders by name."""
        networks = {
            "backbone": self.denoiser.backbone,
            "conditioner": self.conditioner,
            "autoencoder": self.autoencoder,
        }
        modules = {name: module for name, module in networks.items() if module is not None}
        tensors = {f"{name}.{key}": x for name, m in modules.items() for key, x in m.state_dict().items()}
        stored = {name: x for name, x in tensors.items() if not name.startswith(self.external)}
        return self.config, full_state(stored, self.rank)


@dataclass(frozen=True)
class Preparation:
    """Completes a batch in the loader's workers: one draw per sample, keyed by its number, and token ids."""

    seed: int
    channels: int | None  # of latents; None without an autoencoder
    factor: int
    drops: Mapping[str, float]
    levels: tuple[Draw, NoisePath]
    weight: tuple[Weight, Target]
    reads: Sequence[str]
    tokenizations: Mapping[str, Tokenization]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shape = self.shape(batch)
        u, noise = draw(stream(self.seed, "loss"), batch["number"].tolist(), 1 + len(self.drops), shape)
        level = self.levels[0](self.levels[1], u[:, 0])  # (B,)
        drop = {part: u[:, 1 + k] < rate for k, (part, rate) in enumerate(self.drops.items()) if rate}  # (B,) each
        weight = self.weight[0](self.weight[1], level)  # (B,)
        batch = {**batch, "noise": noise, "level": level, "weight": weight, "drop": drop}
        batch |= derived_draws(batch, self.reads, shape[1:], self.seed)
        with warnings.catch_warnings(action="ignore", category=TruncatedText):  # a note counts them before training
            cached = batch.get("states", {})
            ids = {part: each(batch["caption"]) for part, each in self.tokenizations.items() if part not in cached}
        return batch | ({"ids": ids} if ids else {})

    def shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of x0 without the batch."""
        if "latents" in batch:
            return tuple(batch["latents"].shape[1:])
        channels, height, width = batch["image"].shape[1:]
        return (self.channels or channels, height // self.factor, width // self.factor)


# ------------------------------------------------------------------------------------------------------- the checks


def check_source(config: Config, key: str, data: Data, model: Model) -> None:
    """Refuse data that the networks cannot take, or that lack what the conditioner reads."""
    autoencoder, conditioner = model.autoencoder, model.conditioner
    factor = 1 if autoencoder is None else autoencoder.factor
    if isinstance(data, Latents):
        if autoencoder is None:
            raise config.source.error("autoencoder: missing", "autoencoder", expected="the one of the cache")
        data.check(autoencoder, conditioner, config["conditioner"])
    check_divisible(config, key, data, factor * getattr(model.denoiser.backbone, "factor", 1), "the networks'")
    batch = data.batch(first_samples(data), config["seed"])
    available = {*batch, *batch.get("states", {}), *(DERIVED if "image" in batch else ())}
    for name in () if conditioner is None else conditioner.reads:
        if name not in available:
            what, got = f"{key}: no {name}, which the conditioner reads", ", ".join(sorted(batch))
            expected = ", ".join(conditioner.reads if conditioner else ())
            raise config.source.error(what, key, got=got, expected=expected, hint="data that have it")
    if conditioner is not None:
        with config.blame("conditioner"):
            check_conditions(conditioner, data, batch, factor)


def first_samples(data: Data) -> list[SampleId]:
    return next(by_bucket(evenly_spaced(len(data), CHECKED), CHECKED, data.buckets))


@torch.no_grad()
def check_conditions(conditioner: Conditioner, data: Data, batch: dict[str, Any], factor: int) -> None:
    """Refuse conditions that cannot be read, in some samples, and labels that are out of range, in all."""
    if "latents" in batch:
        x0 = batch["latents"]
    else:
        height, width = batch["image"].shape[2:]
        x0 = torch.zeros(len(batch["image"]), 1, height // factor, width // factor)
    with warnings.catch_warnings(action="ignore", category=TruncatedText):  # a note counts them
        conditioner(with_derived(batch, conditioner.reads, x0, 0, conditioner.low_resolution_factor))
    for label in (leaf for _, leaf in conditioner.leaves() if isinstance(leaf, Label)):
        label.check_data(torch.as_tensor(getattr(data, "labels", batch["label"])))
