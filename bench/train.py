"""Whole training steps and their parts: our trainer against transformers' model, collator and fused AdamW.

Every way trains in a process of its own. Ours and one or two others take turns, A B C A B C, and ratios are taken
within a turn. Each is first compared with a model in fp64 (loss and gradient norm of one sequence without dropout),
and the mean training losses of all ways must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fastroberta_kernels.masking import mask_tokens

from fastroberta.config import ModelConfig
from fastroberta.corpus.python_texts import write_python_texts
from fastroberta.costs import model_flops_per_step, peak_flops
from fastroberta.data import training_batches

from .case import SIZES
from .measure import choose_dtype, measure_ceilings, spread
from .record import Run, default_path
from .trainers import EXACT, MLM_PROBABILITY, SEED, WAYS, Data, Failure, Task, Worker, load_batches

ROOT = Path(__file__).parents[1]
OURS = "fastroberta"
# Bounds of the relative error against fp64; bf16 has a unit of 0.4%, and rounding errors average out in both.
MAX_LOSS_ERROR, MAX_NORM_ERROR = 2e-3, 2e-2
MAX_LOSS_DEVIATION = 0.03  # of the mean training loss, from the median of all ways: dropout and masks are drawn apart
PARTS = ("compare", "data", "growth")
TOKENIZER_SIZE = 8192


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench train", description=__doc__)
    parser.add_argument("--data", help="directory written by fastroberta.prepare; without: the texts inside Python")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part only (may be repeated)")
    parser.add_argument(
        "--model", choices=SIZES, action="append", help="may be repeated; default: base, and large on a GPU"
    )
    parser.add_argument(
        "--way", choices=WAYS, action="append", help="compare our trainer with this one (may be repeated)"
    )
    parser.add_argument("--sequences", type=int, help="sequences per step; default: 4 on a CPU, 64 on a GPU")
    parser.add_argument("--rounds", type=int, help="number of turns; default: 9, or 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="compare fewer trainers, in fewer turns")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add to")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after so many seconds")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = choose_dtype(device)
    end = time.monotonic() + arguments.seconds
    run = Run("train", arguments.out or default_path(device), device, {"data": arguments.data or "python texts"})
    ceilings = run.add("ceilings", dtype=str(dtype), **measure_ceilings(device, dtype))
    if on_gpu:
        torch.cuda.empty_cache()
    data = arguments.data or prepare_python_texts()
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    wanted = arguments.only or PARTS
    ours_is_right = True
    if "compare" in wanted:
        for model in arguments.model or (["base", "large"] if on_gpu and not arguments.quick else ["base"]):
            if time.monotonic() > end:
                print(f"{model}: not measured: the time is up")
                continue
            task = make_task(data, model, device, dtype, sequences=arguments.sequences)
            names = [OURS, *(arguments.way or choose_ways(quick=arguments.quick, on_gpu=on_gpu))]
            # The other parts need half a minute on a GPU and two on a CPU.
            rest = 0 if wanted == ["compare"] else 30 if on_gpu else 110
            lines = compare(task, list(dict.fromkeys(names)), rounds, on_gpu, ceilings, end - rest)
            if not arguments.way:
                reason = "left out by --quick; --way measures it"
                lines += [{"implementation": n, "status": "skipped", "reason": reason} for n in WAYS if n not in names]
            for line in lines:
                run.add("train", model=model, task=task._asdict() | {"data": Path(task.data).name}, **line)
                ours_is_right &= line["implementation"] != OURS or line["status"] == "ok"
            print_comparison(f"roberta-{model}", task, lines)
    if "data" in wanted:
        measure_data(run, make_task(data, "base", device, dtype, sequences=arguments.sequences))
    if "growth" in wanted:
        measure_growth(run, data, device, dtype, quick=arguments.quick, end=end)
    print(f"results: {run.path}")
    return int(not ours_is_right)


def prepare_python_texts() -> str:
    """The texts inside Python, tokenized with a tokenizer trained on them, and kept for the next run.

    Two megabytes of text are too little for a vocabulary of roberta-base's size. The model's word table and head still
    have that size, so the work is the same.
    """
    directory = ROOT / "data" / f"python-texts-{TOKENIZER_SIZE}"
    if not (directory / "manifest.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "texts.jsonl")
            write_python_texts(source)
            command = [sys.executable, "-m", "fastroberta.prepare", str(source), "--out", str(directory)]
            subprocess.run([*command, "--train-tokenizer", str(TOKENIZER_SIZE)], check=True, stdout=subprocess.DEVNULL)
    return str(directory)


def make_task(
    data: str,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sequences: int | None = None,
    layers: int | None = None,
    length: int = 512,
) -> Task:
    size = SIZES[model]
    default = {"base": 64, "large": 32}[model] if device.type == "cuda" else 4
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return Task(
        data, layers or size.layers, size.hidden, size.heads, size.intermediate, length, sequences or default, precision
    )


def choose_ways(*, quick: bool, on_gpu: bool) -> list[str]:
    """All of them; with `quick`, those known to be slower here than another of their kind are left out."""
    if not quick:
        return list(WAYS)
    if on_gpu:
        return ["fastroberta", "transformers sdpa", "transformers sdpa, torch.compile", "transformers, our kernels"]
    kept = "transformers eager, memory kept"
    return ["fastroberta", "transformers eager", kept, "transformers, our kernels", "transformers sdpa"]


def compare(
    task: Task, names: Sequence[str], rounds: int, on_gpu: bool, ceilings: dict[str, Any], end: float
) -> list[dict[str, Any]]:
    """Measure the ways that `names` lists; returns a result line for each."""
    lines: dict[str, dict[str, Any]] = {name: {"implementation": name, "status": "ok"} for name in names}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {}
    steps, part_rounds = (10, 3) if on_gpu else (1, 1)
    reference = Worker(EXACT)
    reference.tell("build", task)
    reference.tell("check")
    exact = None if on_gpu else finish_reference(reference)  # a GPU has room for the other ways meanwhile
    for group in divide(names, on_gpu):
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in group}
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            if time.monotonic() > end:
                for name in group:
                    if not results[name]:
                        lines[name] |= {"status": "skipped", "reason": "the time is up"}
                continue
            # Building and compiling keep a core busy: one at a time on a CPU, all at once where a GPU trains.
            for wave in [group] if on_gpu else [[name] for name in group]:
                begun = time.monotonic()
                ready = {name: stack.enter_context(Worker(name)) for name in wave}
                for command, argument in (("build", task), ("check", None), ("steps", 3 if on_gpu else 1)):
                    for worker in ready.values():
                        worker.tell(command, argument)
                    for name, worker in list(ready.items()):
                        try:
                            answer = worker.hear(end)
                            if command == "check":
                                exact = exact or finish_reference(reference)
                                lines[name] |= judge(answer, exact)
                        except Failure as failure:
                            lines[name] |= explain(failure)
                        if lines[name]["status"] != "ok":
                            del ready[name]
                workers |= ready
                print(f"  {', '.join(wave)}: ready after {time.monotonic() - begun:.0f} s", file=sys.stderr)
            for command, count, store in (("steps", rounds, turns), ("parts", part_rounds, parts)):
                for turn in range(count):
                    if (turn or command == "parts") and time.monotonic() > end:
                        break
                    for name, worker in list(workers.items()):
                        try:
                            store[name].append(worker.ask(command, steps))
                        except Failure as failure:
                            lines[name] |= explain(failure)
                            del workers[name]
        for name in group:
            results[name] += turns[name]
            if pairs := list(zip(turns[name], turns[OURS])):
                ratios[name] = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
    measured = {name: result for name, result in results.items() if result and lines[name]["status"] == "ok"}
    losses = {name: statistics.mean(turn["loss"] for turn in result) for name, result in measured.items()}
    for name, result in measured.items():
        lines[name] |= summarize(task, result, parts[name], ceilings)
        lines[name]["mean_loss"] = losses[name]
        deviation = losses[name] / statistics.median(losses.values()) - 1
        if abs(deviation) > MAX_LOSS_DEVIATION:
            lines[name] |= {"status": "wrong", "reason": f"mean training loss is off by {deviation:.1%}"}
        if OURS in measured and name in ratios:
            lines[name]["ratio"] = spread(ratios[name])._asdict()
    return list(lines.values())


def finish_reference(worker: Worker) -> dict[str, float]:
    """Loss and gradient norm of the model in fp64; its worker then ends."""
    with worker:
        try:
            worker.hear()
            return worker.hear()
        except Failure as failure:
            raise RuntimeError(f"the exact result cannot be computed: {failure}") from failure


def divide(names: Sequence[str], on_gpu: bool) -> list[list[str]]:
    """Groups that are measured together: ours and two others, because four trainers of roberta-base do not fit into
    24 GB. On a GPU of less than 100 GB ours and one other: transformers takes some 40 GB for the logits of all tokens."""
    small = on_gpu and torch.cuda.get_device_properties(0).total_memory < 100e9
    others, count = [name for name in names if name != OURS], 1 if small else 2
    return [[OURS, *others[first : first + count]] for first in range(0, len(others), count)] or [[OURS]]


def judge(found: dict[str, float], exact: dict[str, float]) -> dict[str, Any]:
    """The relative errors of loss and gradient norm, and the status "wrong" if they are too large."""
    error = {name: abs(found[name] / exact[name] - 1) for name in exact}
    bounds = {"loss": MAX_LOSS_ERROR, "gradient_norm": MAX_NORM_ERROR}
    bad = [name for name in exact if not error[name] <= bounds[name]]
    wrong = [f"{name} {found[name]:.5f}, exactly {exact[name]:.5f}" for name in bad]
    return {"error": error} | ({"status": "wrong", "reason": "; ".join(wrong)} if wrong else {})


def explain(failure: Failure) -> dict[str, Any]:
    first, _, rest = str(failure).partition("\n")
    if rest:
        print(rest, file=sys.stderr)
    return {"status": failure.status, "reason": first}


def summarize(
    task: Task, result: Sequence[dict[str, float]], parts: Sequence[dict[str, float]], ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Tokens/s, MFU, memory, energy and the parts of a step."""
    model = ModelConfig(
        vocab_size=task.vocabulary, hidden_size=task.hidden, num_hidden_layers=task.layers, num_attention_heads=task.heads,
        intermediate_size=task.intermediate,
    )  # fmt: skip
    tokens = task.sequences * task.length
    rates = spread([tokens * turn["steps"] / turn["seconds"] for turn in result])
    flops = model_flops_per_step(model, tokens, int(tokens * MLM_PROBABILITY), tokens * task.length)
    flops_per_second = flops / tokens * rates.median
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    summary: dict[str, Any] = {
        "tokens_per_second": rates._asdict(),
        "seconds_per_step": spread([turn["seconds"] / turn["steps"] for turn in result])._asdict(),
        "host_seconds_per_step": statistics.median(turn["host_seconds"] / turn["steps"] for turn in result),
        "model_flops_per_token": flops / tokens,
        "mfu": flops_per_second / peak if peak else None,
        "share_of_matmul": flops_per_second / ceilings["matmul_flops_per_second"],
        "peak_bytes": max(turn["peak_bytes"] for turn in result),
        "parts": {name: statistics.median(part[name] for part in parts) for name in (parts[0] if parts else ())},
    }
    for name in ("gpu/joules_per_token", "gpu/power_watts", "gpu/sm_clock_mhz", "gpu/throttled"):
        values = [turn[name] for turn in result if name in turn]
        if values:
            summary[name] = statistics.median(values)
    return summary


