"""Where networks compute."""

import torch

from ldm.devices import place


def test_what_is_offloaded_comes_back_for_its_turn():
    network, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), torch.ones(1, 3)
    expected = network(x)
    place(network, torch.device("cpu"), offload=True)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert torch.equal(network(x), expected)
