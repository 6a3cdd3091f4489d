"""Single files that we write, read by diffusers' own converters into the tensors of the folder that we write."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from transformers import CLIPTextModel

from ldm import checkpoint
from tests.checkpoint.made_up import make
from tests.checkpoint.test_diffusers import TOKENIZER


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["sd1", "sd1_inpainting", "sd1_edit", "sd2", "sd2_v"])
def test_diffusers_converters_read_our_single_files(name, tmp_path):
    checkpoint.write_compvis(tmp_path / "x.safetensors", *make(name))
    checkpoint.write_diffusers(tmp_path / "folder", *make(name), TOKENIZER)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet", local_files_only=True)
    vae = AutoencoderKL.from_pretrained(tmp_path / "folder" / "vae", local_files_only=True)
    text = CLIPTextModel.from_pretrained(tmp_path / "folder" / "text_encoder", local_files_only=True)
    file = load_file(tmp_path / "x.safetensors")
    assert same(convert_ldm_unet_checkpoint(dict(file), unet.config), unet.state_dict())
    assert same(convert_ldm_vae_checkpoint(dict(file), vae.config), vae.state_dict())
    if name.startswith("sd2"):
        converted = convert_open_clip_checkpoint(text, dict(file))
        unread = [key for key in converted if ".layers.2." in key]  # it knows the published 23rd block by number
        assert len(unread) == 16
        converted = {key: x for key, x in converted.items() if key not in unread}
    else:
        converted = convert_ldm_clip_checkpoint(dict(file))
    assert all(key.startswith("text_model.") for key in converted)
    assert same({key.removeprefix("text_model."): x for key, x in converted.items()}, text.state_dict())


def test_stable_diffusion_2_has_its_24_blocks_in_a_file(tmp_path):
    config, state = make("sd2")
    checkpoint.write_compvis(tmp_path / "x.safetensors", config, state)
    file = load_file(tmp_path / "x.safetensors")
    blocks = {key.split(".")[4] for key in file if ".resblocks." in key}
    assert len(blocks) == config["conditioner"]["layers"]
    assert not any(x.any() for key, x in file.items() if ".resblocks.2." in key)
