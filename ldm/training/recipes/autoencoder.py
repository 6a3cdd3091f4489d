"""Training the first stage: an autoencoder against a discriminator (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm import checkpoint
from ldm.checkpoint import load_weights
from ldm.checkpoint.networks import build_autoencoder
from ldm.condition import to_device
from ldm.config.schema import Config
from ldm.draws import draw, stream
from ldm.losses.stage_one import Loss
from ldm.models.autoencoder import Autoencoder
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.lpips import LPIPS
from ldm.models.quantize import Bottled, VectorQuantizer
from ldm.models.tiling import sliced
from ldm.pictures import to_float
from ldm.training import codebook
from ldm.training.ema import at_least_float32
from ldm.training.gan_monitor import GanMonitor
from ldm.training.latent_statistics import measured, share
from ldm.training.loop import Report, Stage, Turn, named
from ldm.training.reconstruction_metrics import ReconstructionMetrics
from ldm.training.setup import check_divisible, check_seed, optimizer, portable, settings, sources
from ldm.training.trainer import Plan

if TYPE_CHECKING:
    from ldm.data.loader import Data

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


class AutoencoderStage(Stage):
    """The two players' losses, and what a checkpoint of the first one says.

    One forward pass of the autoencoder serves both: they step together, from gradients taken at the same weights.
    `two_forwards` is CompVis's order, where the discriminator sees what the autoencoder makes after its step.
    """

    frozen = ("criterion",)
    telling = "loss/reconstruction"
    usage: Tensor  # how often each code occurred since the last revival

    def __init__(
        self,
        *,
        autoencoder: Autoencoder,
        discriminator: PatchDiscriminator | None,
        loss: Loss,
        config: dict[str, Any],
        train: Literal["all", "decoder"] = "all",
        sample_from: int = 0,
        two_forwards: bool = False,
        revive: int = 0,
        discriminator_optimizer: Callable[..., Optimizer] | None = None,
        validation: Data | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.autoencoder, self.discriminator, self.criterion = autoencoder, discriminator, loss
        self.watch = GanMonitor()
        self.config, self.decoder_only = config, train == "decoder"
        self.sample_from, self.two_forwards, self.revive = sample_from, two_forwards, revive
        self.make_second = discriminator_optimizer or self.make_optimizer
        self.reconstructions = ReconstructionMetrics(validation or self.data, self.plan.validate_images, self.seed)
        if self.decoder_only:
            for module in (autoencoder.encoder, autoencoder.quant):
                module.requires_grad_(False)
        if self.codebook is not None:
            self.register_buffer("usage", torch.zeros(len(self.codebook.codebook), dtype=torch.int64))
            self.counted = ("usage",)

    # --------------------------------------------------------------------------------------------------- the game

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The autoencoder's parameters and the discriminator's."""
        groups = {GENERATOR: named([("autoencoder", self.autoencoder)])}
        return groups if self.discriminator is None else groups | {DISCRIMINATOR: named(self._discriminators())}

    def optimizer_of(self, group: str) -> Callable[..., Optimizer]:
        """The discriminator may have one of its own."""
        return self.make_second if group == DISCRIMINATOR else self.make_optimizer

    def turns(self) -> list[Turn]:
        """Both together, or one after the other; the discriminator rests until its time has come."""
        if self.discriminator is None or not self.criterion.discriminator_learns(self.step):
            return [(GENERATOR,)]
        return [(GENERATOR,), (DISCRIMINATOR,)] if self.two_forwards else [(GENERATOR, DISCRIMINATOR)]

    def phases(self) -> dict[str, int]:
        """Without the discriminator, while it learns alone, and against it."""
        if self.discriminator is None or not self.criterion.adversarial_weight:
            return {"no discriminator": 0}
        start, warmup = self.criterion.start, self.criterion.warmup
        return {"no discriminator": 0, "it learns alone": max(0, start - warmup), "against it": start}

    def loss(self, batch: dict[str, Any], turn: Turn) -> tuple[Tensor, Report]:
        """The sum of the losses of a turn's players; each has gradients in its own weights only."""
        x = to_float(batch["image"]).to(self.dtype)  # (B, 3, H, W)
        if self.plan.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(GENERATOR in turn):
            reconstruction, bottled = self.through(batch, x)  # (B, 3, H, W)
        report: Report = {}
        losses = []
        if GENERATOR in turn:
            counts = self.discriminator is not None and self.criterion.discriminator_counts(self.step)
            logits = self.discriminator(reconstruction) if counts and self.discriminator else None
            last_layer = self.autoencoder.decoder.conv_out.weight
            loss, scalars = self.criterion.generator(
                x, reconstruction, bottled, logits, self.step, last_layer, self.mean
            )
            losses, report = [loss], report | prefixed("loss", scalars)
            report |= prefixed("latents", self.describe(bottled.z, bottled.codes))
        if DISCRIMINATOR in turn and self.discriminator is not None:
            fake = self.discriminator(reconstruction.detach())
            loss, scalars = self.criterion.discriminator(self.discriminator(x), fake)
            losses, report = [*losses, loss], report | prefixed("loss", scalars)
        return torch.stack(losses).sum(), report

    def through(self, batch: dict[str, Any], x: Tensor) -> tuple[Tensor, Bottled]:
        """Reconstructions, and what the bottleneck says; up to `sample_from` it lets latents pass as they come."""
        if self.codebook is None:
            return self.autoencoder(x, self.noise(batch, x) if self.step >= self.sample_from else None)
        if self.step >= self.sample_from:
            return self.autoencoder(x)
        z = self.autoencoder.moments(x)  # (B, Z, h, w)
        return self.autoencoder.reconstruct(z), Bottled(z, z.new_zeros(len(z)))

    def noise(self, batch: dict[str, Any], x: Tensor) -> Tensor:
        """The posterior's noise of each sample, keyed by its number."""
        factor = self.autoencoder.factor
        shape = (self.autoencoder.latent_channels, x.shape[2] // factor, x.shape[3] // factor)
        _, noise = draw(stream(self.seed, "loss"), batch["number"].tolist(), 0, shape)  # (B, Z, h, w)
        return to_device(noise, x.device).to(x.dtype)

    @torch.no_grad()
    def describe(self, z: Tensor, chosen: Tensor | None) -> Report:
        """Of the latents their mean and standard deviation, and how much of the codebook this batch uses."""
        z = z.to(at_least_float32(z))
        report = {"mean": z.mean(), "std": z.std()}
        if chosen is None or self.codebook is None:
            return report
        counts = self.codebook.count(chosen)  # (K,)
        self.usage += counts
        return report | codebook.use(counts)

    def verdicts(self, row: Mapping[str, float]) -> Iterable[str]:
        """How the game stands, if it stands badly."""
        return self.watch(row)

    def after_step(self, batch: dict[str, Any]) -> None:
        """Codes are latents of this batch when their time has come; dead ones come back so every `revive` steps."""
        again = self.revive and self.step > self.sample_from and self.step % self.revive == 0
        if self.codebook is not None and not self.decoder_only and (again or self.step == self.sample_from):
            codebook.revive(self, to_float(batch["image"]).to(self.dtype))

    @property
    def codebook(self) -> VectorQuantizer | None:
        """The bottleneck, if it has codes."""
        bottleneck = self.autoencoder.bottleneck
        return bottleneck if isinstance(bottleneck, VectorQuantizer) else None

    def _discriminators(self) -> list[tuple[str, nn.Module]]:
        return [] if self.discriminator is None else [("discriminator", self.discriminator)]

    def blocks(self) -> list[nn.Module]:
        """The towers' layers."""
        return [*self.autoencoder.encoder.layers.values(), *self.autoencoder.decoder.layers.values()]

    def roots(self) -> list[nn.Module]:
        """The towers and what stands between them."""
        ours = [self.autoencoder.encoder, self.autoencoder.quant, self.autoencoder.post_quant, self.autoencoder.decoder]
        return [*ours, *(module for _, module in self._discriminators())]

    @property
    def unused(self) -> bool:
        """Whether some steps leave some weights without a gradient."""
        waiting = self.codebook is not None and self.sample_from > 0
        late = self.two_forwards or not self.criterion.discriminator_learns(0)
        return waiting or (self.discriminator is not None and late)

    # ----------------------------------------------------------------------------------------------- what is seen

    @torch.no_grad()
    def validate(self, samples: Path) -> dict[str, float]:
        """How close reconstructions come, and a grid of some of them."""
        lpips = self.criterion.perceptual if isinstance(self.criterion.perceptual, LPIPS) else None
        with self.averaged():
            file = samples / f"{self.step:08d}.png"
            return self.reconstructions.measure(self.reconstruct, lpips, file, self.rank)

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) of a validation batch as images in [-1, 1], and what becomes of them."""
        x = to_float(image.to(self.device)).to(self.dtype)
        return x.float(), sliced(lambda part: self.autoencoder(part)[0], x).float()

    # ---------------------------------------------------------------------------------------------- what is saved

    @torch.no_grad()
    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The autoencoder alone, with its latents' statistics over a share of the images between two checkpoints."""
        with self.averaged():
            if not self.decoder_only:
                count = share(self.plan.save_every * self.data.batch_size, len(self.data))
                statistics = measured(self.encode, self.data, self.seed, count, self.autoencoder.shift, self.rank)
                self.autoencoder.set_statistics(*statistics)
            state = self.whole(prefixed("autoencoder", self.autoencoder.state_dict(), "."))
        if not state:
            return {}, {}
        twin = build_autoencoder(self.config["autoencoder"])
        load_weights(twin, state, "autoencoder")
        return {**self.config, "fingerprint": twin.fingerprint()}, state

    def encode(self, image: Tensor) -> Tensor:
        """The posterior's mean, not normalised."""
        x = to_float(image.to(self.device)).to(self.dtype)
        return sliced(lambda part: self.autoencoder.posterior(part)[0], x).double()


