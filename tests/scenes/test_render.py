"""Pictures against a second implementation that walks along rays, and against what the description says of them."""

import colorsys
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.scenes import Camera, Light, Object, Scene, draw, relations, render
from ldm.scenes.rays import MEET
from ldm.scenes.render import WANTS
from tests.scenes import world

HUES = {"red": 0, "orange": 28, "yellow": 53, "green": 125, "cyan": 182, "blue": 225, "purple": 282}
MANY, SIZE = 120, 64


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return draw(11, range(MANY)).scenes()


@pytest.fixture(scope="module")
def made(scenes) -> dict[str, torch.Tensor]:
    return render(scenes, SIZE, want=WANTS)


# ------------------------------------------------------------------------------------------ always the same picture


def picture(index: int) -> torch.Tensor:
    """One scene alone, in a process of its own."""
    return render(draw(11, [index]), SIZE)["image"][0]


def test_a_picture_is_the_same_alone_in_any_batch_and_with_any_threads(made):
    some = list(range(3, 40))
    assert torch.equal(render(draw(11, some), SIZE)["image"], made["image"][3:40])
    for index in (0, 17, MANY - 1):
        assert torch.equal(picture(index), made["image"][index])
    torch.set_num_threads(2)
    again = render(draw(11, range(24)), SIZE, want=WANTS)
    assert all(torch.equal(again[name], made[name][:24]) for name in WANTS)


def test_a_picture_is_the_same_in_another_process(made):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for index, image in zip((5, 6), pool.map(picture, (5, 6))):
            assert torch.equal(image, made["image"][index])


def test_a_picture_does_not_depend_on_what_else_is_wanted(scenes, made):
    assert torch.equal(render(scenes[:20], SIZE)["image"], made["image"][:20])


def test_a_large_picture_made_small_is_the_small_picture(scenes, made):
    large = render(scenes[:10], 4 * SIZE)["image"].float() / 255
    small = torch.nn.functional.avg_pool2d(large.square(), 4).sqrt()  # light adds up, its roots do not
    off = (small - made["image"][:10].float() / 255).abs()
    assert off.mean() < 0.004
    assert off.flatten().quantile(0.99) < 0.04


# ----------------------------------------------------------------------------- against rays walked in small steps


@pytest.mark.parametrize("index", range(8))
def test_mask_and_depth_are_those_of_walked_rays(index, scenes, made):
    mask, depth = world.walked(scenes[index], SIZE)
    ours, same = made["mask"][index].numpy(), made["mask"][index].numpy() == mask
    assert same.mean() > 0.985, "all but pixels that an outline runs through"
    inner = np.pad(mask, 1, mode="edge")
    inner = np.all([np.roll(inner, (y, x), (0, 1))[1:-1, 1:-1] == mask for y in (-1, 0, 1) for x in (-1, 0, 1)], 0)
    assert same[inner].all()
    off = np.abs(made["depth"][index].numpy() - depth)[inner]
    assert off.max() < 0.16, "rays walk in steps of 0.01, and ours may pass a sixth of a pixel beside the middle"
    assert np.median(off[ours[inner] > 0]) < 0.03


@pytest.mark.parametrize("index", range(6))
def test_shadows_fall_where_the_lamp_is_hidden(index, scenes):
    """On a plain floor, what cannot see the middle of the lamp is dark, and the rest is bright."""
    scene = replace(scenes[index], floor="gray")
    size = 96
    made = render([scene], size, want=("image", "mask", "depth"))
    eye, axes = world.camera(scene)
    place = (np.arange(size) + 0.5) / size * 2 - 1
    across, down = np.meshgrid(place / world.FOCAL, place / world.FOCAL)
    p = eye + (axes[2] + across[..., None] * axes[0] - down[..., None] * axes[1]) * made["depth"][0].numpy()[..., None]
    floor = (made["mask"][0].numpy() == 0) & (np.hypot(p[..., 0], p[..., 1]) < 2.5)
    hidden = np.any([world.shaded(scene, p, thing) for thing in scene.objects], 0)
    light = (made["image"][0].float().mean(0).numpy() / 255) ** 2
    bright = np.quantile(light[floor], 0.9)
    assert hidden[floor].any()
    assert (light[floor & hidden] < 0.78 * bright).mean() > 0.93
    assert (light[floor & ~hidden] > 0.62 * bright).mean() > 0.97


@pytest.mark.parametrize("name", ["sphere", "cube", "cylinder", "cone"])
def test_normals_are_the_slopes_of_the_depth(name):
    """Normals seen by the camera, against the cross product of neighbouring points."""
    height = world.RADIUS["large"] * world.HEIGHT[name]
    scene = Scene((Object(name, "red", "matte", "large", 0.0, 0.0, height, 30.0),), camera=Camera(distance=6.0))
    made = render([scene], 128, want=("mask", "depth", "normals"))
    place = (torch.arange(128) * 2 + 1 - 128) / 128 / world.FOCAL
    depth = made["depth"][0]
    p = torch.stack((place * depth, -place[:, None] * depth, -depth))  # right, up, towards the camera
    slope = torch.linalg.cross(p[:, 1:-1, 2:] - p[:, 1:-1, :-2], p[:, :-2, 1:-1] - p[:, 2:, 1:-1], dim=0)
    cos = (torch.nn.functional.normalize(slope, dim=0) * made["normals"][0][:, 1:-1, 1:-1]).sum(0)
    shown = made["mask"][0][1:-1, 1:-1] > 0
    assert (cos[shown] > 0.97).float().mean() > 0.8, "all but outlines and creases"
    length = made["normals"].square().sum(1)
    torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-4)  # points 6 away are known to 1e-6


