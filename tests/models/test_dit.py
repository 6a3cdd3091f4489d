"""DiT against the published sizes and costs, and against diffusers with the same weights."""

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.dit import SIZES, DiT, sincos_positions
from tests.models.backbones import DIT, difference, differences, diffusers_dit
from tests.models.first_stages import fill

TEXT = {**DIT, "classes": None, "context": 12, "pooled": 6}


def inputs(dit: DiT, height: int = 8, width: int = 8) -> dict:
    """Keyword inputs that fit a network, two of each."""
    g = torch.Generator().manual_seed(0)
    given = {"x": torch.randn(2, dit.in_channels, height, width, generator=g), "t": torch.tensor([10, 600])}
    if dit.context is None:
        return given | {"pooled": torch.tensor([3, 10])}
    return given | {"tokens": torch.randn(2, 5, 12, generator=g), "pooled": torch.randn(2, 6, generator=g)}


@pytest.mark.parametrize(
    ("size", "side", "count", "multiply_adds"),
    [
        ("S", 32, 32_865_056, 6.06e9),
        ("B", 32, 130_315_808, 23.01e9),
        ("L", 32, 457_840_672, 80.70e9),
        ("XL", 32, 674_834_720, 118.6e9),
        ("XL", 64, 674_834_720, 524.5e9),
    ],
)
def test_published_sizes_and_costs(size, side, count, multiply_adds):
    with torch.device("meta"):
        dit = DiT(**SIZES[size], classes=1001)
        with FlopCounterMode(display=False) as counter:
            dit(torch.empty(1, 4, side, side), torch.empty(1), pooled=torch.zeros(1, dtype=torch.long))
    assert sum(p.numel() for p in dit.parameters()) == count
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize(("patch", "size"), [(2, 8), (4, 16), (8, 32)])
def test_same_output_and_gradient_as_diffusers(patch, size):
    ours = fill(DiT(**DIT, patch=patch)).eval()
    theirs = diffusers_dit(ours, size)
    given = inputs(ours, size, size)
    forward, gradient = differences(
        lambda x: ours(**{**given, "x": x}), lambda x: theirs(x, given["t"], given["pooled"]).sample, given["x"]
    )
    assert max(forward, gradient) < 1e-4


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5)])
def test_positions_are_the_papers_for_grids_of_any_shape(height, width):
    # diffusers scales the grid to `base_size`, and expects one number: undo it along both axes
    table = get_2d_sincos_pos_embed(48, (8, 8), base_size=8).view(8, 8, 48)[:height, :width].flatten(0, 1)
    ours = sincos_positions(48, height, width, torch.device("cpu"))[0]
    torch.testing.assert_close(ours, table.float(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_other_sizes_and_shapes_than_square():
    dit = fill(DiT(**DIT)).eval()
    assert dit(**inputs(dit, 4, 12)).shape == (2, 8, 4, 12)


@torch.no_grad()
def test_patches_are_laid_out_where_they_were_read():
    dit = DiT(**DIT, learned_sigma=False)
    x = torch.randn(2, 4, 8, 12)
    tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # (B, L, C*p*p)
    tokens = tokens.unflatten(2, (4, 4)).transpose(2, 3).flatten(2)  # (B, L, p*p*C), as DiT's last layer writes them
    torch.testing.assert_close(dit.unpatch(tokens, x), x)


def test_a_new_network_predicts_zero_and_ignores_the_text_until_it_learns():
    dit = DiT(**TEXT)
    assert dit(**inputs(dit)).abs().max() == 0
    torch.nn.init.normal_(dit.out.weight)
    given = inputs(dit)
    assert torch.equal(dit(**given), dit(**{**given, "tokens": given["tokens"] + 1}))


@torch.no_grad()
def test_text_enters_by_tokens_mask_and_pooled_vector():
    dit = fill(DiT(**TEXT)).eval()
    given = inputs(dit)
    out = dit(**given)
    masked = {**given, "mask": torch.tensor([[True] * 5, [True] * 2 + [False] * 3])}
    elsewhere = {**masked, "tokens": given["tokens"].clone()}
    elsewhere["tokens"][1, 2:] += 100
    assert torch.equal(dit(**masked), dit(**elsewhere))
    assert torch.equal(dit(**masked)[0], out[0])
    for change in (masked, {**given, "tokens": given["tokens"] + 1}, {**given, "pooled": given["pooled"] + 1}):
        assert difference(dit(**change), out) > 1e-3


@pytest.mark.parametrize("options", [DIT, TEXT], ids=["label", "text"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_memory_format_goes_through(options, layout):
    ours = fill(DiT(**options)).eval()
    given = inputs(ours)
    expected = ours(**given)
    given["x"] = given["x"].to(memory_format=layout)
    out = ours.to(memory_format=layout)(**given)
    assert out.is_contiguous(memory_format=layout)
    assert difference(out, expected) < 1e-5


@pytest.mark.parametrize("options", [DIT, TEXT], ids=["label", "text"])
@torch.no_grad()
def test_bfloat16_autocast_is_near_float32(options):
    ours = fill(DiT(**options)).eval()
    given = inputs(ours)
    expected = ours(**given)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(**given)
    assert 0 < difference(out.float(), expected) < 2e-2


@pytest.mark.parametrize("options", [DIT, TEXT], ids=["label", "text"])
def test_export_finds_no_graph_break(options):
    ours = fill(DiT(**options)).eval()
    given = inputs(ours)
    program = torch.export.export(ours, (), given, strict=True)
    torch.testing.assert_close(program.module()(**given), ours(**given))


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient():
    gradients, kept = [], []
    for flag in (False, True):
        dit, sizes = fill(DiT(**TEXT, checkpointing=flag)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = dit(**inputs(dit)).square().sum()
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, list(dit.parameters())))
    assert kept[1] < kept[0] / 2
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "width: cannot be split into 5 heads; got 48; expected a multiple of 5; try 50"),
        (
            {"width": 6, "heads": 2},
            "width: sines and cosines of two axes must share it; got 6; expected a multiple of 4; try 8",
        ),
        ({"heads": 0}, "heads: too small; got 0; expected 1 or more; try 1"),
        ({"patch": 0}, "patch: too small; got 0; expected 1 or more; try 1"),
        ({"depth": 0}, "depth: too small; got 0; expected 1 or more; try 1"),
        (
            {"classes": 3},
            "classes: cannot be combined with pooled; got 3 and 6; try one of them",
        ),
    ],
)
def test_impossible_numbers_are_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=":") as error:
        DiT(**{**TEXT, **changes})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.ones(2, 4, 7, 8)},
            "x: size not divisible by the network's factor; got 7x8; expected multiples of 2; try 8x8",
        ),
        (
            {"x": torch.ones(2, 5, 8, 8)},
            "x: wrong shape; got (2, 5, 8, 8); expected (B, 4, H, W); try 4 channels",
        ),
        (
            {"tokens": torch.ones(2, 5, 13)},
            "tokens: not the width of the cross-attention; got 13; expected 12",
        ),
        (
            {"pooled": torch.ones(2, 7)},
            "pooled: does not fit this network; got float32 of shape (2, 7); expected floats of shape (2, 6)",
        ),
        ({"control": [torch.ones(1)]}, "control: wrong number of residuals; got 1; expected 2, one per block"),
    ],
)
def test_impossible_inputs_are_refused_at_the_first_call(changes, message):
    dit = DiT(**TEXT)
    with pytest.raises(ValueError, match=":") as error:
        dit(**{**inputs(dit), **changes})
    assert str(error.value) == message
