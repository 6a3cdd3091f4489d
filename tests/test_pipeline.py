"""Whole pictures: ours beside those of diffusers' own pipelines, and what a call promises."""

import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import checkpoint, pictures, pipeline
from ldm.checkpoint.schedules import read_scheduler
from ldm.errors import CheckpointError, DivergedError, InputError
from tests import small_models

PROMPT, NEGATIVE, SEED, STEPS = "a shiny red sphere", "blue", 3, 10
SIZE = {"height": 16, "width": 24}
# with `trailing`, their Euler starts at sigma_T z in units of x / alpha, 0.2% below our z
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "leading", "clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
}
every_sampler = pytest.mark.parametrize("name", SCHEDULERS)


def scheduler(name: str):
    kind, options = SCHEDULERS[name]
    offset = int(options["timestep_spacing"] == "leading")
    return getattr(diffusers, kind)(**small_models.NOISE, **options, steps_offset=offset)


@pytest.fixture
def loaded(tmp_path):
    """Our pipeline from what diffusers' saves."""

    def loaded(theirs, **options) -> pipeline.Pipeline:
        theirs.save_pretrained(tmp_path / "model")
        return pipeline.load(tmp_path / "model", device="cpu", **options)

    return loaded


@pytest.fixture
def sd1(sd1_folder):
    return pipeline.load(sd1_folder, device="cpu")


def ask_ours(pipe: pipeline.Pipeline, **more) -> Image.Image:
    (image,) = pipe(**{"prompt": PROMPT, "negative": NEGATIVE, "seed": SEED, "steps": STEPS, "cfg": 7.5} | more)
    return image


def ask_theirs(pipe, **more) -> Image.Image:
    asked = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 7.5}
    (image,) = pipe(PROMPT, **asked, generator=torch.Generator().manual_seed(SEED), **more).images
    return image


