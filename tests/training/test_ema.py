"""The average of weights against its closed form."""

from __future__ import annotations

import pytest
import torch

from ldm.training.ema import EMA


def test_average_is_the_weighted_sum_of_all_that_was():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, decays, history = EMA([("w", weight)], decay=0.8), [], [weight.detach().double()]
    for step in range(1, 40):
        with torch.no_grad():
            weight.add_(torch.tensor([0.1 * step, 1.0]))
        ema.update(step)
        decays.append(min(0.8, (1 + step) / (10 + step)))
        history.append(weight.detach().double())
    weights = [torch.tensor(decays).prod().item()]
    weights += [(1 - d) * torch.tensor(decays[k + 1 :]).prod().item() for k, d in enumerate(decays)]
    expected = sum(w * x for w, x in zip(weights, history))
    torch.testing.assert_close(ema.shadows["w"].double(), expected, rtol=1e-5, atol=1e-5)


def test_average_of_bfloat16_is_kept_in_float32_and_moves():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = EMA([("w", weight)], decay=0.9999)
    with torch.no_grad():
        weight.fill_(2.0)
    ema.update(10**6)
    assert ema.shadows["w"].dtype == torch.float32
    torch.testing.assert_close(ema.shadows["w"], torch.full((4,), 1.0001))


def test_swapping_is_undone_to_the_bit():
    weight = torch.nn.Parameter(torch.randn(100))
    ema, before = EMA([("w", weight)], decay=0.5), weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3)
    trained = weight.detach().clone()

    def fail_while_swapped():
        with ema.swapped():
            assert torch.equal(weight, before)
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_swapped()
    assert torch.equal(weight, trained)
    assert torch.equal(ema.shadows["w"], before)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(ValueError, match=r"^decay: .*got"):
        EMA([], decay=decay)
