"""The format of token shards: `train-00000.bin`, ..., `heldout-00000.bin`, and the `manifest.json` that lists them.

A shard, little-endian throughout:

    offset  bytes
    0       8       magic, b"FASTROB\\0"
    8       4       version, 1
    12      4       bytes of a token: 2 (uint16) where every id of the vocabulary fits, otherwise 4 (uint32)
    16      8 x 3   number of tokens, of sentences, of documents
    40      32      SHA-256 of the tokenizer
    72      56      zeros
    128     ...     tokens, then zeros up to a multiple of 8 bytes
            ...     sentence starts, uint32: where each sentence begins in the tokens
            ...     document starts, uint32: where each document begins in the sentences

The tokens are each document's, followed by one `</s>` that belongs to its last sentence; there is no `<s>`, so that a
training block is `<s>` and a slice. A document lies in one shard. Everything is written to a temporary name and renamed
when it is complete, the manifest last.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import shlex
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

MAGIC = b"FASTROB\0"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ32s56x")
MAX_SHARD_TOKENS = 2**32 - 1  # sentence starts are 32-bit
SPLITS = ("train", "heldout")
CHUNK = 2**18  # tokens that are checked at once, few enough to stay in a core's cache
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

    Attributes:
        tokens: (num_tokens,) uint16 or uint32.
        sentence_starts: (num_sentences,) uint32, offsets into tokens; increasing, the first is 0.
        document_starts: (num_documents,) uint32, offsets into sentence_starts; increasing, the first is 0.
        dtype: of tokens. tokenizer_sha256: hexadecimal digits.
    Raises:
        DataError: no shard, another version, or a size that is not what the header says.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                header = file.read(HEADER.size)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; prepare the data again") from error
        if len(header) < HEADER.size or header[:8] != MAGIC:
            raise DataError(f"{self.path}: not a fastroberta shard; give a directory written by fastroberta.prepare")
        _, version, item_size, num_tokens, num_sentences, num_documents, sha256 = HEADER.unpack(header)
        if version != VERSION or item_size not in (2, 4):
            raise DataError(
                f"{self.path}: shard version {version} with {item_size}-byte tokens, this program reads version "
                f"{VERSION} with 2 or 4; prepare the data again"
            )
        self.num_tokens, self.num_sentences, self.num_documents = num_tokens, num_sentences, num_documents
        self.tokenizer_sha256: str = sha256.hex()
        self.dtype = np.dtype(f"<u{item_size}")
        sentences_at = HEADER.size + _round_up(num_tokens * item_size)
        documents_at = sentences_at + 4 * num_sentences
        expected = documents_at + 4 * num_documents
        if size != expected:
            raise DataError(
                f"{self.path}: {size} bytes, but its header says {expected}; copy it again or prepare the data again"
            )
        contents = np.memmap(self.path, dtype=np.uint8, mode="r")
        self.tokens = contents[HEADER.size : HEADER.size + num_tokens * item_size].view(self.dtype)
        self.sentence_starts = contents[sentences_at:documents_at].view("<u4")
        self.document_starts = contents[documents_at:].view("<u4")
        self._contents = contents

    def verify(self, sha256: str, vocab_size: int) -> None:
        """Read all of it, once, and hold it against its checksum and the vocabulary.

        Raises:
            DataError: a flipped bit, or a token id outside the vocabulary.
        """
        digest, largest = hashlib.sha256(self._contents[: HEADER.size].data), 0
        for start in range(0, self.num_tokens, CHUNK):
            tokens = self.tokens[start : start + CHUNK]
            digest.update(tokens.data)
            largest = max(largest, int(tokens.max()))
        digest.update(self._contents[HEADER.size + self.tokens.nbytes :].data)
        if digest.hexdigest() != sha256:
            raise DataError(f"{self.path}: its bytes do not have the manifest's checksum; {AGAIN}")
        if largest >= vocab_size:
            raise DataError(f"{self.path}: token id {largest} in a vocabulary of {vocab_size}; prepare the data again")


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
            self._file.write(bytes(_round_up(token_bytes) - token_bytes))
            for starts in self._sentence_starts + self._document_starts:
                self._file.write(starts.data)
            num_documents = sum(map(len, self._document_starts))
            size = self._file.tell()
            self._file.seek(0)
            self._file.write(
                HEADER.pack(
                    MAGIC,
                    VERSION,
                    self.dtype.itemsize,
                    self._num_tokens,
                    self._num_sentences,
                    num_documents,
                    self.tokenizer_sha256,
                )
            )
            self._file.seek(0)
            sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._open_shard = None
        self.files.append(
            {
                "name": self._name,
                "split": self.split,
                "bytes": size,
                "sha256": sha256,
                "tokens": self._num_tokens,
                "sentences": self._num_sentences,
                "documents": num_documents,
            }
        )


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds; `contents` is manifest.json whole."""

    directory: Path
    contents: dict[str, Any]
    tokenizer_sha256: str
    vocab_size: int
    special_token_ids: dict[str, int]  # bos_token_id, pad_token_id, eos_token_id, unk_token_id, mask_token_id

    def shard_paths(self, split: str) -> list[Path]:
        """The shards of "train" or "heldout", in order."""
        return [self.directory / entry["name"] for entry in self.contents["shards"] if entry["split"] == split]

    def count(self, split: str, what: str) -> int:
        """The number of "tokens", "sentences" or "documents" of a split."""
        return sum(entry[what] for entry in self.contents["shards"] if entry["split"] == split)

    def read_shards(self, split: str) -> list[ShardReader]:
        """The shards of a split, in order, after `ShardReader.verify`, which reads several at a time.

        Raises:
            DataError: the first of them that is damaged.
        """
        entries = [entry for entry in self.contents["shards"] if entry["split"] == split]
        shards = [ShardReader(self.directory / entry["name"]) for entry in entries]
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(lambda one, entry: one.verify(entry["sha256"], self.vocab_size), shards, entries))
        return shards


