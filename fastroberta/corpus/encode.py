"""Documents -> tokens, with the positions where sentences and documents begin.

The tokens of a document are exactly `tokenizer.encode(document, add_special_tokens=False).ids`, followed by one `</s>`.
Line breaks, blank lines and indentation are text like any other. Special tokens that are written out in the text are
ordinary text too (`encode_special_tokens`). Only a Unigram model that has `</s>` among its own pieces still gives it;
that ends no document, because shards list where documents start.

Sentence bounds only decide where a training block may end. They are positions between tokens and never change a token,
so a rough rule is enough: a sentence ends at a line break, or after a character with Unicode's property
Sentence_Terminal and any closing quotes or brackets, if what follows looks like a new sentence. "Dr. Smith" is
therefore cut in two. Thai ends its sentences with a space, which could be any space: there, only line breaks count. The
white space between two sentences belongs to the first, except the blank that a byte-level token carries in front of its
word. A bound that would fall inside a token is dropped.

With `newlines="separator"` the tokens are those of fairseq's preprocessing, which RoBERTa was trained on: each line is
stripped, encoded on its own and closed by `</s>`, blank lines included, and a blank line (one more `</s>`) follows
each document.

Any tokenizer works; RoBERTa's kind of byte-level BPE is fast. It first splits text into pre-tokens (words with the blank
before them, numbers, runs of punctuation, runs of white space) and merges bytes only inside them, and most pre-tokens
recur. So NumPy finds all pre-tokens of about a megabyte of text at once, and their tokens are looked up in a hash table;
the tokenizer sees only pre-tokens that are new. Words with characters beyond ASCII are looked up whole. The hash has 64
bits: two of a million entries collide with a probability of 3e-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from .shards import token_dtype
from .tokenizer import is_roberta_bpe, special_token_ids, vocabulary_size

# Unicode's Sentence_Terminal in the Basic Multilingual Plane, beyond ASCII. The others belong to historic scripts, and a
# class of `re` that holds them is 15 times slower.
TERMINATORS = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b\u1362\u1367\u1368"
    "\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b4e\u1b4f\u1b5a\u1b5b\u1b5e\u1b5f"
    "\u1b7d-\u1b7f\u1c3b\u1c3c\u1c7e\u1c7f\u2024\u203c\u203d\u2047-\u2049\u2cf9-\u2cfb\u2e2e\u2e3c\u2e53\u2e54\u3002"
    "\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe12"
    "\ufe15\ufe16\ufe52\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)
# Letters that begin a sentence without a space before them: Devanagari, Thai, Myanmar, Ethiopic, Khmer, kana, Han,
# Hangul. These ranges are letters in every version of Unicode that a tokenizer may know, so a pre-token begins there.
UNSPACED = (
    "\u0905-\u0939\u0e01-\u0e30\u1000-\u1021\u1200-\u1248\u1780-\u17b3\u3041-\u3096\u30a1-\u30fa\u3400-\u4db5"
    "\u4e00-\u9fa5\uac00-\ud7a3"
)
_WIDE_CLOSING = "\u300d\u300f\uff09\u3011\u300b\u3009\u3015\uff3d\uff63"
_CLOSING = f"\"'\u2019\u201d\xbb)\\]{_WIDE_CLOSING}"
_OPENING = "\"'\u2018\u201c\xab(\\[\u300c\u300e\uff08\u3010\u300a\u3008\u3014\uff3b\uff62"
# Ends where a sentence starts. Python takes the separators U+001C to U+001F for white space, tokenizers do not.
_SENTENCE_START = re.compile(
    f"[.!?{TERMINATORS}][{_CLOSING}]*(?:"
    f"[^\\S\\n\\x1c-\\x1f]+(?=[{_OPENING}]*[^\\W_a-z])|(?=[{UNSPACED}])|(?<=[{TERMINATORS}{_WIDE_CLOSING}])(?=[0-9A-Za-z]))"
)
_LINE_START = re.compile("\n[^\\S\x1c-\x1f]*")
_BATCH_CHARACTERS = 1 << 20

# Kinds of bytes. White space comes first: blanks, which may belong to the word that follows, and all other.
_BLANK, _BREAK, _END, _LETTER, _DIGIT, _OTHER, _FOREIGN = range(7)
_KINDS = np.full(256, _OTHER, dtype=np.uint8)
_KINDS[0] = _END
_KINDS[32] = _BLANK
_KINDS[9:14] = _BREAK
_KINDS[[*range(65, 91), *range(97, 123)]] = _LETTER
_KINDS[48:58] = _DIGIT
_KINDS[128:] = _FOREIGN
_FOREIGN_BYTE = re.compile(b"[\x80-\xff]")
_WIDE_SPACES = np.array([0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000])
_LONGEST = 32  # bytes of a pre-token that is remembered
_HASHES = np.random.default_rng(0).integers(0, 2**64, (_LONGEST, 256), dtype=np.uint64)
_TABLE_BITS = 21
_MOST_ENTRIES = 1 << 20  # with more, all are forgotten before the next batch
_FULL = 3 << 19  # entries with which three quarters of the slots are taken


@dataclass
class EncodedDocuments:
    """Documents as `ShardWriter.append` takes them.

    tokens: uint16 or uint32; `</s>` ends each document. sentence_lengths: uint32, in tokens; the last sentence of a
    document counts its `</s>`. document_sentences: uint32, sentences of each document.
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_sentences: np.ndarray


