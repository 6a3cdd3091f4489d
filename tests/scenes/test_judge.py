"""The judge's network: detections from its maps, and its features."""

from __future__ import annotations

import pytest
import torch

from ldm.scenes.judge import CANDIDATES, CELLS, KINDS, Judge, Maps, take


def blank() -> Maps:
    """Maps of one picture in which nothing is seen."""
    cells = [torch.zeros(1, CELLS, CELLS, kinds) for kinds in (*KINDS, 2, 3, 16)]
    return Maps(torch.full((1, CELLS, CELLS), -9.0), *cells, torch.zeros(1, 16, CELLS, CELLS))


def test_detections_are_peaks_with_the_outputs_of_their_cells():
    maps = blank()
    maps.score[0, 5, 7] = 3.0
    maps.score[0, 5, 8] = 2.0  # a neighbour, not another object
    maps.score[0, 20, 1] = 1.0
    maps.colour[0, 5, 7, 4] = 9.0
    maps.offset[0, 5, 7] = torch.tensor([0.5, 0.25])
    maps.place[0, 20, 1] = torch.tensor([1.0, 2.0, 3.0])
    maps.query[0, 20, 1, 2] = 1.0
    maps.pixels[0, 2] = -9.0
    maps.pixels[0, 2, :3] = 9.0
    detections = maps.detections()
    torch.testing.assert_close(detections.score[0, :2], torch.tensor([3.0, 1.0]).sigmoid())
    assert (detections.score[0, 2:] < 0.01).all()
    assert detections.colour[0, 0].argmax() == 4
    torch.testing.assert_close(detections.centre[0, 0], torch.tensor([7.5 / CELLS, 5.25 / CELLS]))
    assert detections.place[0, 1].tolist() == [1, 2, 3]
    assert (detections.mask[0, 1] > 0.5).sum() == 3 * CELLS
    for name in ("shape", "colour", "material", "size"):
        torch.testing.assert_close(getattr(detections, name).sum(-1), torch.ones(1, CANDIDATES))


def test_take_counts_cells_row_by_row():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(take(x, torch.tensor([[6], [0]])), torch.stack([x[0, 1, 2], x[1, 0, 0]])[:, None])


@pytest.mark.parametrize("side", [(64, 64), (65, 130), (256, 256)])
def test_pictures_of_any_size_are_read(side):
    judge, x = Judge(), torch.rand(2, 3, *side) * 2 - 1
    assert judge(x).mask.shape == (2, CANDIDATES, CELLS, CELLS)
    assert judge.pooled(x).shape == (2, 192)
    assert [each.shape[1] for each in judge.features(x)] == [32, 64, 128]


def test_pictures_in_a_batch_are_read_alone():
    judge, x = Judge().double(), torch.rand(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(judge.pooled(x)[1:2], judge.pooled(x[1:2]), rtol=1e-9, atol=1e-9)


def test_features_have_gradients_in_the_picture():
    judge = Judge().requires_grad_(False).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: [each.mean() for each in judge.features(x)], (x,))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match=r"^x: not pictures; got shape"):
        Judge()(torch.zeros(shape))
