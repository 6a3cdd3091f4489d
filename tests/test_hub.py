"""Models by their names on a hub: of what lies there, only what is read is brought here."""

import shutil
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects

from ldm import checkpoint, pipeline
from ldm.checkpoint import hub
from ldm.checkpoint.formats.diffusers import weights_of
from ldm.errors import CheckpointError

SD1 = "Stable Diffusion 1, diffusers folder"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The folder that a hub serves as its only model; what is asked for of it comes to `came`."""
    folder, cache = tmp_path / "served", tmp_path / "came"
    folder.mkdir()

    def names():
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())

    def snapshot_download(name, allow_patterns, **_):
        for file in filter_repo_objects(names(), allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, cache / file)
        return str(cache)

    def model_info(*_):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names()])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return folder


def came(served) -> list[str]:
    """The weights that were brought."""
    folder = served.parent / "came"
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in hub.WEIGHTS)


def weights(ending: str = "") -> list[str]:
    stems = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    return [f"{part}/{stem}{ending}.safetensors" for part, stem in stems.items()]


def test_of_a_pipeline_its_parts_come_and_no_second_copies(served, sd1_folder):
    shutil.copytree(sd1_folder, served, dirs_exist_ok=True)
    plain = served / "unet/diffusion_pytorch_model.safetensors"
    others = ["v1-5-pruned.safetensors", "model.safetensors", "safety_checker/model.safetensors", "unet/old.bin"]
    others += ["checkpoint-500/unet/model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    for name in others:
        (served / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(plain, served / name)
    loaded = pipeline.load("somebody/model", device="cpu").loaded
    assert loaded.family == SD1
    assert came(served) == weights()
    assert loaded.hash == checkpoint.open(sd1_folder).hash


def test_where_there_are_no_plain_weights_those_in_half_precision_come(served, sd1_folder):
    shutil.copytree(sd1_folder, served, dirs_exist_ok=True)
    for plain, half, other in zip(weights(), weights(".fp16"), weights(".non_ema")):
        shutil.copy(served / plain, served / other)
        (served / plain).rename(served / half)
    assert checkpoint.open("somebody/model").family == SD1
    assert came(served) == weights(".fp16")


def test_shards_a_first_stage_and_a_file_of_ours(served, sd1_folder):
    shards = ["unet/x.safetensors.index.json", "unet/x-00001-of-00002.safetensors", "unet/x-00002-of-00002.safetensors"]
    assert hub.model_files([hub.INDEX, *shards, "other/x.safetensors"]) == [hub.INDEX, *shards]
    shutil.copytree(sd1_folder / "vae", served, dirs_exist_ok=True)
    assert checkpoint.open(pipeline.SHIPPED, vae="somebody/vae").family == "ldm"
    shutil.rmtree(served)
    shutil.rmtree(served.parent / "came")
    served.mkdir()
    shutil.copy(pipeline.SHIPPED, served / "model.safetensors")
    assert checkpoint.open("somebody/scenes").hash == checkpoint.open(pipeline.SHIPPED).hash


def test_a_repository_without_any_of_them_is_refused(served):
    (served / "anything-v3.safetensors").touch()
    said = r"no supported file in this repository \(some/body\); got anything-v3.safetensors; try downloading"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.open("some/body")


def test_what_is_here_is_read_as_it_is_and_a_missing_file_is_no_id(tmp_path, monkeypatch, sd1_folder):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # nobody asks a hub
    monkeypatch.chdir(tmp_path)
    assert hub.local(sd1_folder) == sd1_folder
    with pytest.raises(CheckpointError, match=r"no such file \(runs/model.safetensors\)"):
        checkpoint.open("runs/model.safetensors")


@pytest.fixture
def cached(tmp_path, monkeypatch, sd1_folder):
    """The cache of a hub that cannot be reached, with all of a model in half precision, as others left it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, commit = tmp_path / "models--somebody--model", "a" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(commit)
    (model / "trees").mkdir()
    shutil.copytree(sd1_folder, model / "snapshots" / commit)
    for plain, half in zip(weights(), weights(".fp16")):
        (model / "snapshots" / commit / plain).rename(model / "snapshots" / commit / half)
    return model / "snapshots" / commit


def test_without_a_network_the_cache_is_read_as_it_is(cached):
    loaded = checkpoint.open("somebody/model")
    assert loaded.family == SD1
    assert loaded.files == [cached / name for name in weights(".fp16")]
    said = r"not found locally or on the Hub \(somebody/other\); got Cannot reach .*; expected a file, a folder"
    with pytest.raises(CheckpointError, match=said):
        pipeline.load("somebody/other")


def test_what_others_left_beside_the_weights_does_not_change_their_hash(cached):
    before = checkpoint.open(cached).hash
    (cached / "safety_checker").mkdir()
    shutil.copy(cached / weights(".fp16")[0], cached / "safety_checker/model.safetensors")
    assert checkpoint.open(cached).hash == before
    assert weights_of(cached / "vae") == [cached / weights(".fp16")[2]]
