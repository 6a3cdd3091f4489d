"""The shipped configurations of second stages: short, of the published sizes, and each takes a step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm import assemble, checkpoint
from ldm.cli import main
from ldm.config import schema as configuration
from ldm.diffusion.guidance import Guidance
from ldm.models.empty import empty
from ldm.training.recipes.autoencoder import Schema as AutoencoderSchema
from ldm.training.recipes.diffusion import DiffusionRecipe
from ldm.training.recipes.diffusion import Schema as DiffusionSchema
from tests.checkpoint.made_up import make
from tests.data.photographs import photograph
from tests.reduced import FILES, ROOT, reads_images, small, stage_of, words, written
from tests.training.killing import rows

OWN = {"scenes", "small"}  # of no published size
EXACT = {  # parameters of the backbone
    "sd15": 859_520_964,
    "sd21_v": 865_910_724,
    "txt2img_1p4b": 872_300_484,
    "imagenet_ldm4": 400_920_579,
    "dit_xl2": 674_834_720,
    "dit_b4": 130_315_808 + 768 * 4 * (16 - 4) + 769 * 8 * (16 - 4),  # B/2's, with patches of 16 pixels, not 4
    "sit_xl2": 674_834_720 - 1153 * 16,  # DiT's, without a learned variance
    "ddpm_cifar10": 35_746_307,
}
MILLIONS = {  # as the LDM paper rounds: its tables 12, 13 and 15
    "celebahq_vq4": 274,
    "churches_kl8": 295,
    "imagenet_ldm8": 395,
    "inpainting": 387,
    "super_resolution": 169 - 55.32 + 0.64,  # with its first stage there; with a table of noise levels here
    "semantic_synthesis": 215,
}
FIRST_STAGES = {
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f8_decoder": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "vq_f4": 55_322_782,
    "vq_f8": 67_717_295,
    "vq_f16": 69_593_371,
}
CONDITIONERS = {
    "imagenet_ldm4": 1001 * 512,
    "imagenet_ldm8": 1001 * 512,
    "sd15": 123_060_480,
    "sd21_v": 340_387_840,  # transformers' CLIPTextModel of 23 layers, which diffusers has for it
    # embeddings, 32 blocks of attention to 512 and back and a fourfold MLP, the last norm
    "txt2img_1p4b": (30522 + 77) * 1280 + 32 * (4 * 1280 * 512 + 8 * 1280**2 + 10 * 1280) + 2 * 1280,
}


def load(name: str, *overrides: str) -> configuration.Config:
    """A configuration with the node of its first stage, and no weights."""
    given = ["data.root=DIR"] if reads_images(name) else []
    if stage := stage_of(name):
        node = yaml.safe_load((ROOT / f"autoencoder/{stage}.yaml").read_text())["autoencoder"]
        given += [f"autoencoder={json.dumps(node)}"]
    return configuration.load(FILES[name], [*given, *overrides], DiffusionSchema)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", FILES)
def test_it_is_short_and_says_how_it_is_used(name):
    lines = FILES[name].read_text().splitlines()
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("# ")
    assert lines[1].startswith("#   python ")
    assert f"train_ldm.py --config {name}" in lines[1]
    stage = stage_of(name)
    assert stage == "" or stage in OWN or f"autoencoder=runs/{stage}/model.safetensors" in lines[1]
    assert ("data.root=DIR" in lines[1]) == reads_images(name)


@pytest.mark.parametrize("name", [name for name in FILES if name not in OWN | {"finetune"}])
def test_it_is_of_the_published_size(name):
    weights = [] if name not in ("sd15", "sd21_v") else ["conditioner.weights=random"]
    config = load(name, *weights)
    with empty():
        model = assemble.model(config)
    size = count(model.denoiser.backbone)
    if name in EXACT:
        assert size == EXACT[name]
    elif name in MILLIONS:
        assert size / 1e6 == pytest.approx(MILLIONS[name], abs=0.6)
    if name in CONDITIONERS:
        assert count(model.conditioner) == CONDITIONERS[name]
    assert f"{size / 1e6:.1f} M" in FILES[name].read_text().split("\n")[0]


def test_inpainting_learns_at_the_published_peak():
    """CompVis: base_learning_rate 1e-6, times the batch, times the cosine's f_max of 0.1."""
    values = written("inpainting")
    assert float(values["optimizer"]["lr"]) == pytest.approx(1e-6 * values["data"]["batch_size"] * 0.1)


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_first_stage_is_of_the_published_size(name):
    config = configuration.load(ROOT / f"autoencoder/{name}.yaml", ["data.root=DIR"], AutoencoderSchema)
    with empty():
        assert count(config.build("autoencoder")) == FIRST_STAGES[name]


