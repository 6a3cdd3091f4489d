"""What an evaluation found, as tables of texts and as plots: what a page and the documentation show alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ldm.metrics.plot import plot

NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "frechet": "Frechet distance",
    "sfrechet": "Frechet distance of maps (sFID)",
    "kernel": "kernel distance (KID; around 0 where sets are alike)",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score",
}
RIGHT = "all attributes and relations right"


class Table(NamedTuple):
    """Texts in rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As documentation has it."""
        lines = [list(self.head), ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tables(found: Mapping[str, Any], name: str) -> Iterator[Table]:
    """Those of one part."""
    part = found[name]
    if name in ("first_stage", "samples"):
        yield distances(part)
    if name == "samples" and found.get("yardsticks"):
        yield yardsticks(found["yardsticks"], part["frechet"])
    if name == "prompts":
        yield from kinds(part)
    if name == "steps":
        yield steps(part)


def plots(found: Mapping[str, Any], name: str) -> dict[str, str]:
    """SVGs of one part, by what they show."""
    if name == "prompts":
        return dict(by_guidance(found[name]))
    return dict(by_steps(found[name])) if name == "steps" else {}


def distances(part: Mapping[str, Any]) -> Table:
    """All that a part was measured by."""
    rows = [(NAMES[name], number(part[name])) for name in NAMES if name in part]
    return Table([f"{part['made']} pictures against {part['true']}{few([part])}", ""], rows)


def yardsticks(found: Mapping[str, float], own: float) -> Table:
    """The Frechet distances that a model's is to be held against."""
    rows = [(name, number(value), ratio(own / value) if value else "") for name, value in found.items()]
    return Table(["Frechet distance of", "", "the samples', of that"], rows)


def ratio(value: float) -> str:
    """A share, or how many times as much."""
    return f"{value:.1%}" if value < 2 else f"{value:.3g} times"


def kinds(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The share of whole pictures by kind of prompt and guidance, and that of each part of a prompt."""
    names, settings = list(rows[0]["alignment"]), [f"cfg {row['cfg']:g}" for row in rows]
    body = [[kind, *(share(row["alignment"][kind]["whole"]) for row in rows)] for kind in names]
    yield Table([RIGHT, *settings], body)
    parts = dict.fromkeys(name for row in rows for kind in names for name in row["alignment"][kind])
    detail = [[name, *(share(summed(row["alignment"], name)) for row in rows)] for name in parts if name != "whole"]
    yield Table(["of all kinds, part by part", *settings], detail)


def steps(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Right pictures and distance of every solver at every number of steps."""
    body = [
        (row["solver"], str(row["steps"]), share(summed(row["alignment"], "whole")), number(row["frechet"]))
        for row in rows
    ]
    return Table(["solver", "steps", RIGHT, NAMES["frechet"] + few(rows)], body)


def few(parts: Sequence[Mapping[str, Any]]) -> str:
    """A warning behind distances of too few pictures."""
    return " (too few for more than an indication)" if any(part["indicative"] for part in parts) else ""


def summed(alignment: Mapping[str, Mapping[str, tuple[int, int]]], name: str) -> tuple[int, int]:
    """(right, of how many) over all kinds of prompts."""
    found = [kind.get(name, (0, 0)) for kind in alignment.values()]
    return sum(right for right, _ in found), sum(of for _, of in found)


def share(counts: Sequence[int]) -> str:
    """A percentage and what it is of."""
    return f"{100 * counts[0] / counts[1]:.1f}% of {counts[1]}" if counts[1] else ""


def whole(row: Mapping[str, Any]) -> float:
    """The share of pictures that are right in everything."""
    right, of = summed(row["alignment"], "whole")
    return right / of


def number(value: Any) -> str:
    """A number, a mean and what it may be off by, or one with the deviation of the parts that it was taken of."""
    if isinstance(value, Mapping):
        off = f"± {value['error']:.2g}" if "error" in value else f"(of parts, deviating by {value['std']:.2g})"
        return f"{value['mean']:.4g} {off}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def by_guidance(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Alignment, distance, and what is gained and lost with guidance."""
    right = {"": [(row["cfg"], 100 * whole(row)) for row in rows]}
    yield "guidance_alignment", plot("Right in everything, by guidance", "cfg", "%", right)
    apart = {"": [(row["cfg"], row["frechet"]) for row in rows]}
    yield "guidance_distance", plot("Frechet distance, by guidance", of(rows, "cfg"), "", apart)
    if all("recall" in row for row in rows):
        lines = {name: [(row["cfg"], row[name]) for row in rows] for name in ("precision", "recall", "coverage")}
        yield "guidance_diversity", plot("What guidance gains and loses", of(rows, "cfg"), "", lines)


def by_steps(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Alignment and distance by the number of steps, a line for each solver."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    right = {name: [(row["steps"], 100 * whole(row)) for row in rows if row["solver"] == name] for name in solvers}
    yield "steps_alignment", plot("Right in everything, %, by steps", "steps", "", right, log=True)
    apart = {name: [(row["steps"], row["frechet"]) for row in rows if row["solver"] == name] for name in solvers}
    yield "steps_distance", plot("Frechet distance, by steps", of(rows, "steps"), "", apart, log=True)


def of(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """What lies across, and of how many pictures each point is."""
    return f"{what}, {rows[0]['made']} pictures each{few(rows)}"