class DocumentEncoder:
    """Encodes documents, exactly as the tokenizer does.

    Args:
        tokenizer: any; it is copied.
        split_sentences: cut sentences inside lines, rather than at line breaks only.
        newlines: `keep`, or `separator` for fairseq's format.
    """

    def __init__(self, tokenizer: Tokenizer, *, split_sentences: bool, newlines: Literal["keep", "separator"] = "keep"):
        self._split_sentences = split_sentences
        self._newlines = newlines
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._dtype = token_dtype(vocabulary_size(tokenizer))
        self._eos = special_token_ids(tokenizer).eos
        self._pre_tokens = _PreTokens(self._tokenizer, self._dtype, self._eos) if is_roberta_bpe(tokenizer) else None

    def encode(self, documents: Iterable[str]) -> EncodedDocuments:
        """Encode documents, taken one by one."""
        if self._newlines == "keep":
            return self._encode(documents)
        counts: list[int] = []

        def split() -> Iterator[str]:
            for document in documents:
                lines = split_lines(document)
                counts.append(len(lines) + 1)
                yield from lines
                yield ""

        encoded = self._encode(split())
        if counts:
            lines = np.array(counts, dtype=np.int64)
            firsts = np.cumsum(lines) - lines
            encoded.document_sentences = np.add.reduceat(encoded.document_sentences, firsts, dtype=np.uint32)
        return encoded

    def _encode(self, documents: Iterable[str]) -> EncodedDocuments:
        parts: list[EncodedDocuments] = []
        batch: list[str] = []
        size = 0
        for document in documents:
            is_plain = self._pre_tokens is not None and _is_plain(document)
            if batch and (not is_plain or size >= _BATCH_CHARACTERS):
                parts.append(self._encode_plain(batch))
                batch, size = [], 0
            if is_plain:
                batch.append(document)
                size += len(document)
            else:
                parts.append(self._encode_any(document))
        if batch:
            parts.append(self._encode_plain(batch))
        if not parts:
            return EncodedDocuments(np.zeros(0, self._dtype), np.zeros(0, np.uint32), np.zeros(0, np.uint32))
        return EncodedDocuments(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts))))

    def _encode_any(self, document: str) -> EncodedDocuments:
        """One document with the tokenizer itself."""
        encoding = self._tokenizer.encode(document, add_special_tokens=False)
        tokens = np.array([*encoding.ids, self._eos], dtype=self._dtype)
        bounds = [0]
        starts = sorted([match.end() for match in _LINE_START.finditer(document)] + self._find_starts(document))
        if starts and len(encoding):
            # Offsets decide only where a sentence may be cut, for they are not to be trusted: tokens share characters,
            # and normalizers and trimming move them. The token of a sentence's first character is the first that ends
            # after it; if it also holds something of the sentence before, there is no bound.
            offsets = np.array(encoding.offsets, dtype=np.int64)
            found = np.searchsorted(np.maximum.accumulate(offsets[:, 1]), starts, side="right")
            bounds += [
                token
                for start, token in zip(starts, found.tolist())
                if token < len(offsets) and not document[offsets[token, 0] : start].strip()
            ]
        return _cut(tokens, np.array(bounds), np.array([len(tokens)]))

    def _encode_plain(self, documents: list[str]) -> EncodedDocuments:
        """Plain documents with the hash table, all at once; a NUL follows each."""
        joined = "\0".join([*documents, ""])
        text = np.frombuffer(joined.encode(), dtype=np.uint8)
        kinds = _find_kinds(text)
        starts = np.array(self._find_starts(joined), dtype=np.int64)
        if len(text) != len(joined):  # characters -> bytes
            starts = np.flatnonzero((text & 0xC0) != 0x80)[starts]
        units = find_pre_tokens(text, kinds, starts)
        assert self._pre_tokens is not None
        tokens, token_starts = self._pre_tokens.look_up(text, units)
        # A line starts with the first character after the line break that is no space.
        is_space = kinds <= _BREAK
        words = np.flatnonzero(is_space[:-1] & ~is_space[1:]) + 1
        starts = np.concatenate([starts, words[np.searchsorted(words, np.flatnonzero(text == 10))]])
        ends = np.searchsorted(units, np.flatnonzero(text == 0))
        bounds = token_starts[np.searchsorted(units, starts, side="right") - 1]
        return _cut(tokens, np.concatenate([[0], token_starts[ends[:-1] + 1], bounds]), token_starts[ends] + 1)

    def _find_starts(self, text: str) -> list[int]:
        return find_sentence_starts(text) if self._split_sentences else []


