"""Cutting a shard's tokens into blocks that a model sees at once:

    full-sentences  whole sentences, across documents, as many as fit (Liu et al., arXiv 1907.11692, section 4.2)
    doc-sentences   the same, but a block ends where its document ends
    contiguous      the stream cut anywhere: every block but a shard's last is full

No token is lost: a sentence longer than a block is split over several.
"""

from __future__ import annotations

import numpy as np

from .shards import ShardReader

WINDOW = 2**16  # sentences, documents or tokens that are looked at together


def cut_blocks(shard: ShardReader, capacity: int, packing: str) -> np.ndarray:
    """Where blocks of at most `capacity` tokens begin in a shard's token stream, and where the last one ends: uint32.

    Memory beside the result does not depend on the shard: sentences are looked at in windows of `WINDOW`.
    """
    end = shard.num_tokens
    if packing == "contiguous" or end == 0:
        return np.append(np.arange(0, end, capacity, dtype=np.uint32), np.uint32(end))[: None if end else 1]
    found = [np.zeros(1, dtype=np.uint32)]
    first, size = 0, WINDOW  # sentences to look at
    position = 0  # token that the next block begins with
    while position < end:
        last = min(first + size, shard.num_sentences)
        is_last = last == shard.num_sentences
        starts = shard.read_sentence_starts(first, last if is_last else last + 1).astype(np.int64)
        sentences = np.append(starts, end) if is_last else starts
        # An overlong sentence becomes several units of at most `capacity` tokens.
        lengths = np.diff(sentences)
        parts = np.maximum(1, -(-lengths // capacity))
        first_part = np.cumsum(parts) - parts
        offsets = (np.arange(parts.sum()) - np.repeat(first_part, parts)) * capacity
        bounds = np.append(np.repeat(sentences[:-1], parts) + offsets, sentences[-1])
        following = np.searchsorted(bounds, bounds[:-1] + capacity, side="right") - 1
        if packing == "doc-sentences":
            inside = [_find(shard, at) for at in (first + 1, last)]
            documents = shard.read_document_starts(*inside).astype(np.int64) - first
            documents = np.append(first_part[documents], len(bounds) - 1)
            document_end = documents[np.searchsorted(documents, np.arange(len(bounds) - 1), side="right")]
            following = np.minimum(following, document_end)
        # Walk from block to block as far as this window can tell where they end.
        unit, chosen, successors = int(np.searchsorted(bounds, position)), [], following.data
        stop = len(following) if is_last else int(np.searchsorted(bounds, bounds[-1] - capacity))
        while unit < stop:
            unit = successors[unit]
            chosen.append(unit)
        if chosen:
            found.append(bounds[chosen].astype(np.uint32))
            position = int(bounds[unit])
            first += int(np.searchsorted(sentences, position, side="right")) - 1
        else:
            size *= 2
        shard.release()
    return np.concatenate(found)


def _find(shard: ShardReader, sentence: int) -> int:
    """The first document that starts at this sentence or a later one."""
    return int(np.searchsorted(shard.document_starts, sentence))


def find_documents(shard: ShardReader) -> np.ndarray:
    """Where each document begins in a shard's tokens: uint32 (num_documents,)."""
    sentences = shard.read_sentence_starts(0, shard.num_sentences)
    return sentences[shard.read_document_starts(0, shard.num_documents)]


def count_documents(documents: np.ndarray, bounds: np.ndarray) -> int:
    """The largest number of documents that start inside one block, from `find_documents` and `cut_blocks`."""
    return int(np.diff(np.searchsorted(documents, bounds)).max(initial=0))
