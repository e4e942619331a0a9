"""The host's share of a training step, without a GPU: its time for a micro-batch, and what it launches in an eager step.

The product's model, deep and very narrow, does a forward and a backward on one CPU thread. Tensors count as a GPU's, and
Triton launches are recorded instead of started. What remains is the work that the host does before a GPU can do its own:
Python, PyTorch's dispatcher, autograd. Small products and copies do run; they take a little longer than a launch would.
Masking, one launch, is left out: its results would be needed. The update is fused AdamW's.

A CUDA graph replaces all kernels of a micro-batch by one launch, and those of an update by another.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastroberta_kernels._dispatch import record_launches
from fastroberta_kernels.masking import mask_tokens

from fastroberta.config import ModelConfig, OptimizerConfig
from fastroberta.model import WHOLE_SEQUENCE, RobertaForMaskedLM
from fastroberta.optim import build_optimizer

from .trace import estimate_kernels, record_trace

CAPABILITY = 90  # whose launches are recorded: H100
# What is counted, by PyTorch's names.
COUNTED = {
    "products": ("aten::mm", "aten::addmm"),
    "to": ("aten::to",),
    "copies": ("aten::copy_",),
    "accumulations": ("torch::autograd::AccumulateGrad",),
}


def make_work(layers: int) -> tuple[RobertaForMaskedLM, dict[str, Callable[[], Any]]]:
    """A model in bf16, its forward alone and with the backward, into flat gradients as in training, and the update."""
    config = ModelConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=34,
    )  # fmt: skip
    model = RobertaForMaskedLM(config).train()
    model.init_weights(1)
    model.compute_dtype = torch.bfloat16
    optimizer = build_optimizer(dict(model.named_parameters()), OptimizerConfig())
    optimizer.zero_grad()
    zero = torch.zeros((), dtype=torch.int64)
    ids = (4 + torch.arange(32) % 300)[None]
    masked = mask_tokens(
        ids, mask_token_id=319, vocab_size=320, special_token_ids=(0, 1, 2, 3, 319), seed=1, sample_ids=zero[None]
    )
    keys = model.dropout_keys(1, ids.device)

    def forward() -> torch.Tensor:
        return model.loss(*masked, WHOLE_SEQUENCE, keys, zero).loss

    scale = torch.ones(())
    return model, {
        "forward": forward,
        "forward and backward": lambda: forward().backward(),
        "update": lambda: optimizer.step(grad_scale=scale),
    }


def measure_host(layers: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of the processor, best and median, and how many operations of each kind a micro-batch has."""
    model, work = make_work(layers)
    milliseconds: dict[str, list[float]] = {name: [] for name in work}
    counts: dict[str, dict[str, int]] = {}
    with record_launches(CAPABILITY) as launches, model.cast_once():
        for _ in range(rounds):
            for name, run in list(work.items())[:2]:
                started = time.process_time()  # whatever else runs on this machine
                run()
                milliseconds[name].append(1e3 * (time.process_time() - started))
        launches.clear()
        events = record_trace(work["forward and backward"], torch.device("cpu"))
        counts["micro-batch"] = {"Triton launches": len(launches), **count_operations(events)}
    work["update"]()  # makes the optimizer's state; its weights are no longer those of `cast_once`
    for _ in range(rounds):
        started = time.process_time()
        work["update"]()
        milliseconds["update"].append(1e3 * (time.process_time() - started))
    counts["update"] = count_operations(record_trace(work["update"], torch.device("cpu")))
    for found in counts.values():
        found["kernels of a GPU, about"] += found.get("Triton launches", 0)
    return {
        "milliseconds": {name: (min(taken), statistics.median(taken)) for name, taken in milliseconds.items()},
        "counts": counts,
    }


def count_operations(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """PyTorch's operations in a trace, those of COUNTED and all, and the kernels that a GPU would launch for them."""
    names = Counter(event["name"] for event in events if event.get("cat") == "cpu_op")
    counts = {what: sum(names[name] for name in counted) for what, counted in COUNTED.items()}
    operations = sum(count for name, count in names.items() if name.startswith("aten::"))
    return {**counts, "operations in all": operations, "kernels of a GPU, about": estimate_kernels(events)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=12, help="of the model (default: 12)")
    parser.add_argument("--rounds", type=int, default=50, help="measurements (default: 50)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure_host(arguments.layers, arguments.rounds)
    print(f"{arguments.layers} layers, milliseconds of one core, best and median of {arguments.rounds}:")
    for name, (best, median) in found["milliseconds"].items():
        print(f"  {name:22} {best:8.2f} {median:8.2f}")
    for part, counts in found["counts"].items():
        print(f"{part}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count))
    kernels = {part: counts["kernels of a GPU, about"] for part, counts in found["counts"].items()}
    print(
        f"replayed as CUDA graphs: 1 launch for about {kernels['micro-batch']:,} of a micro-batch, besides copies of its "
        f"tensors, and 1 for about {kernels['update']:,} of an update"
    )
    return 0
