"""The program from text to shards: formats, cleaning, bad input, interruption, shares, and the same bytes always."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

import fastroberta.corpus.chunks
import fastroberta.corpus.deduplicate
import fastroberta.corpus.read
import fastroberta.prepare
from fastroberta.cli.directories import own_directory
from fastroberta.cli.program import run
from fastroberta.corpus.shards import ShardReader, load_manifest
from fastroberta.corpus.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from fastroberta.data import open_split
from fastroberta.errors import ConfigurationError, DataError, Stopped
from fastroberta.prepare import PrepareConfig, main, merge, prepare

DOCUMENTS = ["One. Two\nthree.", "café au lait", "Third document, a little longer than the others."]


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    lines = [line for name in sorted(topics)[:20] for line in topics[name].split("\n")]
    save_tokenizer(train_tokenizer(lines, 600), directory)
    return str(directory)


@pytest.fixture
def go(tmp_path, tokenizer_directory):
    """Prepare inputs into tmp_path/out in this process; the manifest."""

    def call(*inputs, out="out", **options):
        options = {"tokenizer": tokenizer_directory, "heldout_fraction": 0.0, "workers": 1, **options}
        config = PrepareConfig(inputs=[str(path) for path in inputs], out=str(tmp_path / out), **options)
        return merge(config) if config.merge else prepare(config)

    return call


def texts(manifest, split="train"):
    """The documents of a prepared directory; line ends are not in the tokens."""
    tokenizer = load_tokenizer(manifest.directory)
    found = []
    for path in manifest.shard_paths(split):
        shard = ShardReader(path)
        starts = [*shard.sentence_starts[np.asarray(shard.document_starts)].tolist(), shard.num_tokens]
        for start, end in pairwise(starts):
            assert shard.tokens[end - 1] == manifest.special_token_ids["eos_token_id"]
            found.append(tokenizer.decode(shard.tokens[start : end - 1].tolist()))
    return found


def joined(documents):
    return ["".join(line.strip() for line in document.split("\n")) for document in documents]


def corpus(seed=0, count=300):
    """Documents of words in random order, so that none equals another."""
    draw = random.Random(seed)
    words = sorted({word for name in sorted(topics)[:10] for word in topics[name].split() if word.isalpha()})
    sentence = lambda: " ".join(draw.choices(words, k=draw.randrange(3, 20))).capitalize() + "."  # noqa: E731
    return [f"Number {n}. " + " ".join(sentence() for _ in range(draw.randrange(1, 6))) for n in range(count)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)))
    return path


def digest(directory):
    """Every file's bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(directory).iterdir()}


# ---- cleaning


def test_each_cleaning_step_is_counted(go, tmp_path):
    long = " ".join(corpus(count=20))[:1500]
    documents = [
        "cafe\u0301 with a combining accent",
        "short",
        "x" * 2000,
        " \n ",
        long,
        long,  # exact
        long.replace("Number 3.", "number 3!") + " More",  # near
        "café with a combining accent",  # exact, once in NFC
        "Something else altogether, of ordinary length.",
    ]
    manifest = go(
        write_jsonl(tmp_path / "a.jsonl", documents),
        nfc=True, min_characters=10, max_characters=1900, exact_duplicates=True, near_duplicates=0.8,
    )  # fmt: skip
    counts = manifest.contents["report"]["counts"]
    assert counts.pop("bytes") == (tmp_path / "a.jsonl").stat().st_size
    assert counts == {
        "read": 9, "normalized": 1, "empty": 1, "too_short": 1, "too_long": 1,
        "exact_duplicates": 2, "near_duplicates": 1,
    }  # fmt: skip
    assert texts(manifest) == [documents[7], long, documents[8]]


def test_without_cleaning_everything_stays(go, tmp_path):
    documents = ["same", "same", "e\u0301"]
    assert texts(go(write_jsonl(tmp_path / "a.jsonl", documents))) == documents


