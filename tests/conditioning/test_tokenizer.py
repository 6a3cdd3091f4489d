"""Tokenizers: CLIP's beside open_clip's and transformers', the small BPE, and those of others."""

import json
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer, models
from transformers import BertTokenizerFast, CLIPTokenizer

from ldm.conditioning import tokenizer
from ldm.conditioning.tokenizer import BPE, Foreign, clip_tokenizer, from_folder, from_json
from ldm.errors import InputError
from tests.conditioning.conditions import unigram

PIECES = """a photo of a cat|A CAT|two dogs, one ball|don't|it's|we've|they'll|I'd|I'm|you're|'tis
o'clock|rock'n'roll|it's's|''s
3.14|1,000,000|2026-11-21|H2O|½ cup|x² + y²|Ⅷ|٣٤٥|१२३|c3po & r2d2|10k|0|007|1st 2nd 3rd|3D-printed|mp3.wav
naïve café|Ångström|Zoë’s|“quoted”|‘single’|en–dash|em—dash|ellipsis…|ﬁne ﬂow|STRASSE straße|İstanbul|ΣΊΣΥΦΟΣ|Ǆ
日本語|中文字符|한국어|ไทย|हिन्दी|العربية|עברית|русский|ελληνικά|ქართული|Việt Nam|𝔘𝔫𝔦𝔠𝔬𝔡𝔢|ＦＵＬＬ　ＷＩＤＴＨ|𐍈|ا‌ب
🙂|👩‍👩‍👧‍👦|🏳️‍🌈|👍🏽|🇩🇪|❤️|☃|→ ← ↑|♪♫|©®™|€£¥|°C|№ 5|🙂🙂🙂|a🙂b
&amp;|&lt;b&gt;|&amp;amp;|&quot;x&quot;|&#39;s|&#x1F600;|<b>bold</b>|<br/>|<!-- no -->|&nbsp;x|&copy; 2026|a&b
&unknown;|<i> &amp;amp; x
!!!|?!|...|--|___|a_b|#hashtag|@user|http://example.com/a?b=c|x@y.z|50%|$5|(brackets)|[x]|{y}|a/b
back\\slash|~|`|^|*|+|=|<|>|| |
tab\there|line\nbreak|  many   spaces  |trailing |\u00a0nbsp\u00a0|zero\u200bwidth|soft\u00adhyphen
\ufeffbom|nul\x00nul|bell\x07
e\u0301|n\u0303|\u0301|a\u0308\u0323|\u1e9b\u0323|K (kelvin \u212a)|\u017f long s|'\u017f|\u2028
\ud7a3|\U0010ffff|\ufffd
supercalifragilisticexpialidocious|antidisestablishmentarianism|aaaaaaaaaaaaaaaaaaaaaaaa|qzxwvk
Pneumonoultramicroscopic|CamelCaseWord
schÃ¶n|âœ” mojibake|cafÃ©|donâ€™t|Ã¤Ã¶Ã¼|l'été|d'Artagnan|O’Brien|rock ’n’ roll|<|startoftext|endoftext|>"""
STRINGS = [piece for line in PIECES.split("\n") for piece in line.replace("\\t", "\t").replace("\\n", "\n").split("|")]
STRINGS += [f"{a} {b}" for a, b in zip(STRINGS, STRINGS[7:])] + [
    "",
    " ",
    "word " * 200,
    "x" * 500,
    "日" * 300,
    "🙂" * 100,
]
THEIRS = SimpleTokenizer()


