"""Each task on scenes, trained for some minutes: pictures of unseen scenes are as their conditions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ldm
from ldm.cli import main
from ldm.data.derived import with_derived
from ldm.data.sampler import SampleId
from ldm.pipeline import NOISE_LEVEL, SHIPPED
from ldm.scenes import Scenes
from ldm.scenes.drawing import draw
from ldm.scenes.judge_accuracy import overlap
from ldm.scenes.pretrained import judge
from ldm.scenes.scoring import THRESHOLD
from tests.reduced import FILES, words, written
from tests.training.remembered import remember

COUNT, SEED = 100, 0  # unseen scenes that are painted
REMEMBERED = 4096  # scenes that are learned from
UNET = {"type": "unet", "channels": 32, "multipliers": [2, 3, 4], "blocks": 1, "attend": [], "head_width": 32}
DIT = {"type": "dit", "width": 192, "depth": 5, "heads": 6, "patch": 2}
OF_SCENES = ("path", "solver", "optimizer")  # nodes that are those of the small model
CHANGES: dict[str, Any] = {
    **{name: written("scenes")[name] for name in OF_SCENES},
    **{"autoencoder": str(SHIPPED), "size": 64, "ema.decay": 0.98, "schedule": {"type": "cosine", "warmup": 50}},
    **{"spacing": {"type": "trailing", "steps": 30}, "trainer.channels_last": False, "trainer.validate_images": 8},
    **{"backbone": UNET, "prediction": {"type": "x0"}},  # learned sooner than noise: the condition says much of it
}
OWN: dict[str, dict[str, Any]] = {
    "semantic_synthesis": {"trainer.steps": 300},
    "layout_to_image": {  # tokens know where they are; this U-Net took three times as long to learn what a box is
        **{"trainer.steps": 1500, "backbone": DIT, "conditioner.width": 128, "conditioner.boxes": 3},
        "draw": {"type": "logit_normal", "mean": 1.0, "std": 1.4},  # places are settled where there is most noise
    },
    "inpainting": {"trainer.steps": 400},
    "super_resolution": {  # where there is most noise, only the small picture says what is seen
        **{"trainer.steps": 800, "draw": {"type": "logit_normal", "mean": 1.5, "std": 1.4}},
        "backbone": {**UNET, "multipliers": [3, 4, 4]},
    },
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The file that all of them learn from."""
    return remember(tmp_path_factory.mktemp("scenes") / "scenes.safetensors", REMEMBERED)


def trained(name: str, scenes: Path, folder: Path) -> Any:
    """A task's configuration, trained small on scenes."""
    own = OWN[name]
    steps = {f"trainer.{key}": own["trainer.steps"] for key in ("validate_every", "save_every")}
    data = {"type": "remembered", "file": str(scenes), "batch_size": 16}
    changes = {**CHANGES, **own, **steps, "data": data}
    assert main(["train-ldm", "--config", str(FILES[name]), "--run", str(folder), *words(changes)]) == 0
    return ldm.load(folder / "model.safetensors", device="cpu", precision="fp32")


@torch.inference_mode()
def painted(name: str, pipe: Any) -> tuple[Tensor, dict[str, Any]]:
    """Pictures (B, 3, H, W) of unseen scenes' conditions, and what they were told."""
    data = Scenes(resolution=64, batch_size=COUNT, split="validation", adds=["segmentation", "boxes"])
    batch = data.batch([SampleId(i, i, 0) for i in range(COUNT)], SEED)
    noise = torch.randn(COUNT, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    told = with_derived(batch, pipe.conditioner.reads, noise, SEED)
    told["noise_level"] = torch.full((COUNT,), NOISE_LEVEL)  # of the small picture, where there is one: sampling's
    condition, settings = pipe.conditioner(told), pipe.settings()
    drop = {part: torch.ones(COUNT, dtype=torch.bool) for part in pipe.conditioner.guided()}
    x = settings.sampler(pipe.denoiser, noise, None, condition, pipe.conditioner(told, drop))
    return pipe.decode(x).clamp(-1, 1), told


def instances() -> Tensor:
    """Which object each pixel of the scenes shows (B, H, W)."""
    return ldm.scenes.render(draw(SEED, range(COUNT), "validation"), 64, want=("mask",))["mask"]


@pytest.mark.slow
def test_objects_lie_where_the_map_has_them(scenes, tmp_path):
    pictures, _ = painted("semantic_synthesis", trained("semantic_synthesis", scenes, tmp_path))
    found = overlap(judge()(pictures), instances()).mean().item()
    print(f"semantic synthesis: masks overlap {found:.2f}")
    assert found >= 0.6


@pytest.mark.slow
def test_objects_lie_in_their_boxes(scenes, tmp_path):
    pictures, told = painted("layout_to_image", trained("layout_to_image", scenes, tmp_path))
    reading = judge()(pictures)
    found = []
    for boxes, labels, score, mask in zip(told["boxes"], told["box_labels"], reading.score, reading.mask > 0.5):
        seen = around(mask[(score > THRESHOLD) & mask.any((1, 2))])  # (K, 4)
        for box in boxes[labels >= 0]:
            found.append(max((alike(box, other) for other in seen), default=0.0))
    print(f"layout to image: boxes overlap {sum(found) / len(found):.2f}")
    assert sum(found) / len(found) >= 0.5


def around(masks: Tensor) -> Tensor:
    """The boxes (K, 4) of masks (K, H, W): corners as parts of width and height."""
    sides = []
    for axis in (1, 2):
        line = masks.any(axis)  # (K, W), then (K, H)
        at = torch.arange(line.shape[1])
        first = at.where(line, line.shape[1]).amin(1)
        last = at.where(line, -1).amax(1) + 1
        sides.append((first / line.shape[1], last / line.shape[1]))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1)


def alike(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes."""
    both = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return (both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)).item()


@pytest.mark.slow
def test_a_large_picture_made_small_is_the_one_it_was_made_of(scenes, tmp_path):
    pictures, told = painted("super_resolution", trained("super_resolution", scenes, tmp_path))
    error = (F.interpolate(pictures, (16, 16), mode="area") - told["low_resolution"]).square().mean((1, 2, 3))
    found = (10 * torch.log10(4 / error)).mean().item()
    print(f"super-resolution: {found:.1f} dB")
    assert found >= 30


@pytest.mark.slow
def test_what_is_painted_anew_keeps_what_is_known(scenes, tmp_path):
    """Before it is put back: against what the first stage alone makes of it."""
    pipe = trained("inpainting", scenes, tmp_path)
    pictures, told = painted("inpainting", pipe)
    known = 1 - told["mask"]  # (B, 1, H, W)
    with torch.inference_mode():
        own = pipe.decode(pipe.autoencoder.encode(told["image"])).clamp(-1, 1)
    error = ((pictures - own).square() * known).sum((1, 2, 3)) / known.sum((1, 2, 3)) / 3
    found = (10 * torch.log10(4 / error)).mean().item()
    print(f"inpainting: known pixels {found:.1f} dB from the first stage's own")
    assert found >= 30
