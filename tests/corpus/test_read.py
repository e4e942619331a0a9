"""Reading: every format, compression and place gives the same documents; what can be repaired is, the rest is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import http.server
import io
import json
import lzma
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import zstandard

import fastroberta.corpus.read
import fastroberta.corpus.sources
from fastroberta.corpus.problems import REPAIRED, Problems
from fastroberta.corpus.read import read_chunks, read_documents
from fastroberta.corpus.sources import find_files
from fastroberta.errors import ConfigurationError, DataError

DOCUMENTS = ["One. Two\nthree.", "café au lait, 'quoted' \"twice\"", "  indented\n\tthird document\n  with, commas"]
PACK = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zstandard.compress,
}  # fmt: skip


def read(*inputs, policy="error", format="auto", txt_documents="blank-line", text_field="text"):
    """The documents of the inputs and the counts of faults."""
    documents, counts = [], Counter()
    options = {"txt_documents": txt_documents, "text_field": text_field}
    for number, file in enumerate(find_files(map(str, inputs), format, text_field)):
        for chunk in read_chunks(file, number, policy=policy, **options):
            problems = Problems(policy)
            documents += read_documents(chunk, problems=problems, **options)
            counts += chunk.problems + problems.counts
    return documents, counts


def as_jsonl(documents, field="text"):
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(documents)).encode()


def as_csv(documents, delimiter=",", field="text"):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", field], *enumerate(documents)])
    return file.getvalue().encode()


def as_parquet(documents, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    column = documents if isinstance(documents, pyarrow.Array) else pyarrow.array(documents)
    parquet.write_table(pyarrow.table({"id": range(len(documents)), "text": column}), file, **options)
    return file.getvalue()


def as_arrow(documents, is_file=True, rows=2):
    pyarrow = pytest.importorskip("pyarrow")
    column = documents if isinstance(documents, pyarrow.Array) else pyarrow.array(documents)
    table = pyarrow.table({"id": range(len(documents)), "text": column})
    file = io.BytesIO()
    with (pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream)(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return file.getvalue()


def as_stream(documents):
    return as_arrow(documents, is_file=False)


def words(seed=0, count=300):
    draw = random.Random(seed)
    text = lambda: " ".join(draw.choice(["alpha", "beta", "gamma", "délta"]) for _ in range(draw.randrange(3, 40)))  # noqa: E731
    return [f"Number {n}. {text()}" for n in range(count)]


WRITE = {
    "txt": lambda documents: "\n \n\n".join(documents).encode(),
    "jsonl": as_jsonl,
    "csv": as_csv,
    "tsv": lambda documents: as_csv(documents, "\t"),
    "parquet": lambda documents: as_parquet(documents, row_group_size=2),
    "arrow": as_stream,
    "feather": as_arrow,
}

# ---- formats and compressions


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("is_named", [True, False])
def test_every_format_gives_the_same_documents(tmp_path, kind, compression, is_named):
    """With a name that tells the format and the compression, and without."""
    path = tmp_path / (f"text.{kind}{compression}" if is_named else "text")
    path.write_bytes(PACK[compression](WRITE[kind](DOCUMENTS)))
    documents, counts = read(path)
    assert documents == DOCUMENTS
    assert set(counts) <= {"carriage return"}  # csv ends lines with CR LF


def test_lines_can_be_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \nthree")
    assert read(tmp_path / "a.txt", txt_documents="line")[0] == ["one", " two ", "three"]


def test_many_members_and_frames_are_one_file(tmp_path):
    text = "\n\n".join(DOCUMENTS).encode()
    half = len(text) // 2
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00junk"
    unsized = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text[:half]) + gzip.compress(text[half:]) + bytes(512))
    (tmp_path / "b.txt.zst").write_bytes(
        skippable + zstandard.compress(text[:half]) + skippable + unsized.compress(text[half:]) + unsized.flush()
    )
    for suffix in (".bz2", ".xz"):
        (tmp_path / f"c.txt{suffix}").write_bytes(PACK[suffix](text[:half]) + PACK[suffix](text[half:]))
    assert read(tmp_path / "*.txt.*")[0] == DOCUMENTS * 4


@pytest.mark.parametrize("kind", ["string_view", "large_string", "dictionary", "binary"])
def test_every_kind_of_string_column_is_text(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array(DOCUMENTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    for name, write in (("a.parquet", as_parquet), ("b.arrow", as_arrow), ("c.arrow", as_stream)):
        (tmp_path / name).write_bytes(write(column))
        if kind == "binary":
            with pytest.raises(DataError, match="column 'text' holds binary, not text"):
                read(tmp_path / name)
        else:
            assert read(tmp_path / name)[0] == DOCUMENTS


CHATS = [
    {"id": 1, "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello.\nYes?"}]},
    {"id": 2, "messages": [{"role": "tool", "content": None}, {"role": "user", "content": "Bye."}]},
]


def test_nested_fields_are_found_and_lists_become_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(CHATS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    for name in ("a.parquet", "b.arrow", "c.jsonl"):
        assert read(tmp_path / name, text_field="messages.content")[0] == ["Hi.\nHello.\nYes?", "Bye."]
        with pytest.raises(DataError, match=r"'messages\.body'"):
            read(tmp_path / name, text_field="messages.body")
    for record in ({"a": {"b": {"c": "x"}}}, {"a.b.c": "x", "a": {"b": {"c": "y"}}}, {"a": {"b": [{"c": ["x"]}, {}]}}):
        (tmp_path / "d.jsonl").write_text(json.dumps(record))
        assert read(tmp_path / "d.jsonl", text_field="a.b.c")[0] == ["x"]


def test_what_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    first, second = (datasets.Dataset.from_dict({"text": words(seed, 40)}) for seed in (1, 2))
    datasets.DatasetDict({"a": first, "b": second}).save_to_disk(tmp_path / "saved", num_shards={"a": 3, "b": 1})
    (tmp_path / "saved" / "a" / "cache-0123.arrow").write_bytes(as_stream(["a mapped copy"]))
    assert read(tmp_path / "saved")[0] == words(1, 40) + words(2, 40)
    assert read(tmp_path / "saved" / "b")[0] == words(2, 40)


def test_csv_fields_may_be_long_and_hold_newlines(tmp_path):
    documents = ["x" * 300_000, 'a\n\n"b",c\n' * 1000, ""]
    (tmp_path / "a.csv").write_bytes(as_csv(documents, field="body"))
    assert read(tmp_path / "a.csv", text_field="body")[0] == documents


def test_folders_and_globs_are_sorted_and_no_file_is_read_twice(tmp_path):
    for name in ("b.txt", "a.jsonl.gz", "deep/c.parquet", "notes.md", ".hidden/d.txt", "bare"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "b.txt")], "auto")
    assert [Path(file.path).name for file in found] == ["a.jsonl.gz", "b.txt", "c.parquet"]
    assert [file.format for file in found] == ["jsonl", "txt", "parquet"]
    assert len(find_files([str(tmp_path)], "txt")) == 5
    with pytest.raises(ConfigurationError, match="no such file"):
        find_files([str(tmp_path / "none*")], "auto")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigurationError, match="this folder has no txt"):
        find_files([str(tmp_path / "other")], "auto")
    with pytest.raises(ConfigurationError, match="not a regular file"):
        find_files([os.devnull], "txt")
    for name in ("_SUCCESS", "part-0", "part-1"):  # as Spark and WikiExtractor write
        (tmp_path / "other" / name).write_text('{"text": "x"}\n')
    assert [file.format for file in find_files([str(tmp_path / "other")], "auto")] == ["jsonl"] * 2


def test_links_are_followed_and_no_file_is_read_twice_through_them(tmp_path):
    for name in ("corpus/a.txt", "corpus/.git/hidden.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    (corpus / "same.txt").symlink_to("a.txt")
    inputs = [str(corpus), f"{corpus}/../corpus/a.txt", f"{tmp_path}/elsewhere/*"]
    assert [os.path.relpath(file.path, corpus) for file in find_files(inputs, "auto")] == ["a.txt", "again/b.txt"]
    (corpus / "dead.txt").symlink_to("nowhere.txt")
    for name in (str(corpus), f"{corpus}/d*"):
        with pytest.raises(ConfigurationError, match=r"dead\.txt: a link to a file that does not exist"):
            find_files([name], "auto")


def test_hidden_files_stay_hidden_in_this_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", ".b.txt", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for folder in (".", "./", f"../{tmp_path.name}"):
        assert [os.path.basename(file.path) for file in find_files([folder], "auto")] == ["a.txt"]


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"Plain text, with text in it.\n", "txt"),
        ('{"text": "é'.encode()[:-1], "jsonl"),
        (b"{{infobox}}\nwiki", "txt"),
        ("Text in UTF-16.".encode("utf-16"), "txt"),
        (b"id,text\n1,x\n", "csv"),
        (b"text\n1\n", "txt"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", None),
        ("é".encode() * 100 + b"\xff" * 10, None),
    ],
)
def test_contents_tell_the_format(tmp_path, data, kind):
    (tmp_path / "file").write_bytes(data)
    if kind is None:
        with pytest.raises(ConfigurationError, match="cannot tell its format from name or contents; give --format"):
            find_files([str(tmp_path / "file")], "auto")
    else:
        assert find_files([str(tmp_path / "file")], "auto")[0].format == kind


def test_standard_input_is_read_more_than_once(tmp_path):
    code = (
        "from fastroberta.corpus.sources import find_files\n"
        "from fastroberta.corpus.read import read_chunks\n"
        "file, = find_files(['-'], 'auto')\n"
        "for _ in range(2):\n"
        "    for chunk in read_chunks(file, 0, txt_documents='line', text_field='text', policy='error'):\n"
        "        print(file.format, chunk.data.decode().strip())\n"
        "print(file.modified)\n"
    )
    given = [gzip.compress(as_jsonl(["x"])), gzip.compress(as_jsonl(["x"])), as_jsonl(["y"])]
    runs = [subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True) for data in given]
    *lines, tag = runs[0].stdout.decode().splitlines()
    assert lines == ['jsonl {"id": 0, "text": "x"}'] * 2
    assert [tag.encode() in run.stdout for run in runs] == [True, True, False] or given[0] != given[1]


# ---- chunks: wherever the text is cut, nothing changes


@pytest.mark.parametrize("chunk_bytes, read_bytes", [(64, 16), (64, 1000), (1000, 7), (10**6, 1)])
@pytest.mark.parametrize("kind", [*WRITE, "utf-16", "crlf"])
def test_cutting_changes_nothing(tmp_path, monkeypatch, kind, chunk_bytes, read_bytes):
    documents = words(count=60)
    if kind in WRITE:
        data = WRITE[kind](documents)
    elif kind == "utf-16":
        data = "\n\n".join(documents).encode("utf-16")
    else:
        data = "\r\n \t\r\n\r\n".join(documents).encode()
    path = tmp_path / f"text.{kind if kind in WRITE else 'txt'}"
    path.write_bytes(data)
    whole = read(path)
    assert whole[0] == documents
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(fastroberta.corpus.read, "READ_BYTES", read_bytes)
    assert read(path) == whole
    file = find_files([str(path)], "auto")[0]
    chunks = list(read_chunks(file, 0, txt_documents="blank-line", text_field="text", policy="error"))
    assert (len(chunks) > 20) == (chunk_bytes == 64)
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))


def test_line_numbers_survive_cutting(tmp_path, monkeypatch):
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 50)
    monkeypatch.setattr(fastroberta.corpus.read, "READ_BYTES", 20)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS * 10) + b"{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 31: no text in 'text'"):
        read(tmp_path / "a.jsonl")


# ---- what is repaired


@pytest.mark.parametrize(
    "name, data, left, counted",
    [
        ("bom.txt", b"\xef\xbb\xbfgood", ["good"], {"byte order mark": 1}),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "good"}', ["good"], {"byte order mark": 1}),
        ("bom.csv", b"\xef\xbb\xbftext\ngood\n", ["good"], {"byte order mark": 1}),
        ("le.txt", "göod\r\n\n😀".encode("utf-16"), ["göod", "😀"], {"UTF-16 or UTF-32 text": 1, "carriage return": 1}),
        ("be.txt", b"\xfe\xff" + "göod".encode("utf-16-be"), ["göod"], {"UTF-16 or UTF-32 text": 1}),
        ("32.txt", "göod".encode("utf-32"), ["göod"], {"UTF-16 or UTF-32 text": 1}),
        ("16.csv", "text\ngöod".encode("utf-16"), ["göod"], {"UTF-16 or UTF-32 text": 1}),
        ("crlf.txt", b"a\n\ngo\r\nod\r\n\r\nb", ["a", "go\nod", "b"], {"carriage return": 3}),
        ("mac.txt", b"good\r\rb\r", ["good", "b"], {"carriage return": 3}),
        ("cr.jsonl", b'{"text": "go\\r\\nod"}\n', ["go\nod"], {"carriage return": 1}),
        ("nul.txt", b"a\n\na good word\0.", ["a", "a good word."], {"NUL character": 1}),
        ("nul.jsonl", b'{"text": "a good\\u0000 word"}\n', ["a good word"], {"NUL character": 1}),
    ],
)
def test_what_loses_nothing_is_mended_and_counted(tmp_path, name, data, left, counted):
    (tmp_path / name).write_bytes(data)
    documents, counts = read(tmp_path / name)
    assert documents == left and counts == counted and set(counts) <= set(REPAIRED)


# ---- bad input


def zst_of(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


LINE = b'{"text": "good"}\n'
NOISE = os.urandom(400_000).hex().encode()
# name, bytes, what the message holds, what is left with skip (None: not checked), what is counted
BAD = [
    ("utf8.txt", b"good\n\nfirst\nb\xffad\n\ngood", "line 3, byte 8 of the record: invalid", ["good"] * 2, {}),
    ("utf8.jsonl", LINE + b'{"text": "b\xff"}\n', "line 2, byte 12 of the record: invalid UTF-8", ["good"], {}),
    ("utf8.csv", b"text\ngood\nb\xff\n", "row 2, byte 2 of the record: invalid UTF-8", ["good"], {}),
    ("half.txt", "good\n\nx".encode("utf-16")[:-1], "damaged UTF-16 text", ["good", ""], {}),
    ("pair.txt", b"\xff\xfe" + "good\n\n\ud83d".encode("utf-16-le", "surrogatepass"), "line 3, byte 1", ["good"], {}),
    ("unmarked.txt", "good".encode("utf-16-le"), "line 1: NUL characters throughout", [], {}),
    ("surrogate.jsonl", LINE + b'{"text": "\\ud83d"}\n', "line 2: lone surrogate", ["good"], {"lone surrogate": 1}),
    ("empty.txt", b"", "empty file", [], {"empty file": 1}),
    ("empty.jsonl", b"", "empty file", [], {"empty file": 1}),
    ("json.jsonl", LINE + b'{"text": \n' + LINE, "line 2: not a JSON record", ["good", "good"], {}),
    ("array.json", b'[{"text": "a"}]', "line 1: JSON array; write one object a line (JSON Lines)", [], {"JSON array": 1}),
    ("lines.json", b'[\n{"text": "a"}\n]', "line 1: JSON array; (Expecting value", ["a"], {"JSON array": 1}),
    ("string.jsonl", b'"text"\n' + LINE, "line 1: not a JSON object; write one object a line", ["good"], {}),
    ("field.jsonl", b'{"body": "x", "n": 1}\n' + LINE, "there: body, n", ["good"], {}),
    ("null.jsonl", b'{"text": null}\n' + LINE, "line 1: field 'text' is not a string; make it one", ["good"], {}),
    ("number.jsonl", LINE + b'{"text": 5}\n', "line 2: field 'text' is not a string; make it one", ["good"], {}),
    ("nolist.jsonl", LINE + b'{"text": []}\n', "line 2: no text in 'text'", ["good"], {}),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n" + LINE, "line 1: JSON nested too deep", ["good"], {}),
    ("column.csv", b"id,body\n1,x\n", "no column 'text'; choose one of id, body with --text-field", [], {}),
    ("quote.csv", b'text\ngood\n"a" b\nbetter\n', "line 3: not a csv row", ["good", "better"], {}),
    ("open.csv", b'text\ngood\n"a\nb\n', "line 4: not a csv row; (unexpected end of data)", ["good"], {}),
    ("wide.csv", b"id,text\n1,good\n2,a, b\n", "line 3 (3 fields for 2 columns): more fields than columns", ["good"], {}),
    ("short.tsv", b"id\ttext\n1\n2\tgood\n", "row 1: no text in 'text'", ["good"], {}),
    ("cut.txt.gz", gzip.compress(b"good\n\nbad")[:-9], "truncated gzip archive", None, {"truncated gzip archive": 1}),
    ("flipped.txt.gz", gzip.compress(b"good")[:-8] + bytes(8), "damaged gzip archive", None, {}),
    ("cut.txt.bz2", bz2.compress(b"good\n\nbad")[:-9], "truncated bzip2 archive", None, {}),
    ("flipped.txt.bz2", bz2.compress(b"good")[:-9] + bytes(9), "damaged bzip2 archive", None, {}),
    ("cut.txt.xz", lzma.compress(b"good\n\nbad")[:-9], "truncated xz archive", None, {}),
    ("flipped.txt.xz", lzma.compress(NOISE)[:200_000] + bytes(200_000), "damaged xz archive", None, {}),
    ("cut.txt.zst", zst_of(NOISE)[:-9], "truncated zstd archive", None, {}),
    ("cut0.txt.zst", zst_of(b"good")[:5], "truncated zstd archive", None, {}),
    ("cutsum.txt.zst", zst_of(b"good", write_checksum=True)[:-2], "truncated zstd archive", None, {}),
    ("flipped.txt.zst", zst_of(b"good", write_checksum=True)[:-4] + bytes(4), "damaged zstd archive", None, {}),
    ("garbage.txt.zst", zst_of(b"good") + b"garbage", "damaged zstd archive", ["good"], {}),
    ("cut.parquet", b"PAR1 and no footer", "truncated or damaged parquet", [], {}),
    ("cut.arrow", as_stream(words())[:-3000], "truncated or damaged arrow file", None, {}),
    ("end.arrow", as_stream(["good"])[:-8], "truncated arrow file", ["good"], {}),
    ("cut.feather", as_arrow(["good"])[:-20], "truncated or damaged arrow file", [], {}),
]  # fmt: skip


@pytest.mark.parametrize("name, data, message, left, counted", BAD, ids=[bad[0] for bad in BAD])
def test_bad_input_is_refused_or_left_out_and_counted(tmp_path, name, data, message, left, counted):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read(path)
    assert message in str(error.value) and str(path) in str(error.value) and "--on-bad-input skip" in str(error.value)
    assert "\n" not in str(error.value)
    documents, counts = read(path, policy="skip")
    assert left is None or list(filter(None, documents)) == list(filter(None, left))
    assert sum(counts[kind] for kind in counts if kind not in REPAIRED) >= 1 and counted.items() <= counts.items()


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_a_truncated_archive_keeps_what_comes_before(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(
        fastroberta.corpus.read, "READ_BYTES", 1 << 22
    )  # all would be lost with what the fault breaks off
    documents = [f"{n} {random.Random(n).getrandbits(600):x}" for n in range(10_000)]
    data = PACK[suffix]("\n\n".join(documents).encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) * 3 // 4])
    found, counts = read(path, policy="skip")
    assert 5000 < len(found) < 7600 and found[:-1] == documents[: len(found) - 1] and sum(counts.values()) == 1


def test_a_missing_column_is_refused_with_the_names_there_are(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet(DOCUMENTS))
    for field, message in (("body", r"no column 'body'.*id, text"), ("id", "holds int64, not text")):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.parquet", text_field=field)
    (tmp_path / "null.parquet").write_bytes(as_parquet(["a", None, "b"]))
    with pytest.raises(DataError, match=r"null\.parquet, row 2: no text"):
        read(tmp_path / "null.parquet")


def test_invalid_utf8_in_a_row_is_that_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array([b"good", b"\xff", b"better"], pyarrow.binary()).view(pyarrow.string())
    (tmp_path / "a.parquet").write_bytes(as_parquet(column))
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), column)
    (tmp_path / "b.arrow").write_bytes(as_arrow(lists))
    for name in ("a.parquet", "b.arrow"):
        with pytest.raises(DataError, match="row 2, byte 1 of the record: invalid UTF-8"):
            read(tmp_path / name)
        assert read(tmp_path / name, policy="skip")[0] == ["good", "better"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "arrow", "csv"])
def test_an_endless_record_is_refused_or_left_out(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fastroberta.corpus.read, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(fastroberta.corpus.read, "MAX_RECORD_BYTES", 4000)
    monkeypatch.setattr(fastroberta.corpus.read, "READ_BYTES", 500)
    documents = ["before", "word\n" * 2000 if kind in ("txt", "csv") else "word " * 2000, "after", "and after"]
    path = tmp_path / f"a.{kind}"
    path.write_bytes("\n\n".join(documents).encode() if kind == "txt" else WRITE[kind](documents))
    with pytest.raises(DataError, match="of over") as error:
        read(path)
    assert ("line 3" if kind == "txt" else "line 2" if kind == "jsonl" else "") in str(error.value)
    assert ("(JSON Lines)" in str(error.value)) == (kind == "jsonl")  # one array of all, perhaps
    found = read(path, policy="skip")[0]
    # After a quote that is never closed nobody knows where the next row of a csv file begins.
    assert found == (["before"] if kind == "csv" else ["before", "after", "and after"])
    # Not even the reader holds it.
    options = {"txt_documents": "blank-line", "text_field": "text", "policy": "skip"}
    chunks = [chunk.data for chunk in read_chunks(find_files([str(path)], "auto")[0], 0, **options)]
    assert kind in ("parquet", "arrow") or max(map(len, chunks)) < 5000


@pytest.mark.parametrize("suffix", list(PACK)[1:])
def test_a_bomb_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(fastroberta.corpus.read, "READ_BYTES", 1 << 14)  # the limit holds from 64 reads on
    (tmp_path / f"bomb.txt{suffix}").write_bytes(PACK[suffix](b"the same line again and again\n\n" * 60_000))
    with pytest.raises(DataError, match="unpacks to over 200 times its size"):
        read(tmp_path / f"bomb.txt{suffix}")


def test_faults_are_counted_by_kind(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\n" + b"".join(b"x" * n + b"\xff\n\n" for n in range(20)))
    assert read(tmp_path / "a.txt", policy="skip")[1] == {"invalid UTF-8": 20}


# ---- remote files


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    return filesystem


def test_remote_files_folders_and_globs_are_read(memory):
    for kind, write in WRITE.items():
        memory.pipe(f"/corpus/{kind}/text.{kind}.gz", gzip.compress(write(DOCUMENTS)))
    memory.pipe("/corpus/.hidden/a.txt", b"no")
    memory.pipe("/corpus/bare", b'{"text": "x"}')
    assert read("memory://corpus")[0] == DOCUMENTS * len(WRITE)
    assert read("memory://corpus/*/*.txt.gz")[0] == DOCUMENTS
    assert read("memory://corpus/csv/text.csv.gz", "memory://corpus/bare")[0] == [*DOCUMENTS, "x"]
    for missing in ("memory://none", "memory://corpus/*.none"):
        with pytest.raises(ConfigurationError, match=r"not found|no such file"):
            read(missing)


def test_a_changed_remote_file_is_noticed(memory):
    memory.pipe("/a.txt", b"one")
    before = find_files(["memory://a.txt"], "auto")
    assert find_files(["memory://a.txt"], "auto") == before
    memory.pipe("/a.txt", b"two")
    assert find_files(["memory://a.txt"], "auto") != before
    with pytest.raises(DataError, match=r"a\.txt: changed while it was being read; start again"):
        list(read_chunks(before[0], 0, txt_documents="line", text_field="text", policy="skip"))


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://bucket/a.txt", "needs the package s3fs; pip install s3fs"),
        ("gs://bucket/a.txt", "needs the package gcsfs; pip install gcsfs"),
        ("nonsense://a.txt", "Protocol not known: nonsense"),
    ],
)
def test_what_a_protocol_needs_is_named(url, message):
    pytest.importorskip("fsspec")
    package = message.split()[-1]
    if url[:2] in ("s3", "gs") and __import__("importlib.util").util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigurationError, match=message):
        read(url)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `data` in ranges, or whole; breaks off after `limits`, a number of bytes for each of the next answers."""

    data, tag, has_ranges, limits, asked = b"", "1", True, [], []

    def do_HEAD(self):
        self.answer(is_head=True)

    def do_GET(self):
        self.answer(is_head=False)

    def answer(self, is_head):
        start, end = 0, len(self.data)
        asked = self.headers.get("Range") if self.has_ranges else None
        if asked:
            start, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            end = min(end + 1, len(self.data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", self.tag)
        self.end_headers()
        if not is_head:
            self.asked.append(start)
            limit = self.limits.pop(0) if self.limits else end - start
            self.wfile.write(self.data[start:end][:limit])
            if limit < end - start:
                self.connection.close()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback address: its class, to be set up, and its address."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(fastroberta.corpus.sources, "PAUSE", 0.01)

    class OwnServer(Server):
        limits, asked = [], []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OwnServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield OwnServer, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("kind", ["txt", "parquet"])
@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_download_that_breaks_off_is_resumed(server, kind, has_ranges):
    handler, address = server
    documents = [f"{n} {random.Random(n).getrandbits(60_000):x}" for n in range(800)]  # 12 MB, more than one range
    handler.data, handler.has_ranges = WRITE[kind](documents), has_ranges
    handler.limits = [10**9, 1_000_000] if has_ranges else [10**9, 10**9, 7_000_000]
    assert read(f"{address}/text.{kind}?download=true")[0] == documents
    assert not handler.limits and (max(handler.asked) > 0) == has_ranges


def test_a_download_that_keeps_breaking_off_ends_in_one_line(server):
    handler, address = server
    handler.data = b"good\n\n" * 2_000_000
    handler.limits = [10**9] + [1000] * 100
    for policy in ("error", "skip"):  # what may be read another time is not left out
        with pytest.raises(DataError, match=r"a\.txt: reading failed at byte .* of 12,000,000, 4 times") as error:
            read(f"{address}/a.txt", policy=policy)
        assert "\n" not in str(error.value)


def test_a_file_that_changes_on_its_server_is_noticed(server):
    handler, address = server
    handler.data = b"good"
    before = find_files([f"{address}/a.txt"], "auto")
    assert (before[0].size, before[0].modified) == (4, "1")
    handler.tag = "2"
    assert find_files([f"{address}/a.txt"], "auto") != before
