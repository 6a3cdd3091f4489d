"""LPIPS beside torchmetrics', with the same random VGG16, and where its weights come from."""

import math

import pytest
import torch
import torchvision
from torch import nn

from ldm.checkpoint.vgg import heads, lpips
from ldm.errors import CheckpointError, InputError
from ldm.models.lpips import LPIPS, channel_distances


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """torchvision's VGG16 without its classifier; random weights that keep the scale, biases that are not zero."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for module in layers:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.normal_(module.bias, std=0.1)
    return layers


@pytest.fixture(scope="module")
def file(features, tmp_path_factory):
    """What torchvision publishes, which has a classifier too."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**features.state_dict(prefix="features."), "classifier.0.weight": torch.zeros(1)}, path)
    return path


@pytest.fixture(scope="module")
def ours(file) -> LPIPS:
    return lpips(file)


@pytest.fixture(scope="module")
def theirs(features) -> nn.Module:
    """torchmetrics' LPIPS with that VGG16 and its own heads."""
    from torchmetrics.functional.image import lpips as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_get_tv_model_features", lambda *_: features)
        return module._LPIPS(net="vgg")


def pictures(size=(40, 33)) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(2, 3, *size) * 2 - 1
    return x, (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)


def test_equals_torchmetrics_with_gradients(ours, theirs):
    x, y = pictures()
    y.requires_grad_()
    mine, other = ours(x, y), theirs(x, y).flatten()
    assert mine.shape == (2,)
    assert (mine > 0.01).all()
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)
    slopes = [torch.autograd.grad(value.sum(), y)[0] for value in (mine, other)]
    assert slopes[0].abs().median() > 0
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5 * float(slopes[1].abs().max()))


def test_is_a_frozen_symmetric_distance_that_also_compares_halves(ours):
    x, y = pictures()
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(ours(x, x), torch.zeros(2))
    torch.testing.assert_close(ours(x, y), ours(y, x))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours(x, y)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, ours(x, y), rtol=0.05, atol=0)


def test_the_distance_of_features_by_hand():
    """Unit vectors at right angles are 2 apart, whatever their lengths; equal directions are 0 apart."""
    a = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).view(1, 2, 1, 2)  # (3, 4) and (0, 2)
    b = torch.tensor([[-40.0, 0.0], [30.0, 7.0]]).view(1, 2, 1, 2)  # (-40, 30) and (0, 7)
    by_hand = torch.tensor([[(0.6 + 0.8) ** 2 / 2, (0.8 - 0.6) ** 2 / 2]])
    torch.testing.assert_close(channel_distances(a, b), by_hand)
    nothing = torch.zeros(1, 2, 1, 2, requires_grad=True)
    channel_distances(nothing, b).sum().backward()
    assert nothing.grad.isfinite().all()


def test_the_trunk_is_vgg16s(file):
    network = LPIPS()
    assert sum(p.numel() for p in network.trunk.parameters()) == 14_714_688
    assert [tuple(m.shape) for m in network.features(torch.zeros(1, 3, 33, 48))] == [
        (1, 64, 33, 48), (1, 128, 16, 24), (1, 256, 8, 12), (1, 512, 4, 6), (1, 512, 2, 3),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"x: not a picture for VGG16; got shape \(1, 3, 15, 64\)"):
        network.features(torch.zeros(1, 3, 15, 64))


def test_the_heads_are_not_negative_and_of_the_right_widths():
    weights = heads()
    assert [weights[f"heads.{i}"].shape for i in range(5)] == [(64,), (128,), (256,), (512,), (512,)]
    assert all((weight >= 0).all() and math.isfinite(weight.sum()) for weight in weights.values())


def test_looks_where_fetch_puts_it_and_says_how_to_go_without(file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(InputError) as error:
        lpips()
    assert str(error.value) == (
        f"LPIPS needs the weights of VGG16 ({place}); got no such file; expected vgg16-397923af.pth; "
        "try `ldm fetch vgg16`, loss.vgg=FILE, or without it loss.perceptual=judge, or loss.perceptual_weight=0"
    )
    place.parent.mkdir(parents=True)
    place.symlink_to(file)
    assert isinstance(lpips(), LPIPS)


def test_refuses_other_files(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"missing tensors in the LPIPS; got 25: trunk.0.bias"):
        lpips(tmp_path / "other.pth")