# ------------------------------------------------------------------------------- the description is true of the pixels


def test_colours_are_those_named(scenes, made):
    for scene, image, mask in zip(scenes, made["image"].float() / 255, made["mask"]):
        for i, thing in enumerate(scene.objects):
            hue, saturation, _ = colorsys.rgb_to_hsv(*image[:, mask == i + 1].median(1).values.tolist())
            if thing.colour == "gray":
                assert saturation < 0.35, thing
            else:
                off = {name: abs((hue * 360 - other + 180) % 360 - 180) for name, other in HUES.items()}
                assert min(off, key=off.__getitem__) == thing.colour, (thing, hue * 360)
                assert saturation > 0.45, thing


def test_left_and_near_are_seen_in_the_picture(scenes, made):
    """Left by the middles of the masks; near by where on the floor the depth puts the pixels."""
    place = (np.arange(SIZE) * 2 + 1 - SIZE) / SIZE / world.FOCAL
    for scene, mask, depth in zip(scenes, made["mask"], made["depth"].numpy()):
        eye, axes = world.camera(scene)
        p = eye + depth[..., None] * (axes[2] + place[None, :, None] * axes[0] - place[:, None, None] * axes[1])
        level = np.cross([0, 0, 1], axes[0])
        middle = [(mask == i + 1).nonzero().double().mean(0).tolist() for i in range(len(scene.objects))]
        away = [np.median((p @ level)[mask == i + 1]) for i in range(len(scene.objects))]
        for i, relation, j in relations(scene):
            if relation == "left of":
                assert middle[i][1] < middle[j][1]
            elif relation == "behind":
                assert away[i] > away[j]
            elif relation == "on top of":
                assert middle[i][0] < middle[j][0] - 3


def test_everything_is_seen_and_boxes_hold_it(scenes, made):
    for index, scene in enumerate(scenes):
        mask, boxes = made["mask"][index], made["boxes"][index]
        for i, thing in enumerate(scene.objects):
            rows, columns = (mask == i + 1).nonzero(as_tuple=True)
            left, top, right, bottom = boxes[i].tolist()
            alone = render([replace(scene, objects=(thing,))], SIZE, want=("mask",))["mask"] if index < 40 else None
            if alone is not None:
                assert len(rows) > 0.5 * (alone > 0).sum(), "most of each object is in view"
            assert len(rows) >= 25
            assert 0 < left <= columns.min() / SIZE <= (columns.max() + 1) / SIZE <= right < 1
            assert 0 < top <= rows.min() / SIZE <= (rows.max() + 1) / SIZE <= bottom < 1
            assert (right - left) * SIZE - 2 <= columns.max() + 1 - columns.min()
            assert (
                made["segmentation"][index][mask == i + 1]
                == 1 + ["sphere", "cube", "cylinder", "cone"].index(thing.shape)
            ).all()
        assert (boxes[len(scene.objects) :] == 0).all()
        assert (made["box_labels"][index][len(scene.objects) :] == -1).all()
        assert (made["segmentation"][index][mask == 0] == 0).all()


def test_edges_run_round_everything(made):
    mask = made["mask"]
    assert made["edges"][:, :, :-1][mask[:, :, :-1] != mask[:, :, 1:]].all()
    assert made["edges"][:, :-1][mask[:, :-1] != mask[:, 1:]].all()
    assert 0.01 < made["edges"].float().mean() < 0.1


def test_a_shiny_thing_shines():
    for shape, height in (("sphere", 0.765), ("cylinder", 0.697)):
        scene = Scene((Object(shape, "blue", "matte", "large", 0.0, 0.0, height),), light=Light(235.0, 45.0))
        matte, shiny = render([scene, replace(scene, objects=(replace(scene.objects[0], material="shiny"),))], 96)[
            "image"
        ].float()
        assert shiny.amin(0).max() > matte[:, 30:60, 40:56].amin(0).max() + 40, "a white spot"


def test_time_turns_the_light_and_the_camera_turns_the_view(scenes):
    scene = scenes[0]
    later, turned = (
        replace(scene, time=1.0),
        replace(scene, light=replace(scene.light, azimuth=scene.light.azimuth + 90)),
    )
    assert torch.equal(render([later], 32)["image"], render([turned], 32)["image"])
    masks = render([scene, later, replace(scene, camera=Camera(170.0))], 32, want=("mask",))["mask"]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: must be positive; got 0"),
        ({"size": 8, "want": ("image", "masks")}, "want: unknown name; got masks; expected some of image, mask, "),
    ],
)
def test_what_cannot_be_rendered_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        render(draw(0, [0]), **arguments)


def test_shapes_are_met_in_the_order_of_their_names():
    assert [meet.__name__ for meet in MEET] == ["sphere", "cube", "cylinder", "cone"]
