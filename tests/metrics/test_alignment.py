"""Prompts of unseen scenes, and the judge's word on true renders of them."""

from __future__ import annotations

import pytest

from ldm import pictures
from ldm.data.scenes import captions, draw, render
from ldm.metrics.alignment import prompts, verdicts
from ldm.metrics.claims import Claim


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_prompts_speak_of_so_many_objects(objects):
    texts = prompts(20, objects)
    assert len(texts) == len(set(texts)) == 20
    assert {len(Claim.read(text).objects) for text in texts} == {objects}
    assert texts[:5] == prompts(5, objects)


def test_prompts_of_a_split_are_its_captions():
    indices = list(range(30))
    assert prompts(30, split="held_out", seed=3) == captions(draw(3, indices, "held_out"), 3, indices)


def test_true_renders_show_what_they_say_and_others_do_not():
    table, indices = draw(5, range(60), "validation"), list(range(60))
    images, texts = pictures.to_pil(pictures.to_float(render(table, 64)["image"])), captions(table, 5, indices)
    right = sum(verdict.whole for verdict in verdicts(images, texts))
    wrong = sum(verdict.whole for verdict in verdicts(images, texts[1:] + texts[:1]))
    assert right >= 57
    assert wrong <= 6
