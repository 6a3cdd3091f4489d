"""The key maps against diffusers' own names and reader of CompVis files, and in both directions."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from ldm.checkpoint.families.dit import dit_keys
from ldm.checkpoint.unet_keys import unet_keys
from ldm.errors import CheckpointError
from ldm.models.dit import DiT
from ldm.models.unet import UNet
from tests.models.backbones import ADM, DIT, LDM4, SD1, SD2, TINY, diffusers_dit, diffusers_unet
from tests.models.first_stages import fill

CLASSIFIER = {**ADM, "classes": None, "logits": 5, "size": 16}
POOLED = {**TINY, "heads": 4, "context": 12, "pooled": 6}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        *((options, layout) for options in (SD1, SD2, LDM4, ADM, POOLED) for layout in ("diffusers", "compvis")),
        (CLASSIFIER, "compvis"),
    ],
)
def test_every_layout_returns_what_it_was_given(options, layout):
    unet = fill(UNet(**options))
    theirs = unet_keys(unet, layout).write(unet.state_dict())
    assert same(unet_keys(unet, layout).read(theirs, unet), unet.state_dict())
    assert set(theirs) != set(unet.state_dict())


@pytest.mark.parametrize("options", [SD1, SD2, LDM4])
def test_compvis_names_are_those_that_diffusers_reads(options):
    unet = fill(UNet(**options))
    file = {f"model.diffusion_model.{k}": v for k, v in unet_keys(unet, "compvis").write(unet.state_dict()).items()}
    config = diffusers_unet(unet).config
    assert same(convert_ldm_unet_checkpoint(file, config), unet_keys(unet, "diffusers").write(unet.state_dict()))


def test_the_real_names_at_the_ends_of_stable_diffusion():
    with torch.device("meta"):
        unet = UNet(context=768, heads=8)
    theirs = unet_keys(unet, "compvis").write(unet.state_dict())
    assert len(theirs) == 686
    expected = {
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "time_embed.2.bias": (1280,),
        "out.2.weight": (4, 320, 3, 3),
    }
    assert {name: tuple(theirs[name].shape) for name in expected} == expected


def test_dit_files_keep_q_k_v_in_one_matrix():
    dit = fill(DiT(**DIT))
    theirs = dit_keys(dit, "dit").write(dit.state_dict())
    q, k, v = theirs["blocks.1.attn.qkv.weight"].view(3, 48, 48)
    attention = dit.blocks[1].attention
    assert all(torch.equal(a, b.weight) for a, b in zip((q, k, v), (attention.q, attention.k, attention.v)))
    assert {name.split(".")[0] for name in theirs} == {
        *("x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
    }
    assert same(dit_keys(dit, "dit").read(theirs, dit), dit.state_dict())


@torch.no_grad()
def test_adm_interleaves_its_heads():
    unet = fill(UNet(**ADM))
    theirs = unet_keys(unet, "compvis").write(unet.state_dict())
    x = torch.randn(1, 64, 9)
    fused = torch.nn.functional.conv1d(x, theirs["middle_block.1.qkv.weight"], theirs["middle_block.1.qkv.bias"])
    heads = fused.reshape(4, 3 * 16, 9)  # ADM's first step: heads join the batch, then q, k, v are split
    attention = unet.middle[0].attend.attention
    for part, layer in zip(heads.split(16, 1), (attention.q, attention.k, attention.v)):
        torch.testing.assert_close(part.reshape(1, 64, 9), layer(x.transpose(1, 2)).transpose(1, 2))


def test_dit_returns_and_refuses_copies_that_differ():
    dit = fill(DiT(**DIT))
    theirs = diffusers_dit(dit, 8).state_dict()
    assert same(dit_keys(dit, "diffusers").read(theirs, dit), dit.state_dict())
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    theirs[key] = theirs[key] + 1
    with pytest.raises(CheckpointError) as error:
        dit_keys(dit, "diffusers").read(theirs, dit)
    assert str(error.value) == f"copies of time.time.0.weight differ; got other numbers in {key}; expected equal copies"


def test_missing_and_unknown_tensors_are_counted_and_named():
    unet = fill(UNet(**{**TINY, "heads": 4, "context": 12}))
    theirs = unet_keys(unet, "compvis").write(unet.state_dict())
    del theirs["out.2.bias"]
    with pytest.raises(CheckpointError, match=r"missing tensors; got 1: out\.2\.bias;"):
        unet_keys(unet, "compvis").read(theirs, unet)
    theirs |= {"out.2.bias": torch.zeros(4), **{f"model_ema.{i}": torch.zeros(1) for i in range(7)}}
    with pytest.raises(CheckpointError, match=r"got 7: model_ema\.0, .*model_ema\.4, \.\.\.;"):
        unet_keys(unet, "compvis").read(theirs, unet)


@pytest.mark.parametrize(
    ("keys", "network", "layout", "message"),
    [
        (
            unet_keys,
            lambda: UNet(**CLASSIFIER),
            "diffusers",
            "no diffusers layout for a noisy classifier; got diffusers; expected compvis; try compvis",
        ),
        (
            dit_keys,
            lambda: DiT(**DIT),
            "compvis",
            "no compvis layout for a DiT; got compvis; expected diffusers or dit; try diffusers",
        ),
    ],
)
def test_layouts_that_do_not_exist_are_refused(keys, network, layout, message):
    with pytest.raises(CheckpointError) as error:
        keys(network(), layout)
    assert str(error.value) == message