def prefixed(prefix: str, values: dict[str, Tensor], between: str = "/") -> dict[str, Tensor]:
    """The same under longer names."""
    return {f"{prefix}{between}{name}": value for name, value in values.items()}


def build(config: Config, init_from: str | None = None, begun: bool = False) -> AutoencoderStage:
    """The stage that a configuration describes, everything wrong with it found here; `begun` needs no first weights."""
    plan = config.build("trainer")
    if config["train"] == "decoder" and not (init_from or begun):
        hint = "--init-from CKPT"
        raise config.source.error("train: a decoder alone needs an encoder that is trained", "train", hint=hint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(config["seed"], "init"))
        autoencoder = config.build("autoencoder")
        discriminator = (
            config.build("discriminator", in_channels=autoencoder.in_channels) if config["discriminator"] else None
        )
    check(config, plan, autoencoder)
    learned, key = settings(config), "discriminator_optimizer"
    second = optimizer(config, key) if config[key] else None
    loss = config.build("loss")
    if init_from and not begun:
        if config["sample_from"] and isinstance(autoencoder.bottleneck, VectorQuantizer):
            what, got = "sample_from: would put new codes in the place of trained ones", str(config["sample_from"])
            raise config.source.error(what, "sample_from", got=got, expected="0 with --init-from", hint="sample_from=0")
        load_weights(autoencoder, checkpoint.open(init_from).state, "autoencoder")
    found = sources(config, plan)
    for key, source in found.by_key():
        check_sizes(config, source, key, autoencoder, discriminator)
    names = ("seed", "train", "sample_from", "two_forwards", "revive")
    return AutoencoderStage(
        autoencoder=autoencoder,
        discriminator=discriminator,
        loss=loss,
        data=found.data,
        validation=found.validation,
        plan=plan,
        config=portable(config.values),
        discriminator_optimizer=second,
        **{name: config[name] for name in names},
        **learned,
    )


