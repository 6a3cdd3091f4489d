"""Folders of diffusers, in both directions: what we write it opens, what it writes we open, and nothing changes."""

import json
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import checkpoint
from ldm.conditioning.tokenizer import BPE
from ldm.errors import CheckpointError
from tests.checkpoint.made_up import CONFIGS, make
from tests.models.first_stages import fill

PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1_inpainting": "StableDiffusionInpaintPipeline",
    "sd1_edit": "StableDiffusionInstructPix2PixPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2_v": "StableDiffusionPipeline",
    "sd2_inpainting": "StableDiffusionInpaintPipeline",
    "ldm_vq": "LDMPipeline",
    "dit": "DiTPipeline",
}
TOKENIZER = BPE([("a", "b</w>"), ("c", "d</w>")])


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def write(folder: Path, name: str, **changes) -> Path:
    """A made-up pipeline, settings of whose parts may be changed: unet={"act_fn": ...}."""
    checkpoint.write_diffusers(folder / name, *make(name), TOKENIZER)
    for part, settings in changes.items():
        path = folder / name / part / "config.json" if part != "index" else folder / name / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder / name


def refusal(function) -> str:
    with pytest.raises(CheckpointError) as error:
        function()
    return str(error.value)


@pytest.mark.parametrize("name", PIPELINES)
def test_our_folder_through_diffusers_and_back(name, tmp_path):
    from diffusers import DiffusionPipeline

    config, state = make(name)
    folder = write(tmp_path, name)
    loaded = checkpoint.open(folder)
    assert same(loaded.state, state)
    spare = {"spare": 1} if config["solver"]["type"] == "dpmpp_2m" else {}  # what their class makes of it
    assert loaded.config == config | {"spacing": config["spacing"] | spare}
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipe).__name__ == PIPELINES[name]
    pipe.save_pretrained(tmp_path / "theirs")
    theirs = checkpoint.open(tmp_path / "theirs")
    assert same(theirs.state, state)
    assert theirs.config == loaded.config
    assert [note for note in theirs.notes if "left out" in note] == []


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_a_first_stage_alone(name, tmp_path):
    config, state = make(name)
    folder = write(tmp_path, name)
    kind = {"kl": diffusers.AutoencoderKL, "vq": diffusers.VQModel}[name]
    model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path / "theirs")
    for path in (folder, tmp_path / "theirs"):
        loaded = checkpoint.open(path)
        assert same(loaded.state, state)
        assert loaded.config == config


def test_the_tokenizer_arrives_on_both_sides(tmp_path):
    from transformers import CLIPTokenizer

    from ldm.conditioning.tokenizer import from_folder

    folder = write(tmp_path, "sd1")
    loaded = checkpoint.open(folder)
    assert loaded.tokenizer == str(folder / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    text = "Ab cd, a cab!"
    assert theirs(text).input_ids[1:-1] == TOKENIZER.encode(text)
    assert from_folder(loaded.tokenizer).encode(text) == TOKENIZER.encode(text)
    assert theirs.model_max_length == 12
    message = refusal(lambda: checkpoint.write_diffusers(tmp_path / "none", *make("sd1")))
    assert message.startswith("the folder needs a tokenizer of CLIP's kind (")
    assert not (tmp_path / "none").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"sd1"}


