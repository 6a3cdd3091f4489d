"""What a validation measures, against the same measured in one piece."""

import pytest
import torch

from ldm.checkpoint.pretrained import judge
from ldm.data.scenes import Scenes
from ldm.metrics.frechet import Moments, frechet_distance
from ldm.metrics.images import psnr
from ldm.metrics.reading import blurred
from ldm.pictures import to_float
from ldm.training.ranks import Rank
from ldm.training.reconstructions import Reconstructions

SCENES = Scenes(resolution=64, batch_size=8, size=80, split="validation")


def softened(image):
    x = to_float(image)
    return x, blurred(x, 1.0)


def test_batches_add_up_to_the_whole(tmp_path):
    found = Reconstructions(SCENES, 72, 0).measure(softened, None, tmp_path / "grid.png", Rank())
    spread = [80 * i // 72 for i in range(72)]
    x, y = softened(SCENES.batch([(i, i, 0) for i in spread], 0)["image"])
    true, made = (Moments.of(judge().pooled(each)) for each in (x, y))
    assert found["val/psnr"] == pytest.approx(psnr(x, y).mean().item(), rel=1e-5)
    assert found["val/frechet"] == pytest.approx(frechet_distance(true, made), rel=1e-4)
    assert found["val/energy"] < 0.8
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_perfect_reconstructions_are_at_no_distance(tmp_path):
    same = Reconstructions(SCENES, 40, 0).measure(
        lambda image: (to_float(image),) * 2, None, tmp_path / "g.png", Rank()
    )
    assert same["val/frechet"] < 1e-9
    assert same["val/energy"] == 1
    assert torch.isinf(torch.tensor(same["val/psnr"]))
