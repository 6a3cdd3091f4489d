"""The largest encoder that a checkpoint stores; tests/training has the larger ones."""

import pytest

from ldm.conditioning import external
from ldm.conditioning.text import clip


@pytest.mark.parametrize(("size", "left"), [(10**9, False), (10**9 + 1, True)])
def test_an_encoder_of_a_gigabyte_is_stored(size, left, monkeypatch):
    text = clip(width=32, layers=1, heads=2)
    text.weights = "somebody/clip"
    monkeypatch.setattr(external, "size", lambda module: size)
    monkeypatch.setattr(external, "digest", lambda module: "0")
    assert bool(external.record({"conditioner": {"type": "clip"}}, text)["left_out"]) == left
