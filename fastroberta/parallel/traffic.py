"""How many bytes the processes of a run send each other in a step, and in how many messages. Needs no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..config import ModelConfig, TrainConfig
from ..costs import num_layer_parameters, num_parameters

# Of a message with gradients: large enough for full bandwidth, small enough to be sent early.
BUCKET_BYTES = 25 * 2**20


class Traffic(NamedTuple):
    """Bytes that each process sends in a step."""

    reduced: float  # gradients
    gathered: float  # weights


def bytes_sent(
    config: TrainConfig, num_processes: int, num_micro_batches: int = 1, backend: Literal["nccl", "gloo"] = "nccl"
) -> Traffic:
    """What `config.sharding` sends in a step, with the algorithms that send least; see the table in distribute.py.

    Recomputation for gradient_checkpointing gathers nothing again. Sums of a few numbers are left out: totals, norms (two
    numbers a tensor with LAMB), comparisons of the weights.

    Args:
        num_micro_batches: of each process; only `full` sends data for each of them.
        backend: gloo, which CPUs use, implements reduce-scatter as an all-reduce and sends twice as much.
    """
    model = config.model
    count = num_parameters(model)
    reduce_scatter = 8 if backend == "gloo" else 4
    if config.sharding == "none":
        reduced, gathered = 8 * count, 0
    elif config.sharding == "optimizer":
        reduced, gathered = reduce_scatter * count, (4 if config.precision == "fp32" else 2) * count
    else:
        # Layers are gathered for the forward and again for the backward; embeddings and head stay in between.
        layers = model.num_hidden_layers * num_layer_parameters(model)
        reduced, gathered = (num_micro_batches * n for n in (reduce_scatter * count, 4 * (count + layers)))
    share = (num_processes - 1) / num_processes
    return Traffic(reduced * share, gathered * share)


def count_buckets(model: ModelConfig) -> int:
    """The number of messages with a step's gradients: buckets of whole tensors, filled from the end of the model."""
    d, f = model.hidden_size, model.intermediate_size
    head, layer, positions = [d * d], [d * f, d * f, d * d, 3 * d * d], [model.max_position_embeddings * d]
    count, filled = 2, BUCKET_BYTES  # one for the word table, one for all vectors
    if not model.tie_word_embeddings:
        count += 1  # the decoder's
    for size in [*head, *model.num_hidden_layers * layer, *positions]:
        if filled + 4 * size > BUCKET_BYTES:
            count, filled = count + 1, 0
        filled += 4 * size
    return count
