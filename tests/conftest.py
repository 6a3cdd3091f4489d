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


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory):
    """A small Stable Diffusion 1 as diffusers saves it; nobody writes there."""
    from tests import small_models  # diffusers is slow to import

    folder = tmp_path_factory.mktemp("sd1")
    small_models.stable_diffusion().save_pretrained(folder)
    return folder
