"""The stages of `python -m bench gpu`, each of which runs alone: `python -m bench.stages STAGE --out DIR`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import gzip
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastroberta.precision import FIRST_WITH_FP8

from . import kernels, train
from .all import ROOT, run_limited
from .case import EAGER, OURS, Case, Setting
from .measure import Marks, choose_dtype, mark_around, measure_ceilings, spread, time_in_turn
from .record import Run, read_lines
from .tiles import SWEEPS, Sweep
from .trace import count_host_work, count_launches, record_trace, sum_kernels, sum_regions
from .trainers import MLM_PROBABILITY, WAYS, Ours, Task, run_steps

T = TypeVar("T")
WRONG = 2  # exit status of a stage that did all its work, with wrong or missing results
PATIENCE = 40.0  # seconds for a piece of a stage's work; a rehearsal gets three times as much
REPEATS = 20  # of a kernel, whose results must agree to the bit
MAX_PROCESSES = 16
GRAPH = "fastroberta, CUDA graph"
# The hot kernels of a training step: file of the operation, dropout, layout.
HOT = (
    ("attention", 0.1, "full"), ("attention", 0.0, "full"), ("attention", 0.1, "packed"), ("layer_norm", 0.1, "full"),
    ("gelu", 0.0, "full"), ("cross_entropy", 0.0, "full"), ("embedding", 0.1, "full"), ("layer_norm", 0.0, "plain"),
    ("masking", 0.0, "full"), ("lamb", 0.0, "full"),
)  # fmt: skip
# Tests that need a GPU, the most important first.
TESTS = ("attention", "layer_norm", "gelu", "cross_entropy", "embedding", "masking", "lamb", "philox", "huggingface")


class Stage(NamedTuple):
    work: Callable[[Session], bool | None]  # False where something is wrong
    seconds: float  # its share of eight minutes
    what: str


class Session:
    """What a stage works with: where results go, what to measure, and until when something new may begin.

    Attributes:
        skip: pieces of the work that an earlier process of this stage began, and ended or was lost with.
    """

    def __init__(self, stage: str, out: Path, end: float, rehearse: bool, skip: Sequence[str] = ()):
        self.stage, self.skip = stage, set(skip)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.dtype = choose_dtype(self.device)
        self.rehearse, self.out, self.results = rehearse, out, out / "results.jsonl"
        self.model = "tiny" if rehearse else "base"
        self.end = end
        self.run = Run(f"gpu {stage}", self.results, self.device, {"rehearsal": rehearse})

    @property
    def seconds(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def has_time(self, what: str) -> bool:
        if time.monotonic() <= self.end:
            return True
        print(f"{what}: not measured, the time is up", flush=True)
        return False

    def each(self, pieces: Iterable[T], patience: float = PATIENCE) -> Iterator[T]:
        """The pieces of a stage's work, as long as there is time.

        One that raises, takes longer than `patience` or leaves the GPU unusable ends this process. The results have a line
        for each piece that was begun, so `python -m bench gpu` can start the stage again without it.
        """
        for piece in pieces:
            name = str(piece)
            if name in self.skip or not self.has_time(name):
                continue
            self.add("begin", stage=self.stage, piece=name)
            seconds = patience * (3 if self.rehearse else 1)
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
            yield piece
            if self.on_gpu:
                torch.cuda.synchronize()  # raises after a kernel that went astray: all later ones would fail as well
            faulthandler.cancel_dump_traceback_later()

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        return self.run.add(kind, **values)

    def measure_ceilings(self) -> dict[str, Any]:
        return self.add("ceilings", dtype=str(self.dtype), **measure_ceilings(self.device, self.dtype))

    def read_ceilings(self) -> dict[str, Any]:
        """Those of the first stage; measured where it left none. They are added to this run as well."""
        found = [line for line in read_lines(self.results) if line["kind"] == "ceilings"]
        if not found:
            return self.measure_ceilings()
        return self.add("ceilings", **{name: value for name, value in found[-1].items() if name not in ("kind", "run")})

    def make_task(self) -> Task:
        sequences = 2 if self.rehearse else None
        data = train.prepare_python_texts()
        return train.make_task(data, self.model, self.device, self.dtype, sequences=sequences)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--end", type=float, default=1e12, help="begin nothing new after this value of time.monotonic()"
    )
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--skip", action="append", default=[], help="piece of the stage to leave out (may be repeated)")
    arguments = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    session = Session(arguments.stage, arguments.out, arguments.end, arguments.rehearse, arguments.skip)
    return WRONG if STAGES[arguments.stage].work(session) is False else 0


# Machine


def measure_machine(session: Session) -> None:
    """Copy rate, and the rates of matrix products: a large one, and those of a step with their gradients."""
    machine = session.run.machine
    print(f"{machine['name']}; Python {machine['python']}; {machine['packages']}; {machine.get('gpu', machine['cpu'])}")
    ceilings = session.measure_ceilings()
    print(
        f"copies {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s, multiplies "
        f"{ceilings['matmul_flops_per_second'] / 1e12:,.3g} TFLOP/s"
    )
    task = train.make_task("", session.model, session.device, session.dtype, sequences=2 if session.rehearse else None)
    n, d, f = task.sequences * task.length, task.hidden, task.intermediate
    for name, k, m in (("query, key, value", d, 3 * d), ("attention output", d, d), ("up", d, f), ("down", f, d)):
        x, w, y = (make_matrix(session, *shape) for shape in ((n, k), (m, k), (n, m)))
        products: dict[str, Callable[[], Any]] = {
            "forward": lambda x=x, w=w: x @ w.T,
            "input gradient": lambda y=y, w=w: y @ w,
            "weight gradient": lambda y=y, x=x: y.T @ x,
        }
        times = time_in_turn(
            {name: mark_around(product, session.device) for name, product in products.items()},
            session.device, rounds=5, repeats=5 if session.on_gpu else 1,
        )  # fmt: skip
        for direction, turns in times.items():
            seconds = spread([turn for (turn,) in turns])
            rate = 2 * n * k * m / seconds.median
            session.add(
                "product", name=name, direction=direction, shape=f"{n} x {k} x {m}", seconds=seconds._asdict(),
                flops_per_second=rate,
            )  # fmt: skip
            print(
                f"  {name:18} {direction:16} {n} x {k} x {m}: {seconds.median * 1e3:.3f} ms, {rate / 1e12:,.3g} TFLOP/s"
            )


def make_matrix(session: Session, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device=session.device).to(session.dtype)


# Kernels


def make_case(name: str, setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    """An operation's case with PyTorch's and our implementation alone."""
    case = importlib.import_module(f"bench.{name}").make_case(setting, device, dtype)
    case.implementations = {which: case.implementations[which] for which in (EAGER, OURS)}
    return case


def compile_in_processes(session: Session, jobs: Sequence[tuple]) -> None:
    """Compile what each job (operation, setting, sweep and candidate or None) launches; failures show again later."""
    count = min(MAX_PROCESSES, len(jobs), os.cpu_count() or 1)
    started, limit = time.monotonic(), session.seconds / 2
    arguments = [(*job, session.device, session.dtype) for job in jobs]
    for _ in session.each(["compile"], patience=limit + 10):
        with (
            multiprocessing.get_context("spawn").Pool(count) as pool,
            contextlib.suppress(multiprocessing.TimeoutError),
        ):
            pool.map_async(compile_job, arguments, chunksize=1).get(limit)
        print(f"{len(jobs)} cases compiled in {count} processes in {time.monotonic() - started:.0f} s")


def compile_job(job: tuple) -> None:
    name, setting, sweep, candidate, device, dtype = job
    torch.set_num_threads(1)
    with contextlib.suppress(Exception), contextlib.nullcontext() if sweep is None else sweep.keep_tables():
        if sweep is not None:
            sweep.choose(candidate)
        case = make_case(name, setting, device, dtype)
        case.run(case.implementations[OURS](setting.dropout)).seconds()


def check_kernels(session: Session) -> bool:
    """Errors against fp64, agreement of repeated runs to the bit, and time beside PyTorch's eager operations."""
    ceilings = session.read_ceilings()
    settings = {
        f"{name} {layout} {dropout}": (name, Setting(session.model, dropout, layout)) for name, dropout, layout in HOT
    }
    compile_in_processes(session, [(name, setting, None, None) for name, setting in settings.values()])
    is_right = True
    for piece in session.each(settings):
        name, setting = settings[piece]
        case = make_case(name, setting, session.device, session.dtype)
        lines = kernels.measure_case(case, session.device, ceilings, quick=True)
        ours = next(line for line in lines if line["implementation"] == OURS)
        if ours["status"] == "ok":
            ours["differing_repeats"] = count_differences(case)
            if ours["differing_repeats"]:
                ours |= {"status": "wrong", "reason": f"{ours['differing_repeats']} of {REPEATS} runs differ"}
        kernels.print_case(case, lines)
        if ours["status"] == "ok":
            print(f"  {REPEATS} runs agree to the bit")
        else:
            print(f"  WRONG: {ours.get('reason', '')}")
            is_right = False
        for line in lines:
            session.add("kernel", **line)
        del case
        if session.on_gpu:
            torch.cuda.empty_cache()
    return is_right


