"""`python -m fastroberta.prepare INPUT... --out DIR`: text in, token shards out.

Reads txt, JSON Lines, csv, tsv, parquet and Arrow, plain or compressed: files, folders, globs, URLs and standard input.
Cleans the text, tokenizes it on all cores, and writes shards, a held-out split and a manifest. The same command
continues an interrupted run. The shards depend on the text and the options alone, never on workers or interruptions.

    tokenize     chunks of about 8 MB of text -> one file each in DIR/work (parallel)
    deduplicate  the hashes of all documents -> which ones to drop
    assemble     chunk files, in order -> shards, then the manifest, which completes the directory

docs/data.md says what each option does, and what memory and disk it takes. --cluster has the workers of a Dask cluster
tokenize: the chunks are its tasks, DIR lies on a disk that all of them share, and the rest happens here. --append adds
new files to a finished corpus and leaves the old shards as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from .cli.arguments import parse_arguments
from .cli.directories import own_directory
from .cli.program import StopRequest, run
from .config import setting
from .corpus.assemble import LEFT_OUT, NoDocumentError, assemble, find_duplicates, warn_of_small_heldout
from .corpus.boilerplate import find_recurring, write_line_hashes
from .corpus.chunks import ChunkSettings, sample_chunks
from .corpus.clean import Cleaner, CleaningSettings, normalize, read_blocklist
from .corpus.encode import split_lines
from .corpus.manifest import Manifest
from .corpus.problems import REPAIRED, Problems
from .corpus.quality import Thresholds
from .corpus.read import CHUNK_BYTES, Chunk, read_chunks, read_documents
from .corpus.report import check_report_path, write_report
from .corpus.resume import BOILERPLATE, describe, find_base, find_finished, resume
from .corpus.shards import MAX_SHARD_TOKENS, SPLITS, write_atomically
from .corpus.sources import InputFile, find_files, real_path
from .corpus.tokenizer import (
    LARGEST_VOCABULARY,
    SMALLEST_VOCABULARY,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from .corpus.workers import process_chunks
from .errors import ConfigurationError, DataError

TRAINING_BYTES = 256 << 20  # of text, spread evenly over the corpus, that a tokenizer is trained on at most


@dataclass
class PrepareConfig:
    """One corpus."""

    inputs: list[str] = setting(help="text files, folders, globs or URLs; - for standard input", positional=True)
    out: str = setting(help="directory to write; an unfinished run found there is continued", path="output")
    append: bool = setting(False, "add new files to the finished corpus in --out, with the options that made it")
    tokenizer: str | None = setting(
        None, "directory that holds tokenizer.json, or vocab.json and merges.txt", path="model"
    )
    train_tokenizer: int | None = setting(
        None,
        "vocabulary size of a tokenizer to train on the text, instead of --tokenizer",
        valid=f"[{SMALLEST_VOCABULARY}, {LARGEST_VOCABULARY}]",
    )

    format: Literal["auto", "txt", "jsonl", "csv", "tsv", "parquet", "arrow"] = setting(
        "auto", "format of the inputs; auto: by file name, or else by content"
    )
    txt_documents: Literal["blank-line", "line"] = setting("blank-line", "what ends a document in txt files")
    text_field: str = setting(
        "text", "field or column that holds the text; dots go inside, as in messages.content, and lists become lines"
    )
    on_bad_input: Literal["error", "skip"] = setting(
        "error", "what to do with damaged input: stop, or leave it out and count it"
    )

    # Cleaning, in this order; corpus/clean.py has the details.
    nfc: bool = setting(False, "normalize text to Unicode NFC")
    boilerplate: int | None = setting(
        None, "remove lines of three words or more that at least this many documents share", valid="[2, inf)"
    )
    min_characters: int = setting(0, "leave out documents shorter than this", valid="[0, inf)")
    max_characters: int | None = setting(None, "leave out documents longer than this; null: no limit", valid="[1, inf)")
    blocklist: str | None = setting(
        None, "file with one word or phrase per line; documents that contain one are left out"
    )
    quality: str | None = setting(
        None, "rules that a document must meet: gopher, c4, or single rules, separated by commas"
    )
    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)
    languages: str | None = setting(None, "keep only these languages, as codes: en,de; told by py3langid")
    language_confidence: float = setting(0.5, "lowest probability at which a language counts", valid="[0, 1]")
    exact_duplicates: bool = setting(False, "leave out documents identical to an earlier one")
    near_duplicates: float | None = setting(
        None,
        "leave out documents at least this similar to an earlier one (Jaccard, by MinHash); 0.8 is usual",
        valid="(0, 1]",
    )
    report: str | None = setting(None, "FILE.html or FILE.md for the figures, with examples of what was left out")

    sentences: Literal["punctuation", "lines"] = setting(
        "punctuation", "where sentences end: at punctuation and line ends, or only at line ends"
    )
    newlines: Literal["keep", "separator"] = setting(
        "keep",
        "keep: a document is encoded as it is, line breaks included; separator: each line is stripped and closed by "
        "</s>, and each document by one more, as fairseq did for RoBERTa",
    )
    heldout_fraction: float = setting(
        0.005,
        "fraction of documents held out for evaluation, chosen by a hash of their text; more of a small corpus: 128 "
        "sequences of 512 tokens, or a tenth of it",
        valid="[0, 1)",
    )

    shard_tokens: int = setting(2**26, "largest number of tokens per shard", valid=f"[1, {MAX_SHARD_TOKENS}]")
    workers: int | None = setting(None, "number of processes on this machine; null: one per core", valid="[1, inf)")
    cluster: str | None = setting(
        None, "Dask scheduler whose workers tokenize, tcp://HOST:PORT, or local:N to start N workers here"
    )

    def check(self) -> None:
        if self.tokenizer and self.train_tokenizer:
            raise ConfigurationError("tokenizer: give only one of --tokenizer DIR and --train-tokenizer VOCAB_SIZE")
        if not (self.append or self.tokenizer or self.train_tokenizer):
            raise ConfigurationError("tokenizer: give one of --tokenizer DIR and --train-tokenizer VOCAB_SIZE")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ConfigurationError(f"max_characters = {self.max_characters}: less than min_characters; raise it")
        if self.append and self.boilerplate:
            raise ConfigurationError(
                "boilerplate: lines are counted over a whole corpus, so that it goes without --append; prepare all of the "
                "text again with another --out"
            )
        if self.report:
            check_report_path(self.report)
        if self.cluster is not None:
            if self.workers is not None:
                raise ConfigurationError("workers: with --cluster the cluster's workers are used; leave out --workers")
            kind, _, rest = self.cluster.partition(":")
            if not (rest.isdecimal() and int(rest) if kind == "local" else rest.startswith("//")):
                raise ConfigurationError(
                    f"cluster = {self.cluster}: takes a scheduler's address, tcp://HOST:PORT, or local:N with N from 1"
                )


def main(argv: Sequence[str] | None = None) -> int:
    # The first two paragraphs only: --help would run the lines of the table together.
    config = parse_arguments(argv, PrepareConfig, description="\n\n".join((__doc__ or "").split("\n\n")[:2]))
    try:
        manifest = prepare(config)
    except OSError as error:
        raise DataError(
            f"{error.filename or config.out}: {error.strerror or error}; fix that, and the same command continues"
        ) from error
    print_report(manifest)
    if config.report:
        title = f"{manifest.directory}: prepared text"
        write_report(Path(config.report), title, list_figures(manifest), manifest.contents["report"]["examples"])
    return 0


def prepare(config: PrepareConfig) -> Manifest:
    """Do what the configuration says; a finished directory is left as it is.

    Raises:
        ConfigurationError, DataError, DeviceMemoryError, ProcessError, Stopped: see there.
    """
    out = Path(config.out)
    work = out / "work"
    files = find_files(config.inputs, config.format, config.text_field)
    _refuse_out_among_inputs(out, config.inputs, files)
    if config.report and os.path.realpath(config.report) in {real_path(file.path) for file in files}:
        raise ConfigurationError(f"report = {config.report}: is one of the inputs; choose another file")
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    cleaning = _cleaning_settings(config, work)
    Cleaner(dataclasses.replace(cleaning, boilerplate=None))  # says what is missing before the work
    options = _list_options(config, tokenizer)
    base: Manifest | None = None
    if config.append:
        base, options, files = find_base(out, options, files)
        tokenizer = load_tokenizer(out)
        finished = None if files else base
    else:
        finished = find_finished(out, options, files)
    if finished:
        print(f"{out}: already prepared, nothing to do")
        return finished
    warning = warn_of_small_heldout(sum(file.size for file in files), config.heldout_fraction)
    if warning and not base:
        print(warning, file=sys.stderr)
    with own_directory(out, "work/lock", "--out"), StopRequest() as stop:
        resume(work, options, files, base)
        if config.boilerplate:
            _count_boilerplate(config, files, work, stop)
        tokenizer = _obtain_tokenizer(config, cleaning, files, tokenizer, work / "tokenizer", stop)
        settings = ChunkSettings(
            tokenizer=str((work / "tokenizer").absolute()),
            tokenizer_sha256=tokenizer_hash(tokenizer),
            txt_documents=config.txt_documents,
            text_field=config.text_field,
            split_sentences=config.sentences == "punctuation",
            newlines=config.newlines,
            cleaning=cleaning,
            signatures=config.near_duplicates is not None,
            on_bad_input=config.on_bad_input,
        )
        size = sum(file.size for file in files)
        chunks = process_chunks(
            _read_all(config, files),
            work.absolute(),
            settings,
            workers=min(config.workers or len(os.sched_getaffinity(0)), 1 + size // CHUNK_BYTES),
            cluster=config.cluster,
            total_bytes=size,
            check=stop.check,
        )
        dropped = find_duplicates(chunks, work, base, config.exact_duplicates, config.near_duplicates, stop.check)
        all_files = (base.contents["files"] if base else []) + describe(files)
        try:
            manifest = assemble(chunks, dropped, tokenizer, out, base, options, all_files, stop.check)
        except NoDocumentError:
            shutil.rmtree(work)  # it would hold the next try to the options that left nothing
            raise
        shutil.rmtree(work)
    return manifest


def _list_options(config: PrepareConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything besides the files that decides the bytes of the output, by which an unfinished run is recognized.

    on_bad_input is not part of it: after an error the same run may continue with "skip", because the chunks done before
    had no fault.
    """
    options = dataclasses.asdict(config)
    for name in ("out", "append", "workers", "cluster", "on_bad_input", "tokenizer", "report"):
        del options[name]
    if config.blocklist:  # by its content
        words = "\n".join(read_blocklist(config.blocklist))
        options["blocklist"] = f"{config.blocklist} ({hashlib.sha256(words.encode()).hexdigest()[:16]})"
    return {**options, "tokenizer_sha256": tokenizer_hash(tokenizer) if tokenizer else None}


