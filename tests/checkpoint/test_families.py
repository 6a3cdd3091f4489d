"""Families: a new one is one file that a table names, and no size that tensors do not confirm is built."""

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import checkpoint
from ldm.checkpoint import hub, networks
from ldm.checkpoint.families import families
from ldm.checkpoint.files import write_file
from ldm.config import parts
from ldm.errors import CheckpointError
from tests.checkpoint import toy_family
from tests.checkpoint.made_up import CONFIGS, make

HUGE = 10**9


@pytest.fixture
def toy(monkeypatch):
    """The toy family in the table, as a plugin brings it."""
    monkeypatch.setattr(parts, "FAMILIES", dict(parts.FAMILIES))
    parts.plug("tests.checkpoint.toy_family")


def test_a_family_in_one_file_opens(toy, tmp_path):
    save_file(toy_family.TENSORS, tmp_path / "toy.safetensors")
    loaded = checkpoint.open(tmp_path / "toy.safetensors")
    assert (loaded.family, loaded.config["backbone"]) == ("Toy", {"type": "toy", "width": 3})
    assert loaded.state["backbone.weight"].eq(1).all()


def test_a_familys_file_is_unknown_without_its_row(tmp_path):
    save_file(toy_family.TENSORS, tmp_path / "toy.safetensors")
    with pytest.raises(CheckpointError, match="another architecture's file"):
        checkpoint.open(tmp_path / "toy.safetensors")


def test_plugins_are_asked_first_and_cannot_replace_a_family(toy, monkeypatch):
    assert families()[0] is toy_family.TOY
    monkeypatch.setattr(toy_family, "PARTS", {"family": {"sd1": "tests.checkpoint.toy_family:TOY"}})
    with pytest.raises(Exception, match="its family would replace ours"):
        parts.plug("tests.checkpoint.toy_family")


def test_an_unsupported_model_becomes_supported_by_its_name(toy, monkeypatch, tmp_path):
    save_file({**toy_family.TENSORS, "control_model.x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="got a ControlNet; "):
        checkpoint.open(tmp_path / "x.safetensors")
    monkeypatch.setattr(toy_family.Toy, "name", "a ControlNet")
    with pytest.raises(CheckpointError, match=r"tensors without a place; got 1: control_model\.x"):
        checkpoint.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_of_ours_has_one_family_that_writes_it(name):
    config = make(name)[0]
    assert any(family.describes(config) for family in families())


def test_the_hub_asks_for_the_parts_that_families_read():
    names = ["model_index.json", "unet/a.safetensors", "text_encoder/b.safetensors", "image_encoder/c.safetensors"]
    assert hub.model_files(names) == names[:3]


def changed(name: str, axis: str, **arguments) -> dict:
    """A stored configuration with other numbers in a network's node."""
    config = json.loads(json.dumps(CONFIGS[name]))
    config.get(axis, config).update(arguments)
    return config


CLAIMS = [
    ("sd1", "backbone", {"blocks": HUGE}, "backbone: more layers than tensors"),
    ("sd1", "backbone", {"depth": HUGE}, "backbone: more layers than tensors"),
    ("sd1", "backbone", {"multipliers": [1] * 2000}, "backbone: more layers than tensors"),
    ("sd1", "conditioner", {"layers": HUGE}, "conditioner: more layers than tensors"),
    ("sd1", "conditioner", {"vocabulary": HUGE}, "conditioner.vocabulary: no tensor is so large"),
    ("sd1", "conditioner", {"width": HUGE}, "conditioner.width: no tensor is so large"),
    ("ldm_vq", "autoencoder", {"codes": HUGE}, "autoencoder.codes: no tensor is so large"),
    ("ldm_vq", "autoencoder", {"blocks": HUGE}, "autoencoder: more layers than tensors"),
    ("dit", "backbone", {"depth": HUGE}, "backbone: more layers than tensors"),
    ("dit", "path", {"steps": HUGE}, "path.steps: too large"),
    ("dit", "", {"size": HUGE}, "size: too large"),
]


@pytest.mark.parametrize("layout", ["ldm", "compvis"])
@pytest.mark.parametrize(("name", "axis", "arguments", "message"), CLAIMS)
def test_sizes_in_metadata_are_refused_before_memory_is_taken(layout, name, axis, arguments, message, tmp_path):
    config, path = changed(name, axis, **arguments), tmp_path / "x.safetensors"
    if layout == "ldm":
        write_file(path, make(name)[1], {"ldm": "1", "config": json.dumps(config)})
    else:
        checkpoint.write_compvis(path, *make(name))
        save_file(load_file(path), path, {"config": json.dumps(config)})
    tracemalloc.start()
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert str(error.value).startswith(f"{message} ({path}); got ")


def test_layers_that_settings_claim_are_counted(tmp_path):
    from tests.checkpoint.test_diffusers import write

    folder = write(tmp_path, "sd1", text_encoder={"num_hidden_layers": HUGE})
    with pytest.raises(CheckpointError) as error:
        checkpoint.open(folder)
    assert str(error.value) == f"more layers than weights ({folder}/text_encoder); got {HUGE}; expected at most 2"


def test_an_encoder_that_is_stored_elsewhere_may_be_larger_than_any_tensor():
    config = {"conditioner": {"type": "t5", "layers": 24, "width": 4096, "vocabulary": 32128, "weights": "google/t5"}}
    with pytest.raises(CheckpointError):
        networks.check_sizes(config, {"backbone.out.weight": (4, 4)}, "x")
    networks.check_sizes(config | {"left_out": {"conditioner.weights": {}}}, {"backbone.out.weight": (4, 4)}, "x")
