"""Documents -> tokens, with the bounds of sentences and documents.

A document is its lines, stripped; blank ones are dropped. Each line is tokenized as it stands and nothing stands for
the line end, as fairseq does with its one text a line. Lines are cut into sentences, which keep the space before them:
the tokens of the sentences, one after another, are exactly those of the line. Bounds of sentences only decide where a
training block may end, so a rough rule will do: after . ! or ?, and quotes or brackets that close, before a space and
something that can begin a sentence. "Dr. Smith" is cut; no token differs for it.

Speed comes from remembering. RoBERTa's tokenizer first splits a line into pre-tokens (words with the space before
them, numbers, runs of punctuation) and merges bytes only inside these, and most of them come again. So the pre-tokens
of about a megabyte of text are found at once with NumPy, each is hashed, and its tokens are looked up in a table; the
tokenizer itself sees a pre-token when it is new. Words with characters beyond ASCII, or with odd space, are looked up
whole. The hash has 64 bits: in a table of a million entries two are equal with a chance of 3e-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from .shards import token_dtype
from .tokenizer import is_roberta_bpe, special_token_ids, vocabulary_size

SENTENCE_END = re.compile("[.!?][\"'\u2019\u201d\xbb)\\]]*(?= +[\"'\u2018\u201c\xab(\\[]*[^\\W_a-z])")
_BATCH_CHARACTERS = 1 << 20
_ODD_SPACES = [chr(c) for c in range(0x3001) if chr(c).isspace() and chr(c) not in " \n"]
# Three in a row, not all of them blanks.
_ODD_SPACE = re.compile(f"[{re.escape(''.join(_ODD_SPACES))}]")
_LONG_ODD_SPACE = re.compile(r"(?! {3})[^\S\n]{3}")

# Kinds of bytes.
_END, _SPACE, _LETTER, _DIGIT, _OTHER, _FOREIGN = range(6)
_KINDS = np.full(256, _OTHER, dtype=np.uint8)
_KINDS[[0, 10]] = _END
_KINDS[32] = _SPACE
_KINDS[[*range(65, 91), *range(97, 123)]] = _LETTER
_KINDS[48:58] = _DIGIT
_KINDS[[*map(ord, filter(str.isascii, _ODD_SPACES)), *range(128, 256)]] = _FOREIGN
_FOREIGN_BYTE = re.compile(b"[" + re.escape(np.flatnonzero(_KINDS == _FOREIGN).astype(np.uint8).tobytes()) + b"]")
_LONGEST = 32  # bytes of a pre-token that is remembered
_HASHES = np.random.default_rng(0).integers(0, 2**64, (_LONGEST, 256), dtype=np.uint64)
_TABLE_BITS = 21
_MOST_ENTRIES = 1 << 20


@dataclass
class EncodedDocuments:
    """Documents as `ShardWriter.append` takes them.

    tokens: uint16 or uint32, each document closed by `</s>`. sentence_lengths: uint32, in tokens; the last sentence of
    a document counts its `</s>`. document_sentences: uint32, sentences of each document.
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_sentences: np.ndarray


