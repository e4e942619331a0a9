"""`python -m fastroberta.prepare INPUT... --out DIR`: text in, token shards out.

Reads txt, jsonl, csv, tsv, parquet and Arrow, plain or in gzip, bzip2, xz or zstd: files, folders, globs, URLs, and
standard input. Cleans as asked, tokenizes on all
cores, and writes shards, a held-out split and a manifest. Interrupted in any way, the same command continues; the
shards depend on the text and the options alone, not on the number of workers or on interruptions.

    tokenize     chunks of about 8 MB of text -> one file each in DIR/work (parallel)
    deduplicate  the hashes of all chunks -> which documents to drop
    assemble     chunks, in order -> shards; then the manifest, which makes the directory a finished one

While it runs DIR takes twice the size of the shards. Memory: about 200 MB, and as much for each worker, up to 1.3 GB
where a document has 16 MB, the most that is taken; training a tokenizer holds 256 MB of text; removing duplicates adds
a byte a document, and sorts 4 million keys at a time.

--worker i/n does the i-th of n shares of the corpus (on a machine of its own, say): whole files where there are n of
them, chunks otherwise. --merge DIR... --out DIR joins the results; each share removed its own duplicates only.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from .cli.arguments import parse_arguments
from .cli.directories import own_directory
from .cli.program import run
from .config import setting
from .corpus.assemble import LEFT_OUT, NoDocumentError, assemble, find_duplicates, join
from .corpus.boilerplate import find_recurring, write_line_hashes
from .corpus.chunks import ChunkProcessor, ChunkSettings, process_in_worker, start_worker
from .corpus.clean import Cleaner, CleaningSettings, normalize, read_blocklist
from .corpus.problems import MENDED, Problems
from .corpus.quality import Thresholds
from .corpus.read import CHUNK_BYTES, Chunk, read_chunks, read_documents
from .corpus.report import check_report_path, write_report
from .corpus.shards import MAX_SHARD_TOKENS, SPLITS, Manifest, load_manifest, write_atomically
from .corpus.sources import InputFile, find_files
from .corpus.tokenizer import (
    LARGEST_VOCABULARY,
    SMALLEST_VOCABULARY,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from .errors import ConfigurationError, DataError, DeviceMemoryError, Stopped

BOILERPLATE = "boilerplate.npy"  # in the work folder
TRAINING_BYTES = 256 << 20  # of text, evenly spread over the corpus, that a tokenizer is trained on at most


@dataclass
class PrepareConfig:
    """One corpus."""

    inputs: list[str] = setting(
        help="text files, folders, globs or URLs, - for standard input; prepared directories with --merge",
        positional=True,
    )
    out: str = setting(help="directory to write; an unfinished run found there is continued")
    tokenizer: str | None = setting(None, "directory with tokenizer.json, or with vocab.json and merges.txt")
    train_tokenizer: int | None = setting(
        None,
        "train a tokenizer of this many tokens on the text instead",
        valid=f"[{SMALLEST_VOCABULARY}, {LARGEST_VOCABULARY}]",
    )

    format: Literal["auto", "txt", "jsonl", "csv", "tsv", "parquet", "arrow"] = setting(
        "auto", "of the inputs; auto goes by their names, or looks into them"
    )
    txt_documents: Literal["blank-line", "line"] = setting("blank-line", "what ends a document in txt")
    text_field: str = setting(
        "text", "field or column that holds the text; messages.content is one inside another, lists become lines"
    )
    on_bad_input: Literal["error", "skip"] = setting("error", "stop at damaged input, or leave it out and count it")

    # Cleaning, in the order in which it is done; corpus/clean.py has the details.
    nfc: bool = setting(False, "bring text into Unicode normal form C")
    boilerplate: int | None = setting(
        None, "remove lines of three words or more that at least this many documents share", valid="[2, inf)"
    )
    min_characters: int = setting(0, "leave out shorter documents", valid="[0, inf)")
    max_characters: int | None = setting(None, "leave out longer documents", valid="[1, inf)")
    blocklist: str | None = setting(None, "file of words and phrases, one a line; leave out documents that hold one")
    quality: str | None = setting(None, "leave out documents that break rules: gopher, c4, or single ones, by commas")
    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)
    languages: str | None = setting(None, "keep these languages only: codes such as en,de, told by py3langid")
    language_confidence: float = setting(0.5, "least probability of the language", valid="[0, 1]")
    exact_duplicates: bool = setting(False, "leave out documents that equal an earlier one")
    near_duplicates: float | None = setting(
        None, "leave out documents this similar to an earlier one (Jaccard, by MinHash); 0.8 is usual", valid="(0, 1]"
    )
    report: str | None = setting(None, "FILE.html or FILE.md to write: the figures, and examples of what was left out")

    sentences: Literal["punctuation", "lines"] = setting("punctuation", "where sentences end, line ends aside")
    heldout_fraction: float = setting(
        0.005, "share of the documents kept for evaluation, chosen by a hash of their text", valid="[0, 1)"
    )

    shard_tokens: int = setting(2**26, "tokens a shard at most", valid=f"[1, {MAX_SHARD_TOKENS}]")
    workers: int | None = setting(None, "processes; null takes one for each core", valid="[1, inf)")
    worker: str | None = setting(None, "i/n: do only the i-th of n shares of the corpus, to be merged later")
    merge: bool = setting(False, "join directories that --worker prepared")

    def check(self) -> None:
        if self.merge and (self.tokenizer or self.train_tokenizer or self.worker):
            raise ConfigurationError("merge: the directories are prepared already; give only them and --out")
        if not self.merge and (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ConfigurationError("tokenizer: give one of --tokenizer DIR and --train-tokenizer VOCAB_SIZE")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ConfigurationError(f"max_characters = {self.max_characters}: less than min_characters; raise it")
        if self.report:
            check_report_path(self.report)
        self.share()

    def share(self) -> tuple[int, int]:
        """(i, n) of --worker, i counted from 0."""
        first, _, count = (self.worker or "1/1").partition("/")
        if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
            raise ConfigurationError(f"worker = {self.worker}: takes i/n with i from 1 to n, for example 1/4")
        return int(first) - 1, int(count)


def main(argv: Sequence[str] | None = None) -> int:
    # The first two paragraphs: --help would run the list after them together.
    config = parse_arguments(argv, PrepareConfig, description="\n\n".join((__doc__ or "").split("\n\n")[:2]))
    try:
        manifest = merge(config) if config.merge else prepare(config)
    except OSError as error:
        raise DataError(f"{error.filename or config.out}: {error.strerror}; mend that and start again") from error
    print_report(manifest)
    if config.report:
        title = f"{manifest.directory}: prepared text"
        write_report(Path(config.report), title, list_figures(manifest), manifest.contents["report"]["examples"])
    return 0


def prepare(config: PrepareConfig) -> Manifest:
    """Do what the configuration says; a finished directory is left as it is.

    Raises:
        ConfigurationError, DataError, Stopped: see there.
    """
    out = Path(config.out)
    work = out / "work"
    files = find_files(config.inputs, config.format, config.text_field)
    _refuse_out_among_inputs(out, config.inputs, files)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    settings = _chunk_settings(config, work)
    Cleaner(dataclasses.replace(settings.cleaning, boilerplate=None))  # what it lacks is said before the work
    options = _identify(config, tokenizer)
    if finished := _find_finished(out, options, _describe(files)):
        return finished
    with own_directory(out, "work/lock", "--out"), _StopRequest() as stop:
        _resume(work, options, files)
        if config.boilerplate:
            _count_boilerplate(config, files, work, stop)
        if tokenizer is None:
            tokenizer = _obtain_tokenizer(config, settings, files, work, stop)
        chunks = _tokenize(config, settings, files, tokenizer, work, stop)
        dropped = find_duplicates(chunks, work, config.exact_duplicates, config.near_duplicates, stop.check)
        try:
            manifest = assemble(chunks, dropped, tokenizer, out, options, _describe(files), stop.check)
        except NoDocumentError:
            shutil.rmtree(work)  # it would bind the next try to the options that left nothing
            raise
        shutil.rmtree(work)
    return manifest


# ---- starting and continuing


def _identify(config: PrepareConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that decides the bytes of the output besides the files, to know an unfinished run again.

    on_bad_input is not in it: after an error the same run may go on with "skip", the chunks done before had no fault.
    """
    options = dataclasses.asdict(config)
    for name in ("out", "workers", "merge", "on_bad_input", "tokenizer", "report"):
        del options[name]
    if config.blocklist:
        words = "\n".join(read_blocklist(config.blocklist))
        options["blocklist"] = f"{config.blocklist} ({hashlib.sha256(words.encode()).hexdigest()[:16]})"
    return {**options, "tokenizer_sha256": tokenizer_hash(tokenizer) if tokenizer else None}


