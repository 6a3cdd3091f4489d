"""What reads pictures for a comparison: DINOv2 as transformers has it, a CLIP score by hand, and the cache of both."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import CheckpointError, DataError
from ldm.metrics import comparison
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.comparison import ReferenceSet, compare, reference_features
from ldm.metrics.features import DINOv2Features, as_saved
from ldm.pictures import to_float, to_tensor
from ldm.scenes import Scenes
from ldm.scenes.features import JudgeFeatures

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def photographs(count: int, size: int) -> list[Image.Image]:
    """Noise."""
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def test_pictures_of_several_sizes_are_no_set():
    data = SimpleNamespace(sizes=[(64, 64), (48, 80)], batch_size=2, buckets=None)
    with pytest.raises(DataError, match=r"^pictures of several sizes cannot be compared") as error:
        ReferenceSet(data, {}, [0, 1], 0).batches()
    assert str(error.value).endswith("(data.aspect); got 2 sizes; expected one; try data.aspect=1")


def test_dinov2_is_transformers_with_its_own_reading_of_pictures(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    theirs = Dinov2Model(Dinov2Config(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "dinov2")
    processor = BitImageProcessor(
        do_center_crop=False,
        size={"height": 56, "width": 56},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images = photographs(3, 56)
    with torch.inference_mode():
        expected = theirs(**processor(images, return_tensors="pt")).pooler_output
        features = DINOv2Features(weights=str(tmp_path / "dinov2"), side=56)
        found = features(torch.cat([to_tensor(image) for image in images])).vectors
    assert expected.std(0).mean() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "dinov2" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        DINOv2Features(weights=str(tmp_path / "dinov2"))


def test_a_clip_score_is_a_hundred_cosines(tmp_path):
    import open_clip

    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny.json")
    theirs, _, preprocess = open_clip.create_model_and_transforms("tiny")
    theirs.eval()
    images, prompts = photographs(6, 40), [f"{word} things" for word in ("red", "blue", "two", "three", "no", "all")]
    signs = set()
    for _ in range(2):  # with the texts' side up, and down
        theirs.text_projection.data.neg_()
        torch.save(theirs.state_dict(), tmp_path / "tiny.pt")
        score = CLIPScore(model="tiny", weights=str(tmp_path / "tiny.pt"))
        with torch.no_grad():
            seen = theirs.encode_image(torch.stack([preprocess(image) for image in images]))
            said = theirs.encode_text(open_clip.get_tokenizer("tiny")(prompts))
        cosines = torch.nn.functional.cosine_similarity(seen, said)
        torch.testing.assert_close(score(images, prompts), 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)
        signs |= set(cosines.sign().tolist())
    assert signs == {-1.0, 1.0}  # both sides of the cut
    with pytest.raises(ValueError, match="model: unknown; got huge"):
        CLIPScore(model="huge", weights=str(tmp_path / "tiny.pt"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"clip\.weights: not of tiny"):
        CLIPScore(model="tiny", weights=str(tmp_path / "other.pt"))


def test_the_judge_sees_what_a_file_would_hold():
    x = torch.rand(1, 3, 8, 8) * 2.2 - 1.1
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(as_saved(x), to_float(pixels))


def test_features_of_true_pictures_are_kept_by_all_that_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data, features = Scenes(resolution=64, batch_size=4, size=100), JudgeFeatures()
    about = {"type": "scenes"}
    first = reference_features(features, ReferenceSet(data, about, [3, 50], 1))
    monkeypatch.setattr(comparison, "compute_features", lambda *_: pytest.fail("read again"))
    again = reference_features(features, ReferenceSet(data, about, [3, 50], 1))
    assert torch.equal(first["vectors"], again["vectors"])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    others = [([3, 51], 1, about), ([3, 50], 2, about), ([3, 50], 1, {"type": "scenes", "split": "held_out"})]
    for indices, seed, what in others:
        reference_features(features, ReferenceSet(data, what, indices, seed))
    for name in ("identity", "resize"):
        monkeypatch.setattr(features, name, "another")
        reference_features(features, ReferenceSet(data, about, [3, 50], 1))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6


def test_few_pictures_are_an_indication_and_enough_are_more():
    rows = {"vectors": torch.randn(40, 4)}
    assert compare(rows, {"vectors": torch.randn(19, 4)})["indicative"] is True
    assert compare(rows, {"vectors": torch.randn(20, 4)})["indicative"] is False