def distance(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures with something on them, in 1/255."""
    a, b = (np.asarray(image).astype(int) for image in (a, b))
    assert a.shape == b.shape
    assert b.std() > 30
    assert ((b > 0) & (b < 255)).mean() > 0.5
    return int(np.abs(a - b).max())


def picture() -> Image.Image:
    rows, columns = np.mgrid[: SIZE["height"], : SIZE["width"]]
    noise = np.random.default_rng(0).integers(-40, 40, (*rows.shape, 3))
    return Image.fromarray(
        (np.stack((rows * 14, columns * 9, 240 - rows * 10), 2) + noise).clip(5, 250).astype("uint8")
    )


def mask() -> Image.Image:
    """An odd region, white, that does not begin where a latent does."""
    white = np.zeros((SIZE["height"], SIZE["width"]), "uint8")
    white[3:12, 5:18] = 255
    return Image.fromarray(white)


@pytest.fixture
def at_the_mean(monkeypatch):
    """Keep diffusers from drawing the latents of an image, before the noise and from the same generator."""

    def patch(pipe):
        module = sys.modules[type(pipe).__module__]
        monkeypatch.setattr(module, "retrieve_latents", lambda posterior, **_: posterior.latent_dist.mode())
        return pipe

    return patch


@every_sampler
def test_text_to_image(name, loaded):
    theirs = small_models.stable_diffusion()
    theirs.scheduler = scheduler(name)
    ours = loaded(theirs)
    assert ours.config["solver"]["type"] == name
    expected = ask_theirs(theirs, **SIZE)
    assert distance(ask_ours(ours, **SIZE), expected) <= 1
    for change in ({"prompt": "two green cubes"}, {"negative": "tree"}, {"seed": SEED + 1}, {"cfg": 5}, {"steps": 9}):
        assert distance(ask_ours(ours, **SIZE, **change), expected) > 3, change


def test_samplers_differ(sd1):
    """So that none can stand for another above."""
    overrides = ["spacing.type=trailing", "spacing.end=zero"]
    images = [ask_ours(sd1, solver=name, overrides=overrides) for name in SCHEDULERS if name != "euler"]
    assert all(distance(a, b) > 3 for i, a in enumerate(images) for b in images[:i])


@every_sampler
@pytest.mark.parametrize("strength", [1.0, 0.45])
def test_image_to_image(name, strength, loaded, at_the_mean):
    theirs = at_the_mean(small_models.stable_diffusion("StableDiffusionImg2ImgPipeline"))
    theirs.scheduler = scheduler(name)
    ours = loaded(theirs)
    expected = ask_theirs(theirs, image=picture(), strength=strength)
    assert distance(ask_ours(ours, **SIZE, image=picture(), strength=strength), expected) <= 1
    assert distance(ask_ours(ours, **SIZE, image=picture(), strength=strength - 0.2), expected) > 3


def pasted(image: Image.Image) -> Image.Image:
    """What is not to be repainted, as it was: ours does so at the end, diffusers leaves it to its callers."""
    return Image.composite(image, picture(), mask())


@every_sampler
def test_inpainting_with_any_model(name, loaded, at_the_mean):
    theirs = at_the_mean(small_models.stable_diffusion("StableDiffusionInpaintPipeline"))
    theirs.scheduler = scheduler(name)
    ours = loaded(theirs)
    given = {"image": picture(), "strength": 0.8}
    expected = pasted(ask_theirs(theirs, **given, mask_image=mask(), **SIZE))
    assert distance(ask_ours(ours, **SIZE, **given, mask=mask()), expected) <= 1
    assert distance(pasted(ask_ours(ours, **SIZE, **given)), expected) > 3  # the known is told to the sampler


@every_sampler
def test_inpainting_with_its_own_model(name, loaded, at_the_mean):
    theirs = at_the_mean(small_models.stable_diffusion("StableDiffusionInpaintPipeline", in_channels=9))
    theirs.scheduler = scheduler(name)
    ours = loaded(theirs)
    expected = pasted(ask_theirs(theirs, image=picture(), mask_image=mask(), strength=1.0, **SIZE))
    assert distance(ask_ours(ours, **SIZE, image=picture(), mask=mask()), expected) <= 1


def test_editing(loaded, at_the_mean):
    """With an image guidance of 1, InstructPix2Pix is guided by its text alone."""
    theirs = at_the_mean(small_models.stable_diffusion("StableDiffusionInstructPix2PixPipeline", in_channels=8))
    expected = ask_theirs(theirs, image=picture(), image_guidance_scale=1.0)
    assert distance(ask_ours(loaded(theirs), **SIZE, condition=picture()), expected) <= 1


@pytest.mark.parametrize("kind", [small_models.stable_diffusion, small_models.stable_diffusion_2])
def test_single_files(kind, loaded, tmp_path):
    theirs = kind()
    ours = loaded(theirs)
    expected = ask_theirs(theirs, **SIZE)
    model = ours.loaded
    checkpoint.write_compvis(tmp_path / "compvis.safetensors", model.config, model.state)
    tokenizer = ours.conditioner.tokenizer.to_json()
    checkpoint.save(tmp_path / "ours.safetensors", model.config, model.state, tokenizer)
    assert distance(ask_ours(ours, **SIZE), expected) <= 1
    for name in ("compvis", "ours"):
        again = pipeline.load(tmp_path / f"{name}.safetensors", device="cpu")
        assert distance(ask_ours(again, **SIZE), ask_ours(ours, **SIZE)) == 0


@pytest.mark.parametrize("kind", [small_models.stable_diffusion, small_models.stable_diffusion_2])
def test_diffusers_reads_our_single_file(kind, loaded, tmp_path):
    theirs = kind()
    ours = loaded(theirs)
    checkpoint.write_compvis(tmp_path / "compvis.safetensors", ours.loaded.config, ours.loaded.state)
    again = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "compvis.safetensors"), config=str(tmp_path / "model"), local_files_only=True
    )
    assert distance(ask_ours(ours, **SIZE), ask_theirs(small_models.quiet(again), **SIZE)) <= 1


def test_stable_diffusion_2_with_v_prediction(loaded):
    theirs = small_models.stable_diffusion_2()
    ours = loaded(theirs)
    assert (ours.config["prediction"]["type"], ours.config["conditioner"]["type"]) == ("v", "open_clip")
    expected = ask_theirs(theirs, **SIZE)
    assert distance(ask_ours(ours, **SIZE), expected) <= 1
    assert distance(ask_ours(ours, **SIZE, overrides=["solver.eta=1"]), expected) > 3


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_dit(cfg, loaded):
    """With the deterministic sampler: their pipeline drops the variance that the network learned."""
    theirs = small_models.dit()
    ours = loaded(theirs)
    assert ours.config["prediction"]["type"] == "learned_range"
    g = torch.Generator().manual_seed(SEED)
    (expected,) = theirs([207], guidance_scale=cfg, num_inference_steps=STEPS, generator=g).images
    asked = {"seed": SEED, "steps": STEPS, "cfg": cfg}
    assert distance(ours(label=207, **asked)[0], expected) <= 1
    assert distance(ours(label=360, **asked)[0], expected) > 3


def test_a_live_pipeline_of_diffusers(loaded):
    """What was opened from a folder goes back into one, and makes the same picture there."""
    ours = loaded(small_models.stable_diffusion())
    theirs = ours.to_diffusers()
    theirs.set_progress_bar_config(disable=True)
    assert distance(ask_ours(ours, **SIZE), ask_theirs(theirs, **SIZE)) <= 1


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_key_that_only_ddim_reads(kind):
    """diffusers' from_config hands set_alpha_to_one on to classes that do not know it."""
    node = read_scheduler({"_class_name": kind, "set_alpha_to_one": False, "timestep_spacing": "leading"}, [])
    assert "end" not in node["spacing"]
    ddim = read_scheduler({"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1}, [])
    assert ddim["spacing"]["end"] == "table"


def test_another_first_stage(loaded, tmp_path):
    theirs = small_models.stable_diffusion()
    own = ask_theirs(theirs, **SIZE)
    small_models.autoencoder(5).save_pretrained(tmp_path / "vae")
    ours = loaded(theirs, vae=tmp_path / "vae")
    theirs.vae = small_models.autoencoder(5)
    assert distance(ask_ours(ours, **SIZE), ask_theirs(theirs, **SIZE)) <= 1
    assert distance(ask_ours(ours, **SIZE), own) > 3


def test_a_picture_is_the_same_in_every_batch(sd1):
    asked = {"negative": NEGATIVE, "steps": STEPS, "solver": "euler_ancestral", **SIZE}
    batch = sd1(PROMPT, n=3, seed=5, **asked)
    alone = [sd1(PROMPT, seed=5 + k, **asked)[0] for k in range(3)]
    assert all(distance(a, b) <= 1 for a, b in zip(batch, alone))
    assert all(distance(batch[k], batch[k - 1]) > 3 for k in range(3))


def test_order_and_seeds(sd1):
    prompts, asked = [PROMPT, "two green cubes"], {"steps": 3, "batch_size": 3}
    images = sd1(prompts, n=2, seed=5, **asked)
    expected = [sd1(prompts[k // 2], seed=5 + k, **asked)[0] for k in range(4)]
    assert len(images) == 4
    assert all(distance(a, b) <= 1 for a, b in zip(images, expected))


@pytest.mark.parametrize(("cfg", "cost"), [(1, 1), (7.5, 2)])
def test_guidance_of_one_costs_one_evaluation(cfg, cost, sd1):
    rows = []
    sd1.denoiser.backbone.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    sd1(PROMPT, n=2, steps=4, cfg=cfg)
    assert sum(rows) == cost * 2 * 4


def test_negative_prompts_count_only_under_guidance(sd1):
    assert distance(ask_ours(sd1), ask_ours(sd1, negative="tree")) > 3
    assert distance(ask_ours(sd1, cfg=1), ask_ours(sd1, cfg=1, negative="tree")) == 0


def test_defaults_are_the_model_s(sd1):
    assert ask_ours(sd1).size == (16, 16)  # 8 latents, a factor of 2
    assert distance(ask_ours(sd1, cfg=None), ask_ours(sd1, cfg=7.5)) == 0
    assert len(sd1.settings().sampler.grid.t) == 51


def test_previews(sd1):
    seen = []
    overrides = ["spacing.end=zero"]  # where the last step returns what the model believes
    image = ask_ours(sd1, overrides=overrides, on_step=lambda number, step: seen.append((number, step.prediction.x0)))
    assert [number for number, _ in seen] == list(range(STEPS))
    previews = [pictures.to_pil(sd1.decode(x0))[0] for _, x0 in seen]
    assert distance(previews[-1], image) <= 1
    assert distance(previews[0], image) > 3


def test_a_weight_that_is_not_finite_names_the_first_step(sd1):
    sd1.denoiser.backbone.out.weight.data[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"step 1 of 3, sigma 0\.\d+, t 667"):
        sd1(PROMPT, steps=3)


def test_numbers_that_run_away_name_the_step(sd1):
    calls = []

    def run_away(_, inputs, output):
        calls.append(output)
        return output * float("inf") if len(calls) == 2 else output

    sd1.denoiser.backbone.register_forward_hook(run_away)
    level = sd1.settings(steps=3).sampler.grid.rows()[1]
    with pytest.raises(DivergedError, match=f"step 2 of 3, sigma {level.sigma:.4g}, t {level.t:.4g}"):
        sd1(PROMPT, steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 17}, "height: not divisible.*17.*a multiple of 4.*16"),
        ({"width": 23}, "width: not divisible.*23.*a multiple of 4.*24"),
        ({"height": 0}, "height"),
        ({"height": -16}, "height"),
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"cfg": float("nan")}, "cfg"),
        ({"solver": "eular"}, "euler"),
        ({"image": picture(), "strength": 0.0}, "strength: out of range"),
        ({"image": picture(), "strength": 1.1}, "strength: out of range"),
        ({"image": picture(), "strength": 0.05}, "strength: too small for a single step"),
        ({"mask": mask()}, "mask"),
        ({"condition": picture()}, "condition: this model reads no picture"),
    ],
)
def test_wrong_settings_end_before_the_work(settings, message, sd1):
    rows = []
    sd1.denoiser.backbone.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with pytest.raises(InputError, match=message):
        sd1(PROMPT, **{"steps": STEPS} | settings)
    assert not rows


@pytest.mark.parametrize("missing", ["image", "mask"])
def test_inpainting_without_its_inputs(missing, loaded):
    pipe = loaded(small_models.stable_diffusion("StableDiffusionInpaintPipeline", in_channels=9))
    given = {"image": picture(), "mask": mask()}
    del given[missing]
    with pytest.raises(InputError, match=missing):
        pipe(PROMPT, steps=2, **SIZE, **given)


def test_a_class_is_needed_where_the_model_has_classes(loaded):
    pipe = loaded(small_models.dit())
    for label in (None, 1001, -1):
        with pytest.raises(InputError, match="label"):
            pipe(label=label, steps=2)
    with pytest.raises(InputError, match=r"height: not divisible.*18.*a multiple of 4"):  # of patches and latents
        pipe(label=0, steps=2, height=18)


def test_a_first_stage_alone(tmp_path):
    small_models.autoencoder().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="this file has only an autoencoder"):
        pipeline.load(tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed, sd1):
    with pytest.raises(InputError, match="seed"):
        sd1(PROMPT, seed=seed, steps=2)


