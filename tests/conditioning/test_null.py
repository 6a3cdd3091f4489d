"""The null of a dropped condition: its policy, its device, and how often it is computed."""

import pytest
import torch

from ldm.condition import Condition
from ldm.conditioning.compose import Compose
from ldm.conditioning.text import clip
from tests.conditioning.conditions import TEXTS, small_joint, small_t5
from tests.models.first_stages import fill

FIRST = torch.tensor([True, False])


@pytest.mark.parametrize("make", [small_t5, small_joint])
def test_a_frozen_encoder_encodes_the_empty_text_once(make, monkeypatch):
    text, counts = make(), []
    cached = {"states": {"caption": vars(text(TEXTS).map(torch.detach))}} if text.frozen else TEXTS
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda ids: counts.extend([1] * (len(ids) == 1)) or encode(ids))

    def null() -> torch.Tensor:
        return text(cached, {"caption": FIRST}).tokens[0].detach()

    before = null()
    assert torch.equal(null(), before)
    if text.frozen:
        assert len(counts) == 1
        assert not any("null" in name for name in text.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(null(), null())
    null()
    assert len(counts) == (2 if text.frozen else 5)
    counts.clear()
    text.load_state_dict({name: 2 * x for name, x in text.state_dict().items()})
    assert not torch.allclose(null(), before)
    text.double()
    null()
    assert len(counts) == 2


def test_the_null_has_the_device_and_type_of_the_condition():
    states, flags = Condition(tokens=torch.zeros(2, 3, 4, device="meta", dtype=torch.bfloat16)), FIRST
    chosen = Condition.choose(flags, Condition(tokens=torch.ones(2, 3, 4)), states).tokens
    assert (chosen.device.type, chosen.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("make", [small_t5, lambda **options: small_joint(projection=6, **options)])
def test_a_null_of_zeros_is_zeros_that_count(make):
    text = make(null="zeros")
    null, real = text.null(2), text(TEXTS)
    assert null.tokens.shape == real.tokens.shape
    assert not null.tokens.any()
    assert null.mask.all()
    assert null.mask.shape == real.mask.shape
    if real.pooled is not None:
        assert not null.pooled.any()
        assert null.pooled.shape == real.pooled.shape
    dropped = text(TEXTS, {"caption": FIRST})
    assert not dropped.tokens[0].any()
    assert torch.equal(dropped.tokens[1], real.tokens[1])
    empty = make().null(1)
    assert empty.tokens.any()
    assert torch.equal(empty.tokens, make()({"caption": [""]}).tokens)


def test_a_null_of_zeros_needs_no_tokenizer_and_has_a_mask_only_where_texts_have_one():
    text = clip(width=12, layers=2, heads=2, vocabulary=600, null="zeros")
    assert text.tokenizer is None
    null = text.null(3)
    assert (null.tokens.shape, null.mask, null.pooled) == ((3, 77, 12), None, None)


def test_joined_parts_keep_their_own_nulls():
    first, second = (fill(clip(width=12, layers=2, heads=2, null=null)) for null in ("empty", "zeros"))
    both = Compose(parts=[first, second], by="channels")
    null = both.null(2).tokens
    assert torch.equal(null[..., :12], first.null(2).tokens)
    assert not null[..., 12:].any()
    kept = both(TEXTS, {"caption_2": FIRST}).tokens
    assert torch.equal(kept[..., :12], first(TEXTS).tokens)
    assert not kept[0, :, 12:].any()
    assert torch.equal(kept[1, :, 12:], second(TEXTS).tokens[1])