@pytest.fixture(scope="module")
def hugging_face():
    """transformers' CLIP tokenizer with the same vocabulary."""
    vocabulary = dict(THEIRS.encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    return CLIPTokenizer(vocab=vocabulary, merges=list(THEIRS.bpe_ranks))


def test_clip_s_ids_are_those_of_open_clip_and_of_transformers(hugging_face):
    ours, agreed = clip_tokenizer(), 0
    for text in STRINGS:
        theirs, others = THEIRS.encode(text), hugging_face(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == theirs, text
        agreed += theirs == others and text.strip() != ""
    assert agreed >= 200
    assert (ours.start, ours.end, ours.size) == (49406, 49407, 49408)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(max_size=30))
def test_any_text_has_open_clip_s_ids(text):
    assert clip_tokenizer().encode(text) == THEIRS.encode(text)


@pytest.mark.parametrize("special", ["<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>"])
def test_special_tokens_in_a_prompt_are_text(special):
    ids = clip_tokenizer().encode(f"a cat {special} a dog")
    assert not {49406, 49407} & set(ids)
    assert ids[:2] == [320, 2368]
    assert ids[-2:] == [320, 1929]


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)])
def test_clip_s_words_without_open_clip(found, monkeypatch):
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: found)
    with pytest.raises(InputError, match=r"^CLIP's vocabulary not found; got no open_clip; try pip install open_clip"):
        tokenizer.clip_merges.__wrapped__()


def test_ids_become_text_again():
    ours = clip_tokenizer()
    for text in STRINGS:
        ids = ours.encode(text)
        assert ours.decode(ids) == THEIRS.decode(ids).strip()
    ids = [ours.start, *ours.encode("A  photo, of TWO cats"), ours.end, ours.end]
    assert ours.decode(ids) == "a photo , of two cats"


def test_clip_s_tokenizer_needs_neither_open_clip_nor_torch():
    code = "import sys; from ldm.conditioning.tokenizer import clip_tokenizer as c; print(c().encode('cat'), "
    code += "{'open_clip', 'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[2368] set()\n"


# ------------------------------------------------------------------------------------------------- the small BPE

COLOURS, SHAPES = ["red", "green", "blue", "yellow"], ["cube", "ball", "cone"]
CAPTIONS = [f"a {a} {b} left of a {c} {d}" for a in COLOURS for b in SHAPES for c in COLOURS for d in SHAPES]


def naive_merges(texts: list[str], most: int) -> list[tuple[str, str]]:
    """Every pair counted anew before each merge."""
    words = [[*word[:-1], word[-1] + "</w>"] for text in texts for word in text.split()]
    merges = []
    while len(merges) < most:
        counts = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            return merges
        merges.append(best)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return merges


@pytest.mark.parametrize(
    "texts", [CAPTIONS, ["aaaa aaa aa a", "abab ababab", "banana bandana ananas"], ["mississippi miss ssss"] * 2]
)
def test_learned_merges_are_those_of_counting_anew(texts):
    assert BPE.train(texts, 600).merges == naive_merges(texts, 600 - 514)


def test_a_small_vocabulary_is_learned_the_same_each_time_and_comes_back_from_json():
    first, again = BPE.train(CAPTIONS, 540), BPE.train(reversed(CAPTIONS), 540)
    assert first.merges == again.merges
    assert first.size == 540
    assert (first.start, first.end) == (538, 539)
    back = from_json(first.to_json())
    for text in [*CAPTIONS, *STRINGS]:
        assert back.encode(text) == first.encode(text)
    assert (back.start, back.end, back.pad, back.size) == (first.start, first.end, first.pad, first.size)
    whole = BPE.train(CAPTIONS, 600)
    words = ["a", "red", "cube", "left", "of", "a", "blue", "ball"]
    assert whole.encode(" ".join(words)) == [whole.ids[f"{word}</w>"] for word in words]


def test_no_character_is_unknown_and_nothing_is_lost():
    small = BPE.train(CAPTIONS, 540)
    for text in ["日本語 🙂 ß", "zebra xylophone", "a purple dodecahedron", "crème brûlée"]:
        assert small.decode(small.encode(text)) == text
    for text in STRINGS:
        ids = small.encode(text)
        assert small.encode(small.decode(ids)) == ids or "&" in text  # decoding may put HTML together that was apart
        assert all(0 <= number < small.start for number in ids)


def test_clip_is_carried_by_name():
    ours = clip_tokenizer(0)
    assert ours.to_json() == '{"type": "clip", "pad": 0}'
    assert from_json(ours.to_json()) is ours
    assert clip_tokenizer().pad == 49407


# ---------------------------------------------------------------------------------------- tokenizers of others


