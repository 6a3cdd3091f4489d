"""The text transformer against transformers' CLIP, and the pooling of ADM's classifier against its formula."""

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm.checkpoint.unet_keys import attention_modules
from ldm.models.transformer import GEGLU, AttentionPool, SpatialTransformer, TextTransformer
from ldm.models.unet import UNet
from tests.models.backbones import TINY, difference
from tests.models.first_stages import fill

SMALL = {"vocabulary": 50, "length": 9, "width": 32, "layers": 3, "heads": 4, "projection": 24}
IDS = torch.tensor([[48, 5, 6, 7, 49, 49, 49, 49, 49], [48, 9, 8, 7, 6, 5, 4, 3, 49]])  # 49 ends a text and fills it up
IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
}


def clip(ours: TextTransformer, activation: str) -> CLIPTextModelWithProjection:
    """transformers' CLIP of the same shape and weights."""
    config = CLIPTextConfig(
        vocab_size=50,
        max_position_embeddings=9,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=24,
        hidden_act=activation,
        eos_token_id=49,
        bos_token_id=48,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    modules = {"tokens": "embeddings.token_embedding", "norm": "final_layer_norm", "projection": "text_projection"}
    for number in range(3):
        modules |= {f"blocks.{number}.{a}": f"encoder.layers.{number}.{b}" for a, b in IN_BLOCK.items()}
    names = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in modules.items() for leaf in ("weight", "bias")}
    names["positions"] = "embeddings.position_embedding.weight"
    prefixed = {name.removeprefix("text_model."): name for name in theirs.state_dict()}
    theirs.load_state_dict({prefixed[names[name]]: value for name, value in ours.state_dict().items()})
    return theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", ["last", "penultimate"])
@torch.no_grad()
def test_states_and_pooled_vector_are_those_of_clip(activation, layer):
    ours = fill(TextTransformer(**SMALL, activation=activation, layer=layer))
    model = clip(ours, activation)
    theirs = model(IDS, output_hidden_states=True)
    states, pooled = ours(IDS)
    expected = theirs.last_hidden_state if layer == "last" else ours.norm(theirs.hidden_states[-2])
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, theirs.text_embeds, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_causal_encoder_does_not_look_ahead_and_the_other_kind_does():
    changed = IDS.clone()
    changed[:, 5] = 1
    for causal in (True, False):
        encoder = fill(TextTransformer(**SMALL, causal=causal))
        before, after = encoder(IDS)[0][:, :5], encoder(changed)[0][:, :5]
        assert torch.equal(before, after) is causal


@torch.no_grad()
def test_masked_tokens_are_not_read():
    encoder, changed = fill(TextTransformer(**SMALL, causal=False)), IDS.clone()
    changed[0, 5:] = 1
    mask = torch.tensor([[True] * 5 + [False] * 4, [True] * 9])
    assert torch.equal(encoder(IDS, mask)[0][0, :5], encoder(changed, mask)[0][0, :5])
    assert not torch.allclose(encoder(IDS)[0][0, :5], encoder(changed)[0][0, :5])


def test_the_published_text_encoders_have_their_sizes():
    with torch.device("meta"):
        clip_l = TextTransformer(activation="quick_gelu")
        open_clip_h = TextTransformer(width=1024, layers=24, heads=16, layer="penultimate", projection=1024)
    assert sum(p.numel() for p in clip_l.parameters()) == 123_060_480
    assert sum(p.numel() for p in open_clip_h.parameters()) == 354_032_640


@torch.no_grad()
def test_export_finds_no_graph_break():
    encoder = fill(TextTransformer(**SMALL))
    program = torch.export.export(encoder, (IDS,), strict=True)
    torch.testing.assert_close(program.module()(IDS), encoder(IDS))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_faint_maps_are_normalised_as_in_diffusers_and_keep_their_layout(linear, layout):
    ours = fill(SpatialTransformer(64, heads=4, context=12, linear=linear))
    theirs = Transformer2DModel(4, 16, in_channels=64, cross_attention_dim=12, use_linear_projection=linear)
    unet = UNet(**{**TINY, "heads": 4, "context": 12, "linear": linear})
    names = dict(attention_modules(unet, unet.plan[3], "", "diffusers"))
    theirs.load_state_dict(
        {
            names[f"encoder.3.attend.{module}"].removeprefix(".") + f".{leaf}": value
            for module, leaf, value in ((*name.rsplit(".", 1), value) for name, value in ours.state_dict().items())
        }
    )
    x = (0.003 * torch.randn(2, 64, 4, 4)).to(memory_format=layout)  # a variance at which the norm's eps decides
    tokens = torch.randn(2, 5, 12)
    out = ours(x, tokens)
    assert out.is_contiguous(memory_format=layout)
    assert difference(out, theirs(x, encoder_hidden_states=tokens).sample) < 1e-4


@torch.no_grad()
def test_geglu_gates_its_first_half_by_its_second():
    layer, x = fill(GEGLU(8)), torch.randn(2, 3, 8)
    hidden, gate = layer.proj(x)[..., :32], layer.proj(x)[..., 32:]
    torch.testing.assert_close(layer(x), layer.out(hidden * gate * (1 + torch.erf(gate / 2**0.5)) / 2))


@torch.no_grad()
def test_attention_pool_is_the_row_of_the_mean():
    pool, x = fill(AttentionPool(8, heads=2, size=3, out=5)), torch.randn(2, 8, 3, 3)
    tokens = torch.cat((x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2)), 1) + pool.positions
    outs = []
    for q, k, v in zip(*(layer(tokens).chunk(2, -1) for layer in (pool.q, pool.k, pool.v))):
        outs.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    torch.testing.assert_close(pool(x), pool.out(torch.cat(outs, -1))[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation: unknown; got relu; expected quick_gelu or gelu; try gelu"),
        ({"layer": "first"}, "layer: unknown; got first; expected last or penultimate; try last"),
        (
            {"layer": "penultimate", "layers": 1},
            "layers: too few for layer=penultimate; got 1; expected 2 or more; try 2",
        ),
        ({"heads": 5}, "width: cannot be split into 5 heads; got 32; expected a multiple of 5; try 30"),
        ({"projection": -1}, "projection: too small; got -1; expected 1 or more; try 1"),
    ],
)
def test_impossible_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=":") as error:
        TextTransformer(**{**SMALL, **changes})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (
            torch.zeros(2, 10).long(),
            None,
            "ids: longer than the position table; got 10 tokens; expected at most 9; try 9",
        ),
    ],
)
def test_impossible_ids_are_refused(ids, mask, message):
    with pytest.raises(ValueError, match=":") as error:
        TextTransformer(**SMALL)(ids, mask)
    assert str(error.value) == message
