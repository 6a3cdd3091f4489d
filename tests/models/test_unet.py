"""The U-Net against the published sizes and against diffusers with the same weights."""

import pytest
import torch

from ldm.models.unet import UNet
from tests.models.backbones import ADM, LDM4, SD1, SD2, TINY, difference, differences, diffusers_unet
from tests.models.first_stages import fill

SD15 = {"context": 768, "heads": 8}
TEXT = {**TINY, "heads": 4, "context": 12}
ADM256 = {"in_channels": 3, "multipliers": (1, 1, 2, 2, 4, 4), "attend": (8, 16, 32), "head_width": 64}
ADM256 |= {"scale_shift": True, "resample": "residual"}


def inputs(unet: UNet, side: int = 16) -> dict:
    """Keyword inputs that fit a network, two of each."""
    g = torch.Generator().manual_seed(0)
    given = {"x": torch.randn(2, unet.in_channels, side, side, generator=g), "t": torch.tensor([10, 600])}
    if unet.context:
        given["tokens"] = torch.randn(2, 5, unet.context, generator=g)
    if unet.time.label is not None:
        given["pooled"] = torch.tensor([3, 0])
    return given


def oracle(unet, given: dict, **options):
    """diffusers' U-Net as a function of x."""
    names = {"tokens": "encoder_hidden_states", "mask": "encoder_attention_mask", "pooled": "class_labels"}
    theirs = diffusers_unet(unet, **options)
    rest = {names[name]: value for name, value in given.items() if name in names}
    return lambda x: theirs(x, given["t"], **rest).sample


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (SD15, 859_520_964),
        ({**SD15, "extra_channels": 5}, 859_535_364),  # inpainting
        ({**SD15, "extra_channels": 4}, 859_532_484),  # InstructPix2Pix
        ({"context": 1024, "head_width": 64, "linear": True}, 865_910_724),  # SD 2
        ({"context": 1280, "heads": 8}, 872_300_484),  # LDM text-to-image
        ({**LDM4, "channels": 192, "context": 512}, 400_920_579),  # LDM-4 ImageNet
        ({**ADM256, "channels": 256, "classes": 1000, "learned_sigma": True}, 553_838_086),  # ADM, 256 px
        ({**ADM256, "channels": 128, "logits": 1000, "size": 256}, 54_096_360),  # its classifier
    ],
)
def test_published_sizes(options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**options).parameters()) == count


@pytest.mark.parametrize(
    "options",
    [SD1, SD2, LDM4, ADM, {**ADM, "resample": "conv"}, {**TEXT, "classes": 4, "scale_shift": True, "depth": 2}],
    ids=["sd1", "sd2", "ldm4", "adm", "adm-conv", "text-and-label"],
)
def test_same_output_and_gradient_as_diffusers(options):
    ours = fill(UNet(**options)).eval()
    given = inputs(ours)
    depth = options.get("depth", 1)
    theirs = oracle(ours, given, **({"transformer_layers_per_block": depth} if depth > 1 else {}))
    forward, gradient = differences(lambda x: ours(**{**given, "x": x}), theirs, given["x"])
    assert max(forward, gradient) < 1e-4


@pytest.mark.slow
def test_full_size_sd15_is_that_of_diffusers():
    ours = fill(UNet(**SD15)).eval()
    given = inputs(ours, side=32)
    forward, gradient = differences(lambda x: ours(**{**given, "x": x}), oracle(ours, given), given["x"])
    assert max(forward, gradient) < 1e-4


@torch.no_grad()
def test_masked_tokens_count_as_in_diffusers():
    ours = fill(UNet(**TEXT)).eval()
    given = inputs(ours) | {"mask": torch.tensor([[True] * 5, [True] * 2 + [False] * 3])}
    masked = ours(**given)
    assert difference(masked, oracle(ours, given)(given["x"])) < 1e-4
    given["tokens"][1, 2:] += 100
    assert torch.equal(ours(**given), masked)
    assert not torch.allclose(ours(**{**given, "mask": None}), masked)


@torch.no_grad()
def test_control_joins_skips_and_middle_as_in_diffusers():
    ours = fill(UNet(**TEXT)).eval()
    given = inputs(ours)
    shapes = [(2, row.out_channels, side, side) for row, side in zip(ours.plan, (16, 16, 8, 8))] + [(2, 64, 8, 8)]
    control = [torch.randn(shape) for shape in shapes]
    *down, middle = control
    theirs = diffusers_unet(ours)(
        given["x"],
        given["t"],
        given["tokens"],
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    )
    assert difference(ours(**given, control=control), theirs.sample) < 1e-4
    assert difference(ours(**given), theirs.sample) > 1e-2


