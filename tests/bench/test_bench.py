"""The benchmark suite: what is wrong is not timed, the same work on both sides, tables that say what the lines say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time

import pytest
import torch
from tiny import prepare_text

from bench import all as all_pieces
from bench import case as case_module
from bench import host, report
from bench.case import EAGER, OURS, SIZES, Absent, Case, Setting, Size, Work
from bench.kernels import OPERATIONS, SMALL_OPERATIONS, choose_settings, measure_case, print_case
from bench.measure import spread, time_in_turn
from bench.record import Run, read_lines
from bench.trace import REGIONS, estimate_kernels, record_trace, sum_kernels, sum_regions
from bench.train import judge
from bench.trainers import SEED, WAYS, Data, Failure, Ours, Task, Transformers, Way, Worker
from fastroberta.data import training_batches

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": 1e11}
TINY = Size(128, 2, 160, 1)  # heads of 64, as the cases have them


def make_toy(implementations, dropout=0.0):
    """x * w, which is exact enough in fp32, and what else is given."""
    x = torch.linspace(-1, 1, 65536).requires_grad_()
    w = torch.linspace(1, 2, 65536).requires_grad_()

    def multiply(p):
        return lambda x, w: torch.nn.functional.dropout(x * w, p)

    return Case(
        "toy", Setting("base", dropout), "65536", torch.float32, (x, w),
        {EAGER: multiply, OURS: multiply} | implementations, Work(1.0, 1.0), torch.ones(65536), Work(1.0, 1.0),
        lambda x, w: x * w,
    )  # fmt: skip


def measure_toy(implementations, dropout=0.0):
    lines = measure_case(make_toy(implementations, dropout), CPU, CEILINGS, quick=True)
    return {line["implementation"]: line for line in lines}


def test_a_wrong_implementation_is_shown_as_wrong_and_not_timed():
    def refuse(p):
        raise Absent("needs a moon")

    def fail(p):
        raise RuntimeError("out of order\nsecond line")

    lines = measure_toy(
        {
            "wrong": lambda p: lambda x, w: x * w * 1.0001,
            "wrong gradient": lambda p: lambda x, w: x * w.detach() + 0 * w,
            "not finite": lambda p: lambda x, w: x / 0 * w,
            "absent": refuse,
            "failing": fail,
        }
    )
    assert {name: line["status"] for name, line in lines.items()} == {
        EAGER: "ok", OURS: "ok", "wrong": "wrong", "wrong gradient": "wrong", "not finite": "wrong", "absent": "absent",
        "failing": "failed",
    }  # fmt: skip
    assert {name for name, line in lines.items() if "seconds" in line} == {EAGER, OURS}
    assert lines["absent"]["reason"] == "needs a moon"
    assert lines["failing"]["reason"] == "RuntimeError: out of order"
    assert lines["wrong"]["error"]["output"] == pytest.approx(1e-4, rel=0.01)
    assert set(lines[OURS]["seconds"]) == {"forward", "backward", "both"}
    assert 0.2 < lines[EAGER]["ratio"]["median"] < 5


def test_dropout_that_drops_nothing_is_wrong():
    torch.manual_seed(0)
    lines = measure_toy({"forgetful": lambda p: lambda x, w: x * w}, dropout=0.1)
    assert lines[OURS]["status"] == "ok"
    assert lines["forgetful"]["status"] == "wrong" and "dropout" in lines["forgetful"]["reason"]


def test_gradients_under_dropout_are_compared_with_the_twin():
    """A kernel whose backward forgets what was dropped adds the right noise, and is wrong."""
    torch.manual_seed(0)
    mask = (torch.rand(65536) >= 0.1) / 0.9

    def twin(p):
        return lambda x, w: x * w * (mask.to(x.dtype) if p else 1)

    def forget(p):
        return lambda x, w: twin(p)(x, w).detach() + (x * w - (x * w).detach())

    for ours, fault in ((twin, None), (forget, "error of the gradient")):
        case = make_toy({OURS: ours}, dropout=0.1)
        case.twin = twin
        case.check(EAGER)
        verdict = case.check(OURS)
        assert verdict.fault is None if fault is None else fault in verdict.fault


def test_each_of_several_outputs_counts():
    x = torch.linspace(-1, 1, 64).requires_grad_()
    implementations = {
        EAGER: lambda p: lambda x: (x * 2, x * 3),
        OURS: lambda p: lambda x: (x * 2, x * 3.001),
        "wrong gradient": lambda p: lambda x: (x * 2, x.detach() * 3 + 0 * x),
    }
    case = Case(
        "toy", Setting("base"), "64", torch.float32, (x,), implementations, Work(1, 1),
        (torch.ones(64), torch.linspace(0, 1, 64)), Work(1, 1), lambda x: (x * 2, x * 3),
    )  # fmt: skip
    lines = {line["implementation"]: line for line in measure_case(case, CPU, CEILINGS, quick=True)}
    assert lines[EAGER]["status"] == "ok" and set(lines[EAGER]["seconds"]) == {"forward", "backward", "both"}
    assert "error of the output" in lines[OURS]["reason"]
    assert "error of the gradient" in lines["wrong gradient"]["reason"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_our_kernel_is_right_in_every_setting(operation, monkeypatch):
    torch.manual_seed(0)
    module = importlib.import_module(f"bench.{operation}")
    # So few elements are drawn that the strength of dropout is known badly.
    monkeypatch.setattr(case_module, "DROPOUT_TOLERANCE", 0.3)
    monkeypatch.setitem(SIZES, "base", TINY)
    monkeypatch.setitem(SIZES, "large", TINY)
    for name, value in (("LENGTH", 48), ("ROWS", 512), ("VOCABULARY", 500), ("VOCABULARY_ROWS", 512)):
        for target in (module, case_module):
            if hasattr(target, name) and operation != "masking":
                monkeypatch.setattr(target, name, value)
    small = choose_settings(module.SETTINGS, quick=False, on_gpu=False, small=True)[:1]
    for setting in module.SETTINGS + (small if operation in SMALL_OPERATIONS else []):
        case = module.make_case(setting, CPU, torch.float32)
        for name in (EAGER, OURS):
            verdict = case.check(name)
            assert verdict.fault is None, f"{operation} {setting} {name}: {verdict.fault}"


def test_turns_alternate():
    order = []

    def run(name):
        def work():
            order.append(name)
            marks = case_module.Marks(CPU)
            marks.mark()
            return marks

        return work

    times = time_in_turn({"a": run("a"), "b": run("b")}, CPU, rounds=3)
    assert order == ["a", "b"] * 4  # the first turn is not timed
    assert [len(turns) for turns in times.values()] == [3, 3]


def test_spread():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


# Training


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    texts = [f"The number {n} is followed by {n + 1}. After that comes {n + 2}, and so on." for n in range(300)]
    data = prepare_text(tmp_path_factory.mktemp("bench"), "\n\n".join(texts), 300)
    return Task(str(data), 1, 32, 2, 48, 32, 4, "fp32", vocabulary=500)


def test_both_sides_do_the_same_work(task):
    pytest.importorskip("transformers")
    torch.manual_seed(SEED)
    ours, theirs = Ours(task, Way(ours=True)), Transformers(task, Way())
    exact = Transformers(task, Way(precision="fp64", attention="eager")).check()
    assert exact["loss"] > 0 and exact["gradient_norm"] > 0
    for side in (ours, theirs):
        assert judge(side.check(), exact)["error"]["loss"] < 1e-5
        assert "status" not in judge(side.check(), exact)
    # Batch after batch they see the same blocks; what differs is which tokens are masked.
    ours_batches = training_batches(Data(task).blocks, range(0, 100, task.sequences), task.sequences, seed=SEED)
    for _ in range(3):
        batch, theirs_batch = next(ours_batches), next(theirs.loader)
        labels = theirs_batch["labels"]
        assert torch.equal(batch.input_ids, torch.where(labels != -100, labels, theirs_batch["input_ids"]))
    # The same number of weights, all of them updated.
    rows = ours.trainer.model.embeddings.word_embeddings.weight.shape[0] - task.vocabulary
    count = sum(p.numel() for p in ours.trainer.model.parameters()) - rows * (task.hidden + 1)
    assert count == sum(p.numel() for p in theirs.model.parameters())
    for side in (ours, theirs):
        before = side.check()["loss"]
        for _ in range(3):
            side.step()
        assert float(side.last_loss) > 0
        assert side.check()["loss"] < before
    parts = sum_regions(record_trace(theirs.step, CPU))
    assert list(parts) == ["data", "forward", "backward", "optimizer"] and all(value > 0 for value in parts.values())


def test_our_step_names_its_regions(task):
    pytest.importorskip("fastroberta.training.trainer")
    parts = sum_regions(record_trace(Ours(task, Way(ours=True)).step, CPU))
    assert list(parts) == list(REGIONS) and all(value > 0 for value in parts.values())


def test_a_gpu_region_gets_the_kernels_launched_inside_it():
    """Kernels run later than the host launches them, and the backward's come from another thread."""

    def region(name, start, duration):
        return {"cat": "user_annotation", "name": name, "ts": start, "dur": duration}

    def kernel(number, launched, started, duration, kind="cuda_runtime"):
        call = {"cat": kind, "name": "launch", "ts": launched, "dur": 1, "args": {"correlation": number}}
        args = {"correlation": number}
        return [call, {"cat": "kernel", "name": f"k{number % 2}", "ts": started, "dur": duration, "args": args}]

    events = [
        region("forward", 0, 10), region("backward", 20, 10), region("no region of ours", 0, 100),
        *kernel(1, 5, 40, 3), *kernel(2, 21, 50, 4, "cuda_driver"), *kernel(3, 15, 60, 5), *kernel(4, 29, 70, 1),
        {"cat": "kernel", "name": "k9", "ts": 80, "dur": 7, "args": {}},
    ]  # fmt: skip
    assert sum_regions(events) == pytest.approx({"forward": 3e-6, "backward": 5e-6})
    assert [kernel[:2] for kernel in sum_kernels(events)] == [("k1", 2), ("k9", 1), ("k0", 2)]


