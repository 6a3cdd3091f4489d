"""Captions read back by a parser that knows only English: what they say is true, and of one thing each."""

import re

import pytest

from ldm.scenes import COLOURS, RELATIONS, Object, Scene, caption, captions, draw, relations
from ldm.scenes.description import Table

MANY = 1200
MEANS = {
    **{word: ("colour", word) for word in COLOURS},
    "grey": ("colour", "gray"),
    "violet": ("colour", "purple"),
    **dict.fromkeys(("sphere", "ball"), ("shape", "sphere")),
    **dict.fromkeys(("cube", "box", "block"), ("shape", "cube")),
    "cylinder": ("shape", "cylinder"),
    "cone": ("shape", "cone"),
    **dict.fromkeys(("matte", "dull"), ("material", "matte")),
    **dict.fromkeys(("shiny", "glossy", "metallic"), ("material", "shiny")),
    **dict.fromkeys(("small", "little"), ("size", "small")),
    **dict.fromkeys(("large", "big"), ("size", "large")),
}
PREPOSITIONS = {
    "left of": r"(?:to the |on the )?left of",
    "right of": r"(?:to the |on the )?right of",
    "in front of": "in front of",
    "behind": "behind",
    "on top of": "(?:on top of|sitting on|standing on)",
}
THING = r"an? (?:(?:\w+) )*?(?:sphere|ball|cube|box|block|cylinder|cone|object)\b"


def meant(words: str, scene: Scene) -> list[int]:
    """Which objects a noun phrase may mean."""
    said = [MEANS[word] for word in words.split()[1:] if word != "object"]
    assert len({field for field, _ in said}) == len(said), words
    return [i for i, thing in enumerate(scene.objects) if all(getattr(thing, field) == value for field, value in said)]


def read(text: str, scene: Scene) -> set[tuple[int, str, int]]:
    """The relations that a caption claims, after checking that each of its things is one thing of the scene."""
    text, _, floor = re.sub("^(a picture of|there is) ", "", text).partition(" floor")
    assert not floor
    if floored := re.search(r" on a (gray|wooden|checkered|striped)$", text):
        assert floored.group(1) == scene.floor
        text = text[: floored.start()]
    things = re.findall(THING, text)
    numbers = []
    for words in things:
        found = meant(words, scene)
        assert len(found) == 1, (words, scene)
        numbers += found
    assert sorted(numbers) == list(range(len(scene.objects))), "each object is named once"
    pattern = re.sub(THING, "X", text)
    claims, subject = set(), 0
    for relation, preposition in PREPOSITIONS.items():
        pattern = re.sub(rf"\b{preposition} X", f"<{relation}> X", pattern)
    if pattern.startswith("X, and X <"):
        subject, pattern, numbers = 0, pattern.removeprefix("X, and "), numbers[1:]
    first = re.fullmatch(r"X(?: is)? <([a-z ]+)> X(?:( and|, which is) <([a-z ]+)> X)?", pattern)
    if first is None:
        assert pattern in ("X", "X and X", "X, X and X"), text
        return claims
    claims.add((numbers[subject], first.group(1), numbers[1]))
    if first.group(2):
        claims.add((numbers[0 if first.group(2) == " and" else 1], first.group(3), numbers[2]))
    return claims


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_captions_are_true_and_mean_one_thing_each(split):
    table = draw(5, range(MANY), split)
    said = [(read(text, scene), scene) for text, scene in zip(captions(table, 5, range(MANY)), table.scenes())]
    assert all(claims <= relations(scene) for claims, scene in said)
    counts = {name: sum(relation == name for claims, _ in said for _, relation, _ in claims) for name in RELATIONS}
    assert min(counts.values()) > 0.08 * sum(counts.values()), counts


def test_the_reader_notices_lies():
    a = Object("sphere", "red", "matte", "small", -1.0, 0.0, 0.45)
    b = Object("cube", "blue", "shiny", "large", 1.0, 0.0, 0.66)
    scene = Scene((a, b))
    assert read("a shiny cube is to the right of a ball", scene) == {(1, "right of", 0)}
    assert read("a red ball behind a box", scene) == {(0, "behind", 1)}
    for lie in (
        "a red sphere and a red cube",
        "a ball and an object",
        "a small cube left of a red ball",
        "a ball on a wooden floor",
    ):
        with pytest.raises(AssertionError):
            read(lie, scene)


def test_a_caption_is_a_function_of_seed_and_index():
    table = draw(0, range(50))
    said = captions(table, 0, range(50))
    for i, scene in enumerate(table.scenes()):
        assert caption(scene, 0, i) == said[i]
    assert len({caption(table.scenes()[1], 0, i) for i in range(60)}) > 20, "another index words it in another way"


def test_a_typical_caption():
    a = Object("sphere", "red", "shiny", "large", -1.0, 0.2, 0.765)
    b = Object("cube", "blue", "matte", "small", 1.0, 0.0, 0.39)
    said = captions(Table.of([Scene((a, b))] * 4000), 0, range(4000))
    assert "a shiny red sphere left of a small blue cube" in said


def test_words_are_few_and_captions_short():
    said = captions(draw(0, range(MANY)), 0, range(MANY))
    assert max(len(text.split()) for text in said) <= 40
    assert 40 <= len({word.strip(",") for text in said for word in text.split()}) <= 60
    assert not any(re.search(r"\ba [aeiou]", text) for text in said)