def count_differences(case: Case) -> int:
    """How many of REPEATS runs, forward and backward, give other bits than the first."""
    first, count = None, 0
    for _ in range(REPEATS + 1):
        output = case.implementations[OURS](case.setting.dropout)(*case.inputs)
        gradients = torch.autograd.grad(output, case.leaves, case.upstream) if case.upstream is not None else ()
        # Copies: an optimizer's parameters are changed by its next step.
        values = [value.detach().clone() for value in list_tensors((output, gradients))]
        if first is None:
            first = values
        else:
            count += any(not torch.equal(one, other) for one, other in zip(first, values))
    return count


def list_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in list_tensors(one)] if isinstance(value, (tuple, list)) else []


# Training step


def measure_step(session: Session) -> bool:
    """Tokens/s, MFU and memory of whole eager steps; then time by kernel beside its floor, and by region of the step; last,
    on a GPU, the same steps replayed as CUDA graphs, which is how a single GPU trains, in bf16 and with 8-bit products.
    False if they are not replayed."""
    ceilings, task = session.read_ceilings(), session.make_task()
    trainer = measure_way(session, task, OURS, ceilings)
    if not session.has_time("profile"):
        return True
    steps = 3 if session.on_gpu else 1
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        events = record_trace(lambda: [trainer.step() for _ in range(steps)], session.device, trace)
        with open(trace, "rb") as source, gzip.open(session.out / "step-trace.json.gz", "wb") as target:
            shutil.copyfileobj(source, target)
    report_profile(session, task, events, steps, ceilings)
    report_host(session, OURS, events, steps)
    if session.on_gpu:
        precisions = [task.precision, *["fp8"] * (torch.cuda.get_device_capability() >= FIRST_WITH_FP8)]
        del trainer
        return all([measure_graph(session, task._replace(precision=one), steps, ceilings) for one in precisions])
    return True