def _refuse_out_among_inputs(out: Path, inputs: list[str], files: list[InputFile]) -> None:
    """What is written must not lie beside the text: the next run would read it, and cleaning up could remove text."""
    place = out.resolve()
    for path in [*filter(os.path.isdir, inputs), *(file.path for file in files)]:
        source = Path(path).resolve()
        if (place != source and source.is_relative_to(place)) or (source.is_dir() and place.is_relative_to(source)):
            raise ConfigurationError(f"--out {out}: holds or lies in the input {path}; give a directory of its own")


def _describe(files: list[InputFile]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(file) for file in files]


def _find_finished(out: Path, options: dict[str, Any], files: list[dict[str, Any]]) -> Manifest | None:
    if not (out / "manifest.json").exists():
        return None
    manifest = load_manifest(out)
    _refuse_other_options(manifest.contents["options"], options, f"{out}: holds a finished corpus")
    now = {one["path"]: one for one in files}
    # Manifests of versions before this check have no "files".
    then = {one["path"]: one for one in manifest.contents["files"]} if "files" in manifest.contents else now
    changed = [path for path in {**now, **then} if now.get(path) != then.get(path)]
    if changed:
        raise ConfigurationError(
            f"{out}: holds a finished corpus, but {changed[0]} was changed, added or removed since; give another --out, "
            "or remove the directory to prepare it anew"
        )
    print(f"{out}: already prepared, nothing to do")
    return manifest


