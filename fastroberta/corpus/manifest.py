"""`manifest.json` of a prepared directory: its shards, its tokenizer, and how they were made. Written last, it completes the
directory; a SHA-256 of its own bytes in it tells a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .shards import AGAIN, VERSION, ShardReader, check_version, file_sha256, token_dtype, write_atomically

UNSEALED = "0" * 64  # where a manifest's own checksum goes


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
        """The shards of a split, in order; what is read from them is verified then.

        Raises:
            DataError: a damaged header.
        """
        shards = [ShardReader(path, self.vocab_size) for path in self.shard_paths(split)]
        for shard in shards:
            shard.read_tokens(0, min(1, shard.num_tokens))  # and the header before it
        return shards


def load_manifest(directory: str | os.PathLike[str], *, verify: bool = False) -> Manifest:
    """Read a prepared directory's manifest and check the files against it.

    Always checked: the manifest's own checksum, the size of every file, the header of every shard, and the checksums of the
    tokenizer's files. With `verify`, also the checksums of all shards, which reads them whole; without it, a shard is
    verified as it is read (see `ShardReader`).

    Raises:
        DataError: what does not match, and what to do.
    """
    directory = Path(directory)
    path = directory / "manifest.json"
    try:
        data = path.read_bytes()
        contents = json.loads(data)
        if contents.get("format") != "fastroberta-shards":
            raise DataError(f"{path}: not of format fastroberta-shards; give a directory that prepare has written")
        check_version(path, contents["version"])
        if _seal(data, contents["sha256"]) != contents["sha256"]:
            raise DataError(f"{path}: its bytes do not match the checksum in it; {AGAIN}")
        manifest = Manifest(
            directory,
            contents,
            str(contents["tokenizer_sha256"]),
            int(contents["vocab_size"]),
            {str(name): int(token_id) for name, token_id in contents["special_token_ids"].items()},
        )
        shards, tokenizer_files = contents["shards"], contents["tokenizer_files"]
        checksums = {entry["name"]: str(entry["sha256"]) for entry in shards + tokenizer_files}
        names = [entry["name"] for entry in [*shards, *tokenizer_files, *contents.get("duplicate_tables", [])]]
        if names != [Path(name).name for name in names]:  # --append deletes the old tables
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
            "TOKENIZER (or --train-tokenizer 50265), and give DIR; if prepare was interrupted, run the same command again"
        ) from error
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; {AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    return manifest


def write_manifest(directory: Path, contents: dict[str, Any]) -> None:
    """Write manifest.json, which completes the directory; `contents` come without format, version and checksum."""
    head = {"format": "fastroberta-shards", "version": VERSION, "sha256": UNSEALED}
    # ASCII, because a file's name may hold bytes that are not UTF-8.
    data = json.dumps({**head, **contents, **head}, indent=1).encode() + b"\n"
    with write_atomically(directory / "manifest.json") as file:
        file.write(data.replace(UNSEALED.encode(), _seal(data, UNSEALED).encode(), 1))


def _seal(data: bytes, checksum: str) -> str:
    """The SHA-256 of a manifest's bytes, in which the checksum itself counts as zeros."""
    return hashlib.sha256(data.replace(checksum.encode(), UNSEALED.encode(), 1)).hexdigest()
