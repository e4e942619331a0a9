"""The unit of prepare's work: a chunk of text in, a file with its documents out: cleaned, tokenized and hashed.

A chunk file (npz) holds, in the order of the documents:

    tokens, sentence_lengths, document_sentences    as `ShardWriter.append` takes them
    hashes                                          uint64 (documents, 2), BLAKE2b of the cleaned text
    signatures                                      uint32 (documents, permutations), only for near duplicates
    report                                          JSON: counts of what was read, left out and repaired; examples

A file is renamed into place once it is complete, so an interrupted run continues with the chunks it lacks.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .clean import Cleaner, CleaningSettings, Examples
from .deduplicate import Signer
from .encode import DocumentEncoder
from .problems import Problems
from .read import Chunk, read_documents
from .shards import write_atomically
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class ChunkSettings:
    """What decides the bytes of a chunk file besides the text; the names are those of prepare's options."""

    tokenizer: str  # its directory, which every worker must be able to read
    tokenizer_sha256: str
    txt_documents: str
    text_field: str
    split_sentences: bool
    newlines: Literal["keep", "separator"]
    cleaning: CleaningSettings
    signatures: bool
    on_bad_input: str


class ChunkProcessor:
    """Turns chunks into chunk files. Worth keeping: its encoder remembers the words it has seen. Not thread-safe."""

    def __init__(self, settings: ChunkSettings):
        self._settings = settings
        self._encoder = DocumentEncoder(
            load_tokenizer(settings.tokenizer), split_sentences=settings.split_sentences, newlines=settings.newlines
        )
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


def load_chunk(path: Path, *names: str) -> list[np.ndarray]:
    """The named arrays of a chunk file.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing, although a worker has written it; put --out on a disk that all workers share"
        ) from error
    except Exception as error:  # numpy's and zipfile's errors for damaged files have no common base
        raise DataError(f"{path}: damaged ({error}); remove this file and start again") from error


def sample_chunks(chunks: Iterable[Chunk], limit: int) -> list[Chunk]:
    """Chunks spread evenly over the corpus, of `limit` bytes of text at most, but always at least one."""
    sample: list[Chunk] = []
    stride, size = 1, 0
    for number, chunk in enumerate(chunks):
        if number % stride == 0:
            sample.append(chunk)
            size += chunk.size()
        while size > limit and len(sample) > 1:  # dropping every second one keeps the rest evenly spread
            sample, stride = sample[::2], stride * 2
            size = sum(map(Chunk.size, sample))
    return sample


_worker = threading.local()  # Dask workers may have several threads, and a processor belongs to one


def process_chunk(settings: ChunkSettings, chunk: Chunk, path: Path) -> dict[str, int]:
    """`ChunkProcessor.process` with a processor that this thread keeps from call to call."""
    if getattr(_worker, "settings", None) != settings:
        os.stat(settings.tokenizer)  # without a shared disk this fails first, as an OSError
        _worker.processor, _worker.settings = ChunkProcessor(settings), settings
    return _worker.processor.process(chunk, path)
