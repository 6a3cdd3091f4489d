"""Tokenising apart from encoding: picklable, by part, and read from a batch."""

import pickle

import pytest
import torch

from ldm.conditioning.compose import Compose
from ldm.conditioning.label import Label
from ldm.conditioning.text import clip
from tests.conditioning.conditions import TEXTS, small_joint, small_t5
from tests.models.first_stages import fill


@pytest.mark.parametrize("make", [small_joint, small_t5, lambda: clip(width=12, layers=2, heads=2, chunks=2)])
def test_a_tokenization_survives_pickling(make):
    text = make()
    (part, tokenization), *others = text.tokenizations().items()
    assert (part, others) == ("caption", [])
    assert (tokenization.length, tokenization.chunks) == (text.length, text.chunks)
    copied = pickle.loads(pickle.dumps(tokenization))
    ids = copied(TEXTS["caption"])
    assert (ids.dtype, ids.device.type, ids.shape) == (torch.long, "cpu", (2, text.chunks * text.length))
    assert torch.equal(ids, text.tokenize(TEXTS["caption"]))
    assert copied.max_tokens == text.chunks * (text.length - (1 if text.tokenizer.start is None else 2))
    assert (copied.truncates("a"), copied.truncates("a " * 200)) == (False, True)


def test_ids_in_a_batch_replace_its_captions(monkeypatch):
    parts = [small_joint(), Label(classes=7, null=6, width=12), fill(clip(width=12, layers=2, heads=2))]
    inner = Compose(parts=parts[:2])
    both = Compose(parts=[inner, parts[2]])
    tokenizations = both.tokenizations()
    assert list(tokenizations) == ["caption", "caption_2"]
    batch = TEXTS | {"label": torch.tensor([1, 2])}
    expected, dropped = both(batch), both(batch, {"caption_2": torch.tensor([True, False])})
    ids = {part: tokenize(batch["caption"]) for part, tokenize in tokenizations.items()}
    assert ids["caption"].shape != ids["caption_2"].shape
    del batch["caption"]
    found = both(batch | {"ids": ids})
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(both(batch | {"ids": ids}, {"caption_2": torch.tensor([True, False])}).tokens, dropped.tokens)
    with pytest.raises(ValueError, match="batch: has no 'caption'; got label, ids; expected caption"):
        both(batch | {"ids": {"caption": ids["caption"]}})