def measure_graph(session: Session, task: Task, steps: int, ceilings: dict[str, Any]) -> bool:
    """Replayed steps. False if they were not replayed."""
    name = f"{GRAPH}, {task.precision}"
    if not session.has_time(name):
        return True
    gc.collect()  # a trainer and the generator of its batches hold each other
    torch.cuda.empty_cache()
    trainer = measure_way(session, task, GRAPH, ceilings)
    report_host(session, name, record_trace(lambda: [trainer.step() for _ in range(steps)], session.device), steps)
    is_replayed = all(graph.is_recorded for graph in trainer.trainer.graphs)
    if not is_replayed:
        print(f"  {name}: the steps were EAGER, for the reason given above")
    return is_replayed


def report_host(session: Session, name: str, events: list[dict[str, Any]], steps: int) -> None:
    """What the host does in a step, beside the kernels that the GPU runs."""
    counts = {**count_host_work(events), "kernels": count_launches(events)}
    session.add("host", implementation=name, **{what: count / steps for what, count in counts.items()})
    print(f"  {name}, a step: " + ", ".join(f"{count / steps:,.0f} {what}" for what, count in counts.items()))


def measure_way(session: Session, task: Task, name: str, ceilings: dict[str, Any]) -> Ours:
    """Time the steps of one of our ways to train. Returns its trainer."""
    trainer = Ours(task, WAYS[name])
    run_steps(trainer, 5 if session.on_gpu else 1)  # graphs are recorded in the second and third
    turns = [run_steps(trainer, 10 if session.on_gpu else 1) for _ in range(5 if session.on_gpu else 2)]
    line = {"implementation": name, "status": "ok"} | train.summarize(task, turns, [], ceilings)
    line["mean_loss"] = statistics.mean(turn["loss"] for turn in turns)
    session.add("train", model=session.model, task=task._asdict() | {"data": Path(task.data).name}, **line)
    train.print_comparison(f"roberta-{session.model}", task, [line])
    step = line["seconds_per_step"]["median"]
    print(f"  a step {step * 1e3:,.1f} ms; the host needs {line['host_seconds_per_step'] * 1e3:,.1f} ms to launch it")
    return trainer