def _refuse_out_among_inputs(out: Path, inputs: list[str], files: list[InputFile]) -> None:
    """Output must not lie beside the text: the next run would read it, and cleaning up could remove text."""
    place = out.resolve()
    for path in [*filter(os.path.isdir, inputs), *(file.path for file in files)]:
        source = Path(path).resolve()
        if (place != source and source.is_relative_to(place)) or (source.is_dir() and place.is_relative_to(source)):
            raise ConfigurationError(f"--out {out}: holds or lies in the input {path}; give a directory of its own")


def _read_all(config: PrepareConfig, files: list[InputFile]) -> Iterator[Chunk]:
    for number, file in enumerate(files):
        yield from read_chunks(
            file,
            number,
            txt_documents=config.txt_documents,
            text_field=config.text_field,
            policy=config.on_bad_input,
        )


def _obtain_tokenizer(
    config: PrepareConfig,
    cleaning: CleaningSettings,
    files: list[InputFile],
    given: Tokenizer | None,
    directory: Path,
    stop: StopRequest,
) -> Tokenizer:
    """The tokenizer, which workers find in `directory`: the given one, or one trained by this run or before it stopped."""
    if not directory.exists():
        tokenizer = given or _train_tokenizer(config, cleaning, files, stop)
        partial = directory.with_suffix(".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        save_tokenizer(tokenizer, partial)
        os.replace(partial, directory)
    return given or load_tokenizer(directory)


def _train_tokenizer(
    config: PrepareConfig, cleaning: CleaningSettings, files: list[InputFile], stop: StopRequest
) -> Tokenizer:
    assert config.train_tokenizer is not None

    def read_chunks_until_stopped() -> Iterator[Chunk]:
        for chunk in _read_all(config, files):
            stop.check()
            yield chunk

    sample = sample_chunks(read_chunks_until_stopped(), TRAINING_BYTES)
    size = sum(map(Chunk.size, sample))
    print(f"training a tokenizer of {config.train_tokenizer} tokens on {size / 1e6:.0f} MB", file=sys.stderr)

    def read_texts() -> Iterator[str]:
        problems, cleaner = Problems(config.on_bad_input), Cleaner(cleaning)
        while sample:
            documents = _read_documents(config, sample.pop(0), problems)
            for text in cleaner.clean(documents, Counter(), {}):
                yield from split_lines(text) if config.newlines == "separator" else [text]

    trained = train_tokenizer(read_texts(), config.train_tokenizer)
    if (found := vocabulary_size(trained)) < config.train_tokenizer:
        print(
            f"train_tokenizer = {config.train_tokenizer}: the text is too short for that many; the tokenizer has "
            f"{found} tokens; give more text for more",
            file=sys.stderr,
        )
    return trained


def _read_documents(config: PrepareConfig, chunk: Chunk, problems: Problems) -> Iterator[str]:
    return read_documents(chunk, txt_documents=config.txt_documents, text_field=config.text_field, problems=problems)


def _count_boilerplate(config: PrepareConfig, files: list[InputFile], work: Path, stop: StopRequest) -> None:
    """Find the lines that recur, over the whole corpus."""
    assert config.boilerplate is not None
    if (work / BOILERPLATE).exists():
        return
    print(f"looking for lines that {config.boilerplate} documents share", file=sys.stderr)
    problems = Problems(config.on_bad_input)

    def read() -> Iterator[str]:
        for chunk in _read_all(config, files):
            stop.check()
            for text in _read_documents(config, chunk, problems):
                yield normalize(text, config.nfc)[0]

    table = work / "lines.tmp"
    recurring = find_recurring(table, write_line_hashes(read(), table), config.boilerplate)
    table.unlink()
    with write_atomically(work / BOILERPLATE) as file:
        np.save(file, recurring)


def _cleaning_settings(config: PrepareConfig, work: Path) -> CleaningSettings:
    return CleaningSettings(
        nfc=config.nfc,
        min_characters=config.min_characters,
        max_characters=config.max_characters,
        blocklist=read_blocklist(config.blocklist) if config.blocklist else (),
        quality=config.quality,
        thresholds=config.thresholds,
        languages=config.languages,
        language_confidence=config.language_confidence,
        boilerplate=str((work / BOILERPLATE).absolute()) if config.boilerplate else None,
    )


def list_figures(manifest: Manifest) -> list[tuple[str, str]]:
    """What was read, repaired, left out and written: names and values."""
    counts, problems = manifest.contents["report"]["counts"], manifest.contents["report"]["problems"]
    lines = [("text read", f"{counts.get('bytes', 0) / 1e6:,.1f} MB"), ("documents read", f"{counts.get('read', 0):,}")]
    names = {"normalized": "  brought into NFC", "boilerplate": "  lines removed: boilerplate"}
    names |= {step: f"  left out: {step.replace('_', ' ')}" for step in LEFT_OUT}
    lines += [(name, f"{counts[key]:,}") for key, name in names.items() if key in counts]
    for kind, count in sorted(problems.items(), key=lambda one: (one[0] not in REPAIRED, one[0])):
        lines.append((f"  {'repaired' if kind in REPAIRED else 'left out'}: {kind}", f"{count:,}"))
    for split in SPLITS:
        written = [f"{manifest.count(split, what):,} {what}" for what in ("documents", "sentences", "tokens")]
        lines.append((split, ", ".join(written)))
    return lines


def print_report(manifest: Manifest) -> None:
    """Print the figures and what can be done next."""
    lines = list_figures(manifest)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    if not manifest.shard_paths("heldout"):
        print(
            "no document is held out, but training needs some: prepare more text (identical documents stay together), or "
            "raise --heldout-fraction"
        )
    elif not manifest.shard_paths("train"):
        print("all documents are held out, none is left to train on: prepare more text, or lower --heldout-fraction")
    else:
        data = shlex.quote(str(manifest.directory))
        print(f"{manifest.directory}: ready for python -m fastroberta.train --data {data}")


if __name__ == "__main__":
    sys.exit(run(main))
