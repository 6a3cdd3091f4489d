"""FID's Inception against torch-fidelity's, with the same random weights."""

from __future__ import annotations

import pytest
import torch

from ldm.errors import InputError
from ldm.metrics.features import SIDE, InceptionFeatures, tensorflow
from ldm.metrics.inception import Inception
from ldm.pictures import to_float


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of a random network whose norms are not those of a fresh one, in torch's format."""
    torch.manual_seed(0)
    network = Inception().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_features_classes_and_map_are_torch_fidelitys(file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    maps: list = []
    theirs.Mixed_6d.register_forward_hook(lambda module, x, y: maps.append(y))
    images = torch.randint(0, 256, (2, 3, 40, 64), dtype=torch.uint8)
    with torch.inference_mode():
        pooled, logits = theirs(images)
        seen = InceptionFeatures(weights=str(file))(to_float(images))
    assert pooled.std() > 1e-3  # or equality would say nothing
    torch.testing.assert_close(seen.vectors, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.spatial, maps[0][:, :7].flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (64, 299), (400, 350)])
def test_the_kernel_is_tensorflows(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = torch.rand(1, 3, *size) * 255
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(SIDE, SIDE), align_corners=False)
    torch.testing.assert_close(tensorflow(x, SIDE), theirs, rtol=1e-5, atol=1e-3)


def test_another_kernel_has_another_name(file):
    a, b = InceptionFeatures(weights=str(file)), InceptionFeatures(weights=str(file), resize="bicubic")
    assert a.resize != b.resize
    x = to_float(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    assert not torch.allclose(a(x).vectors, b(x).vectors, rtol=1e-3)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(InputError, match=r"features\.weights: no such file .*; try `ldm fetch inception`"):
        InceptionFeatures(weights=str(tmp_path / "none.pth"))
