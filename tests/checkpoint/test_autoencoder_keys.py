"""The key maps against diffusers' own names and against its reader of CompVis files."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from ldm.checkpoint.autoencoder_keys import autoencoder_keys, fold_statistics, read_autoencoder, write_autoencoder
from ldm.checkpoint.rename import rename, swap
from ldm.errors import CheckpointError
from ldm.models.quantize import Gaussian
from tests.models.first_stages import KL, VQ, diffusers_autoencoder, fill, small


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("options", "kind"), [(KL, AutoencoderKL), (VQ, VQModel)])
def test_diffusers_state_has_these_names_and_shapes_and_returns_unchanged(options, kind):
    ours = fill(small(**options))
    theirs = diffusers_autoencoder(ours)
    assert isinstance(theirs, kind)
    written = write_autoencoder(ours.state_dict(), ours, "diffusers")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(written)
    fresh = small(**options)
    fresh.load_state_dict(read_autoencoder(theirs.state_dict(), fresh, "diffusers"), strict=False)
    assert same(fresh.state_dict(), ours.state_dict())


@pytest.mark.parametrize("layout", ["diffusers", "diffusers_old", "compvis"])
def test_every_layout_returns_what_it_was_given(layout):
    ours = fill(small(**KL))
    back = read_autoencoder(write_autoencoder(ours.state_dict(), ours, layout), ours, layout)
    assert same(back | {"shift": ours.shift, "scale": ours.scale}, ours.state_dict())


def test_compvis_names_are_those_that_diffusers_reads():
    ours = fill(small(**{**KL, "attend": []}))  # its reader drops attention outside the middle
    theirs = diffusers_autoencoder(ours)
    compvis = write_autoencoder(ours.state_dict(), ours, "compvis")
    assert compvis["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in compvis.items()}
    converted = convert_ldm_vae_checkpoint(prefixed, dict(theirs.config))
    assert same(converted, write_autoencoder(ours.state_dict(), ours, "diffusers"))


def test_old_diffusers_names_are_those_that_it_upgrades_itself():
    ours = fill(small(**KL))
    theirs = diffusers_autoencoder(ours)
    old = write_autoencoder(ours.state_dict(), ours, "diffusers_old")
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    theirs._fix_state_dict_keys_on_load(old)
    assert same(old, write_autoencoder(ours.state_dict(), ours, "diffusers"))


def test_per_channel_statistics_fold_into_the_convolutions():
    ours = fill(small(bottleneck=lambda: Gaussian(channels=4), per_channel=True))
    ours.set_statistics(torch.tensor([0.5, -1.0, 0.1, 2.0]), torch.tensor([0.2, 3.0, 1.5, 0.7]))
    folded = small(bottleneck=lambda: Gaussian(channels=4), per_channel=True)
    folded.load_state_dict(fold_statistics(ours.state_dict()))
    assert folded.shift.eq(0).all()
    assert folded.scale.eq(1).all()
    x, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(folded.encode(x, noise), ours.encode(x, noise), rtol=1e-4, atol=1e-5)
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(folded.decode(z), ours.decode(z), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours.post_quant.weight, folded.post_quant.weight)


def test_a_stem_cannot_be_written_for_others():
    with pytest.raises(CheckpointError) as error:
        autoencoder_keys(small(bottleneck=Gaussian, stem=2), "diffusers")
    assert str(error.value) == (
        "autoencoder.stem: other programs do not support it (diffusers); got 2; expected 1; try our own format"
    )


def test_rename_refuses_missing_extra_and_unequal_tensors():
    one, two = torch.ones(1), torch.zeros(1)
    pairs = [("a", "x"), ("b", "y")]
    assert rename({"a": one, "b": two}, pairs) == {"x": one, "y": two}
    assert swap(pairs) == [("x", "a"), ("y", "b")]
    with pytest.raises(CheckpointError) as error:
        rename({}, [(f"k{i}", "x") for i in range(7)])
    assert str(error.value) == ("missing tensors; got 7: k0, k1, k2, k3, k4, ...; expected none; try another layout")
    with pytest.raises(CheckpointError) as error:
        rename({"a": one, "b": two, "c": one}, pairs)
    assert str(error.value) == "unexpected tensors; got 1: c; expected none; try another layout"
    with pytest.raises(CheckpointError) as error:
        rename({"a": one, "b": two}, [("a", "x"), ("b", "x")])
    assert str(error.value) == "copies of x differ; got other numbers in b; expected equal copies"
