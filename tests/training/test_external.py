"""Encoders too large for a checkpoint: trained with, left out by name and digest, found again, and never another's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import ldm
from ldm import checkpoint
from ldm.checkpoint.text_keys import write_text
from ldm.cli import main
from ldm.conditioning import external
from ldm.conditioning.text import clip
from tests.conditioning.conditions import T5_NUMBERS, small_t5, unigram
from tests.models.first_stages import fill
from tests.training.second_stage import command
from tests.training.test_latent_diffusion_file import SD

CLIP = {"width": 32, "layers": 1, "heads": 2}
SHORT = ["trainer.steps=1", "trainer.validate_images=8", "schedule.type=constant"]


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(external, "LARGEST", 1000)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline hub that has somebody/clip."""
    model = tmp_path / "hub" / "models--somebody--clip"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    clip_in(model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    return "somebody/clip"


def clip_in(folder, seed: int = 0, **numbers: int) -> str:
    """A folder with a text encoder."""
    folder.mkdir(parents=True)
    transformer = fill(clip(**CLIP | numbers), seed).transformer
    save_file(write_text(transformer.state_dict(), transformer, "clip"), folder / "model.safetensors")
    return str(folder)


def t5_in(folder) -> str:
    """A folder with a T5 and its tokenizer."""
    numbers = {"d_model": 12, "num_layers": 2, "num_heads": 2, "d_kv": 6, "d_ff": 24, "vocab_size": 40}
    state = {f"encoder.{name}": x for name, x in small_t5().transformer.encoder.state_dict().items()}
    theirs = T5EncoderModel(T5Config(**numbers, feed_forward_proj="gated-gelu"))
    theirs.load_state_dict(state | {"shared.weight": state["encoder.embed_tokens.weight"]})
    theirs.save_pretrained(folder)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=unigram(), **names).save_pretrained(folder)
    return str(folder)


def node(kind: str, weights: str, **numbers) -> str:
    """A conditioner in YAML."""
    numbers = {"type": kind, **(CLIP if kind == "clip" else T5_NUMBERS), **numbers, "weights": weights}
    return f"{{{', '.join(f'{name}: {value}' for name, value in numbers.items())}}}"


def trained(run, conditioner: str, *overrides: str) -> str:
    """The file of a short training."""
    assert main(command(run, f"conditioner={conditioner}", *SHORT, *overrides)[:-1]) == 0
    return str(run / "model.safetensors")


def states(file: str, *overrides: str) -> torch.Tensor:
    """What a file's pipeline, which can make a picture, reads in a caption."""
    pipe = ldm.load(file, overrides=overrides, device="cpu")
    assert pipe("a red cube", height=16)
    return pipe.conditioner({"caption": ["a red cube"]}).tokens


