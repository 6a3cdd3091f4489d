"""Families: a new one is one file that a table names, and no size that tensors do not confirm is built."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import checkpoint
from ldm.checkpoint import hub, networks
from ldm.checkpoint.families import families, read_file
from ldm.checkpoint.files import Tensors, write_file
from ldm.config import parts
from ldm.errors import CheckpointError
from tests.checkpoint import toy_family
from tests.checkpoint.made_up import CONFIGS, make

HUGE = 10**9
KEYS = Path(__file__).parents[2].parent / "shared/real/keys"  # names and shapes of published files
REAL = {
    "Stable Diffusion 1": ("UNET-v1-SD.txt", "CLIP-v1-SD.txt", "transformer.text_model."),
    "Stable Diffusion 1, inpainting": ("UNET-v1-Inpainting.txt", "CLIP-v1-SD.txt", "transformer.text_model."),
    "Stable Diffusion 1, edit": ("UNET-v1-Pix2Pix.txt", "CLIP-v1-SD.txt", "transformer.text_model."),
    "Stable Diffusion 2": ("UNET-v2-SD.txt", "CLIP-v2-SD.txt", "model."),
}


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
    with pytest.raises(CheckpointError, match="unknown architecture"):
        checkpoint.open(tmp_path / "toy.safetensors")


def test_plugins_are_asked_first_and_cannot_replace_a_family(toy, monkeypatch):
    assert families()[0] is toy_family.TOY
    monkeypatch.setattr(toy_family, "PARTS", {"family": {"sd1": "tests.checkpoint.toy_family:TOY"}})
    with pytest.raises(Exception, match="family: this name is taken"):
        parts.plug("tests.checkpoint.toy_family")


def test_an_unsupported_model_becomes_supported_by_its_name(toy, monkeypatch, tmp_path):
    save_file({**toy_family.TENSORS, "control_model.x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="got a ControlNet; "):
        checkpoint.open(tmp_path / "x.safetensors")
    monkeypatch.setattr(toy_family.Toy, "name", "a ControlNet")
    with pytest.raises(CheckpointError, match=r"unexpected tensors; got 1: control_model\.x"):
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


def test_a_table_of_positions_in_a_folder_is_computed_instead(tmp_path):
    from tests.checkpoint.test_diffusers import same, write

    file = write(tmp_path, "dit") / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"pos_embed.pos_embed": torch.ones(1, 256, 128)}, file)
    assert same(checkpoint.open(tmp_path / "dit").state, make("dit")[1])


def published(file: str, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes in one of the lists of names."""
    lines = (KEYS / file).read_text().splitlines()
    found = [re.match(r"(\S+)\s+\[(.*)\]", line) for line in lines]
    return {prefix + m[1]: tuple(int(side) for side in m[2].split(",") if side.strip()) for m in found if m}


@pytest.mark.skipif(not KEYS.is_dir(), reason="no ../shared/real/keys")
@pytest.mark.parametrize("family", REAL)
def test_every_published_name_has_its_place(family):
    unet, text, prefix = REAL[family]
    shapes = published(unet, "model.diffusion_model.") | published(text, f"cond_stage_model.{prefix}")
    shapes |= published("VAE-v1-SD.txt", "first_stage_model.")

    def get(name):  # one norm's bias is read, to guess the prediction
        return torch.empty(shapes[name], device="cpu" if name.endswith("norm1.bias") else "meta")

    assert read_file(Tensors(Path("x.safetensors"), shapes, get)).family.removesuffix(", v-prediction") == family


def test_an_encoder_that_is_stored_elsewhere_may_be_larger_than_any_tensor():
    config = {"conditioner": {"type": "t5", "layers": 24, "width": 4096, "vocabulary": 32128, "weights": "google/t5"}}
    with pytest.raises(CheckpointError):
        networks.check_sizes(config, {"backbone.out.weight": (4, 4)}, "x")
    networks.check_sizes(config | {"left_out": {"conditioner.weights": {}}}, {"backbone.out.weight": (4, 4)}, "x")