@pytest.mark.parametrize("name", ["dit_xl2", "dit_b4"])
def test_dit_is_asked_at_the_steps_of_its_authors(name):
    """Their respacing: equal parts of 0 to 999, rounded."""
    config = load(name)
    told = assemble.grid(config, config.build("path")).t[:-1]
    assert told.tolist() == [round(i * 999 / 249) for i in reversed(range(250))]


@pytest.mark.parametrize(
    ("name", "start", "weight", "layers"), [("vq_f4", 0, 0.75, 3), ("vq_f8", 1, 0.6, 2), ("vq_f16", 250_001, 0.75, 2)]
)
def test_a_game_is_the_published_one(name, start, weight, layers):
    config = configuration.load(ROOT / f"autoencoder/{name}.yaml", ["data.root=DIR"], AutoencoderSchema)
    loss = config["loss"]
    assert (loss["start"], loss["adversarial_weight"]) == (start, weight)
    assert config["discriminator"]["layers"] == layers


# ---------------------------------------------------------------------------------------------- and it trains

SIDE = 32  # 16x16 latents: the deepest U-Net halves four times
ONCE = {"trainer.steps": 1, "trainer.log_every": 1, "trainer.validate_images": 4, "trainer.accumulate": 1}
ONCE |= {"trainer.precision": "32-true", "spacing.steps": 2}
FEW = {"resolution": SIDE, "batch_size": 4, "workers": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Some pictures with captions and labels, one more than a batch: `data.split` keeps at least one apart."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i, name in enumerate(("red cube", "green cone", "blue ball", "gray cylinder", "black cube")):
        photograph(SIDE, SIDE, i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {name}", "label": i}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def first_stages(tmp_path_factory) -> dict[str, Path]:
    """Made-up first stages of factor 2."""
    folder = tmp_path_factory.mktemp("stages")
    for name in ("kl", "vq"):
        checkpoint.save(folder / f"{name}.safetensors", *make(name))
    return {name: folder / f"{name}.safetensors" for name in ("kl", "vq")}


@pytest.fixture
def train(pictures, first_stages, tmp_path):
    """The command that trains a small one for one step; returns its exit status."""

    def run(name: str, **changes) -> int:
        sources = [axis for axis in ("data", "validation") if axis in written(name)]
        changes = ONCE | small(name) | {f"{axis}.{key}": x for axis in sources for key, x in FEW.items()} | changes
        if reads_images(name):
            changes |= {"data.root": str(pictures), "data.manifest": str(tmp_path / "manifest")}
        if stage := stage_of(name):
            changes["autoencoder"] = str(first_stages["vq" if stage.startswith("vq") else "kl"])
        return main(["train-ldm", "--config", str(FILES[name]), "--run", str(tmp_path / "run"), *words(changes)])

    return run


@pytest.mark.parametrize("name", [name for name in FILES if name != "finetune"])
def test_it_takes_a_step_at_reduced_width(name, train, tmp_path):
    """The whole command: one step, a validation with pictures, and a model's file that is opened again."""
    assert train(name) == 0
    (row,) = rows(tmp_path / "run")
    assert row["step"] == "1"
    assert math.isfinite(float(row["loss/loss"]))
    assert float(row["loss/loss"]) > 0
    state = load_file(next((tmp_path / "run/checkpoints").glob("*/state.safetensors")))
    weights = {key.removeprefix("model/"): x for key, x in state.items() if key.startswith("model/denoiser.backbone.")}
    to_device = [
        key for key, x in weights.items() if not torch.equal(x, state[f"ema/{key}"])
    ]  # the average lags behind
    assert "denoiser.backbone.out.weight" in to_device
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == 1
    loaded = checkpoint.open(tmp_path / "run/model.safetensors")
    assert loaded.config["backbone"]["type"] == written(name)["backbone"]["type"]
    assert any(key.startswith("backbone.") for key in loaded.state)


def test_finetune_takes_the_whole_model_from_a_file(pictures, sd1_folder, tmp_path):
    changes = ONCE | {f"data.{key}": x for key, x in FEW.items()}
    changes |= {"data.root": str(pictures), "data.manifest": str(tmp_path / "manifest"), "optimizer.lr": 0}
    where = ["--init-from", str(sd1_folder), "--run", str(tmp_path / "run")]
    assert main(["train-ldm", "--config", str(FILES["finetune"]), *where, *words(changes)]) == 0
    trained, before = checkpoint.open(tmp_path / "run/model.safetensors"), checkpoint.open(sd1_folder)
    ours, theirs = (assemble.configure(opened.config, "test") for opened in (trained, before))
    for axis in ("path", "prediction", "backbone", "autoencoder", "conditioner", "guidance"):
        assert ours[axis] == theirs[axis], axis
    assert all(torch.equal(x, before.state[name]) for name, x in trained.state.items() if name.startswith("backbone."))


def test_the_small_first_stage_takes_a_step(pictures, tmp_path):
    changes = {"autoencoder.channels": 32, "discriminator.channels": 16, "loss.start": 0, "loss.warmup": 0}
    changes |= {"data.root": str(pictures), "data.manifest": str(tmp_path / "manifest"), "trainer.steps": 2}
    changes |= {f"data.{key}": x for key, x in FEW.items()} | {"trainer.validate_images": 4, "trainer.log_every": 1}
    file = ROOT / "autoencoder/small.yaml"
    assert main(["train-autoencoder", "--config", str(file), "--run", str(tmp_path / "run"), *words(changes)]) == 0
    assert all(math.isfinite(float(row["loss/loss"])) for row in rows(tmp_path / "run"))
    assert checkpoint.open(tmp_path / "run/model.safetensors").config["data"]["split"] == 0.05


@pytest.mark.parametrize(
    ("name", "rate", "parts"),
    [
        ("inpainting", 0.3, []),
        ("layout_to_image", 0.0, []),
        ("layout_to_image", 0.3, ["boxes"]),
        ("imagenet_ldm8", 0.3, ["label"]),
    ],
)
def test_what_is_never_dropped_is_not_guided_away_from(name, rate, parts, train, monkeypatch, capsys):
    """Nor what lies beside the latents: samples are made without guidance, whatever cfg says, and that is said."""
    seen, condition = [], DiffusionRecipe.condition

    def watched(recipe, batch, x0, drop):
        if not recipe.training:
            seen.append(drop)
        return condition(recipe, batch, x0, drop)

    monkeypatch.setattr(DiffusionRecipe, "condition", watched)
    guide, guided = Guidance.__call__, []
    monkeypatch.setattr(Guidance, "__call__", lambda *args: guided.append(1) or guide(*args))
    assert train(name, **{"guidance.cfg": 3, "conditioner.drop": rate}) == 0
    assert ("guidance: cfg 3 has no effect" in capsys.readouterr().out) == (not parts)
    assert len(guided) == len(parts)
    assert [list(drop) for drop in seen if drop] == [[part] for part in parts]
    assert all(flags.all() for drop in seen for flags in drop.values())