@pytest.mark.parametrize("keys_at_once", [1, 7, 10**6])
def test_duplicates_are_found_in_parts_as_at_once(tmp_path, monkeypatch, keys_at_once):
    monkeypatch.setattr(fastroberta.corpus.deduplicate, "_KEYS_AT_ONCE", keys_at_once)
    monkeypatch.setattr(fastroberta.corpus.deduplicate, "_ROWS_AT_ONCE", 10)
    hashes = np.random.default_rng(0).integers(0, 30, (100, 2)).astype(np.uint64)
    hashes[:, 1] = hashes[:, 0]
    hashes[50, 1] = 99  # the first half alone does not make a duplicate
    hashes.tofile(tmp_path / "hashes")
    seen, expected = set(), []
    for row in map(tuple, hashes.tolist()):
        expected.append(row in seen)
        seen.add(row)
    found = fastroberta.corpus.deduplicate.find_exact_duplicates(tmp_path / "hashes", 100)
    assert found.tolist() == expected and sum(expected) > 50 and not expected[50]


def test_near_duplicates_are_those_above_the_threshold(tmp_path):
    """Measured against the true Jaccard similarity of the shingles."""
    pytest.importorskip("datasketch")
    draw = random.Random(0)
    words = [f"w{n}" for n in range(5000)]
    originals = [draw.choices(words, k=200) for _ in range(60)]
    copies = []
    for number, original in enumerate(originals):  # from hardly to much changed
        copy = list(original)
        for _ in range(number // 3):
            copy[draw.randrange(200)] = "new"
        copies.append(copy)
    signer = fastroberta.corpus.deduplicate.Signer()
    signatures = np.stack([signer.sign(" ".join(words)) for words in originals + copies])
    signatures.tofile(tmp_path / "signatures")
    found = fastroberta.corpus.deduplicate.find_near_duplicates(tmp_path / "signatures", 120, 0.7)
    assert not found[:60].any()
    for original, copy, is_near in zip(originals, copies, found[60:]):
        a, b = ({tuple(text[i : i + 5]) for i in range(196)} for text in (original, copy))
        similarity = len(a & b) / len(a | b)
        if abs(similarity - 0.7) > 0.12:  # three standard errors of 128 permutations
            assert is_near == (similarity > 0.7)


def test_an_equal_band_alone_makes_no_duplicate(tmp_path):
    pytest.importorskip("datasketch")
    signatures = np.random.default_rng(0).integers(0, 2**32, (3, 128)).astype(np.uint32)
    signatures[1, :64] = signatures[0, :64]
    signatures[2, 28:] = signatures[1, 28:]
    signatures.tofile(tmp_path / "signatures")
    found = fastroberta.corpus.deduplicate.find_near_duplicates(tmp_path / "signatures", 3, 0.7)
    assert found.tolist() == [False, False, True]


def test_a_long_document_is_signed_in_parts(monkeypatch):
    pytest.importorskip("datasketch")
    text = " ".join(corpus(count=20))
    whole = fastroberta.corpus.deduplicate.Signer().sign(text)
    monkeypatch.setattr(fastroberta.corpus.deduplicate, "_ROWS_AT_ONCE", 10)
    assert (fastroberta.corpus.deduplicate.Signer().sign(text) == whole).all()
    assert fastroberta.corpus.deduplicate.Signer().sign("...").shape == whole.shape  # no word at all


def test_held_out_is_a_function_of_the_text(go, tmp_path):
    documents = corpus(count=400)
    first = go(write_jsonl(tmp_path / "a.jsonl", documents), heldout_fraction=0.1)
    heldout = set(texts(first, "heldout"))
    assert 20 < len(heldout) < 65 and heldout.isdisjoint(texts(first))
    other = go(write_jsonl(tmp_path / "b.jsonl", documents[:5:-1]), heldout_fraction=0.1, out="other")
    assert set(texts(other, "heldout")) == heldout & set(documents[6:])
    assert set(texts(go(tmp_path / "a.jsonl", heldout_fraction=0.2, out="more"), "heldout")) > heldout


# ---- bad input


@pytest.mark.parametrize(
    "data, options, message",
    [
        (b"\n \n\n", {}, "give more text, or clean less"),
        (b"a\n\nb\n\n\xe2\x80\x89", {"min_characters": 5}, "left out: 1 empty, 2 too short; give more text"),
        (b"\xff\n\n" * 300, {"on_bad_input": "skip"}, "mended or left out: 300 invalid UTF-8; give other text"),
    ],
)  # fmt: skip
def test_a_corpus_without_a_document_is_refused(go, tmp_path, data, options, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=f"no document is left; {message}"):
        go(tmp_path / "a.txt", **options)


# ---- the same bytes, however it was run


def start(tmp_path, tokenizer_directory, *options):
    """The program in a process of its own, with small chunks so that there is something to interrupt."""
    code = (
        "import sys, fastroberta.corpus.read, fastroberta.prepare, fastroberta.cli.program\n"
        "if __name__ == '__main__':\n"
        "    fastroberta.corpus.read.CHUNK_BYTES = fastroberta.prepare.CHUNK_BYTES = 4000\n"
        "    sys.exit(fastroberta.cli.program.run(fastroberta.prepare.main))\n"
    )
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, str(tmp_path / "program.py"), *map(str, options), "--tokenizer", tokenizer_directory]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)