def report_profile(
    session: Session, task: Task, events: list[dict[str, Any]], steps: int, ceilings: dict[str, Any]
) -> None:
    floors = {what: (pattern, work_seconds) for pattern, what, work_seconds in list_floors(task, ceilings)}
    groups: dict[str, list[float]] = {what: [0.0, 0.0] for what in floors}
    table = sum_kernels(events)
    for kernel in table:
        what = next(
            (what for what, (pattern, _) in floors.items() if re.search(pattern, kernel.name)), "everything else"
        )
        group = groups.setdefault(what, [0.0, 0.0])
        group[0] += kernel.launches / steps
        group[1] += kernel.seconds / steps
    regions = {name: seconds / steps for name, seconds in sum_regions(events).items()}
    session.add(
        "profile", steps=steps, regions=regions, launches=sum(kernel.launches for kernel in table) / steps,
        kernels=[
            {"name": kernel.name, "launches": kernel.launches / steps, "seconds": kernel.seconds / steps}
            for kernel in table[:60]
        ],
        groups={
            what: {"launches": launches, "seconds": seconds, "floor": floors.get(what, ("", 0.0))[1]}
            for what, (launches, seconds) in groups.items()
        },
    )  # fmt: skip
    print(f"\n  {'a step':34} {'launches':>9} {'ms':>9} {'floor, ms':>9} {'of it':>6}")
    for what, (launches, seconds) in sorted(groups.items(), key=lambda item: -item[1][1]):
        floor = floors.get(what, ("", 0.0))[1]
        share = f"{floor / seconds:.0%}" if floor and seconds else ""
        print(f"  {what:34} {launches:9,.0f} {seconds * 1e3:9.3f} {floor * 1e3:9.3f} {share:>6}")
    for kernel in table[:25]:
        print(f"    {kernel.name[:80]:80} {kernel.launches / steps:7,.0f} {kernel.seconds / steps * 1e3:9.3f}")
    print(f"  regions, ms: {', '.join(f'{name} {seconds * 1e3:,.1f}' for name, seconds in regions.items())}")


