"""`--profile`: the files, the steps in them, and the table."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import prepare_text
from torch.autograd import DeviceType

from fastroberta.cli.arguments import from_dict
from fastroberta.config import TrainConfig
from fastroberta.training.profile import describe_operations
from fastroberta.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("data"), "\n\n".join(f"Sentence {i} of many." for i in range(300)), 270)


def train(data, output_dir, profile, max_steps):
    settings = {
        "precision": "fp32", "max_seq_length": 16, "packing": "contiguous", "train_batch_size": 4, "micro_batch_size": 2,
        "max_steps": max_steps, "eval_sequences": 4, "device": "cpu", "profile": profile,
        "data": str(data), "output_dir": str(output_dir),
        "model": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16,
            "max_position_embeddings": 18,
        },
        "lr_scheduler": {"warmup_steps": 1},
    }  # fmt: skip
    Trainer(from_dict(TrainConfig, settings)).train()


def read_trace(directory):
    with gzip.open(directory / "trace.json.gz") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_it_writes_a_trace_and_a_table_of_the_steps_after_the_first_three(data, tmp_path, capsys):
    train(data, tmp_path, profile=2, max_steps=7)
    names = read_trace(tmp_path / "profile")
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#3", "ProfilerStep#4"}
    for region, count in {"data": 4, "masking": 4, "forward": 4, "backward": 4, "reduce": 2, "optimizer": 2}.items():
        assert names.count(region) == count, region
    table = (tmp_path / "profile" / "operations.txt").read_text()
    first, *lines = table.splitlines()
    assert first.startswith("2 steps profiled on cpu; a step takes ")
    border = next(place for place, line in enumerate(lines) if line.startswith("operation "))
    regions, operations = lines[1:border], lines[border + 1 :]
    assert len(operations) == 10 and {line.split()[0] for line in regions} >= {"forward", "backward", "optimizer"}
    times = [float(line.split()[-3]) for line in operations]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    calls = {line.split()[0]: float(line.split()[-1]) for line in regions}
    assert calls["forward"] == 2 and calls["optimizer"] == 1
    shown = capsys.readouterr().out
    assert table in shown and f"{tmp_path / 'profile' / 'trace.json.gz'}" in shown


@pytest.mark.parametrize(
    "profile, max_steps, steps", [(0, 5, None), (5, 4, 1), (5, 3, 0)], ids=["off", "run ends", "run too short"]
)
def test_it_records_what_there_is(data, tmp_path, capsys, profile, max_steps, steps):
    train(data, tmp_path, profile, max_steps)
    directory = tmp_path / "profile"
    assert (tmp_path / f"checkpoint-{max_steps:08d}").is_dir()
    assert directory.exists() == bool(steps)
    assert ("nothing to record" in capsys.readouterr().err) == (steps == 0)
    if steps:
        assert (directory / "operations.txt").read_text().startswith(f"{steps} steps profiled")


def test_a_profile_that_cannot_be_written_does_not_end_the_run(data, tmp_path, capsys):
    (tmp_path / "profile").touch()
    train(data, tmp_path, profile=1, max_steps=5)
    assert (tmp_path / "checkpoint-00000005").is_dir()
    assert f"{tmp_path / 'profile'}: the profile cannot be written" in capsys.readouterr().err


def test_on_a_gpu_it_lists_kernels():
    def event(key, on_gpu, whole, own, is_region=False, count=2):
        kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
        return SimpleNamespace(
            key=key, count=count, device_type=kind, is_user_annotation=is_region, cpu_time_total=9e9,
            self_cpu_time_total=9e9, device_time_total=whole, self_device_time_total=own,
        )  # fmt: skip

    events = [
        event("ProfilerStep*", False, 0, 0, True), event("ProfilerStep*", True, 8000, 0, True),
        event("aten::mm", False, 6000, 6000), event("forward", False, 0, 0, True),
        event("forward", True, 8000, 0, True), event("gemm", True, 6000, 6000, count=8),
        event("layer_norm", True, 2000, 2000),
    ]  # fmt: skip
    lines = describe_operations(events, torch.device("cuda", 0)).splitlines()
    assert lines[0] == "2 steps profiled on cuda:0; the kernels of a step take 4.000 ms"
    assert [line.split() for line in lines[1:]] == [
        ["region", "ms", "share", "calls"],
        ["forward", "4.000", "100.0%", "1.0"],
        ["operation", "ms", "share", "calls"],
        ["gemm", "3.000", "75.0%", "4.0"],
        ["layer_norm", "1.000", "25.0%", "1.0"],
    ]
