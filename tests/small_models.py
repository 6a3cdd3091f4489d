"""Small random pipelines of diffusers, one of each kind that we open; each is made once."""

from functools import cache

import diffusers
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.models.dit import DiT
from tests.models.backbones import diffusers_dit
from tests.models.first_stages import fill

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# clipping suits images in [-1, 1] alone, and Stable Diffusion's sampler ended at its table's first level
STABLE = NOISE | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@cache
def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """transformers' CLIP tokenizer, from the vocabulary in open_clip's wheel."""
    known = SimpleTokenizer()
    vocabulary = dict(known.encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    return CLIPTokenizer(vocab=vocabulary, merges=list(known.bpe_ranks), model_max_length=77, pad_token=pad)


@cache
def text_encoder(**options) -> CLIPTextModel:
    """CLIP's, with its vocabulary and its length."""
    numbers = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    numbers |= {"hidden_act": "quick_gelu", "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return fill(CLIPTextModel(CLIPTextConfig(vocab_size=49408, **numbers | options)), 1).eval()


@cache
def unet(**options) -> UNet2DConditionModel:
    """Two levels, the upper with attention."""
    numbers = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    return fill(UNet2DConditionModel(**numbers | options), 2).eval()


@cache
def autoencoder(seed: int = 3) -> AutoencoderKL:
    """A factor of 2."""
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    numbers = {"block_out_channels": (32, 64), "down_block_types": down, "up_block_types": up}
    return fill(AutoencoderKL(**numbers, latent_channels=4), seed).eval()


def stable_diffusion(kind: str = "StableDiffusionPipeline", in_channels: int = 4):
    """Stable Diffusion 1, or one of its relatives."""
    scheduler = diffusers.DDIMScheduler(**STABLE)
    parts = {"unet": unet(in_channels=in_channels), "vae": autoencoder(), "text_encoder": text_encoder()}
    return quiet(getattr(diffusers, kind)(**parts, tokenizer=tokenizer(), scheduler=scheduler, **NO_CHECKER))


def stable_diffusion_2():
    """Stable Diffusion 2 of 768 pixels: v-prediction, OpenCLIP without its last layer, heads of one width."""
    text = text_encoder(num_hidden_layers=3, hidden_act="gelu", pad_token_id=0)
    scheduler = diffusers.DDIMScheduler(**STABLE, prediction_type="v_prediction")
    parts = {"unet": unet(attention_head_dim=(2, 4), use_linear_projection=True), "vae": autoencoder()}
    pipe = diffusers.StableDiffusionPipeline(
        **parts, text_encoder=text, tokenizer=tokenizer("!"), scheduler=scheduler, **NO_CHECKER
    )
    return quiet(pipe)


def dit():
    """DiT, whose pipeline takes row 1000 for no class."""
    ours = fill(DiT(width=48, depth=2, heads=4, classes=1001), 4)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)  # as published: from step 0 to the data
    return quiet(diffusers.DiTPipeline(transformer=diffusers_dit(ours, 8), vae=autoencoder(), scheduler=scheduler))


def quiet(pipe):
    """Without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
