"""Make pictures from prompts, with the shipped model or any checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli import own_parts, plugin_option
from ldm.cli.console import show_warning
from ldm.conditioning.tokenizer import check_length
from ldm.config import parts
from ldm.errors import InputError, nearest

if TYPE_CHECKING:
    from PIL import Image

    from ldm.diffusion.solvers import Step
    from ldm.pipeline import OnStep, Pipeline, Recipe, Request


@dataclass(frozen=True)
class Order:
    """All that decides what the pictures look like, in plain values: what a PNG remembers and `ldm replay` repeats."""

    checkpoint: str | None
    vae: str | None = None
    prompts: list[str] = field(default_factory=list)
    negative: str = ""
    label: int | None = None
    seed: int = 0
    n: int = 1
    height: int | None = None
    width: int | None = None
    init_image: str | None = None
    strength: float = 0.8
    mask: str | None = None
    condition: str | None = None
    tile: int | None = None
    precision: str = "auto"
    overrides: list[str] = field(default_factory=list)


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    what = parser.add_argument_group("what")
    what.add_argument(
        "--prompt", action="append", default=[], help="what the picture shows; may be given several times"
    )
    what.add_argument("--prompts-file", metavar="F", help="a text file with one prompt a line")
    what.add_argument("--label", type=int, metavar="N", help="the class, for class-conditional models")
    what.add_argument("--negative", default="", help="what to move away from")
    what.add_argument("--condition", metavar="FILE", help="a picture, or boxes in JSON, for models that read them")
    what.add_argument("--init-image", metavar="F", help="a picture to begin from")
    what.add_argument("--strength", type=float, default=0.8, help="how much of it to change, up to 1 (default 0.8)")
    what.add_argument("--mask", metavar="F", help="a picture, white where the init image is to be repainted")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--ckpt",
        metavar="PATH",
        help="our file, a Stable Diffusion or DiT .safetensors, a diffusers folder, or a name on Hugging Face",
    )
    how.add_argument("--vae", metavar="PATH", help="another first stage")
    how.add_argument("--cfg", type=float, help="guidance scale; 1 is none")
    how.add_argument("--steps", type=int, help="how many steps the sampler takes")
    how.add_argument("--sampler", metavar="NAME", help="one of the samplers below")
    how.add_argument("--seed", type=int, default=0, help="picture i of a call starts from the noise of seed + i")
    how.add_argument("-n", "--n", type=int, default=1, help="pictures per prompt (behind torchrun, -n)")
    how.add_argument("--height", type=int, help="in pixels")
    how.add_argument("--width", type=int, help="in pixels")
    run = parser.add_argument_group("where")
    run.add_argument("--out", default="outputs", help="the folder for the pictures (default outputs)")
    run.add_argument("--batch-size", type=int, default=4, help="pictures at a time (default 4)")
    run.add_argument("--tile", type=int, metavar="N", help="code large pictures in tiles of N latents a side")
    run.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    run.add_argument("--offload", action="store_true", help="keep weights off the GPU until they are needed")
    run.add_argument("--preview", action="store_true", help="write preview.png while sampling")
    run.add_argument("--grid", action="store_true", help="also write all pictures on one sheet, grid.png")
    run.add_argument("--json", action="store_true", help="print one JSON line per picture")
    plugin_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, such as guidance.rescale=0.7")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = {
        name: [alias for alias, known in parts.SAMPLERS.items() if known == name] for name in parts.TABLES["solver"]
    }
    parser.epilog = "samplers, and what else they are called:\n" + "\n".join(
        f"  {name:16} {', '.join(aliases)}".rstrip() for name, aliases in names.items()
    )


def run(arguments: argparse.Namespace) -> int:
    """Check everything that costs nothing, then load, sample and write."""
    own_parts(arguments)
    order = read_order(arguments)
    out = writable(Path(arguments.out))
    from ldm import pictures, pipeline  # torch is only paid for once all options are right
    from ldm.distributed import gather, torchrun_rank

    rank = torchrun_rank()
    warnings.showwarning = show_warning
    pipe = pipeline.load(
        order.checkpoint,
        vae=order.vae,
        overrides=order.overrides,
        device=arguments.device,
        precision=order.precision,
        offload=arguments.offload,
    )
    for note in notes(pipe, order) if rank.number == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    look = preview(pipe, out, order.tile) if arguments.preview and rank.number == 0 else None
    images = []
    for picture in make(pipe, order, arguments.batch_size, look, silent=arguments.json):
        file = picture.save(out)
        print(json.dumps({"file": str(file), **picture.record}) if arguments.json else file, flush=True)
        images.append(picture.image)
    if arguments.grid:
        in_order = [image for row in zip_longest(*gather(images, rank)) for image in row if image is not None]
        if rank.number == 0:
            pictures.write(pictures.grid(in_order), out / "grid.png")
    return 0


def notes(pipe: Pipeline, order: Order) -> Iterator[str]:
    """What the user should know of the file, and of prompts that the shipped model cannot know."""
    from ldm.scenes.captions import unknown

    yield from pipe.loaded.notes if pipe.loaded else ()
    strange = dict.fromkeys(word for prompt in order.prompts for word in unknown(prompt))
    if order.checkpoint is None and strange:
        known = f"the shipped model knows scenes on a table, and nothing of {', '.join(strange)}"
        yield f"{known}; --ckpt FILE takes another, such as a Stable Diffusion file"


def writable(out: Path) -> Path:
    """The folder for the pictures, made if need be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise InputError("--out: cannot be written to", str(out), error.strerror or "", hint="another folder") from None


