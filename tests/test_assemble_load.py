"""Training configurations whose nodes come from checkpoints, and what is checked before these are opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm import assemble, checkpoint
from ldm.config import parts
from ldm.errors import CheckpointError, InputError
from tests.cli.test_sample import JOINT, models

__all__ = ["models"]

TRAINING = """
guidance: {cfg: 2}
spacing: {type: trailing, steps: 3}
solver: {type: ddim}
draw: {type: uniform}
weight: {type: constant}
optimizer: {type: adamw, lr: 1e-4}
schedule: {type: constant}
ema: {}
data: {type: scenes, resolution: 16, batch_size: 2}
trainer: {steps: 1}
"""
BACKBONE = "backbone: {type: unet, channels: 32, multipliers: [1], attend: [1], heads: 2}\n"


@pytest.fixture
def load(tmp_path):
    """`load(text, *overrides, init_from=None)` loads this text and the training settings."""

    def load(text: str, *overrides: str, init_from: Path | None = None):
        (tmp_path / "c.yaml").write_text(text + TRAINING)
        schema = parts.find("recipe", "diffusion").Schema
        return assemble.load(tmp_path / "c.yaml", overrides, schema, init_from)

    return load


@pytest.mark.parametrize("key", ["conditioner", "backbone", "autoencoder"])
def test_a_type_in_the_place_of_a_node_is_answered_with_the_node(key, load, tmp_path):
    name = next(iter(parts.TABLES[key]))
    axes = f"autoencoder: {tmp_path / 'missing.safetensors'}\n" if key != "autoencoder" else ""
    with pytest.raises(InputError, match=rf"^{key}: wrong value .*; got {name}; .*; try {{type: {name}}}$"):
        load(axes + BACKBONE + "path: {type: flow}\nprediction: {type: flow}\n", f"{key}={name}")


def nodes(file: Path) -> dict:
    """The configuration of a checkpoint, with all defaults."""
    return assemble.configure(checkpoint.open(file).config, str(file)).values


def test_a_backbone_brings_its_path_and_its_prediction(load, models):
    config, loaded = load(
        f"backbone: {models['joint']}\nconditioner: {models['joint']}\nautoencoder: {models['joint']}\n"
    )
    stored, complete = checkpoint.open(models["joint"]), nodes(models["joint"])
    for key in ("backbone", "conditioner", "autoencoder", "path", "prediction"):
        assert config[key] == complete[key], key
    assert set(loaded) == {"backbone", "conditioner", "autoencoder"}
    backbone = assemble.model(config, loaded).denoiser.backbone.state_dict()
    assert all(torch.equal(x, stored.state[f"backbone.{name}"]) for name, x in backbone.items())


def test_what_the_configuration_says_wins(load, models):
    text = f"backbone: {models['plain']}\nautoencoder: {models['plain']}\npath: {{type: cosine}}\n"
    config, _ = load(text, "prediction.type=v")
    assert (config["path"]["type"], config["prediction"]["type"], config["conditioner"]) == ("cosine", "v", None)


def test_init_from_fills_what_nothing_else_says(load, models):
    text = f"autoencoder: {models['joint']}\n"
    config, loaded = load(text, init_from=models["joint"])
    stored = nodes(models["joint"])
    assert {key: config[key] for key in ("path", "prediction", "backbone", "conditioner")} == {
        key: stored[key] for key in ("path", "prediction", "backbone", "conditioner")
    }
    assert set(loaded) == {"autoencoder", "init_from"}
    assert config["conditioner"]["type"] == JOINT["type"]
    assert config["guidance"]["cfg"] == 2, "how it is sampled is not taken from the file"
    config, _ = load(
        f"{text}conditioner: null\npath: {{type: flow}}\n", "prediction.type=flow", init_from=models["joint"]
    )
    assert (config["path"]["type"], config["prediction"]["type"], config["conditioner"]) == ("flow", "flow", None)
    assert config["backbone"] == stored["backbone"]
    with pytest.raises(InputError, match=r"guidance\.cfgg: unknown key"):
        load(text, "guidance.cfgg=3", init_from=Path("none"))
    config, _ = load(text + BACKBONE, init_from=models["joint"])
    assert config["backbone"]["multipliers"] == [1]


def test_init_from_fills_how_it_is_sampled(models, tmp_path):
    (tmp_path / "c.yaml").write_text(TRAINING[TRAINING.index("draw") :])
    schema = parts.find("recipe", "diffusion").Schema
    config, _ = assemble.load(tmp_path / "c.yaml", [], schema, models["joint"])
    assert all(config[key] == nodes(models["joint"])[key] for key in ("guidance", "spacing", "solver", "size"))


def test_a_node_without_type_changes_single_settings(load, models):
    config, _ = load(f"autoencoder: {models['joint']}\n", "backbone.checkpointing=true", init_from=models["joint"])
    assert config["backbone"] == {**nodes(models["joint"])["backbone"], "checkpointing": True}
    with pytest.raises(InputError, match=r"backbone.chekpointing: unknown key \(command line\).*try checkpointing"):
        load(f"autoencoder: {models['joint']}\n", "backbone.chekpointing=true", init_from=models["joint"])
    with pytest.raises(InputError, match=r"backbone.type: missing"):
        load("path: {type: flow}\nprediction: {type: flow}\n", "backbone.checkpointing=true")


def test_what_is_missing_is_still_missing(load, models):
    with pytest.raises(InputError, match=r"path: missing \(.*c.yaml.*\)"):
        load(BACKBONE)
    with pytest.raises(CheckpointError, match=r"conditioner: not in this checkpoint \(.*plain.safetensors\)"):
        load(f"conditioner: {models['plain']}\n{BACKBONE}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key .*; try lr$"),
        ("optimzer.lr=1", "optimzer: unknown key .*; try optimizer$"),
        ("data.batch_size=some", "data.batch_size: wrong value"),
        ("path.type=cosin", "path.type: unknown name .*; try cosine$"),
    ],
)
def test_keys_are_checked_before_files_are_opened(override, message, load, monkeypatch):
    monkeypatch.setattr(checkpoint, "open", lambda path: pytest.fail("opened"))
    with pytest.raises(InputError, match=message):
        load("backbone: none.safetensors\nautoencoder: none.safetensors\n", override, init_from=Path("none"))
