"""Training the second stage: a denoiser of latents, told what a conditioner reads (Rombach et al. 2022, eq. 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm import assemble, checkpoint
from ldm.assemble import Model
from ldm.checkpoint import Checkpoint
from ldm.condition import Condition, to_device
from ldm.conditioning import external
from ldm.conditioning.conditioner import Conditioner, unguided
from ldm.conditioning.label import Label
from ldm.conditioning.text import text_in, texts_in, tokenizer_owners
from ldm.conditioning.tokenization import TruncatedText
from ldm.config.schema import Config
from ldm.data.derived import MADE, with_derived
from ldm.data.latents import Latents
from ldm.data.sampler import by_bucket, evenly_spaced
from ldm.diffusion.path import Level, Table
from ldm.diffusion.path import Path as NoisePath
from ldm.draws import draw, stream
from ldm.errors import InputError
from ldm.models.tiling import sliced
from ldm.models.transformer import TextTransformer
from ldm.pictures import to_float
from ldm.training.caption_report import Told
from ldm.training.initial_weights import begin, differences
from ldm.training.loop import Report, Stage, Turn, named
from ldm.training.loss_by_level import LossByLevel
from ldm.training.sample_grid import SampleGrid
from ldm.training.setup import Sources, check_divisible, check_seed, portable, settings, sources

if TYPE_CHECKING:
    from ldm.data.loader import Data

DENOISER = "denoiser"
CAPTIONS, DRAWN = 20_000, 1024  # that a tokenizer is learned from: where they lie ready, and where each costs a picture
PIECE = 32  # pictures that are drawn at a time for their captions
LOOKED_AT = 8  # samples whose conditions are read before training
JUDGED = 1000  # samples whose captions say how many are too long


class LatentDiffusionStage(Stage):
    """A denoiser's loss at keyed levels with keyed noise, and what a checkpoint of it says.

    All that is random about a sample is one draw by its number: its time, whether each condition is dropped, its noise.
    """

    def __init__(
        self,
        *,
        model: Model,
        level: Callable[[NoisePath, Tensor], Level],
        weight: Callable[..., Tensor],
        samples: SampleGrid,
        config: dict[str, Any],
        validation: Data | None = None,
        notes: Sequence[str] = (),
        **common: Any,
    ):
        super().__init__(**common)
        self.denoiser, self.conditioner, self.autoencoder = model
        self.level, self.weight, self.samples, self.config, self.notes = level, weight, samples, config, notes
        self.drops = {} if self.conditioner is None else self.conditioner.parts
        self.loss_by_level = LossByLevel(
            self.data if validation is None else validation, self.plan.validate_images, self.seed
        )
        if self.autoencoder is not None:
            self.autoencoder.requires_grad_(False)
        encoders = [name for name, m in self.named_modules() if isinstance(m, Conditioner) and m.frozen]
        self.frozen = ("autoencoder", *encoders)
        self.left_out = tuple(x.prefix for x in external.encoders(self.conditioner) if x.key in config["left_out"])
        warnings.simplefilter("ignore", TruncatedText)  # `notices` says it once
        self.tokenizer = next(iter(tokenizers(self.conditioner)), None)

    # --------------------------------------------------------------------------------------------------- the loss

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The backbone's parameters, and those of a conditioner that is trained along."""
        return {DENOISER: named([("denoiser", self.denoiser), *self._conditioners()])}

    def turns(self) -> list[Turn]:
        """All together."""
        return [(DENOISER,)]

    def loss(self, batch: dict[str, Any], turn: Turn) -> tuple[Tensor, Report]:
        """The weighted mean of the samples' losses."""
        x0 = self.latents(batch)  # (B, C, h, w)
        u, noise = draw(stream(self.seed, "loss"), batch["number"].tolist(), 1 + len(self.drops), x0.shape[1:])
        drop = {part: u[:, 1 + k] < rate for k, (part, rate) in enumerate(self.drops.items()) if rate}  # (B,) each
        condition = self.condition(batch, x0, drop)
        weighted, plain = self.losses(x0, self.level(self.denoiser.path, u[:, 0]), noise, condition)
        return weighted.mean(), {"loss/loss": weighted.mean(), "loss/unweighted": plain.mean()}

    def losses(self, x0: Tensor, level: Level, noise: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        """(B,) each: as it is trained, and as it comes."""
        weight = self.to_device(self.weight(self.denoiser.prediction, level)).to(x0.dtype)  # (B,)
        plain = self.denoiser.loss(x0, level.map(self.to_device), self.to_device(noise).to(x0.dtype), condition)  # (B,)
        return weight * plain, plain

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """What is diffused: a cache's latents, the posterior's mean, or pictures as they are."""
        if "latents" in batch:
            x0 = batch["latents"].to(self.dtype)
        else:
            x = self.memory_format(to_float(batch["image"]).to(self.dtype))  # (B, 3, H, W)
            x0 = (x if self.autoencoder is None else sliced(self.autoencoder.encode, x)).to(self.dtype)
        return self.memory_format(x0)  # (B, C, h, w)

    def diffused(self, batch: dict[str, Any]) -> Tensor | None:
        """Latents, and no pictures."""
        return None if self.autoencoder is None else self.latents(batch)

    def told(self, captions: Sequence[str]) -> Told | None:
        """What the conditioner reads of such captions."""
        if self.conditioner is None:
            return None
        text, guided = text_in(self.conditioner), self.samples.guidance.cfg != 1
        if text is None:
            return Told(0, 0, self.drops, guided)
        return Told(text.tokenization.max_tokens, sum(map(text.tokenization.truncates, captions)), self.drops, guided)

    def condition(self, batch: Mapping[str, Any], x0: Tensor, drop: Mapping[str, Tensor]) -> Condition | None:
        """What the conditioner reads in a batch, without what is dropped."""
        if self.conditioner is None:
            return None
        told = with_derived(batch, self.conditioner.reads, x0, self.seed, self.conditioner.low_resolution_factor)
        condition = self.conditioner(told, {part: self.to_device(flags) for part, flags in drop.items()})
        return condition.map(lambda x: self.to_device(x.to(self.dtype) if x.dtype == torch.float32 else x))

    def to_device(self, x: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        return to_device(x, self.device)

    def memory_format(self, x: Tensor) -> Tensor:
        """In the networks' order of dimensions."""
        return x.contiguous(memory_format=torch.channels_last) if self.plan.channels_last else x

    def blocks(self) -> list[nn.Module]:
        """The backbone's blocks and a trained text encoder's."""
        texts = [m for _, part in self._conditioners() for m in part.modules() if isinstance(m, TextTransformer)]
        owners = [self.denoiser.backbone, *(m for m in texts if any(p.requires_grad for p in m.parameters()))]
        lists = [child for owner in owners for child in owner.children() if isinstance(child, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def roots(self) -> list[nn.Module]:
        """The backbone and a conditioner that is trained along."""
        return [self.denoiser.backbone, *(part for _, part in self._conditioners())]

    def _conditioners(self) -> list[tuple[str, nn.Module]]:
        trained = self.conditioner is not None and any(p.requires_grad for p in self.conditioner.parameters())
        return [("conditioner", self.conditioner)] if self.conditioner is not None and trained else []

    # ----------------------------------------------------------------------------------------------- what is seen

    @torch.no_grad()
    def validate(self, samples: Path) -> dict[str, float]:
        """The loss by level, and pictures."""
        with self.averaged():
            self.samples.show(self, self.loss_by_level.shown, samples / f"{self.step:08d}.png")
            return self.loss_by_level.measure(self)

    def fetched(self, data: Data, sample_ids: list[Any]) -> dict[str, Any]:
        """A batch where it is used."""
        return self.transfer_batch_to_device(data.batch(sample_ids, self.seed), self.device, 0)

    def decode(self, z: Tensor) -> Tensor:
        """Latents as pictures in [-1, 1]."""
        return z if self.autoencoder is None else self.autoencoder.decode(z)

    # ---------------------------------------------------------------------------------------------- what is saved

    @torch.no_grad()
    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that sampling needs, or its name."""
        parts = {"backbone": self.denoiser.backbone, "conditioner": self.conditioner, "autoencoder": self.autoencoder}
        modules = {name: module for name, module in parts.items() if module is not None}
        with self.averaged():
            tensors = {f"{name}.{key}": x for name, m in modules.items() for key, x in m.state_dict().items()}
            held = {name: x for name, x in tensors.items() if not name.startswith(self.left_out)}
            return self.config, self.whole(held)


# --------------------------------------------------------------------------------------------------- how it is built


def build(
    config: Config,
    loaded: Mapping[str, Checkpoint],
    init_from: str | None = None,
    before: Path | None = None,
) -> LatentDiffusionStage:
    """The stage that a configuration describes, everything wrong with it found here.

    `before` is the run's own exported file, where the run has begun: it needs no first weights, and its frozen encoders
    are those it began with.
    """
    plan = config.build("trainer")
    check_seed(config)
    assemble.check_first_stage(config, loaded)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(config["seed"], "init"))
        model = assemble.model(config, loaded)
    learned = settings(config)
    weight, level = assemble.weight(config, model.denoiser.path), config.build("draw")
    fingerprint = None if model.autoencoder is None else model.autoencoder.fingerprint()
    notes: list[str] = []
    if first := before or init_from:
        begin(model, start := checkpoint.open(first), fingerprint, str(first), begun=before is not None)
        notes += differences(config, start, str(first))
    assemble.check_encoders(config, model.conditioner)
    found = sources(config, plan)
    teach(model.conditioner, found.data, config["seed"])
    if len(known := tokenizers(model.conditioner)) > 1:
        what, got = "conditioner: text encoders with tokenizers of their own", f"{len(known)} that differ"
        hint = "one vocabulary for all that learn theirs"
        raise config.source.error(what, "conditioner", got=got, expected="one for all", hint=hint)
    check_sources(config, found, model)
    return LatentDiffusionStage(
        model=model,
        level=level,
        weight=weight,
        samples=SampleGrid(config, model.denoiser.path),
        data=found.data,
        validation=found.validation,
        notes=notes,
        plan=plan,
        seed=config["seed"],
        config={**external.record(portable(config.values), model.conditioner), "fingerprint": fingerprint},
        **learned,
    )


def teach(conditioner: Conditioner | None, data: Data, seed: int) -> None:
    """Learn a tokenizer from captions, wherever a text encoder has none."""
    untaught = [text for text in texts_in(conditioner) if text.tokenizer is None]
    captions = captions_of(data, seed) if untaught else []
    for text in untaught:
        text.learn(captions)


def tokenizers(conditioner: Conditioner | None) -> list[str]:
    """The different tokenizers that a checkpoint has to carry."""
    return list(dict.fromkeys(text.require_tokenizer().to_json() for text in tokenizer_owners(conditioner)))


def captions_of(data: Data, seed: int, count: int = CAPTIONS) -> list[str]:
    """Captions of samples spread over a source, fewer where each costs a picture."""
    if ready := getattr(data, "captions", None):
        return [text for index in evenly_spaced(len(data), count) for text in ready(index)]
    found: list[str] = []
    for sample_ids in by_bucket(evenly_spaced(len(data), min(count, DRAWN)), PIECE, data.buckets):
        batch = data.batch(sample_ids, seed)
        if "caption" not in batch:
            got = ", ".join(batch)
            raise InputError("conditioner: a tokenizer is learned from captions", "data", got, hint="tokenizer: FOLDER")
        found += batch["caption"]
    return found


def check_sources(config: Config, found: Sources, model: Model) -> None:
    """Refuse data that the networks cannot take, or that lack what the conditioner reads."""
    backbone = model.denoiser.backbone
    below = 1 if model.autoencoder is None else model.autoencoder.factor
    factor = below * getattr(backbone, "factor", 1)
    for key, data in found.by_key():
        if isinstance(data, Latents):
            if model.autoencoder is None:
                raise config.source.error("autoencoder: missing", "autoencoder", expected="the one of the cache")
            data.check(model.autoencoder, model.conditioner, config["conditioner"])
        check_divisible(config, key, data, factor, "the networks'")
        sample_ids = next(by_bucket(evenly_spaced(len(data), LOOKED_AT), LOOKED_AT, data.buckets))
        batch = data.batch(sample_ids, config["seed"])
        here = {*batch, *batch.get("states", {}), *(MADE if "image" in batch else ())}
        reads = () if model.conditioner is None else model.conditioner.reads
        for name in reads:
            if name not in here:
                what, got = f"{key}: no {name}, which the conditioner reads", ", ".join(sorted(batch))
                raise config.source.error(what, key, got=got, expected=", ".join(reads))
        if model.conditioner is not None:
            with config.blame("conditioner"):
                check_conditions(model.conditioner, data, batch, below)


@torch.no_grad()
def check_conditions(conditioner: Conditioner, data: Data, batch: dict[str, Any], factor: int) -> None:
    """Refuse what a conditioner would stumble over, in some samples, and in all labels where they lie ready."""
    if "latents" in batch:
        x0 = batch["latents"]
    else:
        pixels = batch["image"]
        x0 = torch.zeros(len(pixels), 1, pixels.shape[2] // factor, pixels.shape[3] // factor)
    with warnings.catch_warnings(action="ignore", category=TruncatedText):  # `notices` says that texts are cut off
        conditioner(with_derived(batch, conditioner.reads, x0, 0, conditioner.low_resolution_factor))
    for label in (leaf for _, leaf in conditioner.leaves() if isinstance(leaf, Label)):
        label.check_data(torch.as_tensor(getattr(data, "labels", batch["label"])))


def notices(stage: LatentDiffusionStage) -> Iterable[str]:
    """What a user should know before training begins."""
    yield from stage.notes
    rates = ", ".join(f"{part} {rate:.0%}" for part, rate in stage.drops.items())
    if rates:
        yield f"dropped: {rates} of samples" if any(stage.drops.values()) else "dropped: nothing, so only cfg 1 works"
    if said := unguided(stage.conditioner, stage.samples.guidance.cfg):
        yield f"guidance: {said}"
    size, sizes = stage.config["size"], stage.data.sizes
    if (size, size) not in sizes:
        height, width = sizes[0]
        yield f"size: sample.py will make {size}x{size} pixels; the data have {height}x{width}; try size={height}"
    yield from out_of_scale(stage)
    text = text_in(stage.conditioner)
    captions = captions_of(stage.data, stage.seed, JUDGED) if text and hasattr(stage.data, "captions") else []
    if text and (longer := sum(map(text.tokenization.truncates, captions))):
        limit = text.tokenization.max_tokens
        yield f"captions: {longer / len(captions):.0%} are longer than the {limit} tokens that are read of each"


def out_of_scale(stage: LatentDiffusionStage) -> Iterable[str]:
    """What the noise and its weight would do to these data in silence."""
    path, prediction = stage.denoiser.path, stage.denoiser.prediction
    if stage.autoencoder is not None and path.sigma_data != 1:
        yield f"path.sigma_data: latents have a deviation of 1, not of {path.sigma_data:g}; try path.sigma_data=1"
    noisiest = path.level(torch.ones(1, dtype=torch.float64))
    if isinstance(path, Table) and not stage.weight(prediction, noisiest).any():
        yield "weight: the loss at pure noise, where sampling begins, counts nothing; try weight.type=constant"
