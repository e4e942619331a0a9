"""Several processes, as torchrun starts them: the same run whatever their number, and a clear end when one of them fails.

They talk over gloo on this machine; NCCL needs GPUs.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fastroberta_kernels.masking import mask_tokens
from safetensors.torch import load_file
from tiny import prepare_text, type_settings
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from fastroberta.cli.arguments import from_dict
from fastroberta.config import ModelConfig, TrainConfig
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.errors import ConfigurationError
from fastroberta.hf import save_huggingface
from fastroberta.model import RobertaForMaskedLM
from fastroberta.parallel import watchdog
from fastroberta.parallel.processes import Processes
from fastroberta.training.trainer import Trainer

STEPS = 20
SETTINGS = {
    "precision": "fp32", "max_seq_length": 32, "packing": "contiguous", "train_batch_size": 16, "micro_batch_size": 2,
    "max_steps": STEPS, "logging_steps": 5, "eval_steps": 10, "eval_sequences": 16, "save_steps": 10,
    "device": "cpu",
    "model": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64,
        "max_position_embeddings": 34, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    },
    "optimizer": {"learning_rate": 6e-4},
    "lr_scheduler": {"warmup_steps": 5},
}  # fmt: skip


def slow(*values, takes):
    return pytest.param(*values, marks=pytest.mark.slow(reason=takes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lines = [f"Number {i} comes before {i + 1}. Nobody knows why {i} does that.\n" for i in range(400)]
    return prepare_text(tmp_path_factory.mktemp("data"), "\n".join(lines), 280)


def make_settings(data, output_dir, **changes):
    settings = {**SETTINGS, "data": str(data), "output_dir": str(output_dir), **changes}
    return {**settings, "optimizer": {**SETTINGS["optimizer"], **changes.get("optimizer", {})}}


def start(processes, *arguments, launcher="fastroberta.torchrun", **environment):
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, "-m", launcher, "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*command, str(worker), *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def run_tasks(processes, directory, tasks):
    """The results of each process."""
    (directory / "tasks.json").write_text(json.dumps(tasks))
    process = start(processes, "tasks", directory)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return [json.loads((directory / f"tasks.{rank}").read_text()) for rank in range(processes)]


def read(output_dir, step=STEPS):
    checkpoint = output_dir / f"checkpoint-{step:08d}"
    return {**load_file(checkpoint / "model.safetensors"), **load_file(checkpoint / "optimizer.safetensors")}


def largest_difference(ours, theirs, step=STEPS):
    ours, theirs = read(ours, step), read(theirs, step)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


ALL_RUNS = [f"{sharding}-{name}" for sharding in ("none", "optimizer", "full") for name in ("adamw", "lamb")]


@pytest.mark.parametrize(
    "processes, runs",
    [
        (2, ["none-adamw", "optimizer-adamw", "full-lamb"]),
        slow(2, ALL_RUNS, takes="a minute"),
        slow(4, ALL_RUNS[1::2], takes="a minute"),
    ],
    ids=["2", "2, all", "4"],
)
def test_any_number_of_processes_and_any_sharding_give_the_same_weights(data, tmp_path, processes, runs):
    optimizers = {
        "adamw": {"name": "adamw", "max_grad_norm": 0.0},
        "lamb": {"name": "lamb", "max_grad_norm": 1.0},
    }
    changes = {run: {"sharding": run.split("-")[0], "optimizer": optimizers[run.split("-")[1]]} for run in runs}
    # A run that a single process began, and a batch that grows.
    changes["continued"] = {"sharding": "optimizer", "optimizer": optimizers["lamb"]}
    changes["ramp"] = {"batch_ramp": {"start": 8, "tokens": 2000}, "micro_batch_size": 1}
    tokenizer = load_tokenizer(data)
    teacher = RobertaForMaskedLM(
        ModelConfig(vocab_size=tokenizer.get_vocab_size(), **{**SETTINGS["model"], "num_hidden_layers": 4})
    )
    teacher.init_weights(7)
    save_huggingface(teacher, tokenizer, tmp_path / "teacher")
    distilled = {"distill_from": str(tmp_path / "teacher")}
    changes["optimizer-distilled"] = {"sharding": "optimizer", **distilled}
    changes["full-adamw-offload"] = {"sharding": "full", "cpu_offload": True, "optimizer": optimizers["adamw"]}
    singles = {name: {"optimizer": optimizer} for name, optimizer in optimizers.items()}
    singles |= {"ramp": changes["ramp"], "distilled": distilled}
    for name, those in singles.items():
        Trainer(from_dict(TrainConfig, make_settings(data, tmp_path / name, **those))).train()
    shutil.copytree(tmp_path / "lamb", tmp_path / "continued", ignore=shutil.ignore_patterns(f"*{STEPS:08d}"))
    tasks = [
        {"config": make_settings(data, tmp_path / name, **those)} for name, those in changes.items() if name != "ramp"
    ]
    tasks.append({"config": make_settings(data, tmp_path / "shared-ramp", **changes["ramp"])})
    results = run_tasks(processes, tmp_path, tasks)
    assert all("error" not in result for result in results[0]), results[0]
    for name in changes:
        ours = tmp_path / ("shared-ramp" if name == "ramp" else name)
        theirs = tmp_path / ("ramp" if name == "ramp" else "lamb" if name == "continued" else name.split("-")[1])
        assert largest_difference(ours, theirs) < 1e-6, name
        if name != "continued":
            losses = [
                [
                    line["eval/loss"]
                    for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
                    if "eval/loss" in line
                ]
                for path in (ours, theirs)
            ]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_single_process_offloads_to_the_host(data, tmp_path, monkeypatch):
    policies = []

    def shard(module, **settings):
        policies.append(settings["offload_policy"])
        return fully_shard(module, **settings)

    monkeypatch.setattr("fastroberta.parallel.fsdp.fully_shard", shard)
    steps = {"max_steps": 5, "save_steps": 5, "eval_steps": 5, "micro_batch_size": 8}
    changes = {"plain": {}, "offload": {"sharding": "full", "cpu_offload": True}}
    for name, those in changes.items():
        trainer = Trainer(from_dict(TrainConfig, make_settings(data, tmp_path / name, **steps, **those)))
        trainer.train()
        trainer.processes.leave()
        assert not dist.is_initialized()
    assert policies == [CPUOffloadPolicy(pin_memory=False)] * 3
    assert largest_difference(tmp_path / "plain", tmp_path / "offload", 5) < 1e-6
    with pytest.raises(ConfigurationError, match="cpu_offload needs sharding = full, not none"):
        from_dict(TrainConfig, make_settings(data, tmp_path, cpu_offload=True))


@pytest.mark.slow(reason="20 seconds")
def test_an_untied_decoder_is_sharded_like_every_other_parameter(data, tmp_path):
    untied = {"model": {**SETTINGS["model"], "tie_word_embeddings": False}}
    Trainer(from_dict(TrainConfig, make_settings(data, tmp_path / "single", **untied))).train()
    modes = ("none", "optimizer", "full")
    tasks = [{"config": make_settings(data, tmp_path / mode, sharding=mode, **untied)} for mode in modes]
    results = run_tasks(2, tmp_path, tasks)
    assert all("error" not in result for result in results[0]), results[0]
    for mode in modes:
        assert "exp_avg.decoder.weight" in read(tmp_path / mode)
        assert largest_difference(tmp_path / mode, tmp_path / "single") < 1e-6, mode


def test_half_precision_sharding_resumes_to_the_bit_and_faults_are_named(data, tmp_path):
    """bf16 weights on the wire, fp32 masters in the checkpoint; and what must not pass unnoticed."""
    changes = {"precision": "bf16", "sharding": "optimizer", "optimizer": {"learning_rate": 5e-3}}
    straight = make_settings(data, tmp_path / "straight", **changes)
    tasks = [
        {"config": straight},
        {"config": make_settings(data, tmp_path / "resumed", **changes)},
        {
            "config": make_settings(data, tmp_path / "memory", micro_batch_size="auto", max_steps=5),
            "memory_for": [8, 2],
        },
        {"config": make_settings(data, tmp_path / "flip", max_steps=10), "flip_a_bit_on": 1},
        {"config": make_settings(data, tmp_path / "seed"), "other_seed_on": 1},
        {"config": make_settings(data, tmp_path / "odd", train_batch_size=7, micro_batch_size=1)},
        {"config": make_settings(data, tmp_path / "micro", micro_batch_size=16)},
    ]
    resumed = tmp_path / "resumed"
    Trainer(from_dict(TrainConfig, make_settings(data, tmp_path / "single", **changes))).train()
    # Begun by a single process, which is not the same to the bit: only what follows is compared.
    shutil.copytree(tmp_path / "single", resumed, ignore=shutil.ignore_patterns(f"*{STEPS:08d}"))
    shutil.copytree(resumed, tmp_path / "straight")
    first, second = run_tasks(2, tmp_path, tasks)
    assert largest_difference(tmp_path / "straight", resumed) == 0
    single = read(tmp_path / "single")
    assert max((value - single[name]).abs().max() for name, value in read(resumed).items() if "exp" not in name) < 0.02
    weight = single["roberta.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())  # the masters keep what bf16 cannot
    weight = read(resumed)["roberta.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())

    assert first[2]["micro_batch_size"] == second[2]["micro_batch_size"] == 2
    for result in (first, second):
        assert "ProcessError: step 5: the weights of rank" in result[3]["error"]
        assert "rank 1: seed is 2, but 1 on rank 0" in result[4]["error"]
        assert "train_batch_size = 7 must be a multiple of the 2 processes" in result[5]["error"]
        assert "micro_batch_size = 16 on 2 processes must divide" in result[6]["error"]
    assert not list((tmp_path / "flip").glob("checkpoint-*"))


class Pretended(Processes):
    """One of several processes, without the others."""

    def collect(self, value):
        return [value] * self.size

    def add_up(self, tensor):
        return tensor


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_batch_and_mask_the_same_tokens(data, tmp_path, size):
    settings = from_dict(TrainConfig, make_settings(data, tmp_path, batch_ramp={"start": 8, "tokens": 1000}))

    def read_masked(trainer):
        found = {}
        steps = range(trainer.config.max_steps)
        for batch, _ in itertools.chain.from_iterable(map(trainer.batches.of_step, steps)):
            masked = mask_tokens(
                batch.input_ids, seed=trainer.mask_seed, sample_ids=batch.sample_ids, **trainer.masking
            )
            for row in range(len(batch.input_ids)):
                assert int(batch.first_sample) + row not in found
                found[int(batch.first_sample) + row] = [part[row].tolist() for part in masked]
        return found

    alone = read_masked(Trainer(settings))
    shared = {}
    for rank in range(size):
        part = read_masked(Trainer(settings, Pretended(torch.device("cpu"), rank, size)))
        assert not shared.keys() & part.keys() and len(part) == len(alone) / size
        shared |= part
    assert shared == alone


def test_more_processes_than_gpus_are_refused(monkeypatch):
    from fastroberta.parallel.processes import select_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto", 1) == torch.device("cuda", 1)
    assert select_device("cpu", 5) == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="there is no GPU for process 2 of this machine, which has 2"):
        select_device("cuda", 2)


def start_program(data, directory, environment=None, **changes):
    settings = make_settings(
        data, directory / "run", max_steps=1_000_000, logging_steps=1, save_steps=1_000_000, **changes
    )
    settings |= {"eval_steps": 1_000_000}
    process = start(2, "train", directory, *type_settings(settings), **(environment or {}))
    shown = []
    for line in process.stderr:
        shown.append(line)
        if line.startswith("step 3/"):
            return process
    raise AssertionError("".join(shown))


def read_number(path):
    return int(path.read_text())


def is_alive(pid):
    """Whether there is such a process, other than as an entry that its parent has yet to read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    end = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "how", [
        slow("SIGTERM to the launcher", takes="15 seconds"), slow("SIGINT to the launcher", takes="15 seconds"),
        slow("SIGTERM to PyTorch's torchrun", takes="15 seconds"),
        slow("SIGTERM to one process", takes="15 seconds"), slow("SIGKILL to the launcher", takes="10 seconds"),
        "SIGTERM to all",
    ],
)  # fmt: skip
def test_a_signal_leads_to_one_checkpoint_and_75(data, tmp_path, how):
    launcher = "torch.distributed.run" if "PyTorch" in how else "fastroberta.torchrun"
    process = start_program(data, tmp_path, {"launcher": launcher})
    pids = [read_number(tmp_path / f"pid.{rank}") for rank in range(2)]
    if how == "SIGTERM to one process":
        os.kill(pids[1], signal.SIGTERM)
    else:
        process.send_signal(signal.Signals[how.split()[0]])
    if how == "SIGTERM to all":  # as a scheduler does; the launcher sends it once more
        for pid in pids * 3:
            os.kill(pid, signal.SIGTERM)
    errors = process.stderr.read()
    process.wait(timeout=60)
    wait_until_gone(pids)
    if "SIGKILL" in how:
        assert process.returncode == -signal.SIGKILL
    else:  # PyTorch's has no code but 1
        assert process.returncode == (1 if "PyTorch" in how else 75), errors
    assert read_number(tmp_path / "exit.0") == 75
    if how != "SIGTERM to one process":  # there torchrun may end the second one when the first is gone
        assert read_number(tmp_path / "exit.1") == 75
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    assert errors.count("is saved, the same command continues") == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("fault", ["dies", slow("stops", takes="40 seconds"), slow("sleeps", takes="15 seconds")])
def test_a_process_that_fails_is_named(data, tmp_path, fault):
    environment = {"FAULT": "sleeps 1"} if fault == "sleeps" else {}
    process = start_program(data, tmp_path, environment, hang_timeout=600 if fault == "dies" else 15)
    pids = [read_number(tmp_path / f"pid.{rank}") for rank in range(2)]
    if fault != "sleeps":
        os.kill(pids[1], signal.SIGKILL if fault == "dies" else signal.SIGSTOP)
    began = time.monotonic()
    shown = []
    for line in process.stderr:
        shown.append(line)
        if line.startswith("error: "):
            break
    assert f"rank 1 (process {pids[1]} on " in line, shown
    assert ("has died" if fault == "dies" else "no progress for 15 s, the others wait for") in line
    assert time.monotonic() - began < 60  # stated: the time to wait, and some heartbeats
    if fault == "stops":
        os.kill(pids[1], signal.SIGKILL)  # as torchrun does, half a minute later
    shown += process.stderr.readlines()
    assert process.wait(timeout=60) == 7
    wait_until_gone(pids)
    if fault == "sleeps":
        assert any("time.sleep" in line or "distributed_worker.py" in line for line in shown)  # where it sleeps
    assert read_number(tmp_path / "exit.0") == 7 if fault == "dies" else not (tmp_path / "exit.0").exists()


