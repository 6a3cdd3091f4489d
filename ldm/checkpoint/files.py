"""The one place that opens and writes tensor files: safetensors, memory-mapped; pickles for `ldm convert` alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.errors import CheckpointError

DTYPES = {  # of weights, by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()} | {torch.bool: "BOOL"}
COUNTS = (torch.int64, torch.int32, torch.bool)  # buffers of plugins' networks
FORMAT = "a .safetensors file"
AGAIN = "copy or download it again"
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # a key in its files of 2021
DIGEST = "sha256"  # the metadata's key; the digest is that of the file with this value blank
BLANK = "0" * 64


class Tensors(Mapping[str, Tensor]):
    """The tensors of one file by name, memory-mapped when they are read; shapes cost nothing."""

    def __init__(
        self,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        get: Callable[[str], Tensor],
        metadata: Mapping[str, str] = MappingProxyType({}),
    ):
        self.path, self.shapes, self.get_tensor, self.metadata = path, shapes, get, metadata

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_file(path: str | Path) -> Tensors:
    """A safetensors file; its header is checked first, so that an error is one readable line."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with readable(path) as file:
        header = read_header(file, path)
    try:
        get = safe_open(path, framework="pt").get_tensor
    except SafetensorError as error:  # whatever else is wrong
        raise CheckpointError("the header is damaged", str(path), str(error), FORMAT, AGAIN) from error
    metadata = header.pop("__metadata__", {})
    return Tensors(path, {name: tuple(entry["shape"]) for name, entry in header.items()}, get, metadata)


@contextmanager
def readable(path: Path) -> Iterator[BinaryIO]:
    """The open file, or a readable error."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError("no such file", str(path)) from error
    except OSError as error:
        raise CheckpointError("cannot be read", str(path), error.strerror or str(error), FORMAT) from error


def read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The JSON at the start of a safetensors file: each tensor's type, shape and offsets."""
    where, size, start = str(path), os.fstat(file.fileno()).st_size, file.read(40)
    if size == 0:
        raise CheckpointError("the file is empty", where, "0 bytes", FORMAT, AGAIN)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError("a Git LFS pointer, not the file itself", where, f"{size} bytes", FORMAT, "git lfs pull")
    if pickled(start):
        hint = "`ldm convert SRC DST.safetensors`, which reads weights and runs nothing"
        raise CheckpointError("a pickle, which is not opened here", where, expected=FORMAT, hint=hint)
    length = int.from_bytes(start[:8], "little")
    if size < 10 or start[8:9] != b"{" or length > 100_000_000:
        raise CheckpointError("not a safetensors file", where, f"it begins with {start[:8]!r}", FORMAT)
    if length > size - 8:
        truncated(where, size, f"a header of {length} bytes")
    file.seek(8)
    try:
        header: dict[str, Any] = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError("the header is damaged", where, str(error), FORMAT, AGAIN) from error
    if 8 + length + end > size:
        truncated(where, size, f"{8 + length + end} bytes")
    return header


def truncated(where: str, size: int, expected: str) -> None:
    """Refuse a file that ends too early."""
    raise CheckpointError("the file is truncated", where, f"{size} bytes", expected, AGAIN)


def is_pickle(path: str | Path) -> bool:
    """True if a file is a pickle, whatever its name."""
    with readable(Path(path)) as file:
        return pickled(file.read(9))


def pickled(start: bytes) -> bool:
    """True if a file with this start is a pickle; the length at the start of a safetensors file may look like one."""
    return start.startswith(PICKLES) and start[8:9] != b"{"


class Callback:
    """Stands for the class that Lightning's old files have as a key; it is never instantiated."""