def read_order(arguments: argparse.Namespace) -> Order:
    """The options as an order, or the first thing that is wrong with them."""
    prompts = read_prompts(arguments)
    check_numbers(arguments, len(prompts))
    for prompt in [*prompts, arguments.negative]:
        check_length(prompt)
    solver = None if arguments.sampler is None else solver_name(arguments.sampler)
    wanted = {"guidance.cfg": arguments.cfg, "spacing.steps": arguments.steps, "solver.type": solver}
    overrides = [*arguments.overrides, *(f"{key}={value}" for key, value in wanted.items() if value is not None)]
    for name in ("init_image", "mask", "condition"):
        file = getattr(arguments, name)
        if file is not None and not Path(file).is_file():
            raise InputError(f"--{name.replace('_', '-')}: no such file", file)
    if arguments.mask is not None and arguments.init_image is None:
        raise InputError("--mask: nothing to repaint", "command line", hint="--init-image FILE")
    return Order(
        checkpoint=arguments.ckpt,
        vae=arguments.vae,
        prompts=prompts,
        negative=arguments.negative,
        label=arguments.label,
        seed=arguments.seed,
        n=arguments.n,
        height=arguments.height,
        width=arguments.width,
        init_image=arguments.init_image,
        strength=arguments.strength,
        mask=arguments.mask,
        condition=arguments.condition,
        tile=arguments.tile,
        precision=arguments.precision,
        overrides=overrides,
    )


def check_numbers(arguments: argparse.Namespace, prompts: int) -> None:
    """Ranges that need no model to be known."""
    ranges = {
        "cfg": (arguments.cfg is None or math.isfinite(arguments.cfg), "a finite number"),
        "steps": (arguments.steps is None or arguments.steps >= 1, "at least 1"),
        "n": (arguments.n >= 1, "at least 1"),
        "seed": (0 <= arguments.seed <= 2**32 - prompts * arguments.n, "at least 0, and below 2**32 for all pictures"),
        "height": (arguments.height is None or arguments.height >= 1, "at least 1"),
        "width": (arguments.width is None or arguments.width >= 1, "at least 1"),
        "tile": (arguments.tile is None or arguments.tile >= 1, "at least 1"),
        "batch-size": (arguments.batch_size >= 1, "at least 1"),
        "strength": (0 < arguments.strength <= 1, "above 0 and at most 1"),
    }
    for name, (fine, expected) in ranges.items():
        if not fine:
            got = str(getattr(arguments, name.replace("-", "_")))
            raise InputError(f"--{name}: out of range", "command line", got, expected)