@pytest.mark.parametrize(("pad", "number"), [("<|endoftext|>", 49407), ("!", 0)])
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_a_folder_of_transformers_gives_the_same_ids(tmp_path, hugging_face, files, pad, number):
    hugging_face.save_pretrained(tmp_path)
    if files == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(hugging_face.get_vocab()), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in THEIRS.bpe_ranks), ""]
        (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}), encoding="utf-8")
    ours = from_folder(tmp_path)
    for text in STRINGS[:150]:
        assert ours.encode(text) == THEIRS.encode(text)
    assert (ours.start, ours.end, ours.pad) == (49406, 49407, number)
    back = from_json(ours.to_json())
    assert back.encode(STRINGS[20]) == ours.encode(STRINGS[20])
    assert back.pad == number


def test_a_small_clip_folder_with_ids_of_its_own(tmp_path):
    vocabulary = {
        "<|startoftext|>": 7,
        "<|endoftext|>": 8,
        "!": 0,
        "a": 1,
        "c": 2,
        "t</w>": 3,
        "ca": 4,
        "cat</w>": 5,
        "a</w>": 6,
    }
    CLIPTokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t</w>")]).save_pretrained(tmp_path)
    ours = from_folder(tmp_path)
    assert ours.encode("a cat") == [6, 5]
    assert ours.encode("zat") == [8, 1, 3]  # what is not in the vocabulary is its end token, as in transformers
    assert from_json(ours.to_json()).encode("a cat") == [6, 5]


def bert(folder) -> BertTokenizerFast:
    """A little BERT tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "##s", "[", "]", "sep", ",", "pad"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})


def test_bert_s_word_pieces(tmp_path):
    theirs = bert(tmp_path)
    theirs.save_pretrained(tmp_path)
    ours = from_folder(tmp_path)
    assert (ours.start, ours.end, ours.pad, ours.size) == (2, 3, 0, 14)
    for text in ["a red cube", "A RED, cubes", "", "unheard of"]:
        assert [2, *ours.encode(text), 3] == theirs(text)["input_ids"]
    assert ours.encode("a [SEP] cube") == [5, 9, 11, 10, 7]
    assert from_json(ours.to_json()).encode("red cubes") == [6, 7, 8]
    assert ours.decode([6, 7]) == "red cube"


def test_t5_s_unigram():
    theirs = unigram()
    ours = from_json(Foreign(theirs.to_str()).to_json())
    assert (ours.start, ours.end, ours.pad) == (None, 1, 0)
    assert ours.encode("a red cube") == theirs.encode("a red cube").ids == [3, 4, 5]
    assert {0, 1} <= set(theirs.encode("a </s> <pad>").ids)
    assert not {0, 1} & set(ours.encode("a </s> <pad> <pad>"))


# ------------------------------------------------------------------------------------------------------ bad input


def refusal(call, kind=InputError) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def test_what_cannot_be_read_is_refused(tmp_path):
    long = "word " * 10_000
    expected = "prompt: too long; got 50000 characters: 'word word word word word word word word '...; "
    expected += "expected at most 8192 characters; try a shorter one"
    assert refusal(lambda: clip_tokenizer().encode(long)) == expected
    assert refusal(lambda: Foreign(unigram().to_str()).encode(long)) == expected
    expected = "vocabulary: too small; got 100; expected 514 or more; try 2048"
    assert refusal(lambda: BPE.train(CAPTIONS, 100), ValueError) == expected
    expected = f"tokenizer: no such folder; got {tmp_path}/none; expected a folder with vocab.json or tokenizer.json"
    assert refusal(lambda: from_folder(tmp_path / "none")) == expected
    assert refusal(lambda: from_folder(tmp_path)).startswith(f"tokenizer: cannot be read ({tmp_path}); got ")
    for number, (name, text) in enumerate(
        [("tokenizer.json", '{"model"'), ("tokenizer.json", "{}"), ("vocab.json", "{}")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "merges.txt").write_text("a b\n")
        assert refusal(lambda at=folder: from_folder(at)).startswith(f"tokenizer: cannot be read ({folder}); got ")
    endless = Tokenizer(models.Unigram([("a", 0.0)], unk_id=0))
    expected = "tokenizer: no end token; got none of its names; expected one of <|endoftext|>, [SEP], </s>"
    assert refusal(lambda: Foreign(endless.to_str())) == expected
