"""Which precision to train in, and whether with the kernels: the fastest in a short trial on the task's own examples.

Neither has one right answer on a CPU. In narrow models the kernels and the casts of autocast cost more than they save, in
wide ones they pay, and where the line runs depends on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from fastroberta_kernels import huggingface
from torch import Tensor

from ..precision import settle_precision
from .examples import Examples, count_tokens
from .finetune_settings import FinetuneConfig
from .finetune_train import Place, load_model

LAYERS = 2  # all layers are alike
TOKENS = 512  # of a batch on a CPU, so that a wide model is through in seconds
SECONDS = 1.5  # after which no further round begins
ROUNDS = 5  # at most, after one to warm up
MARGIN = 1.1  # how much faster anything else must be than plain fp32 without kernels


def choose_place(
    config: FinetuneConfig, device: torch.device, kind: str, labels: Sequence[str], train: Examples, collate: Callable
) -> tuple[Place, str, dict[str, float]]:
    """How to train, why, and the tokens per second of each way that was tried, by its name; none if there is only one.

    What the settings fix is kept, but kernels that were asked for are compared with the same training without them.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    precisions = [settle_precision(config.precision, device)[0]]
    if config.precision == "auto" and precisions == ["bf16"] and device.type == "cpu":
        precisions.append("fp32")
    with_kernels = (True, False) if config.kernels else (False,)
    ways = [Place(device, precision, kernels) for precision in precisions for kernels in with_kernels]
    if len(ways) == 1:
        return ways[0], "as asked", {}
    model = load_model(config.checkpoint, kind, labels, num_hidden_layers=LAYERS).to(device).train()
    # Texts of usual length, and of similar length: padding would blur the comparison.
    ordered = sorted(train.features, key=count_tokens)
    size = config.micro_batch_size or config.train_batch_size
    if device.type == "cpu":
        size = min(size, max(1, TOKENS // collate([ordered[len(ordered) // 2]])["input_ids"].numel()))
    batch = collate(ordered[len(ordered) // 2 :][:size])
    speeds = measure_speeds(ways, model, {name: tensor.to(device) for name, tensor in batch.items()})
    *others, plain = (way for way in ways if config.kernels in ("auto", way.kernels))
    if not others:
        return plain, "as asked", speeds
    fastest = max(others, key=lambda way: speeds[str(way)])
    if speeds[str(fastest)] > MARGIN * speeds[str(plain)]:
        return fastest, "the fastest", speeds
    return plain, "nothing else is a tenth faster", speeds


def measure_speeds(ways: Sequence[Place], model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """Tokens per second of forward and backward in each way, by its name: the best of several rounds, taken in turn.

    On a CPU, of one thread's own time: what else runs on the machine must not decide. The model keeps its own forwards.
    """
    device = ways[0].device
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    num_tokens = int(batch["attention_mask"].sum())

    def read_clock() -> float:
        if device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    def time_step(way: Place) -> float:
        applied = huggingface.apply(model) if way.kernels else None
        started = read_clock()
        with torch.autocast(device.type, way.dtype, enabled=way.dtype is not None):
            outputs = model(**inputs)
        torch.stack([logits.float().square().mean() for logits in outputs.to_tuple()]).sum().backward()
        seconds = read_clock() - started
        model.zero_grad()
        if applied:
            applied.revert()
        return seconds

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for way in ways:  # compiles, and fills caches
            time_step(way)
        end, rounds = read_clock() + SECONDS, [[time_step(way) for way in ways]]
        while len(rounds) < ROUNDS and read_clock() < end:
            rounds.append([time_step(way) for way in ways])
    finally:
        torch.set_num_threads(num_threads)
    return {str(way): round(num_tokens / min(seconds), 1) for way, seconds in zip(ways, zip(*rounds))}


def describe_choice(place: Place, why: str, speeds: dict[str, float]) -> str:
    """What was chosen and why, in one line."""
    where = "a core" if place.device.type == "cpu" else "the GPU"
    tried = "; ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
    trial = f" (trial of {LAYERS} layers, tokens/s on {where}: {tried})" if speeds else ""
    return f"training in {place}: {why}{trial}"