def test_a_wrong_loss_is_wrong():
    exact = {"loss": 10.0, "gradient_norm": 2.0}
    assert "status" not in judge({"loss": 10.01, "gradient_norm": 2.01}, exact)
    assert judge({"loss": 10.1, "gradient_norm": 2.0}, exact)["status"] == "wrong"
    assert judge({"loss": 10.0, "gradient_norm": 2.2}, exact)["status"] == "wrong"
    assert judge({"loss": float("nan"), "gradient_norm": 2.0}, exact)["status"] == "wrong"


def test_a_worker_that_fails_says_so_and_goes_on(task):
    with Worker("fastroberta") as worker:
        for _ in range(2):
            with pytest.raises(Failure, match="no-such-directory") as caught:
                worker.ask("build", task._replace(data="no-such-directory"))
            assert caught.value.status == "failed"
        worker.ask("build", task)
        result = worker.ask("steps", 2)
        assert result["steps"] == 2 and result["seconds"] >= result["host_seconds"] > 0
        worker.tell("steps", 10**6)
        with pytest.raises(Failure, match="not ready in time"):
            worker.hear(deadline=time.monotonic() + 0.1)
        with pytest.raises(Failure, match="process ended"):  # it was not waited for any longer
            worker.ask("steps", 1)


def test_ways_name_what_exists():
    assert next(iter(WAYS)) == OURS  # ratios are against it


