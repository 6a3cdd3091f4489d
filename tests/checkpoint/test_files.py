"""The file formats: whatever is wrong with a file is one line, and a save is whole or leaves the old file."""

import json
import os
import pickle
import stat
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import checkpoint
from ldm.checkpoint import files
from ldm.checkpoint.networks import fingerprint
from ldm.errors import CheckpointError
from tests.checkpoint.made_up import make

AGAIN = "try copy or download it again"


def refusal(path, **options) -> str:
    """The whole message with which a file is refused."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(path, **options)
    return str(error.value)


@pytest.fixture
def whole(tmp_path) -> Path:
    """A small checkpoint of ours."""
    path = tmp_path / "whole.safetensors"
    checkpoint.save(path, *make("kl"), tokenizer='{"type": "clip", "pad": 0}')
    return path


def test_our_file_returns_everything(whole):
    loaded = checkpoint.open(whole)
    config, state = make("kl")
    assert loaded.config == config
    assert loaded.tokenizer == '{"type": "clip", "pad": 0}'
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[name], state[name]) for name in state)
    with safe_open(whole, "pt") as file:  # what others see
        metadata = file.metadata()
    assert metadata.keys() == {"format", "ldm", "config", "version", "tokenizer", "sha256"}
    assert loaded.hash == metadata["sha256"]
    theirs = load_file(whole)
    assert all(torch.equal(theirs[name], state[name]) for name in state)


def test_a_type_is_written_for_weights_but_not_for_the_latents_scale(tmp_path):
    config, state = make("kl")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        checkpoint.save(tmp_path / "x.safetensors", config, state, dtype=dtype)
        loaded = checkpoint.open(tmp_path / "x.safetensors")
        assert loaded.state["autoencoder.quant.bias"].equal(state["autoencoder.quant.bias"].to(dtype))
        assert loaded.state["autoencoder.scale"].equal(state["autoencoder.scale"])


def test_a_rounded_first_stage_has_the_fingerprint_that_its_file_says(tmp_path):
    """Or nobody could train on from a file that was made smaller."""
    config, state = make("kl")
    whole = fingerprint(config["autoencoder"], state)
    for named, expected in ((whole, None), ("of another", "of another")):
        checkpoint.save(tmp_path / "x.safetensors", {**config, "fingerprint": named}, state, dtype=torch.bfloat16)
        loaded = checkpoint.open(tmp_path / "x.safetensors")
        own = fingerprint(loaded.config["autoencoder"], loaded.state)
        assert loaded.config["fingerprint"] == (expected or own)
        assert own != whole


def test_every_shape_and_type_survives_and_is_aligned(tmp_path):
    state = {
        "half": torch.randn(3).half(),
        "brain": torch.randn(5, 1).bfloat16(),
        "double": torch.randn(2, 2).double(),
        "strided": torch.randn(4, 6).T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "view": torch.randn(9)[3:5],
    }
    files.write_file(tmp_path / "x.safetensors", state, {})
    for read in (load_file(tmp_path / "x.safetensors"), dict(files.open_file(tmp_path / "x.safetensors"))):
        assert read.keys() == state.keys()
        assert all(read[name].dtype == x.dtype and torch.equal(read[name], x) for name, x in state.items())
    with open(tmp_path / "x.safetensors", "rb") as file:
        header = files.read_header(file, tmp_path)
        start = 8 + int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    for name, x in state.items():
        assert (start + header[name]["data_offsets"][0]) % x.element_size() == 0


def test_any_flipped_byte_is_found(whole, tmp_path):
    content = whole.read_bytes()
    length = int.from_bytes(content[:8], "little")
    places = {"length": 0, "name": 8 + content[8:].index(b"encoder"), "shape": 8 + content[8:].index(b"64")}
    places |= {"config": content.index(b"mid_attention"), "sha256": content.index(b'sha256": "') + 12}
    places |= {"padding": 7 + length, "first": 8 + length, "middle": len(content) // 2, "last": len(content) - 1}
    for place in places.values():
        for bit in (1, 64):
            flipped = bytearray(content)
            flipped[place] ^= bit
            (tmp_path / "flipped.safetensors").write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"damaged|truncated|not a safetensors"):
                checkpoint.open(tmp_path / "flipped.safetensors")
    message = refusal(tmp_path / "flipped.safetensors")
    assert message.startswith(f"the file is damaged ({tmp_path}/flipped.safetensors); got sha256 ")
    assert message.endswith(f", as when it was saved; {AGAIN}")


def test_files_that_are_no_checkpoints(whole, tmp_path):
    content, path = whole.read_bytes(), tmp_path / "bad.safetensors"
    length, size = int.from_bytes(content[:8], "little"), len(content)
    torch.save({"a": torch.ones(1)}, tmp_path / "zip.ckpt")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n"
    hint = "`ldm convert SRC DST.safetensors`, which reads weights and runs nothing"
    expected = "expected a .safetensors file"
    cases = {
        b"": f"the file is empty ({path}); got 0 bytes; {expected}; {AGAIN}",
        lfs: f"a Git LFS pointer, not the file itself ({path}); got {len(lfs)} bytes; {expected}; try git lfs pull",
        pickle.dumps({"a": 1}): f"a pickle, which is not opened here ({path}); {expected}; try {hint}",
        (tmp_path / "zip.ckpt").read_bytes(): f"a pickle, which is not opened here ({path}); {expected}; try {hint}",
        b"GIF89a\x01\x00" + b"0" * 99: f"not a safetensors file ({path}); got it begins with "
        f"b'GIF89a\\x01\\x00'; {expected}",
        content[:100]: f"the file is truncated ({path}); got 100 bytes; expected a header of {length} bytes; {AGAIN}",
        content[:-1]: f"the file is truncated ({path}); got {size - 1} bytes; expected {size} bytes; {AGAIN}",
        content[:5]: f"not a safetensors file ({path}); got it begins with {content[:5]!r}; {expected}",
        content[:8] + b"{" * length: f"the header is damaged ({path}); got Expecting property name enclosed in double "
        f"quotes: line 1 column 2 (char 1); {expected}; {AGAIN}",
    }
    for bad, message in cases.items():
        path.write_bytes(bad)
        assert refusal(path) == message


def test_what_is_not_there_or_no_file(tmp_path):
    assert refusal(tmp_path / "none.safetensors") == f"no such file ({tmp_path}/none.safetensors)"
    assert refusal(tmp_path) == (
        f"a folder without model_index.json ({tmp_path}); got neither that nor config.json; "
        "expected a folder that diffusers has written"
    )


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 2)])
def test_weights_that_are_not_numbers(value, count, tmp_path):
    config, state = make("kl")
    broken = state["autoencoder.quant.bias"].clone()
    broken[:count] = value
    checkpoint.save(tmp_path / "x.safetensors", config, state | {"autoencoder.quant.bias": broken})
    assert refusal(tmp_path / "x.safetensors") == (
        f"weights hold NaN or infinity ({tmp_path}/x.safetensors); got 1: autoencoder.quant.bias ({count}); "
        "expected finite numbers in F32, F16 or BF16"
    )


def test_weights_of_a_wrong_type(tmp_path):
    config, state = make("kl")
    whole = {name: x.to(torch.int8) for name, x in state.items() if name.endswith("bias")}
    checkpoint.save(tmp_path / "x.safetensors", config, state | whole)
    message = refusal(tmp_path / "x.safetensors")
    start = f"weights must be floating point ({tmp_path}/x.safetensors); got {len(whole)}: "
    assert message.startswith(start)
    assert message.endswith("(I8), ...; expected finite numbers in F32, F16 or BF16")
    checkpoint.write_compvis(tmp_path / "y.safetensors", config, state)
    quantised = {name: x.to(torch.float8_e4m3fn) for name, x in load_file(tmp_path / "y.safetensors").items()}
    save_file(quantised, tmp_path / "x.safetensors")
    start = f"weights must be floating point ({tmp_path}/x.safetensors); got {len(state)}: "
    assert refusal(tmp_path / "x.safetensors").startswith(start)


def test_a_newer_format_is_not_guessed_at(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_file(path, {"a": torch.ones(1)}, {"ldm": "2", "config": "{}"})
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors", {"ldm": "1"})
    assert (
        refusal(tmp_path / "y.safetensors") == f"incomplete metadata ({tmp_path}/y.safetensors); got no config; {AGAIN}"
    )
    assert refusal(path) == f"written by a newer version ({path}); got format 2; expected 1; try a newer ldm"


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_whole(where, whole, monkeypatch):
    before = whole.read_bytes()
    config, state = make("vq")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    if where == "write":
        raw, calls = files.raw, []
        monkeypatch.setattr(files, "raw", lambda x: calls.append(0) or (fail() if len(calls) > 9 else raw(x)))
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(CheckpointError) as error:
        checkpoint.save(whole, config, state)
    assert str(error.value) == f"cannot be written ({whole}); got No space left on device"
    assert whole.read_bytes() == before
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]
    monkeypatch.undo()
    checkpoint.save(whole, config, state)
    assert checkpoint.open(whole).config == config


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(CheckpointError) as error:
        checkpoint.save(tmp_path / "none" / "x.safetensors", *make("kl"))
    assert str(error.value) == f"cannot be written ({tmp_path}/none/x.safetensors); got No such file or directory"


class Evil:
    """Runs when it is unpickled, if anything does that."""

    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle_is_a_header(length, tmp_path):
    path, x = tmp_path / "a.safetensors", torch.arange(3.0)
    files.write_file(path, {"x": x}, {"fill": ""})
    short = int.from_bytes(path.read_bytes()[:8], "little")
    files.write_file(path, {"x": x}, {"fill": "." * (length - short)})
    assert path.read_bytes()[:2] == length.to_bytes(2, "little")
    assert not files.is_pickle(path)
    assert files.open_file(path)["x"].equal(x)


def test_a_file_of_lightning_s_old_days_is_read(tmp_path, monkeypatch):
    """Its callbacks have a class for a key, as the published files of 2021 do."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    checkpoint.write_compvis(tmp_path / "x.safetensors", *make("kl"))
    content = {"state_dict": load_file(tmp_path / "x.safetensors"), "epoch": 3}
    torch.save(content | {"callbacks": {sys.modules[name].ModelCheckpoint: {"best": None}}}, tmp_path / "old.ckpt")
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.delitem(sys.modules, part)
    loaded = checkpoint.open(tmp_path / "old.ckpt", pickles=True)
    assert all(torch.equal(loaded.state[key], x) for key, x in make("kl")[1].items())


