"""The shared layers against formulas written out by hand and against diffusers."""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from ldm.condition import Vector
from ldm.models.layers import (
    SHORT,
    Attention,
    Downsample,
    ResBlock,
    TimestepEmbedding,
    attention,
    check_multiple,
    group_norm,
    timestep_embedding,
    zero,
)

torch.manual_seed(0)
Q, K, V = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
MASK = torch.tensor([[True, True, False, True, False], [True, True, True, True, True]])


def by_hand(q, k, v, heads, allowed):
    """softmax(q k^T / sqrt(d)) v, head by head; allowed (B, L, M)."""
    outs = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        scores = a @ b.transpose(1, 2) / a.shape[-1] ** 0.5
        outs.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ c)
    return torch.cat(outs, -1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_attention_is_the_formula(mask, causal):
    allowed = torch.ones(2, 5, 5, dtype=torch.bool)
    allowed &= torch.ones(5, 5).tril().bool() if causal else True
    allowed &= True if mask is None else mask[:, None]
    torch.testing.assert_close(attention(Q, K, V, 2, mask, causal), by_hand(Q, K, V, 2, allowed))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [SHORT, SHORT + 8])
def test_attention_in_bfloat16_is_the_formula_on_either_side_of_the_limit(masked, causal, keys):
    q, k, v = (x.bfloat16() for x in torch.randn(3, 2, keys, 8))
    mask = (torch.arange(keys) < torch.tensor([[keys // 2], [keys]])) if masked else None
    allowed = torch.ones(2, keys, keys, dtype=torch.bool)
    allowed &= torch.ones(keys, keys).tril().bool() if causal else True
    allowed &= True if mask is None else mask[:, None]
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    exact, close = by_hand(*inputs, 2, allowed), attention(*(x.requires_grad_() for x in (q, k, v)), 2, mask, causal)
    torch.testing.assert_close(close.double(), exact, atol=0.02, rtol=0.02)
    exact.sum().backward(), close.sum().backward()
    for x, reference in zip((q, k, v), inputs):
        torch.testing.assert_close(x.grad.double(), reference.grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("keys", [SHORT, SHORT + 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_nothing_is_zero(keys, dtype):
    q, k, v = torch.randn(3, 2, keys, 8, dtype=dtype).unbind()
    out = attention(q, k, v, 2, torch.zeros(2, keys, dtype=torch.bool))
    torch.testing.assert_close(out, torch.zeros_like(out))


def test_attention_reads_a_context_of_another_width():
    layer = Attention(8, heads=2, context=6)
    assert layer(Q, torch.randn(2, 3, 6)).shape == Q.shape
    assert layer.q.bias is None
    assert layer.out.bias is not None


def test_resampling_without_weights_is_a_mean_and_a_repetition():
    x = torch.randn(1, 32, 4, 4)
    up, down = (ResBlock(32, 32, resample=resample).resample for resample in ("up", "down"))
    torch.testing.assert_close(down(up(x)), x)


def test_asymmetric_downsampling_looks_right_and_down_only():
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    layer = Downsample(32, asymmetric=True)
    (gradient,) = torch.autograd.grad(layer(x)[..., 1, 1].sum(), x)
    assert gradient.abs().sum((0, 1)).nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


@pytest.mark.parametrize(("resample", "side"), [(None, 8), ("up", 16), ("down", 4)])
def test_a_block_that_ends_in_zero_is_its_skip(resample, side):
    x = torch.randn(2, 32, 8, 8)
    block = ResBlock(32, 32, embed=16, scale_shift=True, resample=resample)
    zero(block.conv2)
    out = block(x, torch.randn(2, 16))
    assert out.shape == (2, 32, side, side)
    torch.testing.assert_close(out, block.resample(x))


@pytest.mark.parametrize("width", [32, 256])
def test_timestep_embedding_is_that_of_ldm(width):
    t = torch.tensor([0.0, 0.5, 37.0, 999.0])
    theirs = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, width), theirs)


def test_labels_and_pooled_vectors_are_added_to_the_time():
    t = torch.tensor([3.0, 4.0])
    labelled, pooled = TimestepEmbedding(8, 16, classes=3), TimestepEmbedding(8, 16, pooled=5)
    labels, vectors = torch.tensor([2, 0]), torch.randn(2, 5)
    time = labelled.time(timestep_embedding(t, 8))
    torch.testing.assert_close(labelled(t, labels), time + labelled.label.weight[labels])
    time = pooled.time(timestep_embedding(t, 8))
    torch.testing.assert_close(pooled(t, vectors), time + pooled.pooled(vectors))


def test_vectors_are_embedded_as_in_sdxl():
    vectors = {"sizes": Vector("numbers", 6), "z": Vector("vector", 3), "level": Vector("index", 4)}
    layer = TimestepEmbedding(8, 16, pooled=5, vectors=vectors)
    assert layer.pooled[0].weight.shape == (16, 5 + 6 * 256 + 3)
    t, pooled = torch.tensor([3.0, 4.0]), torch.randn(2, 5)
    given = {"sizes": torch.randint(0, 1024, (2, 6)).float(), "z": torch.randn(2, 3), "level": torch.tensor([3, 1])}
    sinusoids = get_timestep_embedding(given["sizes"].flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    joined = torch.cat((pooled, sinusoids.reshape(2, -1), given["z"]), 1)  # diffusers' text_time
    expected = layer.time(timestep_embedding(t, 8)) + layer.label.weight[given["level"]] + layer.pooled(joined)
    torch.testing.assert_close(layer(t, pooled, given), expected)
    alone = TimestepEmbedding(8, 16, vectors={"level": Vector("numbers", 1)})
    level = torch.tensor([7.0, 0.5])
    assert torch.equal(alone(t, None, {"level": level}), alone(t, None, {"level": level[:, None]}))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (None, "sizes: does not fit this network; got None; expected floats of shape (2, 6)"),
        (
            {"sizes": torch.ones(2, 5)},
            "sizes: does not fit this network; got float32 of shape (2, 5); expected floats of",
        ),
        (
            {"sizes": torch.ones(2, 6), "level": torch.ones(2)},
            "level: does not fit this network; got float32 of shape (2,); expected None",
        ),
    ],
)
def test_named_vectors_that_do_not_fit_are_refused(vectors, message):
    with pytest.raises(ValueError, match="fit") as error:
        TimestepEmbedding(8, 16, vectors={"sizes": Vector("numbers", 6)})(torch.ones(2), None, vectors)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("build", "pooled", "message"),
    [
        ({}, torch.ones(2, 5), "got float32 of shape (2, 5); expected None"),
        ({"classes": 3}, None, "got None; expected integers of shape (2,)"),
        ({"classes": 3}, torch.ones(2), "got float32 of shape (2,); expected integers of shape (2,)"),
        ({"pooled": 5}, torch.ones(2, 6), "got float32 of shape (2, 6); expected floats of shape (2, 5)"),
        ({"pooled": 5}, torch.ones(2, 5).long(), "got int64 of shape (2, 5); expected floats of shape (2, 5)"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(build, pooled, message):
    with pytest.raises(ValueError, match="pooled") as error:
        TimestepEmbedding(8, 16, **build)(torch.ones(2), pooled)
    assert str(error.value) == f"pooled: does not fit this network; {message}"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: group_norm(48, 1e-5),
            "channels: cannot be split into 32 norm groups; got 48; expected a multiple of 32; try 64",
        ),
        (
            lambda: Attention(30, heads=4),
            "width: cannot be split into 4 heads; got 30; expected a multiple of 4; try 32",
        ),
        (
            lambda: TimestepEmbedding(8, 16, classes=3, pooled=5),
            "classes: cannot be combined with pooled; got 3 and 5; try one of them",
        ),
        (
            lambda: TimestepEmbedding(8, 16, classes=3, vectors={"level": Vector("index", 4)}),
            "vectors: only one can be an index; got pooled and level; try numbers",
        ),
        (lambda: check_multiple("size", 0, 8, "too small"), "size: too small; got 0; expected a multiple of 8; try 8"),
    ],
)
def test_impossible_numbers_name_the_nearest_possible_one(build, message):
    with pytest.raises(ValueError, match=":") as error:
        build()
    assert str(error.value) == message
