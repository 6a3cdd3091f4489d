"""ldm sample, by its command line: the pictures, what they remember, and an answer to every wrong word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import assemble, checkpoint
from ldm.cli import main
from ldm.conditioning.tokenizer import BPE
from ldm.config import samplers
from ldm.pictures import LINE
from tests.models.first_stages import fill

ROOT = Path(__file__).parent.parent.parent
CLIP = {"type": "clip", "width": 32, "layers": 1, "heads": 2}
JOINT = {"type": "joint_text", "width": 32, "layers": 1, "heads": 2, "length": 16, "vocabulary": 530}
LABEL = {"type": "label", "classes": 4, "null": 3}
LAYOUT = {"type": "layout", "classes": 4, "width": 32, "boxes": 3}
MAP = {"type": "segmentation", "classes": 3}
BALL = "a red ball"


def write_model(path: Path, conditioner: dict | None, seed: int = 0) -> Path:
    """A model with a first stage of factor 2, small and random, in one file; its pictures are 16 pixels wide."""
    values = {
        "format": 1,
        "path": {"type": "scaled_linear", "start": 0.00085, "end": 0.012},
        "prediction": {"type": "eps"},
        "backbone": {"type": "unet", "channels": 32, "multipliers": [1, 2], "blocks": 1, "attend": [2], "heads": 2},
        "conditioner": conditioner,
        "guidance": {"cfg": 3.0},
        "spacing": {"type": "trailing", "steps": 2},
        "solver": {"type": "ddim"},
        "autoencoder": {"type": "kl", "latent": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1},
        "size": 16,
    }
    model = assemble.model(assemble.configure(values, "test"))
    networks = {
        "backbone": model.denoiser.backbone,
        "conditioner": model.conditioner,
        "autoencoder": model.autoencoder,
    }
    state = {}
    for prefix, network in networks.items():
        if network is not None:
            state |= {f"{prefix}.{name}": x for name, x in fill(network, seed).state_dict().items()}
    tokenizer = BPE.train([BALL, "a blue ball"] * 2, 530).to_json() if conditioner == JOINT else None
    checkpoint.save(path, values, state, tokenizer)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    conditioners = {"joint": JOINT, "clip": CLIP, "label": LABEL, "layout": LAYOUT, "map": MAP, "plain": None}
    return {name: write_model(folder / f"{name}.safetensors", node) for name, node in conditioners.items()}


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    """`run(*options)` samples with the joint model in an empty folder: the status, the lines on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object, model: str | None = "joint") -> tuple[int, list[str], str]:
        chosen = [] if model is None else ["--ckpt", str(models[model])]
        status = main(["sample", *chosen, "--device", "cpu", *map(str, options)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return call


@pytest.fixture
def pictures(run):
    """`pictures(*options)` gives the pictures of a call that went well."""

    def call(*options: object, **others) -> list[np.ndarray]:
        status, lines, err = run(*options, **others)
        assert (status, err) == (0, "")
        return [pixels(line) for line in lines]

    return call


def pixels(file: str | Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(abs(a - b).max())


def init_image(name: str = "init.png", size: int = 16) -> str:
    noise = np.random.default_rng(1).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(name)
    return name


def half_mask(name: str = "mask.png") -> str:
    """White, to be repainted, on the right."""
    Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 16, 0).astype(np.uint8)).save(name)
    return name


# ------------------------------------------------------------------------------------------------- what it makes


@pytest.mark.parametrize("model", ["joint", "clip"])
def test_a_prompt_becomes_a_picture_in_a_folder_that_is_made(run, model, tmp_path):
    status, lines, err = run("--prompt", BALL, "--out", "new/folder", model=model)
    assert (status, err, len(lines)) == (0, "", 1)
    assert Path(lines[0]).parent == Path("new/folder")
    assert Path(lines[0]).name.startswith("a-red-ball_0_")
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == [Path(lines[0]).name]
    assert pixels(lines[0]).shape == (16, 16, 3)
    assert pixels(lines[0]).std() > 10


def test_prompts_of_the_command_line_then_of_the_file_each_n_times(run):
    Path("prompts.txt").write_text("\ufeff\n  a blue ball \n\n red\n", encoding="utf-8")
    status, lines, _ = run("--prompt", BALL, "--prompt", "ball", "--prompts-file", "prompts.txt", "--n", 2)
    names = [Path(line).name.rsplit("_", 1)[0] for line in lines]
    assert status == 0
    assert names == [
        *("a-red-ball_0", "a-red-ball_1", "ball_2", "ball_3"),
        *("a-blue-ball_4", "a-blue-ball_5", "red_6", "red_7"),
    ]


def test_picture_i_is_that_of_seed_plus_i_alone_in_every_batch(pictures):
    together = pictures("--prompt", BALL, "--n", 3, "--seed", 5)
    for batch_size in (1, 2):
        for a, b in zip(together, pictures("--prompt", BALL, "--n", 3, "--seed", 5, "--batch-size", batch_size)):
            assert distance(a, b) <= 1
    assert distance(together[2], pictures("--prompt", BALL, "--seed", 7)[0]) <= 1
    assert distance(together[0], together[1]) > 10


def test_the_same_command_gives_the_same_file(run):
    first, again = run("--prompt", BALL)[1], run("--prompt", BALL)[1]
    assert first == again
    before = pixels(first[0])
    run("--prompt", BALL)
    assert (pixels(first[0]) == before).all()


@pytest.mark.parametrize(
    "change",
    [
        ("--prompt", "a blue ball"),
        ("--negative", "blue"),
        ("--cfg", "9"),
        ("--steps", "5"),
        ("--sampler", "heun"),
        ("--seed", "1"),
        ("guidance.rescale=0.9",),
        ("spacing.type=leading", "spacing.steps=3"),
    ],
)
def test_every_setting_matters(change, run, pictures):
    _, (line,), _ = run("--prompt", BALL)
    before = pixels(line)
    (after,) = pictures(*(() if "--prompt" in change else ("--prompt", BALL)), *change)
    assert distance(before, after) > 1


@pytest.mark.parametrize(
    ("alias", "name"), [("Euler a", "euler_ancestral"), ("DPM++ 2M", "dpmpp_2m"), ("UniPC", "unipc"), ("DDIM", "ddim")]
)
def test_samplers_answer_to_the_names_of_others(alias, name, pictures):
    by_alias, by_name = (pictures("--prompt", BALL, "--sampler", word)[0] for word in (alias, name))
    assert (by_alias == by_name).all()


def test_every_alias_is_of_a_sampler_and_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = capsys.readouterr().out
    for alias, name in samplers.SOLVERS.items():
        assert samplers.parse(alias) == (name, {})
        assert any(line.split()[0] == name and alias in line for line in said.splitlines() if line.strip())


def test_options_are_short_for_overrides(pictures):
    (a,) = pictures("--prompt", BALL, "--cfg", 5, "--steps", 3, "--sampler", "euler")
    (b,) = pictures("guidance.cfg=5", "--prompt", BALL, "spacing.steps=3", "solver.type=euler")
    assert (a == b).all()


def test_any_size_that_the_factor_allows(pictures):
    (picture,) = pictures("--prompt", BALL, "--height", 8, "--width", 24)
    assert picture.shape == (8, 24, 3)


def test_labels(pictures):
    a, b = (pictures("--label", label, model="label")[0] for label in (0, 1))
    assert distance(a, b) > 1


def boxes(labels: list[int], name: str = "boxes.json") -> str:
    """A box on the left and one on the right."""
    corners = [[0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 1]]
    Path(name).write_text(json.dumps({"boxes": corners[: len(labels)], "labels": labels}))
    return name


def test_boxes(pictures, models):
    """From a file or a dictionary; where and what they are matters, and so does guidance away from none."""
    made = {}
    for labels in ([0, 1], [1, 0], [0], []):
        (made[str(labels)],) = pictures("--condition", boxes(labels), model="layout")
    names = list(made)
    assert all(distance(made[a], made[b]) > 1 for i, a in enumerate(names) for b in names[:i])
    node = {"boxes": [(0, 0.25, 0.5, 0.75), (0.5, 0.25, 1, 1)], "labels": [0, 1]}
    pipe = ldm.load(models["layout"], device="cpu")
    assert distance(made["[0, 1]"], np.asarray(pipe(condition=node)[0]).astype(int)) == 0
    (alone,) = pictures("--condition", boxes([0, 1]), "--cfg", 1, model="layout")
    assert distance(made["[0, 1]"], alone) > 1
    (nothing,) = pictures("--condition", boxes([]), "--cfg", 1, model="layout")
    assert distance(made["[]"], nothing) <= 1, "it is what guidance moves away from"


def test_a_picture_of_boxes_is_made_again(run, capsys):
    (file,) = run("--condition", boxes([0, 1]), model="layout")[1]
    assert main(["replay", file, "--device", "cpu"]) == 0
    assert "identical" in capsys.readouterr().out
    boxes([1, 0])
    assert main(["replay", file, "--device", "cpu"]) == 2


def test_guidance_away_from_what_lies_beside_the_latents_is_not_pretended(run):
    Image.fromarray(np.eye(16, dtype=np.uint8)).save("map.png")
    status, (line,), err = run("--condition", "map.png", model="map")
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("warning: cfg 3 has no effect: segmentation ")
    guided = pixels(line)
    status, (line,), err = run("--condition", "map.png", "--cfg", 1, model="map")
    assert (status, err) == (0, "")
    assert distance(guided, pixels(line)) == 0


def test_a_model_that_reads_nothing(pictures):
    assert pictures(model="plain")[0].std() > 10


def test_strength_is_how_far_from_the_init_image(pictures):
    begun = pixels(init_image())
    options = ("--prompt", BALL, "--init-image", "init.png", "--steps", "10", "--strength")
    gentle, strong = (pictures(*options, strength)[0] for strength in (0.2, 1))
    assert abs(gentle - begun).mean() < abs(strong - begun).mean()
    assert distance(strong, pictures("--prompt", BALL, "--steps", 10)[0]) > 1


def test_an_init_image_of_another_size_is_fitted(pictures):
    (picture,) = pictures("--init-image", init_image(size=30), "--height", 8)
    assert picture.shape == (8, 16, 3)


def test_a_mask_keeps_what_is_black(pictures):
    begun = pixels(init_image())
    (picture,) = pictures("--prompt", BALL, "--init-image", "init.png", "--mask", half_mask())
    assert (picture[:, :8] == begun[:, :8]).all()
    assert distance(picture[:, 8:], begun[:, 8:]) > 10


def test_another_first_stage(pictures, tmp_path):
    other = write_model(tmp_path / "other.safetensors", None, seed=9)
    (own,), (others,) = pictures("--prompt", BALL), pictures("--prompt", BALL, "--vae", other)
    assert distance(own, others) > 10


def test_json_is_one_valid_line_a_picture_and_the_png_remembers_the_same(run, models):
    status, lines, err = run("--prompt", "a ☃\nball", "--negative", "blue", "--n", 2, "--seed", 3, "--json")
    assert (status, err, len(lines)) == (0, "", 2)
    for number, line in enumerate(lines):
        told = json.loads(line)
        with Image.open(told.pop("file")) as image:
            remembered, parameters = json.loads(image.text["ldm"]), image.text["parameters"]
        assert remembered == {**told, "place": [number, 2]}
        assert told["order"]["prompts"] == ["a ☃\nball"]
        assert told["order"]["seed"] == 3 + number
        assert told["checkpoint"] == checkpoint.open(models["joint"]).hash
        assert told["versions"] == {"ldm": ldm.__version__, "torch": torch.__version__}
        prompt, negative, settings = parameters.rsplit("\n", 2)
        assert (prompt, negative) == ("a ☃\nball", "Negative prompt: blue")
        wanted = f"Steps: 2, Sampler: ddim, CFG scale: 3.0, Seed: {3 + number}, Size: 16x16, Model hash: "
        assert settings == f"{wanted}{told['checkpoint'][:10]}, Version: ldm {ldm.__version__}"


def test_a_grid_and_a_preview(run):
    status, (*lines, grid), _ = run("--prompt", BALL, "--n", 3, "--steps", 6, "--grid", "--preview")
    assert (status, grid) == (0, "outputs/grid.png")
    sheet, height = pixels(grid), 16 + 3 * LINE
    assert sheet.shape == (2 * height, 32, 3)
    for number, (row, column) in enumerate([(0, 0), (0, 16), (height, 0)]):
        assert (sheet[row : row + 16, column : column + 16] == pixels(lines[number])).all()
        caption = sheet[row + 16 : row + height, column : column + 16]
        assert caption.min() < 128 < caption.max(), "the prompt in black on white"
    before = Path(grid).read_bytes()
    again = [run("--prompt", BALL, "--grid", *more)[1][-1] for more in ((), ("--json",))]
    assert again == ["outputs/grid-2.png", '{"grid": "outputs/grid-3.png"}']
    assert Path(grid).read_bytes() == before
    preview = pixels("outputs/preview.png")
    assert distance(preview, pixels(lines[0])) > 0, "it is from a step before the last"
    assert abs(preview - pixels(lines[0])).mean() < abs(preview - pixels(lines[1])).mean()


def test_a_prompt_that_is_cut_off_is_named_in_one_line(run):
    status, lines, err = run("--prompt", "red " * 15 + "ball")
    assert (status, len(lines)) == (0, 1)
    assert err.count("\n") == 1
    assert err.startswith("warning: text truncated to")
    assert "red ball" in err


def test_words_that_the_tokenizer_was_not_learned_from_are_named(run):
    status, lines, err = run("--prompt", "a dragon, a car", "--negative", "dragon 7")
    assert (status, len(lines), err) == (0, 1, "note: the model's text encoder has not seen: dragon, car\n")
    assert run("--prompt", "a dragon", model="clip")[2] == "", "CLIP's tokenizer was learned from other texts"


# --------------------------------------------------------------------------------------- processes, and their cost


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds this checkout."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False)


def test_torchrun_with_two_processes_writes_what_one_writes(models, tmp_path):
    options = ["--ckpt", str(models["joint"]), "--prompt", BALL, "-n", "5", "--batch-size", "2", "--grid"]
    script = [str(ROOT / "sample.py"), *options, "--device", "cpu"]
    one = python(*script, "--out", str(tmp_path / "one"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = python(*launch, *script, "--out", str(tmp_path / "two"))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1]
    assert len(names[0]) == 6, "five and the grid"
    for name in names[0]:
        assert distance(pixels(tmp_path / "one" / name), pixels(tmp_path / "two" / name)) <= 1
    assert sorted(Path(line).name for line in two.stdout.split()) == names[0]


def test_each_process_makes_its_share(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        made.append([int(Path(line).name.split("_")[1]) for line in run("--prompt", BALL, "--n", 3)[1]])
    assert made == [[0, 2], [1]]


def test_help_loads_no_torch():
    """How long it takes, `python -m benchmarks.start_up` measures."""
    ended = python("-X", "importtime", str(ROOT / "sample.py"), "--help")
    assert ended.returncode == 0
    loaded = ended.stderr
    assert " ldm.conditioning.tokenizer\n" in loaded
    assert not [name for name in ("torch", "numpy", "PIL", "yaml", "omegaconf") if f" {name}\n" in loaded]


def test_beside_torch_sampling_loads_little(models, tmp_path):
    """Neither torch's compiler, which weights without memory would import, nor the libraries of others."""
    arguments = ["sample", "--ckpt", str(models["joint"]), "--prompt", BALL, "--device", "cpu", "--out", str(tmp_path)]
    program = f"import sys; from ldm.cli import main; main({arguments}); print(*sys.modules)"
    ended = python("-c", program)
    assert ended.returncode == 0, ended.stderr
    heavy = {
        "torch._dynamo",
        "torch._inductor",
        "sympy",
        "transformers",
        "diffusers",
        "open_clip",
        "accelerate",
        "scipy",
    }
    assert heavy & set(ended.stdout.split()) == set()
