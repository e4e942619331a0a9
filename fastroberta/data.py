"""Token shards -> batches. The order of training is a function: which blocks a step sees depends on (seed, step) alone.

A block is `<s>` and a slice of a shard's tokens (see corpus/packing.py), padded where it is short.

With several corpora, a fixed pattern says which of them each sample comes from, in proportion to their weights. Each corpus
is permuted separately and starts its next epoch when all its blocks have been seen.

Where the text was prepared with --newlines separator, `</s>` ends each line as well as each document; where a document
starts is therefore looked up in the shard, never inferred from `</s>`.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .corpus.manifest import Manifest, load_manifest
from .corpus.packing import WINDOW, count_documents, cut_blocks, find_documents
from .corpus.shards import ShardReader
from .errors import ConfigurationError, DataError

_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's finalizer
_ROUNDS = 8
PERIOD = 1000  # samples after which the pattern of corpora repeats: weights count to a thousandth


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MIX_A
    value = (value ^ (value >> np.uint64(27))) * _MIX_B
    return value ^ (value >> np.uint64(31))


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The image of `index` under a pseudo-random permutation of range(size), without memory for its size.

    A Feistel network on the next even number of bits is a bijection whatever its round function; values that fall
    outside are sent through it again until they land inside (cycle walking; Black and Rogaway, CT-RSA 2002, section 3).

    Args:
        index: integers in [0, size), any shape.
    Returns:
        int64, of the same shape.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mix(
        np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        ^ _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
        ^ _mix(np.array([epoch], dtype=np.uint64) + np.uint64(1)) * _MIX_B
    )
    result = np.asarray(index, dtype=np.uint64).ravel().copy()
    outside = np.arange(result.size)
    while outside.size:
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(np.shape(index))


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b sequences of l tokens, in tensors on one device, and its size as the host knows it.

    Attributes:
        input_ids: int64 (b, l).
        sample_ids: int64 (b,): what token masks are drawn for; another number each time a block is seen.
        first_sample: int64 (): the first sequence's number in training order; the others follow it.
        key_lengths: int32 (b,): tokens before padding; None where no block of the data is padded or `cu_seqlens` is set.
        cu_seqlens: int32 (documents + 1,): document bounds in the flattened batch, static in length; None unless
            attention stays inside documents.
        num_tokens: tokens without padding. sum_squared_lengths: over the spans that attention sees, for FLOPs.
        corpus: index of the corpus that all sequences come from; held-out batches only.
    """

    input_ids: torch.Tensor
    sample_ids: torch.Tensor
    first_sample: torch.Tensor
    key_lengths: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    num_tokens: int
    sum_squared_lengths: int
    corpus: int = 0


class Corpus(NamedTuple):
    """A prepared directory, and how often samples come from it, relative to the others."""

    manifest: Manifest
    weight: float


