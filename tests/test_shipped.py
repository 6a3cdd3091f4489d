"""The shipped model: that it opens by itself, and what the judge sees in its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.cli import main
from ldm.pictures import to_tensor
from ldm.pipeline import SHIPPED
from ldm.scenes.verifier import PromptSet, Verifier


def test_it_paints_what_no_two_prompts_share(shipped):
    red, blue = shipped(["a large red sphere", "a large blue sphere"], cfg=4, steps=8)
    assert red.size == blue.size == (64, 64)
    first, second = (np.asarray(image, dtype=float).mean((0, 1)) for image in (red, blue))
    assert first[0] - first[2] > second[0] - second[2] + 5  # redder


def test_sample_needs_no_checkpoint(tmp_path):
    assert main(["sample", "--prompt", "a green cone", "--cfg", "7.5", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert SHIPPED.stat().st_size < 30e6


def test_words_that_it_cannot_know_are_named(tmp_path, capsys):
    words = ["sample", "--steps", "1", "--out", str(tmp_path)]
    assert main([*words, "--prompt", "a red sphere", "--prompt", "a photo of a cat"]) == 0
    expected = "note: the shipped model knows scenes on a table, and nothing of photo, cat; "
    assert expected + "--ckpt FILE takes another, such as a Stable Diffusion file\n" in capsys.readouterr().err
    assert main([*words, "--prompt", "there is a shiny red ball to the left of a gray box on a wooden floor"]) == 0
    assert "note" not in capsys.readouterr().err


@pytest.mark.slow
def test_one_object_is_as_it_was_told(shipped):
    texts, right = PromptSet(200, 1).captions, {}
    for cfg in (1, 4, 7.5):
        made = torch.cat([to_tensor(image) for image in shipped(texts, cfg=cfg, batch_size=50)])
        right[cfg] = sum(score.correct for score in Verifier().scores(made, texts)) / len(texts)
    print("right in everything: " + ", ".join(f"cfg {cfg:g} {share:.1%}" for cfg, share in right.items()))
    assert right[4] >= 0.85
    assert 1 - right[4] <= (1 - right[1]) / 2  # guidance takes away half of what is wrong without it
    assert right[7.5] >= right[4] - 0.05
