"""The fields of a condition: nested ones, how they reach a backbone, and what they do there."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from ldm.condition import Condition, Vector
from ldm.diffusion import path, prediction
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.models.dit import DiT
from ldm.models.mlp import MLP
from ldm.models.unet import UNet
from tests.models.backbones import DIT, TINY
from tests.models.first_stages import fill

FLOW = path.Flow(), prediction.Flow()
LEVEL = path.Flow().level(torch.tensor([0.3, 0.7]))
X = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def condition(seed: int = 0, count: int = 2) -> Condition:
    """One with every field."""
    g = torch.Generator().manual_seed(seed)
    tokens, pooled = torch.randn(count, 3, 4, generator=g), torch.randn(count, 5, generator=g)
    vectors = {"sizes": torch.randn(count, 6, generator=g), "level": torch.randint(0, 9, (count,), generator=g)}
    control = [torch.randn(count, 2, side, side, generator=g) for side in (4, 2)]
    return Condition(
        tokens, torch.ones(count, 3).bool(), pooled, torch.randn(count, 1, 8, 8, generator=g), vectors, control
    )


def tensors(x: Condition) -> list[torch.Tensor]:
    return [x.tokens, x.mask, x.pooled, x.concat, x.vectors["sizes"], x.vectors["level"], *x.control]


def test_nested_fields_are_mapped_stacked_chosen_and_repeated():
    a, b = condition(0), condition(1)
    assert a.batch_size == 2
    assert Condition(control=[torch.zeros(3, 1)]).batch_size == 3
    assert all(torch.equal(x, y[:1]) for x, y in zip(tensors(a.map(lambda x: x[:1])), tensors(a)))
    for joined, x, y in zip(tensors(Condition.stack([a, b])), tensors(a), tensors(b)):
        assert torch.equal(joined, torch.cat([x, y]))
    flags = torch.tensor([True, False])
    for chosen, x, y in zip(tensors(Condition.choose(flags, a, b)), tensors(a), tensors(b)):
        assert torch.equal(chosen[0], x[0])
        assert torch.equal(chosen[1], y[1])
    for repeated, x in zip(tensors(condition(0, 1).repeat(3)), tensors(condition(0, 1))):
        assert torch.equal(repeated, torch.cat([x] * 3))
    assert [name for name, _ in Condition(pooled=a.pooled, vectors=a.vectors).items()] == ["pooled", "vectors"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vectors": None}, "condition.vectors: given for some of the batch and not for the rest"),
        ({"vectors": {"sizes": torch.zeros(2, 6)}}, "condition.vectors: given for some of the batch"),
        ({"control": [torch.zeros(2, 2, 4, 4)]}, "condition.control: given for some of the batch"),
        (
            {"vectors": {"sizes": torch.zeros(2, 5), "level": torch.zeros(2)}},
            r"condition.vectors.sizes: shapes differ; got \(2, 6\) and \(2, 5\)",
        ),
        (
            {"control": [torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 2, 3)]},
            r"condition.control.1: shapes differ; got \(2, 2, 2, 2\) and \(2, 2, 2, 3\)",
        ),
    ],
)
def test_conditions_that_cannot_be_joined_are_refused(other, message):
    fields = dict(condition().items())
    with pytest.raises(ValueError, match=message):
        Condition.stack([condition(), Condition(**{**fields, **other})])


def unet(**options) -> UNet:
    """A small U-Net with text, and vectors."""
    return fill(UNet(**{**TINY, "heads": 4, "context": 12, **options})).eval()


def control_of(network: UNet, scale: float) -> list[torch.Tensor]:
    """Residuals for a U-Net's skips and its middle."""
    shapes = [(2, row.out_channels, side, side) for row, side in zip(network.plan, (16, 16, 8, 8))] + [(2, 64, 8, 8)]
    return [scale * torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_control_of_zeros_is_no_control_and_gradients_flow_through_it(name):
    network = unet() if name == "unet" else fill(DiT(**{**DIT, "classes": None, "context": 12})).eval()
    x = X if name == "unet" else X[:, :, :8, :8]
    shapes = [(2, 16, 48)] * len(network.blocks) if name == "dit" else [r.shape for r in control_of(network, 1.0)]
    tokens = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    without = network(x, LEVEL.t, tokens=tokens)
    zeros = [torch.zeros(shape) for shape in shapes]
    assert torch.equal(network(x, LEVEL.t, tokens=tokens, control=zeros), without)
    control = [torch.full(shape, 0.1, requires_grad=True) for shape in shapes]
    changed = network(x, LEVEL.t, tokens=tokens, control=control)
    assert not torch.equal(changed, without)
    changed.square().sum().backward()
    assert all(residual.grad.abs().sum() > 0 for residual in control)


def test_a_denoiser_hands_every_field_to_its_backbone():
    vectors = {"sizes": Vector("numbers", 6), "level": Vector("index", 9)}
    network = unet(pooled=5, vectors=vectors, extra_channels=2)
    denoiser = Denoiser(network, *FLOW)
    full = Condition(
        tokens=torch.randn(2, 5, 12),
        mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        pooled=torch.randn(2, 5),
        concat=torch.randn(2, 2, 16, 16),
        vectors={"sizes": torch.rand(2, 6) * 1000, "level": torch.tensor([3, 8])},
        control=control_of(network, 0.1),
    )
    fields = {name: value for name, value in full.items() if name != "concat"}
    expected = network(torch.cat([X, full.concat], 1), LEVEL.t, **fields)
    assert torch.equal(denoiser.output(X, LEVEL, full), expected)
    for name in ("mask", "control"):
        other = Condition(**{key: value for key, value in full.items() if key != name})
        assert not torch.equal(denoiser.output(X, LEVEL, other), expected)
    moved = full.map(lambda x: x + 1 if x.dtype == torch.long else x)
    with pytest.raises(IndexError):
        denoiser.output(X, LEVEL, moved)


def test_guidance_in_one_batch_is_guidance_in_two_with_nested_fields():
    network = unet(pooled=5, vectors={"sizes": Vector("numbers", 6)})
    denoiser, row = Denoiser(network, *FLOW), LEVEL.rows()[0]
    both = [
        Condition(
            tokens=torch.randn(2, 5, 12, generator=g),
            pooled=torch.randn(2, 5, generator=g),
            vectors={"sizes": torch.rand(2, 6, generator=g)},
            control=control_of(network, scale),
        )
        for scale, g in ((0.1, torch.Generator().manual_seed(3)), (0.2, torch.Generator().manual_seed(4)))
    ]
    one, two = (Guidance(cfg=3.0, batched=batched)(denoiser, both[1])(X, row, both[0]) for batched in (True, False))
    torch.testing.assert_close(one.x0, two.x0, rtol=1e-4, atol=1e-4)


def test_a_backbone_that_does_not_take_a_field_is_refused():
    denoiser = Denoiser(MLP(in_channels=2), *FLOW)
    message = "type: this backbone takes no {}; got MLP; expected {}= in its forward"
    for name in ("tokens", "pooled", "vectors", "control"):
        with pytest.raises(ValueError, match=message.format(name, name)):
            denoiser.check([name])
    with pytest.raises(ValueError, match=message.format("control", "control")):
        denoiser(torch.randn(2, 2), LEVEL, Condition(control=[torch.zeros(2, 2)]))


@torch.no_grad()
def test_pooled_text_and_sizes_are_embedded_as_in_diffusers_sdxl():
    ours = unet(pooled=5, vectors={"sizes": Vector("numbers", 6)})
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=5 + 6 * 256,
    )
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        getattr(theirs.add_embedding, layer).load_state_dict(ours.time.pooled[number].state_dict())
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        getattr(theirs.time_embedding, layer).load_state_dict(ours.time.time[number].state_dict())
    t, pooled, sizes = torch.tensor([10, 600]), torch.randn(2, 5), torch.tensor([[1024, 768, 0, 16, 1024, 1024.0]] * 2)
    emb = theirs.time_embedding(theirs.time_proj(t))
    emb = emb + theirs.get_aug_embed(emb, torch.zeros(2, 1, 12), {"text_embeds": pooled, "time_ids": sizes})
    torch.testing.assert_close(ours.time(t, pooled, {"sizes": sizes}), emb, rtol=1e-4, atol=1e-4)
