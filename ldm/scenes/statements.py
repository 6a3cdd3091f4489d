"""What is said of a picture, in a caption or by a whole scene, and how it may be said falsely."""

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
PROPER = {synonym: word for word, synonyms in WORDS.items() for synonym in synonyms}
PROPER |= {word: word for words in (*NAMES.values(), RELATIONS, ("object", "and", "which")) for word in words}
TOKEN = re.compile(rf"\b({'|'.join(sorted(PROPER, key=len, reverse=True))})\b")
MIRRORED = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
RARE = {*zip(SHAPES, HELD_OUT_COLOURS)}
FLOOR = re.compile(rf" on ({'|'.join(FLOORS.values())})$")


@dataclass(frozen=True)
class Described:
    """What is said of one object; None for what is left out."""

    shape: str | None = None
    colour: str | None = None
    material: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Claim:
    """What is said of a picture: these objects and no others, and which of them stand how to each other."""

    objects: tuple[Described, ...]
    relations: frozenset[tuple[int, str, int]] = frozenset()

    @classmethod
    def of(cls, scene: Scene) -> Claim:
        """All that is true of a scene."""
        objects = (Described(o.shape, o.colour, o.material, o.size) for o in scene.objects)
        return cls(tuple(objects), frozenset(relations(scene)))

    @classmethod
    def read(cls, caption: str) -> Claim:
        """What a caption in the words of scenes says; other words say nothing."""
        objects: list[Described] = []
        related: set[tuple[int, str, int]] = set()
        said: dict[str, str] = {}
        subject, relation, before = 0, "", ""
        for word in (PROPER[token] for token in TOKEN.findall(FLOOR.sub("", caption.lower()))):
            if word in RELATIONS:  # "a R b and R c" goes on about a, "a R b, which is R c" about b
                subject, relation = subject if before == "and" else len(objects) - 1, word
            elif word == "object" or word in SHAPES:
                objects.append(Described(**said, shape=word if word in SHAPES else None))
                if relation:
                    related.add((subject, relation, len(objects) - 1))
                said, relation = {}, ""
            elif word not in ("and", "which"):
                said[next(name for name, words in NAMES.items() if word in words)] = word
            before = word
        return cls(tuple(objects), frozenset(related))

    @property
    def held_out(self) -> bool:
        """Whether it names a combination that training never shows."""
        shapes = [described.shape for described in self.objects]
        ways = {(shapes[i], relation, shapes[j]) for i, relation, j in self.relations}
        ways |= {(b, MIRRORED.get(relation, ""), a) for a, relation, b in ways}
        return bool(ways & {*HELD_OUT_RELATIONS} or RARE & {(each.shape, each.colour) for each in self.objects})


def swaps(claim: Claim) -> Iterator[tuple[str, Claim]]:
    """Each false claim that differs from a scene's true one in an attribute, or makes of its relations a false one."""
    for i, described in enumerate(claim.objects):
        for name, values in NAMES.items():
            for value in values:
                if value != getattr(described, name):
                    others = (*claim.objects[:i], replace(described, **{name: value}), *claim.objects[i + 1 :])
                    yield name, replace(claim, objects=others)
    for i, j in permutations(range(len(claim.objects)), 2):
        for relation in RELATIONS:
            if (i, relation, j) not in claim.relations:
                yield relation, replace(claim, relations=frozenset({(i, relation, j)}))