class Blocks:
    """The blocks of one split of one or more prepared directories: a table of slices into memory-mapped shards.

    Args:
        shards: in order.
        block_size: tokens of a block, `<s>` included.
        packing: `full-sentences`, `doc-sentences` or `contiguous`.
        attention_scope: `block`, or `document` to keep attention inside each document.
        shards_of, weights: the number of shards of each corpus, and its weight; one corpus if empty.
    Attributes:
        corpus_sizes: int64 (corpora,), the number of blocks of each.
    Raises:
        DataError: no tokens.
    """

    def __init__(
        self,
        shards: list[ShardReader],
        *,
        block_size: int,
        packing: str,
        attention_scope: str,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
        shards_of: Sequence[int] = (),
        weights: Sequence[float] = (),
    ):
        self.block_size = block_size
        self.attention_scope = attention_scope
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.shards = shards
        with concurrent.futures.ThreadPoolExecutor() as threads:
            self._bounds = list(threads.map(lambda one: cut_blocks(one, block_size - 1, packing), shards))
            if attention_scope == "document":
                # A static number of document bounds a block keeps shapes static: documents that start inside, the one
                # that continues from before, and the padding.
                self._documents = list(threads.map(find_documents, shards))
                self._max_spans = 2 + max(map(count_documents, self._documents, self._bounds), default=0)
        self._first_block = np.cumsum([0] + [len(bounds) - 1 for bounds in self._bounds])
        if not self._first_block[-1]:
            raise DataError(f"{shards[0].path.parent if shards else 'data'}: no tokens; give prepare more text")
        at_shard = np.cumsum([0, *(shards_of or [len(shards)])])
        self._first_of_corpus = self._first_block[at_shard]
        self.corpus_sizes = np.diff(self._first_of_corpus)
        self._pattern = _spread(np.asarray(weights or [1.0]))
        # For each corpus, its samples in a period up to and with each place.
        self._taken = np.stack([np.cumsum(self._pattern == corpus) for corpus in range(len(self.corpus_sizes))])
        self.is_padded = any((np.diff(bounds) < block_size - 1).any() for bounds in self._bounds)

    def __len__(self) -> int:
        return int(self._first_block[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks, `<s>` of each included, padding not."""
        return sum(shard.num_tokens for shard in self.shards) + len(self)

    def describe_verified(self) -> str:
        """One line: how much of the shards has been verified. The rest is verified as it is read, before it is used."""
        total, done = (sum(sizes) / 1e6 for sizes in zip(*((one.num_bytes, one.verified_bytes) for one in self.shards)))
        return f"verified {done:,.1f} of {total:,.1f} MB in shards; the rest when it is first read"

    def order(self, samples: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Which blocks are the samples of these numbers in training order, and which epoch of their corpus that is.

        Args:
            samples: int64, any shape.
        Returns:
            Block numbers and epochs, int64, of the same shape.
        """
        corpora, seen = self._locate(samples)
        epochs, within = seen // self.corpus_sizes[corpora], seen % self.corpus_sizes[corpora]
        blocks = np.empty_like(within)
        for corpus, epoch in np.unique(np.stack((corpora, epochs)).reshape(2, -1), axis=1).T.tolist():
            chosen = (corpora == corpus) & (epochs == epoch)
            blocks[chosen] = permute(within[chosen], int(self.corpus_sizes[corpus]), seed, epoch)
        return blocks + self._first_of_corpus[corpora], epochs

    def count_epochs(self, num_samples: int) -> list[float]:
        """How often each corpus has been seen after so many samples."""
        periods, rest = divmod(num_samples, len(self._pattern))
        counts = periods * self._taken[:, -1] + (self._taken[:, rest - 1] if rest else 0)
        return (counts / self.corpus_sizes).tolist()

    def _locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus of each sample, and how many samples of that corpus came before it."""
        periods, places = np.divmod(samples, len(self._pattern))
        corpora = self._pattern[places]
        return corpora, periods * self._taken[corpora, -1] + self._taken[corpora, places] - 1

    def spread_evenly(self, count: int) -> list[np.ndarray]:
        """Up to `count` block numbers, spread evenly over each corpus, which has its share of them: int64 each."""
        shares = self._taken[:, -1] / len(self._pattern)
        counts = np.minimum(np.maximum(1, np.round(shares * min(count, len(self)))).astype(np.int64), self.corpus_sizes)
        parts = zip(self._first_of_corpus, counts, self.corpus_sizes)
        return [first + np.arange(number) * size // number for first, number, size in parts]

    def unigram_entropy(self) -> float:
        """Entropy in nats of the split's token frequencies, specials left out: the loss of knowing only those."""
        counts = np.zeros(2**16, dtype=np.int64)
        for shard in self.shards:
            for start in range(0, shard.num_tokens, WINDOW):
                found = np.bincount(shard.read_tokens(start, min(start + WINDOW, shard.num_tokens)))
                counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
                counts[: len(found)] += found
        counts[[self.bos_token_id, self.eos_token_id, self.pad_token_id]] = 0
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def sentences(self, count: int, at_least: int, at_most: int) -> list[list[int]]:
        """Token ids of up to `count` sentences of such a length, spread evenly over the split, without `</s>`."""
        found = []  # of each shard: where its sentences of such a length begin, and their lengths
        for shard in self.shards:
            starts = np.append(shard.read_sentence_starts(0, shard.num_sentences), np.uint32(shard.num_tokens))
            spans = np.stack((starts[:-1], np.diff(starts)))
            found.append(spans[:, (spans[1] >= at_least) & (spans[1] <= at_most)])
        ends, texts = np.cumsum([spans.shape[1] for spans in found]), []
        count = min(count, int(ends[-1]))
        for place in (index * int(ends[-1]) // count for index in range(count)):
            at = int(np.searchsorted(ends, place, side="right"))
            start, length = found[at][:, place - ends[at]].tolist()  # counted from the shard's last
            texts.append(self.shards[at].read_tokens(start, start + length))
        return [text[text != self.eos_token_id].tolist() for text in texts]

    def read(self, indices: np.ndarray, sample_ids: np.ndarray, first_sample: int) -> Batch:
        """The blocks of the given numbers as a batch in ordinary memory."""
        ids = np.full((len(indices), self.block_size), self.pad_token_id, dtype=np.int64)
        ids[:, 0] = self.bos_token_id
        starts, lengths = np.empty((2, len(indices)), dtype=np.int64)
        which = np.searchsorted(self._first_block, indices, side="right") - 1
        for row, (shard, block) in enumerate(zip(which, indices - self._first_block[which])):
            start, stop = self._bounds[shard][block : block + 2].tolist()
            starts[row], lengths[row] = start, 1 + stop - start
            ids[row, 1 : lengths[row]] = self.shards[shard].read_tokens(start, stop)
        for shard in np.unique(which):
            self.shards[shard].release()
        cu_seqlens, key_lengths, squares = None, None, lengths**2
        if self.attention_scope == "document":
            bounds = self._document_bounds(which, starts, lengths)
            cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
            squares = np.append(np.diff(bounds) ** 2, -((self.block_size - lengths) ** 2))  # less those of padding
        elif self.is_padded:
            key_lengths = torch.from_numpy(lengths.astype(np.int32))
        return Batch(
            input_ids=torch.from_numpy(ids),
            sample_ids=torch.from_numpy(np.asarray(sample_ids, dtype=np.int64)),
            first_sample=torch.tensor(first_sample),
            key_lengths=key_lengths,
            cu_seqlens=cu_seqlens,
            num_tokens=int(lengths.sum()),
            sum_squared_lengths=int(squares.sum()),
        )

    def _document_bounds(self, shards: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Bounds of documents (and of each block's padding) in the flattened batch, filled up to a static number."""
        bounds = [
            np.append(np.arange(len(starts) + 1) * self.block_size, np.arange(len(starts)) * self.block_size + lengths)
        ]
        for row, (shard, start, length) in enumerate(zip(shards, starts, lengths)):
            documents = self._documents[shard]
            # The first bound of a block is 0: its `<s>` belongs to the document that it begins with.
            inside = slice(
                np.searchsorted(documents, documents.dtype.type(start), side="right"),
                np.searchsorted(documents, documents.dtype.type(start + length - 1)),
            )
            bounds.append(row * self.block_size + 1 + documents[inside].astype(np.int64) - start)
        found = np.unique(np.concatenate(bounds))
        size = len(starts) * self._max_spans + 1
        return np.pad(found, (0, size - len(found)), constant_values=len(starts) * self.block_size)


def _spread(weights: np.ndarray) -> np.ndarray:
    """Which corpus each sample of a period comes from, as evenly alternating as the weights allow: int64 (period,)."""
    if len(weights) == 1:
        return np.zeros(1, dtype=np.int64)
    shares, taken, pattern = weights / weights.sum(), np.zeros(len(weights)), []
    for place in range(1, PERIOD + 1):
        pattern.append(int(np.argmax(place * shares - taken)))
        taken[pattern[-1]] += 1
    if not taken.all():
        raise ConfigurationError(
            f"data: a weight is less than 1/{PERIOD} of all weights; raise it or leave that corpus out"
        )
    return np.array(pattern)


def load_corpora(data: Sequence[str]) -> list[Corpus]:
    """The corpora of the setting `data`: directories, each with `:WEIGHT` after it or weight 1; names may hold colons.

    Raises:
        ConfigurationError: a weight that is not positive, or corpora with different tokenizers.
        DataError: see `load_manifest`.
    """
    corpora = []
    for entry in data:
        directory, colon, weight = entry.rpartition(":")
        if not colon or Path(entry).exists():
            directory, weight = entry, "1"
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise ConfigurationError(f"data: {entry}: {weight!r} is not a positive weight; write {directory}:0.5 or so")
        corpora.append(Corpus(load_manifest(directory), number))
    for corpus in corpora[1:]:
        if corpus.manifest.tokenizer_sha256 != corpora[0].manifest.tokenizer_sha256:
            raise ConfigurationError(
                f"data: {corpus.manifest.directory} has another tokenizer than {corpora[0].manifest.directory}; prepare it "
                f"with --tokenizer {corpora[0].manifest.directory}"
            )
    return corpora


def open_split(
    corpora: Manifest | Sequence[Corpus], split: str, *, max_seq_length: int, packing: str, attention_scope: str,
    make_blocks: Callable[..., Blocks] = Blocks,
) -> Blocks:  # fmt: skip
    """The blocks of "train" or "heldout" of prepared directories, which share a tokenizer, as `make_blocks` cuts them.

    Raises:
        DataError: the split is empty or damaged, or holds a token id outside the vocabulary.
    """
    if isinstance(corpora, Manifest):
        corpora = [Corpus(corpora, 1.0)]
    ids = corpora[0].manifest.special_token_ids
    for manifest, _ in corpora:
        if not manifest.count(split, "tokens"):
            raise DataError(
                f"{manifest.directory}: no {split} documents; prepare more text, or with another --heldout-fraction"
            )
    shards = [manifest.read_shards(split) for manifest, _ in corpora]
    return make_blocks(
        [shard for some in shards for shard in some],
        shards_of=[len(some) for some in shards],
        weights=[weight for _, weight in corpora],
        block_size=max_seq_length,
        packing=packing,
        attention_scope=attention_scope,
        bos_token_id=ids["bos_token_id"],
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
    )


def masking_arguments(manifest: Manifest, mlm_probability: float) -> dict[str, Any]:
    """What `mask_tokens` takes beyond ids and seeds: of the specials, none is masked and none replaces another token."""
    ids = manifest.special_token_ids
    return {
        "mask_token_id": ids["mask_token_id"],
        "vocab_size": manifest.vocab_size,
        "special_token_ids": tuple(sorted(set(ids.values()))),
        "mlm_probability": mlm_probability,
    }


def training_batches(
    blocks: Blocks, first_samples: Iterable[int], micro_batch_size: int, *, seed: int, static_masking: bool = False
) -> Iterator[Batch]:
    """A micro-batch for each of `first_samples`: that sample of the training order and those that follow it.

    With one corpus, sample s is block `permute(s % len(blocks))` of epoch `s // len(blocks)`. Its mask is drawn for
    another sample id in every epoch, or for the same id in all of them with static masking.
    """
    for first in first_samples:
        samples = np.arange(first, first + micro_batch_size)
        indices, epochs = blocks.order(samples, seed)
        sample_ids = indices if static_masking else epochs * len(blocks) + indices
        yield blocks.read(indices, sample_ids, first)


def heldout_batches(blocks: Blocks, num_sequences: int, micro_batch_size: int) -> Iterator[Batch]:
    """Up to `num_sequences` held-out blocks, the same ones every time, spread evenly over the split of each corpus."""
    first = 0
    for corpus, indices in enumerate(blocks.spread_evenly(num_sequences)):
        for start in range(0, len(indices), micro_batch_size):
            chosen = indices[start : start + micro_batch_size]
            yield replace(blocks.read(chosen, chosen, first), corpus=corpus)
            first += len(chosen)


def move_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`, each read and sent while the one before it is in use."""

    def fetch() -> Batch | None:
        batch = next(batches, None)
        if batch is None or device.type == "cpu":
            return batch
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(batch, **moved)

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(fetch)
        while (batch := pending.result()) is not None:
            pending = thread.submit(fetch)
            yield batch
