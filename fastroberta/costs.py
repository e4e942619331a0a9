"""What a training step costs: parameters, floating-point operations and memory, and the peak to compare them with.

n tokens, m masked tokens, L layers, width d, MLP width f, vocabulary V, s tokens of attention span.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from .config import ModelConfig, TrainConfig


def num_parameters(model: ModelConfig) -> int:
    """Number of parameters with the head, a tied decoder counted once; roberta-base with 50265 ids has 124,697,433."""
    d, vocabulary = model.hidden_size, _vocabulary(model)
    norm = 2 * d
    embeddings = (vocabulary + model.max_position_embeddings + model.type_vocab_size) * d + norm
    head = (d * d + d) + norm + vocabulary + (0 if model.tie_word_embeddings else vocabulary * d)
    return embeddings + model.num_hidden_layers * num_layer_parameters(model) + head


def num_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one encoder layer."""
    d, f = model.hidden_size, model.intermediate_size
    norm = 2 * d
    return 4 * (d * d + d) + norm + (d * f + f) + (f * d + d) + norm


def model_flops_per_step(model: ModelConfig, num_tokens: int, num_masked: int, sum_of_squared_lengths: int) -> int:
    """Floating-point operations that a training step needs, forward and backward, however it is executed.

    6 L (4 d^2 + 2 d f) n for the matrix products with weights, 12 L d sum(s^2) for attention, and
    6 m (d^2 + d V) for the head, which only masked tokens need (PaLM, arXiv 2204.02311, appendix B, with a
    bidirectional attention and this head). Padding, embeddings and recomputation are not counted.

    Args:
        num_tokens: n, real tokens of the step.
        num_masked: m of them.
        sum_of_squared_lengths: over all spans in which tokens see each other (sequences, or documents).
    """
    d, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    weights = 6 * layers * (4 * d * d + 2 * d * f) * num_tokens
    attention = 12 * layers * d * sum_of_squared_lengths
    head = 6 * num_masked * (d * d + d * _vocabulary(model))
    return weights + attention + head