def test_the_number_of_workers_changes_nothing(tmp_path, tokenizer_directory, capfd):
    source = write_jsonl(tmp_path / "a.jsonl", corpus() + corpus()[:50])
    options = ["--shard-tokens", "3000", "--heldout-fraction", "0.1", "--exact-duplicates", "--near-duplicates", "0.9"]
    for workers in (1, 2):
        program = start(tmp_path, tokenizer_directory, source, "--out", f"out{workers}", "--workers", workers, *options)
        output, errors = program.communicate(timeout=120)
        assert program.returncode == 0, errors
        assert "left out: exact duplicates  50\n" in output
    assert digest(tmp_path / "out1") == digest(tmp_path / "out2")
    assert len(load_manifest(tmp_path / "out1", verify=True).shard_paths("train")) > 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_continues_to_the_same_bytes(go, tmp_path, tokenizer_directory, number, workers):
    source = write_jsonl(tmp_path / "a.jsonl", corpus(count=1500))
    whole = digest(go(source, shard_tokens=5000, heldout_fraction=0.1, out="whole").directory)
    options = [source, "--out", "out", "--shard-tokens", 5000, "--heldout-fraction", 0.1, "--workers", workers]
    program = start(tmp_path, tokenizer_directory, *options)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("work/*.npz"))) < 3 and program.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = list_children(program.pid)
    assert len(children) >= (workers if workers > 1 else 0) or not os.path.exists("/proc")
    if number == signal.SIGINT:  # as a terminal sends it: to the workers too
        os.killpg(program.pid, number)
    else:
        program.send_signal(number)
    _, errors = program.communicate(timeout=120)
    assert not (tmp_path / "out" / "manifest.json").exists(), "finished before it could be interrupted"
    assert program.returncode == (-9 if number == signal.SIGKILL else 75)
    if number != signal.SIGKILL:
        assert "the same command continues" in errors and "Traceback" not in errors
    for child in children:  # no worker outlives its parent
        while is_running(child):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "work").glob("*.npz")}
    (tmp_path / "out" / "work" / "000000-000099.npz.1.tmp").write_text("half a chunk")
    finish = start(tmp_path, tokenizer_directory, *options)
    _, errors = finish.communicate(timeout=120)
    assert finish.returncode == 0, errors
    assert before and digest(tmp_path / "out") == whole


