"""What a user holds: prompts and seeds in, pictures out."""

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
from ldm.condition import Condition
from ldm.conditioning.conditioner import unguided
from ldm.conditioning.external import whole
from ldm.conditioning.layout import read_boxes
from ldm.conditioning.text import Text, text_in
from ldm.config import parts
from ldm.config.schema import Config
from ldm.devices import Placed, placement
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.inpaint import Inpainted
from ldm.diffusion.path import Level
from ldm.diffusion.solvers import Step
from ldm.errors import CheckpointError, DivergedError, InputError
from ldm.models.empty import empty
from ldm.models.tiling import tiled_decode, tiled_encode

Told = Image.Image | Mapping[str, Any] | str | Path  # a picture, boxes with labels, or the file of either
OnStep = Callable[[int, Step], None]
SHIPPED = Path(__file__).parent / "pretrained" / "scenes.safetensors"
OPTIONS = {
    "label": "--label N",
    "image": "--init-image FILE",
    "mask": "--mask FILE",
    **dict.fromkeys(("segmentation", "source", "low_resolution"), "--condition FILE"),
    **dict.fromkeys(("boxes", "box_labels"), "--condition FILE.json"),
}
ENCODED = {"image", "mask", "source"}  # what a conditioner may give the first stage; it checks the others on the CPU
NOISE_LEVEL = 20  # of 1000, in which a low-resolution condition is hidden


@dataclass(frozen=True)
class Request:
    """One picture: what it shows and which noise it starts from."""

    prompt: str = ""
    negative: str = ""
    label: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise InputError("seed: out of range", got=str(self.seed), expected="from 0 to below 2**32")


@dataclass(frozen=True)
class Recipe:
    """How all pictures of a call are made."""

    guidance: Guidance
    solver: Callable[..., Iterator[Step]]
    grid: Level
    height: int
    width: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # what a conditioner reads beside text, each (1, ...)
    image: Tensor | None = None  # (1, 3, H, W) in [-1, 1] to begin from, noised to the grid's first level
    mask: Tensor | None = None  # (1, 1, H, W), 1 where `image` is to be repainted
    tile: int | None = None  # latents a side that the first stage codes at a time; None: all


