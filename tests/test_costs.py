"""What a step costs: operations, sizes, memory, and the rate to hold them against."""

from __future__ import annotations

import pytest
import torch

from fastroberta.config import ModelConfig, TrainConfig
from fastroberta.costs import (
    choose_micro_batch_size,
    estimate_memory,
    find_gpu,
    flops_per_step,
    model_flops_per_step,
    num_layer_parameters,
    num_parameters,
    peak_flops,
)
from fastroberta.model import RobertaForMaskedLM
from fastroberta.precision import measure_matmul_flops

BASE = ModelConfig(vocab_size=50265, max_position_embeddings=514)
LARGE = ModelConfig(
    vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    max_position_embeddings=514,
)  # fmt: skip


# Operations and sizes.


@pytest.mark.parametrize(("model", "mega"), [(BASE, 601.5), (LARGE, 2010.2)])
def test_flops_a_token_at_512_and_15_percent(model, mega):
    n = 512 * 1000
    assert model_flops_per_step(model, n, n * 15 // 100, n * 512) / n / 1e6 == pytest.approx(mega, abs=0.05)


def test_flops_are_those_that_pytorch_counts():
    """PyTorch counts every matrix product of a toy encoder with the same shapes, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    d, f, length, masked, v = 32, 80, 16, 5, 50  # f is not 4 d on purpose
    weights = [torch.randn(shape, requires_grad=True) for shape in ((d, 3 * d), (d, d), (d, f), (f, d), (d, d), (d, v))]
    x = torch.randn(length, d, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        q, k, value = (x @ weights[0]).split(d, dim=1)
        hidden = (q @ k.T).softmax(1) @ value @ weights[1] @ weights[2] @ weights[3]
        (hidden[:masked] @ weights[4] @ weights[5]).sum().backward()
    model = ModelConfig(vocab_size=v, hidden_size=d, num_hidden_layers=1, num_attention_heads=1, intermediate_size=f,
                        max_position_embeddings=514)  # fmt: skip
    assert counter.get_total_flops() == model_flops_per_step(model, length, masked, length**2)


def test_number_of_parameters():
    assert num_parameters(BASE) == 124_697_433  # measured on transformers' model
    assert num_parameters(LARGE) == 355_412_057
    untied = ModelConfig(vocab_size=128, num_hidden_layers=1, tie_word_embeddings=False, type_vocab_size=2,
                         max_position_embeddings=514)  # fmt: skip
    assert num_parameters(untied) == sum(one.numel() for one in RobertaForMaskedLM(untied).parameters())
    with pytest.raises(ValueError, match="vocab_size is not set"):
        num_parameters(ModelConfig(max_position_embeddings=514))


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another chip under a similar name
        ("NVIDIA H200 MIG 1g.18gb", None),  # a slice
        ("NVIDIA A1000", None),  # not the A100
        ("cpu", None),
    ],
)
def test_peak_flops(name, tera):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_measured_matmul_rate_is_what_a_matmul_reaches():
    rate = measure_matmul_flops("cpu", torch.float32, seconds=0.1)
    assert 1e8 < rate < 1e14


def test_memory_estimate():
    config = TrainConfig(model=BASE, precision="fp32")
    parts = estimate_memory(config, 4)
    assert parts["parameters"] + parts["gradients"] + parts["optimizer"] == 16 * num_parameters(BASE)
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    per_layer = (8 * 768 + 2 * 3072) * 4 * 512 * 4
    assert 12 * per_layer < parts["activations"] < 1.1 * 12 * per_layer  # the head, logits included, is the rest
    config.precision = "bf16"
    half = estimate_memory(config, 4)
    assert half["parameters"] == 6 * num_parameters(BASE)
    assert half["activations"] == pytest.approx(parts["activations"] / 2, rel=0.1)
    assert estimate_memory(config, 8)["parameters"] == half["parameters"]
    eight = estimate_memory(TrainConfig(model=BASE, precision="fp8"), 4)
    assert eight["parameters"] - half["parameters"] == 2 * 12 * num_layer_parameters(BASE)
    assert eight["activations"] == half["activations"]
    config.gradient_checkpointing = True
    assert estimate_memory(config, 4)["activations"] < half["activations"] / 3
    copy = half["parameters"] - estimate_memory(config, 4)["parameters"]
    assert copy == 2 * 11 * num_layer_parameters(BASE)  # one layer's at a time is left


@pytest.mark.parametrize(
    ("sharding", "replicated", "divided"), [("none", 16, 0), ("optimizer", 8, 20), ("full", 0, 24)]
)
def test_memory_estimate_of_several_processes(sharding, replicated, divided):
    """Bytes a parameter, as tests/test_plan.py finds them in processes of a model."""
    config = TrainConfig(model=BASE, precision="fp32", sharding=sharding)
    n, layer = num_parameters(BASE), num_layer_parameters(BASE)
    for num_processes in (2, 8, 128):
        parts = estimate_memory(config, 4, num_processes)
        kept = parts["total"] - parts["activations"]
        if sharding == "full":  # whole: embeddings, head and two layers, weights and gradients
            kept -= 8 * (n - 10 * layer)
        assert kept == pytest.approx((replicated + divided / num_processes) * n, abs=32)
        assert parts["activations"] == estimate_memory(config, 4)["activations"]
    assert estimate_memory(config, 4)["total"] == estimate_memory(TrainConfig(model=BASE, precision="fp32"), 4)["total"]


def test_flops_of_a_step():
    config = TrainConfig(model=BASE, train_batch_size=8192)  # sequences of 512 tokens
    assert flops_per_step(config) == pytest.approx(8192 * 512 * 601.5e6, rel=0.01)


# Files.


@pytest.mark.gpu
def test_measured_rate_is_below_the_datasheet():
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        pytest.skip("this GPU is not in the table")
    assert 0.2 * peak < measure_matmul_flops("cuda", torch.bfloat16) < 1.05 * peak


def test_one_table_says_what_a_gpu_has():
    assert find_gpu("NVIDIA H200") == (989.0, 139.0, 4.8, 450.0)
    assert find_gpu("NVIDIA H100 PCIe").memory is None  # sold with several
    assert find_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_the_largest_micro_batch_that_fits():
    config = TrainConfig(model=BASE)
    needed = {size: estimate_memory(config, size)["total"] for size in (1, 8, 12)}
    assert choose_micro_batch_size(config, 24, needed[12]) == 12
    assert choose_micro_batch_size(config, 24, needed[12] - 1) == 8
    assert choose_micro_batch_size(config, 24, needed[1] / 2) == 1
