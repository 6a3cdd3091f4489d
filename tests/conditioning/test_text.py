"""Text conditioners: what they hand over, long prompts, weights from everywhere, and their refusals."""

import sys
import warnings

import open_clip as theirs_open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    BertTokenizerFast,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ldm.checkpoint.text_keys import write_text
from ldm.conditioning import text as text_module
from ldm.conditioning.t5 import t5
from ldm.conditioning.text import clip, joint_text, open_clip
from ldm.conditioning.tokenizer import BPE, clip_tokenizer, from_folder, from_json
from ldm.errors import CheckpointError, InputError
from tests.conditioning.conditions import CAPTIONS, T5_NUMBERS, TEXTS, small_joint, small_t5, unigram
from tests.conditioning.x_transformer import x_transformer
from tests.models.first_stages import fill

CLIP = {"width": 12, "layers": 2, "heads": 2}
JOINT = {"width": 12, "layers": 2, "heads": 2, "length": 16, "vocabulary": 560}
LONG = " ".join(f"{colour} {shape}," for colour in ("red", "green", "blue") for shape in ("cube", "ball")) * 5


# ---------------------------------------------------------------------------------------- what is handed over


@torch.no_grad()
def test_stable_diffusion_1_s_states_are_those_of_transformers():
    ours = fill(clip(**CLIP))
    config = CLIPTextConfig(hidden_size=12, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    theirs = CLIPTextModel(config).eval()
    state = write_text(ours.transformer.state_dict(), ours.transformer, "clip")
    theirs.load_state_dict({name.removeprefix("text_model."): x for name, x in state.items()})
    ids = ours.tokenize(["a red cube", ""])
    assert ids.shape == (2, 77)
    assert ids[1].tolist() == [49406] + [49407] * 76
    condition = ours({"caption": ["a red cube", ""]})
    torch.testing.assert_close(condition.tokens, theirs(ids).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert condition.mask is None
    assert condition.pooled is None


@torch.no_grad()
def test_stable_diffusion_2_s_states_are_those_of_open_clip():
    ours = fill(open_clip(width=12, layers=3, heads=2))
    theirs = theirs_open_clip.transformer.TextTransformer(vocab_size=49408, width=12, heads=2, layers=3).eval()
    state = write_text(ours.transformer.state_dict(), ours.transformer, "open_clip")
    assert theirs.load_state_dict(state, strict=False).unexpected_keys == []
    inside = []
    theirs.transformer.resblocks[-2].register_forward_hook(lambda module, inputs, output: inside.append(output))
    ids = theirs_open_clip.tokenize(["a red cube", "", LONG * 3])
    theirs(ids)
    with pytest.warns(UserWarning, match="truncated"):
        assert torch.equal(ours.tokenize(["a red cube", "", LONG * 3]), ids)
    torch.testing.assert_close(ours.encode(ids).tokens, theirs.ln_final(inside[0]), atol=1e-5, rtol=1e-4)


def t5_of(ours) -> T5EncoderModel:
    """transformers' T5 with our weights."""
    numbers = {"d_model": 12, "num_layers": 2, "num_heads": 2, "d_kv": 6, "d_ff": 24, "vocab_size": 40}
    theirs = T5EncoderModel(T5Config(**numbers, feed_forward_proj="gated-gelu")).eval()
    state = {f"encoder.{name}": x for name, x in ours.transformer.encoder.state_dict().items()}
    theirs.load_state_dict(state | {"shared.weight": state["encoder.embed_tokens.weight"]})
    return theirs


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@torch.no_grad()
def test_t5_stays_in_float32_beside_float16():
    """Its large states end in infinities there; in bfloat16 they do not."""
    tower, ids = small_t5().transformer, torch.arange(12).view(2, 6)
    plain, found = tower(ids)[0], {}
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            found[dtype] = tower(ids)[0]
    assert torch.equal(found[torch.float16], plain)
    assert not torch.equal(found[torch.bfloat16].float(), plain)


def test_t5_s_states_are_those_of_transformers():
    ours = small_t5()
    batch = fast(unigram())([f"{caption}</s>" for caption in TEXTS["caption"]], padding="max_length", max_length=36)
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    assert torch.equal(ours.tokenize(TEXTS["caption"]), ids)
    states = t5_of(ours)(ids, attention_mask=mask).last_hidden_state
    condition = ours(TEXTS)
    assert torch.equal(condition.mask, mask.bool())
    torch.testing.assert_close(condition.tokens[condition.mask], states[mask.bool()], atol=1e-5, rtol=1e-4)


def bert(folder):
    """BERT's tokenizer with a few words, whose end is not its highest id, also as files in a folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube"]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return from_folder(str(folder))


@torch.no_grad()
def test_ldm_s_states_are_those_of_an_x_transformer_on_bert_s_ids(tmp_path):
    bert(tmp_path)
    numbers = {"width": 12, "layers": 2, "heads": 2, "head_width": 8, "length": 6, "vocabulary": 8}
    ours = fill(joint_text(**numbers, masked=False, tokenizer=str(tmp_path)))
    assert ours.tokenize(["a red cube", ""]).tolist() == [[2, 5, 6, 7, 3, 0], [2, 3, 0, 0, 0, 0]]
    condition = ours({"caption": ["a red cube", ""]})
    assert condition.mask is None
    assert not ours.frozen
    state = write_text(ours.transformer.state_dict(), ours.transformer, "ldm")
    assert state["transformer.attn_layers.layers.0.1.to_q.weight"].shape == (16, 12)
    states = x_transformer(state, ours.tokenize(["a red cube", ""]), depth=2, heads=2)
    torch.testing.assert_close(condition.tokens, states, atol=1e-5, rtol=1e-4)


def test_the_published_encoders_have_their_sizes(monkeypatch):
    monkeypatch.setattr(text_module, "clip_tokenizer", lambda pad: None)
    numbers = {"width": 1280, "layers": 32, "heads": 8, "head_width": 64, "vocabulary": 30522, "masked": False}
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in make().parameters()) for make in (clip, open_clip, lambda: joint_text(**numbers))
        ]
    # diffusers' SD 2 text encoder has 23 of OpenCLIP-H's 24 layers of 12,596,224, and no projection of 1024 x 1024
    assert sizes[:2] == [123_060_480, 354_032_640 - 12_596_224 - 1024 * 1024]
    assert sizes[2] == 32 * (1280 * (4 * 512 + 2 * 5120) + 6 * 1280 + 5120) + (30522 + 77 + 2) * 1280


@torch.no_grad()
def test_the_pooled_vector_of_a_joint_encoder_is_what_its_end_token_has_read():
    ours = small_joint(projection=4)
    ids = ours.tokenize(["a red cube"])
    end = int((ids[0] == ours.require_tokenizer().end).nonzero()[0])
    states, _ = ours.transformer(ids, ours.attention_mask(ids))
    pooled = ours({"caption": ["a red cube"]}).pooled
    torch.testing.assert_close(pooled, ours.transformer.projection(states[:, end]))
    assert not torch.allclose(pooled, ours({"caption": ["a blue cube"]}).pooled)


def test_tokenizing_and_encoding_are_apart():
    ours = small_joint()
    ids = ours.tokenize(TEXTS["caption"])
    assert torch.equal(ours.encode(ids).tokens, ours(TEXTS).tokens)
    cached = ours.encode(ids)
    flags = {"caption": torch.tensor([False, True])}
    assert torch.equal(ours.without(cached, flags).tokens, ours(TEXTS, flags).tokens)


def test_gradients_reach_an_embedding_through_a_frozen_encoder():
    ours = fill(clip(**CLIP))
    ours.transformer.tokens.weight.requires_grad_(True)  # textual inversion
    ours(TEXTS).tokens.sum().backward()
    assert ours.transformer.tokens.weight.grad.abs().sum() > 0
    assert ours.transformer.positions.grad is None


@pytest.mark.parametrize("make", [small_joint, small_t5, lambda: fill(clip(**CLIP))])
def test_an_encoder_built_without_memory_is_filled_by_assignment(make):
    ours, empty = make(), {small_t5: lambda: t5(**T5_NUMBERS), small_joint: lambda: joint_text(**JOINT)}.get(make)
    with torch.device("meta"):
        loaded = (empty or (lambda: clip(**CLIP)))()
    loaded.load_state_dict(ours.state_dict(), assign=True)
    loaded.use(from_json(ours.tokenizer.to_json()))
    assert torch.equal(loaded(TEXTS).tokens, ours(TEXTS).tokens)
    assert {p.requires_grad for p in loaded.parameters()} == {not ours.frozen}


# --------------------------------------------------------------------------------------------------- long prompts


@torch.no_grad()
def test_chunks_are_prompts_of_75_tokens_one_after_the_other():
    one, three = fill(clip(**CLIP)), fill(clip(**CLIP, chunks=3))
    ids = clip_tokenizer().encode(LONG)
    assert 75 < len(ids) <= 150
    parts = [clip_tokenizer().decode(part) for part in (ids[:75], ids[75:], [])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = three({"caption": [LONG, "a cube"]})
        apart = one({"caption": parts})
    assert whole.tokens.shape == (2, 231, 12)
    torch.testing.assert_close(whole.tokens[0], apart.tokens.flatten(0, 1))
    torch.testing.assert_close(whole.tokens[1, 77:154], one.null(1).tokens[0])
    torch.testing.assert_close(three.null(1).tokens[0], one.null(3).tokens.flatten(0, 1))
    pooled, first = (fill(clip(**CLIP, projection=6, chunks=chunks)) for chunks in (2, 1))
    torch.testing.assert_close(pooled({"caption": [LONG]}).pooled, first({"caption": parts[:1]}).pooled)


def test_what_is_cut_off_is_quoted():
    prompt = "word " * 75 + "Lost, in TRANSLATION"
    for chunks, room in ((1, 75), (2, 150)):
        ours = clip(**CLIP, chunks=chunks)
        text = "word " * (room - 75) + prompt
        with pytest.warns(UserWarning, match="truncated") as caught:
            ids = ours.tokenize(["fits", text])
        message = f"text truncated to {room} of {room + 4} tokens; lost: 'lost , in translation'"
        assert [str(warning.message) for warning in caught] == [message]
        assert ids.shape == (2, 77 * chunks)
        assert ids[1, -1] == 49407
    ours = small_joint()
    with pytest.warns(UserWarning, match=r"14 of 15 tokens; lost: 'cone'$"):
        ours.tokenize(["a red cube left of a blue ball left of a green cone blue cone"])


# -------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def published(tmp_path):
    """A CLIP text encoder in the forms in which one comes: a folder, an open_clip file, a single file."""
    ours = fill(clip(**CLIP), seed=3)
    states = {
        layout: write_text(ours.transformer.state_dict(), ours.transformer, layout) for layout in ("clip", "open_clip")
    }
    (tmp_path / "text_encoder").mkdir()
    save_file(states["clip"], tmp_path / "text_encoder" / "model.safetensors")
    tower = states["open_clip"] | {"visual.proj": torch.zeros(2), "logit_scale": torch.ones(())}
    save_file(tower, tmp_path / "open_clip_model.safetensors")
    single = {f"cond_stage_model.transformer.{name}": x for name, x in states["clip"].items()}
    save_file(single | {"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "single.safetensors")
    return tmp_path, ours


@pytest.mark.parametrize("where", ["text_encoder", "open_clip_model.safetensors", "single.safetensors"])
def test_weights_come_from_folders_and_files(published, where):
    folder, expected = published
    ours = clip(**CLIP, weights=str(folder / where))
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert ours.frozen


def test_random_weights_are_random():
    torch.manual_seed(0)
    first = clip(**CLIP, weights="random")
    torch.manual_seed(0)
    assert torch.equal(clip(**CLIP).transformer.positions, first.transformer.positions)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline hub whose cache holds one model."""
    cache = tmp_path / "hub"
    model = cache / "models--somebody--clip"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_model.safetensors"])
def test_a_hub_s_id_is_looked_up_in_its_cache(published, hub, name):
    folder, expected = published
    source = folder / ("text_encoder/model.safetensors" if name == "model.safetensors" else name)
    (hub / name).write_bytes(source.read_bytes())
    ours = clip(**CLIP, weights="somebody/clip")
    assert torch.equal(ours.transformer.positions, expected.transformer.positions)


def test_t5_comes_from_a_folder_with_its_tokenizer(tmp_path):
    ours = small_t5()
    t5_of(ours).save_pretrained(tmp_path)
    fast(unigram()).save_pretrained(tmp_path)
    again = t5(**T5_NUMBERS, weights=str(tmp_path))
    assert torch.equal(again(TEXTS).tokens, ours(TEXTS).tokens)
    t5_of(ours).bfloat16().save_pretrained(tmp_path / "half")
    fast(unigram()).save_pretrained(tmp_path / "half")
    assert {p.dtype for p in t5(**T5_NUMBERS, weights=str(tmp_path / "half")).parameters()} == {torch.float32}
    carried = t5(**T5_NUMBERS)  # as a checkpoint carries it: numbers, state, tokenizer
    carried.load_state_dict(again.state_dict())
    carried.use(from_json(again.tokenizer.to_json()))
    assert torch.equal(carried(TEXTS).tokens, ours(TEXTS).tokens)
    with pytest.raises(ValueError, match="weights") as error:
        t5(**{**T5_NUMBERS, "layers": 3}, weights=str(tmp_path))
    expected = f"weights: another T5; got num_layers = 2 in {tmp_path}; expected 3, as configured"
    assert str(error.value) == expected


def test_a_t5_that_lacks_a_weight_is_refused(tmp_path):
    state = t5_of(small_t5()).state_dict()
    t5_of(small_t5()).save_pretrained(tmp_path)
    fast(unigram()).save_pretrained(tmp_path)
    del state["encoder.final_layer_norm.weight"], state["encoder.embed_tokens.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = "missing tensors; got 1: encoder.final_layer_norm.weight; expected none; try another layout"
    assert refusal(lambda: t5(**T5_NUMBERS, weights=str(tmp_path))) == expected


def test_a_joint_encoder_comes_back_with_its_tokenizer():
    ours = small_joint()
    again = joint_text(**JOINT)
    again.load_state_dict(ours.state_dict())
    again.use(from_json(ours.tokenizer.to_json()))
    assert torch.equal(again(TEXTS).tokens, ours(TEXTS).tokens)


# ------------------------------------------------------------------------------------------------------ bad input


def refusal(call) -> str:
    with pytest.raises((ValueError, InputError, CheckpointError)) as error:
        call()
    return str(error.value)


def test_weights_that_are_not_there_are_refused(tmp_path, hub, monkeypatch):
    missing = f"{tmp_path}/none"
    expected = (
        f"weights: no such folder or file; got {missing}; expected a folder, a file, a Hub id or random; try random"
    )
    assert refusal(lambda: clip(**CLIP, weights=missing)) == expected
    assert refusal(lambda: clip(**CLIP, weights="./runs/clip")) == expected.replace(missing, "./runs/clip")
    said = refusal(lambda: clip(**CLIP, weights="nobody/clip"))
    assert said.startswith("weights: not found locally or on the Hub (nobody/clip); got Cannot reach ")
    assert said.endswith("; expected a file, a folder or an id of the Hub; try a folder that has the weights")
    expected = f"weights: none in the folder; got {tmp_path}; expected model.safetensors; try another folder"
    assert refusal(lambda: clip(**CLIP, weights=str(tmp_path))) == expected
    expected = f"weights: no such folder; got {missing}; expected a folder, a Hub id or random; try random"
    assert refusal(lambda: t5(**T5_NUMBERS, weights=missing)) == expected
    assert refusal(lambda: t5(**T5_NUMBERS, weights=str(tmp_path))).startswith(
        f"weights: cannot be read; got {tmp_path}: "
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # nobody asks a hub for a path or for nothing
    for weights in (None, "random"):
        clip(**CLIP, weights=weights)
    refusal(lambda: clip(**CLIP, weights=missing))


def test_weights_that_do_not_fit_are_refused(published, tmp_path):
    folder, _ = published
    file = str(folder / "text_encoder" / "model.safetensors")
    expected = f"the weights do not fit this text encoder ({folder}/text_encoder); got positions of shape (77, 12); "
    expected += "expected (77, 24); try the width, length and vocabulary of the weights"
    assert refusal(lambda: clip(**{**CLIP, "width": 24}, weights=str(folder / "text_encoder"))) == expected
    message = refusal(lambda: clip(**{**CLIP, "layers": 3}, weights=file))
    assert message.startswith("missing tensors; got 16: text_model.encoder.layers.2.layer_norm1.weight, ")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    message = refusal(lambda: clip(**CLIP, weights=str(tmp_path / "model.ckpt")))
    assert message.startswith(f"not a safetensors file ({tmp_path}/model.ckpt); got ")
    assert message.endswith("; try ldm convert")
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    expected = "no text encoder inside; got conv.weight; expected CLIP's, open_clip's or LDM's names"
    assert refusal(lambda: clip(**CLIP, weights=str(tmp_path / "other.safetensors"))) == expected


def test_texts_and_numbers_that_make_no_sense_are_refused(tmp_path):
    ours = clip(**CLIP)
    expected = "prompt: too long; got 50000 characters: 'word word word word word word word word '...; "
    expected += "expected at most 8192 characters; try a shorter one"
    assert refusal(lambda: ours({"caption": ["word " * 10_000]})) == expected
    expected = "caption: not a list of texts; got 'a cat'; expected a list of str; try [caption]"
    assert refusal(lambda: ours({"caption": "a cat"})) == expected
    expected = "caption: no tokenizer yet; try conditioner.tokenizer=FOLDER, or learning one from captions"
    assert refusal(lambda: joint_text(width=12, layers=1, heads=2)({"caption": ["a"]})) == expected
    expected = "vocabulary: smaller than the tokenizer's; got 520; expected 530 or more; try 530"
    assert (
        refusal(lambda: joint_text(width=12, layers=1, heads=2, vocabulary=520).use(BPE.train(CAPTIONS, 530)))
        == expected
    )
    expected = "projection: the end token must have the highest id; got 3; expected 7"
    assert refusal(lambda: small_joint(projection=4).use(bert(tmp_path))) == expected
    assert refusal(lambda: clip(**CLIP, length=2)) == "length: too short for a word; got 2; expected 3 or more; try 77"
    assert refusal(lambda: clip(**CLIP, chunks=0)) == "chunks: too small; got 0; expected 1 or more; try 1"
    assert refusal(lambda: clip(**{**CLIP, "heads": 0})) == "heads: too small; got 0; expected 1 or more; try 1"
    expected = "layers: too few, because the last layer is not used; got 1; expected 2 or more; try 24"
    assert refusal(lambda: open_clip(width=12, layers=1, heads=2)) == expected
    assert refusal(lambda: t5(**{**T5_NUMBERS, "length": 0})) == "length: too small; got 0; expected 1 or more; try 1"
