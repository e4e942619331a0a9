"""Every kernel compiled ahead of time for every chip: no error, no spill, no block larger than the chip."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import each_branch
import pytest
import torch
from fastroberta_kernels import _dispatch, attention, cross_entropy, embedding, gelu, layer_norm, masking, rotary

from bench.resources import (
    CHIPS,
    KERNEL_MODULES,
    Resources,
    count_loop_instructions,
    count_resident_blocks,
    count_turns,
    measure_resources,
)

ROOT = Path(__file__).parents[2]


def run_resources(*modules: str, path: str = "") -> subprocess.CompletedProcess:
    """The table, made in a process of its own. TRITON_INTERPRET is inherited here on purpose: it must not matter."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "bench.resources", *modules]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def list_launched_kernels() -> set[str]:
    """The kernels that the wrappers start, read from their sources."""
    kernels = set()
    for name in KERNEL_MODULES:
        source = Path(importlib.util.find_spec(f"fastroberta_kernels.{name}").origin).read_text()
        found = re.findall(r"\blaunch\(\s*(\w+)", source)
        assert found, f"{name}: no launch found"
        kernels |= set(found)
    return kernels


def test_every_branch_of_every_kernel_compiles():
    """Once, for one chip. Other data types, sizes and chips: the next test."""
    rows = measure_resources(["each_branch:launch_cases"], [each_branch.CHIP])
    assert [row for row in rows if row.fault] == []
    assert list_launched_kernels() <= {row.kernel.split(".")[1] for row in rows}
    # Dropout's integer work takes more instructions; one of 64 x 128 tiles on a H100 was counted at 0.220 and 0.125 ms.
    floors = {
        "DROPOUT=True" in row.configuration: row for row in rows if row.loop and "attention_backward" in row.kernel
    }
    assert floors[True].loop > floors[False].loop and 0.05 < floors[False].issue_ms < floors[True].issue_ms < 2


@pytest.mark.slow(reason="15 minutes on two cores")
def test_every_kernel_fits_every_data_center_chip():
    done = run_resources("--chips", "80", "90", "100")
    print(done.stdout.splitlines()[-1] if done.stdout else done.stderr)  # how many, in what time
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "FAULT" not in done.stdout
    for kernel in list_launched_kernels():
        for target in (80, 90, 100):
            row = rf"^\w+\.{kernel} .* sm_{target} "
            assert re.search(row, done.stdout, re.MULTILINE), f"{kernel}: not on sm_{target}"


