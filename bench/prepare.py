"""Text to tokens from start to finish: `fastroberta.prepare` and the tools that others use for it.

    python -m bench prepare wiki/*.jsonl.zst --tokenizer roberta-base/ --sizes 100 200 400

Peers read the same JSON lines with the same tokenizer in the same number of processes:

    transformers    its run_mlm example: datasets.map with return_special_tokens_mask, then joined and cut into blocks of 512
    datatrove       JsonlReader and DocumentTokenizer, unshuffled; each process gets a file of its own, because it shares out
                    whole files
    tokenizers      encode_batch_fast alone, with that many threads; nothing is written

Runs take turns, each in processes of its own. Our time is that of the whole process, start included; a peer's begins
after its imports, which favours it. Besides the time on the clock there is processor time, which other work on the machine
disturbs less. `--sizes` prepares corpora of these sizes and reports the memory of all processes together.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OURS = "fastroberta.prepare"
START = """
import json, os, sys, time
files, tokenizer_directory, processes = sys.argv[4:], sys.argv[2], int(sys.argv[3])
def report(seconds, tokens):
    print(json.dumps({"seconds": seconds, "tokens": tokens}))
"""
PEERS = {
    "transformers": START
    + """
import itertools
import datasets, transformers
if __name__ == "__main__":
    datasets.disable_progress_bars()
    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)

    def tokenize(batch):
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    def group(batch):
        joined = {name: list(itertools.chain.from_iterable(lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // 512 * 512
        return {name: [flat[at : at + 512] for at in range(0, end, 512)] for name, flat in joined.items()}

    data = datasets.load_dataset("json", data_files=files, split="train")
    data = data.map(tokenize, batched=True, num_proc=processes, remove_columns=data.column_names)
    data = data.map(group, batched=True, num_proc=processes)
    report(time.perf_counter() - start, len(data) * 512)
""",
    "datatrove": START
    + """
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    start = time.perf_counter()
    out = os.path.join(sys.argv[1], "out")
    tokenizer = os.path.join(tokenizer_directory, "tokenizer.json")
    LocalPipelineExecutor(
        [JsonlReader(os.path.dirname(files[0]), glob_pattern="part-*.jsonl"),
         DocumentTokenizer(out, tokenizer, eos_token="</s>", shuffle_documents=False)],
        tasks=len(files), workers=processes, start_method="spawn", logging_dir=os.path.join(sys.argv[1], "logs"),
    ).run()
    seconds = time.perf_counter() - start
    sizes = [os.path.getsize(os.path.join(out, name)) for name in os.listdir(out) if name.endswith(".ds")]
    report(seconds, sum(sizes) // 2)
""",
    "tokenizers": START
    + """
import itertools
os.environ["RAYON_NUM_THREADS"] = str(processes)
import tokenizers
if __name__ == "__main__":
    start = time.perf_counter()
    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(tokenizer_directory, "tokenizer.json"))
    texts = (json.loads(line)["text"] for file in files for line in open(file, encoding="utf-8"))
    tokens = 0
    while batch := list(itertools.islice(texts, 1000)):
        tokens += sum(len(one.ids) for one in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
    report(time.perf_counter() - start, tokens)
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="*", help="text as prepare takes it; without: the texts inside Python")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json; without: one trained on the text")
    parser.add_argument("--megabytes", type=int, default=50, help="of text, taken from the start (default 50)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="megabytes to measure memory at; text repeats")
    parser.add_argument("--output", help="file to which a line of JSON is added")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
        result["memory"] = [measure_memory(arguments, megabytes, Path(folder)) for megabytes in arguments.sizes]
    print_result(result)
    line = json.dumps(result)
    if arguments.output:
        with open(arguments.output, "a") as file:
            file.write(line + "\n")
    else:
        print(line)
    return 0


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everybody in turn."""
    files = [folder / f"part-{number}.jsonl" for number in range(arguments.workers)]
    text_bytes = write_text(arguments.inputs, files, arguments.megabytes * 10**6)
    if arguments.tokenizer is None:
        run_ours(files, ["--train-tokenizer", "8192"], 1, folder / "training")
        arguments.tokenizer = str(folder / "training")
    runs: dict[str, list[dict[str, float]]] = {OURS: []}
    absent: dict[str, str] = {}
    for repeat in range(arguments.repeats):
        ours = run_ours(files, ["--tokenizer", arguments.tokenizer], arguments.workers, folder / f"ours-{repeat}")
        runs[OURS].append(ours)
        for peer in PEERS:
            if peer in absent:
                continue
            try:
                theirs = run_peer(peer, files, arguments.tokenizer, arguments.workers, folder / f"{peer}-{repeat}")
            except subprocess.CalledProcessError as error:
                absent[peer] = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
                continue
            runs.setdefault(peer, []).append(theirs)
            ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
            print(f"round {repeat + 1}: {ratio:.2f} times {peer}", file=sys.stderr)
    result: dict[str, Any] = {
        "benchmark": "prepare",
        "megabytes": text_bytes / 1e6,
        "workers": arguments.workers,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "runs": runs,
        "absent": absent,
        "reader_megabytes_per_second": measure_reader(files),
    }
    for measure in ("tokens_per_second", "tokens_per_cpu_second"):
        ratios = {
            peer: statistics.median(ours[measure] / theirs[measure] for ours, theirs in zip(runs[OURS], runs[peer]))
            for peer in PEERS
            if peer in runs
        }
        result[f"{measure}_ratios"] = ratios
        result[f"{measure}_ratio"] = ratios.get("transformers")
    tokens, seconds = runs[OURS][0]["tokens"], statistics.median(run["seconds"] for run in runs[OURS])
    result["terabyte"] = {
        "hours": 1e12 / text_bytes * seconds / 3600,
        "shard_gigabytes": 1e12 / text_bytes * tokens * 2 / 1e9,
    }
    return result


def print_result(result: dict[str, Any]) -> None:
    runs = result["runs"]
    for measure in ("tokens_per_second", "tokens_per_cpu_second"):
        print(
            f"\n{measure} on {result['megabytes']:.0f} MB in {result['workers']} processes: median (lowest to highest), "
            "and how many times as fast we are"
        )
        for name, kind in runs.items():
            rates = [run[measure] for run in kind]
            ratio = result[f"{measure}_ratios"].get(name)
            print(
                f"  {name:<20} {statistics.median(rates):>11,.0f}  ({min(rates):,.0f} to {max(rates):,.0f})"
                + (f"  {ratio:.2f}" if ratio else "")
            )
    for name, reason in result["absent"].items():
        print(f"  {name:<20} absent: {reason}")
    if result["memory"]:
        print("\ntext, and the most memory that all processes of prepare held together")
        for line in result["memory"]:
            print(f"  {line['megabytes']:>5.0f} MB  {line['peak_megabytes']:>5.0f} MB in {line['seconds']:.0f} s")
    terabyte, reader = result["terabyte"], result["reader_megabytes_per_second"]
    print(
        f"\n1 TB of text at this rate: {terabyte['hours']:,.0f} hours with {result['workers']} processes, "
        f"{terabyte['shard_gigabytes']:,.0f} GB of shards and twice that while it runs\n"
        f"the reader, which feeds all workers of a cluster: {reader:,.0f} MB/s of JSON lines, 1 TB in "
        f"{1e6 / reader / 3600:.1f} hours"
    )


def write_text(inputs: Sequence[str], files: Sequence[Path], limit: int, *, repeat: bool = False) -> int:
    """Write documents as JSON lines, to the files in turn, until `limit` bytes of text; returns the bytes of text.

    Args:
        repeat: start again when the text ends.
    """
    from fastroberta.corpus.problems import Problems
    from fastroberta.corpus.python_texts import python_texts
    from fastroberta.corpus.read import read_chunks, read_documents
    from fastroberta.corpus.sources import find_files

    def documents() -> Iterator[str]:
        if not inputs:
            yield from (text for _, text in python_texts())
        options = {"txt_documents": "blank-line", "text_field": "text"}
        for file in find_files(inputs, "auto") if inputs else []:
            for chunk in read_chunks(file, 0, policy="skip", **options):
                yield from read_documents(chunk, problems=Problems("skip"), **options)

    rounds = itertools.count() if repeat else [0]
    size = 0
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in files]
        for number, text in enumerate(itertools.chain.from_iterable(documents() for _ in rounds)):
            outputs[number % len(outputs)].write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= limit:
                break
    return size


def run_ours(files: Sequence[Path], options: list[str], workers: int, out: Path) -> dict[str, float]:
    from fastroberta.corpus.manifest import load_manifest

    command = ["-m", "fastroberta.prepare", *map(str, files), "--out", str(out), "--workers", str(workers), *options]
    seconds, cpu_seconds, _ = measure(command, {})
    manifest = load_manifest(out)
    return rates(manifest.count("train", "tokens") + manifest.count("heldout", "tokens"), seconds, cpu_seconds)


def run_peer(peer: str, files: Sequence[Path], tokenizer: str, workers: int, folder: Path) -> dict[str, float]:
    """Raises CalledProcessError where the peer cannot run, with the reason in its stderr."""
    folder.mkdir()
    program = folder / "peer.py"
    program.write_text(PEERS[peer])
    environment = {"HF_HOME": str(folder), "HF_DATASETS_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    _, cpu_seconds, output = measure([*map(str, (program, folder, tokenizer, workers, *files))], environment)
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
    """Run Python with these arguments: seconds on the clock, processor seconds of all its processes, its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu_seconds, done.stdout


def measure_reader(files: Sequence[Path]) -> float:
    """Megabytes a second that are read and cut into chunks, by one process."""
    from fastroberta.corpus.read import read_chunks
    from fastroberta.corpus.sources import find_files

    start, size = time.perf_counter(), 0
    for file in find_files(map(str, files), "auto"):
        for chunk in read_chunks(file, 0, txt_documents="blank-line", text_field="text", policy="error"):
            size += chunk.size()
    return size / 1e6 / (time.perf_counter() - start)


def measure_memory(arguments: argparse.Namespace, megabytes: int, folder: Path) -> dict[str, float]:
    """Prepare that much text, removing exact duplicates, and watch the memory of all its processes together."""
    source, out = folder / "text.jsonl", folder / f"memory-{megabytes}"
    size = write_text(arguments.inputs, [source], megabytes * 10**6, repeat=True)
    command = [sys.executable, "-m", "fastroberta.prepare", str(source), "--out", str(out), "--exact-duplicates"]
    command += ["--tokenizer", arguments.tokenizer, "--workers", str(arguments.workers)]
    start, peak = time.perf_counter(), 0
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    while program.poll() is None:
        peak = max(peak, sum_memory(program.pid))
        time.sleep(0.05)
    if program.returncode:
        raise subprocess.CalledProcessError(program.returncode, command, stderr=program.communicate()[1])
    return {"megabytes": size / 1e6, "peak_megabytes": peak / 1e6, "seconds": time.perf_counter() - start}


def sum_memory(session: int) -> int:
    """Bytes resident in the processes of a session. Pages that several share are counted in each."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


if __name__ == "__main__":
    sys.exit(main())
