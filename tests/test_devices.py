"""Where networks compute, and what a GPU would refuse: fake tensors have no values, but a device."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ldm import pictures, pipeline
from ldm.data.sampler import SampleId
from ldm.devices import visiting
from ldm.diffusion import sampler
from ldm.pipeline import Pipeline, Request
from tests import small_models
from tests.test_pipeline import PROMPT, SIZE, mask, picture
from tests.training import second_stage, test_autoencoder
from tests.training.killing import toy_data
from tests.training.test_autoencoder import VQ
from tests.training.test_latent_diffusion_loss import CONDITIONS, TEXT

__all__ = ["toy_data"]

GPU, ASKED = torch.device("cuda", 0), [SampleId(i, i, 0) for i in range(8)]
INPAINTING, EDITING = "StableDiffusionInpaintPipeline", "StableDiffusionInstructPix2PixPipeline"
MODELS = {
    "text": (small_models.stable_diffusion, {}),
    "from a picture": (small_models.stable_diffusion, {"image": picture}),
    "inpainting by any": (small_models.stable_diffusion, {"image": picture, "mask": mask}),
    "inpainting": (lambda: small_models.stable_diffusion(INPAINTING, 9), {"image": picture, "mask": mask}),
    "editing": (lambda: small_models.stable_diffusion(EDITING, 8), {"condition": picture}),
    "classes": (small_models.dit, {}),
}


class Pretended(TorchFunctionMode):
    """What is asked for on a GPU has no values from there on; what stays on the CPU is real."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(map(on_gpu, tree_leaves((args, kwargs)))):
            return function(*args, **kwargs)
        args, kwargs = tree_map(self.faked, (args, kwargs))
        with self.fake:
            return function(*args, **kwargs)

    def faked(self, value: object) -> object:
        """A tensor without its values."""
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self.fake.from_tensor(value) if real else value


def on_gpu(value: object) -> bool:
    """Whether it is there, or says that something shall be."""
    return isinstance(value, FakeTensor) or (isinstance(value, torch.device | str) and str(value).startswith("cuda"))


@pytest.fixture
def pretended(monkeypatch):
    """A machine with a GPU, of whose values no question has an answer but yes."""
    torch.zeros(1, requires_grad=True).sum().backward()  # autograd's first use starts a thread for each device, and
    # with threads for the GPU that is pretended no later test could fork
    monkeypatch.setattr(FakeTensor, "__bool__", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(sampler, "check_finite", lambda *_: None)
    monkeypatch.setattr(pictures, "to_pil", lambda x: x)
    with Pretended() as mode:
        yield mode


def networks(pipe: Pipeline) -> list[nn.Module]:
    return [network for network in (pipe.denoiser, pipe.conditioner, pipe.autoencoder) if network is not None]


def where(pipe: Pipeline) -> set[str]:
    """The devices of all weights."""
    return {x.device.type for network in networks(pipe) for x in network.parameters()}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_model_meets_tensors_of_another_device(name, offload, pretended, tmp_path):
    model, given = MODELS[name]
    model().save_pretrained(tmp_path / "model")
    pipe = pipeline.load(tmp_path / "model", device="cpu", precision="fp32")
    pipe.device, pipe.offload = GPU, offload
    settings = pipe.settings(steps=3, **SIZE, **{key: make() for key, make in given.items()})
    texts, label = ((PROMPT, "blue"), None) if name != "classes" else (("", ""), 1)
    requests = [Request(*texts, label, 0), Request(texts[0], "", label, 1)]
    with ExitStack() as there:
        if not offload:
            with pytest.raises(RuntimeError, match="same device"):  # it would be seen
                pipe.images(requests, settings)
            for network in networks(pipe):
                there.enter_context(visiting(network, GPU))
        images = pipe.images(requests, settings)
        assert (images.device, tuple(images.shape)) == (GPU, (2, 3, *SIZE.values()))
        assert where(pipe) == {"cpu" if offload else "cuda"}


@pytest.mark.parametrize(("conditioner", "adds"), [("null", "[]"), (TEXT, "[]"), *CONDITIONS])
def test_no_training_of_a_denoiser_meets_them(conditioner, adds, pretended, tmp_path):
    backbone = f"backbone.attend={'[2]' if 'width' in conditioner else '[]'}"
    loop = second_stage.loop_of(tmp_path, f"conditioner={conditioner}", f"data.adds={adds}", backbone)
    recipe = loop.recipe
    fetched = recipe.data.batch(ASKED, 3)
    batch = loop.transfer_batch_to_device(recipe.preparation()(fetched), GPU, 0)
    with pytest.raises(RuntimeError, match="same device"):
        recipe.loss(batch, ("denoiser",))
    with visiting(loop, GPU):
        loss, report = recipe.loss(batch, ("denoiser",))
        assert {x.device for x in (loss, *report.values())} == {GPU}
        assert {x.device for x in recipe.validation_losses(fetched, torch.arange(8))} == {GPU}


@pytest.mark.parametrize("more", [[], VQ, ["loss.perceptual=judge"]], ids=["KL", "VQ", "judge"])
def test_no_training_of_a_first_stage_meets_them(more, pretended, tmp_path, toy_data, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda y, x, *_, **__: (torch.zeros_like(x),))  # which needs a driver
    loop = test_autoencoder.loop_of(tmp_path, *more, "loss.start=0")
    recipe = loop.recipe
    fetched, prepare = recipe.data.batch(ASKED, 3), recipe.preparation() or dict
    batch = loop.transfer_batch_to_device(prepare(fetched), GPU, 0)
    with visiting(loop, GPU):
        for turn in recipe.turns():
            loss, report = recipe.loss(batch, turn)
            assert {x.device for x in (loss, *report.values())} == {GPU}
        assert {x.device for x in recipe.reconstruct_pixels(fetched["image"])} == {GPU}


def test_what_visits_is_there_for_its_turn_and_comes_home_after_an_error():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = [x.data_ptr() for x in (*network.parameters(), *network.buffers())]
    with suppress(KeyboardInterrupt), visiting(network, torch.device("meta")):
        assert {x.device.type for x in (*network.parameters(), *network.buffers())} == {"meta"}
        raise KeyboardInterrupt
    assert [x.data_ptr() for x in (*network.parameters(), *network.buffers())] == before
