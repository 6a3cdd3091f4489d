"""Conditions beside a text, from a whole pipeline: a picture of low resolution, and what a backbone cannot read."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import assemble, checkpoint, pipeline
from ldm.errors import InputError
from tests.models.first_stages import fill

SIZE = {"height": 16, "width": 24}


def picture() -> Image.Image:
    rows, columns = np.mgrid[: SIZE["height"], : SIZE["width"]]
    noise = np.random.default_rng(0).integers(-40, 40, (*rows.shape, 3))
    return Image.fromarray(
        (np.stack((rows * 14, columns * 9, 240 - rows * 10), 2) + noise).clip(5, 250).astype("uint8")
    )


def test_a_low_resolution_condition_without_an_autoencoder_has_a_factor(tmp_path):
    config = {
        "format": 1,
        "path": {"type": "flow"},
        "prediction": {"type": "flow"},
        "backbone": {"type": "unet", "channels": 32, "multipliers": [1, 2], "blocks": 1, "attend": [], "heads": 1},
        "conditioner": {"type": "low_resolution", "factor": 4},
        "guidance": {"cfg": 1.0},
        "spacing": {"type": "trailing", "steps": 2},
        "solver": {"type": "ddim"},
    }
    model = assemble.model(assemble.configure(config, "test"))
    parts = {"backbone": model.denoiser.backbone, "conditioner": model.conditioner}
    state = {f"{a}.{b}": x for a, part in parts.items() for b, x in fill(part, 5).state_dict().items()}
    checkpoint.save(tmp_path / "model.safetensors", config, state)
    pipe = pipeline.load(tmp_path / "model.safetensors", device="cpu")
    settings = pipe.settings(condition=picture(), height=32, width=48)
    assert settings.inputs["low_resolution"].shape == (1, 3, 8, 12)
    assert pipe.batch([pipeline.Request()], settings, [""])["low_resolution_noise"].shape == (1, 3, 32, 48)
    one, other = (pipe(condition=x, height=32, width=48)[0] for x in (picture(), picture().rotate(180)))
    assert not np.array_equal(one, other)
    for factor in ({}, {"factor": 1}):
        wrong = {**config, "conditioner": {"type": "low_resolution", **factor}}
        with pytest.raises(InputError, match=r"conditioner\.factor: too small .* got 1; expected 2"):
            assemble.model(assemble.configure(wrong, "test"))


def test_a_backbone_that_cannot_read_the_condition_is_refused():
    config = {
        "format": 1,
        "path": {"type": "flow"},
        "prediction": {"type": "flow"},
        "backbone": {"type": "mlp"},
        "conditioner": {"type": "label", "classes": 3, "null": 2},
        "guidance": {"cfg": 1.0},
        "spacing": {"type": "trailing", "steps": 2},
        "solver": {"type": "ddim"},
    }
    with pytest.raises(InputError, match=r"backbone\.type: this backbone takes no pooled .* got MLP"):
        assemble.model(assemble.configure(config, "test"))


def test_a_low_resolution_condition(tmp_path):
    """Its noise belongs to the picture's seed, and another small picture makes another large one."""
    config = {
        "format": 1,
        "path": {"type": "cosine"},
        "prediction": {"type": "v"},
        "backbone": {"type": "unet", "channels": 32, "multipliers": [1, 2], "blocks": 1, "attend": [], "heads": 1},
        "conditioner": {"type": "low_resolution"},
        "autoencoder": {"type": "kl", "latent": 4, "channels": 32, "multipliers": [1, 2], "blocks": 1},
        "guidance": {"cfg": 1.0},
        "spacing": {"type": "trailing", "steps": 3},
        "solver": {"type": "ddim"},
    }
    model = assemble.model(assemble.configure(config, "test"))
    parts = {"backbone": model.denoiser.backbone, "conditioner": model.conditioner, "autoencoder": model.autoencoder}
    state = {f"{a}.{b}": x for a, part in parts.items() for b, x in fill(part, 5).state_dict().items()}
    checkpoint.save(tmp_path / "model.safetensors", config, state)
    pipe = pipeline.load(tmp_path / "model.safetensors", device="cpu")
    one, again = (pipe(seed=4, condition=picture(), **SIZE)[0] for _ in range(2))
    assert np.array_equal(one, again)
    other = pipe(seed=4, condition=picture().rotate(180), **SIZE)[0]
    assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() > 3
    settings, noises = pipe.settings(condition=picture(), **SIZE), []
    for seeds in ([4, 5], [5]):
        requests = [pipeline.Request(seed=seed) for seed in seeds]
        noises.append(pipe.batch(requests, settings, [""] * len(seeds))["low_resolution_noise"])
    assert torch.equal(noises[0][1], noises[1][0])
    assert not torch.equal(*noises[0])
    with pytest.raises(InputError, match="low_resolution: required by this model"):
        pipe(seed=4, **SIZE)
