"""`ldm cache`: from stage two's configuration to a folder that training reads, or one line that says why not."""

import json
from itertools import islice

import pytest
import torch

from ldm import assemble, checkpoint
from ldm.cli import main
from ldm.config import parts
from ldm.data import latents_writer
from ldm.data.latents import Latents
from ldm.data.loader import loader
from ldm.data.sampler import SampleId
from ldm.draws import stream
from ldm.pictures import to_float
from ldm.training.recipes.diffusion import Schema
from tests.checkpoint.made_up import CLIP, KL, make
from tests.data.photographs import photograph
from tests.data.tiny_source import TinySource

CONFIG = """
seed: 3
autoencoder: {stage}
conditioner: {{type: clip, width: 16, layers: 1, heads: 2, length: 12, weights: random}}
path: {{type: flow}}
prediction: {{type: flow}}
backbone: {{type: unet}}
guidance: {{}}
spacing: {{type: trailing, steps: 4}}
solver: {{type: euler}}
draw: {{type: uniform}}
weight: {{type: constant}}
optimizer: {{type: adamw, lr: 1e-3}}
schedule: {{type: constant}}
ema: {{}}
trainer: {{steps: 1}}
data: {{type: tiny, batch_size: 8}}
"""


@pytest.fixture
def stage(tmp_path):
    """A first stage's file."""
    config, state = make("kl")
    checkpoint.save(tmp_path / "stage.safetensors", config, state)
    return tmp_path / "stage.safetensors"


@pytest.fixture
def command(tmp_path, stage, monkeypatch):
    """`ldm cache` with more on the command line; returns its exit status."""
    monkeypatch.setattr(latents_writer, "SHARD_SAMPLES", 8)
    monkeypatch.setitem(parts.TABLES["data"], "tiny", "tests.cli.tiny_parts:Tiny")
    (tmp_path / "two.yaml").write_text(CONFIG.format(stage=stage))
    fixed = ["cache", "--config", str(tmp_path / "two.yaml")]
    return lambda *more: main([*fixed, "--out", str(tmp_path / "cache"), "--device", "cpu", *more])


def read(folder, *indices):
    data = Latents(root=str(folder), batch_size=4)
    return data, data.batch([SampleId(index, index, 0) for index in indices], 0)


def test_a_configuration_of_stage_two_becomes_a_cache(command, tmp_path, stage, capsys):
    assert command("--dtype", "fp32", "--batch-size", "4") == 0
    assert "3 of 3 shards" in (said := capsys.readouterr().out)
    assert said.endswith("20 samples, complete\n")
    data, batch = read(tmp_path / "cache", 0, 1, 2, 3)
    config, loaded = assemble.load(
        tmp_path / "two.yaml", ["data.type=latents", "data.root=x", "data.batch_size=4"], Schema
    )
    assert config["autoencoder"] == KL | {"per_channel": False, "stem": 1, "checkpointing": False}
    torch.manual_seed(stream(3, "init"))
    autoencoder, conditioner = assemble.encoders(config, loaded)
    data.check(autoencoder, conditioner, config["conditioner"])
    online = TinySource().batch([SampleId(i, i, 0) for i in range(4)], 0)
    assert batch["latents"].equal(autoencoder.encode(to_float(online["image"])))
    assert conditioner(batch).tokens.equal(conditioner(online).tokens)


def test_the_conditioner_may_come_from_a_checkpoint_too(command, tmp_path):
    config, state = make("sd1")
    config = config | {"conditioner": CLIP}
    checkpoint.save(
        tmp_path / "sd.safetensors",
        config,
        state,
        json.dumps({"type": "bpe", "merges": [], "vocabulary": None, "pad": 513}),
    )
    assert command(f"conditioner={tmp_path / 'sd.safetensors'}", f"autoencoder={tmp_path / 'sd.safetensors'}") == 0
    data, batch = read(tmp_path / "cache", 5)
    assert data.key["texts"]["caption"]["width"] == 64
    loaded = checkpoint.open(tmp_path / "sd.safetensors")
    model = assemble.model(assemble.configure(loaded.config, "test"))
    assemble.fill(model, loaded)
    online = model.conditioner({"caption": TinySource().captions(5)})
    assert batch["states"]["caption"]["tokens"].equal(online.tokens.bfloat16())