def shift(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that start one element behind a 16-byte border, as a view into a larger tensor may."""
    numel = torch.Size(shape).numel()
    return torch.zeros(numel + 1, dtype=dtype)[1:].view(shape).requires_grad_(dtype.is_floating_point)


@pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
def test_no_kernel_is_launched_with_unaligned_tensors():
    """Triton would compile kernels that no launch case reaches: wrappers copy such tensors, gradients included."""
    ids, lengths = shift(2, 16, dtype=torch.int64), shift(3, dtype=torch.int32)
    seed, vectors = shift(2, dtype=torch.int64), [shift(48) for _ in range(3)]
    calls = [
        lambda: layer_norm.layer_norm(shift(5, 48), *vectors[:2], impl="triton"),
        lambda: layer_norm.dropout_add_layer_norm(
            shift(5, 48), shift(5, 48), *vectors[:2], x_bias=vectors[2], p=0.1, seed=seed, impl="triton"
        ),
        lambda: gelu.bias_gelu(shift(5, 48), vectors[0], impl="triton"),
        lambda: gelu.geglu(shift(5, 46), shift(46), impl="triton"),
        lambda: torch.stack(
            rotary.apply_rotary(*(shift(5, 2, 12) for _ in range(2)), *(shift(5, 6) for _ in range(2)), impl="triton")
        ),
        lambda: embedding.embedding_layer_norm(
            ids,
            shift(9, 48),
            shift(20, 48),
            shift(2, 48),
            *vectors[:2],
            token_type_ids=ids,
            position_ids=ids,
            p=0.1,
            seed=seed,
            impl="triton",
        ),
        lambda: attention.attention(
            *(shift(3, 16, 2, 32) for _ in range(3)), key_lengths=lengths, dropout_p=0.1, seed=seed, impl="triton"
        ),
        lambda: attention.varlen_attention(
            *(shift(16, 2, 32) for _ in range(3)), lengths, lengths, 16, 16, dropout_p=0.1, seed=seed, impl="triton"
        ),
        lambda: (
            cross_entropy.linear_cross_entropy(
                shift(5, 48), shift(9, 48), shift(9), shift(5, dtype=torch.int64), reduction="none", impl="triton"
            ).loss
        ),
        lambda: (
            masking.mask_tokens(
                ids,
                mask_token_id=4,
                vocab_size=9,
                special_token_ids=shift(2, dtype=torch.int64),
                seed=seed,
                sample_ids=shift(2, dtype=torch.int64),
                impl="triton",
            ).positions
        ),
    ]
    for call in calls:
        with _dispatch.record_launches() as launches:
            y = call()
            if y.requires_grad:
                y.backward(shift(*y.shape, dtype=y.dtype).detach())
        assert launches
        for launch in launches:
            for name, value in zip(launch.kernel.arg_names, launch.arguments):
                aligned = not isinstance(value, torch.Tensor) or value.data_ptr() % 16 == 0
                assert aligned, f"{launch.kernel.__name__}: {name}"


BAD_KERNELS = """
import torch
import triton
import triton.language as tl
from fastroberta_kernels._dispatch import launch


@triton.jit
def spilling_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    a = tl.arange(0, COUNT)[:, None]
    x = tl.load(x_ptr + a * COUNT + tl.arange(0, COUNT)[None, :])
    y = tl.load(y_ptr + a * COUNT + tl.arange(0, COUNT)[None, :])
    total = tl.sum(x, axis=0)[None, :] + tl.sum(y, axis=1)[:, None]
    tl.store(x_ptr + a * COUNT + tl.arange(0, COUNT)[None, :], x * total + y)
    tl.store(y_ptr + a * COUNT + tl.arange(0, COUNT)[None, :], y * total + x)


@triton.jit
def large_kernel(x_ptr, count, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    total = tl.zeros((COUNT, COUNT), dtype=tl.float32)
    for index in range(count):
        total = tl.dot(tl.load(x_ptr + index + offsets), tl.load(x_ptr + index * COUNT + offsets), total)
    tl.store(x_ptr + offsets, total)


@triton.jit
def wrong_kernel(x_ptr, COUNT: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, COUNT), tl.no_such_function(x_ptr))


@triton.jit
def good_kernel(x_ptr, count, COUNT: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, COUNT), 0.0, mask=tl.arange(0, COUNT) < count)


def launch_cases():
    x = torch.zeros(512 * 512)
    yield lambda: launch(spilling_kernel, (1,), x, x, COUNT=64, num_warps=1)
    yield lambda: launch(large_kernel, (1,), x, 32, COUNT=64, num_warps=4, num_stages=12)
    yield lambda: launch(wrong_kernel, (1,), x, COUNT=16)
    for count in (1, 16, 32, 7, 9, 2**40):  # the JIT makes four of these: 1, divisible by 16, 32 bits, 64 bits
        yield lambda count=count: launch(good_kernel, (1,), x, count, COUNT=16)