def refusal(capsys, *argv: str, code: int = 4) -> str:
    """The one line that a command says."""
    capsys.readouterr()
    assert main([*argv]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_encoder_of_a_hub_is_found_by_its_id(hub, tmp_path, monkeypatch):
    file = trained(tmp_path / "run", node("clip", hub))
    loaded = checkpoint.open(file)
    assert not any(name.startswith("conditioner.") for name in loaded.state)
    assert loaded.config["conditioner"]["weights"] == hub
    assert loaded.config["left_out"]["conditioner.weights"]["name"] == hub
    again = trained(tmp_path / "again", file)  # conditioner=CKPT
    assert checkpoint.open(again).config["left_out"] == loaded.config["left_out"]
    monkeypatch.setattr(external, "LARGEST", 10**9)
    inside = trained(tmp_path / "inside", node("clip", hub))
    assert checkpoint.open(inside).config["left_out"] == {}
    assert "weights" not in checkpoint.open(inside).config["conditioner"]
    assert states(file).equal(states(inside))


@pytest.mark.parametrize(("limit", "lacking"), [(50_000, [0]), (1000, [0, 1])])
def test_encoders_in_folders_are_found_where_the_user_says(limit, lacking, tmp_path, monkeypatch):
    """One of two, or both; the tokenizer in the file is T5's."""
    folders = clip_in(tmp_path / "texts" / "a-clip", width=12), t5_in(tmp_path / "texts" / "a-t5")
    both = f"{{type: compose, parts: [{node('clip', folders[0], width=12)}, {node('t5', folders[1])}]}}"
    monkeypatch.setattr(external, "LARGEST", limit)
    file = trained(tmp_path / "run", both)
    keys = [f"conditioner.parts.{i}.weights" for i in lacking]
    assert [*checkpoint.open(file).config["left_out"]] == keys
    left = states(file, *(f"{key}={folders[i]}" for i, key in zip(lacking, keys)))
    monkeypatch.setattr(external, "LARGEST", 10**9)
    assert left.equal(states(trained(tmp_path / "inside", both)))


def test_another_encoder_is_refused_and_so_is_none(tmp_path, monkeypatch, capsys):
    folder, other = clip_in(tmp_path / "texts" / "a-clip"), clip_in(tmp_path / "other", seed=1)
    monkeypatch.chdir(tmp_path)
    file = trained(tmp_path / "run", node("clip", "texts/a-clip"))  # which would be a hub's id if it were not here
    content = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert b"a-clip" in content
    assert b"texts" not in content
    assert str(tmp_path).encode() not in content
    sample = ("sample", "--ckpt", file, "--prompt", "a ball", "--out", str(tmp_path / "out"), "--device", "cpu")
    wanted = checkpoint.open(file).config["left_out"]["conditioner.weights"]
    expected = f"expected a-clip, sha256 {wanted['sha256'][:10]}; try conditioner.weights=FOLDER"
    start = f"error: conditioner.weights: not the encoder that the file needs ({file})"
    assert refusal(capsys, *sample) == f"{start}; got none; {expected}"
    line = refusal(capsys, *sample, f"conditioner.weights={other}")
    assert line.startswith(f"{start}; got sha256 ")
    assert line.endswith(expected)
    assert "no such folder" in refusal(capsys, *sample, f"conditioner.weights={tmp_path}/none", code=2)
    assert main([*sample, "size=16", f"conditioner.weights={folder}"]) == 0


def test_a_run_goes_on_with_the_encoder_that_it_began_with(tmp_path, capsys):
    folder = clip_in(tmp_path / "texts")
    argv = command(tmp_path / "run", f"conditioner={node('clip', folder)}", *SHORT)[:-1]
    assert main(argv) == 0
    assert main([*argv, "trainer.steps=2"]) == 0
    (tmp_path / "texts").rename(tmp_path / "before")
    clip_in(tmp_path / "texts", seed=1)
    assert "not the encoder that the file needs" in refusal(capsys, *argv, "trainer.steps=3")


def test_what_has_no_name_stays_inside(tmp_path):
    """Random weights, and those that come with the weights of a file."""
    folder = clip_in(tmp_path / "texts")
    random = trained(tmp_path / "random", node("clip", "random"))
    taken = trained(tmp_path / "taken", random)
    begun = trained(tmp_path / "begun", node("clip", folder), "--init-from", random)
    for file in (random, taken, begun):
        loaded = checkpoint.open(file)
        assert loaded.config["left_out"] == {}
        assert any(name.startswith("conditioner.") for name in loaded.state)
    left = trained(tmp_path / "left", node("clip", folder))
    again = trained(tmp_path / "again", node("clip", folder), "--init-from", left)
    assert checkpoint.open(again).config["left_out"] == checkpoint.open(left).config["left_out"] != {}


def test_other_programs_get_it_whole(tmp_path, capsys):
    folder = clip_in(tmp_path / "texts")
    file = trained(tmp_path / "run", node("clip", folder), *SD[:3], *SD[4:6], "size=32")
    where = f"conditioner.weights={folder}"
    expected = fill(clip(**CLIP)).state_dict()
    for kind, name in {"diffusers": "folder", "compvis": "single.safetensors"}.items():
        argv = ("convert", file, str(tmp_path / name), "--to", kind)
        assert "try conditioner.weights=FOLDER" in refusal(capsys, *argv)
        assert main([*argv, where]) == 0
        state = checkpoint.open(tmp_path / name).state
        assert all(torch.equal(state[f"conditioner.{key}"], x) for key, x in expected.items())
        assert states(str(tmp_path / name)).equal(states(file, where))
    again = ("convert", str(tmp_path / "folder"), str(tmp_path / "again.safetensors"), where)
    assert "SRC already contains all its encoders" in refusal(capsys, *again, code=2)
    pipe = ldm.load(file, overrides=[where], device="cpu").to_diffusers()
    assert pipe.text_encoder.config.hidden_size == CLIP["width"]


@pytest.mark.parametrize("joined", [False, True])
def test_a_frozen_encoder_is_random_only_where_that_is_written(joined, tmp_path, capsys):
    one = "{type: clip, width: 32, layers: 1, heads: 2}"
    unsaid = f"{{type: compose, parts: [{{type: label, drop: 0}}, {one}]}}" if joined else one
    key = "conditioner.parts.1.weights" if joined else "conditioner.weights"
    argv = command(tmp_path / "run", f"conditioner={unsaid}", *SHORT)[:-1]
    line = refusal(capsys, *argv, code=2)
    assert line.startswith(f"error: {key}: missing, and the encoder is not trained (")
    assert line.endswith(f"got none; expected a folder, a file, a Hub id or random; try {key}=FOLDER")
    assert not (tmp_path / "run").exists()
    cache = ["cache", *argv[1:3], "--out", str(tmp_path / "cache"), "--device", "cpu"]
    assert refusal(capsys, *cache, f"conditioner={unsaid}", code=2) == line
    if not joined:
        file = trained(tmp_path / "named", node("clip", "random"))
        trained(tmp_path / "begun", unsaid, "--init-from", file)
        trained(tmp_path / "theirs", file)  # conditioner=CKPT
