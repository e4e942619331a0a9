"""The calculator: what it predicts, against bytes that processes really keep and send on gloo.

torchrun starts this file as those processes; each mode's process 0 prints a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastroberta_kernels.masking import mask_tokens

from fastroberta.cli.arguments import parse_arguments
from fastroberta.cli.program import run
from fastroberta.config import ModelConfig, TrainConfig
from fastroberta.costs import estimate_memory, flops_per_step, num_layer_parameters, num_parameters
from fastroberta.errors import ConfigurationError
from fastroberta.model import COMPUTE_DTYPES, RobertaForMaskedLM
from fastroberta.parallel.fsdp import FullyShardedOptimizer, shard_model
from fastroberta.parallel.processes import Processes
from fastroberta.parallel.replicated import ReplicatedOptimizer
from fastroberta.parallel.sharded import ShardedOptimizer, lay_out
from fastroberta.plan import PlanConfig, bytes_sent, count_buckets, main, predict, time_messages
from fastroberta.train import main as train

BASE = ModelConfig(vocab_size=50265, max_position_embeddings=514)
PLAIN = (torch.Tensor, torch.nn.Parameter)
# Small, and yet a megabyte a message: sums of single numbers, rounding to equal parts and barriers disappear beside it.
TINY = ModelConfig(
    vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
    max_position_embeddings=34,
)  # fmt: skip
# Mode, precision, micro-batches, gradient_checkpointing.
CASES = [
    ("none", "fp32", 2, False),
    ("optimizer", "fp32", 2, False),
    ("optimizer", "bf16", 1, False),
    ("full", "fp32", 1, False),
    ("full", "bf16", 2, True),
]


def make_config(sharding: str, precision: str, gradient_checkpointing: bool = False) -> TrainConfig:
    return TrainConfig(
        model=TINY, max_seq_length=32, sharding=sharding, precision=precision,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


# What processes really do.


def count_bytes_written() -> int:
    """By this process, to sockets among others; all processes are idle at that moment."""
    torch.distributed.barrier()
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar"))


def count_bytes_kept() -> int:
    """In all tensors that Python knows, storages once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if type(one) in PLAIN:  # a DTensor has no storage: its local tensor is found itself
            for tensor in (one, one.grad if one.is_leaf else None):
                if type(tensor) in PLAIN:
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def measure() -> None:
    """One of the processes: a step in each mode."""
    torch.distributed.init_process_group("gloo")
    processes = Processes(torch.device("cpu"), torch.distributed.get_rank(), torch.distributed.get_world_size())
    for case in CASES:
        found = measure_step(processes, *case)
        if processes.is_first:
            print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


def measure_step(
    processes: Processes, mode: str, precision: str, num_micro_batches: int, gradient_checkpointing: bool
) -> tuple[int, int]:
    """Bytes that a step sends, and bytes kept after it."""
    before = count_bytes_kept()
    config = make_config(mode, precision)
    model = RobertaForMaskedLM(TINY, 1, gradient_checkpointing).eval()  # without dropout
    model.init_weights(1)
    model.compute_dtype = COMPUTE_DTYPES[precision]
    if mode == "full":
        shard_model(model, processes)
        optimizer = FullyShardedOptimizer(model, config.optimizer, processes)
    elif mode == "optimizer":
        optimizer = ShardedOptimizer(model, config.optimizer, processes, model.compute_dtype)
    else:
        optimizer = ReplicatedOptimizer(model, config.optimizer, processes)
    batch = mask_tokens(
        torch.randint(5, 4000, (2, 32)), mask_token_id=4095, vocab_size=4096, special_token_ids=(0, 1, 2, 3, 4095),
        mlm_probability=0.15, seed=5, sample_ids=torch.arange(2),
    )  # fmt: skip

    start = count_bytes_written()
    barrier = count_bytes_written() - start
    start = count_bytes_written()
    optimizer.zero_grad()
    for index in range(num_micro_batches):
        is_last = index == num_micro_batches - 1
        with optimizer.last_backward() if is_last else contextlib.nullcontext():
            model.loss(*batch).loss.backward()
    optimizer.step(grad_scale=torch.tensor(1.0))
    return count_bytes_written() - start - barrier, count_bytes_kept() - before


