"""The autoencoder against published counts, diffusers, and its own contracts."""

import pytest
import torch

from ldm.models.autoencoder import Autoencoder, kl, vq
from ldm.models.quantize import Gaussian, VectorQuantizer
from tests.models.first_stages import KL, VQ, diffusers_autoencoder, fill, small

KL_F16 = VQ_F16 = {"multipliers": (1, 1, 2, 2, 4), "attend": [16]}
KL_F32 = {"multipliers": (1, 1, 2, 2, 4, 4), "attend": [16, 32]}
VQ_F8 = {"multipliers": (1, 2, 2, 4), "attend": [8]}
PUBLISHED = {  # FACTS: trainable numbers, codebook included
    "kl-f4": (55_312_063, Gaussian, {"channels": 3}, {"multipliers": (1, 2, 4)}),
    "kl-f8": (83_653_863, Gaussian, {"channels": 4}, {"multipliers": (1, 2, 4, 4)}),
    "kl-f16": (69_610_963, Gaussian, {"channels": 16}, KL_F16),
    "kl-f32": (103_880_131, Gaussian, {"channels": 64}, KL_F32),
    "vq-f4": (55_322_782, VectorQuantizer, {"codes": 8192, "channels": 3}, {"multipliers": (1, 2, 4)}),
    "vq-f8": (67_717_295, VectorQuantizer, {"codes": 16384, "channels": 4}, VQ_F8),
    "vq-f16": (69_593_371, VectorQuantizer, {"codes": 16384, "channels": 8}, VQ_F16),
}


def published(name: str) -> Autoencoder:
    _, bottleneck, inside, numbers = PUBLISHED[name]
    return Autoencoder(bottleneck=bottleneck(**inside), **numbers)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    with torch.device("meta"):
        autoencoder = published(name)
    assert count(autoencoder) == PUBLISHED[name][0]
    assert autoencoder.factor == int(name.split("f")[1])


def test_published_halves():
    with torch.device("meta"):
        autoencoder = published("kl-f8")
    assert count(autoencoder.encoder) == 34_163_592
    assert count(autoencoder.decoder) == 49_490_179


@pytest.mark.parametrize("attend", [[], [2], [1, 4]])
@pytest.mark.parametrize("mid_attention", [True, False])
def test_kl_equals_diffusers(attend, mid_attention):
    ours = fill(small(attend=attend, mid_attention=mid_attention))
    check_kl(ours, torch.randn(2, 3, 32, 24))


@pytest.mark.slow
def test_kl_f8_equals_diffusers_at_full_size():
    check_kl(fill(published("kl-f8")), torch.randn(1, 3, 64, 64))


def check_kl(ours: Autoencoder, x: torch.Tensor) -> None:
    theirs = diffusers_autoencoder(ours)
    x, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (mean, logvar), posterior = ours.posterior(x), theirs.encode(x_theirs).latent_dist
    assert relative(mean, posterior.mean) < 1e-4
    assert relative(logvar, posterior.logvar) < 1e-4
    image, image_theirs = ours.decode(mean), theirs.decode(posterior.mean).sample
    assert relative(image, image_theirs) < 1e-4
    weight = torch.randn_like(image)
    (image * weight).sum().add(logvar.sum()).backward()
    (image_theirs * weight).sum().add(posterior.logvar.sum()).backward()
    assert relative(x.grad, x_theirs.grad) < 1e-4
    penalty = ours(x.detach())[1].penalty
    assert relative(penalty, posterior.kl()) < 1e-4


@pytest.mark.parametrize("mid_attention", [True, False])
def test_vq_equals_diffusers(mid_attention):
    ours = fill(small(**{**VQ, "mid_attention": mid_attention}))
    theirs = diffusers_autoencoder(ours)
    x = torch.randn(2, 3, 32, 24, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    z, z_theirs = ours.encode(x), theirs.encode(x_theirs).latents
    assert relative(z, z_theirs) < 1e-4
    assert len(ours.bottleneck.nearest(z).unique()) > 4
    image, image_theirs = ours.decode(z), theirs.decode(z_theirs).sample
    assert relative(image, image_theirs) < 1e-4
    weight = torch.randn_like(image)
    (image * weight).sum().backward()
    (image_theirs * weight).sum().backward()
    assert relative(x.grad, x_theirs.grad) < 1e-4


def test_noise_samples_the_posterior_and_statistics_normalise():
    ours = fill(small(**KL))
    x, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    mean, logvar = ours.posterior(x)
    torch.testing.assert_close(ours.encode(x), mean)
    ours.set_statistics(0.3, 0.18215)
    torch.testing.assert_close(ours.encode(x), (mean - 0.3) * 0.18215)
    torch.testing.assert_close(ours.encode(x, noise), (mean + (logvar / 2).exp() * noise - 0.3) * 0.18215)
    image, bottled = ours(x, noise)
    torch.testing.assert_close(ours.decode(ours.encode(x, noise)), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bottled.z, mean + (logvar / 2).exp() * noise)


def test_normalising_by_the_measured_statistics_gives_mean_0_and_variance_1_per_channel():
    ours = fill(small(**KL, per_channel=True))
    x = torch.randn(4, 3, 32, 32)
    z = ours.encode(x)
    ours.set_statistics(z.mean((0, 2, 3)), 1 / z.std((0, 2, 3)))
    z = ours.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4))


