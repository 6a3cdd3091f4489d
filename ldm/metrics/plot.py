"""Line plots as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, DOWN = 460, 300, 56, 16, 34, 46
COLOURS = ("#1b3a6b", "#c0392b", "#1e8449", "#b9770e", "#6c3483")
Points = Sequence[tuple[float, float]]


def scale(low: float, high: float, first: float, last: float, log: bool = False) -> Callable[[float], float]:
    """A map from values in [low, high] to pixels in [first, last]."""
    f: Callable[[float], float] = math.log if log else float
    return lambda value: first + (f(value) - f(low)) / ((f(high) - f(low)) or 1) * (last - first)


def plot(title: str, across: str, up: str, lines: Mapping[str, Points], log: bool = False, zero: bool = True) -> str:
    """A plot of several lines; with `log`, the horizontal axis is logarithmic and its ticks are the points."""
    xs, ys = (sorted({point[axis] for line in lines.values() for point in line}) for axis in (0, 1))
    xs = xs if log else ticks(xs[0], xs[-1])
    marks = ticks(min(ys[0], 0) if zero else ys[0], ys[-1])
    x = scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT, log)
    y = scale(marks[0], marks[-1], HEIGHT - DOWN, TOP)
    parts = [text(WIDTH / 2, 18, title, "middle", "bold")]
    for mark in marks:
        parts.append(f'<path d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 6, y(mark) + 4, f"{mark:g}", "end"))
    parts += [text(x(mark), HEIGHT - DOWN + 16, f"{mark:g}") for mark in xs]
    parts += [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across), text(LEFT, TOP - 4, up, "end")]
    for number, (name, line) in enumerate(lines.items()):
        parts += drawn(name, [(x(a), y(b)) for a, b in line], number, len(lines))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12" style="background:#fff"'
    return "\n".join([f"{head} {style}>", *parts, "</svg>"])


def drawn(name: str, points: Points, number: int, count: int) -> list[str]:
    """One line with its points, and its name if there are several lines."""
    colour = COLOURS[number % len(COLOURS)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    found = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    found += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
    if count > 1:
        found.append(text(WIDTH - RIGHT, HEIGHT - DOWN - 8 - 15 * (count - 1 - number), name, "end", fill=colour))
    return found


def text(x: float, y: float, words: str, anchor: str = "middle", weight: str = "normal", fill: str = "#222") -> str:
    """A text at a point."""
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}"'
    return f"<text {attributes}>{escape(words)}</text>"


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose a range."""
    if not high > low:
        high = low + (abs(low) or 1)
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
