"""The built-in world: an endless source of captioned, ray-traced pictures with known ground truth."""

from ldm.scenes.captions import caption, captions
from ldm.scenes.description import (
    COLOURS,
    FLOORS,
    MATERIALS,
    SHAPES,
    SIZES,
    Camera,
    Light,
    Object,
    Scene,
    Table,
)
from ldm.scenes.drawing import SPLITS, draw, held_out, scene
from ldm.scenes.edits import edit
from ldm.scenes.relations import RELATIONS, relations
from ldm.scenes.render import render
from ldm.scenes.source import Scenes

__all__ = [
    "COLOURS",
    "FLOORS",
    "MATERIALS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Camera",
    "Light",
    "Object",
    "Scene",
    "Scenes",
    "Table",
    "caption",
    "captions",
    "draw",
    "edit",
    "held_out",
    "relations",
    "render",
    "scene",
]