def test_an_idle_worker_goes_with_its_parent(tmp_path, tokenizer_directory):
    (tmp_path / "program.py").write_text(
        "import multiprocessing, os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from fastroberta.corpus.chunks import ChunkSettings, start_worker\n"
        "from fastroberta.corpus.clean import CleaningSettings\n"
        "def work(tokenizer, ready):\n"
        "    start_worker(tokenizer, ChunkSettings('line', 'text', True, CleaningSettings(), False, 'error'))\n"
        "    ready.put(os.getpid())\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    ready = spawn.SimpleQueue()\n"
        "    spawn.Process(target=work, args=(Path(sys.argv[1]).read_text(), ready)).start()\n"
        "    print(ready.get(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, str(tmp_path / "program.py"), f"{tokenizer_directory}/tokenizer.json"]
    with open(tmp_path / "output", "w+") as output:  # not a pipe: the worker would hold it open
        assert subprocess.run(command, stdout=output, cwd=tmp_path, timeout=60).returncode == -signal.SIGKILL
        output.seek(0)
        worker = int(output.read())
    deadline = time.monotonic() + 20
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def list_children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(path.parent.name))
    return found


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_done_chunks_are_not_done_again(go, tmp_path, monkeypatch):
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 4000)
    source = write_jsonl(tmp_path / "a.jsonl", corpus())
    whole = digest(go(source, out="whole").directory)
    process, done = fastroberta.corpus.chunks.ChunkProcessor.process, []

    def fail_at_fifth(self, chunk, path):
        if len(done) == 5:
            raise Stopped("stopped")
        done.append(chunk.number)
        return process(self, chunk, path)

    monkeypatch.setattr(fastroberta.corpus.chunks.ChunkProcessor, "process", fail_at_fifth)
    with pytest.raises(Stopped):
        go(source)
    monkeypatch.setattr(
        fastroberta.corpus.chunks.ChunkProcessor, "process", lambda *a: (done.append(a[1].number), process(*a))[1]
    )
    assert digest(go(source).directory) == whole
    assert done == list(range(len(done))) and len(done) > 10


@contextlib.contextmanager
def stop_in(name, monkeypatch):
    """Stop a run as a signal would, where it calls a function of the module."""

    def stop_here(*arguments):
        raise Stopped("stopped")

    with monkeypatch.context() as context, pytest.raises(Stopped):
        context.setattr(fastroberta.prepare, name, stop_here)
        yield


@pytest.mark.parametrize("train", [False, True])
def test_a_file_that_changed_is_done_again(go, tmp_path, monkeypatch, tokenizer_directory, train):
    tokenizer = {"tokenizer": None, "train_tokenizer": 300} if train else {}
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", corpus(seed, 40)) for seed, name in enumerate("abc")]
    with stop_in("assemble", monkeypatch):
        go(*paths, **tokenizer)
    write_jsonl(paths[1], corpus(7, 50))
    changed = go(*paths, **tokenizer)
    fresh = go(*paths, out="fresh", **tokenizer)
    assert digest(changed.directory) == digest(fresh.directory)
    assert texts(changed) == corpus(0, 40) + corpus(7, 50) + corpus(2, 40)


