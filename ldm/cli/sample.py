"""Make pictures from prompts, with the shipped model or any checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__
from ldm.cli import plugin_option
from ldm.cli.console import show_warning
from ldm.conditioning.tokenizer import check_length
from ldm.config import parts, samplers
from ldm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from ldm.diffusion.sampler import OnStep
    from ldm.diffusion.solvers import Step
    from ldm.pipeline import Pipeline, Request, SamplingSettings

SAMPLING = ("guidance", "spacing", "solver")  # the nodes of a configuration that each call may change


@dataclass(frozen=True)
class Order:
    """Everything that decides what the pictures look like, in plain values; a PNG stores it, `ldm replay` repeats it.

    Version 0.1 wrote cfg, steps and sampler among the overrides.
    """

    checkpoint: str | None
    vae: str | None = None
    prompts: list[str] = field(default_factory=list)
    negative: str = ""
    label: int | None = None
    seed: int = 0
    n: int = 1
    cfg: float | None = None
    steps: int | None = None
    sampler: str | None = None
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
    """The command's options; each field of an Order has the name of one."""
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("--prompt", dest="prompts", metavar="PROMPT", action="append", default=[], help="may be given several times")
    add("--prompts-file", metavar="F", help="a text file with one prompt per line")
    add("--label", type=int, metavar="N", help="the class, for class-conditional models")
    add("--negative", default="", help="negative prompt: what the picture should not show")
    add("--condition", metavar="FILE", help="a picture, or numbers such as boxes in JSON, for models that read them")
    add("--init-image", metavar="F", help="a picture to start from")
    add("--strength", type=float, default=0.8, help="how much of it changes, at most 1 (default 0.8)")
    add("--mask", metavar="F", help="a picture that is white where the init image is repainted")
    add = parser.add_argument_group("how").add_argument
    add(
        "--ckpt",
        dest="checkpoint",
        metavar="PATH",
        help="a file of ldm, Stable Diffusion or DiT (.safetensors), a diffusers folder, or a repository on the Hub",
    )
    add("--vae", metavar="PATH", help="another checkpoint, whose autoencoder (VAE) is used")
    add("--cfg", type=float, help="guidance scale; 1 is no guidance")
    add("--steps", type=int, help="number of sampling steps")
    add("--sampler", metavar="NAME", help='one of the samplers below, or another program\'s name: "DPM++ 2M Karras"')
    add("--seed", type=int, default=0, help="seed of the first picture; picture i uses seed + i (default 0)")
    add("-n", "--n", type=int, default=1, help="pictures per prompt (default 1); with torchrun, write -n")
    add("--height", type=int, help="in pixels")
    add("--width", type=int, help="in pixels")
    add = parser.add_argument_group("where").add_argument
    add("--out", default="outputs", help="the folder for the pictures (default outputs)")
    add("--batch-size", type=int, default=4, help="pictures per batch (default 4)")
    add("--tile", type=int, metavar="N", help="decode large pictures in tiles of N x N latents")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--offload", action="store_true", help="keep weights in main memory until they are needed on the GPU")
    add("--preview", action="store_true", help="write preview.png while sampling")
    add("--grid", action="store_true", help="also write all pictures on one sheet, grid.png")
    add("--json", action="store_true", help="print one JSON line per picture")
    plugin_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, such as guidance.rescale=0.7")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    others = {name: [alias for alias in samplers.SOLVERS if samplers.SOLVERS[alias] == name] for name in solvers()}
    lines = [f"  {name:16} {', '.join(aliases)}".rstrip() for name, aliases in others.items()]
    spacings = f"a spacing may follow the name: {', '.join(samplers.SPACINGS).replace('_', ' ')}"
    parser.epilog = "\n".join(["samplers, and other names for them:", *lines, spacings])


def solvers() -> list[str]:
    """The names of all solvers."""
    return list(parts.TABLES["solver"])


