"""Chunk files -> shards: drop duplicates, choose what is held out, write in order, and finish with the manifest.

A corpus that removes duplicates keeps what it compared, so that documents can be appended later and judged against all:
`hashes-00000.bin`, uint64 (documents, 2), for exact duplicates, and `signatures-00000.bin`, uint32 (documents, 128), for
near ones; a row for each document in the order of reading, whether it was dropped or not. The manifest lists them under
"duplicate_tables". Appending writes new shards and new tables beside the old ones. The manifest, replaced last, makes
them count; until then the corpus is the old one.
"""

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
from .chunks import load_chunk
from .clean import MAX_EXAMPLES, REASONS, Examples, add_example
from .deduplicate import find_exact_duplicates, find_near_duplicates
from .manifest import Manifest, load_manifest, write_manifest
from .shards import AGAIN, SPLITS, ShardWriter, file_sha256, token_dtype
from .tokenizer import save_tokenizer, special_token_ids, tokenizer_hash, vocabulary_size

HELDOUT_TOKENS = 128 * 512  # to hold out at least: 128 sequences, where a tenth of the corpus is that much
LEFT_OUT = (*REASONS, "exact_duplicates", "near_duplicates")  # counts of documents


class NoDocumentError(DataError):
    """Nothing is left to write."""


def find_duplicates(
    chunks: list[Path],
    work: Path,
    base: Manifest | None,
    exact: bool,
    threshold: float | None,
    check: Callable[[], None],
) -> dict[str, np.ndarray]:
    """Flags of the documents to drop, by the name of the cleaning step.

    Args:
        work: where the tables of all documents are left: hashes.bin, signatures.bin.
        base: the corpus that is appended to; its documents come first and are not in the flags.
        exact, threshold: which steps; the threshold of near duplicates, None without them.
        check: called between chunks; it raises to stop.
    Raises:
        DataError: a damaged chunk or table.
    """
    steps: dict[str, tuple[str, Callable[..., np.ndarray]]] = {}
    if exact:
        steps["exact_duplicates"] = ("hashes", find_exact_duplicates)
    if threshold is not None:
        steps["near_duplicates"] = ("signatures", partial(find_near_duplicates, threshold=threshold))
    dropped: dict[str, np.ndarray] = {}
    for step, (name, find) in steps.items():
        table, count, row_bytes = work / f"{name}.bin", 0, 0
        earlier = copy_table(base, name, table) if base else 0
        with open(table, "ab" if base else "wb") as file:
            for path in chunks:
                check()
                hashes, *_ = load_chunk(path, "hashes")
                if len(hashes):
                    rows = np.ascontiguousarray(load_chunk(path, name)[0])
                    count, row_bytes = count + len(rows), rows[0].nbytes
                    file.write(rows.data)
        before = earlier // row_bytes if count else 0
        flags = find(table, before + count)[before:] if count else np.zeros(0, dtype=bool)
        for others in dropped.values():  # a document is counted once
            flags &= ~others
        dropped[step] = flags
    return dropped


def warn_of_small_heldout(input_bytes: int, fraction: float) -> str | None:
    """What to say before the work where the text looks too little for `HELDOUT_TOKENS`, at 3 bytes a token."""
    tokens = input_bytes // 3
    if not fraction or max(fraction, 0.1) * tokens >= HELDOUT_TOKENS:
        return None
    return (
        f"{input_bytes / 1e6:.2f} MB of input: about {round(max(fraction, 0.1) * tokens / 512)} sequences of 512 tokens "
        f"can be held out, fewer than the {HELDOUT_TOKENS // 512} that a steady held-out loss takes; give more text, or a "
        "larger --heldout-fraction"
    )