def test_other_options_are_not_mixed_into_an_unfinished_run(go, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", corpus(count=20))
    with stop_in("assemble", monkeypatch):
        go(source)
    with pytest.raises(ConfigurationError, match=r"unfinished run with min_characters = 0, this run has 5"):
        go(source, min_characters=5)
    with pytest.raises(ConfigurationError, match="with inputs"):
        go(source, write_jsonl(tmp_path / "b.jsonl", DOCUMENTS))
    go(source)
    with pytest.raises(ConfigurationError, match="finished corpus with nfc = False, this run has True"):
        go(source, nfc=True)


def test_a_first_try_that_made_nothing_binds_nobody(go, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    training = {"tokenizer": None, "train_tokenizer": 300}
    for wrong in ({"text_field": "body"}, {"text_field": "body", **training}, {"nfc": True, "text_field": "body"}):
        with pytest.raises(DataError, match="no text in 'body'"):
            go(source, **wrong)
    assert texts(go(source)) == joined(DOCUMENTS)


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": None, "train_tokenizer": 300}])
def test_a_run_that_left_nothing_binds_nobody(go, tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match="no document is left; left out: 3 too short"):
        go(source, min_characters=1000, **tokenizer)
    assert texts(go(source, min_characters=5, **tokenizer)) == joined(DOCUMENTS)


def test_a_tokenizer_that_was_trained_binds_its_options(go, tmp_path, monkeypatch):
    """It is of the text that they chose, though no chunk may be there yet."""
    source = write_jsonl(tmp_path / "a.jsonl", corpus(count=20))
    training = {"tokenizer": None, "train_tokenizer": 300}
    with stop_in("_tokenize", monkeypatch):
        go(source, **training)
    with pytest.raises(ConfigurationError, match="unfinished run with nfc = False"):
        go(source, nfc=True, **training)
    (tmp_path / "out" / "work" / "tokenizer.tmp").mkdir()  # as an interruption can leave it
    assert go(source, **training).vocab_size == 300


def test_a_finished_run_says_so_and_changes_nothing(go, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    go(source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    go(source)
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_finished_run_over_changed_inputs_is_refused(go, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    source = write_jsonl(folder / "a.jsonl", DOCUMENTS)
    before = source.stat()
    out = go(folder).directory

    def is_refused(path):
        with pytest.raises(ConfigurationError) as error:
            go(folder)
        return f"{path.name} was changed, added or removed since; give another --out" in str(error.value)

    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert is_refused(source)
    write_jsonl(source, DOCUMENTS[:2])
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_refused(source)  # by its size
    write_jsonl(source, DOCUMENTS)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    go(folder)
    added = write_jsonl(folder / "b.jsonl", DOCUMENTS)
    assert is_refused(added)
    added.unlink()
    source.rename(folder / "c.jsonl")
    assert is_refused(folder / "c.jsonl")

    # What was prepared before the manifest held the inputs stays of use.
    contents = json.loads((out / "manifest.json").read_text())
    del contents["files"]
    (out / "manifest.json").write_text(json.dumps(contents))
    assert texts(go(folder)) == joined(DOCUMENTS)


def test_two_runs_do_not_write_one_directory(go, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with (
        own_directory(tmp_path / "out", "work/lock", "--out"),
        pytest.raises(ConfigurationError, match="another run"),
    ):
        go(source)
    go(source)


def test_a_damaged_chunk_is_named(go, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", corpus(count=20))
    with stop_in("assemble", monkeypatch):
        go(source)
    chunk = tmp_path / "out" / "work" / "000000-000000.npz"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DataError, match=r"000000-000000\.npz: damaged.*remove this file"):
        go(source)
    chunk.unlink()
    assert texts(go(source)) == corpus(count=20)


# ---- shares of a corpus


@pytest.mark.parametrize("num_files", [1, 5])
def test_shares_merge_to_the_whole(go, tmp_path, monkeypatch, num_files):
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 3000)
    documents = corpus()
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", documents[n::num_files]) for n in range(num_files)]
    whole = go(*paths, heldout_fraction=0.1, out="whole")
    parts = [go(*paths, heldout_fraction=0.1, worker=f"{n}/3", out=f"part{n}") for n in (1, 2, 3)]
    assert all(0.15 < len(texts(part)) / len(texts(whole)) < 0.5 for part in parts)
    merged = go(*(part.directory for part in parts), merge=True, tokenizer=None, out="merged")
    load_manifest(merged.directory, verify=True)
    for split in ("train", "heldout"):
        assert texts(merged, split) == [text for part in parts for text in texts(part, split)]
        assert sorted(texts(merged, split)) == sorted(texts(whole, split))
    assert merged.contents["report"] == whole.contents["report"]
    assert merged.special_token_ids == whole.special_token_ids
    again = go(*(part.directory for part in parts), merge=True, tokenizer=None, out="merged")
    assert again == merged


def test_a_merge_of_parts_that_changed_is_refused(go, tmp_path):
    source = tmp_path / "a.jsonl"

    def merge_anew(documents):
        write_jsonl(source, documents)
        shutil.rmtree(tmp_path / "part", ignore_errors=True)
        return go(go(source, out="part").directory, merge=True, tokenizer=None, out="merged")

    merged = merge_anew(DOCUMENTS)
    assert merge_anew(DOCUMENTS) == merged
    with pytest.raises(ConfigurationError, match=r"part/train-00000\.bin was changed, added or removed since"):
        merge_anew(DOCUMENTS[::-1])


def test_merge_refuses_what_does_not_belong_together(go, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 3)
    one = go(source, out="one").directory
    other = go(source, tokenizer=None, train_tokenizer=280, out="other").directory
    with pytest.raises(DataError, match="another tokenizer"):
        go(one, other, merge=True, tokenizer=None)
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        go(one, tmp_path, merge=True, tokenizer=None)
    shard = other / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match="checksum"):
        go(other, merge=True, tokenizer=None)


# ---- tokenizers


def test_a_trained_tokenizer_is_the_same_for_every_share(go, tmp_path, monkeypatch):
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(fastroberta.prepare, "TRAINING_BYTES", 20_000)  # less than there is
    source = write_jsonl(tmp_path / "a.jsonl", corpus())
    options = {"tokenizer": None, "train_tokenizer": 400}
    one, other = (go(source, worker=f"{n}/2", out=f"{n}", **options) for n in (1, 2))
    assert one.tokenizer_sha256 == other.tokenizer_sha256 and one.vocab_size == 400
    assert sorted(texts(one) + texts(other)) == sorted(corpus())


def test_a_vocabulary_that_the_text_does_not_fill_is_told(go, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", corpus())
    for asked in (300, 50265):
        found = go(source, tokenizer=None, train_tokenizer=asked, out=str(asked)).vocab_size
        told = f"train_tokenizer = {asked}: the text is too little for that, the tokenizer has {found} tokens"
        assert (told in capsys.readouterr().err) == (found < asked) == (asked == 50265)


def test_a_vocabulary_beyond_16_bits_gets_wide_tokens(go, tmp_path, tokenizer_directory):
    content = json.loads((Path(tokenizer_directory) / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"filler{n}": n for n in range(600, 70_000)}
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "tokenizer.json").write_text(json.dumps(content))
    manifest = go(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), tokenizer=str(tmp_path / "wide"))
    assert ShardReader(manifest.shard_paths("train")[0]).dtype == np.uint32
    assert texts(manifest) == joined(DOCUMENTS)


# ---- the program


def test_the_program_prints_a_report(tmp_path, tokenizer_directory, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, " "])
    out = str(tmp_path / "out")
    code = main([str(source), "--out", out, "--tokenizer", tokenizer_directory, "--heldout-fraction", "0"])
    output = capsys.readouterr().out
    assert code == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert {"documents read 4", "left out: empty 1"} <= set(lines)
    assert any(line.startswith("train 3 documents, 5 sentences, ") for line in lines)
    assert "nothing is held out, but training needs it" in output and "ready" not in output
    manifest = load_manifest(out)
    assert sorted(os.listdir(out)) == sorted(
        [
            *(entry["name"] for entry in manifest.contents["shards"] + manifest.contents["tokenizer_files"]),
            "manifest.json",
        ]
    )


@pytest.mark.parametrize("documents, share, missing", [(1, 0.005, "heldout"), (1, 0.9999, "train"), (200, 0.1, None)])
def test_ready_is_said_of_what_training_takes(tmp_path, tokenizer_directory, capsys, documents, share, missing):
    source = write_jsonl(tmp_path / "a.jsonl", corpus(count=documents))
    out = str(tmp_path / "the output")
    options = ["--tokenizer", tokenizer_directory, "--heldout-fraction", str(share), "--workers", "1"]
    assert main([str(source), "--out", out, *options]) == 0
    output = capsys.readouterr().out
    assert (f"ready for python -m fastroberta.train --data '{out}'" in output) == (missing is None)
    assert ("nothing is held out" in output) == (missing == "heldout")
    assert ("all is held out" in output) == (missing == "train")
    for split in ("train", "heldout"):  # as the trainer opens them
        cut = {"max_seq_length": 32, "packing": "full-sentences", "attention_scope": "block"}
        with pytest.raises(DataError, match=f"no {split} documents") if split == missing else contextlib.nullcontext():
            open_split(load_manifest(out), split, **cut)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "inputs"),
        (["a.txt"], 2, "--out is required"),
        (["a.txt", "--out", "o"], 2, "one of --tokenizer"),
        (["a.txt", "--out", "o", "--tokenizer", "t", "--train-tokenizer", "500"], 2, "one of --tokenizer"),
        (["a.txt", "--out", "o", "--train-tokenizer", "100"], 2, "train_tokenizer = 100"),
        (["a.txt", "--out", "o", "--train-tokenizer", "1000000000"], 2, "must lie in [261, 1000000]"),
        (["none.txt", "--out", "o", "--train-tokenizer", "300"], 2, "no such file"),
        (["a.txt", "--out", "o", "--tokenizer", "none"], 2, "no tokenizer.json"),
        (["a.txt", "--out", "o", "--train-tokenizer", "300", "--worker", "0/2"], 2, "worker = 0/2"),
        (["a.txt", "--out", "o", "--train-tokenizer", "300", "--worker", "3/2"], 2, "worker = 3/2"),
        (["a.txt", "--out", "o", "--train-tokenizer", "300", "--heldout", "0.1"], 2, "heldout_fraction"),
        (["a.txt", "--out", "o", "--merge", "--train-tokenizer", "300"], 2, "merge"),
        (["a.txt", "--out", "o", "--merge"], 3, "is a file, so it is not prepared data"),
        (["a.txt", "--out", "a.txt", "--train-tokenizer", "300"], 2, "--out a.txt: is a file"),
        (["a.txt", "--out", "bad.txt", "--train-tokenizer", "300"], 2, "--out bad.txt: is a file"),
        (["a.txt", "--out", ".", "--train-tokenizer", "300"], 2, "--out .: holds or lies in the input a.txt"),
        (["*.txt", "--out", "../{here}", "--train-tokenizer", "300"], 2, "holds or lies in the input a.txt"),
        ([".", "--out", "o", "--train-tokenizer", "300"], 2, "--out o: holds or lies in the input .;"),
        ([".", "--out", ".", "--train-tokenizer", "300"], 2, "--out .: holds or lies in the input .;"),
        (["bad.txt", "--out", "o", "--train-tokenizer", "300"], 3, "bad.txt, line 1: NUL"),
    ],
)
def test_mistakes_end_in_one_line_and_their_exit_code(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    Path("bad.txt").write_bytes(b"\0")
    arguments = [argument.format(here=tmp_path.name) for argument in arguments]
    before = sorted(os.listdir(tmp_path))
    assert run(lambda: main(arguments)) == code
    assert code == 3 or sorted(os.listdir(tmp_path)) == before
    errors = capsys.readouterr().err
    *notes, error = errors.splitlines()
    assert error.startswith("error: ") and message in error and not any("error" in note for note in notes)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer_directory):
    """60 MB in one file would show: without them the processes take about 125 MB each."""
    path = tmp_path / "big.txt.gz"
    size = 0
    with gzip.open(path, "wb", compresslevel=1) as file:
        draw, block = random.Random(0), corpus(count=2000)
        while size < 60_000_000:
            draw.shuffle(block)
            size += file.write("\n\n".join(f"{text} {size}" for text in block).encode() + b"\n\n")
    # The high-water mark since exec; getrusage would count this test's own process before it.
    (tmp_path / "program.py").write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from fastroberta.prepare import main\n"
        "if __name__ == '__main__':\n"
        "    main(sys.argv[1:])\n"
        "    print('peak', Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    command = [sys.executable, tmp_path / "program.py", path, "--out", tmp_path / "out", "--workers", "2"]
    command += ["--tokenizer", tokenizer_directory, "--exact-duplicates"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("peak")]
    assert len(peaks) == 2 and max(peaks) < 165, peaks
