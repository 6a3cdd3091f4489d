"""What a validation measures, against the same measured in one piece."""

import pytest
import torch

from ldm.distributed import Rank
from ldm.metrics.feature_metrics import Moments, frechet_distance
from ldm.metrics.images import psnr
from ldm.pictures import to_float
from ldm.scenes import Scenes
from ldm.scenes.judge_accuracy import blurred
from ldm.scenes.pretrained import judge
from ldm.training.validation import ReconstructionMetrics

SCENES = Scenes(resolution=64, batch_size=8, size=80, split="validation")


def softened(image):
    x = to_float(image)
    return x, blurred(x, 1.0)


def test_batches_add_up_to_the_whole(tmp_path):
    found = ReconstructionMetrics(SCENES, 72, 0).measure(softened, None, tmp_path / "grid.png", Rank())
    evenly_spaced = [80 * i // 72 for i in range(72)]
    x, y = softened(SCENES.batch([(i, i, 0) for i in evenly_spaced], 0)["image"])
    true, made = (Moments.of(judge().pooled(each)) for each in (x, y))
    assert found["val/psnr"] == pytest.approx(psnr(x, y).mean().item(), rel=1e-5)
    assert found["val/frechet"] == pytest.approx(frechet_distance(true, made), rel=1e-4)
    assert found["val/energy"] < 0.8
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_perfect_reconstructions_are_at_no_distance(tmp_path):
    same = ReconstructionMetrics(SCENES, 40, 0).measure(
        lambda image: (to_float(image),) * 2, None, tmp_path / "g.png", Rank()
    )
    assert same["val/frechet"] < 1e-9
    assert same["val/energy"] == 1
    assert torch.isinf(torch.tensor(same["val/psnr"]))