def _refuse_other_options(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise ConfigurationError(
                f"{what} with {name} = {found.get(name)}, this run has {wanted[name]}; give the same options, or "
                "another --out, or remove the directory"
            )


class _StopRequest:
    """Notes the first SIGINT or SIGTERM, so that the chunk in hand is finished; a second one ends the program."""

    def __enter__(self) -> _StopRequest:
        self.requested = False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        self.__exit__()

    def check(self) -> None:
        if self.requested:
            raise Stopped("stopped; nothing is lost, the same command continues")


def _resume(work: Path, options: dict[str, Any], files: list[InputFile]) -> None:
    """Hold an unfinished run's plan against this one's, and forget what came from files that changed since."""
    for leftover in [*work.glob("*.tmp"), *work.parent.glob("*.tmp")]:
        if leftover.is_file():  # tokenizer.tmp is a directory, and is taken away before the next one is written
            leftover.unlink()
    plan = {"options": options, "files": _describe(files)}
    path = work / "plan.json"
    # A plan from which nothing was made yet, because its first try failed, binds nobody.
    if path.exists() and any(next(work.glob(made), None) for made in ("*.npz", "tokenizer", BOILERPLATE)):
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); remove {work} and start again") from error
        _refuse_other_options(found["options"], options, f"{work.parent}: holds an unfinished run")
        if [file["path"] for file in found["files"]] != [file.path for file in files]:
            raise ConfigurationError(
                f"{work.parent}: holds an unfinished run over other files; give the same files, or another --out, or "
                "remove the directory"
            )
        changed = [number for number, file in enumerate(plan["files"]) if file != found["files"][number]]
        for number in changed:
            print(f"{files[number].path}: changed since the run began, done again", file=sys.stderr)
            for chunk in work.glob(f"{number:06d}-*.npz"):
                chunk.unlink()
        if changed and (options["train_tokenizer"] or options["boilerplate"]):
            (work / BOILERPLATE).unlink(missing_ok=True)
            shutil.rmtree(work / "tokenizer", ignore_errors=True)
            for chunk in work.glob("*.npz"):
                chunk.unlink()
    with write_atomically(path) as file:
        file.write(json.dumps(plan, indent=1).encode())


def _count_boilerplate(config: PrepareConfig, files: list[InputFile], work: Path, stop: _StopRequest) -> None:
    """Find the lines that recur, over the whole corpus whatever --worker says."""
    assert config.boilerplate is not None
    if (work / BOILERPLATE).exists():
        return
    print(f"looking for lines that {config.boilerplate} documents share", file=sys.stderr)
    problems = Problems(config.on_bad_input)

    def read() -> Iterator[str]:
        for chunk in _read_all(config, files):
            stop.check()
            for text in read_documents(
                chunk, txt_documents=config.txt_documents, text_field=config.text_field, problems=problems
            ):
                yield normalize(text, config.nfc)[0]

    table = work / "lines.tmp"
    recurring = find_recurring(table, write_line_hashes(read(), table), config.boilerplate)
    table.unlink()
    with write_atomically(work / BOILERPLATE) as file:
        np.save(file, recurring)


