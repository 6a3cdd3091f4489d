"""What a caption or a whole scene states about a picture, and false statements for tests of the judge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations

from ldm.scenes.captions import FLOORS, WORDS
from ldm.scenes.description import COLOURS, MATERIALS, SHAPES, SIZES, Scene
from ldm.scenes.drawing import HELD_OUT_COLOURS, HELD_OUT_RELATIONS
from ldm.scenes.relations import RELATIONS, relations

NAMES = {"shape": SHAPES, "colour": COLOURS, "material": MATERIALS, "size": SIZES}
CANONICAL = {synonym: word for word, synonyms in WORDS.items() for synonym in synonyms}
CANONICAL |= {word: word for words in (*NAMES.values(), RELATIONS, ("object", "and", "which")) for word in words}
TOKEN = re.compile(rf"\b({'|'.join(sorted(CANONICAL, key=len, reverse=True))})\b")
MIRRORED = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
RARE = {*zip(SHAPES, HELD_OUT_COLOURS)}
FLOOR = re.compile(rf" on ({'|'.join(FLOORS.values())})$")


@dataclass(frozen=True)
class ObjectSpec:
    """The attributes that are stated of one object; None where nothing is stated."""

    shape: str | None = None
    colour: str | None = None
    material: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Statement:
    """A picture shows exactly these objects, and these relations (i, relation, j) between them hold."""

    objects: tuple[ObjectSpec, ...]
    relations: frozenset[tuple[int, str, int]] = frozenset()

    @classmethod
    def of(cls, scene: Scene) -> Statement:
        """Everything that is true of a scene."""
        objects = (ObjectSpec(o.shape, o.colour, o.material, o.size) for o in scene.objects)
        return cls(tuple(objects), frozenset(relations(scene)))

    @classmethod
    def parse(cls, caption: str) -> Statement:
        """What a caption in the vocabulary of scenes states; other words are ignored."""
        objects: list[ObjectSpec] = []
        related: set[tuple[int, str, int]] = set()
        attributes: dict[str, str] = {}
        subject, relation, before = 0, "", ""
        for word in (CANONICAL[token] for token in TOKEN.findall(FLOOR.sub("", caption.lower()))):
            if word in RELATIONS:  # in "a R b and R c" the subject is a; in "a R b, which is R c" it is b
                subject, relation = subject if before == "and" else len(objects) - 1, word
            elif word == "object" or word in SHAPES:
                objects.append(ObjectSpec(**attributes, shape=word if word in SHAPES else None))
                if relation:
                    related.add((subject, relation, len(objects) - 1))
                attributes, relation = {}, ""
            elif word not in ("and", "which"):
                attributes[next(name for name, words in NAMES.items() if word in words)] = word
            before = word
        return cls(tuple(objects), frozenset(related))

    @property
    def held_out(self) -> bool:
        """True if it names a combination that is held out of training."""
        shapes = [spec.shape for spec in self.objects]
        named = {(shapes[i], relation, shapes[j]) for i, relation, j in self.relations}
        named |= {(b, MIRRORED.get(relation, ""), a) for a, relation, b in named}
        return bool(named & {*HELD_OUT_RELATIONS} or RARE & {(spec.shape, spec.colour) for spec in self.objects})


def swaps(statement: Statement) -> Iterator[tuple[str, Statement]]:
    """Each false statement that swaps one attribute of a true one, or replaces its relations by one false relation."""
    for i, spec in enumerate(statement.objects):
        for name, values in NAMES.items():
            for value in values:
                if value != getattr(spec, name):
                    objects = (*statement.objects[:i], replace(spec, **{name: value}), *statement.objects[i + 1 :])
                    yield name, replace(statement, objects=objects)
    for i, j in permutations(range(len(statement.objects)), 2):
        for relation in RELATIONS:
            if (i, relation, j) not in statement.relations:
                yield relation, replace(statement, relations=frozenset({(i, relation, j)}))