def run(arguments: argparse.Namespace) -> int:
    """Check everything that costs nothing, then load, sample and write."""
    order = read_order(arguments)
    out = writable(Path(arguments.out))
    from ldm.distributed import gather, torchrun_rank  # torch is imported once all options are right

    rank = torchrun_rank()
    warnings.showwarning = show_warning
    pipe = open_pipeline(order, arguments.device, arguments.offload)
    for note in notes(pipe, order) if rank.number == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    on_step = preview(pipe, out, order.tile) if arguments.preview and rank.number == 0 else None
    made = []
    for picture in make(pipe, order, arguments.batch_size, on_step, progress=not arguments.json):
        file = picture.save(out)
        print(json.dumps({"file": str(file), **picture.record}) if arguments.json else file, flush=True)
        made.append((picture.image, f"seed {picture.request.seed}: {picture.request.prompt}"))
    if arguments.grid:
        rows = itertools.zip_longest(*gather(made, rank))
        if rank.number == 0:
            sheet = write_grid([pair for row in rows for pair in row if pair is not None], out)
            print(json.dumps({"grid": str(sheet)}) if arguments.json else sheet)
    return 0


def open_pipeline(order: Order, device: str, offload: bool = False, checkpoint: str | None = None) -> Pipeline:
    """The model of an order, ready to sample."""
    from ldm import pipeline

    return pipeline.load(
        checkpoint or order.checkpoint,
        vae=order.vae,
        overrides=[text for text in order.overrides if not text.startswith(SAMPLING)],
        device=device,
        precision=order.precision,
        offload=offload,
    )


def notes(pipe: Pipeline, order: Order) -> Iterator[str]:
    """What the user should know about the file, and the words that its text encoder has not seen."""
    yield from pipe.loaded.notes if pipe.loaded else ()
    unseen = unseen_words(pipe, [*order.prompts, order.negative])
    if order.checkpoint is None:  # its tokenizer was learned before it was trained on scenes of several objects
        unseen = [word for word in unseen if word not in parts.load("ldm.scenes.captions:VOCABULARY")]
    if unseen:
        hint = "" if order.checkpoint else "; try --ckpt FILE for another model, such as a Stable Diffusion file"
        yield f"the model's text encoder has not seen: {', '.join(unseen)}{hint}"


def unseen_words(pipe: Pipeline, prompts: Sequence[str]) -> list[str]:
    """The words that were not in the captions from which the model's tokenizer was learned, if it was.

    Learning merges each word that occurs twice into one token, until the vocabulary is full.
    """
    from ldm.conditioning.text import text_in
    from ldm.conditioning.tokenizer import BPE, words

    text = text_in(pipe.conditioner)
    tokenizer = None if text is None or text.standard_tokenizer else text.tokenizer
    if text is None or not isinstance(tokenizer, BPE) or tokenizer.vocabulary or tokenizer.size >= text.vocabulary:
        return []
    split = [tokenizer.word(word) for prompt in prompts for word in words(prompt)]
    return [word for word in dict.fromkeys(tokenizer.decode(ids) for ids in split if len(ids) > 1) if word.isalpha()]


