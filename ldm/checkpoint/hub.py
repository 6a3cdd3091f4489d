"""Models by their names on a hub: which files of a repository are opened here, brought through the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ldm.checkpoint.formats.diffusers import INDEX, READ, STEMS
from ldm.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # what ends so is a file, also one that is missing
OURS = "model.safetensors"  # as training calls it
NONE = "-"  # a pattern of no file


def on_hub(name: str) -> bool:
    """Whether this is a hub's id: it looks like one, and is nothing that lies here or should."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(WEIGHTS) and not Path(name).exists()


def local(path: str | Path) -> Path:
    """The file or folder itself; a hub is asked only for what looks like its id and is not here."""
    if not on_hub(str(path)):
        return Path(path)
    folder = brought(str(path), model_files)
    theirs = any((folder / name).is_file() for name in (INDEX, "config.json"))
    return folder / OURS if not theirs and (folder / OURS).is_file() else folder


def brought(identity: str, chosen: Callable[[list[str]], list[str]]) -> Path:
    """The folder with those of a repository's files that are chosen by name; without a network, as the cache has it."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().model_info(identity).siblings or ()]
    except Exception as error:  # whatever the network, the hub and its library raise
        try:
            return Path(snapshot_download(identity, local_files_only=True, allow_patterns=[NONE]))
        except Exception:
            raise absent(identity, error) from error
    if not (asked := chosen(names)):
        got, hint = ", ".join(names[:5]) or "no files", "downloading a file of it, and its path"
        raise CheckpointError("nothing in that repository is opened by its name", identity, got, hint=hint)
    try:
        return Path(snapshot_download(identity, allow_patterns=asked))
    except Exception as error:
        raise absent(identity, error) from error


def absent(identity: str, error: Exception) -> CheckpointError:
    """What to say of a model that nobody could bring."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    expected = "a file, a folder or a hub's id"
    return CheckpointError("neither here nor to be had from a hub", identity, reason, expected)


def model_files(names: Sequence[str]) -> list[str]:
    """Of a repository's files a pipeline's parts, a first stage, or a file of ours, whichever it has."""
    if INDEX in names:
        return [INDEX, *(name for part in READ for name in part_files(names, part))]
    if any(name.startswith(STEMS[0]) for name in names):
        return part_files(names, ".")
    return [OURS] if OURS in names else []


def part_files(names: Sequence[str], folder: str) -> list[str]:
    """A part's settings and vocabularies, and its weights: plain ones, else those in half precision, else any."""
    here = [name for name in names if str(PurePosixPath(name).parent) == folder]
    weights = [name for name in here if name.endswith(".safetensors")]
    plain = [name for name in weights if PurePosixPath(name).name.count(".") == 1]
    half = [name for name in weights if ".fp16" in name]
    return [name for name in here if name.endswith((".json", ".txt"))] + (plain or half or weights)