def print_comparison(title: str, task: Task, lines: Sequence[dict[str, Any]]) -> None:
    print(
        f"\n{title}, {task.sequences} x {task.length} tokens a step, {task.layers} layers, dropout {task.dropout}, "
        f"{task.precision}, AdamW"
    )
    print(
        f"  {'':34} {'loss err.':>9} {'norm err.':>9} {'mean loss':>9} {'tokens/s':>9} {'quartiles':>19} {'MFU':>6} "
        f"{'of matmul':>9} {'peak GB':>8} {'uJ/token':>8} {'time over ours':>20}"
    )
    for line in lines:
        error = line.get("error", {})
        errors = " ".join(f"{error[name]:9.1e}" if name in error else " " * 9 for name in ("loss", "gradient_norm"))
        if "tokens_per_second" not in line:
            print(f"  {line['implementation']:34} {errors} {line['status']}: {line.get('reason', '')}")
            continue
        rate = line["tokens_per_second"]
        mfu = "" if line["mfu"] is None else f"{line['mfu']:.1%}"
        joules = f"{line['gpu/joules_per_token'] * 1e6:.0f}" if "gpu/joules_per_token" in line else ""
        ratio = line.get("ratio")
        over = f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
        print(
            f"  {line['implementation']:34} {errors} {line['mean_loss']:9.3f} {rate['median']:9,.0f} "
            f"{rate['low']:9,.0f}-{rate['high']:9,.0f} {mfu:>6} {line['share_of_matmul']:9.0%} "
            f"{line['peak_bytes'] / 1e9:8.2f} {joules:>8} {over:>20}"
            + (f"  {line['status']}: {line['reason']}" if line["status"] != "ok" else "")
        )
    for line in lines:
        if line.get("parts"):
            whole = sum(line["parts"].values())
            parts = (f"{name} {part * 1e3:,.1f} ms ({part / whole:.0%})" for name, part in line["parts"].items())
            print(f"  {line['implementation']}: {', '.join(parts)}")