# Results


def write_results(path):
    run = Run("kernels", path, CPU, {"quick": True})
    run.add("ceilings", dtype="torch.float32", **CEILINGS)
    for line in measure_case(make_toy({"other": lambda p: lambda x, w: w * x}), CPU, CEILINGS, quick=True):
        run.add("kernel", **line)
    run.add("kernel", operation="toy", setting=Setting("base")._asdict(), status="skipped", reason="the time is up")
    run.add("tile", sweep="a kind of line that has no table", status="ok")
    run = Run("train", path, CPU, {})
    run.add("ceilings", dtype="torch.float32", **CEILINGS)
    for name, rate in ((OURS, 100.0), ("transformers sdpa", 40.0), (OURS, 120.0)):
        run.add(
            "train", model="base", task={"sequences": 4, "length": 512, "precision": "bf16", "dropout": 0.1},
            implementation=name, status="ok", tokens_per_second={"median": rate, "low": rate - 1, "high": rate + 1},
            mfu=None, share_of_matmul=0.5, peak_bytes=2e9, ratio={"median": 120 / rate, "low": 1.0, "high": 3.0},
        )  # fmt: skip
    run.add(
        "train", model="base", task={"sequences": 4, "length": 512, "precision": "bf16", "dropout": 0.1},
        implementation="transformers compiled", status="failed", reason="out of memory",
    )  # fmt: skip
    for name in (OURS, "transformers sdpa"):
        for length in (64, 128):
            run.add(
                "growth", grows="length", length=length, sequences=4, layers=2, implementation=name, status="ok",
                seconds_per_step={"median": 0.1, "low": 0.1, "high": 0.2},
            )  # fmt: skip


