"""Every wrong word to ldm sample is answered in one line, with the right status, before anything costly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import checkpoint
from tests.cli.test_sample import BALL, half_mask, models, python, run

__all__ = ["models", "run"]  # fixtures


def refused(answer: tuple[int, list[str], str], status: int, *words: str) -> None:
    """One whole line on stderr and nothing else, with these words in it, and no picture."""
    got, lines, err = answer
    assert (got, lines) == (status, []), err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "internal" not in err
    assert not [word for word in words if word not in err], err
    assert not [path for path in Path().rglob("*") if path.suffix in (".png", ".tmp") and "outputs" in path.parts]


BEFORE_TORCH = [  # options, and what the answer says
    (("--cfg", "nan"), ("--cfg", "got nan", "a finite number")),
    (("--cfg", "inf"), ("--cfg",)),
    (("--cfg", "much"), ("--cfg", "'much'")),
    (("--steps", "0"), ("--steps", "got 0", "at least 1")),
    (("--steps=-1",), ("--steps", "got -1")),
    (("--seed=-1",), ("--seed", "got -1", "2**32")),
    (("--seed", str(2**32)), ("--seed", f"got {2**32}")),
    (("--seed", str(2**32 - 1), "--n", "2"), ("--seed",)),
    (("--seed", str(2**32 - 1), "--prompt", "one more"), ("--seed",)),
    (("--n", "0"), ("--n", "got 0", "at least 1")),
    (("--n=-3",), ("--n", "got -3")),
    (("--batch-size", "0"), ("--batch-size", "got 0")),
    (("--tile", "0"), ("--tile", "got 0")),
    (("--height", "0"), ("--height", "got 0")),
    (("--width=-8",), ("--width", "got -8")),
    (("--sampler", "eular"), ("sampler: unknown", "got eular", "dpmpp_2m", "try euler")),
    (("--mask", "m.png"), ("--mask: no such file", "m.png")),
    (("--init-image", "i.png"), ("--init-image: no such file", "i.png")),
    (("--mask", "mask.png"), ("--mask", "--init-image FILE")),
    (("--prompts-file", "none.txt"), ("--prompts-file", "none.txt", "No such file")),
    (("--prompts-file", "empty.txt"), ("--prompts-file: has no prompts", "empty.txt")),
    (("--prompts-file", "latin.txt"), ("--prompts-file", "latin.txt", "UTF-8")),
    (("--prompt", "word " * 10_000), ("prompt: too long", "at most 8192")),
    (("--negative", "word " * 10_000), ("prompt: too long",)),
    (("--out", "file/below"), ("--out", "file/below", "Not a directory")),
    (("--out", "file"), ("--out", "File exists")),
    (("--init-image", "mask.png", "--strength", "0"), ("--strength", "got 0")),
    (("--init-image", "mask.png", "--strength", "2"), ("--strength", "got 2")),
    (("--init-image", "mask.png", "--strength", "nan"), ("--strength", "got nan")),
    (("--precision", "fp8"), ("--precision", "fp8")),
    (("--no-such-option",), ("--no-such-option", "--help")),
]


@pytest.fixture
def clutter(tmp_path, monkeypatch):
    """Files that wrong options point at."""
    monkeypatch.chdir(tmp_path)
    half_mask()
    Path("file").touch()
    Path("empty.txt").write_text(" \n\n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    box = [0, 0, 1, 1]
    nodes: dict[str, Any] = {
        "list": [1],
        "keys": {"boxes": [box], "classes": [0]},
        "one": {"boxes": [box], "labels": []},
        "no_list": {"boxes": [box], "labels": 0},
        "word": {"boxes": [["left", 0, 1, 1]], "labels": [0]},
        "pixels": {"boxes": [[0, 0, 64, 64]], "labels": [0]},
        "nan": {"boxes": [[0, 0, float("nan"), 1]], "labels": [0]},
        "turned": {"boxes": [[1, 0, 0.5, 1]], "labels": [0]},
        "named": {"boxes": [box], "labels": ["cube"]},
        "class": {"boxes": [box], "labels": [4]},
        "many": {"boxes": [box] * 4, "labels": [0] * 4},
    }
    for name, node in nodes.items():
        Path(f"{name}.json").write_text(json.dumps(node))


@pytest.mark.parametrize(("options", "words"), BEFORE_TORCH, ids=lambda value: "".join(value)[:40])
def test_a_wrong_option_is_answered_before_anything_is_loaded(options, words, run, clutter, monkeypatch):
    monkeypatch.setattr("ldm.pipeline.load", lambda *args, **kwargs: pytest.fail("loaded"))
    refused(run("--prompt", BALL, *options), 2, *words)


def test_wrong_options_do_not_wait_for_torch():
    program = (
        "import sys; from ldm.cli import main; main(['sample', '--cfg', 'nan']); assert 'torch' not in sys.modules"
    )
    assert python("-c", program).returncode == 0


def corrupted(name: str, good: Path, path: Path) -> tuple[Path, tuple[str, ...]]:
    """A file that is no good, and what the answer says."""
    data = good.read_bytes()
    if name == "nan":
        loaded = checkpoint.open(good)
        state = {key: x.clone() for key, x in loaded.state.items()}
        state["backbone.out.weight"][0] = float("nan")
        checkpoint.save(path, loaded.config, state, loaded.tokenizer)
        return path, ("NaN", "backbone.out.weight")
    if name == "pickle":
        torch.save({"weight": torch.ones(2)}, path)
        return path, ("pickle", "ldm convert")
    if name == "folder":
        (path / "unet").mkdir(parents=True)
        return path, ("model_index.json",)
    if name == "foreign":
        from safetensors.torch import save_file

        save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, path)
        return path, (path.name,)
    contents = {
        "truncated": (data[: len(data) // 2], "truncated"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        "empty": (b"", "the file is empty"),
        "flipped": (data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged"),
        "text": (b"this is no checkpoint at all, is it", "not a safetensors file"),
    }
    path.write_bytes(contents[name][0])
    return path, (contents[name][1],)


@pytest.mark.parametrize(
    "name", ["nan", "pickle", "folder", "foreign", "truncated", "pointer", "empty", "flipped", "text"]
)
def test_a_checkpoint_that_is_no_good_is_refused_with_4(name, run, models, tmp_path):
    path, words = corrupted(name, models["joint"], tmp_path / "bad.safetensors")
    refused(run("--prompt", BALL, "--ckpt", path, model=None), 4, *words, "bad.safetensors")


def test_a_first_stage_alone_and_no_file_at_all(run, models, tmp_path):
    loaded = checkpoint.open(models["joint"])
    state = {name: x for name, x in loaded.state.items() if name.startswith("autoencoder.")}
    checkpoint.save(tmp_path / "stage.safetensors", {"format": 1, "autoencoder": loaded.config["autoencoder"]}, state)
    refused(
        run("--prompt", BALL, "--ckpt", "stage.safetensors", model=None),
        4,
        "this file has only an autoencoder",
        "--vae",
    )
    refused(run("--prompt", BALL, "--ckpt", "none.safetensors", model=None), 4, "no such file", "none.safetensors")


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("joint", ("--height", "18"), ("height", "got 18", "a multiple of 4", "try 16")),
        ("joint", ("--device", "abacus"), ("device", "abacus")),
        ("joint", ("--device", "cuda:77"), ("device", "cuda:77")),
        ("joint", ("--offload",), ("offload", "device cpu")),
        ("joint", ("guidance.scale=3",), ("guidance.scale: unknown key", "command line", "rescale")),
        ("joint", ("backbone.width=3",), ("backbone.width: unknown key",)),
        ("joint", ("nonsense",), ("override is not KEY=VALUE", "nonsense")),
        ("joint", ("--label", "1"), ("label: not used by this model", "caption")),
        ("joint", ("--steps", "5000"), ("steps",)),
        ("joint", ("--init-image", "file"), ("cannot read the picture", "file")),
        ("joint", ("--condition", "mask.png"), ("condition", "reads no picture")),
        (
            "joint",
            ("--init-image", "mask.png", "--strength", "0.1"),
            ("strength: too small for a single step", "more steps"),
        ),
        ("label", (), ("label: required by this model", "--label N")),
        ("label", ("--label", "4"), ("label", "got 4", "0 to 3", "try 3")),
        ("label", ("--label=-1",), ("label", "got -1")),
        ("label", ("--label", "1", "--prompt", BALL), ("prompt: not used by this model", "label")),
        ("layout", (), ("boxes: required by this model", "--condition FILE.json")),
        ("layout", ("--condition", "file"), ("condition: not JSON (file)", '"boxes"')),
        ("layout", ("--condition", "mask.png"), ("condition: not JSON (mask.png)",)),
        ("layout", ("--condition", "list.json"), ("condition: not boxes with labels (list.json)", "got [1]")),
        ("layout", ("--condition", "keys.json"), ("condition: not boxes with labels", "got the keys boxes, classes")),
        (
            "layout",
            ("--condition", "one.json"),
            ("condition: the numbers of boxes and labels differ", "got 1 boxes and 0 labels"),
        ),
        (
            "layout",
            ("--condition", "no_list.json"),
            ("condition: the numbers of boxes and labels differ", "no list of labels"),
        ),
        ("layout", ("--condition", "word.json"), ("condition: not a box", 'got ["left", 0, 1, 1]', "in [0, 1]")),
        ("layout", ("--condition", "pixels.json"), ("condition: not a box", "got [0, 0, 64, 64]", "in [0, 1]")),
        ("layout", ("--condition", "nan.json"), ("condition: not a box", "NaN")),
        ("layout", ("--condition", "turned.json"), ("boxes: not a box", "left < right")),
        ("layout", ("--condition", "named.json"), ("condition: not a class", 'got "cube"')),
        ("layout", ("--condition", "class.json"), ("box_labels: no such class", "got 4", "0 to 3")),
        ("layout", ("--condition", "many.json"), ("boxes: too many", "got 4", "at most 3")),
        (
            "joint",
            ("--condition", "class.json"),
            ("condition: not what this model reads (class.json)", "mapping of caption"),
        ),
        ("plain", ("--prompt", BALL), ("prompt: not used by this model",)),
    ],
)
def test_what_the_model_cannot_do_is_answered_before_sampling(model, options, words, run, clutter, monkeypatch):
    monkeypatch.setattr("ldm.models.unet.UNet.forward", lambda *args, **kwargs: pytest.fail("sampled"))
    prompt = ("--prompt", BALL) if model == "joint" else ()
    refused(run(*prompt, *options, model=model), 2, *words)


def test_a_prompt_for_a_model_of_labels_asks_for_one(run):
    refused(run("--prompt", BALL, model="label"), 2, "label")


@pytest.mark.parametrize("options", [("--cfg", "1e38"), ("--cfg", "1e35", "--steps", "1")])
def test_numbers_that_run_away_are_an_error_and_never_a_black_picture(options, run):
    refused(run("--prompt", BALL, *options), 5, "NaN or infinity", "cfg")


def test_where_sampling_left_the_numbers_is_said(run):
    refused(run("--prompt", BALL, "--cfg", "1e38", "--steps", "3"), 5, "step ", " of 3", "sigma ")