def find_heldout_limit(
    chunks: list[Path], dropped: dict[str, np.ndarray], fraction: float, check: Callable[[], None]
) -> int:
    """The bound, at most 2**64 - 1, below which the first half of a document's hash sends it to the held-out split.

    Equal documents go together. The bound is `fraction` of all hashes, so that the choice depends on each document
    alone, where that gives `HELDOUT_TOKENS`. In a smaller corpus it is raised, document by document, to give as many or
    a tenth of the tokens; the first document may be up to half of them. A fraction of 0 holds nothing out.
    """
    limit = min(int(fraction * 2**64), 2**64 - 1)
    if not limit:
        return 0
    hashes, tokens, total, first = np.zeros(0, np.uint64), np.zeros(0, np.int64), 0, 0
    for path in chunks:
        check()
        lengths, sentences, found = load_chunk(path, "sentence_lengths", "document_sentences", "hashes")
        kept = np.ones(len(found), dtype=bool)
        for flags in dropped.values():
            kept &= ~flags[first : first + len(found)]
        first += len(found)
        if not kept.any():
            continue
        sizes = np.add.reduceat(lengths, np.cumsum(sentences, dtype=np.int64) - sentences, dtype=np.int64)[kept]
        total += int(sizes.sum())
        if total * fraction >= 4 * HELDOUT_TOKENS:  # chance will hardly leave a quarter of what is expected
            return limit
        # Only the lowest hashes matter.
        hashes, group = np.unique(np.append(hashes, found[kept, 0]), return_inverse=True)
        tokens = np.bincount(group, np.append(tokens, sizes)).astype(np.int64)
        most = int(np.searchsorted(np.cumsum(tokens), 2 * HELDOUT_TOKENS)) + 1
        hashes, tokens = hashes[:most], tokens[:most]
    heldout = 0
    for value, size in zip(hashes.tolist(), tokens.tolist()):
        if value >= limit:
            most = total // 10 if heldout else total // 2
            if heldout >= min(HELDOUT_TOKENS, total // 10) or heldout + size > most:
                break
            limit = value + 1
        heldout += size
    return min(limit, 2**64 - 1)


def copy_table(base: Manifest, name: str, target: Path) -> int:
    """Copy a corpus's table of hashes or signatures; returns its bytes.

    Raises:
        DataError: it is missing or damaged.
    """
    entry = next(entry for entry in base.contents["duplicate_tables"] if entry["table"] == name)
    source = base.directory / entry["name"]
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise DataError(f"{source}: listed in the manifest, but missing; {AGAIN}") from error
    if file_sha256(target) != entry["sha256"]:
        raise DataError(f"{source}: its bytes do not have the manifest's checksum; {AGAIN}")
    return int(entry["bytes"])


def assemble(
    chunks: list[Path],
    dropped: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    out: Path,
    base: Manifest | None,
    options: dict[str, Any],
    files: list[dict[str, Any]],
    check: Callable[[], None],
) -> Manifest:
    """Chunk files, in order -> shards and manifest.

    Args:
        dropped: what `find_duplicates` found; the tables it left in out/work are kept.
        base: the corpus in `out` that is appended to.
        options: prepare's, for the manifest; heldout_fraction and shard_tokens are obeyed.
        files: all inputs, with what tells whether they changed, for the manifest.
        check: called between chunks; it raises to stop.
    Raises:
        DataError: a damaged chunk. NoDocumentError: no document at all.
    """
    found: dict[str, Counter[str]] = {"counts": Counter(), "problems": Counter()}
    for part, counter in found.items():
        counter.update(base.contents["report"][part] if base else {})
    examples: Examples = {}
    if base:
        _add_examples(examples, base.contents["report"]["examples"])
    found["counts"].update({step: int(flags.sum()) for step, flags in dropped.items()})
    # Documents that were appended are held out by the rule of the first ones.
    if base:
        limit = int(base.contents["heldout_limit"])
    else:
        limit = find_heldout_limit(chunks, dropped, options["heldout_fraction"], check)
    dtype = token_dtype(vocabulary_size(tokenizer))
    sha256 = tokenizer_hash(tokenizer)
    first = 0
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(out, split, dtype, sha256, options["shard_tokens"])) for split in SPLITS
        ]
        for writer in writers:  # new shards are numbered on from the old ones
            writer.files += (
                [entry for entry in base.contents["shards"] if entry["split"] == writer.split] if base else []
            )
        for path in chunks:
            check()
            tokens, sentence_lengths, document_sentences, hashes, report = load_chunk(
                path, "tokens", "sentence_lengths", "document_sentences", "hashes", "report"
            )
            chunk_report = json.loads(report.tobytes())
            _add_examples(examples, chunk_report.pop("examples"))
            for part, counts in chunk_report.items():
                found[part].update(counts)
            kept = np.ones(len(hashes), dtype=bool)
            for step, flags in dropped.items():
                goes = flags[first : first + len(hashes)]
                kept &= ~goes
                for document in np.flatnonzero(goes)[: MAX_EXAMPLES - len(examples.get(step, []))]:
                    is_its = np.repeat(np.arange(len(hashes)) == document, document_sentences)
                    text = tokenizer.decode(tokens[np.repeat(is_its, sentence_lengths)][:-1].tolist())
                    add_example(examples, step, "", text)
            first += len(hashes)
            is_heldout = hashes[:, 0] < np.uint64(limit)
            for writer, chosen in zip(writers, (kept & ~is_heldout, kept & is_heldout)):
                sentences = np.repeat(chosen, document_sentences)
                writer.append(
                    tokens[np.repeat(sentences, sentence_lengths)],
                    sentence_lengths[sentences],
                    document_sentences[chosen],
                )
    shards = [entry for writer in writers for entry in writer.files]
    if not shards:
        raise NoDocumentError(_explain_nothing(found["counts"], found["problems"], options["inputs"]))
    if base:  # whose files stay as they are until the manifest is replaced
        tokenizer_files = base.contents["tokenizer_files"]
    else:
        tokenizer_files = [_list_file(out / name) for name in save_tokenizer(tokenizer, out)]
    contents = {
        "tokenizer_sha256": sha256,
        "vocab_size": vocabulary_size(tokenizer),
        "special_token_ids": {f"{n}_token_id": i for n, i in special_token_ids(tokenizer)._asdict().items()},
        "shards": shards,
        "tokenizer_files": tokenizer_files,
        "duplicate_tables": _keep_tables(out, base),
        "heldout_limit": limit,
        "report": {**found, "examples": examples},
        "options": options,
        "files": files,
    }
    write_manifest(out, contents)
    for entry in base.contents["duplicate_tables"] if base else []:
        (out / entry["name"]).unlink(missing_ok=True)
    return load_manifest(out)


