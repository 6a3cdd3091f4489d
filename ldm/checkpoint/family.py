"""What a family of published models is, and what it says of its backbone; each family is one file in families/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.checkpoint.checkpoint import Checkpoint
from ldm.checkpoint.files import Tensors
from ldm.checkpoint.formats.diffusers import Folder, Written
from ldm.checkpoint.rename import KeyMap, State
from ldm.errors import CheckpointError

Node = dict[str, Any]


class Family:
    """A family of published models: how it is recognised, read, and written. A method that is missing refuses."""

    name = ""
    backbone: Backbone | None = None

    def parts(self) -> tuple[str, ...]:
        """The parts of a diffusers folder that are read."""
        return ()

    def recognises(self, tensors: Tensors) -> bool:
        """True if a single file is of this family, by its names and shapes."""
        return False

    def recognises_folder(self, folder: Folder) -> bool:
        """True if a diffusers folder is of this family."""
        return False

    def read(self, tensors: Tensors) -> Checkpoint:
        """A single file as configuration and tensors in our names."""
        raise NotImplementedError

    def read_folder(self, folder: Folder) -> Checkpoint:
        """A diffusers folder as configuration and tensors in our names."""
        raise NotImplementedError

    def describes(self, config: Mapping[str, Any]) -> bool:
        """True if a configuration of ours is of this family, so that others' formats can hold it."""
        return False

    def write(self, config: Node, state: Mapping[str, Tensor], notes: list[str]) -> State:
        """The tensors of a single file; changes `config` where the file says something else than it did."""
        raise CheckpointError("no single file is known for this model", got=self.name, hint="our own format")

    def write_folder(self, config: Node, state: Mapping[str, Tensor], tokenizer: Any, notes: list[str]) -> Written:
        """The parts of a diffusers folder."""
        raise CheckpointError("diffusers has no such pipeline", got=self.name, hint="our own format")


@dataclass(frozen=True)
class Backbone:
    """A kind of backbone: how its arguments are inferred, what others call its tensors, and diffusers' settings."""

    type: str  # in our configurations
    title: str
    folder: str  # in a diffusers pipeline
    numbers: Callable[[Mapping[str, tuple[int, ...]], str], Node]  # our arguments from shapes and their layout
    given: Callable[[Mapping[str, tuple[int, ...]], str], Node]  # what the assembly gives, likewise; also of "ours"
    keys: Callable[[Any, str], KeyMap]  # of a network in a layout
    heads: Callable[[Mapping[str, Any]], Node]  # our arguments from diffusers' settings
    settings: Callable[[Any, int], Node]  # diffusers' settings of a network for latents of a size
    computed: tuple[str, ...] = ()  # fixed tables in files, which our network computes
