"""Every kind of condition: it matters, it is dropped by sample and by part, and what is frozen stays so."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from ldm.condition import Condition
from ldm.conditioning.compose import Compose
from ldm.conditioning.label import Label
from ldm.conditioning.spatial import Edit, MaskedImage, Segmentation
from ldm.conditioning.text import clip
from tests.conditioning.conditions import (
    BOXES,
    KINDS,
    MASKED,
    OTHER_TEXTS,
    SEGMENTS,
    TEXTS,
    backbone,
    first_stage,
    images,
    masked,
    output,
    small_joint,
    small_t5,
    upscaler,
)
from tests.models.first_stages import fill

ALL, NONE, FIRST = torch.tensor([True, True]), torch.tensor([False, False]), torch.tensor([True, False])


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def flat(condition: Condition) -> dict[str, torch.Tensor]:
    """The tensors of a condition by name."""
    found = dict(condition.items())
    return {**found.pop("vectors", {}), **found}


def same(a: Condition, b: Condition, rows=slice(None)) -> bool:
    """Whether two conditions have the same fields with the same numbers, in these rows."""
    left, right = flat(a), flat(b)
    assert left
    return left.keys() == right.keys() and all(torch.equal(x[rows], right[name][rows]) for name, x in left.items())


def everything(conditioner, flags) -> dict[str, torch.Tensor]:
    return dict.fromkeys(conditioner.parts, flags)


def test_it_changes_what_the_network_says(kind):
    conditioner = kind.make()
    unet = backbone(conditioner)
    here, there = (output(unet, conditioner(batch)) for batch in (kind.batch, kind.other))
    assert torch.equal(here, output(unet, conditioner(kind.batch)))
    assert (here - there).abs().flatten(1).amax(1).min() > 1e-4


def test_what_is_dropped_is_its_null(kind):
    conditioner = kind.make()
    dropped = conditioner(kind.batch, everything(conditioner, ALL))
    assert same(dropped, conditioner.null(2, (4, 4)))
    assert same(conditioner(kind.batch, everything(conditioner, NONE)), conditioner(kind.batch))
    unet = backbone(conditioner)
    nothing = output(unet, conditioner.null(2, (4, 4)))
    assert torch.equal(output(unet, dropped), nothing)
    assert torch.equal(output(unet, conditioner(kind.other, everything(conditioner, ALL))), nothing)
    assert (output(unet, conditioner(kind.batch)) - nothing).abs().max() > 1e-4


def test_samples_are_dropped_one_by_one(kind):
    conditioner = kind.make()
    mixed = conditioner(kind.batch, everything(conditioner, FIRST))
    assert same(mixed, conditioner.null(2, (4, 4)), rows=slice(0, 1))
    assert same(mixed, conditioner(kind.batch), rows=slice(1, 2))
    assert not same(mixed, conditioner(kind.batch), rows=slice(0, 1))


def test_it_says_what_it_gives(kind):
    conditioner = kind.make()
    condition = conditioner(kind.batch)
    assert conditioner.context == (None if condition.tokens is None else condition.tokens.shape[-1])
    vectors = condition.pooled is not None and condition.pooled.is_floating_point()
    assert conditioner.pooled == (condition.pooled.shape[-1] if vectors else None)
    assert (conditioner.classes is not None) == (condition.pooled is not None and not vectors)
    assert conditioner.concat_channels == (0 if condition.concat is None else condition.concat.shape[1])
    assert set(conditioner.reads) <= set(kind.batch)
    assert conditioner.vectors.keys() == (condition.vectors or {}).keys()
    back = kind.make()
    back.load_state_dict(conditioner.state_dict())


@pytest.mark.parametrize("name", ["clip", "clip_pooled", "joint_text", "joint_pooled", "label_token", "layout"])
def test_it_answers_on_the_device_where_it_lives(name):
    kind = KINDS[name]
    conditioner = kind.make().to("meta")
    for condition in (conditioner(kind.batch, everything(conditioner, FIRST)), conditioner.null(2)):
        assert {value.device.type for value in flat(condition).values()} == {"meta"}


# ---------------------------------------------------------------------------------------------------- composition


def composed() -> Compose:
    """Text, labels and a masked image."""
    kind = KINDS["compose_tokens"]
    return kind.make()


def test_each_part_is_dropped_by_itself():
    both, batch = composed(), KINDS["compose_tokens"].batch
    assert list(both.parts) == ["caption", "label", "masked_image"]
    text, label, image = both.members
    drop = {"caption": FIRST, "label": torch.tensor([False, True])}
    condition = both(batch, drop)
    expected = torch.cat((text(batch, {"caption": FIRST}).tokens, label(batch, {"label": drop["label"]}).tokens), 1)
    assert torch.equal(condition.tokens, expected)
    assert torch.equal(condition.tokens[0, :16], text.null(1).tokens[0])
    assert torch.equal(condition.tokens[1, 16:], label.null(1).tokens[0])
    assert not torch.equal(condition.tokens[0, 16:], label.null(1).tokens[0])
    assert torch.equal(condition.concat, image(batch).concat)
    unet, seen = backbone(both), set()
    for flags in ({}, drop, {"caption": ALL}, {"label": ALL}, {"masked_image": ALL}, everything(both, ALL)):
        seen.add(output(unet, both(batch, flags)).sum().item())
    assert len(seen) == 6


def test_guidance_moves_away_from_what_is_said_and_was_dropped():
    assert composed().guided() == ["caption", "label"]
    assert KINDS["compose_channels"].make().guided() == ["caption", "caption_2"]
    never = Compose(parts=[Label(classes=7, null=6, width=12, drop=0), Label(classes=7, null=6, width=12), masked()])
    assert never.guided() == ["label_2"]
    inner = Compose(parts=[Label(classes=3, null=2, width=12), never])
    assert inner.guided() == ["label", "label_2_2"]
    assert {name: leaf.drop for name, leaf in inner.leaves()} == inner.parts
    assert Label(classes=3, null=None).guided() == upscaler(drop=0.5).guided() == []


def test_masks_are_completed_where_a_part_has_none():
    condition = composed()(KINDS["compose_tokens"].batch)
    assert condition.mask.shape == (2, 17)
    assert condition.mask[:, 16].all()
    assert not condition.mask.all()
    assert KINDS["compose_channels"].make()(TEXTS).mask is None


def test_side_by_side_is_sdxl_s_order():
    both = KINDS["compose_channels"].make()
    first, second = (member(TEXTS) for member in both.members)
    condition = both(TEXTS)
    assert torch.equal(condition.tokens, torch.cat((first.tokens, second.tokens), 2))
    assert torch.equal(condition.pooled, torch.cat((first.pooled, second.pooled), 1))
    assert list(both.parts) == ["caption", "caption_2"]
    dropped = both(TEXTS, {"caption_2": ALL})
    assert torch.equal(dropped.tokens[..., :8], first.tokens)
    assert torch.equal(dropped.tokens[..., 8:], both.members[1].null(2).tokens)
    with pytest.raises(NotImplementedError, match="before they are joined"):
        both.without(condition, {"caption": ALL})


def test_side_by_side_a_token_counts_where_it_counts_for_both():
    both = Compose(parts=[small_joint(vocabulary=530), small_joint()], by="channels")
    first, second = (member(TEXTS).mask for member in both.members)
    mask = both(TEXTS).mask
    assert torch.equal(mask, first & second)
    assert not torch.equal(mask, first)


# ---------------------------------------------------------------------------------------------- masks and orders


@pytest.mark.parametrize("make", [small_joint, small_t5])
def test_masked_tokens_are_not_read(make):
    text = make()
    unet, ids = backbone(text), text.tokenize(TEXTS["caption"])
    condition = text.encode(ids)
    assert condition.mask.sum(1).tolist() == [(row == text.tokenizer.end).nonzero()[0].item() + 1 for row in ids]
    assert not condition.mask.all()
    changed = torch.where(condition.mask, ids, 5)
    assert not torch.equal(changed, ids)
    after = text.encode(changed)
    assert torch.equal(after.mask, condition.mask)
    assert torch.equal(after.tokens[condition.mask], condition.tokens[condition.mask])
    noisy = Condition(torch.where(condition.mask[..., None], condition.tokens, 7.0), condition.mask)
    assert torch.equal(output(unet, noisy), output(unet, condition))
    assert not torch.equal(output(unet, Condition(noisy.tokens)), output(unet, condition))


def test_the_order_of_boxes_says_nothing():
    layout = KINDS["layout"].make()
    unet = backbone(layout)
    shuffled = {key: value[:, [2, 1, 0]] for key, value in BOXES.items()}
    here, there = layout(BOXES), layout(shuffled)
    assert not torch.equal(here.tokens, there.tokens)
    torch.testing.assert_close(output(unet, here), output(unet, there), atol=2e-6, rtol=1e-5)
    swapped = BOXES | {"box_labels": BOXES["box_labels"][:, [1, 0, 2]]}
    assert (output(unet, layout(swapped)) - output(unet, here)).abs().max() > 1e-4


def test_places_without_a_box_are_not_read():
    layout = KINDS["layout"].make()
    unet, to_device = backbone(layout), {**BOXES, "boxes": BOXES["boxes"].clone()}
    to_device["boxes"][:, 2] = torch.tensor([0.2, 0.2, 0.9, 0.9])
    fewer = {key: value[:, :2] for key, value in BOXES.items()}
    expected = output(unet, layout(BOXES))
    assert torch.equal(output(unet, layout(to_device)), expected)
    torch.testing.assert_close(output(unet, layout(fewer)), expected, atol=2e-6, rtol=1e-5)  # an MLP on fewer rows


# ------------------------------------------------------------------------------------------------ closed forms


def test_inpainting_concatenates_the_mask_and_the_normalised_latents_of_what_is_left():
    autoencoder = first_stage()
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:12, 8:16] = 1
    concat = MaskedImage(encode=autoencoder.encode, latent_channels=4)({**MASKED, "mask": mask}).concat
    hidden = MASKED["image"].clone()
    hidden[:, :, 4:12, 8:16] = 0
    assert torch.equal(concat[:, 1:], autoencoder.encode(hidden))
    assert torch.equal(concat[:, :1], mask[:, :, ::4, ::4])


def test_edits_take_latents_before_they_are_normalised():
    autoencoder = first_stage()
    source = images(0, 2, 3, 16, 16)
    concat = Edit(posterior=autoencoder.posterior, latent_channels=4)({"source": source}).concat
    torch.testing.assert_close((concat - 0.25) * 0.7, autoencoder.encode(source))
    assert not torch.allclose(concat, autoencoder.encode(source))


def test_noise_of_a_level_is_that_of_the_upscaler_s_scheduler():
    condition = upscaler()(KINDS["low_resolution"].batch)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02)
    batch = KINDS["low_resolution"].batch
    image, level, noise = (batch[key] for key in ("low_resolution", "noise_level", "low_resolution_noise"))
    torch.testing.assert_close(condition.concat, scheduler.add_noise(image, noise, level))
    assert torch.equal(condition.vectors["noise_level"], level)


def test_a_segmentation_is_the_share_of_each_class_under_a_latent():
    concat = Segmentation(latent_factor=4, classes=3)(SEGMENTS).concat
    labels = SEGMENTS["segmentation"]
    for b, k, y, x in [(0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 2)]:
        window = labels[b, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert concat[b, k, y, x] == (window == k).float().mean()
    assert (concat.sum(1) < 1).any()  # -1 is no class


def test_labels_are_integers_or_rows():
    assert Label()({"label": torch.tensor([3, 1000])}).pooled.tolist() == [3, 1000]
    assert Label().null(2).pooled.tolist() == [1000, 1000]
    label = fill(Label(classes=7, null=6, width=12))
    assert torch.equal(label({"label": torch.tensor([3])}).tokens[0, 0], label.table.weight[3])
    assert Label(classes=10, null=None).drop == 0


@pytest.mark.parametrize(("factor", "side"), [(4, 4), (8, 2), (2, 8)])
def test_a_low_resolution_picture_has_a_factor_of_its_own(factor, side):
    conditioner = upscaler(factor=factor)
    batch = KINDS["low_resolution"].batch | {"low_resolution": images(3, 2, 3, side, side)}
    condition = conditioner(batch)
    assert conditioner.low_resolution_factor == factor
    assert condition.concat.shape == (2, 3, 4, 4)
    resized = batch["low_resolution"]
    if factor == 8:
        resized = F.interpolate(resized, scale_factor=2.0, mode="bilinear")
    if factor == 2:
        resized = F.avg_pool2d(resized, 2)
    same_size = upscaler()(batch | {"low_resolution": resized})
    torch.testing.assert_close(condition.concat, same_size.concat)
    both = Compose(parts=[small_joint(), conditioner])
    assert both.low_resolution_factor == factor
    assert torch.equal(both(TEXTS | batch).concat, condition.concat)


def test_a_noise_level_and_a_pooled_text_go_together():
    both = Compose(parts=[small_joint(projection=6), upscaler()])
    assert (both.pooled, both.vectors) == (6, {"noise_level": ("index", 1000)})
    unet = backbone(both)
    assert unet.time.label.weight.shape == (1000, 256)
    batch = TEXTS | KINDS["low_resolution"].batch
    outputs = [output(unet, both(batch | change)) for change in ({}, OTHER_TEXTS, KINDS["noise_level"].other)]
    assert all((outputs[0] - other).abs().amax() > 1e-4 for other in outputs[1:])


def test_a_noise_level_without_a_table_goes_with_labels():
    level = upscaler(table=False)
    both = Compose(parts=[Label(classes=7, null=6), level])
    assert both.vectors == {"noise_level": ("numbers", 1)}
    unet, batch = backbone(both), KINDS["low_resolution"].batch | {"label": torch.tensor([1, 2])}
    outputs = [output(unet, both({**batch, "noise_level": torch.tensor([n, n])})) for n in (20, 21)]
    assert not torch.equal(*outputs)
    assert torch.equal(level.null(2).vectors["noise_level"], torch.tensor([999.0, 999.0]))


# ------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("name", ["clip", "open_clip", "t5"])
def test_frozen_encoders_stay_frozen(name):
    conditioner = KINDS[name].make()
    model = nn.ModuleDict({"conditioner": conditioner, "backbone": backbone(conditioner)})
    for _ in range(2):
        assert conditioner.frozen
        assert not any(module.training for module in conditioner.modules())
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {f"backbone.{key}" for key, _ in model["backbone"].named_parameters()}
        assert not conditioner(TEXTS).tokens.requires_grad
        model.train()
    assert model["backbone"].training


def test_what_trains_is_trained_also_beside_a_frozen_part():
    both = Compose(parts=[clip(width=12, layers=2, heads=2), small_joint()])
    both.train()
    assert not both.frozen
    assert [member.training for member in both.members] == [False, True]
    condition = both(TEXTS, {"caption": FIRST})
    condition.tokens.sum().backward()
    assert all(p.grad is None for p in both.members[0].parameters())
    grads = {k for k, p in both.members[1].named_parameters() if p.grad is not None}
    assert grads == {k for k, _ in both.members[1].named_parameters()}
    assert Compose(parts=[clip(width=12, layers=2, heads=2)]).frozen