@pytest.mark.parametrize("text", ["frozen", "trained"])
def test_a_run_on_the_cache_of_a_folder_is_the_run_on_its_pictures(text, command, tmp_path, monkeypatch):
    """Aspect-ratio buckets, mirror images and several captions of a picture, over two epochs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(30):
        photograph(40 + 3 * i, 100 - 2 * i, i).save(root / f"{i:02}.png")
        (root / f"{i:02}.json").write_text(json.dumps({"caption": [f"a red {'ball ' * (i % 5)}", "two", f"the {i}"]}))
    settings = ["data.resolution=32", "data.multiple=8", "data.aspect=2", "data.flip=true", "data.workers=0"]
    folder = ["data.type=images", f"data.root={root}", "data.batch_size=4", *settings]
    trained = ["conditioner={type: joint_text, width: 16, layers: 1, vocabulary: 700}"] if text == "trained" else []
    assert command(*folder, *trained, "--dtype", "fp32") == 0
    ours = loader(Latents(root=str(tmp_path / "cache"), batch_size=4), 5)
    config, loaded = assemble.load(tmp_path / "two.yaml", folder, Schema)
    theirs = loader(config.build("data"), 5)
    torch.manual_seed(stream(3, "init"))
    autoencoder, conditioner = assemble.encoders(config, loaded)
    for cached, online in islice(zip(ours, theirs), 15):
        for name in ("number", "index", "original_size", "crop"):
            assert cached[name].equal(online[name])
        torch.testing.assert_close(cached["latents"], autoencoder.encode(to_float(online["image"])), atol=1e-5, rtol=0)
        if text == "trained":
            assert cached["caption"] == online["caption"]
        else:
            torch.testing.assert_close(conditioner(cached).tokens, conditioner(online).tokens, atol=1e-5, rtol=0)


def test_a_run_on_the_cache_of_scenes_is_the_run_on_their_renders(command, tmp_path):
    scenes = ["data.type=scenes", "data.resolution=16", "data.batch_size=4", "data.size=12", "data.workers=0"]
    assert command(*scenes, "--dtype", "fp32") == 0
    config, loaded = assemble.load(tmp_path / "two.yaml", scenes, Schema)
    torch.manual_seed(stream(3, "init"))
    autoencoder, conditioner = assemble.encoders(config, loaded)
    ours, theirs = (
        loader(data, 3) for data in (Latents(root=str(tmp_path / "cache"), batch_size=4), config.build("data"))
    )
    for cached, online in islice(zip(ours, theirs), 6):
        assert cached["index"].equal(online["index"])
        torch.testing.assert_close(cached["latents"], autoencoder.encode(to_float(online["image"])), atol=1e-5, rtol=0)
        torch.testing.assert_close(conditioner(cached).tokens, conditioner(online).tokens, atol=1e-5, rtol=0)


def test_mirrored_pictures_are_cached_and_crops_at_random_are_not(command, tmp_path, capsys):
    assert command("data.flip=true") == 0
    data, _ = read(tmp_path / "cache", 0)
    assert data.shard(0)["latents"].shape == (8, 2, 4, 8, 8)
    assert command("data.crop=random") == 2
    assert "data.crop: random crops cannot be cached" in capsys.readouterr().err


def test_ranks_share_the_shards(command, tmp_path, capsys, monkeypatch):
    assert command("--rank", "1", "--ranks", "2") == 0
    assert "1 of 3 shards" in (said := capsys.readouterr().out)
    assert said.endswith("; 2 missing\n")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command() == 0
    assert "3 of 3 shards" in capsys.readouterr().out
    read(tmp_path / "cache", 19)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["data.resolution=24"],
            "error: the cache is stale: sizes differs (data.resolution too) (DIR); got [[16, 16]]",
        ),
        (["seed=4"], "error: the cache is stale: texts.caption.weights differs"),
        (["data.workers=1", "data.batch_size=2", "backbone.channels=64"], None),
    ],
)
def test_another_cache_is_not_mixed_in(more, said, command, tmp_path, capsys):
    assert command() == 0
    capsys.readouterr()
    if said is None:
        assert command(*more) == 0
        return
    assert command(*more) == 3
    assert said.replace("DIR", str(tmp_path / "cache")) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["autoencoder=missing.safetensors"], "no such file (missing.safetensors)"),
        (["autoencoder.type=vq"], "autoencoder.type: does not exist, so it cannot be overridden"),
        (["autoencoder={type: kl}"], "autoencoder: has no weights"),
        (["path=vp"], "path: wrong value"),
        (["conditioner=STAGE"], "conditioner: not in this checkpoint (STAGE); got ldm"),
        (["conditioner={type: segmentation, classes: 3}"], "conditioner: reads segmentation, which is not cached"),
        (["data={type: latents, root: x, batch_size: 4}"], "data.type: already a cache"),
        (["data.resolution=15"], "data.resolution: not divisible"),
        (["seed=-1"], "seed: out of range"),
        (["--rank", "2", "--ranks", "2"], "--rank: out of range"),
        (["--batch-size", "0"], "--batch-size: out of range"),
        (["--out", "FILE/cache"], "--out: cannot be written to"),
    ],
)
def test_bad_input_is_one_line(more, said, command, tmp_path, stage, capsys):
    (tmp_path / "file").write_text("")
    places = {"STAGE": str(stage), "FILE": str(tmp_path / "file")}
    for name, place in places.items():
        more, said = [word.replace(name, place) for word in more], said.replace(name, place)
    assert command(*more) in (2, 4)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_the_configuration_is_printed_with_the_first_stage_in_its_place(command, capsys):
    assert command("--print-config") == 0
    assert json.loads(capsys.readouterr().out)["autoencoder"]["latent"] == 4
