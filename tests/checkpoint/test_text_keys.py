"""Text key maps: transformers', open_clip's and LDM's encoders with our weights say what ours says."""

import open_clip
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.checkpoint.text_keys import find_text, read_text, write_text
from ldm.errors import CheckpointError
from ldm.models.transformer import TextTransformer
from tests.conditioning.x_transformer import x_transformer
from tests.models.first_stages import fill

SMALL = {"vocabulary": 50, "length": 9, "width": 32, "layers": 3, "heads": 4}
LDM = {**SMALL, "head_width": 6, "bias": False, "causal": False}
IDS = torch.tensor([[48, 5, 6, 7, 49, 49, 49, 49, 49], [48, 9, 8, 7, 6, 5, 4, 3, 49]])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def clip_of(ours: TextTransformer, kind: type) -> torch.nn.Module:
    """transformers' CLIP with our weights, loaded strictly."""
    numbers = {"vocab_size": 50, "max_position_embeddings": 9, "hidden_size": 32, "intermediate_size": 128}
    numbers |= {"num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 24, "hidden_act": "quick_gelu"}
    theirs = kind(CLIPTextConfig(**numbers, bos_token_id=48, eos_token_id=49)).eval()
    state = write_text(ours.state_dict(), ours, "clip")
    if "embeddings.token_embedding.weight" in theirs.state_dict():  # newer versions leave the prefix out
        state = {name.removeprefix("text_model."): x for name, x in state.items()}
    theirs.load_state_dict(state)
    return theirs


@torch.no_grad()
def test_clip_is_that_of_transformers():
    ours = fill(TextTransformer(**SMALL, activation="quick_gelu"))
    theirs = clip_of(ours, CLIPTextModel)(IDS)
    states, pooled = ours(IDS)
    torch.testing.assert_close(states, theirs.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, theirs.pooler_output, atol=1e-5, rtol=1e-4)
    ours = fill(TextTransformer(**SMALL, activation="quick_gelu", projection=24))
    theirs = clip_of(ours, CLIPTextModelWithProjection)(IDS)
    torch.testing.assert_close(ours(IDS)[1], theirs.text_embeds, atol=1e-5, rtol=1e-4)


def open_clip_of(ours: TextTransformer) -> torch.nn.Module:
    """open_clip's text tower with our weights, loaded strictly."""
    theirs = open_clip.transformer.TextTransformer(
        context_length=9, vocab_size=50, width=32, heads=4, layers=3, output_dim=24
    ).eval()
    theirs.load_state_dict(write_text(ours.state_dict(), ours, "open_clip"))
    return theirs


@torch.no_grad()
def test_open_clip_is_that_of_open_clip():
    ours = fill(TextTransformer(**SMALL, layer="penultimate", projection=24))
    theirs, inside = open_clip_of(ours), []
    theirs.transformer.resblocks[-2].register_forward_hook(lambda module, inputs, output: inside.append(output))
    pooled = theirs(IDS)
    states, ours_pooled = ours(IDS)
    torch.testing.assert_close(states, theirs.ln_final(inside[0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours_pooled, pooled, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_tower_that_stops_before_the_last_block_reads_a_whole_one():
    whole = fill(TextTransformer(**SMALL, layer="penultimate", projection=24))
    state = {**open_clip_of(whole).state_dict(), "logit_scale": torch.tensor(1.0), "attn_mask": torch.zeros(9, 9)}
    short = TextTransformer(**{**SMALL, "layers": 2})
    short.load_state_dict(read_text(state, short, "open_clip"))
    assert torch.equal(short(IDS)[0], whole(IDS)[0])
    shorter = TextTransformer(**{**SMALL, "layers": 1})
    with pytest.raises(CheckpointError, match=r"unexpected tensors; got 12: transformer\.resblocks\.2\."):
        read_text(state, shorter, "open_clip")
    for prefix in ("text_model.", ""):  # and by transformers' names, which hubs hold beside open_clip's
        theirs = {
            name.replace("text_model.", prefix): x for name, x in write_text(whole.state_dict(), whole, "clip").items()
        }
        short.load_state_dict(read_text(theirs, short, "clip"))
        assert torch.equal(short(IDS)[0], whole(IDS)[0])
    clip = TextTransformer(**{**SMALL, "layers": 2, "activation": "quick_gelu"})
    with pytest.raises(CheckpointError, match=r"unexpected tensors; got 1[67]: "):  # which reads its last block
        read_text(theirs, clip, "clip")


@torch.no_grad()
def test_ldm_is_an_x_transformer():
    ours = fill(TextTransformer(**LDM))
    state = write_text(ours.state_dict(), ours, "ldm")
    torch.testing.assert_close(ours(IDS)[0], x_transformer(state, IDS, 3, 4), atol=1e-5, rtol=1e-4)


def test_the_published_text_to_image_encoder_has_its_size_and_names():
    with torch.device("meta"):
        numbers = {"width": 1280, "layers": 32, "heads": 8, "head_width": 64, "vocabulary": 30522}
        encoder = TextTransformer(**numbers, bias=False, causal=False)
    state = write_text(encoder.state_dict(), encoder, "ldm")
    # 32 layers of 1280 x (3 * 512 + 512 + 2 * 5120) weights and 1280 + 5120 + 1280 + 4 * 1280 biases and norms
    expected = 32 * (1280 * (4 * 512 + 2 * 5120) + 6 * 1280 + 5120) + (30522 + 77 + 2) * 1280
    assert sum(x.numel() for x in state.values()) == expected
    assert state["transformer.attn_layers.layers.0.1.to_q.weight"].shape == (512, 1280)
    assert state["transformer.attn_layers.layers.63.1.net.2.bias"].shape == (1280,)


@pytest.mark.parametrize("layout", ["clip", "open_clip", "ldm"])
@pytest.mark.parametrize(
    "prefix", ["", "cond_stage_model.", "cond_stage_model.model.", "cond_stage_model.transformer."]
)
def test_every_layout_returns_what_it_was_given_wherever_it_is(layout, prefix):
    ours = fill(TextTransformer(**(LDM if layout == "ldm" else {**SMALL, "projection": 24})))
    theirs = write_text(ours.state_dict(), ours, layout)
    assert set(theirs) != set(ours.state_dict())
    others = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    found, state = find_text({f"{prefix}{name}": x for name, x in theirs.items()} | others)
    assert found == layout
    assert same(read_text(state, ours, layout), ours.state_dict())


def test_clip_is_read_with_and_without_its_prefix_and_beside_an_image_tower():
    ours = fill(TextTransformer(**SMALL, projection=24))
    theirs = write_text(ours.state_dict(), ours, "clip")
    extra = {"text_model.embeddings.position_ids": torch.arange(9), "logit_scale": torch.tensor(1.0)}
    extra["vision_model.embeddings.class_embedding"] = extra["visual_projection.weight"] = torch.zeros(3)
    for state in ({**theirs, **extra}, {name.removeprefix("text_model."): x for name, x in theirs.items()}):
        layout, found = find_text(state)
        assert same(read_text(found, ours, layout), ours.state_dict())


def test_single_files_are_those_that_diffusers_reads():
    ours = fill(TextTransformer(**SMALL, activation="quick_gelu"))
    theirs = write_text(ours.state_dict(), ours, "clip")
    file = {f"cond_stage_model.transformer.{name}": x for name, x in theirs.items()}
    assert same(dict(convert_ldm_clip_checkpoint(file)), theirs)

    tower = fill(TextTransformer(**SMALL))
    file = {f"cond_stage_model.model.{k}": x for k, x in write_text(tower.state_dict(), tower, "open_clip").items()}
    theirs = write_text(tower.state_dict(), tower, "clip")
    model = clip_of(tower, CLIPTextModel)
    converted = convert_open_clip_checkpoint(model, file, prefix="cond_stage_model.model.")
    converted.pop("text_model.embeddings.position_ids", None)
    assert same(converted, theirs)


def test_what_has_no_layout_or_no_encoder_is_refused():
    with pytest.raises(CheckpointError) as error:
        write_text({}, TextTransformer(**SMALL), "ldm")
    expected = "no ldm layout for this text encoder; got queries with bias; expected without"
    assert str(error.value) == expected
    with pytest.raises(CheckpointError) as error:
        find_text({"encoder.conv_in.weight": torch.zeros(1)})
    expected = "no text encoder inside; got encoder.conv_in.weight; expected CLIP's, open_clip's or LDM's names"
    assert str(error.value) == expected
    ours = TextTransformer(**SMALL)
    state = write_text(ours.state_dict(), ours, "clip")
    del state["text_model.final_layer_norm.bias"]
    with pytest.raises(CheckpointError, match=r"missing tensors; got 1: text_model\.final_layer_norm\.bias;"):
        read_text(state, ours, "clip")
