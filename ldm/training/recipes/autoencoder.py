"""The first stage: an autoencoder trained against a discriminator (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm import checkpoint
from ldm.checkpoint import Checkpoint, load_weights
from ldm.checkpoint.networks import build_autoencoder
from ldm.config.schema import Config, Part
from ldm.data.loader import Data
from ldm.distributed import full_state, mean_over_ranks
from ldm.draws import draw, stream
from ldm.losses.stage_one import Loss
from ldm.models.autoencoder import Autoencoder
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.lpips import LPIPS
from ldm.models.quantize import Bottled, VectorQuantizer
from ldm.models.tiling import sliced
from ldm.pictures import to_float
from ldm.training import codebook
from ldm.training.ema import EMA, at_least_float32
from ldm.training.gan_monitor import GanMonitor
from ldm.training.latent_statistics import measure, sample_count
from ldm.training.recipe import (
    Network,
    Prepare,
    Recipe,
    Report,
    Setup,
    Start,
    TrainingSchema,
    Turn,
    named_parameters,
    prefixed,
)
from ldm.training.setup import check_divisible, prepare
from ldm.training.trainer import TrainerSettings
from ldm.training.validation import ReconstructionMetrics

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


@dataclass(kw_only=True)
class Schema(TrainingSchema):
    """A YAML that trains a first stage; its `autoencoder` node is stored with the weights."""

    recipe: Part = "autoencoder"  # type: ignore[assignment]  # which recipe trains the model
    autoencoder: Part
    loss: Part
    discriminator: Part | None = None
    discriminator_optimizer: Part | None = None  # without it, one like the autoencoder's


class AutoencoderRecipe(Recipe):
    """Trains an autoencoder and its discriminator together, from one forward pass of the autoencoder."""

    Schema = Schema
    monitor = "loss/reconstruction"
    usage: Tensor  # how often each code occurred since the last revival

    def __init__(
        self,
        setup: Setup,
        autoencoder: Autoencoder,
        discriminator: PatchDiscriminator | None,
        criterion: Loss,
        *,
        train: Literal["all", "decoder"] = "all",  # or only the decoder, of an autoencoder that is trained already
        sample_from: int = 0,  # step from which latents are sampled (KL) or quantised (VQ); they pass before it
        two_forwards: bool = False,  # CompVis's order: the discriminator sees the autoencoder after its step
        revive: int = 0,  # steps between revivals of unused codes; 0 is never
    ):
        super().__init__(setup)
        for name, value in {"sample_from": sample_from, "revive": revive}.items():
            if value < 0:
                raise ValueError(f"{name}: must be a number of steps; got {value}; expected 0 or more")
        self.autoencoder, self.discriminator, self.criterion = autoencoder, discriminator, criterion
        self.decoder_only = train == "decoder"
        self.sample_from, self.two_forwards, self.revive = sample_from, two_forwards, revive
        self.monitor_gan = GanMonitor()
        self.metrics = ReconstructionMetrics(setup.validation or setup.data, self.settings.validate_images, self.seed)
        if self.decoder_only:
            for module in (autoencoder.encoder, autoencoder.quant):
                module.requires_grad_(False)
        if self.codebook is not None:
            self.register_buffer("usage", torch.zeros(len(self.codebook.codebook), dtype=torch.int64))
            self.per_rank = ("usage",)

    @classmethod
    def build(
        cls, config: Config, loaded: Mapping[str, Checkpoint], start: Start, settings: TrainerSettings
    ) -> AutoencoderRecipe:
        check_decoder_only(config, start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(config["seed"], "init"))
            autoencoder: Autoencoder = config.build("autoencoder")
            channels = autoencoder.in_channels
            discriminator = config.build("discriminator", in_channels=channels) if config["discriminator"] else None
        check(config, settings, autoencoder)
        criterion: Loss = config.build("loss")
        if start.init_from and not start.resumed:
            check_new_codes(config, autoencoder)
            load_weights(autoencoder, checkpoint.open(start.init_from).state, "autoencoder")
        setup = prepare(config, settings)
        for key, data in (("data", setup.data), ("validation", setup.validation)):
            if data is not None:
                check_sizes(config, data, key, autoencoder, discriminator)
        make = config.build("recipe")
        with config.blame("recipe"):
            return make(setup, autoencoder, discriminator, criterion)

    # --------------------------------------------------------------------------------------------- what is trained

    def networks(self) -> dict[str, Network]:
        networks = {"autoencoder": Network(self.autoencoder, "trained"), "criterion": Network(self.criterion, "frozen")}
        if self.discriminator is not None:
            networks["discriminator"] = Network(self.discriminator, "trained")
        return networks

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        groups = {GENERATOR: named_parameters([("autoencoder", self.autoencoder)])}
        if self.discriminator is not None:
            groups[DISCRIMINATOR] = named_parameters([("discriminator", self.discriminator)])
        return groups

    def turns(self) -> list[Turn]:
        if self.discriminator is None or not self.criterion.discriminator_learns(self.counters.step):
            return [(GENERATOR,)]
        return [(GENERATOR,), (DISCRIMINATOR,)] if self.two_forwards else [(GENERATOR, DISCRIMINATOR)]

    def phases(self) -> dict[str, int]:
        if self.discriminator is None or not self.criterion.adversarial_weight:
            return {"no discriminator": 0}
        start, warmup = self.criterion.start, self.criterion.warmup
        return {"no discriminator": 0, "discriminator warm-up": max(0, start - warmup), "adversarial": start}

    @property
    def sometimes_unused(self) -> bool:
        """True while the codebook or the discriminator waits, and when the players take separate turns."""
        waiting = self.codebook is not None and self.sample_from > 0
        late = self.two_forwards or not self.criterion.discriminator_learns(0)
        return waiting or (self.discriminator is not None and late)

    def blocks(self) -> list[nn.Module]:
        return [*self.autoencoder.encoder.layers.values(), *self.autoencoder.decoder.layers.values()]

    def roots(self) -> list[nn.Module]:
        own = [self.autoencoder.encoder, self.autoencoder.quant, self.autoencoder.post_quant, self.autoencoder.decoder]
        return own if self.discriminator is None else [*own, self.discriminator]

    @property
    def codebook(self) -> VectorQuantizer | None:
        bottleneck = self.autoencoder.bottleneck
        return bottleneck if isinstance(bottleneck, VectorQuantizer) else None

    # ---------------------------------------------------------------------------------------------------- the loss

    def preparation(self) -> Prepare | None:
        """The posterior's noise, keyed by sample number; a codebook needs none."""
        if self.codebook is not None:
            return None
        return PosteriorNoise(self.seed, self.autoencoder.latent_channels, self.autoencoder.factor)

    def loss(self, batch: dict[str, Any], turn: Turn) -> tuple[Tensor, Report]:
        """The sum of the losses of a turn's players; each has gradients in its own weights only."""
        x = self.memory_format(to_float(batch["image"]).to(self.dtype))  # (B, 3, H, W)
        with torch.set_grad_enabled(GENERATOR in turn):
            reconstruction, bottled = self.reconstruct(batch, x)  # (B, 3, H, W)
        report: Report = {}
        losses = []
        if GENERATOR in turn:
            adversarial = self.discriminator is not None and self.criterion.discriminator_counts(self.counters.step)
            logits = self.discriminator(reconstruction) if adversarial and self.discriminator else None
            last_layer, average = self.autoencoder.decoder.conv_out.weight, partial(mean_over_ranks, rank=self.rank)
            loss, scalars = self.criterion.generator(
                x, reconstruction, bottled, logits, self.counters.step, last_layer, average
            )
            losses, report = [loss], prefixed("loss", scalars)
            report |= prefixed("latents", self.describe(bottled.z, bottled.codes))
        if DISCRIMINATOR in turn and self.discriminator is not None:
            fake = self.discriminator(reconstruction.detach())
            loss, scalars = self.criterion.discriminator(self.discriminator(x), fake)
            losses, report = [*losses, loss], report | prefixed("loss", scalars)
        return torch.stack(losses).sum(), report

    def reconstruct(self, batch: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Bottled]:
        """Reconstructions and what the bottleneck says; until `sample_from`, latents pass it unchanged."""
        sampled = self.counters.step >= self.sample_from
        if self.codebook is None:
            return self.autoencoder(x, self.to_device(batch["noise"]).to(x.dtype) if sampled else None)
        if sampled:
            return self.autoencoder(x)
        z = self.autoencoder.moments(x)  # (B, Z, h, w)
        return self.autoencoder.reconstruct(z), Bottled(z, z.new_zeros(len(z)))

    @torch.no_grad()
    def describe(self, z: Tensor, codes: Tensor | None) -> Report:
        """Mean and standard deviation of the latents, and how much of the codebook this batch uses."""
        z = z.to(at_least_float32(z))
        report = {"mean": z.mean(), "std": z.std()}
        if codes is None or self.codebook is None:
            return report
        counts = self.codebook.count(codes)  # (K,)
        self.usage += counts
        return report | codebook.use(counts)

    def after_step(self, batch: dict[str, Any], ema: EMA, optimizers: Mapping[str, Optimizer]) -> None:
        """Codes start as latents of the batch at `sample_from`; unused ones are revived every `revive` steps."""
        step, book = self.counters.step, self.codebook
        again = self.revive and step > self.sample_from and step % self.revive == 0
        if book is None or self.decoder_only or not (again or step == self.sample_from):
            return
        with torch.no_grad():
            rows = self.autoencoder.moments(to_float(batch["image"]).to(self.dtype))  # (B, C, h, w)
            rows = rows.float().permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
        shadow, memory = ema.shadows[codebook.NAME], optimizers[GENERATOR].state[book.codebook]
        codebook.revive(book, rows, self.usage, shadow, memory, (self.seed, step), self.rank)

    def warnings(self, row: Mapping[str, float]) -> Iterable[str]:
        return self.monitor_gan(row)

    def next_command(self, model: Path) -> str:
        return f"python train_ldm.py --config NAME autoencoder={model}"

    # ------------------------------------------------------------------------------------------ what others see of it

    def validate(self, folder: Path) -> dict[str, float]:
        lpips = self.criterion.perceptual if isinstance(self.criterion.perceptual, LPIPS) else None
        file = folder / f"{self.counters.step:08d}.png"
        return self.metrics.measure(self.reconstruct_pixels, lpips, file, self.rank)

    def reconstruct_pixels(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) as images in [-1, 1], and their reconstructions."""
        x = to_float(image.to(self.device)).to(self.dtype)
        return x.float(), sliced(lambda part: self.autoencoder(part)[0], x).float()

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The autoencoder alone, with the statistics of its latents."""
        if not self.decoder_only:
            count = sample_count(self.settings.save_every * self.data.batch_size, len(self.data))
            statistics = measure(self.encode, self.data, self.seed, count, self.autoencoder.shift, self.rank)
            self.autoencoder.set_statistics(*statistics)
        state = full_state(prefixed("autoencoder", self.autoencoder.state_dict(), "."), self.rank)
        if not state:
            return {}, {}
        twin = build_autoencoder(self.config["autoencoder"])
        load_weights(twin, state, "autoencoder")
        return {**self.config, "fingerprint": twin.fingerprint()}, state

    def encode(self, image: Tensor) -> Tensor:
        """The posterior's mean, not normalised."""
        x = to_float(image.to(self.device)).to(self.dtype)
        return sliced(lambda part: self.autoencoder.posterior(part)[0], x).double()