class Pipeline(Placed):
    """A model and its first stage; calling it makes pictures. Gradients are off here, and nowhere below."""

    def __init__(
        self,
        model: assemble.Model,
        config: Config,
        device: torch.device,
        dtype: torch.dtype | None = None,
        loaded: checkpoint.Checkpoint | None = None,
        offload: bool = False,
    ):
        self.denoiser, self.conditioner, self.autoencoder = model
        self.config, self.loaded = config, loaded
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
        **settings: Any,
    ) -> list[Image.Image]:
        """n pictures per prompt; `settings` are those of `recipe`, such as cfg=7.5, steps=30, solver="unipc"."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(n)]
        requests = [Request(text, negative, label, seed + i) for i, text in enumerate(prompts)]
        recipe = self.recipe(**settings)
        batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
        return [image for batch in batches for image in self.images(batch, recipe, on_step)]

    def settled(
        self,
        *,
        cfg: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
        overrides: Sequence[str] = (),
    ) -> Config:
        """The model's own configuration, with what is given here in its place."""
        wanted = {"guidance.cfg": cfg, "spacing.steps": steps, "solver.type": solver}
        return self.config.amended([*(f"{k}={v}" for k, v in wanted.items() if v is not None), *overrides])

    def recipe(
        self,
        *,
        cfg: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
        overrides: Sequence[str] = (),
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | None = None,
        strength: float = 0.8,
        mask: Image.Image | None = None,
        condition: Told | None = None,
        tile: int | None = None,
    ) -> Recipe:
        """The model's own settings, with what is given here in their place."""
        config = self.settled(cfg=cfg, steps=steps, solver=solver, overrides=overrides)
        size = self.size(*(config["size"] if side is None else side for side in (height, width)))
        grid = assemble.grid(config, self.denoiser.path)
        recipe = Recipe(config.build("guidance"), assemble.solver(config), grid, *size, tile=tile)
        if condition is not None:
            recipe = replace(recipe, inputs=self.inputs(condition, size))
        if mask is not None and image is None:
            raise InputError("mask: nothing to repaint", hint=OPTIONS["image"])
        return recipe if image is None else self.from_image(recipe, image, strength, mask)

    def inputs(self, condition: Told, size: tuple[int, int]) -> dict[str, Tensor]:
        """A picture, or boxes, under the name by which this model's conditioner reads it."""
        reads = () if self.conditioner is None else self.conditioner.reads
        if "boxes" in reads and not isinstance(condition, Image.Image):
            return read_boxes(condition)
        if isinstance(condition, Mapping):
            raise InputError("condition: this model reads no boxes", expected=", ".join(reads) or "nothing")
        if not isinstance(condition, Image.Image):
            condition = pictures.read(condition)
        if "segmentation" in reads:
            return {"segmentation": pictures.to_classes(condition, size)}
        names = [name for name in ("source", "low_resolution") if name in reads]
        if not names:
            raise InputError("condition: this model reads no picture", expected=", ".join(reads) or "nothing")
        unit = self.factor if names[0] == "low_resolution" else 1  # it joins the latents as it is
        return {names[0]: pictures.to_tensor(condition, (size[0] // unit, size[1] // unit))}

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, if the first stage and the backbone can divide them."""
        unit = self.factor * getattr(self.denoiser.backbone, "factor", 1)
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % unit:
                near = str(max(unit, round(value / unit) * unit))
                raise InputError(f"{name}: not divisible by this model", "", str(value), f"a multiple of {unit}", near)
        return height, width

    def from_image(self, recipe: Recipe, image: Image.Image, strength: float, mask: Image.Image | None) -> Recipe:
        """Begin from a picture, or repaint the masked part of it; a model that reads the two is told them."""
        size = (recipe.height, recipe.width)
        pixels = pictures.to_tensor(image, size)
        region = None if mask is None else pictures.to_mask(mask, size)
        reads = () if self.conditioner is None else self.conditioner.reads
        inputs = {name: x for name, x in (("image", pixels), ("mask", region)) if name in reads and x is not None}
        if inputs:
            inputs = {**recipe.inputs, **inputs}
            return replace(recipe, inputs=inputs, mask=region, image=None if region is None else pixels)
        if not 0 < strength <= 1:
            raise InputError("strength: out of range", got=str(strength), expected="above 0 and at most 1")
        steps = len(recipe.grid.t) - 1
        first = steps - min(int(steps * strength), steps)
        if first == steps:
            raise InputError("strength: leaves no step", got=f"{strength} of {steps} steps", hint="more steps")
        return replace(recipe, image=pixels, mask=region, grid=recipe.grid.map(lambda column: column[first:]))

    @torch.inference_mode()
    def images(self, requests: Sequence[Request], recipe: Recipe, on_step: OnStep | None = None) -> list[Image.Image]:
        """The pictures of one batch of requests."""
        images = self.decode(self.latents(requests, recipe, on_step), recipe.tile).float()
        if not images.isfinite().all():
            raise DivergedError("decoding left the finite numbers", hint="--precision fp32, or a smaller cfg")
        if recipe.image is not None and recipe.mask is not None:  # what was not to change does not
            images = torch.lerp(recipe.image.to(images), images, recipe.mask.to(images))
        return pictures.to_pil(images)

    @torch.inference_mode()
    def latents(self, requests: Sequence[Request], recipe: Recipe, on_step: OnStep | None = None) -> Tensor:
        """Sampling alone: (B, C, h, w), from noise that depends on each request's seed and on nothing else."""
        noise, finite = self.noise(requests, recipe), []
        with self.autocast():
            x, denoise, kept = self.begin(noise(), requests, recipe)
            with self.on_device(self.denoiser):
                for number, step in enumerate(recipe.solver(denoise, x, recipe.grid, noise)):
                    finite.append(step.x.isfinite().all())
                    if on_step is not None:
                        on_step(number, step)
        check_finite(torch.stack(finite), recipe.grid)
        return kept(step.x)

    def noise(self, requests: Sequence[Request], recipe: Recipe) -> Callable[[], Tensor]:
        """A source of noise with one CPU generator per picture, so that a picture is the same in every batch."""
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        shape = (self.channels, recipe.height // self.factor, recipe.width // self.factor)
        return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

    def begin(self, z: Tensor, requests: Sequence[Request], recipe: Recipe) -> tuple[Tensor, Callable, Callable]:
        """Where sampling starts, the guided denoiser with its condition bound, and what is kept of where it ends."""
        condition, told = self.condition(requests, recipe), "image" in recipe.inputs
        negative = self.negative(requests, recipe)
        denoiser: Any = self.denoiser if negative is None else recipe.guidance(self.denoiser, negative)
        x, kept = self.denoiser.path.prior(z), lambda x: x
        if recipe.image is not None and not told:
            known, first = self.encode(recipe.image, recipe.tile).to(z).expand_as(z), recipe.grid.rows()[0]
            x = first.alpha * known + first.sigma * z
            if recipe.mask is not None:
                mask = nn.functional.interpolate(recipe.mask.to(z), z.shape[2:])  # (1, 1, h, w), the nearest pixel
                denoiser = Inpainted(denoiser, known, z, mask)
                kept = denoiser.kept
        return x, lambda x, level: denoiser(x, level, condition), kept

    def condition(self, requests: Sequence[Request], recipe: Recipe) -> Condition | None:
        """What the requests ask for."""
        self.check(requests)
        if self.conditioner is None:
            return None
        batch = self.batch(requests, recipe, [r.prompt for r in requests])
        with self.on_device(self.conditioner, self.autoencoder):
            return self.conditioner(batch).map(self.to_device)

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what this model would not read."""
        reads = () if self.conditioner is None else self.conditioner.reads
        given = {
            "caption": ("prompt", any(r.prompt or r.negative for r in requests)),
            "label": ("label", any(r.label is not None for r in requests)),
        }
        for name, (what, wanted) in given.items():
            if wanted and name not in reads:
                expected = f"only {', '.join(reads)}" if reads else "nothing to go by"
                raise InputError(f"{what}: this model reads none", expected=expected)

    def negative(self, requests: Sequence[Request], recipe: Recipe) -> Condition | None:
        """What guidance moves away from: a negative prompt, else what is said lacking, beside the same pictures."""
        if self.conditioner is None or recipe.guidance.cfg == 1:
            return None
        unsaid = torch.tensor([not request.negative for request in requests])
        guided = self.conditioner.guided()
        if not guided and unsaid.all():
            warnings.warn(unguided(self.conditioner, recipe.guidance.cfg), stacklevel=2)
            return None
        texts = [name for name, leaf in self.conditioner.leaves() if isinstance(leaf, Text)]
        drop = {part: unsaid if part in texts else torch.ones_like(unsaid) for part in guided}
        batch = self.batch(requests, recipe, [request.negative or request.prompt for request in requests])
        with self.on_device(self.conditioner, self.autoencoder):
            return self.conditioner(batch, drop).map(self.to_device)

    def batch(self, requests: Sequence[Request], recipe: Recipe, captions: list[str]) -> dict[str, Any]:
        """The requests as a conditioner reads them."""
        batch: dict[str, Any] = {name: x.expand(len(requests), *x.shape[1:]) for name, x in recipe.inputs.items()}
        batch["caption"] = captions
        labels = [request.label for request in requests]
        if None not in labels:
            batch["label"] = torch.tensor(labels)  # on the CPU, where they are checked
        if "low_resolution" in batch:
            batch["noise_level"] = torch.full((len(requests),), NOISE_LEVEL)
            small = batch["low_resolution"][0].shape
            sources = [torch.Generator().manual_seed(request.seed ^ 0x10F2E5) for request in requests]
            batch["low_resolution_noise"] = torch.stack([torch.randn(small, generator=g) for g in sources])
        for name in () if self.conditioner is None else self.conditioner.reads:
            if name not in batch:
                raise InputError(f"{name}: this model needs one", hint=OPTIONS.get(name, ""))
        for name in ENCODED & batch.keys():
            batch[name] = self.to_device(batch[name])
        return batch

    def to_diffusers(self):
        """The same model as a pipeline of diffusers, with the weights of the opened file, and what it leaves out."""
        if self.loaded is None:
            raise InputError("to_diffusers: needs a pipeline that was loaded from a file", hint="ldm.load(PATH)")
        from diffusers import DiffusionPipeline

        loaded = whole(self.loaded, self.conditioner) if self.conditioner else self.loaded
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            text = text_in(self.conditioner)
            tokenizer = text.known() if text else None
            checkpoint.write_diffusers(target, self.config.values, loaded.state, tokenizer)
            return DiffusionPipeline.from_pretrained(target, local_files_only=True)

    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """Pictures in [-1, 1] to what is sampled, at once or by tiles of so many latents a side."""
        x = self.to_device(images)
        if self.autoencoder is None:
            return x
        with self.on_device(self.autoencoder):
            return tiled_encode(self.autoencoder, x, tile)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """What was sampled to pictures in [-1, 1], likewise; in float32 where half precision overflows."""
        if self.autoencoder is None:
            return latents
        with self.on_device(self.autoencoder):
            with self.autocast():
                images = tiled_decode(self.autoencoder, latents, tile)
            with torch.autocast(self.device.type, enabled=False):
                return images if images.isfinite().all() else tiled_decode(self.autoencoder, latents.float(), tile)


def check_finite(finite: Tensor, grid: Level) -> None:
    """Never a black picture: say at which step the numbers ran away."""
    bad = (~finite).nonzero()
    if len(bad):
        step = int(bad[0])
        row = grid.rows()[step]
        where = f"step {step + 1} of {len(finite)}, sigma {row.sigma:.4g}, t {row.t:.4g}"
        raise DivergedError("sampling left the finite numbers", where, hint="--precision fp32, or a smaller cfg")


def load(
    path: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    precision: str = "auto",
    offload: bool = False,
) -> Pipeline:
    """Open any checkpoint that `ldm.checkpoint` knows, or the shipped one, and make it ready to sample."""
    if path is None and not SHIPPED.exists():
        raise InputError("no checkpoint given, and no model ships with this version", hint="--ckpt PATH")
    parts.plug_installed()
    where, dtype = placement(device, precision)
    if offload and where.type == "cpu":
        raise InputError("offload: needs a GPU to be off from", got="device cpu", hint="leaving --offload out")
    path = SHIPPED if path is None else path
    loaded = checkpoint.open(path, vae=vae)
    return assembled(loaded, str(path), where, dtype, overrides, offload)


def assembled(
    loaded: checkpoint.Checkpoint,
    path: str,
    device: torch.device,
    dtype: torch.dtype | None,
    overrides: Sequence[str] = (),
    offload: bool = False,
) -> Pipeline:
    """What was opened, made ready to sample."""
    if loaded.config.get("backbone") is None:
        raise CheckpointError("a first stage alone makes no pictures", path, "an autoencoder", hint="it as --vae")
    config = assemble.configure(loaded.config, path, overrides)
    channels = checkpoint.latent_channels(loaded)
    if config["autoencoder"] is None and channels not in (None, config["channels"]):
        got = f"a backbone for {channels} channels"
        raise CheckpointError("no first stage inside to make pictures of latents", path, got, hint="--vae PATH")
    with empty():
        model = assemble.model(config)
    assemble.fill(model, loaded)
    return Pipeline(model, config, device, dtype, loaded, offload)
