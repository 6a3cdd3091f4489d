"""Prompts of scenes that training never shows, and scores of true renders of them."""

from __future__ import annotations

import re

import pytest

from ldm import pictures
from ldm.scenes import captions, draw, render
from ldm.scenes.statements import Statement
from ldm.scenes.verifier import PromptSet, Verifier


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_prompts_describe_this_number_of_objects(objects):
    texts = PromptSet(20, objects).captions
    assert len(texts) == len(set(texts)) == 20
    assert {len(Statement.parse(text).objects) for text in texts} == {objects}
    assert texts[:5] == PromptSet(5, objects).captions


def test_prompts_of_a_split_are_its_captions():
    indices = list(range(30))
    assert PromptSet(30, split="train", seed=3).captions == captions(draw(3, indices, "train"), 3, indices)


RARE = [  # what training never shows, in all words that captions have for it
    "cyan (sphere|ball)|(purple|violet) (cube|box|block)|green cylinder|red cone",
    "(sphere|ball) (is )?(to the |on the )?left of an? [a-z ]*cylinder",
    "cylinder (is )?(to the |on the )?right of an? [a-z ]*(sphere|ball)",
    "(cube|box|block) (is )?behind an? [a-z ]*(sphere|ball)",
    "(sphere|ball) (is )?in front of an? [a-z ]*(cube|box|block)",
    "cone (is )?(on top of|sitting on|standing on) an? [a-z ]*(cube|box|block)",
]


def test_prompts_of_what_is_held_out_all_name_it():
    """Not every caption of such scenes does, and none of the others."""
    indices = list(range(400))
    texts = captions(draw(3, indices, "held_out"), 3, indices)
    named = [text for text in texts if any(re.search(rare, text) for rare in RARE)]
    assert 200 < len(named) < 390
    chosen = PromptSet(200, split="held_out", seed=3).captions
    assert chosen[:150] == [text for text in texts if text in {*chosen}][:150]
    assert [text for text in chosen if text not in named and " and " not in text and "which" not in text] == []
    assert {*named[:100]} <= {*chosen}
    usual = captions(draw(3, indices), 3, indices)
    assert not [text for text in usual if Statement.parse(text).held_out]


def test_true_renders_are_correct_and_others_are_not():
    table, indices = draw(5, range(60), "validation"), list(range(60))
    x, texts = pictures.to_float(render(table, 64)["image"]), captions(table, 5, indices)
    right = sum(score.correct for score in Verifier().scores(x, texts))
    wrong = sum(score.correct for score in Verifier().scores(x, texts[1:] + texts[:1]))
    assert right >= 57
    assert wrong <= 6
