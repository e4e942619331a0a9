"""Which precision a run takes, on this CPU and on GPUs and CPUs that are not here."""

import pytest
import torch

from fastroberta import precision
from fastroberta.errors import ConfigurationError
from fastroberta.precision import settle_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def rates(monkeypatch):
    """The speed of products, by dtype."""
    rates = {torch.float32: 80e9, torch.bfloat16: 0.8e9, torch.float16: 0.9e9}
    monkeypatch.setattr(precision, "measure_matmul_flops", lambda device, dtype, **_: rates[dtype])
    return rates


def test_a_cpu_takes_what_it_is_fast_in(rates):
    chosen, reason = settle_precision("auto", CPU)
    assert (chosen, reason) == ("fp32", "a core multiplies bf16 at 0.8 GFLOP/s, fp32 at 80.0")
    rates[torch.bfloat16] = 200e9
    assert settle_precision("auto", CPU)[0] == "bf16"


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_what_is_asked_for_runs_with_a_warning_where_it_is_slow(rates, asked):
    chosen, reason = settle_precision(asked, CPU)
    assert chosen == asked and reason.startswith("as asked, but slow: ") and "fp32 at 80.0" in reason
    rates[torch.bfloat16] = rates[torch.float16] = 200e9
    assert settle_precision(asked, CPU) == (asked, "as asked")
    assert settle_precision("fp32", CPU) == ("fp32", "as asked")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_a_gpu_takes_what_its_tensor_cores_take(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert settle_precision("auto", GPU)[0] == expected
    assert settle_precision("fp32", GPU) == ("fp32", "as asked")


@pytest.mark.parametrize(("asked", "before"), [("fp8", None), ("auto", "fp8")])
def test_fp8_is_for_gpus_that_multiply_it(monkeypatch, asked, before):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert settle_precision(asked, GPU, before)[0] == "fp8"
    assert settle_precision("auto", GPU)[0] == "bf16"  # never by itself
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(
        ConfigurationError, match="precision = fp8: needs a GPU of sm_89 or later, and this one is sm_86"
    ):
        settle_precision(asked, GPU, before)


def test_a_cpu_says_that_it_emulates_fp8():
    assert settle_precision("fp8", CPU)[1].startswith("as asked, but slow: a CPU emulates it")


def test_a_run_keeps_its_precision_on_another_machine(rates):
    assert settle_precision("auto", CPU, before="bf16") == ("bf16", "as in the checkpoint")
