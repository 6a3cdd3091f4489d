"""The small pictures made of numbers, as a part of a configuration."""

from typing import Literal

from tests.data.tiny_source import TinySource


class Tiny(TinySource):
    """With the settings that decide whether a source can be cached."""

    def __init__(
        self,
        *,
        resolution: int = 16,
        count: int = 20,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        batch_size: int = 4,
        workers: int = 0,
    ):
        assert crop == "center"
        assert not flip, "the cache mirrors pictures itself"
        super().__init__(count, [(resolution, resolution)], batch_size=batch_size)
