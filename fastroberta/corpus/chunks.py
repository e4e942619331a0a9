"""The unit of work of prepare: a chunk of text -> a file of its documents, cleaned, tokenized and hashed.

A chunk file (npz) holds, in the order of the documents:

    tokens, sentence_lengths, document_sentences    as `ShardWriter.append` takes them
    hashes                                          uint64 (documents, 2), BLAKE2b of the cleaned text
    signatures                                      uint32 (documents, permutations), where near duplicates are wanted
    report                                          JSON: what was read, mended and left out, with examples

It appears by a rename when it is complete: a run that is interrupted, however, continues with the chunks it lacks.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .clean import Cleaner, CleaningSettings, Examples
from .deduplicate import Signer
from .encode import DocumentEncoder
from .problems import Problems
from .read import Chunk, read_documents
from .shards import write_atomically


@dataclass(frozen=True)
class ChunkSettings:
    """What decides a chunk's bytes besides its text; the meanings are those of prepare's options."""

    txt_documents: str
    text_field: str
    split_sentences: bool
    cleaning: CleaningSettings
    signatures: bool
    on_bad_input: str


class ChunkProcessor:
    """Turns chunks into chunk files; one in each worker, for the words that its encoder remembers."""

    def __init__(self, tokenizer: Tokenizer, settings: ChunkSettings):
        self._settings = settings
        self._encoder = DocumentEncoder(tokenizer, split_sentences=settings.split_sentences)
        self._cleaner = Cleaner(settings.cleaning)
        self._signer = Signer() if settings.signatures else None

    def process(self, chunk: Chunk, path: Path) -> dict[str, int]:
        """Write the chunk's file; returns the bytes of text and the tokens in it."""
        counts: Counter[str] = Counter()
        problems = Problems(self._settings.on_bad_input)
        hashes: list[bytes] = []
        signatures: list[np.ndarray] = []

        examples: Examples = {}

        def take() -> Iterator[str]:
            documents = read_documents(
                chunk,
                txt_documents=self._settings.txt_documents,
                text_field=self._settings.text_field,
                problems=problems,
            )
            for text in self._cleaner.clean(documents, counts, examples):
                hashes.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
                if self._signer:
                    signatures.append(self._signer.sign(text))
                yield text

        encoded = self._encoder.encode(take())
        arrays: dict[str, Any] = {**vars(encoded), "hashes": np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)}
        if signatures:
            arrays["signatures"] = np.stack(signatures)
        counts["bytes"] = chunk.size()
        report = {"counts": counts, "problems": chunk.problems + problems.counts, "examples": examples}
        arrays["report"] = np.frombuffer(json.dumps(report).encode(), np.uint8)
        with write_atomically(path) as file:
            np.savez(file, **arrays)
        return {"bytes": chunk.size(), "tokens": len(encoded.tokens)}


_processor: ChunkProcessor | None = None  # of this worker


def start_worker(tokenizer: str, settings: ChunkSettings) -> None:
    """Set a worker process up: one thread, deaf to the terminal's Ctrl-C, gone when its parent is."""
    global _processor
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is faster than threads in each
    threading.Thread(target=_follow_parent, daemon=True).start()
    _processor = ChunkProcessor(Tokenizer.from_str(tokenizer), settings)


def _follow_parent() -> None:
    """Workers of a parent that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def process_in_worker(chunk: Chunk, path: Path) -> dict[str, int]:
    """`ChunkProcessor.process` in a process that `start_worker` set up."""
    assert _processor is not None
    return _processor.process(chunk, path)
