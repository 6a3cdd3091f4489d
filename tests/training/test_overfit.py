"""Each task's configuration, made small, learns four pictures by heart: its condition says which of them it paints."""

from __future__ import annotations

import pytest
import torch

import ldm
from ldm import checkpoint
from ldm.checkpoint import load_weights
from ldm.checkpoint.networks import build_autoencoder
from ldm.cli import main
from ldm.data.derived import with_derived
from ldm.data.sampler import SampleId
from ldm.pictures import to_float
from tests.checkpoint.made_up import make
from tests.reduced import FILES, small, stage_of, words
from tests.training import four

TASKS = ("txt2img_1p4b", "imagenet_ldm4", "inpainting", "super_resolution", "semantic_synthesis", "layout_to_image")
CHANGES = {
    **{"trainer.steps": 200, "trainer.precision": "32-true", "trainer.validate_images": 4, "trainer.accumulate": 1},
    **{"optimizer.lr": 2e-3, "schedule": {"type": "cosine", "warmup": 20}, "ema.decay": 0.95},
    **{"data": {"type": "four", "length": 16}, "spacing.steps": 20, "size": 16},
    "prediction": {"type": "x0"},  # learned sooner than noise that is to be predicted from noise
}


@pytest.fixture(scope="module")
@torch.no_grad()
def first_stages(tmp_path_factory):
    """Random first stages of factor 2 whose latents of the four pictures have deviation one."""
    four.plug()
    folder = tmp_path_factory.mktemp("stages")
    for name in ("kl", "vq"):
        config, state = make(name)
        network = build_autoencoder(config["autoencoder"])
        load_weights(network, state, "autoencoder")
        z, _ = network.posterior(to_float(four.Four().samples["image"]))
        statistics = {"autoencoder.shift": z.mean(), "autoencoder.scale": 1 / z.std()}
        checkpoint.save(folder / f"{name}.safetensors", config, {**state, **statistics})
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_a_condition_says_which_of_four_is_painted(name, first_stages, tmp_path):
    changes = small(name) | CHANGES
    changes["autoencoder"] = str(first_stages / f"{stage_of(name)[:2]}.safetensors")
    assert main(["train-ldm", "--config", str(FILES[name]), "--run", str(tmp_path / "run"), *words(changes)]) == 0
    made, targets = painted(ldm.load(tmp_path / "run/model.safetensors", device="cpu", precision="fp32"))
    if name == "inpainting":  # the other half is given
        made, targets = made[..., 4:], targets[..., 4:]
    distances = torch.cdist(made.flatten(1), targets.flatten(1))  # (4, 4)
    others = torch.cdist(targets.flatten(1), targets.flatten(1)) + 1e9 * torch.eye(4)

    assert distances.argmin(1).tolist() == [0, 1, 2, 3]
    assert (distances.diagonal() < others.min(1).values / 2).all()


@torch.no_grad()
def painted(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents from other noise than training's, one under each of the four conditions, and the four pictures' own."""
    batch = four.Four().batch([SampleId(1000 + i, i, 0) for i in range(4)], 0)
    targets = pipe.autoencoder.encode(to_float(batch["image"]))  # (4, Z, 8, 8)
    condition = pipe.conditioner(with_derived(batch, pipe.conditioner.reads, targets, 0))
    settings = pipe.settings()
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(5))
    return settings.sampler(pipe.denoiser, pipe.denoiser.path.prior(noise), None, condition), targets
