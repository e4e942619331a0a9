"""Text to tokens, from start to finish: `fastroberta.prepare` and what transformers' run_mlm example does.

The peer reads JSON lines with datasets, tokenizes them in batches with return_special_tokens_mask, and joins and cuts
the lists into blocks of 512, each by `map` over the same number of processes. Runs alternate, each in a process of its
own. Our time is that of the whole process; the peer's begins after its imports, which favours it. Besides the time on
the clock there is the processors' time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEER = """
import itertools, json, sys, time
import datasets, transformers
source, tokenizer_directory, processes, block_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), 512
if __name__ == "__main__":
    datasets.disable_progress_bars()
    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)

    def tokenize(batch):
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    def group(batch):
        joined = {name: list(itertools.chain.from_iterable(lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // block_size * block_size
        return {name: [flat[at : at + block_size] for at in range(0, end, block_size)] for name, flat in joined.items()}

    data = datasets.load_dataset("json", data_files=source, split="train")
    data = data.map(tokenize, batched=True, num_proc=processes, remove_columns=data.column_names)
    data = data.map(group, batched=True, num_proc=processes)
    print(json.dumps({"seconds": time.perf_counter() - start, "tokens": len(data) * block_size}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench prepare", description=__doc__)
    parser.add_argument("inputs", nargs="*", help="text as prepare takes it; without: the texts inside Python")
    parser.add_argument("--tokenizer", help="directory of a tokenizer; without: one trained on the text")
    parser.add_argument("--megabytes", type=int, default=50, help="of text, taken from the start (default 50)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--output", help="file to which a line of JSON is added")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = Path(folder, "text.jsonl"), arguments.tokenizer
        megabytes = write_text(arguments.inputs, source, arguments.megabytes * 10**6) / 1e6
        if tokenizer is None:
            run_ours(source, ["--train-tokenizer", "8192"], 1, Path(folder, "training"))
            tokenizer = str(Path(folder, "training"))
        runs: dict[str, list[dict[str, float]]] = {"fastroberta.prepare": [], "datasets.map as run_mlm": []}
        for repeat in range(arguments.repeats):
            ours = run_ours(source, ["--tokenizer", tokenizer], arguments.workers, Path(folder, f"ours-{repeat}"))
            runs["fastroberta.prepare"].append(ours)
            theirs = run_peer(source, tokenizer, arguments.workers, Path(folder, f"theirs-{repeat}"))
            runs["datasets.map as run_mlm"].append(theirs)
            print(f"pair {repeat + 1}: {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}x", file=sys.stderr)
    result: dict[str, Any] = {
        "benchmark": "prepare",
        "megabytes": megabytes,
        "workers": arguments.workers,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "runs": runs,
    }
    for measure in ("tokens_per_second", "tokens_per_cpu_second"):
        ours_of, theirs_of = ([run[measure] for run in kind] for kind in runs.values())
        ratios = [a / b for a, b in zip(ours_of, theirs_of)]
        result[f"{measure}_ratio"] = statistics.median(ratios)
        print(f"\n{measure} on {megabytes:.0f} MB, {arguments.workers} processes (median, lowest to highest)")
        for name, kind in runs.items():
            rates = [run[measure] for run in kind]
            print(f"  {name:<24} {statistics.median(rates):>12,.0f}  {min(rates):,.0f} to {max(rates):,.0f}")
        print(f"  {'ratio':<24} {statistics.median(ratios):>12.2f}  {min(ratios):.2f} to {max(ratios):.2f}")
    line = json.dumps(result)
    if arguments.output:
        with open(arguments.output, "a") as file:
            file.write(line + "\n")
    else:
        print(line)
    return 0


def write_text(inputs: Sequence[str], path: Path, limit: int) -> int:
    """Write documents as JSON lines until `limit` bytes of text are reached; returns the bytes of text."""
    from fastroberta.corpus.problems import Problems
    from fastroberta.corpus.python_texts import python_texts
    from fastroberta.corpus.read import read_chunks, read_documents
    from fastroberta.corpus.sources import find_files

    def documents():
        if not inputs:
            yield from (text for _, text in python_texts())
        options = {"txt_documents": "blank-line", "text_field": "text"}
        for file in find_files(inputs, "auto") if inputs else []:
            for chunk in read_chunks(file, 0, policy="skip", **options):
                yield from read_documents(chunk, problems=Problems("skip"), **options)

    size = 0
    with open(path, "w", encoding="utf-8") as output:
        for text in documents():
            output.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= limit:
                break
    return size


def run_ours(source: Path, options: list[str], workers: int, out: Path) -> dict[str, float]:
    from fastroberta.corpus.shards import load_manifest

    command = ["-m", "fastroberta.prepare", str(source), "--out", str(out), "--workers", str(workers), *options]
    seconds, cpu_seconds, _ = measure(command, {})
    manifest = load_manifest(out)
    tokens = manifest.count("train", "tokens") + manifest.count("heldout", "tokens")
    return rates(tokens, seconds, cpu_seconds)


def run_peer(source: Path, tokenizer: str, workers: int, cache: Path) -> dict[str, float]:
    cache.mkdir()
    program = cache / "peer.py"
    program.write_text(PEER)
    environment = {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    _, cpu_seconds, output = measure([str(program), str(source), tokenizer, str(workers)], environment)
    result = json.loads(output.splitlines()[-1])
    return rates(result["tokens"], result["seconds"], cpu_seconds)


def rates(tokens: float, seconds: float, cpu_seconds: float) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
    }


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Run Python with these arguments: seconds on the clock, seconds of all its processes, what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu_seconds, done.stdout


if __name__ == "__main__":
    sys.exit(main())
