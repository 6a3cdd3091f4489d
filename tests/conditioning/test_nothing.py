"""What stands in the place of a condition that is dropped: where it is, and how often it is made."""

import pytest
import torch

from ldm.condition import Condition
from tests.conditioning.conditions import TEXTS, small_joint, small_t5

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


def test_nothing_is_found_where_the_condition_is():
    states, flags = Condition(tokens=torch.zeros(2, 3, 4, device="meta", dtype=torch.bfloat16)), FIRST
    chosen = Condition.choose(flags, Condition(tokens=torch.ones(2, 3, 4)), states).tokens
    assert (chosen.device.type, chosen.dtype) == ("meta", torch.bfloat16)