def split_lines(document: str) -> list[str]:
    """The lines of a document as `newlines="separator"` encodes them."""
    return [line.strip() for line in document.split("\n")]


def find_sentence_starts(text: str) -> list[int]:
    """Where sentences start inside lines: the position of each one's first character."""
    return [match.end() for match in _SENTENCE_START.finditer(text)]


def _cut(tokens: np.ndarray, sentence_starts: np.ndarray, document_ends: np.ndarray) -> EncodedDocuments:
    """Encoded documents, from positions in their tokens; those of sentences may be in any order, and repeated."""
    sentence_starts = np.unique(sentence_starts)
    return EncodedDocuments(
        tokens,
        np.diff(sentence_starts, append=len(tokens)).astype(np.uint32),
        np.diff(np.searchsorted(sentence_starts, document_ends), prepend=0).astype(np.uint32),
    )


def _is_plain(document: str) -> bool:
    """Whether `find_pre_tokens` is right for a text, and a NUL can stand for its end."""
    return "\0" not in document and not document[-1:].isspace()


def _find_kinds(text: np.ndarray) -> np.ndarray:
    """The kind of each byte of UTF-8; all bytes of a white-space character are `_BREAK`."""
    kinds = _KINDS[text]
    at = np.flatnonzero(text[:-2] >= 0xC2)  # a NUL follows the last character
    first, second, third = (text[at + i].astype(np.int32) for i in range(3))
    short = (first & 0x1F) << 6 | (second & 0x3F)
    is_long = first >= 0xE0
    points = np.where(is_long, (short & 0x3FF) << 6 | (third & 0x3F), short)
    is_wide = np.isin(points, _WIDE_SPACES) & (first < 0xF0)
    at, is_long = at[is_wide], is_long[is_wide]
    for places in (at, at + 1, at[is_long] + 2):
        kinds[places] = _BREAK
    return kinds