def stable_diffusion(hidden_act: str, layers: int, **unet):
    """A StableDiffusionPipeline as its users make small ones: random weights, transformers' own CLIPTextModel."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=530,
        max_position_embeddings=12,
        hidden_act=hidden_act,
    )
    return StableDiffusionPipeline(
        vae=fill(
            AutoencoderKL(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
            )
        ),
        text_encoder=fill(CLIPTextModel(clip)),
        tokenizer=None,
        unet=fill(
            UNet2DConditionModel(
                block_out_channels=(32, 64, 64),
                layers_per_block=2,
                sample_size=32,
                cross_attention_dim=32,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                **unet,
            )
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    ("act", "layers", "unet", "heads"),
    [
        ("quick_gelu", 2, {"attention_head_dim": 4}, {"heads": 4}),
        ("gelu", 2, {"attention_head_dim": (2, 4, 4), "use_linear_projection": True}, {"head_width": 16}),
        ("quick_gelu", 2, {"transformer_layers_per_block": (1, 2, 3), "attention_head_dim": 2}, {"heads": 2}),
    ],
)
def test_a_pipeline_that_diffusers_made_opens_here(act, layers, unet, heads, tmp_path):
    pipe = stable_diffusion(act, layers, **unet)
    pipe.save_pretrained(tmp_path / "theirs")
    names = load_file(tmp_path / "theirs" / "text_encoder" / "model.safetensors").keys()
    assert not any(name.startswith("text_model.") for name in names)  # as transformers writes since 5.6
    loaded = checkpoint.open(tmp_path / "theirs")
    assert {name: loaded.config["backbone"][name] for name in heads} == heads
    kind, number = {"quick_gelu": ("clip", layers), "gelu": ("open_clip", layers + 1)}[act]
    conditioner = loaded.config["conditioner"]
    assert (conditioner["type"], conditioner["layers"], conditioner["heads"]) == (kind, number, 4)
    assert loaded.config["solver"] == {"type": "ddim"}
    assert loaded.config["path"] == {"type": "scaled_linear", "start": 0.00085, "end": 0.012}
    assert loaded.config["size"] == 64
    checkpoint.write_diffusers(tmp_path / "ours", loaded.config, loaded.state, TOKENIZER)
    for part, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        files = [load_file(tmp_path / who / part / f"{file}.safetensors") for who in ("theirs", "ours")]
        assert same(*files)
    reloaded = type(pipe).from_pretrained(tmp_path / "ours", local_files_only=True)
    assert same(reloaded.text_encoder.state_dict(), pipe.text_encoder.state_dict())
    for parameter in [*reloaded.unet.parameters(), *pipe.unet.parameters()]:
        parameter.data = parameter.data.clone()  # mapped from a file they lie elsewhere, and BLAS rounds otherwise
    x, t, tokens = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 12, 32)
    with torch.no_grad():
        assert torch.equal(reloaded.unet(x, t, tokens).sample, pipe.unet(x, t, tokens).sample)


def test_a_dit_pipeline_that_diffusers_made_opens_here(tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    from ldm.models.dit import DiT
    from tests.models.backbones import DIT, diffusers_dit

    ours = fill(DiT(**DIT))
    vae = fill(AutoencoderKL(block_out_channels=(32,), latent_channels=4))
    scheduler = DDIMScheduler()
    pipe = DiTPipeline(diffusers_dit(ours, 8), vae, scheduler, id2label={0: "tench", 1: "goldfish"})
    pipe.save_pretrained(tmp_path)
    loaded = checkpoint.open(tmp_path)
    assert loaded.family == "DiT, diffusers folder"
    assert loaded.config["prediction"] == {"type": "learned_range", "of": {"type": "eps"}}
    assert loaded.config["conditioner"] == {"type": "label", "classes": 11, "null": 10}
    assert loaded.config["backbone"] == {"type": "dit", "width": 48, "depth": 2, "heads": 4, "patch": 2}
    backbone = {name: x for name, x in loaded.state.items() if name.startswith("backbone.")}
    assert same(backbone, {f"backbone.{name}": x for name, x in ours.state_dict().items()})


def test_old_attention_names_shards_and_variants(tmp_path):
    state = make("sd1")[1]
    folder = write(tmp_path, "sd1")
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = dict(zip(("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")))
    tensors = load_file(vae)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): x for key, x in tensors.items()}
    save_file(tensors, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    vae.unlink()
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, unet.with_name(file))
        weight_map |= dict.fromkeys(part, file)
    unet.unlink()
    unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(checkpoint.open(folder).state, state)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
            },
            {"solver": {"type": "euler"}, "prediction": {"type": "v"}, "spacing": {"type": "trailing", "steps": 50}},
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "beta_schedule": "linear"},
            {
                "solver": {"type": "dpmpp_2m"},
                "spacing": {"type": "karras", "steps": 50},
                "path": {"type": "linear", "start": 0.00085, "end": 0.012},
            },
        ),
        (
            {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 0, "timestep_spacing": None},
            {"spacing": {"type": "leading", "steps": 50, "offset": 0, "end": "table"}},
        ),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"path": {"type": "cosine"}}),
        (
            {"rescale_betas_zero_snr": True},
            {"path": {"type": "scaled_linear", "start": 0.00085, "end": 0.012, "zero_terminal_snr": True}},
        ),
        ({"trained_betas": [0.1, 0.3, 0.2]}, {"path": {"type": "table", "betas": [0.1, 0.3, 0.2]}}),
        ({"_class_name": "PNDMScheduler"}, {"solver": {"type": "dpmpp_2m"}}),
    ],
)
def test_schedulers(scheduler, expected, tmp_path):
    folder = write(tmp_path, "sd1")
    path = folder / "scheduler" / "scheduler_config.json"
    settings = {key: x for key, x in (json.loads(path.read_text()) | scheduler).items() if x is not None}
    path.write_text(json.dumps(settings))
    loaded = checkpoint.open(folder)
    assert {name: loaded.config[name] for name in expected} == expected
    note = "PNDMScheduler is not supported: DPM-Solver++ 2M replaces it"
    assert (note in loaded.notes) is (settings["_class_name"] == "PNDMScheduler")


def test_pixels_have_no_factor(tmp_path):
    """As diffusers' own training scripts leave a pipeline of pictures."""
    unet = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    loaded = checkpoint.open(tmp_path / "pixels")
    assert loaded.config["size"] == 32
    assert "the scheduler's clip_sample=True is ignored" in loaded.notes