@pytest.mark.parametrize("options", [TEXT, {**TEXT, "linear": True}, ADM], ids=["conv", "linear", "adm"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_memory_format_goes_through(options, layout):
    ours = fill(UNet(**options)).eval()
    given = inputs(ours)
    expected = ours(**given)
    given["x"] = given["x"].to(memory_format=layout)
    out = ours.to(memory_format=layout)(**given)
    assert out.is_contiguous(memory_format=layout)
    assert difference(out, expected) < 1e-5


@pytest.mark.parametrize("options", [SD1, SD2, ADM], ids=["sd1", "sd2", "adm"])
@torch.no_grad()
def test_bfloat16_autocast_is_near_float32(options):
    ours = fill(UNet(**options)).eval()
    given = inputs(ours)
    expected = ours(**given)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(**given)
    assert 0 < difference(out.float(), expected) < 2e-2


@pytest.mark.parametrize("options", [TEXT, ADM], ids=["text", "adm"])
def test_export_finds_no_graph_break(options):
    ours = fill(UNet(**options)).eval()
    given = inputs(ours)
    program = torch.export.export(ours, (), given, strict=True)
    torch.testing.assert_close(program.module()(**given), ours(**given))


@pytest.mark.parametrize("options", [TEXT, ADM], ids=["text", "adm"])
def test_gradient_checkpointing_changes_no_gradient(options):
    plain, saving = (fill(UNet(**options, checkpointing=flag)) for flag in (False, True))
    given, saved = inputs(plain), []
    gradients = []
    for unet in (plain, saving):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            out = unet(**given)
        saved.append(None)
        gradients.append(torch.autograd.grad(out.square().sum(), list(unet.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    middle = saved.index(None)
    assert sum(saved[middle + 1 : -1]) < sum(saved[:middle]) / 2


def test_learned_sigma_doubles_the_output_and_extra_channels_the_input_only():
    unet = UNet(**TEXT, learned_sigma=True, extra_channels=5)
    assert unet(**inputs(unet)).shape == (2, 8, 16, 16)
    assert unet.in_channels == 9


def test_a_new_network_predicts_zero_and_learns():
    unet = UNet(**TEXT)
    out = unet(**inputs(unet))
    assert out.abs().max() == 0
    (out - 1).square().sum().backward()
    assert unet.out.weight.grad.abs().sum() > 0


def test_the_half_classifies_with_gradients_in_x():
    half = fill(UNet(**{**ADM, "classes": None}, logits=5, size=16)).eval()
    full = UNet(**{**ADM, "classes": None})
    assert half.plan == full.plan[: len(half.plan)]
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = half(x, torch.tensor([10, 600]))
    assert logits.shape == (2, 5)
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), x)
    assert gradient.abs().max() > 0


BAD_NUMBERS = [
    (
        {"channels": 48},
        "channels: cannot be split into 32 norm groups; got 48; expected a multiple of 32; try 64",
    ),
    (
        {"heads": 7},
        "heads: does not divide the width; got 7; expected a divisor of 64, the width of an attended level; try 8",
    ),
    (
        {"heads": 0},
        "heads: does not divide the width; got 0; expected a divisor of 64, the width of an attended level; try 1",
    ),
    (
        {"heads": None, "head_width": 48},
        "head_width: does not divide the width; got 48; expected a divisor of 64, the width of an attended level; "
        "try 32",
    ),
    (
        {"head_width": 16},
        "heads: give either heads or head_width; got heads=4, head_width=16; expected one of them; try heads=8",
    ),
    ({"attend": (2, 8)}, "attend: no level has this factor; got 8; expected some of [1, 2]; try 2"),
    ({"depth": [1]}, "depth: not one number per level; got 1 numbers; expected 2; try [1, 1]"),
    ({"depth": 0}, "depth: too small; got 0; expected 1 or more; try 1"),
    ({"depth": []}, "depth: too small; got 0; expected 1 or more; try 1"),
    ({"multipliers": []}, "multipliers: too small; got 0; expected 1 or more; try 1"),
    ({"blocks": 0}, "blocks: too small; got 0; expected 1 or more; try 1"),
    ({"resample": "bigan"}, "resample: unknown; got bigan; expected conv or residual; try conv"),
    ({"dropout": 1.5}, "dropout: out of range; got 1.5; expected 0 <= dropout < 1; try 0.1"),
    (
        {"logits": 5, "size": 15},
        "size: a classifier needs the side of its images; got 15; expected a multiple of 2; try 16",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_NUMBERS)
def test_impossible_numbers_are_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=":") as error:
        UNet(**{**TEXT, **changes})
    assert str(error.value) == message


BAD_INPUTS = [
    (
        {"x": torch.ones(2, 3, 16, 16)},
        "x: wrong shape; got (2, 3, 16, 16); expected (B, 4, H, W); try 4 channels",
    ),
    ({"x": torch.ones(4, 16, 16)}, "x: wrong shape; got (4, 16, 16); expected (B, 4, H, W); try 4 channels"),
    (
        {"x": torch.ones(2, 4, 16, 15)},
        "x: size not divisible by the network's factor; got 16x15; expected multiples of 2; try 16x16",
    ),
    ({"tokens": torch.ones(2, 5, 13)}, "tokens: not the width of the cross-attention; got 13; expected 12"),
    ({"tokens": None}, "tokens: not the width of the cross-attention; got None; expected 12"),
    (
        {"control": [torch.ones(1)] * 2},
        "control: wrong number of residuals; got 2; expected 5, one per skip and one for the middle",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INPUTS)
def test_impossible_inputs_are_refused_at_the_first_call(changes, message):
    unet = UNet(**TEXT)
    with pytest.raises(ValueError, match=":") as error:
        unet(**{**inputs(unet), **changes})
    assert str(error.value) == message


def test_tokens_for_a_network_without_text_and_a_wrong_classifier_size_are_refused():
    adm = UNet(**{**ADM, "classes": None}, logits=5, size=16)
    with pytest.raises(ValueError, match="tokens") as error:
        adm(torch.ones(2, 3, 16, 16), torch.ones(2), tokens=torch.ones(2, 5, 12))
    assert str(error.value) == "tokens: not the width of the cross-attention; got 12; expected None"
    with pytest.raises(ValueError, match="x:") as error:
        adm(torch.ones(2, 3, 32, 32), torch.ones(2))
    assert str(error.value) == "x: not the classifier's image size; got 32x32; expected 16x16; try that size"
