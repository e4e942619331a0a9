"""Chunk files -> shards: drop duplicates, choose what is held out, write in order, and finish with the manifest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..errors import DataError
from .clean import MAX_EXAMPLES, REASONS, Examples, add_example
from .deduplicate import find_exact_duplicates, find_near_duplicates
from .shards import (
    SPLITS,
    Manifest,
    ShardWriter,
    file_sha256,
    load_manifest,
    token_dtype,
    write_atomically,
    write_manifest,
)
from .tokenizer import load_tokenizer, save_tokenizer, special_token_ids, tokenizer_hash, vocabulary_size

LEFT_OUT = (*REASONS, "exact_duplicates", "near_duplicates")  # counts of documents


class NoDocumentError(DataError):
    """Nothing is left to write."""


def load_chunk(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of a chunk file; raises DataError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as chunk:
            return [chunk[name] for name in names]
    except Exception as error:  # what numpy and zipfile raise for damage has no common base
        raise DataError(f"{path}: damaged ({error}); remove this file and start again") from error


def find_duplicates(
    chunks: list[Path], work: Path, exact: bool, threshold: float | None, check: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Flags of the documents to drop, by the name of the cleaning step.

    Args:
        work: where the hashes of all chunks are put together, in a file.
        exact, threshold: which steps; the threshold of near duplicates, None without them.
        check: called between chunks; it raises to stop.
    """
    steps: dict[str, tuple[str, Callable[..., np.ndarray]]] = {}
    if exact:
        steps["exact_duplicates"] = ("hashes", find_exact_duplicates)
    if threshold is not None:
        steps["near_duplicates"] = ("signatures", partial(find_near_duplicates, threshold=threshold))
    dropped: dict[str, np.ndarray] = {}
    for step, (name, find) in steps.items():
        table, count = work / f"{name}.bin", 0
        with open(table, "wb") as file:
            for path in chunks:
                check()
                hashes, *_ = load_chunk(path, "hashes")
                if len(hashes):
                    count += len(hashes)
                    file.write(np.ascontiguousarray(load_chunk(path, name)[0]).data)
        flags = find(table, count) if count else np.zeros(0, dtype=bool)
        table.unlink()
        for earlier in dropped.values():  # a document is counted once
            flags &= ~earlier
        dropped[step] = flags
    return dropped


def assemble(
    chunks: list[Path],
    dropped: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    out: Path,
    options: dict[str, Any],
    files: list[dict[str, Any]],
    check: Callable[[], None],
) -> Manifest:
    """Chunk files, in order -> shards and manifest.

    Args:
        dropped: what `find_duplicates` found.
        options: prepare's, for the manifest; heldout_fraction and shard_tokens are obeyed.
        files: the inputs with what tells whether they changed, for the manifest.
        check: called between chunks; it raises to stop.
    Raises:
        DataError: a damaged chunk. NoDocumentError: no document at all.
    """
    counts: Counter[str] = Counter({step: int(flags.sum()) for step, flags in dropped.items()})
    problems: Counter[str] = Counter()
    examples: Examples = {}
    limit = np.uint64(int(options["heldout_fraction"] * 2**64))
    dtype = token_dtype(vocabulary_size(tokenizer))
    sha256 = options["tokenizer_sha256"] or tokenizer_hash(tokenizer)
    first = 0
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(out, split, dtype, sha256, options["shard_tokens"])) for split in SPLITS
        ]
        for path in chunks:
            check()
            tokens, sentence_lengths, document_sentences, hashes, report = load_chunk(
                path, "tokens", "sentence_lengths", "document_sentences", "hashes", "report"
            )
            found = json.loads(report.tobytes())
            counts.update(found["counts"])
            problems.update(found["problems"])
            for reason, kept_examples in found["examples"].items():
                for detail, text in kept_examples:
                    add_example(examples, reason, detail, text)
            kept = np.ones(len(hashes), dtype=bool)
            for step, flags in dropped.items():
                goes = flags[first : first + len(hashes)]
                kept &= ~goes
                for document in np.flatnonzero(goes)[: MAX_EXAMPLES - len(examples.get(step, []))]:
                    is_its = np.repeat(np.arange(len(hashes)) == document, document_sentences)
                    text = tokenizer.decode(tokens[np.repeat(is_its, sentence_lengths)][:-1].tolist())
                    add_example(examples, step, "", text)
            first += len(hashes)
            is_heldout = hashes[:, 0] < limit
            for writer, chosen in zip(writers, (kept & ~is_heldout, kept & is_heldout)):
                sentences = np.repeat(chosen, document_sentences)
                writer.append(
                    tokens[np.repeat(sentences, sentence_lengths)],
                    sentence_lengths[sentences],
                    document_sentences[chosen],
                )
    shards = [entry for writer in writers for entry in writer.files]
    if not shards:
        left_out = [f"{counts[step]:,} {step.replace('_', ' ')}" for step in LEFT_OUT if counts[step]]
        mended = [f"{count:,} {kind}" for kind, count in sorted(problems.items())]
        found = f"left out: {', '.join(left_out)}; " if left_out else ""
        found += f"mended or left out: {', '.join(mended)}; " if mended else ""
        raise NoDocumentError(
            f"{', '.join(options['inputs'])}: no document is left; {found}give {'other' if mended else 'more'} text, "
            "or clean less"
        )
    return finish(
        out, shards, tokenizer, sha256, {"counts": counts, "problems": problems, "examples": examples}, options, files
    )


def finish(
    out: Path,
    shards: list[dict[str, Any]],
    tokenizer: Tokenizer,
    sha256: str,
    report: dict[str, Any],
    options: dict[str, Any],
    files: list[dict[str, Any]],
) -> Manifest:
    """Write the tokenizer's files and the manifest."""
    names = save_tokenizer(tokenizer, out)
    contents = {
        "tokenizer_sha256": sha256,
        "vocab_size": vocabulary_size(tokenizer),
        "special_token_ids": {f"{n}_token_id": i for n, i in special_token_ids(tokenizer)._asdict().items()},
        "shards": shards,
        "tokenizer_files": [
            {"name": name, "bytes": (out / name).stat().st_size, "sha256": file_sha256(out / name)} for name in names
        ],
        "report": report,
        "options": options,
        "files": files,
    }
    write_manifest(out, contents)
    return load_manifest(out)


def join(manifests: list[Manifest], out: Path, options: dict[str, Any], files: list[dict[str, Any]]) -> Manifest:
    """Prepared directories -> one, with their shards in order.

    Raises:
        DataError: made with different tokenizers.
    """
    first = manifests[0]
    for manifest in manifests[1:]:
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(f"{manifest.directory}: another tokenizer than {first.directory}; prepare both with one")
    shards: list[dict[str, Any]] = []
    for split in SPLITS:
        number = 0
        for manifest in manifests:
            for entry in (entry for entry in manifest.contents["shards"] if entry["split"] == split):
                name = f"{split}-{number:05d}.bin"
                _link_or_copy(manifest.directory / entry["name"], out / name)
                shards.append({**entry, "name": name})
                number += 1
    report: dict[str, Any] = {
        part: sum((Counter(manifest.contents["report"][part]) for manifest in manifests), Counter())
        for part in ("counts", "problems")
    }
    report["examples"] = {}
    for manifest in manifests:
        for reason, found in manifest.contents["report"]["examples"].items():
            for detail, text in found:
                add_example(report["examples"], reason, detail, text)
    return finish(out, shards, load_tokenizer(first.directory), first.tokenizer_sha256, report, options, files)


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        with write_atomically(target) as file, open(source, "rb") as original:
            shutil.copyfileobj(original, file, 1 << 20)
