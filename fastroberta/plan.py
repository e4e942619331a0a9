"""`python -m fastroberta.plan`: predict the memory, communication and speed of a run on a cluster, without training.

Memory is `costs.estimate_memory`, bytes sent are `parallel.traffic.bytes_sent`; tests/test_plan.py compares both with
what processes keep and send. Times come from a model; no cluster has been measured.

    compute    model FLOPs / (processes x mfu x peak of the GPU); a third more with gradient_checkpointing
    update     44 bytes of memory traffic for each parameter that a process updates
    a message  bytes sent / bandwidth of the slowest link, plus a latency per hop: once around the ring for a
               reduce-scatter or an all-gather, twice for an all-reduce. NCCL builds a ring for each network card of a
               node, so the cards of all its GPUs share the traffic to the next node
    hidden     none and optimizer: the reduction, by the backward pass of the last micro-batch; neither that of the word
               table, which is ready last, nor the gathering of updated weights
               full: everything, by all of the compute, except for embeddings and head, which come first and last
    step       compute + update + communication that is not hidden

Not modelled: reading data, evaluations, checkpoints, the compute that communication takes from a GPU, the batch ramp, trees
instead of rings, which NCCL may choose for all-reduces over many nodes, where they are faster, and with cpu_offload the
copies to and from the host and the update there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .cli.arguments import parse_arguments
from .cli.program import run
from .config import TrainConfig, setting
from .costs import (
    choose_micro_batch_size,
    estimate_memory,
    find_gpu,
    flops_per_step,
    num_layer_parameters,
    num_parameters,
    peak_flops,
)
from .errors import ConfigurationError
from .learning_rates import advise_on_learning_rate
from .log import format_seconds, print_line
from .parallel.traffic import Traffic, bytes_sent, count_buckets

DESCRIPTION = """Predict the memory, communication and speed of a run on a cluster, without training. Memory and bytes are
counted; times come from a model, which fastroberta/plan.py describes. The settings of the cluster come first, then those of
fastroberta.train."""
WITHOUT_FP8 = r"\b(A\d+|A10G|V100|T4|RTX A\d+|RTX 30\d+)\b"  # no 8-bit floating point in their tensor cores
WITHOUT_BF16 = r"\b(T4|V100)\b"  # their tensor cores take fp16 only
VOCABULARY = 50265  # roberta-base's, if not set: without data there is no tokenizer to ask
# Latency in seconds from GPU to GPU, inside a node and between nodes, as NCCL assumes it (hwLat in its
# src/graph/tuning.cc, for a ring and LL128, the protocol it uses for messages of this size).
NODE_HOP, NETWORK_HOP = 1.9e-6, 4.0e-6
UPDATE_BYTES = 44  # read and written per parameter by AdamW and LAMB, norm, scaling and clearing of gradients included


@dataclass
class ClusterConfig:
    """The machines that a run is planned for. Bandwidths are those measured, which are below the datasheet's."""

    nodes: int = setting(1, "number of machines", valid="[1, inf)")
    gpus: int = setting(8, "number of GPUs per machine", valid="[1, inf)")
    gpu_name: str = setting("H200", "GPU, named as PyTorch names it; decides the peak FLOP/s")
    gpu_memory: float | None = setting(
        None, "memory per GPU in GiB, a tenth of which is kept free; null: that of gpu_name", valid="(0, inf)"
    )
    gpu_bandwidth: float | None = setting(
        None, "memory bandwidth of a GPU in TB/s; null: 5/6 of gpu_name's peak", valid="(0, inf)"
    )
    mfu: float = setting(
        0.4,
        "fraction of the peak FLOP/s that forward and backward passes reach; measure it for your run",
        valid="(0, 1]",
    )
    node_bandwidth: float | None = setting(
        None, "bandwidth in GB/s from a GPU to the next in its machine; null: 80% of gpu_name's link", valid="(0, inf)"
    )
    network_bandwidth: float = setting(
        40.0, "bandwidth in GB/s per GPU to other machines; 40 is 80% of a 400 Gbit/s card per GPU", valid="(0, inf)"
    )


