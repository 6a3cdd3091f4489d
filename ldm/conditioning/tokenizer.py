"""Text to token ids and back: CLIP's byte-level BPE, one trained on captions, and those of `tokenizers`."""

from __future__ import annotations

import gzip
import heapq
import html
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from ldm.errors import InputError

Merge = tuple[str, str]
LONGEST = 8192  # characters of one text; a caption has hundreds
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's, without special tokens
SPECIALS = {  # common names of the special tokens
    "start": ("<|startoftext|>", "[CLS]"),
    "end": ("<|endoftext|>", "[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
}


class Tokenizer(Protocol):
    """The interface of a tokenizer; `start` is None if texts have no start token."""

    start: int | None
    end: int
    pad: int
    size: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def to_json(self) -> str:
        """All that `from_json` needs."""


@cache
def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself if it is visible, else one from 256 on; in the vocabulary's order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


def clean(text: str) -> str:
    """CLIP's normal form: repaired encoding, HTML entities resolved, single spaces, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def check_length(text: str) -> None:
    """Refuse texts far longer than a caption, before they take time."""
    if len(text) > LONGEST:
        got, expected = f"{len(text)} characters: {text[:40]!r}...", f"at most {LONGEST} characters"
        raise InputError("prompt: too long", got=got, expected=expected, hint="a shorter one")


def words(text: str) -> list[str]:
    """The pieces of a cleaned text that tokens do not cross, as byte letters."""
    import regex

    check_length(text)
    letters = byte_letters()
    found = regex.findall(WORDS, clean(text), regex.IGNORECASE)
    return ["".join(letters[byte] for byte in word.encode("utf-8", "replace")) for word in found]


class BPE:
    """CLIP's byte-pair encoding (Sennrich et al., 2016) over the bytes of words, so that no character is unknown.

    The ids are 256 byte letters, the same at the end of a word, one per merge, start and end.
    """

    def __init__(self, merges: Sequence[Merge], vocabulary: dict[str, int] | None = None, pad: int | None = None):
        self.merges = [(first, second) for first, second in merges]
        self.ranks = {merge: rank for rank, merge in enumerate(self.merges)}
        self.vocabulary = vocabulary
        if vocabulary is None:
            letters = list(byte_letters().values())
            tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in self.merges)]
            tokens += [SPECIALS["start"][0], SPECIALS["end"][0]]
            vocabulary = {token: number for number, token in enumerate(tokens)}
        self.ids, self.tokens = vocabulary, {number: token for token, number in vocabulary.items()}
        self.start: int | None = vocabulary[SPECIALS["start"][0]]
        self.end = vocabulary[SPECIALS["end"][0]]
        self.pad = self.end if pad is None else pad
        self.size = max(self.tokens) + 1
        self.cache: dict[str, list[int]] = {}  # of words

    @staticmethod
    def train(captions: Iterable[str], size: int) -> BPE:
        """Train on captions: merge the most frequent pair until there are `size` ids or no pair occurs twice."""
        least = 2 * len(byte_letters()) + 2
        if size < least:
            raise ValueError(f"vocabulary: too small; got {size}; expected {least} or more; try 2048")
        return BPE(learn_merges(Counter(word for caption in captions for word in words(caption)), size - least))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        return [number for word in words(text) for number in self.word(word)]

    def word(self, word: str) -> list[int]:
        """The ids of one word in byte letters: the earliest merge first."""
        if word not in self.cache:
            parts = split(word)
            while len(parts) > 1:
                best = min(pairwise(parts), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
                if best not in self.ranks:
                    break
                parts = merge(parts, best)
            self.cache[word] = [self.ids.get(part, self.end) for part in parts]
        return self.cache[word]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end token, with spaces between words."""
        ids = [number for number in ids if number != self.start]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        text = "".join(self.tokens[number] for number in ids).replace("</w>", " ")
        return bytes(b for c in text for b in ([bytes_of[c]] if c != " " else b" ")).decode("utf-8", "replace").strip()

    def to_json(self) -> str:
        """The merges, and the ids if their order differs; only the name for CLIP's, which open_clip has."""
        if self.vocabulary is None and self.merges == clip_merges():
            return json.dumps({"type": "clip", "pad": self.pad})
        return json.dumps({"type": "bpe", "merges": self.merges, "vocabulary": self.vocabulary, "pad": self.pad})


def split(word: str) -> tuple[str, ...]:
    """A word's byte letters; the last one has the mark of the end."""
    return (*word[:-1], f"{word[-1]}</w>")


def merge(parts: tuple[str, ...], pair: Merge) -> tuple[str, ...]:
    """Join each occurrence of a pair in the parts of a word, from the left."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def learn_merges(counts: Mapping[str, int], most: int) -> list[Merge]:
    """Up to `most` merges, each of the most frequent pair at that point; ties go by alphabet."""
    pieces = {word: split(word) for word in counts}
    pairs: Counter[Merge] = Counter()
    holders: dict[Merge, set[str]] = defaultdict(set)

    def count(word: str, times: int) -> set[Merge]:
        """Add a word's pairs to the counts, or remove them."""
        found = list(pairwise(pieces[word]))
        for pair in found:
            pairs[pair] += times
            holders[pair].add(word)
        return set(found)

    changed = {pair for word in counts for pair in count(word, counts[word])}
    heap = [(-pairs[pair], pair) for pair in changed]
    heapq.heapify(heap)
    merges: list[Merge] = []
    while heap and len(merges) < most:
        times, best = heapq.heappop(heap)
        if -times != pairs[best]:  # an outdated count
            continue
        if -times < 2:
            break
        merges.append(best)
        changed = set()
        for word in holders.pop(best):
            changed |= count(word, -counts[word])
            pieces[word] = merge(pieces[word], best)
            changed |= count(word, counts[word])
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges


@cache
def clip_merges() -> list[Merge]:
    """CLIP's 48,894 merges from the file in open_clip's wheel, without the slow import of open_clip."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise InputError("CLIP's vocabulary not found", got="no open_clip", hint="pip install open_clip_torch")
    lines = gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    first, last = 1, 49152 - 256 - 2 + 1  # without the header, and without the merges that CLIP does not use
    return [(a, b) for a, b in (line.split() for line in lines.split("\n")[first:last])]


@cache
def clip_tokenizer(pad: int | None = None) -> BPE:
    """CLIP's tokenizer; `pad` is its end token by default (SD 1), or 0 (open_clip, SD 2)."""
    return BPE(clip_merges(), pad=pad)


class Foreign:
    """A tokenizer in the format of the `tokenizers` package, such as BERT's WordPiece or T5's Unigram."""

    def __init__(self, text: str):
        from tokenizers import Tokenizer as Backend

        self.backend = Backend.from_str(text)
        self.backend.no_padding()
        self.backend.no_truncation()
        ids = {role: [self.backend.token_to_id(name) for name in names] for role, names in SPECIALS.items()}
        found = {role: [number for number in numbers if number is not None] for role, numbers in ids.items()}
        if not found["end"]:
            expected = f"one of {', '.join(SPECIALS['end'])}"
            raise InputError("tokenizer: no end token", got="none of its names", expected=expected)
        self.start: int | None = found["start"][0] if found["start"] else None
        self.end: int = found["end"][0]
        self.pad: int = found["pad"][0] if found["pad"] else self.end
        self.size: int = self.backend.get_vocab_size()
        added = self.backend.get_added_tokens_decoder().values()
        self.specials = {token.content for token in added if token.special} | {
            n for names in SPECIALS.values() for n in names
        }

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        check_length(text)
        for name in self.specials:  # special tokens in a prompt are plain text
            text = text.replace(name, f"{name[:1]} {name[1:]}")
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.backend.decode(list(ids))

    def to_json(self) -> str:
        """The package's JSON inside ours."""
        return json.dumps({"type": "foreign", "tokenizer": self.backend.to_str()})


def from_checkpoint(stored: str) -> Tokenizer:
    """A checkpoint's tokenizer: JSON in a file of ours, a folder beside a diffusers model."""
    return from_json(stored) if stored.startswith("{") else from_folder(stored)


def from_json(text: str) -> Tokenizer:
    """The tokenizer of `to_json`'s text."""
    node = json.loads(text)
    if node["type"] == "clip":
        return clip_tokenizer(node["pad"])
    if node["type"] == "foreign":
        return Foreign(node["tokenizer"])
    return BPE([(a, b) for a, b in node["merges"]], node["vocabulary"], node["pad"])


def from_folder(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder written by transformers: a BPE for CLIP's kind, a Foreign for others."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            "tokenizer: no such folder", got=str(folder), expected="a folder with vocab.json or tokenizer.json"
        )
    try:
        return read_folder(folder)
    except InputError:
        raise
    except Exception as error:  # damaged JSON, other files, or an error of `tokenizers`
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError("tokenizer: cannot be read", str(folder), got, "undamaged files") from error


def read_folder(folder: Path) -> Tokenizer:
    """The tokenizer from a folder's files."""
    if (folder / "tokenizer.json").is_file():
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        model = json.loads(text)["model"]
        if model.get("end_of_word_suffix") != "</w>":
            return Foreign(text)
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        return BPE([(a, b) for a, b in pairs], model["vocab"], folder_pad(folder, model["vocab"]))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = (line.split() for line in lines if line.strip() and not line.startswith("#version"))
        return BPE([(a, b) for a, b in pairs], vocabulary, folder_pad(folder, vocabulary))
    from transformers import AutoTokenizer

    return Foreign(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str())


def folder_pad(folder: Path, vocabulary: dict[str, int]) -> int | None:
    """The padding id in the folder's settings: CLIP's end token in SD 1, "!" in SD 2."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            pad = settings.get("pad_token")
            pad = pad["content"] if isinstance(pad, dict) else pad
            if pad in vocabulary:
                return vocabulary[pad]
    return None
