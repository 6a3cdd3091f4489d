"""Derived conditions: the same whether their random part was drawn in a worker or where they are read."""

from __future__ import annotations

import pytest
import torch

from ldm.data.derived import DERIVED, derived_draws, with_derived
from ldm.draws import draw, stream

READS = [("image", "mask"), ("low_resolution", "noise_level", "low_resolution_noise"), DERIVED, ("caption",)]


def batch_of(count: int = 4) -> dict:
    image = torch.randint(0, 256, (count, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": image, "number": torch.arange(7, 7 + count), "caption": ["a ball"] * count}


@pytest.mark.parametrize("reads", READS)
def test_draws_made_in_a_worker_are_those_made_later(reads, monkeypatch):
    batch, x0 = batch_of(), torch.zeros(4, 4, 4, 6)
    late = with_derived(batch, reads, x0, 5)
    prepared = batch | derived_draws(batch, reads, (4, 6), 5)
    monkeypatch.setattr("ldm.data.derived.draw", None)  # nothing is drawn where the conditions are read
    early = with_derived(prepared, reads, x0)
    assert {*reads} <= {*early}
    for name in reads:
        assert early[name] == late[name] if name == "caption" else torch.equal(early[name], late[name])


def test_the_draws_are_those_of_version_0_1():
    draws = derived_draws(batch_of(), DERIVED, (4, 6), 5)
    u, noise = draw(stream(5, "conditions"), range(7, 11), 5, (3, 4, 6))
    assert torch.equal(draws["mask_uniforms"], u[:, :4])
    assert torch.equal(draws["noise_level"], (u[:, 4] * 350).long())
    assert torch.equal(draws["low_resolution_noise"], noise)


def test_a_mask_of_the_data_is_kept():
    batch = batch_of() | {"mask": torch.ones(4, 1, 16, 24)}
    assert "mask_uniforms" not in derived_draws(batch, ("image", "mask"), (4, 6), 5)
    assert with_derived(batch, ("image", "mask"), torch.zeros(4, 4, 4, 6), 5)["mask"] is batch["mask"]