def open_pickle(path: str | Path) -> Tensors:
    """The tensors of a .ckpt or .pt, memory-mapped where the format allows; only weights are unpickled."""
    path = Path(path)
    with readable(path) as file:
        zipped = file.read(4) == PICKLES[0]
    try:
        with torch.serialization.safe_globals([(Callback, LIGHTNING)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # behind torch's advice to trust the file
        got = f"{named[1]} in it" if named else (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError("not a pickle of plain weights", str(path), got, "tensors in dictionaries") from error
    for key in ("state_dict", "ema"):  # CompVis; DiT's training script
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise CheckpointError("holds no state dict", str(path), type(content).__name__, "a dictionary of tensors")
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return Tensors(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def kept(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type that a tensor is written in: `dtype` for weights, its own for counts and single numbers."""
    return dtype if dtype and x.is_floating_point() and x.ndim else x.dtype


def rounded(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as they will be after writing and reading."""
    return {name: x.to(kept(x, dtype)) for name, x in state.items()}


def write_file(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> str:
    """Write all or nothing, one tensor at a time, weights in `dtype`; returns the digest that the file stores."""
    dtypes = {name: kept(x, dtype) for name, x in state.items()}
    names = sorted(state, key=lambda name: (-dtypes[name].itemsize, name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, DIGEST: BLANK}}
    end = 0
    for name in names:
        shape, begin, end = list(state[name].shape), end, end + state[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(text)
    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = raw(state[name].to(dtypes[name]))
            digest.update(data)
            file.write(data)
        file.seek(8 + text.index(BLANK.encode()))
        file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def check_digest(path: str | Path, tensors: Tensors | None = None) -> str:
    """The digest that one of our files stores, or an error if its bytes have another.

    With the file's `tensors` their numbers are checked too, and every byte is still read once.
    """
    path = Path(path)
    wrong: tuple[list[str], list[str]] = ([], [])
    with readable(path) as file:
        stored: str = read_header(file, path)["__metadata__"][DIGEST]
        file.seek(0)
        text = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256(text.replace(stored.encode(), BLANK.encode()))
        if tensors is not None:
            wrong = wrong_numbers(tensors, (*DTYPES.values(), *COUNTS), digest)
        while tensors is None and (block := file.read(2**20)):
            digest.update(block)
    if digest.hexdigest() != stored:
        got, hint = f"sha256 {digest.hexdigest()[:10]}", AGAIN
        raise CheckpointError("the file is damaged", str(path), got, f"{stored[:10]}, as when it was saved", hint)
    refuse_numbers(tensors or {}, *wrong, str(path))
    return stored


def raw(tensor: Tensor) -> Any:
    """A tensor's bytes, without a copy where it is contiguous."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` once it is written and on the disk; on failure `path` stays as it was."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        flush_folder(path.parent)
    except OSError as error:
        raise CheckpointError("cannot be written", str(path), error.strerror or str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: str | Path) -> str:
    """A file's sha256, as other programs compute it."""
    with readable(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def check_numbers(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that hold NaN or infinity, or are not floating point."""
    refuse_numbers(state, *wrong_numbers(state, tuple(DTYPES.values())), where)


def wrong_numbers(
    state: Mapping[str, Tensor], legal: tuple[torch.dtype, ...], digest: Any = None
) -> tuple[list[str], list[str]]:
    """The tensors of another type than the legal ones, and those with NaN or infinity; adds all bytes to `digest`."""
    types, broken = [], []
    for name, x in state.items():
        if digest is not None:
            digest.update(raw(x))
        if x.dtype not in legal:
            types.append(name)
        elif x.is_floating_point() and x.numel() and not torch.stack(torch.aminmax(x)).isfinite().all():
            broken.append(name)
    return types, broken


def refuse_numbers(state: Mapping[str, Tensor], types: list[str], broken: list[str], where: str) -> None:
    """Raise if there are names, with their count and the first five."""
    details: dict[str, Callable[[Tensor], Any]] = {
        "weights must be floating point": lambda x: NAMES.get(x.dtype, x.dtype),
        "weights hold NaN or infinity": lambda x: int((~x.isfinite()).sum()),
    }
    for (what, detail), names in zip(details.items(), (types, broken)):
        if names:
            shown = ", ".join(f"{name} ({detail(state[name])})" for name in names[:5]) + ", ..." * (len(names) > 5)
            raise CheckpointError(what, where, f"{len(names)}: {shown}", "finite numbers in F32, F16 or BF16")