class DocumentEncoder:
    """Encodes documents, fast where the tokenizer splits as RoBERTa's does and the text has no long odd space.

    Special tokens written out in a text are ordinary text, or a document could forge the `</s>` that ends one.
    """

    def __init__(self, tokenizer: Tokenizer, *, split_sentences: bool):
        self._split_sentences = split_sentences
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._dtype = token_dtype(vocabulary_size(tokenizer))
        self._eos = special_token_ids(tokenizer).eos
        self._pre_tokens = _PreTokens(self._tokenizer, self._dtype, self._eos) if is_roberta_bpe(tokenizer) else None

    def encode(self, documents: Iterable[str]) -> EncodedDocuments:
        """Encode documents that each hold something other than space."""
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
        if batch or not parts:
            parts.append(self._encode_plain(batch))
        return EncodedDocuments(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts))))

    def _encode_any(self, document: str) -> EncodedDocuments:
        """One document, sentence by sentence through the tokenizer."""
        sentences = []
        for line in map(str.strip, document.split("\n")):
            ends = [match.end() for match in SENTENCE_END.finditer(line)] if self._split_sentences else []
            sentences += [line[start:end] for start, end in pairwise([0, *ends, len(line)])]
        encoded = [e.ids for e in self._tokenizer.encode_batch_fast(sentences, add_special_tokens=False) if e.ids] or [
            []
        ]
        encoded[-1] = [*encoded[-1], self._eos]
        return EncodedDocuments(
            np.array([token for ids in encoded for token in ids], dtype=self._dtype),
            np.array([len(ids) for ids in encoded], dtype=np.uint32),
            np.array([len(encoded)], dtype=np.uint32),
        )

    def _encode_plain(self, documents: list[str]) -> EncodedDocuments:
        """Plain documents, all at once: each becomes its lines, a line end between them, and a NUL."""
        joined = "".join(
            "\n".join([stripped for line in document.split("\n") if (stripped := line.strip())]) + "\0"
            for document in documents
        )
        text = np.frombuffer(joined.encode(), dtype=np.uint8)
        kinds = _KINDS[text]
        line_ends = np.flatnonzero(kinds == _END)
        sentence_starts = [np.zeros(1, dtype=np.int64), line_ends[:-1] + 1]
        if self._split_sentences:
            ends = np.array([match.end() for match in SENTENCE_END.finditer(joined)], dtype=np.int64)
            if len(text) != len(joined):  # characters -> bytes
                ends = np.flatnonzero((text & 0xC0) != 0x80)[ends]
            sentence_starts.append(ends)
        starts = np.sort(np.concatenate(sentence_starts)) if documents else np.zeros(0, dtype=np.int64)
        units = find_pre_tokens(text, kinds)
        assert self._pre_tokens is not None
        tokens, token_starts = self._pre_tokens.look_up(text, units)
        bounds = np.append(token_starts[np.searchsorted(units, starts)], len(tokens))
        document_ends = np.searchsorted(starts, np.flatnonzero(text == 0), side="right")
        return EncodedDocuments(
            tokens, np.diff(bounds).astype(np.uint32), np.diff(document_ends, prepend=0).astype(np.uint32)
        )


def _is_plain(document: str) -> bool:
    """Whether `find_pre_tokens` is right for a text, and a NUL can stand for its end.

    The tokenizer makes one pre-token of a stretch of space without its last character. Words begin at blanks: where a
    blank is neither the first nor the last of a stretch, and not all are blanks, they would begin inside.
    """
    if "\0" in document:
        return False
    if not any(space in document for space in _ODD_SPACES):  # which is faster than the pattern
        return True
    found = (match.start() for match in _ODD_SPACE.finditer(document))
    return not any(_LONG_ODD_SPACE.search(document, max(0, at - 2), at + 3) for at in found)


def find_pre_tokens(text: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Where RoBERTa's pre-tokens start in plain text.

    Its pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?letters| ?digits| ?others|\\s+(?!\\S)|\\s+`. A word with
    foreign bytes stays whole, their kinds are the tokenizer's affair; so does each end of a line or document.

    Args:
        text: uint8, UTF-8. kinds: of its bytes, same shape.
    Returns:
        int64, increasing.
    """
    before = np.empty_like(kinds)
    before[:1], before[1:] = _END, kinds[:-1]
    is_space = kinds == _SPACE
    # Of several blanks the last belongs to the word that follows, the others to each other.
    word_starts = (kinds == _END) | (before == _END) | (is_space & (before != _SPACE))
    word_starts[:-1] |= is_space[:-1] & ~is_space[1:]
    is_start = word_starts | ((kinds != before) & (before != _SPACE))
    if (kinds == _FOREIGN).any():
        at = np.flatnonzero(word_starts)
        is_foreign = np.maximum.reduceat(kinds, at) == _FOREIGN
        is_start &= word_starts | ~np.repeat(is_foreign, np.diff(at, append=len(text)))
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
        new_hashes, first = np.unique(hashes[is_new], return_index=True)
        where = np.flatnonzero(is_new)
        learned = len(self._offsets)
        raw = text.tobytes()
        units = [raw[starts[i] : starts[i] + lengths[i]] for i in (*where[first], *is_long)]
        self._learn(units)
        self._insert(new_hashes, learned)
        entries[where] = self._find(hashes[where])
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
            elif unit == b"\n":
                ids = []
            else:
                ids = [token.id for token in self._merge(unit.decode().translate(self._letters))]
            tokens += ids
            counts.append(len(ids))
        added = np.array(counts, dtype=np.int64)
        self._offsets = np.concatenate([self._offsets, len(self._pool) + np.cumsum(added) - added])
        self._counts = np.concatenate([self._counts, added])
        self._pool = np.concatenate([self._pool, np.array(tokens, dtype=self._dtype)])