def _vocabulary(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is not set; take it from the tokenizer")
    return model.vocab_size


class GPU(NamedTuple):
    """The datasheet of a GPU. A size is None if the GPU is sold in several sizes, or with links of several speeds."""

    teraflops: float  # dense bf16 products with fp32 sums, TFLOP/s; fp16 for GPUs without bf16
    # GiB. Datasheets give GB; with a tenth kept free anyway they are taken as GiB, except the H200's 141.
    memory: float | None = None
    bandwidth: float | None = None  # of the memory, TB/s
    link: float | None = None  # to the next GPU, one way, over NVLink or else PCIe, GB/s


# By the name that torch.cuda.get_device_name gives; the first match counts.
_GPUS = {
    r"\bGB[23]00\b": GPU(2500.0),
    r"\bB[23]00\b": GPU(2250.0),
    r"\bH200 NVL\b": GPU(835.5, 139.0, 4.8, 450.0),
    r"\bH200\b": GPU(989.0, 139.0, 4.8, 450.0),
    r"\bH100 NVL\b": GPU(835.5),
    r"\bH100 PCIe\b": GPU(756.0),
    r"\bH100\b": GPU(989.0, 80.0, 3.35, 450.0),
    r"\b(GH200|H800)\b": GPU(989.0),
    r"\bH20\b": GPU(148.0),
    r"\bA100-SXM4-80GB\b": GPU(312.0, 80.0, 2.04, 300.0),
    r"\bA100-SXM4-40GB\b": GPU(312.0, 40.0, 1.555, 300.0),
    r"\b(A100|A800)\b": GPU(312.0),
    r"\bA30\b": GPU(165.0),
    r"\bA40\b": GPU(149.7),
    r"\bA10G\b": GPU(70.0),
    r"\bA10\b": GPU(125.0, 24.0, 0.6, 32.0),
    r"\bL40S\b": GPU(362.0, 48.0, 0.864, 32.0),
    r"\bL40\b": GPU(181.0, 48.0, 0.864, 32.0),
    r"\bL4\b": GPU(121.0, 24.0, 0.3, 32.0),
    r"\bRTX 6000 Ada\b": GPU(364.0, 48.0, 0.96, 32.0),
    r"\bRTX A6000\b": GPU(154.8),
    r"\bRTX 5090$": GPU(209.5, 32.0, 1.79, 64.0),
    r"\bRTX 4090$": GPU(165.2, 24.0, 1.01, 32.0),
    r"\bRTX 3090$": GPU(71.0, 24.0, 0.936, 32.0),
    r"\bV100-PCIE": GPU(112.0),
    r"\bV100\b": GPU(125.0),
    r"\bT4\b": GPU(65.0, 16.0, 0.32, 16.0),
}


def find_gpu(device_name: str) -> GPU | None:
    """The datasheet of a GPU named as torch.cuda.get_device_name does.

    None for a GPU that is not listed and for a slice of one (MIG), of which the datasheet says nothing.
    """
    if "MIG" in device_name:
        return None
    return next((gpu for pattern, gpu in _GPUS.items() if re.search(pattern, device_name)), None)


def peak_flops(device_name: str) -> float | None:
    """The denominator of MFU in every precision, fp8 too: FLOP/s of dense bf16 products, from the datasheet.

    None for GPUs that `find_gpu` does not know; measure with `precision.measure_matmul_flops` instead.
    """
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.teraflops * 1e12


def training_flops(config: TrainConfig, num_tokens: int, num_masked: int, sum_of_squared_lengths: int) -> int:
    """`model_flops_per_step` of a run's model and, with `distill_from`, of its teacher's forward, which is a third."""
    sizes = num_tokens, num_masked, sum_of_squared_lengths
    teacher = _teacher(config)
    return model_flops_per_step(config.model, *sizes) + (model_flops_per_step(teacher, *sizes) // 3 if teacher else 0)


def _teacher(config: TrainConfig) -> ModelConfig | None:
    if config.distill_from is None:
        return None
    return replace(config.model, num_hidden_layers=config.distillation.teacher_layers)


def flops_per_step(config: TrainConfig) -> int:
    """`training_flops` of the whole batch, with full sequences and attention over each whole sequence."""
    tokens = config.train_batch_size * config.max_seq_length
    masked = config.train_batch_size * _masked_per_sequence(config)
    return training_flops(config, tokens, masked, tokens * config.max_seq_length)


def estimate_memory(config: TrainConfig, micro_batch_size: int, num_processes: int = 1) -> dict[str, int]:
    """Peak memory of a step in bytes per device, by purpose, and their "total".

    For n fp32 parameters and N processes (a single process shards nothing):

        sharding    parameters       gradients        optimizer
        none        4 n              4 n              8 n for the moments
        optimizer   4 n              4 n + 8 n / N    12 n / N, master weights included; a process keeps its part of the
                                                      gradient both as received and as the update rule needs it
        full        4 n / N + 4 g    8 n / N + 4 g    12 n / N; g is what FSDP2 gathers at a time: embeddings, head, the
                                                      layer in use and the next one
        cpu_offload 4 g              4 g              -; the host keeps 4 n / N, 8 n / N and 12 n / N

    - half precision adds 2 n to the parameters in every mode, for the copy that it computes with; with
      gradient_checkpointing, only for embeddings, head and one layer
    - fp8 adds 2 n more for the layers' weights, which are kept in 8 bits in two layouts
    - activations: per token and layer the input, q, k, v, the output of attention, both sums before LayerNorm and the
      output of the first LayerNorm (8 d numbers), and the MLP before and after GELU (2 f numbers); with
      gradient_checkpointing the input of each layer, and one whole layer. Attention matrices are never stored, and logits
      exist for at most 4096 masked tokens at once.
    - with distill_from, the teacher: its tables in fp32, its layers and its decoder in the precision of the run, and for
      the soft targets 512 logits in fp32 five times and the gradient of the decoder. Its activations are gone before the
      student's exist.

    The estimate serves to choose a micro-batch: allocator, libraries and workspaces need more on top, while the last
    layer, which computes masked rows only, is counted in full. Buffers that receive weights after the activations are
    freed do not count.
    """
    model = config.model
    d, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    count, layer_count = num_parameters(model), num_layer_parameters(model)
    outside = count - layers * layer_count  # embeddings and head
    part = -(-count // num_processes)
    whole = outside + min(layers, 2) * layer_count  # at a time, under FSDP2
    if config.cpu_offload:
        parameters, gradients, optimizer = 4 * whole, 4 * whole, 0
    elif num_processes == 1 or config.sharding == "none":
        parameters, gradients, optimizer = 4 * count, 4 * count, 8 * count
    elif config.sharding == "optimizer":
        parameters, gradients, optimizer = 4 * count, 4 * count + 8 * part, 12 * part
    else:
        parameters, gradients, optimizer = 4 * part + 4 * whole, 8 * part + 4 * whole, 12 * part

    width = 4 if config.precision == "fp32" else 2
    if width == 2:
        parameters += 2 * (outside + (1 if config.gradient_checkpointing else layers) * layer_count)
    if config.precision == "fp8":
        parameters += 2 * (1 if config.gradient_checkpointing else layers) * layer_count
    tokens = micro_batch_size * config.max_seq_length
    masked = micro_batch_size * _masked_per_sequence(config)
    layer = (8 * d + 2 * f) * tokens * width
    kept = layers * d * tokens * width + layer if config.gradient_checkpointing else layers * layer
    head = 3 * d * masked * width + min(masked, 4096) * _vocabulary(model) * 4
    parts = {
        "parameters": parameters, "gradients": gradients, "optimizer": optimizer, "activations": kept + head
    }  # fmt: skip
    if (teacher := _teacher(config)) is not None:
        vocabulary = _vocabulary(model)
        decoder = 2 * d * vocabulary if width == 2 else 0
        soft_targets = 5 * 4 * min(masked, 512) * vocabulary + 4 * d * vocabulary
        parts["teacher"] = 4 * outside + width * teacher.num_hidden_layers * layer_count + decoder + soft_targets
    return parts | {"total": sum(parts.values())}


def choose_micro_batch_size(config: TrainConfig, num_sequences: int, memory: float, num_processes: int = 1) -> int:
    """The largest divisor of a process's `num_sequences` whose step should fit into `memory` bytes; 1 if none does."""
    sizes = [size for size in range(1, num_sequences + 1) if num_sequences % size == 0]
    return max((one for one in sizes if estimate_memory(config, one, num_processes)["total"] <= memory), default=1)


def _masked_per_sequence(config: TrainConfig) -> int:
    return round(config.mlm_probability * (config.max_seq_length - 2))  # <s> and </s> are never masked