def test_shards_of_a_variant_and_several_variants(tmp_path):
    unet = write(tmp_path, "sd1") / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    tensors = load_file(plain)
    plain.unlink()
    shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    save_file(tensors, unet / shard)
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert same(checkpoint.open(unet.parent).state, make("sd1")[1])
    (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    (unet / shard).unlink()
    for variant in ("ema", "fp16"):
        save_file(tensors, unet / f"diffusion_pytorch_model.{variant}.safetensors")
    assert refusal(partial(checkpoint.open, unet.parent)) == (
        f"several variants of the weights ({unet}); got diffusion_pytorch_model.ema.safetensors, "
        "diffusion_pytorch_model.fp16.safetensors; expected one; try without the others"
    )


def test_folders_that_are_refused(tmp_path):
    folder = write(tmp_path, "sd1", unet={"act_fn": "mish"})
    opening = partial(checkpoint.open, folder)
    assert refusal(opening) == f"act_fn: not supported ({folder}/unet); got mish; expected silu or gelu-approximate"
    for part, settings, message in (
        (
            "unet",
            {"norm_eps": 0.01},
            "norm_eps: not supported ({}/unet); got 0.01; expected 1e-05",
        ),
        (
            "index",
            {"scheduler": [None, None]},
            "a pipeline without its scheduler, which defines its noise ({}); got tokenizer, unet, vae, text_encoder",
        ),
        (
            "text_encoder",
            {"act_fn": "silu", "intermediate_size": 37},
            "unsupported text encoder ({}/text_encoder); got 37 for 64; expected an MLP four times as wide",
        ),
        (
            "index",
            {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]},
            "unsupported pipeline ({}); got StableDiffusionXLPipeline with text_encoder_2; "
            "expected Stable Diffusion 1 or 2, LDM or DiT",
        ),
    ):
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        target.mkdir()
        folder = write(target, "sd1", **{part: settings})
        assert refusal(partial(checkpoint.open, folder)) == message.format(folder)
    (folder / "model_index.json").unlink()
    assert refusal(partial(checkpoint.open, folder)) == (
        f"a folder without model_index.json ({folder}); got neither that nor config.json; "
        "expected a folder that diffusers has written"
    )
    assert refusal(partial(checkpoint.open, folder / "unet")) == (
        f"a folder without model_index.json ({folder}/unet); got UNet2DConditionModel; "
        "expected a folder that diffusers has written"
    )


def test_a_folder_of_pickles_and_one_without_a_weight(tmp_path):
    folder = write(tmp_path, "sd1")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.bias"]
    save_file(tensors, weights)
    expected = "missing tensors; got 1: conv_out.bias; expected none; try another layout"
    assert refusal(partial(checkpoint.open, folder)) == expected
    weights.rename(weights.with_suffix(".bin"))
    assert refusal(partial(checkpoint.open, folder)) == (
        f"no weights in safetensors ({folder}/unet); got diffusion_pytorch_model.bin; "
        "expected diffusion_pytorch_model.safetensors; "
        "try diffusers' save_pretrained(..., safe_serialization=True)"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ldm_text", "diffusers has no such pipeline; got unet with joint_text; expected Stable Diffusion, LDM or DiT"),
        ("ldm_class", "diffusers has no such pipeline; got unet with label; expected Stable Diffusion, LDM or DiT"),
        (
            "ldm_kl",
            "diffusers' UNet2DModel has one width of heads (unet); got 8 heads at every level; expected head_width; "
            "try compvis",
        ),
    ],
)
def test_what_diffusers_cannot_express_leaves_nothing_behind(name, message, tmp_path):
    assert refusal(lambda: checkpoint.write_diffusers(tmp_path / "x", *make(name), TOKENIZER)) == message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    folder = write(tmp_path, "kl")
    expected = f"exists already ({folder}); try another name"
    assert refusal(lambda: checkpoint.write_diffusers(folder, *make("vq"))) == expected
    assert same(checkpoint.open(folder).state, make("kl")[1])
    assert set(PIPELINES) | {"ldm_text", "ldm_class", "ldm_kl", "kl", "vq"} == set(CONFIGS)


@pytest.mark.parametrize("name", ["sd1", "kl"])
def test_a_first_stage_of_a_user_s_own_is_refused(name, tmp_path):
    config, state = make(name)
    config = {**config, "autoencoder": {"type": "mine"}}
    with pytest.raises(CheckpointError, match="other programs have no such first stage; got mine; expected kl or vq"):
        checkpoint.write_diffusers(tmp_path / "folder", config, state)
    assert not (tmp_path / "folder").exists()
