"""The format of token shards: `train-00000.bin`, ..., `heldout-00000.bin`, and the `manifest.json` that lists them.

A shard, little-endian throughout:

    offset  bytes
    0       8       magic, b"FASTROB\\0"
    8       4       version, 2
    12      4       bytes of a token: 2 (uint16) where every id of the vocabulary fits, otherwise 4 (uint32)
    16      8 x 3   number of tokens, of sentences, of documents
    40      32      SHA-256 of the tokenizer
    72      56      zeros
    128     ...     tokens, then zeros up to a multiple of 8 bytes
            ...     sentence starts, uint32: where each sentence begins in the tokens
            ...     document starts, uint32: where each document begins in the sentences
            ...     checksums, uint32: the CRC-32 of every 16 KiB of the bytes before, the last one of what remains

The tokens are each document's, followed by one `</s>` that belongs to its last sentence (with --newlines separator,
every line has one too); there is no `<s>`, so that a training block is `<s>` and a slice. A document lies in one shard.
Everything is written to a temporary name and renamed when it is complete, the manifest last.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

MAGIC = b"FASTROB\0"
VERSION = 2  # 1 lacked the tokens of line breaks
HEADER = struct.Struct("<8sIIQQQ32s56x")
MAX_SHARD_TOKENS = 2**32 - 1  # sentence starts are 32-bit
SPLITS = ("train", "heldout")
CHUNK_BYTES = 2**14  # with a checksum of their own: verified in 7 microseconds for a block of 1 KiB or so
AGAIN = "copy the directory again, or run prepare again with another --out"  # in this one it would find nothing to do


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[io.BufferedRandom]:
    """Open a temporary file that becomes `path`, on the disk and not only in its cache, if the block succeeds."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")  # machines may share the disk
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardReader:
    """A shard, memory-mapped: opening it reads the header only.

    The arrays are as they lie in the file. The `read` methods verify what they return: each chunk of the file is held
    against its checksum when something in it is first read.

    Args:
        vocab_size: token ids that are not below it are refused by `read_tokens`; None does not check.
    Attributes:
        tokens: (num_tokens,) uint16 or uint32.
        sentence_starts: (num_sentences,) uint32, offsets into tokens; increasing, the first is 0.
        document_starts: (num_documents,) uint32, offsets into sentence_starts; increasing, the first is 0.
        dtype: of tokens. tokenizer_sha256: hexadecimal digits. num_bytes: of the file without its checksums.
    Raises:
        DataError: no shard, another version, or a size that is not what the header says.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int | None = None):
        self.path, self.vocab_size = Path(path), vocab_size
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                header = file.read(HEADER.size)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; prepare the data again") from error
        if len(header) < HEADER.size or header[:8] != MAGIC:
            raise DataError(f"{self.path}: not a fastroberta shard; give a directory written by fastroberta.prepare")
        _, version, item_size, num_tokens, num_sentences, num_documents, sha256 = HEADER.unpack(header)
        check_version(self.path, version)
        if item_size not in (2, 4):
            raise DataError(f"{self.path}: tokens of {item_size} bytes, not 2 or 4; {AGAIN}")
        self.num_tokens, self.num_sentences, self.num_documents = num_tokens, num_sentences, num_documents
        self.tokenizer_sha256: str = sha256.hex()
        self.dtype = np.dtype(f"<u{item_size}")
        tokens_end = HEADER.size + num_tokens * item_size
        self._sentences_at = tokens_end + -tokens_end % 8
        self._documents_at = self._sentences_at + 4 * num_sentences
        checksums_at = self._documents_at + 4 * num_documents
        num_chunks = -(-checksums_at // CHUNK_BYTES)
        expected = checksums_at + 4 * num_chunks
        if size != expected:
            raise DataError(
                f"{self.path}: {size} bytes, but its header says {expected}; copy it again or prepare the data again"
            )
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        contents = np.frombuffer(self._map, dtype=np.uint8)
        self.tokens = contents[HEADER.size : tokens_end].view(self.dtype)
        self.sentence_starts = contents[self._sentences_at : self._documents_at].view("<u4")
        self.document_starts = contents[self._documents_at : checksums_at].view("<u4")
        self._contents, self.num_bytes = contents[:checksums_at], checksums_at
        self._checksums = contents[checksums_at:].view("<u4")
        self._is_verified = bytearray(num_chunks)

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """`tokens[start:stop]`, verified.

        Raises:
            DataError: a flipped bit in the chunks read, or a token id outside the vocabulary.
        """
        self._verify(HEADER.size + start * self.dtype.itemsize, HEADER.size + stop * self.dtype.itemsize)
        return self.tokens[start:stop]

    def read_sentence_starts(self, start: int, stop: int) -> np.ndarray:
        """`sentence_starts[start:stop]`, verified, see `read_tokens`."""
        self._verify(self._sentences_at + 4 * start, self._sentences_at + 4 * stop)
        return self.sentence_starts[start:stop]

    def read_document_starts(self, start: int, stop: int) -> np.ndarray:
        """`document_starts[start:stop]`, verified, see `read_tokens`."""
        self._verify(self._documents_at + 4 * start, self._documents_at + 4 * stop)
        return self.document_starts[start:stop]

    def release(self) -> None:
        """Unmap the pages that have been read. They stay in the page cache, and no longer count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            self._map.madvise(mmap.MADV_DONTNEED)

    @property
    def verified_bytes(self) -> int:
        """How much of the file has been verified so far."""
        return min(sum(self._is_verified) * CHUNK_BYTES, self.num_bytes)

    def _verify(self, start: int, stop: int) -> None:
        """Hold the chunks with bytes [start, stop) of the file against their checksums, unless that has been done."""
        for index in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            if self._is_verified[index]:
                continue
            first, last = index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, self.num_bytes)
            if zlib.crc32(self._contents[first:last].data) != self._checksums[index]:
                raise DataError(f"{self.path}: bytes {first} to {last - 1} do not match their checksum; {AGAIN}")
            tokens = self.tokens[slice(*(max(0, at - HEADER.size) // self.dtype.itemsize for at in (first, last)))]
            if self.vocab_size is not None and (largest := tokens.max(initial=0)) >= self.vocab_size:
                raise DataError(
                    f"{self.path}: token id {largest} in a vocabulary of {self.vocab_size}; prepare the data again"
                )
            self._is_verified[index] = True


class ShardWriter:
    """Writes the documents of one split, in order, into shards of at most `max_tokens` tokens each.

    A document longer than that gets a shard of its own. Memory: the sentence and document starts of one shard.

    Args:
        directory: where; it exists.
        split: "train" or "heldout", the first part of the names.
        dtype: of the tokens, see `token_dtype`.
        tokenizer_sha256: hexadecimal digits.
    Use as a context manager: an exception leaves the finished shards and no half of another.
    """

    def __init__(
        self, directory: Path, split: str, dtype: np.dtype, tokenizer_sha256: str, max_tokens: int = MAX_SHARD_TOKENS
    ):
        self.directory, self.split, self.dtype, self.max_tokens = directory, split, np.dtype(dtype), max_tokens
        self.tokenizer_sha256 = bytes.fromhex(tokenizer_sha256)
        self.files: list[dict[str, Any]] = []  # entries for the manifest
        self._open_shard: contextlib.ExitStack | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is None:
            self.close()
        elif self._open_shard is not None:
            self._open_shard.__exit__(*exception)

    def append(self, tokens: np.ndarray, sentence_lengths: np.ndarray, document_sentences: np.ndarray) -> None:
        """Add documents.

        Args:
            tokens: their ids, each document's closed by `</s>`.
            sentence_lengths: tokens of each sentence; their sum is the number of tokens.
            document_sentences: sentences of each document, at least one; their sum is the number of sentences.
        """
        sentence_ends = np.concatenate([[0], np.cumsum(sentence_lengths, dtype=np.int64)])
        document_ends = np.concatenate([[0], np.cumsum(document_sentences, dtype=np.int64)])
        if sentence_ends[-1] != len(tokens) or document_ends[-1] != len(sentence_lengths):
            raise ValueError(
                f"ShardWriter.append: {len(tokens)} tokens and {len(sentence_lengths)} sentences, but the lengths sum "
                f"to {sentence_ends[-1]} and {document_ends[-1]}"
            )
        token_ends = sentence_ends[document_ends]  # of each document
        first, count = 0, len(document_sentences)
        while first < count:
            if self._open_shard is None:
                self._open()
            room = token_ends[first] + self.max_tokens - self._num_tokens
            last = int(np.searchsorted(token_ends, room, side="right")) - 1
            if last <= first:
                if self._num_tokens:
                    self.close()
                    continue
                last = first + 1  # longer than a shard
            self._write(
                tokens[token_ends[first] : token_ends[last]],
                sentence_ends[document_ends[first] : document_ends[last]] - token_ends[first],
                document_ends[first:last] - document_ends[first],
            )
            first = last

    def _open(self) -> None:
        with contextlib.ExitStack() as stack:
            self._name = f"{self.split}-{len(self.files):05d}.bin"
            self._file = stack.enter_context(write_atomically(self.directory / self._name))
            self._file.write(bytes(HEADER.size))
            self._num_tokens = self._num_sentences = 0
            self._sentence_starts: list[np.ndarray] = []
            self._document_starts: list[np.ndarray] = []
            self._open_shard = stack.pop_all()

    def _write(self, tokens: np.ndarray, sentence_starts: np.ndarray, document_starts: np.ndarray) -> None:
        if self._num_tokens + len(tokens) > MAX_SHARD_TOKENS:
            raise DataError(f"{self._name}: a document of {len(tokens)} tokens; split it, {MAX_SHARD_TOKENS} fit")
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._sentence_starts.append((sentence_starts + self._num_tokens).astype("<u4"))
        self._document_starts.append((document_starts + self._num_sentences).astype("<u4"))
        self._num_tokens += len(tokens)
        self._num_sentences += len(sentence_starts)

    def close(self) -> None:
        """Finish the shard that is open, if one is."""
        if self._open_shard is None:
            return
        with self._open_shard:
            token_bytes = self._num_tokens * self.dtype.itemsize
            self._file.write(bytes(-token_bytes % 8))
            for starts in self._sentence_starts + self._document_starts:
                self._file.write(starts.data)
            counts = (self._num_tokens, self._num_sentences, sum(map(len, self._document_starts)))
            self._file.seek(0)
            self._file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, *counts, self.tokenizer_sha256))
            self._file.seek(0)
            digest, checksums = hashlib.sha256(), []
            while chunk := self._file.read(CHUNK_BYTES):
                digest.update(chunk)
                checksums.append(zlib.crc32(chunk))
            table = np.array(checksums, dtype="<u4").tobytes()
            self._file.write(table)
            digest.update(table)
            entry = {"name": self._name, "split": self.split, "bytes": self._file.tell(), "sha256": digest.hexdigest()}
        self._open_shard = None
        self.files.append({**entry, **dict(zip(("tokens", "sentences", "documents"), counts))})


def check_version(path: Path, version: int) -> None:
    if version != VERSION:
        reason = ", which lacks the tokens of line breaks" if version == 1 else ""
        raise DataError(
            f"{path}: shard version {version}{reason}; this program reads version {VERSION}: prepare the text again, with "
            "another --out"
        )