def list_floors(task: Task, ceilings: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(pattern of the names, what it is, seconds of a step at least) for the kernels of a training step in bf16."""
    n, d, f, layers = task.sequences * task.length, task.hidden, task.intermediate, task.layers
    masked = round(MLM_PROBABILITY * n)
    row, wide_row = 2 * d * n, 2 * f * n  # bytes
    parameters = layers * (4 * d * d + 2 * d * f) + task.vocabulary * d
    pairs = 4 * n * task.length * d  # FLOPs of both products of attention's forward
    copy, matmul = ceilings["copy_bytes_per_second"], ceilings["matmul_flops_per_second"]
    products = 6 * n * layers * (4 * d * d + 2 * d * f) + 6 * masked * (d * d + d * task.vocabulary)
    return [
        (r"attention_forward", "attention, forward", layers * max(pairs / matmul, 4 * row / copy)),
        (r"attention_backward", "attention, backward", layers * max(2.5 * pairs / matmul, 8 * row / copy)),
        (r"layer_norm_forward", "LayerNorm, forward", 2 * layers * 3 * row / copy),
        (r"layer_norm_backward|sum_partials", "LayerNorm, backward", 2 * layers * 5 * row / copy),
        (r"bias_gelu_forward", "GELU, forward", layers * 2 * wide_row / copy),
        (r"bias_gelu_backward", "GELU, backward", layers * 3 * wide_row / copy),
        (r"embedding|_blocks_kernel", "embedding", (5 * 2 * row + 4 * task.vocabulary * d) / copy),
        (r"softmax_rows", "softmax of the head", masked * task.vocabulary * 2 * 3 / copy),
        (r"mask_tokens", "masking", 16 * n / copy),
        (r"(?i)gemm|nvjet|cutlass|matmul|aten::addmm|aten::mm$|aten::bmm", "matrix products", products / matmul),
        (r"(?i)adam|lamb_", "optimizer", 28 * parameters / copy),
        (r"(?i)memcpy|memset|copy|fill|cast", "copies, casts and fills", 6 * parameters / copy),
    ]


# Peers


def measure_peers(session: Session) -> bool:
    """Training and hot kernels against what others would use, in the same minutes."""
    common = ["--model", session.model, "--out", str(session.results)]
    is_right = True
    for _ in session.each(["training"], patience=0.8 * session.seconds):
        ways = [
            "transformers sdpa" if session.rehearse else "transformers sdpa, torch.compile",
            "transformers, our kernels",
        ]
        options = [option for way in ways for option in ("--way", way)]
        size = ["--sequences", "2"] if session.rehearse else []
        # The compiler of the peer takes most of it.
        seconds = ["--seconds", str(0.7 * session.seconds)]
        is_right &= train.main(["--only", "compare", "--rounds", "3", *common, *options, *size, *seconds]) == 0
    names = ("gelu",) if session.rehearse else ("layer_norm", "gelu", "cross_entropy", "attention", "geglu", "rotary")
    for name in session.each(names, patience=60):
        options = ["--quick", "--only", name, *common, "--seconds", str(0.8 * session.seconds)]
        is_right &= kernels.main(options) == 0
    return is_right


# Tiles


def sweep_tiles(session: Session) -> None:
    """Each candidate of `bench.tiles` that is right, timed in turn; prints the best as it would stand in the table."""
    ceilings = session.read_ceilings()
    jobs = []
    for sweep in SWEEPS:
        for candidate in sweep.candidates:
            jobs.append((sweep.operation, Setting(session.model, sweep.dropout, sweep.layout), sweep, candidate))
    compile_in_processes(session, jobs)
    for sweep in session.each(SWEEPS):
        with sweep.keep_tables():
            sweep_one(session, sweep, ceilings)


def sweep_one(session: Session, sweep: Sweep, ceilings: dict[str, Any]) -> None:
    setting = Setting(session.model, sweep.dropout, sweep.layout)
    case = make_case(sweep.operation, setting, session.device, session.dtype)
    case.check(EAGER)
    function = case.implementations[OURS](setting.dropout)
    runs: dict[str, Callable[[], Marks]] = {}
    reasons: dict[str, str] = {}
    for candidate in sweep.candidates:
        if not session.has_time(f"{candidate}"):
            break
        try:
            sweep.choose(candidate)
            verdict = case.check(OURS)
        except Exception as error:  # out of registers, shared memory or patience: the finding
            first = str(error).strip().partition("\n")[0]
            reasons[str(candidate)] = f"{type(error).__name__}: {first[:120]}"
            continue
        if verdict.fault:
            reasons[str(candidate)] = verdict.fault
            continue

        def run(candidate: Any = candidate) -> Marks:
            sweep.choose(candidate)
            return case.run(function)

        runs[str(candidate)] = run
    times = time_in_turn(runs, session.device, rounds=5, repeats=5 if session.on_gpu else 1)
    seconds = {name: spread([parts[sweep.part] for parts in turns]) for name, turns in times.items()}
    floor = (case.forward, case.backward)[sweep.part].floor(ceilings)
    print(f"\n{sweep}  {case.shape}, floor {floor * 1e3:.3f} ms")
    for name, taken in sorted(seconds.items(), key=lambda item: item[1].median):
        session.add("tile", sweep=str(sweep), candidate=name, status="ok", seconds=taken._asdict(), floor=floor)
        print(f"  {name:40} {taken.median * 1e3:9.3f} ms ({taken.low * 1e3:.3f} to {taken.high * 1e3:.3f})")
    for name, reason in reasons.items():
        session.add("tile", sweep=str(sweep), candidate=name, status="failed", reason=reason)
        print(f"  {name:40} {reason}")
    if seconds:
        capability = "".join(map(str, torch.cuda.get_device_capability())) if session.on_gpu else "cpu"
        print(f"  best on sm_{capability}: {sweep.table} = {min(seconds, key=lambda name: seconds[name].median)}")


# Tests and runs


def run_gpu_tests(session: Session) -> bool:
    """The tests that need a GPU, the most important first; each outcome is in tests.txt as soon as it is known."""
    files = [f"tests/kernels/test_{name}.py" for name in TESTS]
    others = sorted((ROOT / "tests").glob("**/test_*.py"))
    files += [str(path.relative_to(ROOT)) for path in others if "mark.gpu" in path.read_text()]
    processes = min(8, os.cpu_count() or 1)  # most tests compile some kernels first, a second each on one core
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--tb=short", *dict.fromkeys(files)]
    command.append("--continue-on-collection-errors")  # a file whose packages are missing here loses only itself
    # In order, one by one; `loadgroup` would run a test again and again that takes its process along.
    command += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "1"]
    command += ["--collect-only", "-q"] * session.rehearse
    if importlib.util.find_spec("pytest_timeout"):  # a test that hangs then loses only itself
        command += ["--timeout", str(PATIENCE), "--timeout-method", "thread"]
    log, begun = session.out / "tests.txt", time.monotonic()
    log.unlink(missing_ok=True)
    status = run_limited(command, session.seconds, log, max_bytes=15 * 2**20, own_group=False)
    outcomes = re.findall(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b (tests/\S+)", log.read_text(errors="replace"))
    counts = {
        which: len({name for found, name in outcomes if found == which}) for which in ("PASSED", "FAILED", "ERROR")
    }
    summary = f"{counts['PASSED']} passed, {counts['FAILED']} failed, {counts['ERROR']} with errors"
    summary += "" if status is not None else f"; stopped after {time.monotonic() - begun:.0f} s"
    failures = sorted({name for found, name in outcomes if found in ("FAILED", "ERROR")})
    session.add("tests", status=status, seconds=time.monotonic() - begun, summary=summary, failures=failures)
    print(f"gpu tests: {summary}", *failures, sep="\n  ")
    return not failures and status in (0, None)


def compare_losses(session: Session) -> bool:
    """Losses of 50 steps of roberta-base, 4 sequences of 128 tokens, in fp32 and bf16, against the CPU's in fp32.

    Dropout and masks are functions of the seed, so in fp32 the runs differ by rounding alone. fp32 stays eager, and bf16 is
    replayed as CUDA graphs, so that a fault of the graphs loses only half of this.
    """
    steps = 2 if session.rehearse else 50
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    options = [f"--model.{name}={value}" for name, value in sizes.items()] if session.rehearse else []
    runs = {"cpu": ("cpu", "fp32"), "fp32": (session.device.type, "fp32"), "bf16": (session.device.type, "bf16")}
    data = train.prepare_python_texts()
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for name, (device, precision) in runs.items():
            command = [sys.executable, "-m", "fastroberta.train", "--config", "roberta-base", "--data", data]
            command += ["--output_dir", f"{folder}/{name}", "--device", device, "--precision", precision]
            command += [
                "--max_steps",
                str(steps),
                "--lr_scheduler.warmup_steps",
                str(steps // 2),
                "--max_seq_length=128",
            ]
            command += ["--train_batch_size", "4", "--micro_batch_size", "4", "--logging_steps", "1", *options]
            command += ["--eval_sequences", "8", "--cuda_graph", "true" if name == "bf16" else "false"]
            processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            for process in processes.values():
                process.wait(session.seconds)
        except subprocess.TimeoutExpired:
            print("the time is up: the losses so far")
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
        for name in runs:
            losses[name] = list(read_losses(Path(folder, name, "metrics.jsonl")))
    is_right = True
    for name, bound in (("fp32", 2e-3), ("bf16", 2e-2)):
        pairs = list(zip(losses["cpu"], losses[name]))
        deviation = max((abs(here / there - 1) for there, here in pairs), default=float("inf"))
        session.add(
            "losses", precision=name, steps=len(pairs), cpu=losses["cpu"], gpu=losses[name], deviation=deviation
        )
        print(f"{name}: {len(pairs)} losses, largest relative deviation from the CPU's {deviation:.1e} (bound {bound})")
        is_right &= deviation <= bound
    return is_right


def read_losses(path: Path) -> Iterator[float]:
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError):  # a line that is being written, or one of an evaluation
                yield json.loads(line)["train/loss"]


def run_quickstart(session: Session) -> bool:
    """`python -m fastroberta.train` as a user would start it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "fastroberta.train",
            "--output_dir",
            folder,
            "--data",
            train.prepare_python_texts(),
        ]
        if session.rehearse:
            command += ["--max_steps=2", "--lr_scheduler.warmup_steps=1", "--eval_sequences=8", "--train_batch_size=2"]
        begun = time.monotonic()
        status = run_limited(command, session.seconds, own_group=False)
        losses = list(read_losses(Path(folder, "metrics.jsonl")))
    seconds = time.monotonic() - begun
    session.add("quickstart", status=status, seconds=seconds, losses=losses)
    print(
        f"quickstart: {f'exit status {status}' if status is not None else 'stopped'} after {seconds:.0f} s; losses "
        f"{', '.join(f'{loss:.2f}' for loss in losses[:: max(1, len(losses) // 8)])}"
    )
    return status in (0, None)  # it may well be longer than what is left


STAGES = {
    "machine": Stage(measure_machine, 20, "versions, clocks, rates of copies and of a step's matrix products"),
    "kernels": Stage(check_kernels, 75, "hot kernels against fp64, repeated runs to the bit"),
    "step": Stage(measure_step, 45, "a whole training step, and time by kernel beside its floor"),
    "peers": Stage(measure_peers, 115, "transformers and other kernels in the same minutes"),
    "tiles": Stage(sweep_tiles, 75, "the few candidates for tiles"),
    "tests": Stage(run_gpu_tests, 65, "the tests that need a GPU"),
    "losses": Stage(compare_losses, 50, "50 steps of roberta-base against the CPU"),
    "quickstart": Stage(run_quickstart, 35, "the quickstart"),
}

if __name__ == "__main__":
    sys.exit(main())
