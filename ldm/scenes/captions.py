"""Captions of scenes: true, with unambiguous names of objects, and with attributes omitted at random."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from ldm.draws import stream
from ldm.scenes.description import COLOURS, MATERIALS, SHAPES, SIZES, Object, Scene, Table
from ldm.scenes.drawing import uniforms
from ldm.scenes.relations import RELATIONS, related

WORDS = {  # synonyms, repeated in proportion to their frequency; other words stand for themselves
    "sphere": ("sphere", "sphere", "ball"),
    "cube": ("cube", "cube", "box", "block"),
    "gray": ("gray", "gray", "grey"),
    "purple": ("purple", "purple", "violet"),
    "matte": ("matte", "matte", "dull"),
    "shiny": ("shiny", "shiny", "glossy", "metallic"),
    "small": ("small", "small", "little"),
    "large": ("large", "large", "big"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "on top of": ("on top of", "sitting on", "standing on"),
}
FLOORS = {
    "gray": "a gray floor",
    "wooden": "a wooden floor",
    "checkered": "a checkered floor",
    "striped": "a striped floor",
}
SHARES = {"size": 0.5, "material": 0.5, "colour": 0.85, "shape": 0.95}  # of objects that are named with it
FLOOR_SHARE, LIST_SHARE, STACK_SHARE = 0.15, 0.1, 0.8  # of captions: the floor, a mere list, a stack if there is one
ALONE = ("{}", "{}", "a picture of {}", "there is {}")
PAIR = ("{} {} {}", "{} {} {}", "{} {} {}", "{} is {} {}", "there is {} {} {}", "a picture of {} {} {}")
SLOTS = 48  # uniform numbers for a caption
AND = ("an object, and which",)
PHRASES = (SHAPES, COLOURS, MATERIALS, SIZES, RELATIONS, *WORDS.values(), FLOORS.values(), ALONE, PAIR, AND)
VOCABULARY = {word for phrases in PHRASES for phrase in phrases for word in re.findall("[a-z]+", phrase)}

Draw = Iterator[float]
Relations = list[tuple[int, str, int]]


def caption(scene: Scene, seed: int, index: int) -> str:
    """A caption of a scene; `index` chooses the wording."""
    return captions(Table.of([scene]), seed, [index])[0]


def captions(table: Table, seed: int, indices: Sequence[int], complete: float = 0.0) -> list[str]:
    """Captions of many scenes; a share `complete` of them names every attribute."""
    rows = np.asarray(indices, dtype=np.int64)
    numbers = uniforms(stream(seed, "captions"), rows, 0, SLOTS).tolist()
    full = (uniforms(stream(seed, "complete"), rows, 0, 1)[:, 0] < complete).tolist()
    seen: list[Relations] = [[] for _ in indices]
    for row, relation, i, j in np.argwhere(related(table)).tolist():
        seen[row].append((i, RELATIONS[relation], j))
    return [_caption(*row) for row in zip(table.scenes(), seen, map(iter, numbers), full)]


def _caption(scene: Scene, seen: Relations, draw: Draw, full: bool) -> str:
    objects = scene.objects
    names = [named(each, objects, draw, full) for each in objects]
    names = [("an " if name[0] in "aeiou" else "a ") + name for name in names]
    if len(objects) == 1:
        text = one(ALONE, draw).format(*names)
    elif next(draw) < LIST_SHARE or not seen:
        text = f"{', '.join(names[:-1])} and {names[-1]}"
    else:
        text = _related(names, seen, draw)
    return text + (f" on {FLOORS[scene.floor]}" if next(draw) < FLOOR_SHARE else "")


def _related(names: list[str], seen: Relations, draw: Draw) -> str:
    """One relation, and an unambiguous mention of a third object."""
    stacked = [row for row in seen if row[1] == "on top of"]
    i, relation, j = one(stacked if stacked and next(draw) < STACK_SHARE else seen, draw)
    text = one(PAIR, draw).format(names[i], spoken(relation, draw), names[j])
    third = [k for k in range(len(names)) if k not in (i, j)]
    if not third:
        return text
    k = third[0]
    ways = [f"{names[k]}, and {names[i]} {spoken(relation, draw)} {names[j]}"]
    ways += [f"{text} and {spoken(r, draw)} {names[k]}" for a, r, b in seen if (a, b) == (i, k)]
    ways += [f"{text}, which is {spoken(r, draw)} {names[k]}" for a, r, b in seen if (a, b) == (j, k)]
    return one(ways, draw)


def named(thing: Object, among: Sequence[Object], draw: Draw, full: bool = False) -> str:
    """Some attributes of an object, or all if `full` or if fewer are ambiguous: "large shiny red sphere"."""
    chosen = [field for field, share in SHARES.items() if next(draw) < share or full]
    if any(other is not thing and all(getattr(other, f) == getattr(thing, f) for f in chosen) for other in among):
        chosen = list(SHARES)
    words = [spoken(getattr(thing, field), draw) for field in chosen]
    return " ".join(words if "shape" in chosen else [*words, "object"])


def unknown(text: str) -> list[str]:
    """The words of a text that no caption contains."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in VOCABULARY]


def spoken(word: str, draw: Draw) -> str:
    """The word or one of its synonyms."""
    return one(WORDS.get(word, (word,)), draw)


def one(choices: Sequence, draw: Draw):
    """One of them."""
    return choices[int(next(draw) * len(choices))]