def test_vq_encodes_before_quantisation_and_decodes_codes():
    ours = fill(small(**VQ))
    ours.set_statistics(0.3, 0.5)
    x = torch.randn(1, 3, 16, 16)
    z = ours.encode(x)
    mean, logvar = ours.posterior(x)
    assert logvar is None
    torch.testing.assert_close(z, (mean - 0.3) * 0.5)
    codes = ours.bottleneck.nearest(mean)
    torch.testing.assert_close(ours.decode(z), ours.reconstruct(ours.bottleneck.lookup(codes)))
    image, bottled = ours(x)
    assert torch.equal(bottled.codes, codes)
    torch.testing.assert_close(image, ours.decode(z))


@pytest.mark.parametrize("options", [KL, VQ])
def test_fingerprint_covers_what_defines_latents_and_nothing_else(options):
    ours = fill(small(**options))
    before = ours.fingerprint()
    for module in (ours.decoder, ours.post_quant, ours.bottleneck):
        fill(module, seed=1)
    assert ours.to(memory_format=torch.channels_last).fingerprint() == before
    assert small(**options).fingerprint() != before
    seen = {before}
    for parameter in (ours.encoder.conv_in.bias, ours.quant.weight, ours.shift, ours.scale):
        parameter.data += 1
        seen.add(ours.fingerprint())
    assert len(seen) == 5


def test_fingerprint_tells_a_stem_from_more_channels():
    with_stem, without = small(stem=2), small(in_channels=12)
    without.encoder.load_state_dict(with_stem.encoder.state_dict())
    without.quant.load_state_dict(with_stem.quant.state_dict())
    assert with_stem.fingerprint() != without.fingerprint()


def test_a_stem_halves_before_the_first_convolution():
    ours = fill(small(stem=2, attend=[4]))
    assert ours.factor == 8
    assert [row.level for row in ours.encoder.plan if row.kind == "attention"] == [1, None]
    x = torch.randn(1, 3, 16, 24)
    z = ours.encode(x)
    assert z.shape == (1, 4, 2, 3)
    assert ours.decode(z).shape == x.shape
    assert ours.encoder.conv_in.weight.shape[1] == 12


@pytest.mark.parametrize("options", [KL, VQ, {**KL, "stem": 2}])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format_goes_through(options, memory_format):
    ours = fill(small(**options)).to(memory_format=memory_format)
    x = torch.randn(2, 3, 16, 16).to(memory_format=memory_format)
    for result in (ours.encode(x), ours.decode(ours.encode(x)), ours(x)[0]):
        assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("options", [KL, VQ])
def test_bf16_autocast_is_near_float32(options):
    ours = fill(small(**options))
    x = torch.randn(2, 3, 32, 32)
    z = ours.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(ours.encode(x).float(), z) < 2e-2
        assert relative(ours.decode(z).float(), ours.decode(z)) < 2e-2
        assert ours(x)[1].penalty.dtype == torch.float32


@pytest.mark.parametrize("options", [KL, VQ])
def test_exports_without_a_graph_break(options):
    ours = fill(small(**options))
    x = torch.randn(2, 3, 16, 16)
    image = torch.export.export(ours, (x,), strict=True).module()(x)[0]
    torch.testing.assert_close(image, ours(x)[0])


@pytest.mark.parametrize("options", [KL, VQ])
def test_checkpointing_gives_the_same_gradients_from_less_memory(options):
    x = torch.randn(2, 3, 16, 16)
    plain, plain_size = gradients_and_kept(fill(small(**options)), x)
    recomputed, size = gradients_and_kept(fill(small(**options, checkpointing=True)), x)
    for one, other in zip(plain, recomputed):
        torch.testing.assert_close(one, other)
    assert size < plain_size / 2


