"""What a second stage is told of its samples: how much of their captions it reads, and what it drops on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Told:
    """Of captions that were looked at, and of what is planned for all samples."""

    room: int  # tokens that are read of a caption; 0 where none is read
    longer: int  # captions with more
    drops: dict[str, float]  # by part of the condition, the share of samples that lose it
    guided: bool  # whether sampling moves away from what lacks its condition
