"""What is said of a scene: true, each thing named so that no other is meant, attributes left out at random."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from ldm.draws import stream
from ldm.scenes.description import COLOURS, MATERIALS, SHAPES, SIZES, Object, Scene, Table
from ldm.scenes.drawing import uniforms
from ldm.scenes.relations import RELATIONS, related

WORDS = {  # in the shares in which they are said; the rest go by their own names
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
SIZE_SAID, MATERIAL_SAID, COLOUR_SAID, SHAPE_SAID = 0.5, 0.5, 0.85, 0.95
FLOOR_SAID, LISTED, STACK_SAID = 0.15, 0.1, 0.8
ALONE = ("{}", "{}", "a picture of {}", "there is {}")
PAIR = ("{} {} {}", "{} {} {}", "{} {} {}", "{} is {} {}", "there is {} {} {}", "a picture of {} {} {}")
SLOTS = 48  # uniform numbers that a caption may use
AND = ("an object, and which",)
SAID = (SHAPES, COLOURS, MATERIALS, SIZES, RELATIONS, *WORDS.values(), FLOORS.values(), ALONE, PAIR, AND)
VOCABULARY = {word for phrases in SAID for phrase in phrases for word in re.findall("[a-z]+", phrase)}

Draw = Iterator[float]
Seen = list[tuple[int, str, int]]


def caption(scene: Scene, seed: int, index: int) -> str:
    """The caption of this index; another index words it another way."""
    return captions(Table.of([scene]), seed, [index])[0]


def captions(table: Table, seed: int, indices: Sequence[int], complete: float = 0.0) -> list[str]:
    """Those of many scenes at once; a share `complete` of them leaves no attribute out."""
    rows = np.asarray(indices, dtype=np.int64)
    numbers = uniforms(stream(seed, "captions"), rows, 0, SLOTS).tolist()
    whole = (uniforms(stream(seed, "complete"), rows, 0, 1)[:, 0] < complete).tolist()
    seen: list[Seen] = [[] for _ in indices]
    for row, relation, i, j in np.argwhere(related(table)).tolist():
        seen[row].append((i, RELATIONS[relation], j))
    return [_caption(*row) for row in zip(table.scenes(), seen, map(iter, numbers), whole)]


def _caption(scene: Scene, seen: Seen, draw: Draw, whole: bool) -> str:
    objects = scene.objects
    names = [named(each, objects, draw, whole) for each in objects]
    names = [("an " if name[0] in "aeiou" else "a ") + name for name in names]
    if len(objects) == 1:
        text = one(ALONE, draw).format(*names)
    elif next(draw) < LISTED or not seen:
        text = f"{', '.join(names[:-1])} and {names[-1]}"
    else:
        text = _related(names, seen, draw)
    return text + (f" on {FLOORS[scene.floor]}" if next(draw) < FLOOR_SAID else "")


def _related(names: list[str], seen: Seen, draw: Draw) -> str:
    """One relation, and what may be said of a third object without making the first one doubtful."""
    stacked = [row for row in seen if row[1] == "on top of"]
    i, relation, j = one(stacked if stacked and next(draw) < STACK_SAID else seen, draw)
    text = one(PAIR, draw).format(names[i], spoken(relation, draw), names[j])
    third = [k for k in range(len(names)) if k not in (i, j)]
    if not third:
        return text
    k = third[0]
    ways = [f"{names[k]}, and {names[i]} {spoken(relation, draw)} {names[j]}"]
    ways += [f"{text} and {spoken(r, draw)} {names[k]}" for a, r, b in seen if (a, b) == (i, k)]
    ways += [f"{text}, which is {spoken(r, draw)} {names[k]}" for a, r, b in seen if (a, b) == (j, k)]
    return one(ways, draw)


def named(thing: Object, among: Sequence[Object], draw: Draw, whole: bool = False) -> str:
    """Some of its attributes, and all that tell it from the others, or the whole: "large shiny red sphere"."""
    fields = ("size", "material", "colour", "shape")
    shares = (SIZE_SAID, MATERIAL_SAID, COLOUR_SAID, SHAPE_SAID)
    said = [field for field, share in zip(fields, shares) if next(draw) < share or whole]
    if any(other is not thing and all(getattr(other, f) == getattr(thing, f) for f in said) for other in among):
        said = list(fields)
    words = [spoken(getattr(thing, field), draw) for field in said]
    return " ".join(words if "shape" in said else [*words, "object"])


def unknown(text: str) -> list[str]:
    """The words of a text that no caption has."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in VOCABULARY]


def spoken(word: str, draw: Draw) -> str:
    """The word or one of its synonyms."""
    return one(WORDS.get(word, (word,)), draw)


def one(choices: Sequence, draw: Draw):
    """One of them."""
    return choices[int(next(draw) * len(choices))]
