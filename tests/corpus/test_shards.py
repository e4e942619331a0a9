"""The shard format: what is written is read back, and what is damaged is refused with a line that says what to do."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from fastroberta.corpus.manifest import load_manifest, write_manifest
from fastroberta.corpus.shards import HEADER, ShardReader, ShardWriter, file_sha256, token_dtype, write_atomically
from fastroberta.errors import DataError

SHA = "ab" * 32


def write(directory, documents, *, dtype="<u2", max_tokens=10**6, batches=1):
    """documents: lists of sentences, which are lists of ids."""
    with ShardWriter(directory, "train", np.dtype(dtype), SHA, max_tokens) as writer:
        for batch in np.array_split(np.arange(len(documents)), batches):
            chosen = [documents[index] for index in batch]
            sentences = [sentence for document in chosen for sentence in document]
            writer.append(
                np.array([token for sentence in sentences for token in sentence], dtype=dtype),
                np.array([len(sentence) for sentence in sentences], dtype=np.uint32),
                np.array([len(document) for document in chosen], dtype=np.uint32),
            )
    return writer.files


def read(paths):
    """The documents of shards, in the form that `write` takes."""
    documents = []
    for path in paths:
        shard = ShardReader(path)
        bounds = [*shard.sentence_starts.tolist(), shard.num_tokens]
        sentences = [shard.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
        bounds = [*shard.document_starts.tolist(), shard.num_sentences]
        documents += [sentences[a:b] for a, b in itertools.pairwise(bounds)]
    return documents


def random_documents(count=50, largest=60000):
    random = np.random.default_rng(0)
    return [
        [random.integers(0, largest, random.integers(1, 9)).tolist() for _ in range(random.integers(1, 6))]
        for _ in range(count)
    ]


def finished(directory):
    """A whole prepared directory, without a real tokenizer."""
    entries = write(directory, random_documents(), max_tokens=300)
    (directory / "tokenizer.json").write_text("{}")
    contents = {
        "tokenizer_sha256": SHA,
        "vocab_size": 60000,
        "special_token_ids": {"bos_token_id": 0},
        "shards": entries,
        "tokenizer_files": [
            {"name": "tokenizer.json", "bytes": 2, "sha256": file_sha256(directory / "tokenizer.json")}
        ],
    }
    write_manifest(directory, contents)
    return directory


@pytest.mark.parametrize("dtype, largest", [("<u2", 2**16), ("<u4", 2**32)])
def test_what_is_written_is_read_back(tmp_path, dtype, largest):
    documents = random_documents(largest=largest)
    entries = write(tmp_path, documents, dtype=dtype)
    shard = ShardReader(tmp_path / "train-00000.bin")
    assert read([shard.path]) == documents
    assert (shard.dtype, shard.tokenizer_sha256) == (np.dtype(dtype), SHA)
    assert not shard.tokens.flags.owndata  # mapped, not read
    assert entries[0]["documents"] == shard.num_documents == len(documents)
    assert entries[0]["sha256"] == file_sha256(shard.path) and entries[0]["bytes"] == shard.path.stat().st_size


@pytest.mark.parametrize("batches", [1, 7, 50])
def test_shards_are_filled_with_whole_documents(tmp_path, batches):
    documents = random_documents()
    documents[20] = [[1] * 500]  # longer than a shard
    entries = write(tmp_path, documents, max_tokens=100, batches=batches)
    paths = [tmp_path / entry["name"] for entry in entries]
    assert [path.name for path in paths] == [f"train-{number:05d}.bin" for number in range(len(paths))]
    assert read(paths) == documents
    assert sorted(entry["tokens"] for entry in entries)[-2] <= 100
    assert max(entry["tokens"] for entry in entries) == 500
    # Full: no shard could have taken the next one's first document too.
    for entry, following in zip(entries, paths[1:]):
        assert entry["tokens"] + sum(map(len, read([following])[0])) > 100
    # However the documents came in, the bytes are the same.
    (tmp_path / "other").mkdir()
    assert write(tmp_path / "other", documents, max_tokens=100) == entries


def test_an_empty_shard_set_has_no_files(tmp_path):
    assert write(tmp_path, []) == [] and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_and_replaces_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), write_atomically(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", np.dtype("<u2"), SHA) as writer:
        writer.append(np.zeros(3, "<u2"), np.array([3]), np.array([1]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [path]


def test_lengths_that_do_not_add_up_are_a_fault_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="lengths sum"), ShardWriter(tmp_path, "train", np.dtype("<u2"), SHA) as writer:
        writer.append(np.zeros(3, "<u2"), np.array([2]), np.array([1]))


def test_the_dtype_holds_every_id():
    assert token_dtype(2**16).itemsize == 2  # the largest id is 65535
    assert token_dtype(2**16 + 1).itemsize == 4


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "not a fastroberta shard"),
        (lambda path: patch(path, 0, b"X"), "not a fastroberta shard"),
        (
            lambda path: patch(path, 8, struct.pack("<I", 9)),
            "shard version 9; this program reads version 2: prepare the text again",
        ),
        (lambda path: patch(path, 8, struct.pack("<I", 1)), "version 1, which lacks the tokens of line breaks"),
        (lambda path: patch(path, 12, struct.pack("<I", 3)), "tokens of 3 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "its header says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"1234"), "its header says"),
        (lambda path: patch(path, 16, struct.pack("<Q", 2**63)), "its header says"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path, damage, message):
    write(tmp_path, random_documents(5))
    path = tmp_path / "train-00000.bin"
    damage(path)
    with pytest.raises(DataError, match=message) as error:
        ShardReader(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_whole_directory_is_accepted(tmp_path):
    manifest = load_manifest(finished(tmp_path), verify=True)
    assert manifest.count("train", "documents") == 50 and manifest.count("heldout", "documents") == 0
    assert read(manifest.shard_paths("train")) == random_documents()
    assert manifest.special_token_ids == {"bos_token_id": 0}


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda d: (d / "manifest.json").unlink(),
            "has no manifest.json, so it is not prepared data; prepare text first",
        ),
        (lambda d: edit(d, None, "shards", 0), "damaged"),
        (lambda d: edit(d, {"name": "train-00000.bin", "bytes": 1}, "shards", 0), "damaged .*sha256"),
        (lambda d: (d / "manifest.json").write_text("{"), "damaged"),
        (lambda d: (d / "manifest.json").write_text("[]"), "damaged"),
        (lambda d: (d / "manifest.json").write_text('{"format": "fastroberta-shards", "version": 2}'), "damaged"),
        (lambda d: (d / "manifest.json").write_text('{"format": "other", "version": 1}'), "not of format"),
        (lambda d: (d / "manifest.json").write_text('{"step": 4, "files": {}}'), "not of format"),  # a checkpoint's
        (lambda d: edit(d, "../x", "shards", 0, "name"), "outside its directory"),
        (
            lambda d: edit(d, [{"name": "../x"}], "duplicate_tables"),
            "outside its directory",
        ),  # --append would delete it
        (lambda d: edit(d, "cd" * 32, "tokenizer_sha256"), "another tokenizer"),
        (lambda d: edit(d, 70000, "vocab_size"), "for a vocabulary of 70000"),
        (lambda d: edit(d, 1, "shards", 1, "documents"), "unlike the manifest"),
        (lambda d: (d / "train-00001.bin").unlink(), "missing"),
        (lambda d: (d / "train-00001.bin").write_bytes(b""), "0 bytes, the manifest says"),
        (lambda d: (d / "tokenizer.json").write_text("[]"), "checksum"),
    ],
)
def test_what_does_not_fit_the_manifest_is_refused(tmp_path, damage, message):
    damage(finished(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        load_manifest(tmp_path)
    assert "\n" not in str(error.value)


def edit(directory, value, *keys):
    """Change the manifest and write it again, with a checksum that is right."""
    contents = json.loads((directory / "manifest.json").read_text())
    inner = contents
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write_manifest(directory, contents)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    path = finished(tmp_path) / "manifest.json"
    data = path.read_bytes()
    bits = np.random.default_rng(0).integers(0, 8, len(data))
    for place, bit in enumerate(bits):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(bit)]) + data[place + 1 :])
        with pytest.raises(DataError):
            load_manifest(tmp_path)
    path.write_bytes(data)
    load_manifest(tmp_path)
    # The same contents in other words.
    path.write_bytes(data.replace(b'"version": 2', b'"version": 2.0'))
    with pytest.raises(
        DataError, match=r"manifest\.json: its bytes do not match the checksum in it; copy the directory"
    ):
        load_manifest(tmp_path)


def test_verify_finds_one_flipped_bit(tmp_path):
    path = finished(tmp_path) / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[HEADER.size + 3] ^= 1
    path.write_bytes(data)
    load_manifest(tmp_path)  # sizes and headers are right
    with pytest.raises(DataError, match=r"train-00001\.bin.*checksum"):
        load_manifest(tmp_path, verify=True)


def read_all(shards):
    for shard in shards:
        shard.read_tokens(0, shard.num_tokens)
        shard.read_sentence_starts(0, shard.num_sentences)
        shard.read_document_starts(0, shard.num_documents)


@pytest.mark.parametrize(
    "where", ["header", "first token", "last token", "padding", "sentence starts", "document starts", "checksums"]
)
def test_reading_finds_one_flipped_bit_before_it_is_used(tmp_path, monkeypatch, where):
    monkeypatch.setattr("fastroberta.corpus.shards.CHUNK_BYTES", 192)  # several chunks, the last one short
    manifest = load_manifest(finished(tmp_path))
    shards = manifest.read_shards("train")
    shard = next(one for one in shards[1:] if one.tokens.nbytes % 8)
    assert shard.verified_bytes == 192 < shard.num_bytes
    read_all(shards)
    assert all(one.verified_bytes == one.num_bytes for one in shards)
    num_checksums = -(-shard.num_bytes // 192)
    offset = {
        "header": HEADER.size - 1,
        "first token": HEADER.size,
        "last token": HEADER.size + shard.tokens.nbytes - 1,
        "padding": HEADER.size + shard.tokens.nbytes,
        "sentence starts": shard.num_bytes - shard.document_starts.nbytes - 1,
        "document starts": shard.num_bytes - 1,
        "checksums": shard.num_bytes + 4 * (num_checksums // 2),
    }[where]
    data = bytearray(shard.path.read_bytes())
    data[offset] ^= 1
    shard.path.write_bytes(data)
    load_manifest(tmp_path)  # what can be seen without reading everything is right
    with pytest.raises(
        DataError,
        match=rf"{shard.path.name}: bytes \d+ to \d+ do not match .*; copy the directory again, or run prepare",
    ) as error:
        read_all(manifest.read_shards("train"))
    assert "\n" not in str(error.value)
    assert manifest.read_shards("heldout") == []


def test_only_what_is_read_is_verified(tmp_path, monkeypatch):
    monkeypatch.setattr("fastroberta.corpus.shards.CHUNK_BYTES", 192)
    manifest = load_manifest(finished(tmp_path))
    shard = manifest.read_shards("train")[0]
    data = bytearray(shard.path.read_bytes())
    data[HEADER.size + shard.tokens.nbytes - 1] ^= 1
    shard.path.write_bytes(data)
    shard = manifest.read_shards("train")[0]
    assert shard.read_tokens(40, 60).tolist() == shard.tokens[40:60].tolist()
    assert shard.verified_bytes == 2 * 192  # the header's chunk and one more
    shard.release()
    with pytest.raises(DataError, match="checksum"):
        shard.read_tokens(50, shard.num_tokens)


def test_reading_refuses_token_ids_outside_the_vocabulary(tmp_path):
    edit(finished(tmp_path), 50000, "vocab_size")
    with pytest.raises(DataError, match=r"train-00000.bin: token id 5\d{4} in a vocabulary of 50000; prepare"):
        read_all(load_manifest(tmp_path).read_shards("train"))


def test_reading_shards_imports_no_torch():
    code = "import sys, fastroberta.corpus.shards, fastroberta.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
