"""Tests use one thread and no network, and repeat exactly."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None
)  # what fails will fail again, however slow the machine
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