def test_report_shows_the_newest_lines_and_draws_charts(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "cpu-2026-01-02.jsonl"
    write_results(path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "DIRECTORY", tmp_path)
    assert report.main([]) == 0
    text = path.with_suffix(".md").read_text()
    assert "| fastroberta | 120 (119 to 121) | 50% | 2.0 | 1.00 (1.00 to 3.00) |" in text
    assert "| transformers sdpa | 40 (39 to 41) |" in text and "100 (99" not in text
    assert "| toy (base) | 65536 |" in text and "other " in text
    charts = sorted(file.name for file in tmp_path.glob("*.png"))
    assert charts == [f"cpu-2026-01-02-{name}.png" for name in ("growth", "memory", "roofline", "speed")]
    content = readme.read_text()
    assert (
        content.startswith("before\n")
        and content.endswith("after\n")
        and "stale" not in content
        and "119 to 121" in content
    )


def test_charts_say_where_they_are_from_and_share_a_scale(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    path = tmp_path / "cpu-2026-01-02.jsonl"
    write_results(path)
    results = report.read_results(path)
    line = results["train"][0]
    title = report.title_of(line, "4 x 512 tokens")
    assert "(CPU, " in title and ", bf16, 4 x 512 tokens, 20" in title
    assert report.colour_of("transformers, our kernels") not in (report.OUR_COLOUR, report.PEER_COLOUR)
    results["growth"] += [one | {"grows": "layers", "layers": 4} for one in results["growth"]]
    left, right = report.draw_growth(plt, results).axes
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[0] == 0
    (speed,) = report.draw_speed(plt, results).axes
    bars = {label.get_text(): text.get_text() for label, text in zip(speed.get_yticklabels(), speed.texts)}
    assert bars == {"transformers sdpa": "40", OURS: "120", "transformers compiled": "failed"}
    plt.close("all")


def test_the_roofline_names_its_points_inside_its_panel(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    path = tmp_path / "cpu-2026-01-02.jsonl"
    write_results(path)
    results = report.read_results(path)
    kernel = next(line for line in results["kernel"] if line["implementation"] == OURS)
    for copy, matmul, intensity in ((3e10, 4e11, 0.3), (3e10, 4e11, 300.0), (4e12, 8e14, 40.0), (4e12, 8e14, 2000.0)):
        kernel["run"]["ceilings"] = {"copy_bytes_per_second": copy, "matmul_flops_per_second": matmul}
        kernel |= {"intensity": intensity, "flops_per_second": min(copy * intensity, matmul) / 3}
        kernel["share_of_roofline"] = 0.001
        results["kernel"] = [kernel, kernel | {"operation": "a name as long as any that there is"}]
        figure = report.draw_roofline(plt, results)
        figure.canvas.draw()
        left, right = figure.axes
        names = {text.get_text(): text.get_window_extent() for text in left.texts}
        assert {"toy (base)", "a name as long as any that there is (base)"} < names.keys()
        for box in names.values():
            assert left.bbox.x0 <= box.x0 and box.x1 <= left.bbox.x1 + 1 and left.bbox.y0 <= box.y0
        assert not names["toy (base)"].overlaps(names["a name as long as any that there is (base)"])
        assert [text.get_text() for text in right.texts] == ["under 1%"] * 2
        plt.close(figure)


def test_report_says_in_one_line_what_it_lacks(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu-2026-01-02.jsonl"
    write_results(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert report.main([str(path), str(tmp_path / "nope.jsonl")]) == 1
    assert capsys.readouterr() == (
        "",
        f"{tmp_path / 'nope.jsonl'}: no such file; give results that python -m bench wrote\n",
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert report.main([str(path)]) == 1
    assert capsys.readouterr() == ("", "the charts need matplotlib: pip install 'fastroberta[bench]'\n")
    assert sorted(tmp_path.iterdir()) == [path]


def test_newest_file_of_each_device(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DIRECTORY", tmp_path)
    for name in ("cpu-2026-01-02", "cpu-2026-01-10", "nvidia-h200-2025-12-31"):
        (tmp_path / f"{name}.jsonl").touch()
    assert [path.stem for path in report.find_newest()] == ["nvidia-h200-2025-12-31", "cpu-2026-01-10"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "run"}\n{"kind":\n')
    with pytest.raises(ValueError, match="line 2"):
        list(read_lines(path))


def test_a_run_says_what_ran_where(tmp_path):
    run = Run("kernels", tmp_path / "results.jsonl", CPU, {"quick": True})
    (line,) = read_lines(run.path)
    assert line["device"] == "cpu" and line["packages"]["torch"] == torch.__version__
    assert {"commit", "command", "time", "python", "cpu", "settings"} <= line.keys()


def test_a_piece_that_takes_too_long_is_ended_with_its_children(tmp_path):
    program = tmp_path / "slow.py"
    flag = tmp_path / "flag"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(flag)!r}).touch()"
    program.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n")
    begun = time.monotonic()
    assert all_pieces.run_limited([sys.executable, str(program)], 1) is None
    assert time.monotonic() - begun < 4
    time.sleep(4)
    assert not flag.exists()
    assert all_pieces.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


def test_command_line_names_the_pieces():
    done = subprocess.run([sys.executable, "-m", "bench"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and "kernels,train,learn,host,prepare,duplicates,resources,report,all,gpu" in done.stderr
    )
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and "kernels,train,learn,host,prepare,duplicates,resources,report,all,gpu" in done.stdout
        and not done.stderr
    )


def test_the_hosts_share_is_counted(capsys):
    assert host.main(["--layers", "2", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2 layers, milliseconds of one core" in shown
    micro_batch, update = (
        {what: int(number.replace(",", "")) for number, what in re.findall(r"(\d[\d,]*) (\w[^,]*)", part)}
        for part in re.search(r"micro-batch: (.*)\nupdate: (.*)", shown).groups()
    )
    parameters = len(dict(host.make_work(2)[0].named_parameters()))
    assert micro_batch["accumulations"] == parameters
    # Forward and backward: 8 operators a layer, of which four backwards sum partial results in a second kernel; embedding
    # and head.
    assert micro_batch["Triton launches"] > 2 * 10 and micro_batch["products"] >= 2 * 12
    parts = ("Triton launches", "products", "copies", "accumulations")
    kernels = int(re.search(r"1 launch for about ([\d,]+)", shown)[1].replace(",", ""))
    assert sum(micro_batch[part] for part in parts) < kernels < micro_batch["operations in all"] / 3
    assert update["operations in all"] > parameters and "1 for about" in shown


def test_kernels_are_estimated_from_a_cpus_trace():
    x = torch.ones(4, 4)

    def work():
        y = torch.empty(4, 4).copy_(x).t()
        torch._foreach_add_([y, x, y[:2]], 1.0)
        torch.nn.functional.linear(y, x)[1:].neg()

    assert estimate_kernels(record_trace(work, CPU)) == 4


def test_tables_print(capsys):
    case = make_toy({"wrong": lambda p: lambda x, w: 1.01 * x * w})
    print_case(case, measure_case(case, CPU, CEILINGS, quick=True))
    shown = capsys.readouterr().out
    assert "wrong: error of the output" in shown and OURS in shown and "1.00x" in shown
