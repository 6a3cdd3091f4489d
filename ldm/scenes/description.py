"""Descriptions of scenes: named objects at known places, as dataclasses or as a table of many scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "gray")
MATERIALS = ("matte", "shiny")
SIZES = ("small", "large")
FLOORS = ("gray", "wooden", "checkered", "striped")
OBJECTS = 3  # places in a table's row

RADIUS = np.array([0.5, 0.85])  # by size
HALF_WIDTH = np.array([0.9, 0.78, 0.72, 0.88])  # by shape, in radii
HALF_HEIGHT = np.array([0.9, 0.78, 0.82, 1.0])
REACH = HALF_WIDTH * [1, 2**0.5, 1, 1]  # of the corners from the axis

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Object:
    """An object: its attributes, its centre in the world (x right, y away, z up) and its turn in degrees."""

    shape: str
    colour: str
    material: str
    size: str
    x: float
    y: float
    z: float
    turn: float = 0.0


@dataclass(frozen=True, slots=True)
class Light:
    """Direction of the light in degrees: round the table from the right, and up from its surface."""

    azimuth: float = 225.0
    elevation: float = 45.0


@dataclass(frozen=True, slots=True)
class Camera:
    """Degrees round the table from the front and up from its surface, and the distance from its middle."""

    azimuth: float = 0.0
    elevation: float = 30.0
    distance: float = 9.0


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three objects on a floor; as `time` goes from 0 to 1, the light turns by 90 degrees."""

    objects: tuple[Object, ...]
    floor: str = "gray"
    light: Light = Light()
    camera: Camera = Camera()
    time: float = 0.0

    def __post_init__(self) -> None:
        _check("objects", len(self.objects), 1, OBJECTS)
        _check("light.elevation", self.light.elevation, 30, 60)  # the shadow of a cone must be longer than it is wide
        _check("camera.elevation", self.camera.elevation, 5, 50)  # no ray may be steeper than a cone
        _check("camera.distance", self.camera.distance, 6, 20)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: out of range; got {value:g}; expected {least:g} to {most:g}")


@dataclass
class Table:
    """Many scenes as columns (B, 3): names are indices into the tuples above, -1 for no object."""

    shape: Integers
    colour: Integers
    material: Integers
    size: Integers
    x: Floats
    y: Floats
    z: Floats
    turn: Floats
    floor: Integers  # (B,)
    light: Floats  # (B, 2) azimuth, elevation
    camera: Floats  # (B, 3) azimuth, elevation, distance
    time: Floats  # (B,)

    def __len__(self) -> int:
        return len(self.floor)

    def __getitem__(self, rows: NDArray | slice) -> Table:
        return Table(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def there(self) -> NDArray[np.bool_]:
        """(B, 3) True for places that hold an object."""
        return self.shape >= 0

    @property
    def radius(self) -> Floats:
        """(B, 3) radius by size; 0 for no object."""
        return np.where(self.there, RADIUS[self.size], 0.0)

    def clear(self, row: int) -> None:
        """Remove all objects of a scene."""
        for names in (self.shape, self.colour, self.material, self.size):
            names[row] = -1
        for numbers in (self.x, self.y, self.z, self.turn):
            numbers[row] = 0

    def extent(self, by_shape: Floats) -> Floats:
        """(B, 3) HALF_WIDTH, HALF_HEIGHT or REACH in world units; 0 for no object."""
        return self.radius * by_shape[self.shape]

    def scenes(self) -> list[Scene]:
        """The scenes as dataclasses."""
        columns = [getattr(self, field.name).tolist() for field in fields(self)]
        return [_scene(*row) for row in zip(*columns)]

    @staticmethod
    def of(scenes: Sequence[Scene]) -> Table:
        """The table of these scenes."""
        objects = np.array([_row(scene) for scene in scenes])  # (B, 8, 3)
        names = objects[:, :4].astype(np.int64)
        return Table(
            *(names[:, 0], names[:, 1], names[:, 2], names[:, 3]),
            *(objects[:, 4], objects[:, 5], objects[:, 6], objects[:, 7]),
            floor=np.array([FLOORS.index(scene.floor) for scene in scenes]),
            light=np.array([(scene.light.azimuth, scene.light.elevation) for scene in scenes]),
            camera=np.array([(s.camera.azimuth, s.camera.elevation, s.camera.distance) for s in scenes]),
            time=np.array([scene.time for scene in scenes], dtype=np.float64),
        )


# one row of every column
def _scene(shape, colour, material, size, x, y, z, turn, floor, light, camera, time) -> Scene:
    objects = tuple(
        Object(SHAPES[shape[i]], COLOURS[colour[i]], MATERIALS[material[i]], SIZES[size[i]], x[i], y[i], z[i], turn[i])
        for i in range(OBJECTS)
        if shape[i] >= 0
    )
    return Scene(objects, FLOORS[floor], Light(*light), Camera(*camera), time)


def _row(scene: Scene) -> list[list[float]]:
    """(8, 3): names as indices, then places and turn."""
    rows = [
        [
            *(SHAPES.index(each.shape), COLOURS.index(each.colour), MATERIALS.index(each.material)),
            *(SIZES.index(each.size), each.x, each.y, each.z, each.turn),
        ]
        for each in scene.objects
    ]
    rows += [[-1, -1, -1, -1, 0, 0, 0, 0]] * (OBJECTS - len(rows))
    return [list(column) for column in zip(*rows)]