def find_pre_tokens(text: np.ndarray, kinds: np.ndarray, sentence_starts: np.ndarray) -> np.ndarray:
    """Where RoBERTa's pre-tokens start in plain text.

    Its pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?letters| ?digits| ?others|\\s+(?!\\S)|\\s+`: of a run of white space
    before a word, the last character is set apart, and if that is a blank, it belongs to the word. Words with
    foreign bytes stay whole, for the tokenizer to split, but are cut where a sentence starts.

    Args:
        text: uint8, UTF-8, a NUL after each document. kinds: of its bytes, same shape.
        sentence_starts: int64, bytes where `find_sentence_starts` found a sentence.
    Returns:
        int64, increasing.
    """
    before = np.empty_like(kinds)
    before[:1], before[1:] = _END, kinds[:-1]
    is_space = kinds <= _BREAK
    is_boundary = (kinds != before) & (before > _BREAK)
    is_boundary |= kinds == _END
    # After a break, and at the last space of a run; of a wide space that is its first byte.
    is_hard = (before == _BREAK) & ~is_space
    is_last = is_space[:-1] & ~is_space[1:]
    lasts = np.flatnonzero(is_last & (text[:-1] >= 0x80))
    is_last[lasts] = False
    is_last[lasts - np.where(text[lasts - 1] >= 0xC2, 1, 2)] = True
    is_hard[:-1] |= is_last
    is_start = is_boundary | is_hard
    if (kinds == _FOREIGN).any():
        is_hard |= is_boundary & ((kinds <= _END) | (before <= _END))
        is_hard[sentence_starts[text[sentence_starts - 1] != 32]] = True
        at = np.flatnonzero(is_hard)
        is_foreign = np.maximum.reduceat(kinds, at) == _FOREIGN
        is_start &= is_hard | ~np.repeat(is_foreign, np.diff(at, append=len(text)))
        is_start |= is_hard
    # A contraction is an apostrophe that begins a pre-token, and the letters after it.
    apostrophes = np.flatnonzero(is_start & (text == ord("'")))
    following = np.append(text, np.zeros(2, dtype=np.uint8))
    first, second = following[apostrophes + 1], following[apostrophes + 2]
    is_short = np.isin(first, np.frombuffer(b"stmd", dtype=np.uint8))
    is_long = np.zeros(len(apostrophes), dtype=bool)
    for a, b in (b"re", b"ve", b"ll"):
        is_long |= (first == a) & (second == b)
    is_start[apostrophes[is_short | is_long] + 1] = False
    is_start[apostrophes[is_short] + 2] = True
    is_start[apostrophes[is_long] + 3] = True
    return np.flatnonzero(is_start)