@pytest.mark.slow(reason="45 seconds")
def test_out_of_memory_on_one_process_halves_the_micro_batch_of_all(data, tmp_path):
    """Wherever in the step it comes: what follows is what the smaller size would have given."""
    steps = 6
    lamb = {
        "optimizer": {"name": "lamb", "max_grad_norm": 1.0},
        "max_steps": steps, "logging_steps": 3, "eval_steps": steps, "save_steps": steps,
    }  # fmt: skip
    common = {"micro_batch_size": "auto", **lamb}
    faults = {
        "first": {"micro_batch": 0, "where": "forward"},
        "last": {"micro_batch": 1, "where": "forward"},
        "backward": {"micro_batch": 1, "where": "backward"},
    }
    tasks = {
        f"{sharding}-{name}": {
            "config": make_settings(data, tmp_path / f"{sharding}-{name}", sharding=sharding, **common),
            "start_with": 4, "bucket_bytes": 2**14, "short": {"rank": 1, "step": 0, "limit": 2, **fault},
        }
        for sharding in ("none", "optimizer")
        for name, fault in faults.items()
    }  # fmt: skip
    later = {**faults["backward"], "rank": 0, "step": 3, "limit": 2}
    tasks["later"] = {
        "config": make_settings(data, tmp_path / "later", **{**common, "optimizer": {"name": "adamw"}}),
        "start_with": 4, "bucket_bytes": 2**14, "short": later,
    }  # fmt: skip
    tasks["undone"] = {
        "config": make_settings(data, tmp_path / "undone", **common),
        "start_with": 1, "short": {"rank": 1, "step": 3, "limit": 0, **faults["last"]},
    }  # fmt: skip
    for name in ("none", "optimizer", "adamw"):
        changes = {**lamb, **({"optimizer": {"name": "adamw"}} if name == "adamw" else {"sharding": name})}
        tasks[name] = {"config": make_settings(data, tmp_path / name, **changes), "bucket_bytes": 2**14}
    first, second = (dict(zip(tasks, results)) for results in run_tasks(2, tmp_path, list(tasks.values())))
    for name in tasks:
        if name == "undone":
            assert "step 4: out of memory on rank 1 with a single sequence" in first[name]["error"]
            assert first[name] == second[name]
            continue
        reference = "adamw" if name == "later" else name.split("-")[0]
        difference = largest_difference(tmp_path / name, tmp_path / reference, steps)
        assert difference <= (1e-6 if name == "later" else 0), name
        assert first[name] == first[reference] and second[name] == second[reference]
        assert first[name]["micro_batch_size"] == 2 and first[name]["tokens"] > 0
        ours, theirs = (
            [json.loads(line) for line in (tmp_path / one / "metrics.jsonl").read_text().splitlines()]
            for one in (name, reference)
        )
        for one, other in zip(ours, theirs, strict=True):
            exact = {key: value for key, value in one.items() if "time" not in key and "throughput" not in key}
            assert exact == pytest.approx({key: other[key] for key in exact}, rel=1e-5, abs=1e-5)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_out_of_memory_inside_fsdp2_ends_the_run_with_5(data, tmp_path):
    process = start_program(
        data, tmp_path, {"FAULT": "memory 1"}, sharding="full", micro_batch_size="auto", hang_timeout=20
    )
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 5, errors
    said = [line for line in errors.splitlines() if line.startswith("rank 1: step ")]
    assert (
        len(said) == 1
        and "cpu has too little memory for 8 sequences at once; with a lower --micro_batch_size" in said[0]
    )
    wait_until_gone([read_number(tmp_path / f"pid.{rank}") for rank in range(2)])


@pytest.mark.slow(reason="30 seconds")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_checkpoint_may_take_longer_than_the_hang_timeout(data, tmp_path):
    task = {"config": make_settings(data, tmp_path / "slow", hang_timeout=10, save_steps=STEPS), "slow_save": 14}
    (result, _) = run_tasks(2, tmp_path, [task])
    assert "error" not in result[0]
    assert (tmp_path / "slow" / f"checkpoint-{STEPS:08d}").is_dir()


def test_a_missing_heartbeat_is_noticed_without_an_error(monkeypatch):
    """As over NCCL, where the host waits for the dead as for the living."""
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "SILENCE", 1.0)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    first, second = (watchdog.Watchdog(store, rank, 2, 600) for rank in range(2))
    ended = []
    monkeypatch.setattr(first, "_end", ended.append)
    first.note("the reduction of gradients")
    time.sleep(4)
    assert not ended  # nobody gets further, and everybody lives
    second.stop()
    end = time.monotonic() + 20
    while not ended and time.monotonic() < end:
        time.sleep(0.1)
    first.stop()
    assert ended[0].startswith("error: rank 1 (process") and "gives no sign of life" in ended[0]
