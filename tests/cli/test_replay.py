"""ldm replay makes a picture again from its PNG, or says in one line what is no longer there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from ldm.cli import main
from tests.cli.test_sample import BALL, distance, half_mask, init_image, models, pixels, run, write_model

__all__ = ["models", "run"]  # fixtures


@pytest.fixture
def replay(tmp_path, monkeypatch, capsys):
    """`replay(*options)` gives the status, the lines on stdout and what was said on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object) -> tuple[int, list[str], str]:
        status = main(["replay", "--device", "cpu", *map(str, options)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return call


SETTINGS = [
    (),
    ("--n", "3", "--seed", "8", "--batch-size", "2"),
    ("--tile", "4"),
    ("--prompt", "a blue ball", "--negative", "red", "--cfg", "5", "--steps", "3", "--sampler", "Euler a"),
    ("--height", "8", "--width", "24", "guidance.rescale=0.5"),
    ("--init-image", "init.png", "--strength", "0.6"),
    ("--init-image", "init.png", "--mask", "mask.png"),
    ("--vae", "other.safetensors"),
    ("--precision", "bf16"),
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "".join(options)[:30])
def test_every_picture_is_made_again_bit_for_bit(options, run, replay, tmp_path):
    init_image()
    half_mask()
    if "--vae" in options:
        write_model(tmp_path / "other.safetensors", None, seed=9)
    _, lines, err = run("--prompt", BALL, *options)
    assert lines, err
    for line in lines:
        assert replay(line, "--out", "again.png") == (0, ["wrote again.png: identical"], "")
        assert (pixels("again.png") == pixels(line)).all()
        with Image.open(line) as old, Image.open("again.png") as new:
            assert new.text == old.text


def test_labels_are_made_again(run, replay):
    (line,) = run("--label", 1, model="label")[1]
    assert replay(line) == (0, ["wrote replayed.png: identical"], "")


def test_a_picture_that_was_changed_is_not_called_identical(run, replay):
    (line,) = run("--prompt", BALL)[1]
    with Image.open(line) as image:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("ldm", image.text["ldm"])
        image.putpixel((3, 3), tuple((value + 128) % 256 for value in image.getpixel((3, 3))))
        image.save("changed.png", pnginfo=info)
    assert replay("changed.png") == (0, ["wrote replayed.png: differs by at most 128 of 255"], "")
    assert distance(pixels("replayed.png"), pixels(line)) == 0


def test_a_checkpoint_that_moved_is_found_with_ckpt(run, replay, tmp_path):
    write_model(tmp_path / "here.safetensors", None)
    (line,) = run("--ckpt", "here.safetensors", model=None)[1]
    Path("here.safetensors").rename("there.safetensors")
    refused_here(replay(line), 4, "no such file", "here.safetensors")
    assert replay(line, "--ckpt", "there.safetensors") == (0, ["wrote replayed.png: identical"], "")


def refused_here(answer: tuple[int, list[str], str], status: int, *words: str) -> None:
    """As `refused`, beside the pictures that are to be replayed."""
    got, lines, err = answer
    assert (got, lines) == (status, []), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert not [word for word in words if word not in err], err
    assert not Path("replayed.png").exists()


@pytest.fixture
def no_sampling(run, monkeypatch):
    """A picture from an init image; from then on, nothing is sampled."""
    init_image()
    (line,) = run("--prompt", BALL, "--init-image", "init.png")[1]
    monkeypatch.setattr("ldm.models.unet.UNet.forward", lambda *args, **kwargs: pytest.fail("sampled"))
    return line


def test_another_checkpoint_is_refused(no_sampling, replay, models):
    refused_here(
        replay(no_sampling, "--ckpt", models["clip"]),
        4,
        "not the checkpoint that made this picture",
        "clip.safetensors",
        "--ckpt",
    )


def test_an_input_that_changed_or_went_is_refused(no_sampling, replay):
    init_image(size=20)
    refused_here(replay(no_sampling), 2, "an input file of this picture has changed", "init.png")
    Path("init.png").unlink()
    refused_here(replay(no_sampling), 2, "an input file of this picture is missing", "init.png")


@pytest.mark.parametrize("out", ["no_such_folder/new.png", "new.jpg", "outputs"])
def test_a_place_that_cannot_be_written_is_refused_before_sampling(out, no_sampling, replay):
    refused_here(replay(no_sampling, "--out", out), 2, "cannot write the picture", out)


def test_a_picture_that_remembers_nothing_is_refused(replay):
    refused_here(replay(init_image()), 2, "this picture stores no record", "init.png", "ldm sample")
    refused_here(replay("none.png"), 2, "no such picture", "none.png")
    Path("text.png").write_text("no picture")
    refused_here(replay("text.png"), 2, "cannot read the picture", "text.png")
    for record in (
        "{",
        "[]",
        "{}",
        json.dumps({"order": {"colour": 1}, "checkpoint": "", "inputs": {}, "place": [0, 1]}),
    ):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("ldm", record)
        Image.new("RGB", (4, 4)).save("odd.png", pnginfo=info)
        refused_here(replay("odd.png"), 2, "this picture stores no record", "odd.png")
