"""`ldm convert`: between all formats and types, and what it says."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import checkpoint
from ldm.cli import convert
from ldm.conditioning.tokenizer import BPE
from ldm.errors import CheckpointError, InputError
from tests.checkpoint.made_up import make

CARRIED = json.dumps({"type": "bpe", "merges": [["a", "b</w>"]], "vocabulary": None, "pad": 0})


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    convert.options(parser)
    return convert.run(parser.parse_args([str(word) for word in words]))


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_around_through_all_formats(tmp_path, capsys):
    config, state = make("sd1_inpainting")
    names = [tmp_path / name for name in ("a.safetensors", "folder", "b.safetensors", "c.safetensors")]
    checkpoint.save(names[0], config, state, CARRIED)
    count = f"{len(state)} tensors, {sum(x.numel() for x in state.values()) / 1e6:.1f} M parameters"
    for source, target, layout, family in (
        (names[0], names[1], "diffusers", "ldm"),
        (names[1], names[2], "ldm", "Stable Diffusion 1, inpainting, diffusers folder"),
        (names[2], names[3], "compvis", "ldm"),
    ):
        assert run(source, target, "--to", layout) == 0
        out = capsys.readouterr().out
        first, *notes, last = out.splitlines()
        assert (first, last) == (f"{source}: {family}, {count}", f"wrote {target} ({layout})")
        assert [note.split(" uses ")[1] for note in notes] == ["spacing.spare=1, unlike this file"] * (
            layout == "diffusers"
        )
        assert same(checkpoint.open(target).state, state)
    carried = checkpoint.open(names[2]).tokenizer
    assert json.loads(carried)["merges"] == [["a", "b</w>"]]
    assert BPE([("a", "b</w>")]).encode("ab") == [512]


def test_how_a_file_is_sampled_may_change(tmp_path):
    config, state = make("sd1")
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    checkpoint.save(source, config, state, CARRIED)
    assert run(source, target, "guidance.cfg=3", "guidance.interval=[0.3, 6]", "solver={type: heun}") == 0
    changed = checkpoint.open(target)
    assert (changed.config["guidance"]["cfg"], changed.config["guidance"]["interval"]) == (3, [0.3, 6])
    assert changed.config["solver"] == {"type": "heun"}
    assert changed.config["spacing"]["type"] == checkpoint.open(source).config["spacing"]["type"]
    assert same(changed.state, state)
    with pytest.raises(InputError, match=r"guidance\.rescale: must lie between 0 and 1"):
        run(source, target, "guidance.rescale=2")
    with pytest.raises(InputError, match="SRC already contains all its encoders"):
        run(source, target, "guidance.cfg=3", "size=256")
    first = {name: x for name, x in state.items() if name.startswith("autoencoder.")}
    checkpoint.save(tmp_path / "first.safetensors", {"format": 1, "autoencoder": config["autoencoder"]}, first)
    with pytest.raises(InputError, match="an autoencoder has no sampling settings"):
        run(tmp_path / "first.safetensors", target, "guidance.cfg=3")


def test_a_ckpt_becomes_half_as_large(tmp_path, capsys):
    checkpoint.write_compvis(tmp_path / "x.safetensors", *make("sd2_v"))
    torch.save({"state_dict": load_file(tmp_path / "x.safetensors"), "epoch": 3}, tmp_path / "x.ckpt")
    assert run(tmp_path / "x.ckpt", tmp_path / "half.safetensors", "--dtype", "float16", "--prediction", "eps") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{tmp_path}/x.ckpt: Stable Diffusion 2, v-prediction, ")
    assert out[1].startswith("note: v-prediction is guessed from ")
    assert out[-1] == f"wrote {tmp_path}/half.safetensors (ldm, float16)"
    loaded = checkpoint.open(tmp_path / "half.safetensors")
    assert loaded.config["prediction"] == {"type": "eps"}
    assert loaded.state["backbone.out.weight"].equal(make("sd2_v")[1]["backbone.out.weight"].half())
    assert loaded.state["autoencoder.scale"] == torch.tensor(0.18215)


def test_a_dit_in_a_pt_file_with_a_first_stage_beside(tmp_path, capsys):
    config, state = make("dit")
    checkpoint.write_compvis(tmp_path / "dit.safetensors", config, state)
    torch.save(load_file(tmp_path / "dit.safetensors"), tmp_path / "dit.pt")
    checkpoint.write_compvis(tmp_path / "vae.safetensors", *make("kl"))
    assert run(tmp_path / "dit.pt", tmp_path / "whole.safetensors", "--vae", tmp_path / "vae.safetensors") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/dit.pt: DiT, ")
    loaded = checkpoint.open(tmp_path / "whole.safetensors")
    assert same(loaded.state, state)
    assert loaded.config == config
    with pytest.raises(CheckpointError) as error:
        run(tmp_path / "dit.pt", tmp_path / "folder")
    assert str(error.value) == "no first stage to write; try --vae"
    assert not (tmp_path / "folder").exists()


def test_clips_own_tokenizer_is_written_where_nothing_was_carried(tmp_path):
    from ldm.conditioning.tokenizer import clip_tokenizer, from_folder

    config, state = make("sd2")
    config = config | {"conditioner": config["conditioner"] | {"vocabulary": 49408}}
    tokens = torch.zeros(49408, 64)
    checkpoint.write_compvis(
        tmp_path / "x.safetensors", config, state | {"conditioner.transformer.tokens.weight": tokens}
    )
    assert run(tmp_path / "x.safetensors", tmp_path / "folder") == 0
    folder = from_folder(tmp_path / "folder" / "tokenizer")
    assert folder.pad == 0
    assert folder.encode("a photograph of a cat") == clip_tokenizer(0).encode("a photograph of a cat")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("x.ckpt", [], "not the name of a weights file (DST); got {}/x.ckpt; expected NAME.safetensors"),
        ("x", ["--to", "compvis"], "not the name of a weights file (DST); got {}/x; expected NAME.safetensors"),
        ("no/x.safetensors", [], "no such folder (DST); got {}/no; expected a folder that exists"),
        ("there", [], "exists already (DST); got {}/there; expected a new folder"),
    ],
)
def test_bad_targets_are_found_before_anything_is_read(target, options, message, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError) as error:
        run(tmp_path / "none.ckpt", tmp_path / target, *options)
    assert str(error.value) == message.format(tmp_path)


def test_nan_is_not_converted(tmp_path):
    checkpoint.write_compvis(tmp_path / "x.safetensors", *make("kl"))
    tensors = load_file(tmp_path / "x.safetensors")
    tensors["quant_conv.bias"][2] = float("nan")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"weights hold NaN or infinity .* got 1: autoencoder\.quant\.bias \(1\);"
    ):
        run(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()
