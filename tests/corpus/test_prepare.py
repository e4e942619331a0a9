"""The program from text to shards: formats, cleaning, bad input, interruption, shares, and the same bytes always."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
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
from fastroberta.corpus.chunks import ChunkProcessor, ChunkSettings
from fastroberta.corpus.clean import CleaningSettings
from fastroberta.corpus.manifest import load_manifest
from fastroberta.corpus.read import read_chunks
from fastroberta.corpus.shards import ShardReader
from fastroberta.corpus.sources import find_files
from fastroberta.corpus.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from fastroberta.corpus.workers import process_chunks
from fastroberta.data import open_split
from fastroberta.errors import ConfigurationError, DataError, DeviceMemoryError, Stopped
from fastroberta.prepare import PrepareConfig, main, prepare

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
        if options.get("cluster"):
            del options["workers"]
        return prepare(PrepareConfig(inputs=[str(path) for path in inputs], out=str(tmp_path / out), **options))

    return call


def texts(manifest, split="train"):
    """The documents of a prepared directory."""
    tokenizer = load_tokenizer(manifest.directory)
    found = []
    for path in manifest.shard_paths(split):
        shard = ShardReader(path)
        starts = [*shard.sentence_starts[np.asarray(shard.document_starts)].tolist(), shard.num_tokens]
        for start, end in itertools.pairwise(starts):
            assert shard.tokens[end - 1] == manifest.special_token_ids["eos_token_id"]
            found.append(tokenizer.decode(shard.tokens[start : end - 1].tolist()))
    return found


def joined(documents):
    """What is left of documents: all of it but the space at their ends, and the empty ones."""
    return [text for text in map(str.strip, documents) if text]


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
        (b"\xff\n\n" * 300, {"on_bad_input": "skip"}, "repaired or left out: 300 invalid UTF-8; give other text"),
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


@pytest.mark.parametrize(
    "number, workers",
    [*itertools.product([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], [1, 2]), (signal.SIGINT, "local:2")],
)
def test_an_interrupted_run_continues_to_the_same_bytes(
    go, tmp_path, monkeypatch, tokenizer_directory, number, workers
):
    if workers == "local:2":
        pytest.importorskip("distributed")
    source = write_jsonl(tmp_path / "a.jsonl", corpus(count=1500))
    whole = digest(go(source, shard_tokens=5000, heldout_fraction=0.1, out="whole").directory)
    options = [source, "--out", "out", "--shard-tokens", 5000, "--heldout-fraction", 0.1]
    options += ["--cluster", workers] if isinstance(workers, str) else ["--workers", workers]
    program = start(tmp_path, tokenizer_directory, *options)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("work/*.npz"))) < 3 and program.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = list_children(program.pid)
    assert len(children) >= (workers != 1) * 2 or not os.path.exists("/proc")
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
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 4000)
    go(source, shard_tokens=5000, heldout_fraction=0.1)
    assert before and digest(tmp_path / "out") == whole


def test_an_idle_worker_goes_with_its_parent(tmp_path):
    (tmp_path / "program.py").write_text(
        "import multiprocessing, os, signal, time\n"
        "from fastroberta.corpus.workers import start_worker\n"
        "def work(ready):\n"
        "    start_worker()\n"
        "    ready.put(os.getpid())\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    ready = spawn.SimpleQueue()\n"
        "    spawn.Process(target=work, args=(ready,)).start()\n"
        "    print(ready.get(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, str(tmp_path / "program.py")]
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
    process, done = ChunkProcessor.process, []

    def fail_at_fifth(self, chunk, path):
        if len(done) == 5:
            raise Stopped("stopped")
        done.append(chunk.number)
        return process(self, chunk, path)

    monkeypatch.setattr(ChunkProcessor, "process", fail_at_fifth)
    with pytest.raises(Stopped):
        go(source)
    monkeypatch.setattr(ChunkProcessor, "process", lambda *a: (done.append(a[1].number), process(*a))[1])
    assert digest(go(source).directory) == whole
    assert done == list(range(len(done))) and len(done) > 10


@contextlib.contextmanager
def stop_in(name, monkeypatch):
    """Stop a run as a signal would, where it calls a function of the module."""

    def stop_here(*arguments, **options):
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
    with stop_in("process_chunks", monkeypatch):
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
    go(folder)

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


# ---- on a cluster


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, memory_limit=None, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as cluster:
        yield cluster


@contextlib.contextmanager
def worker_killed(cluster, work):
    """Meanwhile a worker is given chunks, does not move on, and is killed when others have written chunk files."""

    def strike():
        end = time.monotonic() + 30  # the others may have done everything before it got a chunk
        while (len(list(work.glob("*.npz"))) < 2 or not worker.processing) and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(worker.pid, signal.SIGKILL)

    worker = next(iter(cluster.scheduler.workers.values()))
    os.kill(worker.pid, signal.SIGSTOP)
    thread = threading.Thread(target=strike)
    thread.start()
    yield
    thread.join()
    assert not is_running(worker.pid)


@pytest.mark.slow(reason="20 seconds")
def test_a_cluster_that_loses_a_worker_gives_the_same_bytes(go, tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 12000)
    documents = corpus(count=1000)
    source = write_jsonl(tmp_path / "a.jsonl", documents + documents[::3])
    options = {"exact_duplicates": True, "heldout_fraction": 0.1, "shard_tokens": 5000}
    whole = go(source, out="whole", **options)
    assert whole.contents["report"]["counts"]["exact_duplicates"] == 334
    with worker_killed(cluster, tmp_path / "out" / "work"):
        manifest = go(source, cluster=cluster.scheduler_address, **options)
    assert digest(manifest.directory) == digest(whole.directory)
    # Given up after too many losses, the same command continues.
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with (
        worker_killed(cluster, tmp_path / "lost" / "work"),
        pytest.raises(DeviceMemoryError, match="killed by one task"),
    ):
        go(source, cluster=cluster.scheduler_address, out="lost", **options)
    assert digest(go(source, out="lost", **options).directory) == digest(whole.directory)
    # The workers, which may serve many runs, follow the options of each.
    source = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS)
    assert texts(go(source, cluster=cluster.scheduler_address, min_characters=30, out="long")) == joined(DOCUMENTS[2:])


def test_faults_that_a_cluster_meets_are_one_line(go, tmp_path, monkeypatch, cluster):
    dask = pytest.importorskip("dask")
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xffad")
    with pytest.raises(DataError, match=r"line 3, byte 2 of the record: invalid UTF-8"):
        go(tmp_path / "a.txt", cluster=cluster.scheduler_address)
    options = {"txt_documents": "line", "text_field": "text"}
    chunks = read_chunks(find_files([str(tmp_path / "a.txt")], "auto")[0], 0, policy="error", **options)
    settings = ChunkSettings(
        str(tmp_path / "elsewhere"), "", **options, split_sentences=True, newlines="keep",
        cleaning=CleaningSettings(), signatures=False, on_bad_input="error",
    )  # fmt: skip
    with pytest.raises(
        DataError, match=r"elsewhere: a worker cannot use it .* put --out on a disk that all workers share"
    ):
        process_chunks(
            chunks, tmp_path, settings, workers=1, cluster=cluster.scheduler_address, total_bytes=1, check=lambda: None
        )
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "100ms"}),
        pytest.raises(ConfigurationError, match="no Dask scheduler answers"),
    ):
        go(tmp_path / "a.txt", cluster="tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'fastroberta\[cluster\]'"):
        go(tmp_path / "a.txt", cluster="local:1")


# ---- appending


CLEANED = {"exact_duplicates": True, "near_duplicates": 0.8, "heldout_fraction": 0.1, "shard_tokens": 1500}


@pytest.fixture
def two_parts(tmp_path, monkeypatch):
    """Two files; the second repeats documents of both, exactly and nearly."""
    pytest.importorskip("datasketch")
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 3000)
    first, second = corpus(0, 150), corpus(1, 120)
    first += [first[0] + " Again and again.", first[1]]
    long = [text for text in first if len(text) > 250]
    second += first[10:20] + second[:5] + [text.replace("Number", "number!") for text in long] + [second[7] + " more"]
    return write_jsonl(tmp_path / "a.jsonl", first), write_jsonl(tmp_path / "b.jsonl", second)


def top_files(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


@pytest.mark.parametrize("stop_at", [None, "chunks", "shards", "end"])
def test_appending_gives_the_corpus_of_one_run(go, two_parts, tmp_path, monkeypatch, capsys, stop_at):
    a, b = two_parts
    whole = go(a, b, out="whole", **CLEANED)
    old = go(a, **CLEANED)
    before = top_files(old.directory)

    def stop_here(*arguments, **options):
        raise Stopped("stopped")

    where = {"chunks": "fastroberta.prepare.assemble", "shards": "fastroberta.corpus.assemble.write_manifest"}
    if stop_at in where:
        with monkeypatch.context() as context, pytest.raises(Stopped):
            context.setattr(where[stop_at], stop_here)
            go(b, append=True, **CLEANED)
        after = top_files(old.directory)
        assert before.items() <= after.items() and (len(after) > len(before)) == (stop_at == "shards")
        assert go(a, **CLEANED) == old  # still a finished corpus
        monkeypatch.setattr(ChunkProcessor, "process", stop_here)  # all chunks are there
    if stop_at == "end":  # killed when only the work was left to remove
        with monkeypatch.context() as context, pytest.raises(Stopped):
            context.setattr("fastroberta.corpus.assemble.load_manifest", stop_here)
            go(b, append=True, **CLEANED)
    appended = go(b, append=True, **CLEANED)
    assert load_manifest(appended.directory, verify=True) == appended
    assert appended.contents["report"] == whole.contents["report"]
    assert min(whole.contents["report"]["counts"][f"{kind}_duplicates"] for kind in ("exact", "near")) > 10
    for split in ("train", "heldout"):
        assert texts(appended, split) == texts(whole, split)
        assert len(appended.shard_paths(split)) > len(old.shard_paths(split)) >= 1
    after = top_files(old.directory)
    assert all(after[name] == before[name] for name in before if name.startswith(("train", "heldout", "tokenizer")))
    tables = [table["sha256"] for table in appended.contents["duplicate_tables"]]
    assert tables == [table["sha256"] for table in whole.contents["duplicate_tables"]] and len(tables) == 2
    listed = (
        entry["name"] for kind in ("shards", "tokenizer_files", "duplicate_tables") for entry in appended.contents[kind]
    )
    assert set(after) == {"manifest.json", *listed}
    capsys.readouterr()
    for again in (lambda: go(b, append=True, **CLEANED), lambda: go(a, b, append=True, **CLEANED)):
        assert again() == appended
        assert "already prepared" in capsys.readouterr().out
    monkeypatch.undo()
    third = write_jsonl(tmp_path / "c.jsonl", corpus(1, 120))  # nothing new in it
    more = go(third, append=True, **CLEANED)
    assert more.count("train", "tokens") == appended.count("train", "tokens")
    assert (
        more.contents["report"]["counts"]["exact_duplicates"]
        == 120 + (appended.contents["report"]["counts"]["exact_duplicates"])
    )
    assert [Path(file["path"]).name for file in more.contents["files"]] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_appending_takes_the_tokenizer_of_the_corpus(go, two_parts, tokenizer_directory):
    a, b = two_parts
    old = go(a, tokenizer=None, train_tokenizer=300)
    with pytest.raises(ConfigurationError, match="finished corpus with tokenizer_sha256"):
        go(b, append=True)
    with pytest.raises(ConfigurationError, match="finished corpus with train_tokenizer = 300, this run has 400"):
        go(b, append=True, tokenizer=None, train_tokenizer=400)
    appended = go(b, append=True, tokenizer=None)
    assert appended.tokenizer_sha256 == old.tokenizer_sha256
    assert len(texts(appended)) == sum(len(path.read_text().splitlines()) for path in two_parts)
    assert not appended.contents["duplicate_tables"]  # nothing is kept that is not needed


def test_appending_refuses_what_does_not_fit(go, two_parts, monkeypatch):
    a, b = two_parts
    old = go(a, **CLEANED)
    with pytest.raises(ConfigurationError, match=r"finished corpus with near_duplicates = 0\.8, this run has 0\.9"):
        go(b, append=True, **{**CLEANED, "near_duplicates": 0.9})
    with monkeypatch.context() as context:  # as if another run had appended just before this one took the lock
        context.setattr("fastroberta.corpus.resume.load_manifest", lambda out: next(manifests))
        manifests = iter([old, dataclasses.replace(old, vocab_size=1)])
        with pytest.raises(ConfigurationError, match="another run has just changed it"):
            go(b, append=True, **CLEANED)
    table = old.directory / old.contents["duplicate_tables"][1]["name"]
    content = table.read_bytes()
    table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"signatures-00000\.bin: its bytes do not have the manifest's checksum"):
        go(b, append=True, **CLEANED)
    table.unlink()
    with pytest.raises(DataError, match=r"signatures-00000\.bin: listed in the manifest, but missing"):
        go(b, append=True, **CLEANED)
    write_jsonl(a, DOCUMENTS)
    with pytest.raises(ConfigurationError, match=r"a\.jsonl: changed since it became part"):
        go(a, b, append=True, **CLEANED)


def test_a_file_is_not_appended_again_by_another_path(go, two_parts, monkeypatch, capsys):
    a, b = two_parts
    go(a)
    monkeypatch.chdir(a.parent)
    go(f"../{a.parent.name}/{a.name}", append=True)
    assert "already prepared, nothing to do" in capsys.readouterr().out
    go(f"./{b.name}", append=True)  # and from elsewhere, where the path in the manifest means nothing
    (a.parent / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(
        ConfigurationError, match=r"b\.jsonl: has the name, size and time of \./b\.jsonl, which is part of"
    ):
        go(b, append=True)
    b.touch()
    assert len(go(b, append=True).contents["files"]) == 3


def test_a_file_s_name_may_be_any_bytes(go, tmp_path):
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"in/caf\xe9.txt")
    try:
        (tmp_path / name).write_text("Some text.")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert go(tmp_path / "in").contents["files"][0]["path"] == str(tmp_path / name)


# ---- tokenizers


def test_a_tokenizer_is_trained_on_a_sample_of_the_whole_corpus(go, tmp_path, monkeypatch):
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 3000)
    source = write_jsonl(
        tmp_path / "a.jsonl", [f"first{n % 7}" for n in range(900)] + [f"last{n % 7}" for n in range(900)]
    )
    options = {"tokenizer": None, "train_tokenizer": 300}
    whole = go(source, out="whole", **options)
    monkeypatch.setattr(fastroberta.prepare, "TRAINING_BYTES", 12_000)  # less than there is
    part = go(source, **options)
    assert part.vocab_size == whole.vocab_size
    for word in ("first", "last"):
        assert len(load_tokenizer(part.directory).encode(word, add_special_tokens=False).ids) == 1


def test_a_vocabulary_that_the_text_does_not_fill_is_told(go, tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", corpus())
    for asked in (300, 50265):
        found = go(source, tokenizer=None, train_tokenizer=asked, out=str(asked)).vocab_size
        told = f"train_tokenizer = {asked}: the text is too short for that many; the tokenizer has {found} tokens"
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
    assert "no document is held out, but training needs some" in output and "ready" not in output
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
    assert ("no document is held out" in output) == (missing == "heldout")
    assert ("all documents are held out" in output) == (missing == "train")
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
        (["a.txt", "--out", "o", "--tokenizer", "t", "--train-tokenizer", "500"], 2, "only one of --tokenizer"),
        (["a.txt", "--out", "o", "--train-tokenizer", "100"], 2, "train_tokenizer = 100"),
        (["a.txt", "--out", "o", "--train-tokenizer", "1000000000"], 2, "must lie in [261, 1000000]"),
        (["none.txt", "--out", "o", "--train-tokenizer", "300"], 2, "no such file"),
        (["a.txt", "--out", "o", "--tokenizer", "./none"], 2, "no tokenizer.json"),
        (["a.txt", "--out", "o", "--train-tokenizer", "300", "--cluster", "local:0"], 2, "cluster = local:0: takes"),
        (["a.txt", "--out", "o", "--train-tokenizer", "300", "--cluster", "host:80"], 2, "cluster = host:80: takes"),
        (["a.txt", "--out", "o", "--train-tokenizer", "300", "--cluster", "local:2", "--workers", "2"], 2, "workers: "),
        (["a.txt", "--out", "o", "--train-tokenizer", "300", "--heldout", "0.1"], 2, "heldout_fraction"),
        (["a.txt", "--out", "o", "--append"], 2, "o: no finished corpus to append to"),
        (["a.txt", "--out", "a.txt", "--train-tokenizer", "300"], 2, "--out a.txt: is a file"),
        (["a.txt", "--out", "bad.txt", "--train-tokenizer", "300"], 2, "--out bad.txt: is a file"),
        (["a.txt", "--out", ".", "--train-tokenizer", "300"], 2, "--out .: holds or lies in the input a.txt"),
        (["*.txt", "--out", "../{here}", "--train-tokenizer", "300"], 2, "holds or lies in the input a.txt"),
        ([".", "--out", "o", "--train-tokenizer", "300"], 2, "--out o: holds or lies in the input .;"),
        ([".", "--out", ".", "--train-tokenizer", "300"], 2, "--out .: holds or lies in the input .;"),
        (
            ["a.txt", "--out", "s3://bucket/o", "--train-tokenizer", "300"],
            2,
            "--out = s3://bucket/o: only a local path works here",
        ),
        (
            ["*.*", "--out", "o", "--train-tokenizer", "300", "--format", "txt", "--report", "a.md"],
            2,
            "one of the inputs",
        ),
        (["bad.txt", "--out", "o", "--train-tokenizer", "300"], 3, "bad.txt, line 1: NUL"),
    ],
)
def test_mistakes_end_in_one_line_and_their_exit_code(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    Path("bad.txt").write_bytes(b"\0")
    Path("a.md").write_text("text that a report must not replace")
    arguments = [argument.format(here=tmp_path.name) for argument in arguments]
    before = sorted(os.listdir(tmp_path))
    assert run(lambda: main(arguments)) == code
    assert code == 3 or sorted(os.listdir(tmp_path)) == before
    errors = capsys.readouterr().err
    *notes, error = errors.splitlines()
    assert error.startswith("error: ") and message in error and not any("error" in note for note in notes)


@pytest.mark.slow(reason="15 seconds")
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