"""


def test_faults_are_found_and_named(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    done = run_resources("bad_kernels:launch_cases", path=str(tmp_path))
    assert done.returncode == 1, done.stderr
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    for target in CHIPS:
        for kernel, message in (
            ("spilling_kernel", r"spills \d+ bytes"),
            ("large_kernel", r"bytes of shared memory"),
            ("wrong_kernel", r"no_such_function"),
        ):
            pattern = rf"FAULT bad_kernels\.{kernel} \[.*\] sm_{target}: .*{message}"
            assert any(re.match(pattern, fault) for fault in faults), pattern + done.stdout
    assert not any("good_kernel" in fault for fault in faults)
    assert f"{7 * len(CHIPS)} configurations compiled" in done.stdout, done.stdout


def test_modules_that_launch_nothing_are_refused(tmp_path):
    (tmp_path / "idle_kernels.py").write_text("def launch_cases():\n    yield lambda: None\n")
    done = run_resources("idle_kernels:launch_cases", path=str(tmp_path))
    assert done.returncode != 0
    assert "idle_kernels:launch_cases: these cases launch no kernel" in done.stderr


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x16x16.F32 R24, gdesc[UR4], R24 ;
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/                   FADD R2, R2, R3 ;
        /*0040*/              @P0  BRA 0x20 ;
        /*0050*/                   HGMMA.64x16x16.F32 R24, gdesc[UR4], R24 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/               @P0 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_the_loop_with_the_most_products_is_counted():
    assert count_loop_instructions(SASS) == 7
    assert count_loop_instructions(SASS.replace("HGMMA", "FFMA")) == 7  # the longest
    assert count_loop_instructions(SASS.replace("HGMMA", "FFMA").replace("BRA 0x10", "BRA 0x90")) == 3
    assert count_loop_instructions(re.sub("BRA 0x[12]0", "NOP", SASS)) == 9  # up to the exit
    assert count_loop_instructions("") == 0


def test_turns_of_the_inner_loop():
    def record(*calls):
        with _dispatch.record_launches(90) as launches:
            for call in calls:
                y = call()
                y.backward(torch.zeros_like(y))
        return [(launch.kernel.__name__, count_turns(launch), launch.options) for launch in launches]

    def attend(window):
        q, k, v = torch.zeros(1, 512, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True).unbind(2)
        return attention.attention(q, k, v, window_size=window, impl="triton")

    for window, share in (((-1, -1), 1.0), ((64, 64), None), ((-1, 0), None)):
        for _, turns, options in record(lambda window=window: attend(window)):
            whole = 64 * 12 * 512 * 512 // (options["BLOCK_M"] * options["BLOCK_N"])
            assert turns == whole if share else 0.3 * whole < turns < 0.9 * whole
    x, vector = torch.zeros(48, 768, requires_grad=True), torch.zeros(768, requires_grad=True)
    found = record(
        lambda: layer_norm.layer_norm(x, vector, vector, impl="triton"),
        lambda: gelu.bias_gelu(x, vector, impl="triton"),
    )
    for name, turns, options in found:
        columns = {"layer": 1, "bias": 3072 // options["BLOCK"], "sum": 0}[name.split("_")[1]]
        assert turns == 32768 // options["ROWS"] * columns, name


@pytest.mark.parametrize(
    "target, registers, shared, warps, blocks",
    [
        (80, 32, 0, 4, 16),  # full: 64 warps
        (80, 33, 0, 4, 12),  # 40 registers after rounding: 51 warps, 48 in fours
        (80, 128, 0, 8, 2),  # half the registers each
        (80, 255, 0, 8, 1),
        (80, 32, 0, 1, 16),  # register allocation takes warps in fours
        (80, 16, 80 * 1024, 4, 2),  # 81 KiB with what the system reserves, twice in 164
        (80, 16, 81 * 1024 + 1, 4, 1),
        (90, 16, 81 * 1024 + 1, 4, 2),
        (90, 16, 227 * 1024, 4, 1),
        (100, 64, 48 * 1024, 8, 4),
        (86, 32, 0, 4, 12),  # 48 warps
        (86, 16, 0, 1, 16),  # 16 blocks
        (120, 16, 0, 1, 24),
        (120, 16, 99 * 1024, 4, 1),
    ],
)
def test_resident_blocks(target, registers, shared, warps, blocks):
    assert count_resident_blocks(target, registers, shared, warps) == blocks
    assert Resources("k", "", target, warps=warps, blocks=blocks).occupancy == blocks * warps / CHIPS[target].max_warps
