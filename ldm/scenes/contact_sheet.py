"""A sheet of scenes: some with captions at 256 pixels, the ground truth of one at 128, and many at 64."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.config.schema import Config
from ldm.scenes import Camera, Scene, captions, draw, edit, render

PAPER, INK = (255, 255, 255), (40, 44, 52)
GAP, WIDTH = 4, 1024  # pixels
TINTS = torch.tensor([(34, 38, 46), (236, 112, 99), (93, 173, 226), (244, 208, 63)], dtype=torch.uint8)


def write(config: Config, file: Path) -> None:
    """The sheet that a configuration describes."""
    sheet(config["seed"], config["split"]).save(file)


def sheet(seed: int, split: str) -> Image.Image:
    """Scenes 0 to 7 of a split large, the ground truth of one, and the next 32 small."""
    table = draw(seed, range(40), split)
    texts = captions(table, seed, range(40))
    rows = [row(render(table[i : i + 4], 256)["image"], texts[i : i + 4]) for i in (0, 4)]
    rows.append(row(*_ground_truth(next(s for s in table.scenes() if len(s.objects) > 1), seed)))
    rows += [row(render(table[i : i + 16], 64)["image"], []) for i in (8, 24)]
    return stacked(rows)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows below each other."""
    page = Image.new("RGB", (WIDTH, sum(each.height for each in rows)), PAPER)
    top = 0
    for each in rows:
        page.paste(each, (0, top))
        top += each.height
    return page


def _ground_truth(scene: Scene, seed: int) -> tuple[Tensor, list[str]]:
    """A scene, its edited twin, other light and view, and its maps, (8, 3, 128, 128), with titles."""
    twin, instruction = edit(scene, seed, 0)
    turned = replace(scene, camera=Camera(scene.camera.azimuth - 25, 42.0, 10.0))
    pictures = render([scene, twin, replace(scene, time=1.0), turned], 128)["image"]
    truth = render([scene], 128, want=("mask", "depth", "normals", "edges"))
    near = ((16 - truth["depth"]) * 22).clamp(0, 255).to(torch.uint8)
    maps = [
        TINTS[truth["mask"]].permute(0, 3, 1, 2),
        near[:, None].expand(-1, 3, -1, -1),
        (truth["normals"] * 127 + 128).to(torch.uint8),
        (truth["edges"][:, None] * 255).to(torch.uint8).expand(-1, 3, -1, -1),
    ]
    titles = ["a scene", instruction, "time = 1", "another view", "mask", "depth", "normals", "edges"]
    return torch.cat((pictures, *maps)), titles


def row(pictures: Tensor, texts: Sequence[str]) -> Image.Image:
    """Pictures (N, 3, S, S) side by side, each with its text below."""
    count, side = len(pictures), WIDTH // len(pictures)
    size, font = pictures.shape[-1] - GAP, ImageFont.load_default(12)
    lines = [textwrap.wrap(text, side // 6) for text in texts]
    made = Image.new("RGB", (WIDTH, size + GAP + 15 * max((len(each) for each in lines), default=0)), PAPER)
    pen = ImageDraw.Draw(made)
    for i in range(count):
        picture = Image.fromarray(pictures[i].permute(1, 2, 0).contiguous().numpy())
        made.paste(picture.crop((0, 0, size, size)), (i * side, 0))
    for i, words in enumerate(lines):
        pen.multiline_text((i * side + 2, size + 1), "\n".join(words), INK, font, spacing=2)
    return made