@dataclass(frozen=True)
class PosteriorNoise:
    """Adds a sample's noise to a batch, in the loader's workers."""

    seed: int
    channels: int
    factor: int

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        height, width = batch["image"].shape[2:]
        shape = (self.channels, height // self.factor, width // self.factor)
        _, noise = draw(stream(self.seed, "loss"), batch["number"].tolist(), 0, shape)  # (B, Z, h, w)
        return {**batch, "noise": noise}


# ------------------------------------------------------------------------------------------------------- the checks


def check_decoder_only(config: Config, start: Start) -> None:
    """Refuse to train a decoder without a trained encoder."""
    if config["recipe"]["train"] == "decoder" and not (start.init_from or start.resumed):
        what = "recipe.train: a decoder alone needs a trained encoder"
        raise config.source.error(what, "recipe.train", got="random weights", hint="--init-from CKPT")


def check_new_codes(config: Config, autoencoder: Autoencoder) -> None:
    """Refuse to replace trained codes by latents of the first batches."""
    if config["recipe"]["sample_from"] and isinstance(autoencoder.bottleneck, VectorQuantizer):
        key, got = "recipe.sample_from", str(config["recipe"]["sample_from"])
        what, expected = f"{key}: would replace trained codes", "0 with --init-from"
        raise config.source.error(what, key, got=got, expected=expected, hint=f"{key}=0")


def check(config: Config, settings: TrainerSettings, autoencoder: Autoencoder) -> None:
    """Refuse settings that no first stage can be trained with."""
    node, vq = config["recipe"], isinstance(autoencoder.bottleneck, VectorQuantizer)
    if node["revive"] and not vq:
        got = config["autoencoder"]["type"]
        raise config.source.error(
            "recipe.revive: there are no codes", "recipe.revive", got=got, expected="vq", hint="0"
        )
    if node["two_forwards"] and settings.accumulate > 1:
        key, got = "trainer.accumulate", f"{settings.accumulate} with two_forwards"
        raise config.source.error(f"{key}: recipe.two_forwards needs the whole batch", key, got=got, expected="1")
    if settings.precision == "16-mixed":
        key, why = "trainer.precision", "float16 is not supported, because the two losses need different loss scales"
        raise config.source.error(f"{key}: {why}", key, got="16-mixed", expected="32-true or bf16-mixed")
    if settings.strategy == "fsdp2" and settings.ranks > 1 and vq:
        key = "trainer.strategy"
        raise config.source.error(f"{key}: a codebook cannot be sharded", key, got="fsdp2 with vq", hint="ddp")


def check_sizes(
    config: Config, data: Data, key: str, autoencoder: Autoencoder, discriminator: PatchDiscriminator | None
) -> None:
    """Refuse pictures of a size that the networks cannot take."""
    check_divisible(config, key, data, autoencoder.factor, "the autoencoder's")
    smallest = 3 * 2**discriminator.layers if discriminator else 1
    for height, width in data.sizes:
        if min(height, width) < smallest:
            what, got = f"{key}.resolution: too small for the discriminator", f"{height}x{width}"
            hint = "fewer discriminator.layers"
            raise config.source.error(what, f"{key}.resolution", got=got, expected=f"at least {smallest}", hint=hint)