def _obtain_tokenizer(
    config: PrepareConfig, settings: ChunkSettings, files: list[InputFile], work: Path, stop: _StopRequest
) -> Tokenizer:
    """The tokenizer that this run trained before it was interrupted, or a new one."""
    assert config.train_tokenizer is not None
    directory = work / "tokenizer"
    if not directory.exists():
        sample: list[Chunk] = []
        stride, size = 1, 0
        # Over the whole corpus, whatever --worker says: every share gets the same tokenizer.
        for number, chunk in enumerate(_read_all(config, files)):
            stop.check()
            if number % stride == 0:
                sample.append(chunk)
                size += chunk.size()
            while size > TRAINING_BYTES and len(sample) > 1:  # every second goes, so that it stays evenly spread
                sample, stride = sample[::2], stride * 2
                size = sum(map(Chunk.size, sample))
        print(f"training a tokenizer of {config.train_tokenizer} tokens on {size / 1e6:.0f} MB", file=sys.stderr)

        def read_lines() -> Iterator[str]:
            problems, cleaner = Problems(config.on_bad_input), Cleaner(settings.cleaning)
            while sample:
                documents = read_documents(
                    sample.pop(0),
                    txt_documents=config.txt_documents,
                    text_field=config.text_field,
                    problems=problems,
                )
                for text in cleaner.clean(documents, Counter(), {}):
                    yield from filter(None, map(str.strip, text.split("\n")))

        trained = train_tokenizer(read_lines(), config.train_tokenizer)
        if (found := vocabulary_size(trained)) < config.train_tokenizer:
            print(
                f"train_tokenizer = {config.train_tokenizer}: the text is too little for that, the tokenizer has {found} "
                "tokens; give more text for more",
                file=sys.stderr,
            )
        partial = work / "tokenizer.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        save_tokenizer(trained, partial)
        os.replace(partial, directory)
    return load_tokenizer(directory)


def _chunk_settings(config: PrepareConfig, work: Path) -> ChunkSettings:
    return ChunkSettings(
        txt_documents=config.txt_documents,
        text_field=config.text_field,
        split_sentences=config.sentences == "punctuation",
        cleaning=CleaningSettings(
            nfc=config.nfc,
            min_characters=config.min_characters,
            max_characters=config.max_characters,
            blocklist=read_blocklist(config.blocklist) if config.blocklist else (),
            quality=config.quality,
            thresholds=config.thresholds,
            languages=config.languages,
            language_confidence=config.language_confidence,
            boilerplate=str(work / BOILERPLATE) if config.boilerplate else None,
        ),
        signatures=config.near_duplicates is not None,
        on_bad_input=config.on_bad_input,
    )


# ---- tokenize


def _read_all(config: PrepareConfig, files: list[InputFile]) -> Iterator[Chunk]:
    for number, file in enumerate(files):
        yield from read_chunks(
            file,
            number,
            txt_documents=config.txt_documents,
            text_field=config.text_field,
            policy=config.on_bad_input,
        )


def _read_share(config: PrepareConfig, files: list[InputFile]) -> Iterator[Chunk]:
    """The chunks that are this run's by --worker."""
    share, count = config.share()
    if len(files) >= count:
        for number in range(share, len(files), count):
            yield from (dataclasses.replace(chunk, file_number=number) for chunk in _read_all(config, [files[number]]))
    else:
        for number, chunk in enumerate(_read_all(config, files)):
            if number % count == share:
                yield chunk