class _PreTokens:
    """A hash table of pre-tokens and their tokens, in arrays: open addressing with linear probing."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, eos: int):
        self._tokenizer = tokenizer
        self._merge = tokenizer.model.tokenize
        self._dtype, self._eos = dtype, eos
        # The letter that stands for each byte: itself where it is visible, otherwise the next from U+0100.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        visible = [letter for letter in alphabet if ord(letter) < 256]
        self._letters = dict(zip(sorted(set(range(256)) - set(map(ord, visible))), alphabet[len(visible) :]))
        self._forget()

    def _forget(self) -> None:
        self._hashes = np.zeros(1 << _TABLE_BITS, dtype=np.uint64)  # 0: a free slot
        self._entries = np.zeros(1 << _TABLE_BITS, dtype=np.int32)
        self._offsets = np.zeros(0, dtype=np.int64)  # of each entry, in the pool of tokens
        self._counts = np.zeros(0, dtype=np.int64)
        self._pool = np.zeros(0, dtype=self._dtype)

    def look_up(self, text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all pre-tokens, one after another, and where each one's begin."""
        if not len(starts):
            return np.zeros(0, dtype=self._dtype), np.zeros(0, dtype=np.int64)
        if len(self._offsets) > _MOST_ENTRIES:
            self._forget()
        lengths = np.diff(starts, append=len(text))
        place = np.arange(len(text), dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
        place &= _LONGEST - 1
        place <<= 8
        place |= text
        hashes = np.add.reduceat(_HASHES.ravel()[place], starts)
        # What is too long to be remembered gets an entry of its own each time; 0 stands for a free slot.
        is_long = np.flatnonzero(lengths > _LONGEST)
        hashes |= hashes == 0
        entries = self._find(hashes)
        is_new = entries < 0
        is_new[is_long] = False
        where = np.flatnonzero(is_new)
        new_hashes, first, group = np.unique(hashes[where], return_index=True, return_inverse=True)
        learned = len(self._offsets)
        raw = text.tobytes()
        units = [raw[starts[i] : starts[i] + lengths[i]] for i in (*where[first], *is_long)]
        self._learn(units)
        # A long document without a word twice could fill the table, and looking for a free slot would never end.
        if learned + len(new_hashes) <= _FULL:
            self._insert(new_hashes, learned)
        entries[where] = learned + group
        entries[is_long] = learned + len(new_hashes) + np.arange(len(is_long))
        counts = self._counts[entries]
        ends = np.cumsum(counts)
        token_starts = ends - counts
        source = np.repeat(self._offsets[entries] - token_starts, counts) + np.arange(ends[-1])
        return self._pool[source], token_starts

    def _find(self, hashes: np.ndarray) -> np.ndarray:
        """The entry of each hash, -1 where there is none."""
        slots = hashes & np.uint64((1 << _TABLE_BITS) - 1)
        found = self._hashes[slots]
        entries = np.where(found == hashes, self._entries[slots], -1)
        rest = np.flatnonzero((found != hashes) & (found != 0))
        while len(rest):
            slots[rest] = (slots[rest] + np.uint64(1)) & np.uint64((1 << _TABLE_BITS) - 1)
            found = self._hashes[slots[rest]]
            is_equal = found == hashes[rest]
            entries[rest[is_equal]] = self._entries[slots[rest[is_equal]]]
            rest = rest[~is_equal & (found != 0)]
        return entries

    def _insert(self, hashes: np.ndarray, first_entry: int) -> None:
        """Give hashes that are not in the table the entries from `first_entry` on."""
        slots = hashes & np.uint64((1 << _TABLE_BITS) - 1)
        rest = np.arange(len(hashes))
        while len(rest):
            free = rest[self._hashes[slots[rest]] == 0]
            self._hashes[slots[free]] = hashes[free]  # of several for one slot the last stays
            placed = self._hashes[slots[rest]] == hashes[rest]
            self._entries[slots[rest[placed]]] = first_entry + rest[placed]
            rest = rest[~placed]
            slots[rest] = (slots[rest] + np.uint64(1)) & np.uint64((1 << _TABLE_BITS) - 1)

    def _learn(self, units: list[bytes]) -> None:
        """Append an entry for each pre-token or foreign word."""
        is_foreign = [bool(_FOREIGN_BYTE.search(unit)) for unit in units]
        foreign = [unit.decode() for unit, flag in zip(units, is_foreign) if flag]
        encodings = iter(self._tokenizer.encode_batch_fast(foreign, add_special_tokens=False))
        tokens: list[int] = []
        counts = []
        for unit, flag in zip(units, is_foreign):
            if flag:
                ids = next(encodings).ids
            elif unit == b"\0":
                ids = [self._eos]
            else:
                ids = [token.id for token in self._merge(unit.decode().translate(self._letters))]
            tokens += ids
            counts.append(len(ids))
        added = np.array(counts, dtype=np.int64)
        self._offsets = np.concatenate([self._offsets, len(self._pool) + np.cumsum(added) - added])
        self._counts = np.concatenate([self._counts, added])
        self._pool = np.concatenate([self._pool, np.array(tokens, dtype=self._dtype)])
