"""The patch discriminator: shape, receptive field, names and initial numbers."""

import pytest
import torch
from torch import nn

from ldm.models.discriminator import PatchDiscriminator


def test_size_names_and_patches_of_compvis():
    discriminator = PatchDiscriminator(norm="batch")
    # by hand: 4x4 convolutions 3-64-128-256-512-1, biased at both ends, and two numbers per BatchNorm channel
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == convolutions + 2 * (128 + 256 + 512) == 2_765_633
    names = {name.removesuffix(".weight") for name in discriminator.state_dict() if name.endswith(".weight")}
    assert names == {f"main.{i}" for i in (0, 2, 3, 5, 6, 8, 9, 11)}
    assert "main.3.running_mean" in discriminator.state_dict()
    assert discriminator(torch.randn(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@pytest.mark.parametrize(("layers", "width"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch_only(layers, width):
    discriminator = PatchDiscriminator(channels=32, layers=layers)
    for i, module in enumerate(discriminator.main):
        if isinstance(module, nn.GroupNorm):  # it sees everything: take it out to measure the convolutions
            discriminator.main[i] = nn.Identity()
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert seen[-1] - seen[0] + 1 == width


def test_group_norm_keeps_samples_apart_and_batch_norm_does_not():
    x = torch.randn(2, 3, 32, 32)
    apart = {}
    for norm in ("group", "batch"):
        discriminator = PatchDiscriminator(channels=16, norm=norm)
        apart[norm] = torch.allclose(discriminator(x)[:1], discriminator(x[:1]), atol=1e-5)
    assert apart == {"group": True, "batch": False}


def test_initial_numbers():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    convolution, norm = discriminator.main[5], discriminator.main[6]
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_exports_and_keeps_channels_last_and_works_in_bf16():
    discriminator = PatchDiscriminator(channels=16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 48, 48).to(memory_format=torch.channels_last)
    logits = discriminator(x)
    torch.testing.assert_close(torch.export.export(discriminator, (x,), strict=True).module()(x), logits)
    assert discriminator.main[:-1](x).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert (discriminator(x) - logits).abs().max() < 2e-2 * logits.abs().max()


BAD = [
    (
        lambda: PatchDiscriminator(norm="layer"),
        "norm: unknown; got 'layer'; expected 'group' or 'batch'; try 'group'",
    ),
    (lambda: PatchDiscriminator(layers=0), "layers: too small; got 0; expected 1 or more; try 1"),
    (
        lambda: PatchDiscriminator(channels=20),
        "channels: twice it cannot be split into 32 norm groups; got 20; expected a multiple of 16; try 16",
    ),
    (
        lambda: PatchDiscriminator()(torch.zeros(1, 3, 64, 16)),
        "x: too small for a patch; got 64x16; expected at least 24x24; try 24x24 or layers=2",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the whole message follows
        call()
    assert str(error.value) == message


def test_the_smallest_legal_size_gives_one_logit():
    for layers in (1, 2, 3):
        assert (
            PatchDiscriminator(channels=16, layers=layers)(torch.zeros(1, 3, 3 * 2**layers, 3 * 2**layers)).numel() == 1
        )
