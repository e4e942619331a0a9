"""What the processes of a run send each other in a step: how many bytes, in how many messages."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..config import ModelConfig, TrainConfig
from ..costs import num_layer_parameters, num_parameters

# Of the messages in which gradients leave: large enough for full bandwidth, small enough to leave early. Not a setting; it
# stands here for plan.py, which does without torch.
BUCKET_BYTES = 25 * 2**20


class Traffic(NamedTuple):
    """Bytes that each process sends in a step."""

    reduced: float  # gradients
    gathered: float  # weights


def bytes_sent(
    config: TrainConfig, num_processes: int, num_micro_batches: int = 1, backend: Literal["nccl", "gloo"] = "nccl"
) -> Traffic:
    """What `config.sharding` sends in a step, by the algorithms that send least; see the table in sharding.py.

    Recomputation for gradient_checkpointing gathers nothing again. Left out are sums of a few numbers: totals, norms
    (LAMB's are two numbers a tensor), comparisons of the weights.

    Args:
        num_micro_batches: of each process; only `full` sends something for each.
        backend: gloo, between CPUs, reduces and scatters by an all-reduce, which is twice as much.
    """
    model = config.model
    count = num_parameters(model)
    reduce_scatter = 8 if backend == "gloo" else 4
    if config.sharding == "none":
        reduced, gathered = 8 * count, 0
    elif config.sharding == "optimizer":
        reduced, gathered = reduce_scatter * count, (4 if config.precision == "fp32" else 2) * count
    else:
        # Layers come for the forward and again for the backward; embeddings and head stay in between.
        layers = model.num_hidden_layers * num_layer_parameters(model)
        reduced, gathered = (num_micro_batches * n for n in (reduce_scatter * count, 4 * (count + layers)))
    share = (num_processes - 1) / num_processes
    return Traffic(reduced * share, gathered * share)


def count_buckets(model: ModelConfig) -> int:
    """Messages in which a step's gradients leave: sharding.py fills buckets with whole tensors, from the model's end."""
    d, f = model.hidden_size, model.intermediate_size
    head, layer, positions = [d * d], [d * f, d * f, d * d, 3 * d * d], [model.max_position_embeddings * d]
    count, filled = 2, BUCKET_BYTES  # the word table, and all vectors
    for size in [*head, *model.num_hidden_layers * layer, *positions]:
        if filled + 4 * size > BUCKET_BYTES:
            count, filled = count + 1, 0
        filled += 4 * size
    return count