def _tokenize(
    config: PrepareConfig,
    settings: ChunkSettings,
    files: list[InputFile],
    tokenizer: Tokenizer,
    work: Path,
    stop: _StopRequest,
) -> list[Path]:
    """Write the chunk files that are not there yet; all of them, in order."""
    total = sum(file.size for file in files)
    workers = min(config.workers or len(os.sched_getaffinity(0)), 1 + total // CHUNK_BYTES)
    paths: list[Path] = []
    pending: deque[tuple[Chunk, concurrent.futures.Future[dict[str, int]]]] = deque()
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(total // config.share()[1]))
        submit: Callable[[Chunk, Path], concurrent.futures.Future[dict[str, int]]]
        if workers == 1:
            processor = ChunkProcessor(tokenizer, settings)

            def submit(chunk: Chunk, path: Path) -> concurrent.futures.Future[dict[str, int]]:
                done: concurrent.futures.Future[dict[str, int]] = concurrent.futures.Future()
                done.set_result(processor.process(chunk, path))
                return done
        else:
            pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                multiprocessing.get_context("spawn"),  # a fork would copy the tokenizer's threads in mid-step
                start_worker,
                (tokenizer.to_str(), settings),
            )
            stack.callback(pool.shutdown, cancel_futures=True)

            def submit(chunk: Chunk, path: Path) -> concurrent.futures.Future[dict[str, int]]:
                # A submission may start a worker, which inherits the mask: Ctrl-C is this process's to handle, and a
                # worker that it hits while it starts would print a traceback.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    return pool.submit(process_in_worker, chunk, path)
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

        def finish_oldest() -> None:
            # In order, so that of several faults the first is reported.
            chunk, future = pending.popleft()
            try:
                done = future.result()
            except concurrent.futures.BrokenExecutor as error:
                raise DeviceMemoryError(
                    f"{chunk.file.path}: a worker was killed, most often for want of memory; the same command with "
                    "fewer --workers continues"
                ) from error
            progress.advance(chunk.input_bytes, done["bytes"], done["tokens"])

        for chunk in _read_share(config, files):
            stop.check()
            path = work / f"{chunk.file_number:06d}-{chunk.number:06d}.npz"
            paths.append(path)
            if path.exists():
                progress.advance(chunk.input_bytes)
                continue
            pending.append((chunk, submit(chunk, path)))
            while len(pending) > workers + 2:
                finish_oldest()
        while pending:
            stop.check()
            finish_oldest()
    return paths


class Progress:
    """Share done, MB/s of text, tokens/s and time left; a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total_bytes: int):
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"))
        self._bar = Bar(*columns, console=console) if console.is_terminal else None
        self._total = max(total_bytes, 1)
        self._input_bytes = self._new_input_bytes = self._text_bytes = self._tokens = 0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, speed="")
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, input_bytes: int, text_bytes: int | None = None, tokens: int = 0) -> None:
        """A chunk is done; without text_bytes it was done by an earlier run, and says nothing about the speed."""
        self._input_bytes += input_bytes
        if text_bytes is not None:
            self._new_input_bytes += input_bytes
            self._text_bytes += text_bytes
            self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        left = max(self._total - self._input_bytes, 0) * seconds / max(self._new_input_bytes, 1)
        speed = (
            f"{self._text_bytes / seconds / 1e6:.1f} MB/s, {self._tokens / seconds:,.0f} tokens/s, "
            f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left"
        )
        if self._bar:
            self._bar.update(self._task, completed=min(self._input_bytes, self._total), speed=speed)
        elif now - self._last_line >= 10:
            self._last_line = now
            print(f"tokenizing {min(self._input_bytes / self._total, 1):.1%}, {speed}", file=sys.stderr, flush=True)


# ---- joining and reporting


def merge(config: PrepareConfig) -> Manifest:
    """Join prepared directories: their shards in order, linked where the file system can, copied otherwise.

    Raises:
        DataError: a directory is not finished, damaged, or made with another tokenizer.
    """
    out = Path(config.out)
    manifests = [load_manifest(directory, verify=True) for directory in config.inputs]
    options = {"merge": config.inputs, "parts": [manifest.contents["options"] for manifest in manifests]}
    files = [
        {"path": str(manifest.directory / entry["name"]), "sha256": entry["sha256"]}
        for manifest in manifests
        for entry in manifest.contents["shards"]
    ]
    if finished := _find_finished(out, options, files):
        return finished
    with own_directory(out, "work/lock", "--out"):
        merged = join(manifests, out, options, files)
        shutil.rmtree(out / "work")
    return merged


def list_figures(manifest: Manifest) -> list[tuple[str, str]]:
    """What was read, mended, left out and written: names and values."""
    counts, problems = manifest.contents["report"]["counts"], manifest.contents["report"]["problems"]
    lines = [("text read", f"{counts.get('bytes', 0) / 1e6:,.1f} MB"), ("documents read", f"{counts.get('read', 0):,}")]
    names = {"normalized": "  brought into NFC", "boilerplate": "  lines removed: boilerplate"}
    names |= {step: f"  left out: {step.replace('_', ' ')}" for step in LEFT_OUT}
    lines += [(name, f"{counts[key]:,}") for key, name in names.items() if key in counts]
    for kind, count in sorted(problems.items(), key=lambda one: (one[0] not in MENDED, one[0])):
        lines.append((f"  {'mended' if kind in MENDED else 'left out'}: {kind}", f"{count:,}"))
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
        print("nothing is held out, but training needs it: prepare more text, or with a larger --heldout-fraction")
    elif not manifest.shard_paths("train"):
        print("all is held out: to train, prepare more text, or with a smaller --heldout-fraction")
    else:
        data = shlex.quote(str(manifest.directory))
        print(f"{manifest.directory}: ready for python -m fastroberta.train --data {data}")


if __name__ == "__main__":
    sys.exit(run(main))