def solver_name(name: str) -> str:
    """A solver by one of the names it goes by."""
    if name in parts.TABLES["solver"]:
        return name
    known = {**{solver: solver for solver in parts.TABLES["solver"]}, **parts.SAMPLERS}
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower())
    if plain not in known:
        raise InputError(
            "--sampler: unknown",
            "command line",
            name,
            f"one of {', '.join(parts.TABLES['solver'])}",
            nearest(plain, known),
        )
    return known[plain]


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file."""
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        try:
            lines = Path(arguments.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            got = getattr(error, "strerror", None) or str(error)
            raise InputError("--prompts-file: cannot be read", arguments.prompts_file, got, "UTF-8 text") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise InputError("--prompts-file: has no prompts", arguments.prompts_file, expected="one prompt a line")
        prompts += found
    return prompts or [""]


@dataclass(frozen=True)
class Picture:
    """A picture and all that made it; `place` is which of how many it was in its batch, for the last bit's sake."""

    image: Image.Image
    request: Request
    record: dict[str, Any]
    place: tuple[int, int]

    def save(self, out: Path) -> Path:
        """A PNG whose name says its prompt, its seed and, in eight hexadecimal digits, everything else."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.request.prompt.lower()).strip("-")[:60] or "picture"
        digest = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:8]
        file = out / f"{slug}_{self.request.seed}_{digest}.png"
        self.write(file)
        return file

    def write(self, file: Path) -> None:
        """A PNG that remembers how it was made."""
        from ldm import pictures

        texts = {"parameters": a1111(self.record), "ldm": json.dumps({**self.record, "place": self.place})}
        pictures.write(self.image, file, texts)


def make(
    pipe: Pipeline, order: Order, batch_size: int = 4, look: OnStep | None = None, silent: bool = False
) -> Iterator[Picture]:
    """The pictures of an order, as they are done; under torchrun, this process's share of them."""
    from tqdm import tqdm

    from ldm.distributed import torchrun_rank

    rank = torchrun_rank()
    recipe, requests = read_recipe(pipe, order), read_requests(order)[rank.number :: rank.of]
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    steps = len(recipe.sampler.grid.t) - 1
    with tqdm(total=steps * len(batches), desc="sampling", disable=silent or None, leave=False) as bar:

        def on_step(number: int, step: Step) -> None:
            bar.update()
            if look is not None:
                look(number, step)

        for batch in batches:
            for i, image in enumerate(pipe.images(batch, recipe, on_step)):
                yield Picture(image, batch[i], record(pipe, order, batch[i], recipe), (i, len(batch)))


def read_requests(order: Order) -> list[Request]:
    """One for each picture; picture i of the order has the noise of seed + i."""
    from ldm.pipeline import Request

    prompts = [prompt for prompt in order.prompts for _ in range(order.n)]
    return [Request(prompt, order.negative, order.label, order.seed + i) for i, prompt in enumerate(prompts)]


def read_recipe(pipe: Pipeline, order: Order) -> Recipe:
    """How an order is carried out by this model."""
    from ldm import pictures

    files = {"image": order.init_image, "mask": order.mask}
    images: dict[str, Any] = {name: pictures.read(file) for name, file in files.items() if file is not None}
    names = ("height", "width", "strength", "condition", "tile")
    wanted: dict[str, Any] = {name: getattr(order, name) for name in names}
    return pipe.recipe(**wanted, **images)


def record(pipe: Pipeline, order: Order, request: Request, recipe: Recipe) -> dict[str, Any]:
    """What `ldm replay` needs to make this one picture again, and to know whether it can."""
    import torch

    files = (order.init_image, order.mask, order.condition)
    one = replace(order, prompts=[request.prompt], seed=request.seed, n=1, height=recipe.height, width=recipe.width)
    one = replace(one, precision=pipe.precision)  # that `auto` came to
    return {
        "order": asdict(one),
        "checkpoint": pipe.loaded.hash if pipe.loaded else "",
        "inputs": {file: file_digest(file) for file in files if file is not None},
        "config": {
            name: value for name, value in pipe.config.values.items() if name in ("guidance", "spacing", "solver")
        },
        "versions": {"ldm": __version__, "torch": torch.__version__},
    }


def file_digest(file: str) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def a1111(record: dict[str, Any]) -> str:
    """The `parameters` text that other programs read from a PNG."""
    order, config = record["order"], record["config"]
    settings = {
        "Steps": config["spacing"].get("steps", len(config["spacing"].get("times", []))),
        "Sampler": config["solver"]["type"],
        "CFG scale": config["guidance"]["cfg"],
        "Seed": order["seed"],
        "Size": f"{order['width']}x{order['height']}",
        "Model hash": record["checkpoint"][:10],
        "Version": f"ldm {record['versions']['ldm']}",
    }
    negative = [f"Negative prompt: {order['negative']}"] if order["negative"] else []
    return "\n".join([*order["prompts"], *negative, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def preview(pipe: Pipeline, out: Path, tile: int | None) -> OnStep:
    """Writes what the model believes the first picture to be, every fifth step, to preview.png."""
    from ldm import pictures

    def look(number: int, step: Step) -> None:
        if number % 5 == 4:
            pictures.write(pictures.to_pil(pipe.decode(step.prediction.x0[:1], tile))[0], out / "preview.png")

    return look
