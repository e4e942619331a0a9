"""Which documents repeat an earlier one: exactly, or nearly, by MinHash.

Workers give each document a 128-bit hash and, for near duplicates, a MinHash signature (Broder, 1997) of its shingles
of five words. Once all are there, documents with equal keys are found by sorting: the keys are the hashes for exact
duplicates, and one band of the signature after another for near ones (locality-sensitive hashing; Leskovec et al.,
Mining of Massive Datasets, section 3.4). Documents with an equal band are near duplicates if the share of equal
signature entries, which estimates the Jaccard similarity of their shingles, reaches the threshold. Each document is
compared with the first that has its band, and dropped if they match, even if that first one was dropped itself.

The result depends on the order of the documents alone, and no document changes the verdict on an earlier one. Memory
is bounded by sorting part of the keys at a time.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import ConfigurationError

NUM_PERMUTATIONS = 128
SHINGLE_WORDS = 5
_KEYS_AT_ONCE = 4 << 20
_ROWS_AT_ONCE = 1 << 16
_WORD = re.compile(r"\w+")


class Signer:
    """Computes MinHash signatures of texts.

    Raises:
        ConfigurationError: datasketch is not installed.
    """

    def __init__(self) -> None:
        try:
            from datasketch import MinHash
        except ImportError as error:
            raise ConfigurationError("near_duplicates needs datasketch; pip install 'fastroberta[data]'") from error
        self._empty = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, hashfunc=int)

    def sign(self, text: str) -> np.ndarray:
        """The signature of a text: uint32, (NUM_PERMUTATIONS,). Case, punctuation and white space do not matter."""
        words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], dtype=np.uint64)
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        words = np.pad(words, (0, max(0, SHINGLE_WORDS - len(words))))
        shingles = np.zeros(count, dtype=np.uint64)
        for offset in range(SHINGLE_WORDS):
            shingles = (shingles ^ words[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
            shingles ^= shingles >> np.uint64(29)
        sketch = self._empty.copy()
        for start in range(0, count, _ROWS_AT_ONCE):  # datasketch allocates shingles x permutations
            sketch.update_batch((shingles[start : start + _ROWS_AT_ONCE] >> np.uint64(32)).tolist())
        return sketch.hashvalues.astype(np.uint32)


def find_exact_duplicates(hashes: Path, num_documents: int) -> np.ndarray:
    """Flag the documents that equal an earlier one.

    Args:
        hashes: a file of uint64, (num_documents, 2). num_documents: at least one.
    Returns:
        bool, (num_documents,).
    """
    repeated = np.zeros(num_documents, dtype=bool)
    table = np.memmap(hashes, dtype=np.uint64, mode="r", shape=(num_documents, 2))
    for later, earlier in _find_equal(table, lambda rows: rows[:, 0]):
        repeated[later] = table[later, 1] == table[earlier, 1]
    return repeated


def find_near_duplicates(signatures: Path, num_documents: int, threshold: float) -> np.ndarray:
    """Flag the documents that resemble an earlier one.

    Args:
        signatures: a file of uint32, (num_documents, NUM_PERMUTATIONS). num_documents: at least one.
        threshold: the estimated Jaccard similarity from which on documents are near duplicates.
    Returns:
        bool, (num_documents,).
    """
    from datasketch import MinHashLSH

    repeated = np.zeros(num_documents, dtype=bool)
    table = np.memmap(signatures, dtype=np.uint32, mode="r", shape=(num_documents, NUM_PERMUTATIONS))
    # It chooses the numbers of bands and of rows in each. A false candidate costs a comparison, a missed one is lost:
    # with equal weights a third of the pairs at 0.85 would be missed at a threshold of 0.8.
    index = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, weights=(0.05, 0.95))
    for first in range(0, index.b * index.r, index.r):
        for later, earlier in _find_equal(table, partial(_hash_columns, first=first, count=index.r)):
            for start in range(0, len(later), _ROWS_AT_ONCE):
                pair = slice(start, start + _ROWS_AT_ONCE)
                similarity = (table[later[pair]] == table[earlier[pair]]).mean(axis=1)
                repeated[later[pair]] |= similarity >= threshold
    return repeated


def _hash_columns(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    """Hash `count` columns of each row into a uint64."""
    keys = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T[first : first + count]:
        keys = (keys ^ column) * np.uint64(0xBF58476D1CE4E5B9)
        keys ^= keys >> np.uint64(31)
    return keys


def _find_equal(table: np.memmap, key: Callable[[np.ndarray], np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of the rows whose key an earlier row has, and of the first row that has it; part by part."""
    path = str(table.filename)
    parts = np.uint64(-(-len(table) // _KEYS_AT_ONCE))
    for part in range(int(parts)):
        found_keys, found_rows = [], []
        for start in range(0, len(table), _ROWS_AT_ONCE):
            # Read, not mapped: mapped pages count as this process's memory until the system reclaims them.
            count = min(_ROWS_AT_ONCE, len(table) - start)
            rows = np.fromfile(path, table.dtype, count * table.shape[1], offset=start * table[0].nbytes)
            keys = key(rows.reshape(count, -1))
            chosen = np.flatnonzero(keys % parts == part)
            found_keys.append(keys[chosen])
            found_rows.append(chosen + start)
        keys, rows = np.concatenate(found_keys), np.concatenate(found_rows)
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        is_first = np.ones(len(keys), dtype=bool)
        is_first[1:] = keys[1:] != keys[:-1]
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
        yield rows[~is_first], rows[first][~is_first]