def gradients_and_kept(ours: Autoencoder, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """All gradients of a step, and how many numbers the forward pass kept for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        image, bottled = ours(x)
    (image.square().mean() + bottled.penalty.mean()).backward()
    return [parameter.grad for parameter in ours.parameters()], sum(sizes)


BAD_NUMBERS = [
    ({"channels": 40}, "channels: cannot be split into 32 norm groups; got 40; expected a multiple of 32; try 32"),
    (
        {"multipliers": []},
        "multipliers: must be positive, one for each level; got []; expected integers >= 1; try [1, 2, 4, 4]",
    ),
    (
        {"multipliers": [1, 0]},
        "multipliers: must be positive, one for each level; got [1, 0]; expected integers >= 1; try [1, 2, 4, 4]",
    ),
    ({"blocks": 0}, "blocks: too small; got 0; expected 1 or more; try 1"),
    ({"attend": [3]}, "attend: no level has this factor; got 3; expected any of [1, 2, 4]; try 2"),
    ({"attend": [1], "stem": 2}, "attend: no level has this factor; got 1; expected any of [2, 4, 8]; try 2"),
    ({"stem": 3}, "stem: only a pixel unshuffle by 2 is supported; got 3; expected 1 or 2; try 2"),
    ({"in_channels": 0}, "in_channels: too small; got 0; expected 1 or more; try 1"),
    (
        {**VQ, "per_channel": True},
        "per_channel: not supported for VQ, which has one shift and scale; got True; expected False; try False",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_NUMBERS)
def test_impossible_numbers(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the whole message follows
        small(**options)
    assert str(error.value) == message


BAD_CALLS = [
    (
        lambda ours: ours.encode(torch.zeros(1, 3, 30, 33)),
        "x: size not divisible by the network's factor; got 30x33; expected multiples of 4; try 32x32",
    ),
    (
        lambda ours: ours.encode(torch.zeros(1, 3, 0, 8)),
        "x: size not divisible by the network's factor; got 0x8; expected multiples of 4; try 4x8",
    ),
    (
        lambda ours: ours(torch.zeros(1, 4, 32, 32)),
        "x: wrong shape; got (1, 4, 32, 32); expected (B, 3, H, W); try 3 channels",
    ),
    (
        lambda ours: ours.posterior(torch.zeros(3, 32, 32)),
        "x: wrong shape; got (3, 32, 32); expected (B, 3, H, W); try 3 channels",
    ),
    (
        lambda ours: ours.decode(torch.zeros(1, 3, 8, 8)),
        "z: wrong shape; got (1, 3, 8, 8); expected (B, 4, H, W); try 4 channels",
    ),
    (
        lambda ours: ours.encode(torch.zeros(2, 3, 32, 32), torch.zeros(4, 8, 8)),
        "noise: wrong shape; got (4, 8, 8); expected (2, 4, 8, 8); try that shape",
    ),
    (
        lambda ours: ours.set_statistics([0.0, 1.0], 1.0),
        "shift: wrong count of numbers; got 2; expected 1; try per_channel",
    ),
    (
        lambda ours: ours.set_statistics(0.0, 0.0),
        "scale: out of range; got [0.0]; expected finite numbers above 0; try 1.0",
    ),
    (
        lambda ours: ours.set_statistics(float("nan"), 1.0),
        "shift: out of range; got [nan]; expected finite numbers; try 1.0",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_impossible_calls(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the whole message follows
        call(small(**KL))
    assert str(error.value) == message


def test_short_names_build_the_published_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in ae.parameters()) for ae in (kl(), vq(latent=3, multipliers=(1, 2, 4)))]
    assert sizes == [83_653_863, 55_322_782]
    named = kl(latent=8, channels=32, multipliers=[1, 2], blocks=1, attend=[2], mid_attention=False, stem=2)
    assert (named.latent_channels, named.factor, named.stem) == (8, 4, 2)
    assert [row.name for row in named.encoder.plan if row.kind == "attention"] == ["level0_attention0"]
    small = vq(latent=4, codes=16, channels=32, multipliers=[1], blocks=1, checkpointing=True)
    assert small.bottleneck.codebook.shape == (16, 4)
    assert small.encoder.checkpointing
    assert kl(channels=32, multipliers=[1], blocks=1, per_channel=True).scale.shape == (4, 1, 1)
