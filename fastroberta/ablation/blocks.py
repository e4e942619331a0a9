"""Training data other than the product's: a part of the blocks, and pairs for next-sentence prediction.

A pair is `<s> A </s> B </s>`. Half of the time B follows A in its document; otherwise it is the second part of a pair
of another document (Devlin et al., arXiv 1810.04805, section 3.1). Which, is drawn anew in every pass over the data, as a
function of the seed and the sample's number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ..corpus.packing import find_documents
from ..corpus.shards import ShardReader
from ..data import Batch, Blocks
from ..errors import DataError

SPECIALS_OF_PAIR = 3  # <s>, and </s> after each part
SHORTEST_PAIR = 4  # tokens


class PartOfBlocks(Blocks):
    """The first 1/parts of the blocks, at least one. For the other arguments see `Blocks`."""

    def __init__(self, shards: list[ShardReader], *, parts: int, **options: Any):
        super().__init__(shards, **options)
        self.corpus_sizes = np.maximum(1, self.corpus_sizes // parts)

    def __len__(self) -> int:
        return int(self.corpus_sizes.sum())

    @property
    def num_tokens(self) -> int:
        lengths = np.concatenate([np.diff(bounds) for bounds in self._bounds])
        return int(lengths[: len(self)].sum(dtype=np.int64)) + len(self)


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch of pairs; `is_next`, int64 (b,), is 1 where the second part follows the first in its document."""

    is_next: torch.Tensor = field(kw_only=True)


class PairBlocks(Blocks):
    """The pairs of one prepared directory's split, in the place of its blocks. For the other arguments see `Blocks`.

    Args:
        unit: `segments` of several sentences, which fill a block and are divided at the sentence nearest its middle (at
            its middle, if it is one sentence); or `sentences`, each with the next one of its document.
        seed: of the draws.
    Raises:
        DataError: no pair in the data, or a single document.
    """

    def __init__(
        self,
        shards: list[ShardReader],
        *,
        unit: Literal["segments", "sentences"],
        seed: int,
        block_size: int,
        **options: Any,
    ):
        options |= {"packing": "doc-sentences", "attention_scope": "block"}
        super().__init__(shards, block_size=block_size + 1 - SPECIALS_OF_PAIR, **options)
        self.block_size, self.seed = block_size, seed
        self._capacity = block_size - SPECIALS_OF_PAIR
        tables, documents, num_documents = [], [], 0
        for shard, bounds in zip(shards, self._bounds):
            table = _pair_segments(shard, bounds) if unit == "segments" else _pair_sentences(shard)
            tables.append(table[table[:, 2] - table[:, 0] >= SHORTEST_PAIR])
            starts = find_documents(shard)
            documents.append(num_documents + np.searchsorted(starts, tables[-1][:, 0], side="right"))
            num_documents += len(starts)
        self._pairs, document_of = np.concatenate(tables), np.concatenate(documents)
        self._first_pair = np.cumsum([0, *map(len, tables)])
        if not len(self._pairs) or document_of[0] == document_of[-1]:
            raise DataError(
                f"{shards[0].path.parent}: pairs need two documents of two sentences; give prepare more text"
            )
        # Pairs of a document follow each other.
        self._first_of_document = np.searchsorted(document_of, document_of, side="left")
        self._end_of_document = np.searchsorted(document_of, document_of, side="right")
        self.corpus_sizes = np.array([len(self._pairs)])

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def num_tokens(self) -> int:
        """Tokens of all pairs whose parts follow each other, special ones included."""
        lengths = (self._pairs[:, 2] - self._pairs[:, 0]).astype(np.int64)
        return int(np.minimum(lengths, self._capacity).sum()) + SPECIALS_OF_PAIR * len(self)

    def read(self, indices: np.ndarray, sample_ids: np.ndarray, first_sample: int) -> PairBatch:
        """The pairs of the given numbers as a batch in ordinary memory."""
        ids = np.full((len(indices), self.block_size), self.pad_token_id, dtype=np.int64)
        lengths, is_next = np.empty((2, len(indices)), dtype=np.int64)
        for row, (pair, sample) in enumerate(zip(indices.tolist(), sample_ids.tolist())):
            random = np.random.Generator(np.random.Philox(key=[self.seed, sample]))
            is_next[row] = random.integers(2)
            second = pair if is_next[row] else self._draw_other(pair, random)
            parts = _cut_longer(self._read_part(pair, 0), self._read_part(second, 1), self._capacity)
            eos = [self.eos_token_id]
            tokens = np.concatenate([[self.bos_token_id], parts[0], eos, parts[1], eos])
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        for shard in self.shards:
            shard.release()
        return PairBatch(
            input_ids=torch.from_numpy(ids),
            sample_ids=torch.from_numpy(np.asarray(sample_ids, dtype=np.int64)),
            first_sample=torch.tensor(first_sample),
            key_lengths=torch.from_numpy(lengths.astype(np.int32)),
            cu_seqlens=None,
            num_tokens=int(lengths.sum()),
            sum_squared_lengths=int((lengths**2).sum()),
            is_next=torch.from_numpy(is_next),
        )

    def _draw_other(self, pair: int, random: np.random.Generator) -> int:
        """A pair of another document, each with the same probability."""
        first, end = self._first_of_document[pair], self._end_of_document[pair]
        return int(end + random.integers(len(self) - (end - first))) % len(self)

    def _read_part(self, pair: int, part: int) -> np.ndarray:
        """The first or second part of a pair, without `</s>`."""
        shard = self.shards[int(np.searchsorted(self._first_pair, pair, side="right")) - 1]
        tokens = shard.read_tokens(*self._pairs[pair, part : part + 2].tolist())
        return tokens[tokens != self.eos_token_id]


def _pair_segments(shard: ShardReader, bounds: np.ndarray) -> np.ndarray:
    """Where each block begins, is divided, and ends: int64 (blocks, 3)."""
    starts, stops = bounds[:-1].astype(np.int64), bounds[1:].astype(np.int64)
    middles = (starts + stops) // 2
    sentences = shard.read_sentence_starts(0, shard.num_sentences).astype(np.int64)
    after = np.searchsorted(sentences, middles)
    found = np.stack([sentences[np.maximum(after - 1, 0)], sentences[np.minimum(after, len(sentences) - 1)]])
    is_inside = (found > starts) & (found < stops)
    distances = np.where(is_inside, np.abs(found - middles), np.iinfo(np.int64).max)
    nearest = np.take_along_axis(found, distances.argmin(axis=0)[None], axis=0)[0]
    return np.stack([starts, np.where(is_inside.any(axis=0), nearest, middles), stops], axis=1)


def _pair_sentences(shard: ShardReader) -> np.ndarray:
    """Where each sentence and its successor in the document begin, and where the latter ends: int64 (pairs, 3)."""
    sentences = shard.read_sentence_starts(0, shard.num_sentences).astype(np.int64)
    bounds = np.append(sentences, shard.num_tokens)
    table = np.stack([bounds[:-2], bounds[1:-1], bounds[2:]], axis=1)
    return table[~np.isin(table[:, 1], find_documents(shard))]


def _cut_longer(first: np.ndarray, second: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Both parts, the longer one cut at its end until they fit."""
    half = capacity // 2
    room = capacity - min(len(second), max(half, capacity - len(first)))
    return first[:room], second[: capacity - min(len(first), room)]