def writable(out: Path) -> Path:
    """The folder for the results, created if it does not exist."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise InputError("--out: cannot be written to", str(out), error.strerror or "", hint="another folder") from None


def png_file(name: str) -> Path:
    """The file for one picture, if it can be written."""
    file = Path(name)
    if file.suffix.lower() != ".png" or file.is_dir() or not file.parent.is_dir():
        raise InputError("cannot write the picture", str(file), expected="a .png file in a folder that exists")
    return file


def read_order(arguments: argparse.Namespace) -> Order:
    """The options as an order, or the first thing that is wrong with them."""
    arguments.prompts = read_prompts(arguments)
    check_numbers(arguments)
    for prompt in [*arguments.prompts, arguments.negative]:
        check_length(prompt)
    if arguments.sampler is not None:
        samplers.parse(arguments.sampler)
    for name in ("init_image", "mask", "condition"):
        file = getattr(arguments, name)
        if file is not None and not Path(file).is_file():
            raise InputError(f"--{name.replace('_', '-')}: no such file", file)
    if arguments.mask is not None and arguments.init_image is None:
        raise InputError("--mask: nothing to repaint", "command line", hint="--init-image FILE")
    return Order(**{each.name: getattr(arguments, each.name) for each in fields(Order)})


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that no model can use."""
    last = 2**32 - len(arguments.prompts) * arguments.n
    ranges = {
        "cfg": (math.isfinite(arguments.cfg or 0), "a finite number"),
        "seed": (0 <= arguments.seed <= last, "at least 0, and below 2**32 for all pictures"),
        "strength": (0 < arguments.strength <= 1, "above 0 and at most 1"),
    }
    for name in ("n", "steps", "height", "width", "tile", "batch_size"):
        value = getattr(arguments, name)
        ranges[name] = (value is None or value >= 1, "at least 1")
    for name, (valid, expected) in ranges.items():
        if not valid:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option}: out of range", "command line", str(getattr(arguments, name)), expected)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file."""
    prompts = list(arguments.prompts)
    if arguments.prompts_file is not None:
        try:
            lines = Path(arguments.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            got = getattr(error, "strerror", None) or str(error)
            raise InputError("--prompts-file: cannot be read", arguments.prompts_file, got, "UTF-8 text") from None
        prompts += [line.strip() for line in lines if line.strip()]
        if len(prompts) == len(arguments.prompts):
            raise InputError("--prompts-file: has no prompts", arguments.prompts_file, expected="one prompt per line")
    return prompts or [""]


@dataclass(frozen=True)
class Picture:
    """A picture and everything that made it. `place` is (index, size) in its batch, on which its last bits depend."""

    image: Image.Image
    request: Request
    record: dict[str, Any]
    place: tuple[int, int]

    def save(self, out: Path) -> Path:
        """A PNG named after its prompt, its seed, and eight hexadecimal digits of everything else."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.request.prompt.lower()).strip("-")[:60] or "picture"
        digest = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:8]
        file = out / f"{slug}_{self.request.seed}_{digest}.png"
        self.write(file)
        return file

    def write(self, file: Path) -> None:
        """A PNG that stores how it was made."""
        from ldm import pictures

        texts = {"parameters": a1111(self.record), "ldm": json.dumps({**self.record, "place": self.place})}
        pictures.write(self.image, file, texts)


def make(
    pipe: Pipeline, order: Order, batch_size: int, on_step: OnStep | None = None, progress: bool = True
) -> Iterator[Picture]:
    """The pictures of an order, one batch after the other; under torchrun, this process's share of them."""
    from ldm.distributed import torchrun_rank

    rank = torchrun_rank()
    settings, requests = read_settings(pipe, order), read_requests(order)[rank.number :: rank.of]
    for batch, images in pipe.batches(requests, settings, batch_size, on_step, progress):
        for i, image in enumerate(images):
            yield Picture(image, batch[i], record(pipe, order, batch[i], settings), (i, len(batch)))


def read_requests(order: Order) -> list[Request]:
    """One request for each picture; picture i has the noise of seed + i."""
    from ldm.pipeline import Request

    prompts = [prompt for prompt in order.prompts for _ in range(order.n)]
    return [Request(prompt, order.negative, order.label, order.seed + i) for i, prompt in enumerate(prompts)]


def read_settings(pipe: Pipeline, order: Order) -> SamplingSettings:
    """How this model makes the pictures of an order."""
    from ldm import pictures

    files = {"image": order.init_image, "mask": order.mask}
    images: dict[str, Any] = {name: pictures.read(file) for name, file in files.items() if file is not None}
    names = ("cfg", "steps", "overrides", "height", "width", "strength", "condition", "tile")
    return pipe.settings(solver=order.sampler, **{name: getattr(order, name) for name in names}, **images)


def record(pipe: Pipeline, order: Order, request: Request, settings: SamplingSettings) -> dict[str, Any]:
    """What `ldm replay` needs to make this one picture again, and to know whether it can."""
    import torch

    files = (order.init_image, order.mask, order.condition)
    one = replace(order, prompts=[request.prompt], seed=request.seed, n=1, precision=pipe.precision)
    return {
        "order": asdict(replace(one, height=settings.height, width=settings.width)),
        "checkpoint": pipe.loaded.hash if pipe.loaded else "",
        "inputs": {file: file_digest(file) for file in files if file is not None},
        "config": {name: settings.config[name] for name in SAMPLING},
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


def write_grid(made: Sequence[tuple[Image.Image, str]], out: Path) -> Path:
    """All pictures with their captions on one sheet, in the first of grid.png, grid-2.png, ... that does not exist."""
    from ldm import pictures

    names = itertools.chain(["grid.png"], (f"grid-{number}.png" for number in itertools.count(2)))
    file = next(out / name for name in names if not (out / name).exists())
    pictures.write(pictures.grid([image for image, _ in made], captions=[text for _, text in made]), file)
    return file


def preview(pipe: Pipeline, out: Path, tile: int | None) -> OnStep:
    """Write the predicted x0 of the first picture to preview.png every fifth step."""
    from ldm import pictures

    def write(number: int, step: Step) -> None:
        if number % 5 == 4:
            pictures.write(pictures.to_pil(pipe.decode(step.prediction.x0[:1], tile))[0], out / "preview.png")

    return write