def _keep_tables(out: Path, base: Manifest | None) -> list[dict[str, Any]]:
    """Move the tables from out/work beside the shards, under names that the corpus before does not use."""
    old = {entry["name"] for entry in base.contents["duplicate_tables"]} if base else set()
    entries = []
    for name in ("hashes", "signatures"):
        table = out / "work" / f"{name}.bin"
        if table.exists():
            place = next(place for n in (0, 1) if (place := out / f"{name}-{n:05d}.bin").name not in old)
            os.replace(table, place)
            entries.append({"table": name, **_list_file(place)})
    return entries


def _add_examples(examples: Examples, more: Examples) -> None:
    for reason, found in more.items():
        for detail, text in found:
            add_example(examples, reason, detail, text)


def _list_file(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _explain_nothing(counts: Counter[str], problems: Counter[str], inputs: list[str]) -> str:
    left_out = [f"{counts[step]:,} {step.replace('_', ' ')}" for step in LEFT_OUT if counts[step]]
    repaired = [f"{count:,} {kind}" for kind, count in sorted(problems.items())]
    reasons = f"left out: {', '.join(left_out)}; " if left_out else ""
    reasons += f"repaired or left out: {', '.join(repaired)}; " if repaired else ""
    return (
        f"{', '.join(inputs)}: no document is left; {reasons}give {'other' if repaired else 'more'} text, or clean less"
    )