def check(config: Config, plan: Plan, autoencoder: Autoencoder) -> None:
    """Refuse what no first stage can be trained with."""
    check_seed(config)
    for name in ("sample_from", "revive"):
        if config[name] < 0:
            raise config.source.error(f"{name}: a number of steps", name, got=str(config[name]), expected="0 or more")
    vq = isinstance(autoencoder.bottleneck, VectorQuantizer)
    if config["revive"] and not vq:
        got = config["autoencoder"]["type"]
        raise config.source.error("revive: there are no codes", "revive", got=got, expected="vq", hint="0")
    if config["two_forwards"] and plan.accumulate > 1:
        key, got = "trainer.accumulate", f"{plan.accumulate} with two_forwards"
        raise config.source.error(f"{key}: the two turns need the whole batch", key, got=got, expected="1")
    if plan.precision == "16-mixed":
        why = "float16 overflows in the gradients of two losses that one scale cannot serve"
        key = "trainer.precision"
        raise config.source.error(f"{key}: {why}", key, got="16-mixed", expected="32-true or bf16-mixed")
    if plan.strategy == "fsdp2" and plan.ranks > 1 and vq:
        key = "trainer.strategy"
        raise config.source.error(f"{key}: a codebook is not sharded", key, got="fsdp2 with vq", hint="ddp")


def check_sizes(
    config: Config, data: Data, key: str, autoencoder: Autoencoder, discriminator: PatchDiscriminator | None
) -> None:
    """Refuse pictures that the networks cannot take."""
    check_divisible(config, key, data, autoencoder.factor, "the autoencoder's")
    least = 3 * 2**discriminator.layers if discriminator else 1
    for height, width in data.sizes:
        if min(height, width) < least:
            hint = "fewer discriminator.layers"
            what, got = f"{key}.resolution: too small for the discriminator", f"{height}x{width}"
            raise config.source.error(what, f"{key}.resolution", got=got, expected=f"at least {least}", hint=hint)
