"""Models on the Hub: only the files that are used are downloaded, through the Hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ldm.checkpoint.families import folder_parts
from ldm.checkpoint.formats.diffusers import INDEX, STEMS
from ldm.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # a name with such an ending is a file, even a missing one
OURS = "model.safetensors"  # as training calls it
NONE = "-"  # a pattern that matches no file


def on_hub(name: str) -> bool:
    """True if this is an id of the Hub: it looks like one, and is not a local file, missing or not."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(WEIGHTS) and not Path(name).exists()


def local(path: str | Path) -> Path:
    """The file or folder; the Hub is asked only for a name that looks like its id and is not found locally."""
    if not on_hub(str(path)):
        return Path(path)
    folder = download(str(path), model_files)
    diffusers = any((folder / name).is_file() for name in (INDEX, "config.json"))
    return folder / OURS if not diffusers and (folder / OURS).is_file() else folder


def download(identity: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """The folder with the chosen files of a repository; without a network, what the cache has."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().model_info(identity).siblings or ()]
    except Exception as error:  # whatever the network, the Hub and its library raise
        try:
            return Path(snapshot_download(identity, local_files_only=True, allow_patterns=[NONE]))
        except Exception:
            raise not_found(identity, error) from error
    if not (chosen := choose(names)):
        got, hint = ", ".join(names[:5]) or "no files", "downloading one of its files and giving its path"
        raise CheckpointError("no supported file in this repository", identity, got, hint=hint)
    try:
        return Path(snapshot_download(identity, allow_patterns=chosen))
    except Exception as error:
        raise not_found(identity, error) from error


def not_found(identity: str, error: Exception) -> CheckpointError:
    """The error about a model that cannot be downloaded."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    expected = "a file, a folder or an id of the Hub"
    return CheckpointError("not found locally or on the Hub", identity, reason, expected)


def model_files(names: Sequence[str]) -> list[str]:
    """The files of a repository that are read: a pipeline's parts, a first stage, or a file of ours."""
    if INDEX in names:
        return [INDEX, *(name for part in folder_parts() for name in part_files(names, part))]
    if any(name.startswith(STEMS[0]) for name in names):
        return part_files(names, ".")
    return [OURS] if OURS in names else []


def part_files(names: Sequence[str], folder: str) -> list[str]:
    """A part's settings and vocabularies, and its weights: plain ones, else those in half precision, else any."""
    inside = [name for name in names if str(PurePosixPath(name).parent) == folder]
    weights = [name for name in inside if name.endswith(".safetensors")]
    plain = [name for name in weights if PurePosixPath(name).name.count(".") == 1]
    half = [name for name in weights if ".fp16" in name]
    return [name for name in inside if name.endswith((".json", ".txt"))] + (plain or half or weights)