def test_half_precision_is_near(sd1_folder, sd1):
    """The sampler's state stays in float32 beside networks in bfloat16, inpainting included."""
    half = pipeline.load(sd1_folder, device="cpu", precision="bf16")
    inpainting = {"image": picture(), "mask": mask()}
    for given in ({}, {"image": picture()}, inpainting):
        a, b = (np.asarray(ask_ours(pipe, **SIZE, **given)).astype(float) for pipe in (half, sd1))
        assert 0 < np.abs(a - b).mean() < 4
    image = ask_ours(half, **SIZE, **inpainting)
    assert distance(pasted(image), image) == 0  # also where a byte has more bits than bfloat16


def test_what_overflows_is_decoded_again(sd1_folder, monkeypatch):
    half = pipeline.load(sd1_folder, device="cpu", precision="bf16")
    decode, halved = half.autoencoder.decode, []

    def overflowing(z):
        halved.append(torch.is_autocast_enabled("cpu"))
        return decode(z) * (float("inf") if halved[-1] else 1)

    monkeypatch.setattr(half.autoencoder, "decode", overflowing)
    assert half.decode(torch.ones(1, 4, 8, 8)).isfinite().all()
    assert halved == [True, False]


def test_a_model_without_its_first_stage_asks_for_one(sd1, tmp_path):
    """Ours without the autoencoder's tensors, then with them from a file of their own."""
    whole, state = sd1.config.values, sd1.loaded.state
    checkpoint.write_compvis(tmp_path / "whole.safetensors", whole, state)
    tensors = load_file(tmp_path / "whole.safetensors")
    alone = {name: x for name, x in tensors.items() if name.startswith("first_stage_model.")}
    save_file({name: x for name, x in tensors.items() if name not in alone}, tmp_path / "model.safetensors")
    save_file({name.removeprefix("first_stage_model."): x for name, x in alone.items()}, tmp_path / "vae.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no autoencoder in this file.*got a backbone for 4 channels; try --vae PATH"
    ):
        pipeline.load(tmp_path / "model.safetensors", device="cpu")
    with_vae = pipeline.load(tmp_path / "model.safetensors", vae=tmp_path / "vae.safetensors", device="cpu")
    assert with_vae.autoencoder is not None
