"""The bottlenecks by hand, and against diffusers' quantiser."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as Theirs

from ldm.models.quantize import Gaussian, VectorQuantizer, perplexity


def quantizer(rows, commitment: float = 0.25) -> VectorQuantizer:
    book = torch.tensor(rows)
    made = VectorQuantizer(codes=len(book), channels=book.shape[1], commitment=commitment)
    made.codebook.data.copy_(book)
    return made


def test_the_nearest_code_by_hand():
    vq = quantizer([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
    h = torch.tensor([[0.9, 0.8], [3.0, 0.0], [-5.0, 0.1]]).T.reshape(1, 2, 1, 3)
    z, _, codes = vq(h)
    assert codes.tolist() == [[[1, 2, 0]]]
    assert z[0, :, 0].T.tolist() == [[1.0, 1.0], [4.0, 0.0], [0.0, 0.0]]


def test_gradients_pass_straight_through_and_commitment_pulls_the_encoder():
    vq = quantizer([[1.0, 2.0]], commitment=0.25)
    h = torch.tensor([3.0, 1.0]).reshape(1, 2, 1, 1).requires_grad_()
    z, penalty, _ = vq(h)
    # by hand: h - e = (2, -1), so both terms are (4 + 1) / 2
    assert penalty.tolist() == [1.25 * 2.5]
    (z * torch.tensor([10.0, 20.0]).reshape(1, 2, 1, 1)).sum().backward(retain_graph=True)
    assert h.grad.flatten().tolist() == [10.0, 20.0]
    assert vq.codebook.grad is None
    h.grad = None
    penalty.sum().backward()
    assert h.grad.flatten().tolist() == [0.25 * 2.0, 0.25 * -1.0]  # commitment on the encoder: the paper's form
    assert vq.codebook.grad.tolist() == [[-2.0, 1.0]]


def test_equals_diffusers_in_the_papers_form():
    vq, theirs = VectorQuantizer(codes=50, channels=4), Theirs(50, 4, beta=0.25, legacy=False)
    vq.codebook.data.normal_()
    theirs.embedding.weight.data.copy_(vq.codebook)
    h = torch.randn(2, 4, 6, 5, requires_grad=True)
    h_theirs = h.detach().clone().requires_grad_()
    (z, penalty, codes), (z_theirs, loss, (_, _, codes_theirs)) = vq(h), theirs(h_theirs)
    assert torch.equal(codes.flatten(), codes_theirs)
    torch.testing.assert_close(z, z_theirs)
    torch.testing.assert_close(penalty.mean(), loss)
    (penalty.mean() + z.square().sum()).backward()
    (loss + z_theirs.square().sum()).backward()
    torch.testing.assert_close(h.grad, h_theirs.grad)
    torch.testing.assert_close(vq.codebook.grad, theirs.embedding.weight.grad)


def test_the_straight_through_value_is_the_code_itself():
    vq = VectorQuantizer(codes=50, channels=4)
    h = 1000 * torch.randn(2, 4, 6, 5)  # h + (e - h) would round e away
    assert torch.equal(vq(h).z, vq.lookup(vq.nearest(h)))
    assert torch.equal(vq.snap(h), vq.lookup(vq.nearest(h)))


def test_codes_are_chosen_in_float32_under_autocast():
    vq = VectorQuantizer(codes=500, channels=4)
    vq.codebook.data.normal_()
    h = torch.randn(2, 4, 16, 16)
    plain = vq.nearest(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.nearest(h), plain)


def test_counts_and_perplexity():
    vq = VectorQuantizer(codes=5, channels=2)
    counts = vq.count(torch.tensor([[[0, 0, 3], [3, 1, 1]]]))
    assert counts.tolist() == [2, 2, 0, 2, 0]
    assert perplexity(counts).item() == pytest.approx(3.0)
    assert perplexity(torch.tensor([3, 1])).item() == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_dead_codes_come_back_from_the_given_samples_in_order():
    vq = quantizer([[float(i), 0.0] for i in range(5)])
    changed = vq.revive(torch.tensor([3, 0, 1, 0, 0]), torch.tensor([[10.0, 1.0], [20.0, 2.0]]))
    assert changed.tolist() == [False, True, False, True, False]  # two samples for three dead codes: the last waits
    assert vq.codebook.tolist() == [[0.0, 0.0], [10.0, 1.0], [2.0, 0.0], [20.0, 2.0], [4.0, 0.0]]


def test_a_collapsed_codebook_is_used_again_after_revival():
    vq = VectorQuantizer(codes=16, channels=2)
    vq.codebook.data.fill_(50.0)
    vq.codebook.data[0] = 0.0  # the only one near the latents
    h = torch.randn(4, 2, 8, 8)
    counts = vq.count(vq.nearest(h))
    assert perplexity(counts).item() == 1.0
    vq.revive(counts, h.permute(0, 2, 3, 1).flatten(0, 2))
    assert perplexity(vq.count(vq.nearest(h))).item() > 8


def test_the_gaussian_by_hand():
    gaussian = Gaussian(channels=1)
    h = torch.tensor([2.0, math.log(9.0)]).reshape(1, 2, 1, 1)
    z, penalty, codes = gaussian(h, torch.full((1, 1, 1, 1), -1.0))
    assert z.item() == pytest.approx(2 - 3)
    assert penalty.item() == pytest.approx(0.5 * (4 + 9 - 1 - math.log(9)))
    assert codes is None
    assert gaussian(h).z.item() == 2.0
    extreme = torch.tensor([0.0, 1e6]).reshape(1, 2, 1, 1)
    assert gaussian(extreme, torch.ones(1, 1, 1, 1)).z.isfinite().all()


BAD = [
    (lambda: VectorQuantizer(codes=0), "codes: too small; got 0; expected 1 or more; try 1"),
    (lambda: VectorQuantizer(channels=0), "channels: too small; got 0; expected 1 or more; try 1"),
    (lambda: Gaussian(channels=-1), "channels: too small; got -1; expected 1 or more; try 1"),
    (
        lambda: VectorQuantizer(commitment=-1.0),
        "commitment: must not be negative; got -1.0; expected 0 or more; try 0",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_numbers(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the whole message follows
        make()
    assert str(error.value) == message
