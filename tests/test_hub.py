"""Models by their names on a hub: of what lies there, only what is read is brought here."""

import shutil

import pytest
from huggingface_hub.utils import filter_repo_objects

from ldm import checkpoint, pipeline
from ldm.errors import CheckpointError
from tests import small_models


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    small_models.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, of which only those files come that are asked for: the folder it serves, and what came."""
    served, cache = tmp_path / "served", tmp_path / "cache"

    def snapshot_download(name, allow_patterns, ignore_patterns):
        names = [str(file.relative_to(served)) for file in served.rglob("*") if file.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(served / file, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return served, lambda: sorted(str(file.relative_to(cache)) for file in cache.rglob("*.safetensors"))


def test_of_a_hub_only_what_is_read_is_asked_for(hub, sd1_folder):
    served, came = hub
    shutil.copytree(sd1_folder, served)
    plain = served / "unet/diffusion_pytorch_model.safetensors"
    for name in ("v1-5-pruned.safetensors", "safety_checker/model.safetensors", "unet/x.non_ema.safetensors"):
        (served / name).parent.mkdir(exist_ok=True)
        shutil.copy(plain, served / name)
    (served / "safety_checker/config.json").write_text("{}")
    assert pipeline.load("somebody/model", device="cpu").opened.family == "Stable Diffusion 1, diffusers folder"
    parts = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    assert came() == [f"{part}/{stem}.safetensors" for part, stem in parts.items()]
    plain.rename(plain.with_suffix(".fp16.safetensors"))
    shutil.rmtree(served.parent / "cache")
    assert pipeline.load("somebody/model", device="cpu").opened.family == "Stable Diffusion 1, diffusers folder"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in came()


def test_a_hub_may_have_one_of_our_files(hub):
    served, _ = hub
    served.mkdir()
    shutil.copy(pipeline.SHIPPED, served / "model.safetensors")
    opened = pipeline.load("somebody/scenes", device="cpu").opened
    assert opened.family == "ldm"
    assert opened.hash == checkpoint.open(pipeline.SHIPPED).hash


def test_a_hub_is_asked_for_an_id_alone(tmp_path, monkeypatch, sd1_folder):
    """What is here is read as it is; an id that is not to be had is an error in one line."""
    assert pipeline.local(sd1_folder) == sd1_folder
    assert pipeline.local(tmp_path / "missing.safetensors") == tmp_path / "missing.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="neither here nor to be had from a hub"):
        pipeline.load("somebody/other")