def test_our_files_may_hold_whole_numbers(tmp_path):
    """A backbone of a user's own may count; other people's weights may not be quantised."""
    config, state = make("kl")
    counted = {**state, "autoencoder.norm.num_batches_tracked": torch.tensor(7)}
    checkpoint.save(tmp_path / "ours.safetensors", config, counted)
    assert checkpoint.open(tmp_path / "ours.safetensors").state["autoencoder.norm.num_batches_tracked"] == 7


def test_pickles_are_read_for_converting_only_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.write_compvis(tmp_path / "x.safetensors", *make("kl"))
    tensors = load_file(tmp_path / "x.safetensors")
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "new.ckpt")
    torch.save({"state_dict": tensors}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("new.ckpt", "old.ckpt"):
        loaded = checkpoint.open(tmp_path / name, pickles=True)
        assert loaded.config == make("kl")[0]
        assert all(torch.equal(loaded.state[key], x) for key, x in make("kl")[1].items())
        assert "a pickle, which is not opened here" in refusal(tmp_path / name)
    torch.save({"state_dict": tensors, "callback": Evil()}, tmp_path / "evil.ckpt")
    message = refusal(tmp_path / "evil.ckpt", pickles=True)
    assert message.startswith(f"not a pickle of plain weights ({tmp_path}/evil.ckpt); got posix.system in it; ")
    assert message.endswith("; expected tensors in dictionaries")
    assert "\n" not in message
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], tmp_path / "list.pt")
    expected = f"holds no state dict ({tmp_path}/list.pt); got list; expected a dictionary of tensors"
    assert refusal(tmp_path / "list.pt", pickles=True) == expected


def test_the_hash_of_others_files_is_their_sha256(tmp_path):
    import hashlib

    checkpoint.write_compvis(tmp_path / "x.safetensors", *make("kl"))
    digest = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert checkpoint.open(tmp_path / "x.safetensors").hash == digest


def test_metadata_that_is_not_ours_is_not_believed(tmp_path):
    checkpoint.write_compvis(tmp_path / "x.safetensors", *make("kl"))
    for said in ("no json", "[1]", json.dumps({"format": 9})):
        save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "y.safetensors", {"config": said})
        assert checkpoint.open(tmp_path / "y.safetensors").config == make("kl")[0]
    said = dict.fromkeys(("path", "shapes", "get", "self"), "words of another program")
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "z.safetensors", said)
    assert checkpoint.open(tmp_path / "z.safetensors").config == make("kl")[0]


def test_a_file_and_then_its_folder_reach_the_disk(tmp_path, monkeypatch):
    folders, fsync = [], os.fsync
    is_folder = lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode)  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: folders.append(is_folder(handle)) or fsync(handle))
    files.write_file(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert folders == [False, True]
