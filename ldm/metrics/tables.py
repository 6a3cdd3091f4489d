"""Tables and plots of an evaluation, for the report's page and for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ldm.metrics.plot import plot

NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "frechet": "Frechet distance",
    "sfrechet": "Frechet distance of spatial features (sFID)",
    "kernel": "KID (kernel distance, not multiplied by 1000; near 0 when the sets are alike)",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score",
}
CORRECT = "all attributes and relations correct"
Row = Mapping[str, Any]  # of the parts `prompts` and `steps`: one setting


class Table(NamedTuple):
    """Rows of texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """The table in HTML."""
        cells = [f"<th>{escape(cell)}</th>" for cell in self.head]
        lines = [cells, *([f"<td>{escape(cell)}</td>" for cell in row] for row in self.rows)]
        return f"<table>{''.join('<tr>' + ''.join(line) + '</tr>' for line in lines)}</table>"


def tables(evaluation: Mapping[str, Any], name: str) -> Iterator[Table]:
    """The tables of one part of an evaluation."""
    part = evaluation[name]
    if name in ("first_stage", "samples"):
        head = f"{part['made']} pictures against {part['true']}{few([part])}"
        yield Table([head, ""], [(NAMES[key], number(part[key])) for key in NAMES if key in part])
    if name == "samples" and evaluation.get("yardsticks"):
        own, yardsticks = part["frechet"], evaluation["yardsticks"].items()
        rows = [(key, number(other), ratio(own / other) if other else "") for key, other in yardsticks]
        yield Table(["Frechet distance of", "", "of the samples, relative to it"], rows)
    if name == "prompts":
        yield from by_guidance(part)
    if name == "steps":
        steps = [(row["solver"], str(row["steps"]), share(total(row, "whole")), number(row["frechet"])) for row in part]
        yield Table(["solver", "steps", CORRECT, NAMES["frechet"] + few(part)], steps)


def by_guidance(rows: Sequence[Row]) -> Iterator[Table]:
    """Shares of correct pictures by kind of prompt, and of correct parts over all kinds; a column for each cfg."""
    kinds, head = rows[0]["alignment"], [f"cfg {row['cfg']:g}" for row in rows]
    yield Table([CORRECT, *head], [[kind, *(share(row["alignment"][kind]["whole"]) for row in rows)] for kind in kinds])
    parts = dict.fromkeys(part for row in rows for kind in kinds for part in row["alignment"][kind] if part != "whole")
    yield Table(["parts of all prompts", *head], [[part, *(share(total(row, part)) for row in rows)] for part in parts])


def plots(evaluation: Mapping[str, Any], name: str) -> dict[str, str]:
    """The SVG plots of one part of an evaluation, by the stems of their files."""
    if name not in ("prompts", "steps"):
        return {}
    rows: Sequence[Row] = evaluation[name]
    axis, x = ("guidance", "cfg") if name == "prompts" else ("steps", "steps")
    across = f"{x}, {rows[0]['made']} pictures each{few(rows)}"

    def draw(title: str, across: str, up: str, y: Callable[[Row], float]) -> str:
        lines: dict[str, list[tuple[float, float]]] = {}  # one for each solver
        for row in rows:
            lines.setdefault(row.get("solver", ""), []).append((row[x], y(row)))
        return plot(f"{title}, by {axis}", across, up, lines, log=name == "steps")

    found = {f"{axis}_alignment": draw("Correct pictures", x, "%", lambda row: 100 * correct(row))}
    found[f"{axis}_distance"] = draw("Frechet distance", across, "", lambda row: row["frechet"])
    if name == "prompts" and all("recall" in row for row in rows):
        lines = {key: [(row[x], row[key]) for row in rows] for key in ("precision", "recall", "coverage")}
        found["guidance_diversity"] = plot("Precision, recall and coverage, by guidance", across, "", lines)
    return found


# ------------------------------------------------------------------------------------------------- numbers and texts


def total(row: Row, part: str) -> tuple[int, int]:
    """(correct, total) of a part over all kinds of prompts."""
    counts = [kind.get(part, (0, 0)) for kind in row["alignment"].values()]
    return sum(correct for correct, _ in counts), sum(of for _, of in counts)


def correct(row: Row) -> float:
    """The share of pictures in which everything is correct."""
    correct, of = total(row, "whole")
    return correct / of


def share(counts: Sequence[int]) -> str:
    """A percentage, and the number of which it is."""
    return f"{100 * counts[0] / counts[1]:.1f}% of {counts[1]}" if counts[1] else ""


def ratio(value: float) -> str:
    """A ratio as a percentage, or as a multiple."""
    return f"{value:.1%}" if value < 2 else f"{value:.3g} times"


def number(value: Any) -> str:
    """A number; a mean with its standard error, or with the standard deviation over subsets."""
    if isinstance(value, Mapping):
        spread = f"± {value['error']:.2g}" if "error" in value else f"(std {value['std']:.2g} over subsets)"
        return f"{value['mean']:.4g} {spread}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def few(parts: Sequence[Row]) -> str:
    """A remark on distances between small sets."""
    return " (too few pictures: only indicative)" if any(part["indicative"] for part in parts) else ""