def measure_data(run: Run, task: Task) -> None:
    """The rate of reading and masking batches on the CPU, with no training beside it."""
    steps = max(8, 512 // task.sequences)
    rates: dict[str, list[float]] = {}
    data = Data(task)
    batches = training_batches(data.blocks, range(0, 10**9, task.sequences), task.sequences, seed=SEED)

    def ours() -> None:
        batch = next(batches)
        mask_tokens(batch.input_ids, seed=SEED, sample_ids=batch.sample_ids, **data.masking)

    works = {OURS: ours}
    with contextlib.suppress(ImportError):
        loader = load_batches(data, task, workers=0)
        works["transformers' collator"] = lambda: next(loader)
    for _ in range(5):
        for name, work in works.items():
            started = time.perf_counter()
            for _ in range(steps):
                work()
            rate = steps * task.sequences * task.length / (time.perf_counter() - started)
            rates.setdefault(name, []).append(rate)
    print(f"\ndata alone: reading and masking {task.sequences} x {task.length} tokens, on the CPU")
    for name, values in rates.items():
        rate = spread(values)
        sizes = {"sequences": task.sequences, "length": task.length}
        run.add("data", implementation=name, **sizes, tokens_per_second=rate._asdict())
        print(f"  {name:34} {rate.median:14,.0f} tokens/s  ({rate.low:,.0f} to {rate.high:,.0f})")


def list_growth(device: torch.device, quick: bool) -> Iterator[tuple[str, dict[str, int]]]:
    """What grows, and the sizes at each point. Where the length grows, the tokens of a step stay the same."""
    on_gpu = device.type == "cuda"
    tokens = 32768 if on_gpu else 1024
    layers = 12 if on_gpu else 2
    for length in (128, 256, 512, 1024, 2048) if on_gpu else (64, 128, 256, 512):
        yield "length", {"length": length, "sequences": tokens // length, "layers": layers}
    for sequences in (8, 16, 32, 64, 128) if on_gpu else (1, 2, 4) if quick else (1, 2, 4, 8):
        yield "sequences", {"length": 512 if on_gpu else 256, "sequences": sequences, "layers": layers}
    for count in (3, 6, 12, 24) if on_gpu else (1, 2, 4):
        yield "layers", {"length": 512 if on_gpu else 256, "sequences": 64 if on_gpu else 4, "layers": count}


def measure_growth(run: Run, data: str, device: torch.device, dtype: torch.dtype, *, quick: bool, end: float) -> None:
    """Time of a step against sequence length, sequences and layers, ours and transformers' in turn."""
    on_gpu = device.type == "cuda"
    names = (OURS, "transformers sdpa" if on_gpu else "transformers eager")
    print(f"\nhow a step's time grows, in ms ({', '.join(names)})")
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name)) for name in names}
        for grows, sizes in list_growth(device, quick):
            if time.monotonic() > end:
                print("  the rest is not measured: the time is up")
                break
            task = make_task(data, "base", device, dtype, **sizes)
            seconds: dict[str, list[float]] = {name: [] for name in names}
            failed: dict[str, Failure] = {}
            peaks: dict[str, float] = {}
            for turn in range(-1, 3):
                for name, worker in workers.items():
                    if name in failed:
                        continue
                    try:
                        if turn < 0:
                            worker.ask("build", task)
                        result = worker.ask("steps", 5 if on_gpu else 1)
                        if turn >= 0:
                            seconds[name].append(result["seconds"] / result["steps"])
                        else:
                            peaks[name] = result["peak_bytes"]
                            seconds[name] = []
                    except Failure as failure:
                        failed[name] = failure
            shown = []
            for name in names:
                line: dict[str, Any] = {"grows": grows, "implementation": name, **sizes, "status": "ok"}
                if name in failed:
                    line |= explain(failed[name])
                    shown.append(failed[name].status)
                else:
                    line |= {"seconds_per_step": spread(seconds[name])._asdict(), "peak_bytes": peaks[name]}
                    shown.append(f"{statistics.median(seconds[name]) * 1e3:,.1f}")
                run.add("growth", **line)
            what = f"{sizes['sequences']} x {sizes['length']}, {sizes['layers']} layers"
            print(f"  {grows:10} {what:24} {'  '.join(f'{text:>10}' for text in shown)}")
