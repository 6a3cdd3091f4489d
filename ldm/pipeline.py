"""A model that is ready to sample: prompts and seeds in, pictures out."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import assemble, checkpoint, pictures
from ldm.checkpoint import Checkpoint
from ldm.condition import Condition
from ldm.conditioning.conditioner import unguided
from ldm.conditioning.external import restore
from ldm.conditioning.layout import read_boxes
from ldm.conditioning.text import Text, text_in
from ldm.conditioning.values import read_values
from ldm.config import parts, samplers
from ldm.config.schema import Config
from ldm.devices import Placed, placement
from ldm.diffusion.inpaint import Inpainted
from ldm.diffusion.sampler import OnStep, Sampler
from ldm.errors import CheckpointError, DivergedError, InputError
from ldm.models.empty import empty
from ldm.models.tiling import tiled_decode, tiled_encode

ConditionInput = Image.Image | Mapping[str, Any] | str | Path  # a picture, numbers such as boxes, or a file
SHIPPED = Path(__file__).parent / "pretrained" / "scenes.safetensors"
OPTIONS = {"label": "--label N", "image": "--init-image FILE", "mask": "--mask FILE"}
OPTIONS |= dict.fromkeys(("segmentation", "source", "low_resolution"), "--condition FILE")
OPTIONS |= dict.fromkeys(("boxes", "box_labels"), "--condition FILE.json")
ENCODED = {"image", "mask", "source"}  # inputs that the autoencoder encodes; the others are checked on the CPU
NOISE_LEVEL = 20  # of 1000: how noisy a low-resolution condition is made


@dataclass(frozen=True)
class Request:
    """One picture: what it shows, and the seed of its noise."""

    prompt: str = ""
    negative: str = ""
    label: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise InputError("seed: out of range", got=str(self.seed), expected="from 0 to below 2**32")


@dataclass(frozen=True)
class SamplingSettings:
    """How all pictures of a call are made."""

    config: Config  # the model's, with the settings of this call
    sampler: Sampler
    height: int
    width: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # what a conditioner reads besides text, each (1, ...)
    image: Tensor | None = None  # (1, 3, H, W) in [-1, 1]: sampling starts from it, noised to the grid's first level
    mask: Tensor | None = None  # (1, 1, H, W), 1 where `image` is repainted
    tile: int | None = None  # side of the autoencoder's tiles, in latents; None: no tiles


class Pipeline(Placed):
    """A model on a device; calling it makes pictures. Gradients are switched off here, and nowhere below."""

    def __init__(
        self,
        model: assemble.Model,
        config: Config,
        device: torch.device,
        dtype: torch.dtype | None = None,
        loaded: Checkpoint | None = None,
        offload: bool = False,
    ):
        self.denoiser, self.conditioner, self.autoencoder = model
        self.config, self.loaded = config, loaded
        self.reads = () if self.conditioner is None else self.conditioner.reads
        self.factor = 1 if self.autoencoder is None else self.autoencoder.factor
        self.channels = config["channels"] if self.autoencoder is None else self.autoencoder.latent_channels
        for module in filter(None, model):
            module.eval().requires_grad_(False).float()
        super().__init__(model, device, dtype, offload)

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative: str = "",
        label: int | None = None,
        seed: int = 0,
        n: int = 1,
        batch_size: int = 4,
        on_step: OnStep | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> list[Image.Image]:
        """n pictures per prompt; `settings` are those of `settings()`, such as cfg=7.5, steps=30, solver="unipc"."""
        samplers.check_arguments(settings, self.__call__, self.settings)
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(n)]
        requests = [Request(text, negative, label, seed + i) for i, text in enumerate(prompts)]
        batches = self.batches(requests, self.settings(**settings), batch_size, on_step, progress)
        return [image for _, images in batches for image in images]

    def batches(
        self,
        requests: Sequence[Request],
        settings: SamplingSettings,
        batch_size: int,
        on_step: OnStep | None = None,
        progress: bool = True,
    ) -> Iterator[tuple[Sequence[Request], list[Image.Image]]]:
        """The requests and pictures of each batch; on a terminal, with a progress bar."""
        from tqdm import tqdm

        starts = range(0, len(requests), batch_size)
        total = (len(settings.sampler.grid.t) - 1) * len(starts)
        with tqdm(total=total, desc="sampling", disable=None if progress else True, leave=False) as bar:

            def count(number: int, step: Any) -> None:
                bar.update()
                if on_step is not None:
                    on_step(number, step)

            for start in starts:
                batch = requests[start : start + batch_size]
                yield batch, self.images(batch, settings, count)

    def settings(
        self,
        *,
        cfg: float | None = None,
        steps: int | None = None,
        solver: str | None = None,  # or a sampler by another program's name, such as "DPM++ 2M Karras"
        overrides: Sequence[str] = (),
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | None = None,
        strength: float = 0.8,
        mask: Image.Image | None = None,
        condition: ConditionInput | None = None,
        tile: int | None = None,
    ) -> SamplingSettings:
        """The model's own settings, changed by the arguments that are given."""
        config = self.config.amended(samplers.overrides(cfg, steps, solver, overrides, self.config["spacing"]))
        size = self.size(*(config["size"] if side is None else side for side in (height, width)))
        settings = SamplingSettings(config, assemble.sampler(config, self.denoiser.path), *size, tile=tile)
        if condition is not None:
            settings = replace(settings, inputs=self.inputs(condition, size))
        if mask is not None and image is None:
            raise InputError("mask: nothing to repaint", hint=OPTIONS["image"])
        return settings if image is None else self.from_image(settings, image, strength, mask)

    def inputs(self, condition: ConditionInput, size: tuple[int, int]) -> dict[str, Tensor]:
        """A picture, boxes or other numbers, under the names that this model's conditioner reads."""
        if not isinstance(condition, Image.Image):
            if "boxes" in self.reads:
                return read_boxes(condition)
            if isinstance(condition, Mapping) or str(condition).endswith(".json"):
                return read_values(condition, self.reads)
            condition = pictures.read(condition)
        if "segmentation" in self.reads:
            return {"segmentation": pictures.to_classes(condition, size)}
        names = [name for name in ("source", "low_resolution") if name in self.reads]
        if not names or self.conditioner is None:
            raise InputError("condition: this model reads no picture", expected=", ".join(self.reads) or "nothing")
        unit = 1 if names[0] == "source" else self.conditioner.low_resolution_factor or self.factor
        return {names[0]: pictures.to_tensor(condition, (size[0] // unit, size[1] // unit))}

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, if they are multiples of what autoencoder and backbone reduce them by."""
        unit = self.factor * getattr(self.denoiser.backbone, "factor", 1)
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % unit:
                near = str(max(unit, round(value / unit) * unit))
                raise InputError(f"{name}: not divisible by this model", "", str(value), f"a multiple of {unit}", near)
        return height, width

    def from_image(
        self, settings: SamplingSettings, image: Image.Image, strength: float, mask: Image.Image | None
    ) -> SamplingSettings:
        """Start from a picture, or repaint its masked part; an inpainting model gets both as conditions."""
        size = (settings.height, settings.width)
        pixels = pictures.to_tensor(image, size)
        region = None if mask is None else pictures.to_mask(mask, size)
        given = {name: x for name, x in (("image", pixels), ("mask", region)) if name in self.reads and x is not None}
        if given:
            kept = None if region is None else pixels
            return replace(settings, inputs={**settings.inputs, **given}, mask=region, image=kept)
        if not 0 < strength <= 1:
            raise InputError("strength: out of range", got=str(strength), expected="above 0 and at most 1")
        grid = settings.sampler.grid
        steps = len(grid.t) - 1
        first = steps - min(int(steps * strength), steps)
        if first == steps:
            raise InputError(
                "strength: too small for a single step", got=f"{strength} of {steps} steps", hint="more steps"
            )
        sampler = replace(settings.sampler, grid=grid.map(lambda column: column[first:]))
        return replace(settings, image=pixels, mask=region, sampler=sampler)

    @torch.inference_mode()
    def images(
        self, requests: Sequence[Request], settings: SamplingSettings, on_step: OnStep | None = None
    ) -> list[Image.Image]:
        """The pictures of one batch; each depends on its own request and not on the others."""
        noise = self.noise(requests, settings)
        with self.autocast():
            condition, negative = self.condition(requests, settings), self.negative(requests, settings)
            x, denoiser = self.start(settings.sampler.guided(self.denoiser, negative), noise(), settings)
            with self.on_device(self.denoiser):
                x = settings.sampler(denoiser, x, noise, condition, on_step=on_step)
        x = denoiser.kept(x) if isinstance(denoiser, Inpainted) else x
        images = self.decode(x, settings.tile).float()  # (B, 3, H, W)
        if not images.isfinite().all():
            raise DivergedError("decoding produced NaN or infinity", hint="--precision fp32, or a smaller cfg")
        if settings.image is not None and settings.mask is not None:  # outside the mask nothing changes
            images = torch.lerp(settings.image.to(images), images, settings.mask.to(images))
        return pictures.to_pil(images)

    def noise(self, requests: Sequence[Request], settings: SamplingSettings) -> Callable[[], Tensor]:
        """A source of noise with one CPU generator per picture, so that a picture is the same in every batch."""
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        shape = (self.channels, settings.height // self.factor, settings.width // self.factor)
        return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

    def start(self, denoiser: Any, z: Tensor, settings: SamplingSettings) -> tuple[Tensor, Any]:
        """The first x, and the denoiser, which for inpainting keeps what lies outside the mask."""
        if settings.image is None or "image" in settings.inputs:
            return self.denoiser.path.prior(z), denoiser
        known, first = self.encode(settings.image, settings.tile).to(z).expand_as(z), settings.sampler.grid.rows()[0]
        x = first.alpha * known + first.sigma * z
        if settings.mask is None:
            return x, denoiser
        mask = nn.functional.interpolate(settings.mask.to(z), z.shape[2:])  # (1, 1, h, w), the nearest pixel
        return x, Inpainted(denoiser, known, z, mask)

    def condition(self, requests: Sequence[Request], settings: SamplingSettings) -> Condition | None:
        """The condition of a batch of requests."""
        self.check(requests)
        if self.conditioner is None:
            return None
        batch = self.batch(requests, settings, [r.prompt for r in requests])
        with self.on_device(self.conditioner, self.autoencoder):
            return self.conditioner(batch).map(self.to_device)

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse a prompt or a label that this model does not read."""
        texts, labels = any(r.prompt or r.negative for r in requests), any(r.label is not None for r in requests)
        for name, key, given in (("prompt", "caption", texts), ("label", "label", labels)):
            if given and key not in self.reads:
                expected = f"only {', '.join(self.reads)}" if self.reads else "no condition at all"
                raise InputError(f"{name}: not used by this model", expected=expected)

    def negative(self, requests: Sequence[Request], settings: SamplingSettings) -> Condition | None:
        """The condition that guidance moves away from: a negative prompt, else the null of each part."""
        cfg = settings.sampler.guidance.cfg
        if self.conditioner is None or cfg == 1:
            return None
        without = torch.tensor([not request.negative for request in requests])
        guided = self.conditioner.guided()
        if not guided and without.all():
            warnings.warn(unguided(self.conditioner, cfg), stacklevel=2)
            return None
        texts = [name for name, leaf in self.conditioner.leaves() if isinstance(leaf, Text)]
        drop = {part: without if part in texts else torch.ones_like(without) for part in guided}
        batch = self.batch(requests, settings, [request.negative or request.prompt for request in requests])
        with self.on_device(self.conditioner, self.autoencoder):
            return self.conditioner(batch, drop).map(self.to_device)

    def batch(self, requests: Sequence[Request], settings: SamplingSettings, captions: list[str]) -> dict[str, Any]:
        """The requests as a conditioner reads them."""
        batch: dict[str, Any] = {name: x.expand(len(requests), *x.shape[1:]) for name, x in settings.inputs.items()}
        batch["caption"] = captions
        if None not in (labels := [request.label for request in requests]):
            batch["label"] = torch.tensor(labels)  # on the CPU, where they are checked
        if "low_resolution" in batch:
            batch["noise_level"] = torch.full((len(requests),), NOISE_LEVEL)
            shape = (batch["low_resolution"].shape[1], settings.height // self.factor, settings.width // self.factor)
            sources = [torch.Generator().manual_seed(request.seed ^ 0x10F2E5) for request in requests]
            batch["low_resolution_noise"] = torch.stack([torch.randn(shape, generator=g) for g in sources])
        for name in self.reads:
            if name not in batch:
                raise InputError(f"{name}: required by this model", hint=OPTIONS.get(name, "--condition FILE.json"))
        for name in ENCODED & batch.keys():
            batch[name] = self.to_device(batch[name])
        return batch

    def to_diffusers(self):
        """The same model as a diffusers pipeline, with the weights of the checkpoint file."""
        if self.loaded is None:
            raise InputError("to_diffusers: needs a pipeline that was loaded from a file", hint="ldm.load(PATH)")
        from diffusers import DiffusionPipeline

        loaded = restore(self.loaded, self.conditioner) if self.conditioner else self.loaded
        with tempfile.TemporaryDirectory() as folder:
            target, text = Path(folder) / "model", text_in(self.conditioner)
            tokenizer = text.require_tokenizer() if text else None
            checkpoint.write_diffusers(target, self.config.values, loaded.state, tokenizer)
            return DiffusionPipeline.from_pretrained(target, local_files_only=True)

    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """Pictures in [-1, 1] to latents, at once or in tiles of `tile` latents a side."""
        x = self.to_device(images)
        if self.autoencoder is None:
            return x
        with self.on_device(self.autoencoder):
            return tiled_encode(self.autoencoder, x, tile)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Latents to pictures in [-1, 1]; in float32 where half precision overflows."""
        if self.autoencoder is None:
            return latents
        with self.on_device(self.autoencoder):
            with self.autocast():
                images = tiled_decode(self.autoencoder, latents, tile)
            with torch.autocast(self.device.type, enabled=False):
                return images if images.isfinite().all() else tiled_decode(self.autoencoder, latents.float(), tile)


def load(
    path: str | Path | Checkpoint | None = None,
    *,
    vae: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    precision: str = "auto",
    offload: bool = False,
) -> Pipeline:
    """Make a checkpoint ready to sample: the shipped one, an opened one, or any that `ldm.checkpoint` can open."""
    parts.plug_installed()
    placed, dtype = placement(device, precision)
    if offload and placed.type == "cpu":
        raise InputError("offload: only with a GPU", got="device cpu", hint="leaving --offload out")
    loaded = path if isinstance(path, Checkpoint) else checkpoint.open(SHIPPED if path is None else path, vae=vae)
    origin = str(loaded.files[0] if isinstance(path, Checkpoint | None) else path)
    if loaded.config.get("backbone") is None:
        raise CheckpointError("this file has only an autoencoder", origin, "an autoencoder", hint="it as --vae")
    config = assemble.configure(loaded.config, origin, overrides)
    channels = checkpoint.latent_channels(loaded)
    if config["autoencoder"] is None and channels not in (None, config["channels"]):
        got = f"a backbone for {channels} channels"
        raise CheckpointError("no autoencoder in this file", origin, got, hint="--vae PATH")
    with empty():
        model = assemble.model(config)
    assemble.fill(model, loaded)
    return Pipeline(model, config, placed, dtype, loaded, offload)