@dataclass
class PlanConfig(TrainConfig, ClusterConfig):
    """A training run and the cluster that it is planned for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.max_position_embeddings is None:  # that of init_from, which a plan does not read
            self.model = replace(self.model, max_position_embeddings=self.max_seq_length + 2)
        gpu = find_gpu(self.gpu_name or "")
        if gpu is None:
            return
        self.gpu_memory = gpu.memory if self.gpu_memory is None else self.gpu_memory
        if self.gpu_bandwidth is None and gpu.bandwidth is not None:
            self.gpu_bandwidth = gpu.bandwidth * 5 / 6
        if self.node_bandwidth is None and gpu.link is not None:
            self.node_bandwidth = gpu.link * 0.8

    def check(self) -> None:
        """Refuse settings that do not fit together."""
        super().check()
        if self.num_train_epochs is not None:
            raise ConfigurationError(
                f"num_train_epochs = {self.num_train_epochs:g}: a plan has no data to count the steps of an epoch; "
                "give max_steps, which train --dry-run prints"
            )
        self.check_processes(self.nodes * self.gpus)
        if peak_flops(self.gpu_name) is None:
            raise ConfigurationError(
                f"gpu_name = {self.gpu_name}: not a known GPU; known are A100, H100, H200, B200, L40S and others"
            )
        if self.precision == "fp8" and re.search(WITHOUT_FP8, self.gpu_name):
            raise ConfigurationError(f"precision = fp8: {self.gpu_name} does not multiply 8-bit numbers; use bf16")
        names = ("gpu_memory", "gpu_bandwidth", "node_bandwidth")
        if missing := [f"--{name}" for name in names if getattr(self, name) is None]:
            raise ConfigurationError(
                f"gpu_name = {self.gpu_name}: memory and links of this GPU are not known; give {', '.join(missing)}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, PlanConfig, description=DESCRIPTION, default_preset="roberta-base")
    if config.model.vocab_size is None:
        config.model.vocab_size = VOCABULARY
    if config.precision == "auto":
        config.precision = "fp16" if re.search(WITHOUT_BF16, config.gpu_name) else "bf16"
    if config.distill_from is not None:
        from .hf import read_config  # imports torch

        config.distillation.teacher_layers = read_config(Path(config.distill_from))[0].num_hidden_layers
    sizes = dict.fromkeys([(1, 1), (1, config.gpus), (config.nodes, config.gpus)])
    describe(config, [predict(config, nodes, gpus) for nodes, gpus in sizes])
    return 0


class Prediction(NamedTuple):
    """A run on some GPUs: seconds per step, and bytes of memory and of traffic per GPU."""

    nodes: int
    gpus: int
    micro_batch_size: int
    num_micro_batches: int
    memory: dict[str, int]
    sent: Traffic
    compute: float
    update: float
    communication: float
    exposed: float  # communication that is not hidden: the GPU waits for it

    @property
    def num_processes(self) -> int:
        return self.nodes * self.gpus

    @property
    def step(self) -> float:
        return self.compute + self.update + self.exposed


def predict(config: PlanConfig, nodes: int, gpus: int) -> Prediction:
    """Predict the run on some of its machines, with the largest micro-batch that fits, or else 1."""
    size = nodes * gpus
    share = config.smallest_batch_size // size
    if config.micro_batch_size == "auto":
        micro_batch_size = choose_micro_batch_size(config, share, _usable_memory(config), size)
    else:
        micro_batch_size = config.micro_batch_size
    num_micro_batches = config.train_batch_size // (size * micro_batch_size)

    peak = peak_flops(config.gpu_name)
    assert peak is not None and config.gpu_bandwidth is not None  # by check
    recomputed = config.gradient_checkpointing
    rate = size * config.mfu * peak
    own = flops_per_step(replace(config, distill_from=None)) / rate  # forward and backward; a teacher runs before them
    compute = own * (4 / 3 if recomputed else 1) + (flops_per_step(config) / rate - own)
    updated = num_parameters(config.model) / (1 if config.sharding == "none" else size)
    sent = bytes_sent(config, size, num_micro_batches)
    backward = own / num_micro_batches * (1 if recomputed else 2 / 3)
    communication, exposed = time_messages(config, nodes, gpus, sent, num_micro_batches, compute, backward)
    return Prediction(
        nodes, gpus, micro_batch_size, num_micro_batches, estimate_memory(config, micro_batch_size, size), sent,
        compute, UPDATE_BYTES * updated / (config.gpu_bandwidth * 1e12), communication, exposed,
    )  # fmt: skip


def time_messages(
    config: PlanConfig, nodes: int, gpus: int, sent: Traffic, num_micro_batches: int, compute: float, backward: float
) -> tuple[float, float]:
    """Seconds of communication per step, and how many of them the GPU waits.

    Args:
        compute, backward: seconds of compute per step and of its last backward pass, which hide communication.
    """
    if nodes * gpus == 1:
        return 0.0, 0.0
    model = config.model
    count, layers = num_parameters(model), model.num_hidden_layers
    assert config.node_bandwidth is not None  # by check
    rates = [config.node_bandwidth] if gpus > 1 else []
    rates += [config.network_bandwidth * gpus] if nodes > 1 else []
    around = (nodes * gpus - nodes) * NODE_HOP + (nodes - 1) * NETWORK_HOP

    def seconds(num_bytes: float, num_rounds: float) -> float:
        return num_bytes / (min(rates) * 1e9) + num_rounds * around

    if config.sharding == "full":
        reduced, gathered = (one / num_micro_batches for one in sent)
        outside = count - layers * num_layer_parameters(model)
        total = seconds(reduced, layers + 1) + seconds(gathered, 2 * layers + 1)
        waits = seconds(reduced * outside / count, 1) * 2  # gathered first and reduced last, 4 bytes per parameter each
        total, waits = num_micro_batches * total, num_micro_batches * waits
        return total, max(waits, total - compute)
    table = (model.vocab_size or 0) * model.hidden_size  # a bucket of its own
    buckets = count_buckets(model)
    rounds = 2 if config.sharding == "none" else 1
    reduction = seconds(sent.reduced, rounds * buckets)
    last = seconds(sent.reduced * table / count, rounds)
    gathering = seconds(sent.gathered, 2) if sent.gathered else 0.0  # matrices, and vectors
    return reduction + gathering, max(last, reduction - backward) + gathering


def describe(config: PlanConfig, predictions: list[Prediction]) -> None:
    """Print the predictions as a table."""
    peak = peak_flops(config.gpu_name) or 0.0
    print_line(
        f"{num_parameters(config.model):,} parameters, {config.precision}, sharding {config.sharding}; "
        f"{config.max_steps:,} steps of {config.train_batch_size:,} sequences of {config.max_seq_length}\n"
        f"assumed: {config.gpu_name} of {config.gpu_memory:g} GiB at {config.mfu:.0%} of {peak / 1e12:g} TFLOP/s, "
        f"{config.node_bandwidth:g} GB/s a GPU inside a node, {config.network_bandwidth:g} GB/s a GPU between nodes\n"
        f"{advise_on_learning_rate(config)}\n"
    )
    alone = predict(config, 1, 1)
    rows: list[tuple[str, list[str]]] = [("", [_name(one) for one in predictions])]

    def add(label: str, form: str, read: Callable[[Prediction], float]) -> None:
        rows.append((label, [form.format(read(one)) for one in predictions]))

    add("sequences at once", "{:,}", lambda one: one.micro_batch_size)
    add("micro-batches a step", "{:,}", lambda one: one.num_micro_batches)
    add("memory a GPU, GiB", "{:.2f}", lambda one: one.memory["total"] / 2**30)
    for part in (name for name in predictions[0].memory if name != "total"):
        add(f"  {part}", "{:.2f}", lambda one, part=part: one.memory[part] / 2**30)  # type: ignore[misc]
    add("sent by a GPU a step, GB", "{:.3f}", lambda one: sum(one.sent) / 1e9)
    add("  gradients", "{:.3f}", lambda one: one.sent.reduced / 1e9)
    add("  weights", "{:.3f}", lambda one: one.sent.gathered / 1e9)
    add("communication, ms", "{:,.1f}", lambda one: one.communication * 1e3)
    add("a step, ms", "{:,.1f}", lambda one: one.step * 1e3)
    add("  forward and backward", "{:,.1f}", lambda one: one.compute * 1e3)
    add("  waiting for communication", "{:,.1f}", lambda one: one.exposed * 1e3)
    add("  updating weights", "{:,.1f}", lambda one: one.update * 1e3)
    add("tokens/s", "{:,.0f}", lambda one: config.train_batch_size * config.max_seq_length / one.step)
    add("scaling", "{:.1%}", lambda one: alone.step / one.step / one.num_processes)
    rows.append(("all steps", [format_seconds(one.step * config.max_steps) for one in predictions]))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(predictions))]
    left = max(len(label) for label, _ in rows)
    for label, cells in rows:
        print_line(f"{label:{left}}" + "".join(f"   {cell:>{width}}" for cell, width in zip(cells, widths)))
    if config.cpu_offload:
        kept = [f"{24 * num_parameters(config.model) / one.num_processes / 2**30:.2f}" for one in predictions]
        print_line(
            f"cpu_offload: the host keeps {', '.join(kept)} GiB a GPU; copies to and from it, and updates there, are not in "
            "these times"
        )
    small = [_name(one) for one in predictions if one.memory["total"] > _usable_memory(config)]
    if small:
        print_line(f"too little memory on {', '.join(small)}: --gradient_checkpointing and --sharding full need less")


def _usable_memory(config: PlanConfig) -> float:
    assert config.gpu_memory is not None  # by check
    return 0.9 * config.gpu_memory * 2**30  # the trainer uses the same fraction


def _name(one: Prediction) -> str:
    if one.num_processes == 1:
        return "1 GPU"
    return f"{one.nodes} node{'s' if one.nodes > 1 else ''} of {one.gpus}"


if __name__ == "__main__":
    sys.exit(run(main))