def load_manifest(directory: str | os.PathLike[str], *, verify: bool = False) -> Manifest:
    """Read a prepared directory's manifest and hold the files against it.

    Always: every file is there with its size, every shard's header agrees, and the small tokenizer files have their
    checksums. With `verify`, the shards' checksums too, which reads all of them; `read_shards` does so for a split.

    Raises:
        DataError: whatever does not fit, and what to do.
    """
    directory = Path(directory)
    path = directory / "manifest.json"
    try:
        contents = json.loads(path.read_bytes())
        if contents.get("format") != "fastroberta-shards" or contents["version"] != VERSION:
            raise DataError(
                f"{path}: not of format fastroberta-shards, version {VERSION}; give a directory that this version's "
                "fastroberta.prepare has written"
            )
        manifest = Manifest(
            directory,
            contents,
            str(contents["tokenizer_sha256"]),
            int(contents["vocab_size"]),
            {str(name): int(token_id) for name, token_id in contents["special_token_ids"].items()},
        )
        shards, tokenizer_files = contents["shards"], contents["tokenizer_files"]
        checksums = {entry["name"]: str(entry["sha256"]) for entry in shards + tokenizer_files}
        names = [Path(entry["name"]).name for entry in shards + tokenizer_files]
        if names != [entry["name"] for entry in shards + tokenizer_files]:
            raise DataError(f"{path}: names a file outside its directory; run prepare again with another --out")
        for entry in shards + tokenizer_files:
            file = directory / entry["name"]
            if not file.is_file():
                raise DataError(f"{file}: listed in the manifest, but missing; {AGAIN}")
            if (size := file.stat().st_size) != entry["bytes"]:
                raise DataError(f"{file}: {size} bytes, the manifest says {entry['bytes']}; {AGAIN}")
        for entry in shards:
            shard = ShardReader(directory / entry["name"])
            counts = (shard.num_tokens, shard.num_sentences, shard.num_documents)
            if counts != (entry["tokens"], entry["sentences"], entry["documents"]):
                raise DataError(f"{shard.path}: tokens, sentences, documents {counts} unlike the manifest's; {AGAIN}")
            if shard.tokenizer_sha256 != manifest.tokenizer_sha256:
                raise DataError(f"{shard.path}: made with another tokenizer than the manifest's; {AGAIN}")
            if shard.dtype != token_dtype(manifest.vocab_size):
                raise DataError(f"{shard.path}: {shard.dtype} for a vocabulary of {manifest.vocab_size}; {AGAIN}")
        for entry in shards + tokenizer_files if verify else tokenizer_files:
            if file_sha256(directory / entry["name"]) != checksums[entry["name"]]:
                raise DataError(f"{directory / entry['name']}: its bytes do not have the manifest's checksum; {AGAIN}")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not directory.exists():
            raise DataError(f"{directory}: no such directory; give one that fastroberta.prepare has written") from error
        raise DataError(
            f"{directory}: {'has no manifest.json' if directory.is_dir() else 'is a file'}, so it is not prepared data; "
            f"prepare text first: python -m fastroberta.prepare {shlex.quote(str(directory))} --out DIR --tokenizer "
            "TOKENIZER (or --train-tokenizer 50265), and give DIR; a prepare that was stopped goes on by its own command"
        ) from error
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; {AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    return manifest


def write_manifest(directory: Path, contents: dict[str, Any]) -> None:
    """Write manifest.json, which makes the directory a finished one; `contents` without format and version."""
    contents = {"format": "fastroberta-shards", "version": VERSION, **contents}
    with write_atomically(directory / "manifest.json") as file:
        file.write(json.dumps(contents, indent=1, ensure_ascii=False).encode() + b"\n")


def _round_up(size: int) -> int:
    return -(-size // 8) * 8