@pytest.mark.slow(reason="15 seconds")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of a process's bytes")
def test_bytes_sent_and_kept_are_those_predicted():
    num_processes = 3  # the pieces are not equal
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    result = subprocess.run([*command, __file__], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(CASES)
    for (mode, precision, num_micro_batches, _), (sent, kept) in zip(CASES, lines):
        config = make_config(mode, precision)
        predicted = sum(bytes_sent(config, num_processes, num_micro_batches, "gloo"))
        print(f"{mode:9} {precision} on {num_processes}: sent {sent:,}, predicted {predicted:,.0f}")
        assert sent == pytest.approx(predicted, rel=0.01), (mode, precision)

        # Between steps nothing is computed: no activations, no 16-bit copies, nothing that FSDP2 holds for a layer.
        memory = estimate_memory(replace(config, precision="fp32"), 2, num_processes)
        predicted = memory["total"] - memory["activations"]
        if mode == "full":
            predicted -= 8 * (num_parameters(TINY) - 2 * num_layer_parameters(TINY))
        print(f"{mode:9} {precision} on {num_processes}: keeps {kept:,}, predicted {predicted:,}")
        assert kept == pytest.approx(predicted, rel=0.01), (mode, precision)


# The calculation.


def test_bytes_a_parameter():
    n, layers = num_parameters(BASE), 12 * num_layer_parameters(BASE)

    def send(mode, *arguments, **changes):
        return tuple(bytes_sent(TrainConfig(model=BASE, sharding=mode, **changes), *arguments))

    assert send("none", 8) == pytest.approx((7 / 8 * 8 * n, 0))
    assert send("none", 8, 5, "gloo") == send("none", 8)  # once a step
    assert send("optimizer", 8) == pytest.approx((7 / 8 * 4 * n, 7 / 8 * 2 * n))
    assert send("optimizer", 8, precision="fp32") == pytest.approx((7 / 8 * 4 * n, 7 / 8 * 4 * n))
    assert send("optimizer", 8, 5, "gloo") == pytest.approx((7 / 8 * 8 * n, 7 / 8 * 2 * n))
    assert send("full", 8, 5) == pytest.approx((5 * 7 / 8 * 4 * n, 5 * 7 / 8 * 4 * (n + layers)))
    for mode in ("none", "optimizer", "full"):
        assert send(mode, 1, 5) == (0, 0)


@pytest.mark.parametrize(("layers", "width"), [(6, 768), (12, 768), (24, 1024), (4, 1536)])
def test_buckets_are_those_of_the_trainer(layers, width):
    model = ModelConfig(
        vocab_size=50265, num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width,
        num_attention_heads=width // 64, max_position_embeddings=514,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in RobertaForMaskedLM(model).named_parameters()}
    assert count_buckets(model) == len(lay_out(shapes, 8))


@pytest.mark.parametrize(("nodes", "gpus", "rate"), [(1, 8, 100e9), (4, 8, 80e9), (4, 16, 100e9), (4, 1, 10e9)])
@pytest.mark.parametrize("mode", ["none", "optimizer", "full"])
def test_time_of_messages(mode, nodes, gpus, rate):
    """Bytes over the slowest link, hops around the ring, and what no computation hides."""
    config = PlanConfig(model=BASE, sharding=mode, precision="fp32", node_bandwidth=100.0, network_bandwidth=10.0)
    size = nodes * gpus
    around = (size - nodes) * 1.9e-6 + (nodes - 1) * 4e-6
    sent = bytes_sent(config, size)

    def time(compute, backward):
        return time_messages(config, nodes, gpus, sent, 1, compute, backward)

    # Messages: 18 buckets, each reduced in two rounds, or reduced in one and gathered in two messages; with FSDP2 one for
    # each of 12 layers and for the rest, three times, but for the rest's second gathering.
    total = sum(sent) / rate + {"none": 2 * 18, "optimizer": 18 + 2, "full": 3 * 13 - 1}[mode] * around
    assert time(0, 0) == pytest.approx((total, total))

    four = 4 * (size - 1) / size / rate  # seconds to reduce or to gather 4 bytes of one parameter
    table, outside = 50265 * 768, num_parameters(BASE) - 12 * num_layer_parameters(BASE)
    always = {
        "none": 2 * four * table + 2 * around,
        "optimizer": four * table + around + four * num_parameters(BASE) + 2 * around,
        "full": 2 * four * outside + 2 * around,
    }[mode]
    assert time(1e9, 1e9) == pytest.approx((total, always))
    little = total / 10
    window = (little, 0) if mode == "full" else (1e9, little)  # FSDP2 hides under everything, the others in a backward
    assert time(*window) == pytest.approx((total, total - little))


def test_what_hides_communication():
    """A network that is slower than the computing: the waiting is what is left of the messages."""
    slow = PlanConfig(model=BASE, nodes=4, gpus=1, train_batch_size=64, network_bandwidth=0.5)

    def hidden(**changes):
        found = predict(replace(slow, **changes), 4, 1)
        return (found.communication - found.exposed) / found.compute

    assert hidden(micro_batch_size=16) == pytest.approx(2 / 3)  # the backward
    assert hidden(micro_batch_size=4) == pytest.approx(2 / 3 / 4)  # that of the last micro-batch
    assert hidden(micro_batch_size=4, gradient_checkpointing=True) == pytest.approx(3 / 4 / 4)
    assert hidden(micro_batch_size=4, sharding="optimizer") == pytest.approx(2 / 3 / 4)
    assert hidden(micro_batch_size=4, sharding="full") == pytest.approx(1)
    once, often = (predict(replace(slow, sharding="full", micro_batch_size=size), 4, 1) for size in (16, 4))
    assert often.communication == pytest.approx(4 * once.communication)
    fast = replace(slow, sharding="full", network_bandwidth=5000.0)
    once, often = (predict(replace(fast, micro_batch_size=size), 4, 1) for size in (16, 4))
    assert often.exposed == pytest.approx(4 * once.exposed)  # embeddings and head come for each micro-batch


def test_one_gpu_sends_nothing():
    config = PlanConfig(model=BASE)
    assert time_messages(config, 1, 1, bytes_sent(config, 1), 1, 1.0, 1.0) == (0, 0)


def test_one_gpu_is_the_measure_of_all():
    config = PlanConfig(model=BASE, nodes=2, gpus=4, mfu=0.5, gpu_bandwidth=4.0)
    alone, cluster = predict(config, 1, 1), predict(config, 2, 4)
    assert alone.compute == pytest.approx(flops_per_step(config) / (0.5 * 989e12))
    assert alone.update == pytest.approx(44 * num_parameters(BASE) / 4e12)
    assert alone.exposed == alone.communication == 0
    assert alone.step == alone.compute + alone.update
    assert cluster.compute == pytest.approx(alone.compute / 8)
    assert cluster.update == alone.update  # every process updates everything
    assert predict(replace(config, sharding="optimizer"), 2, 4).update == pytest.approx(alone.update / 8)
    assert predict(replace(config, gradient_checkpointing=True), 1, 1).compute == pytest.approx(4 / 3 * alone.compute)


def test_micro_batch_is_the_largest_that_fits():
    config = PlanConfig(model=BASE, gpus=8, train_batch_size=1200, gpu_memory=20.0)
    found = predict(config, 1, 8)
    assert 150 % found.micro_batch_size == 0
    assert found.micro_batch_size * found.num_micro_batches == 150
    assert found.memory == estimate_memory(config, found.micro_batch_size, 8)
    assert found.memory["total"] <= 0.9 * 20 * 2**30
    larger = min(size for size in (25, 30, 50, 75, 150) if size > found.micro_batch_size)
    assert estimate_memory(config, larger, 8)["total"] > 0.9 * 20 * 2**30
    assert predict(replace(config, micro_batch_size=3), 1, 8).micro_batch_size == 3


# The program.


def test_program_prints_a_table(capsys):
    assert train(["--plan", "--nodes", "16", "--sharding=optimizer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("124,697,433 parameters, bf16, sharding optimizer; 500,000 steps of 8,192 sequences")
    assert [cell.strip() for cell in lines[5].split("   ")[-3:]] == ["1 GPU", "1 node of 8", "16 nodes of 8"]
    rows = {line[:30].strip(): line[30:].split() for line in reversed(lines[6:])}  # of equal names the first
    assert rows["sent by a GPU a step, GB"] == ["0.000", "0.655", "0.742"]
    assert rows["scaling"][0] == "100.0%"
    parts = [float(rows[name][2]) for name in ("parameters", "gradients", "optimizer", "activations")]
    assert float(rows["memory a GPU, GiB"][2]) == pytest.approx(sum(parts), abs=0.021)


@pytest.mark.parametrize(
    ("batch", "length", "scaled"),
    [
        (2048, 512, "as in the paper"),
        (8192, 128, "as in the paper"),  # as many tokens
        (1024, 512, "scaled from 2K, 4.9e-04 by the square-root rule or 3.5e-04 by the linear rule; "),
        (32768, 512, "scaled from 8K, 2.0e-03 by the square-root rule or 4.0e-03 by the linear rule; "),
    ],
)
def test_learning_rate_of_a_batch(batch, length, scaled, capsys):
    assert main(["--train_batch_size", str(batch), "--max_seq_length", str(length)]) == 0
    pairs, this = capsys.readouterr().out.splitlines()[2:4]
    assert pairs.startswith("learning rate 0.0006; ") and "0.0001 at 256, 0.0007 at 2K, 0.001 at 8K" in pairs
    assert this.startswith(f"  {batch:,} sequences of {length}: {scaled}")


def test_docs_show_what_the_program_prints(capsys):
    command = "$ python -m fastroberta.plan --nodes 16 --gpus 8\n"
    assert main(command.split()[4:]) == 0
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text()
    assert f"```\n{command}{capsys.readouterr().out}```" in page


def test_program_says_what_does_not_fit(capsys):
    assert train(["--plan", "--gpu_memory", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("too little memory on 1 GPU, 1 node of 8: ")


@pytest.mark.parametrize(
    ("arguments", "assumed"),
    [
        (["--gpu_name", "RTX 4090"], "RTX 4090 of 24 GiB at 40% of 165.2 TFLOP/s, 25.6 GB/s a GPU inside a node"),
        (["--gpu_name", "NVIDIA H100 80GB HBM3"], "HBM3 of 80 GiB at 40% of 989 TFLOP/s, 360 GB/s"),
        (["--gpu_name", "RTX 4090", "--gpu_memory", "20"], "of 20 GiB at 40% of 165.2 TFLOP/s, 25.6 GB/s"),
        (
            ["--gpu_name=A100", "--gpu_memory=70", "--gpu_bandwidth=2", "--node_bandwidth=9"],
            "A100 of 70 GiB at 40% of 312 TFLOP/s, 9 GB/s",
        ),
        ([], "H200 of 139 GiB at 40% of 989 TFLOP/s, 360 GB/s"),
    ],
)
def test_memory_and_links_follow_the_name(arguments, assumed, capsys):
    assert train(["--plan", *arguments]) == 0
    assert assumed in capsys.readouterr().out.splitlines()[1]


def test_memory_of_each_size_is_by_its_name():
    found = [PlanConfig(gpu_name=f"NVIDIA {name}") for name in ("A100-SXM4-40GB", "A100-SXM4-80GB", "H100 NVL")]
    assert [one.gpu_memory for one in found] == [40, 80, None]
    assert [one.gpu_bandwidth for one in found] == [pytest.approx(1.555 * 5 / 6), pytest.approx(2.04 * 5 / 6), None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_train_epochs", "3"], "num_train_epochs = 3: a plan has no data"),
        (["--nodes", "3"], "train_batch_size = 8192 must be a multiple of the 24 processes, which share it"),
        (["--nodes", "2", "--micro_batch_size", "1024"], "micro_batch_size = 1024 on 16 processes must divide"),
        (["--batch_ramp.start", "4", "--batch_ramp.tokens", "9"], "batch_ramp.start = 4 must be a multiple of the 8"),
        (["--gpu_name", "A100-SXM4-80GB", "--precision", "fp8"], "A100-SXM4-80GB does not multiply 8-bit numbers"),
        (["--gpu_name", "H900"], "gpu_name = H900: not a known GPU"),
        (["--gpu_name", "A100"], "are not known; give --gpu_memory, --gpu_bandwidth, --node_bandwidth\n"),
        (["--gpu_name=B200", "--gpu_memory=180", "--gpu_bandwidth=6"], "are not known; give --node_bandwidth\n"),
        (["--gpu_memory", "0"], "gpu_memory = 0.0: must lie in (0, inf)"),
        (["--mfu", "40"], "mfu = 40.0: must lie in (0, 1]"),
    ],
)  # fmt: skip
def test_program_refuses_what_the_trainer_would(arguments, message, capsys):
    assert run(lambda: train(["--plan", *arguments])) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--plan=yes", "--nodes", "--mfu"])
def test_its_settings_are_refused_without_it(word, tmp_path):
    with pytest.raises(ConfigurationError, match=r"belongs to python -m fastroberta\.plan"):
        train([word, "1"])
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: 4\n")
    with pytest.raises(ConfigurationError, match=r"cluster\.yaml:1: nodes belongs to python -m fastroberta\.plan"):
        train(["--config", str(file)])
    assert train(["--config", "roberta-base", "--config", str(file), "--plan"]) == 0


def test_program_needs_no_torch():
    code = (
        "import sys; from fastroberta.train import main; assert main(['--plan', '--nodes', '2']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_settings_of_training_are_those_of_the_plan():
    config = parse_arguments(
        ["--config", "roberta-large", "--gpus", "4", "--precision", "fp32"], PlanConfig, description="",
        default_preset="roberta-base",
    )  # fmt: skip
    assert (config.gpus, config.nodes, config.model.num_hidden_layers) == (4, 1, 24)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_table_to_its_end(unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastroberta.plan"]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_offloaded_weights_need_no_device_memory_but_the_hosts(capsys):
    arguments = ["--config=roberta-large", "--sharding=full", "--nodes=1", "--gpus=8", "--micro_batch_size=4"]
    plain, offloaded = (
        parse_arguments([*arguments, *more], PlanConfig, description="", default_preset="roberta-base")
        for more in ([], ["--cpu_offload"])
    )
    for config in (plain, offloaded):
        config.model.vocab_size, config.precision = 50265, "fp32"
    kept, needed = (estimate_memory(config, 4, 8) for config in (plain, offloaded))
    count = num_parameters(plain.model)
    assert needed["optimizer"] == 0 and needed["activations"] == kept["activations"]
    assert kept["total"] - needed["total"] == pytest.approx(24 * count / 8, rel=1e-3)
    assert main([*arguments, "--cpu_offload"]) == 0
    host = 24 * count / 2**30
    assert f"cpu_offload: the host keeps {host:.2f}, {host / 8:.2f} GiB a GPU" in capsys.readouterr().out


if __name__ == "__main__":
    measure()
