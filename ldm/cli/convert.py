"""Convert a checkpoint to our format, a CompVis single file or a diffusers folder; also reads .ckpt and .pt files."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import plugin_option
from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.checkpoint import Checkpoint

FORMATS = ("ldm", "compvis", "diffusers")
DTYPES = ("float32", "float16", "bfloat16")
SAMPLED = ("guidance", "spacing", "solver")  # nodes that say how a checkpoint is sampled


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "source", metavar="SRC", help="any checkpoint: a file, a diffusers folder, or a repository on the Hub"
    )
    parser.add_argument("target", metavar="DST", help="a .safetensors file, or a new folder for diffusers")
    parser.add_argument("--to", choices=FORMATS, help="the format (default: ldm for a file, diffusers for a folder)")
    parser.add_argument("--dtype", choices=DTYPES, help="the type of the weights (default: unchanged)")
    parser.add_argument("--vae", metavar="PATH", help="another checkpoint, whose autoencoder (VAE) is used")
    plugin_option(parser)
    parser.add_argument("--prediction", choices=("eps", "v"), help="the prediction type, if it was detected wrongly")
    what = "a sampling setting of DST, such as guidance.cfg=3, or an encoder that SRC does not contain"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"{what}: conditioner.weights=FOLDER")


def run(arguments: argparse.Namespace) -> int:
    """Open, describe, write."""
    target = Path(arguments.target)
    layout = check(target, arguments.to)
    import torch

    from ldm import assemble, checkpoint

    loaded = checkpoint.open(arguments.source, vae=arguments.vae, pickles=True)
    sampled = [words for words in arguments.overrides if words.startswith(SAMPLED)]
    encoders = [words for words in arguments.overrides if words not in sampled]
    if encoders and not loaded.config.get("left_out"):
        raise InputError("SRC already contains all its encoders", arguments.source, encoders[0])
    if sampled:
        loaded = with_sampling(loaded, sampled)
    if layout != "ldm" or encoders:
        loaded = assemble.whole(loaded, encoders)
    if arguments.prediction:
        loaded.config["prediction"] = {"type": arguments.prediction}
    count = sum(x.numel() for x in loaded.state.values())
    print(f"{arguments.source}: {loaded.family}, {len(loaded.state)} tensors, {count / 1e6:.1f} M parameters")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    for note in loaded.notes + write(loaded, target, layout, dtype):
        print(f"note: {note}")
    print(f"wrote {target} ({layout}{', ' + arguments.dtype if arguments.dtype else ''})")
    return 0


def with_sampling(loaded: Checkpoint, overrides: list[str]) -> Checkpoint:
    """The checkpoint with other sampling settings."""
    from ldm import assemble

    source = str(loaded.files[0])
    if not loaded.config.get("backbone"):
        raise InputError("an autoencoder has no sampling settings", source, overrides[0])
    config = assemble.configure(loaded.config, source, overrides)
    assemble.sampler(config, config.build("path"))  # refuses settings that cannot be built
    return replace(loaded, config={**loaded.config, **{name: config[name] for name in SAMPLED}})


def check(target: Path, layout: str | None) -> str:
    """The format to write, if the target can be written."""
    layout = layout or ("ldm" if target.suffix else "diffusers")
    if layout != "diffusers" and target.suffix != ".safetensors":
        raise InputError("not the name of a weights file", "DST", str(target), "NAME.safetensors")
    if not target.absolute().parent.is_dir():
        raise InputError("no such folder", "DST", str(target.parent), "a folder that exists")
    if layout == "diffusers" and target.exists():
        raise InputError("exists already", "DST", str(target), "a new folder")
    return layout


def write(loaded: Checkpoint, target: Path, layout: str, dtype: Any) -> list[str]:
    """Write in a format; returns notes for the user."""
    from ldm import checkpoint

    if layout == "compvis":
        return checkpoint.write_compvis(target, loaded.config, loaded.state, dtype)
    tokenizer = tokenizer_of(loaded)
    if layout == "diffusers":
        return checkpoint.write_diffusers(target, loaded.config, loaded.state, tokenizer, dtype)
    checkpoint.save(target, loaded.config, loaded.state, tokenizer.to_json() if tokenizer else None, dtype)
    return []


def tokenizer_of(loaded: Checkpoint) -> Any:
    """The checkpoint's tokenizer, or CLIP's if the model has its vocabulary, or None."""
    from ldm.conditioning.tokenizer import clip_tokenizer, from_checkpoint

    if loaded.tokenizer is not None:
        return from_checkpoint(loaded.tokenizer)
    conditioner = loaded.config.get("conditioner") or {}
    node = conditioner.get("parts", [conditioner])[0]
    if node.get("type") in ("clip", "open_clip") and node["vocabulary"] == 49408:
        return clip_tokenizer(0 if node["type"] == "open_clip" else 49407)
    return None
