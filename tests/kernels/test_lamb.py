"""FusedLAMB against algorithm 2 of arXiv 1904.00962 in fp64, in PyTorch and through the very source of its kernels.

Every test runs on two implementations: "torch", and "cuda", which is the GPU where there is one. Elsewhere a C++
compiler builds csrc/fused_lamb.cu as plain C++ and runs it block by block, with a few real threads and barriers a
block, under the same host code: indices, reductions and arithmetic are held on every machine.
"""

from __future__ import annotations

import copy
import ctypes
import io
import itertools
import math
import pickle
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import assert_as_exact_as_torch
from fastroberta_kernels import _cuda, lamb
from fastroberta_kernels.lamb import FusedLAMB
from tape import Tape

EMULATOR = r"""
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>
struct float4 { float x, y, z, w; };
struct ushort4 { unsigned short x, y, z, w; };
struct Index { unsigned int x; };
static thread_local Index threadIdx, blockIdx;
static Index blockDim;
static std::barrier<>* block_barrier;
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static  // blocks run one after the other
static void __syncthreads() { block_barrier->arrive_and_wait(); }
static double rsqrt(double x) { return 1 / std::sqrt(x); }
static unsigned int __float_as_uint(float x) { unsigned int y; std::memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned int x) { float y; std::memcpy(&y, &x, 4); return y; }
#include "SOURCE"
template <class... A, size_t... I>
static void run(void (*kernel)(A...), unsigned grid, unsigned block, void** arguments, std::index_sequence<I...>) {
    std::barrier<> barrier(block);
    block_barrier = &barrier;
    blockDim.x = block;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < block; t++)
        threads.emplace_back([=] {
            threadIdx.x = t;
            for (unsigned b = 0; b < grid; b++) {
                blockIdx.x = b;
                kernel(*(std::remove_reference_t<A>*)arguments[I]...);
                __syncthreads();
            }
        });
    for (auto& thread : threads) thread.join();
}
template <class... A>
static void run(void (*kernel)(A...), unsigned grid, unsigned block, void** arguments) {
    run(kernel, grid, block, arguments, std::index_sequence_for<A...>());
}
"""
EMULATED_THREADS = 4


@pytest.fixture(scope="session")
def emulated_launch(tmp_path_factory):
    """`_cuda.launch` on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs a CUDA GPU, or g++ to run csrc/fused_lamb.cu on the CPU")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "fused_lamb.cu").write_text(_cuda.read_source("fused_lamb.cu"))
    text = EMULATOR.replace("SOURCE", "fused_lamb.cu")
    for kernel in lamb.KERNELS:
        text += (
            f'extern "C" void run_{kernel}(unsigned grid, unsigned block, void** arguments) '
            f"{{ run({kernel}, grid, block, arguments); }}\n"
        )
    (folder / "emulator.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o", "emulator.so", "emulator.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    library = ctypes.CDLL(str(folder / "emulator.so"))
    one_at_a_time = threading.Lock()  # the emulator's block is global; tests of shards have several optimizers at work

    def launch(source, kernel, grid, block, device, *arguments):
        if grid == 0:
            return
        values = []
        for argument in map(_cuda.to_kernel_argument, arguments):
            values.append(ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        with one_at_a_time:
            getattr(library, f"run_{kernel}")(grid, EMULATED_THREADS, pointers)

    return launch


@pytest.fixture(params=["torch", "cuda"])
def make(request, monkeypatch, device):
    """FusedLAMB with the implementation under test; small chunks, so that a tensor has several."""
    monkeypatch.setattr(lamb, "CHUNK", 64)
    monkeypatch.setattr(lamb, "CPU_CHUNK", 64)
    if request.param == "cuda" and device.type == "cpu":
        monkeypatch.setattr(_cuda, "launch", request.getfixturevalue("emulated_launch"))
        monkeypatch.setattr(_cuda, "use_cuda", lambda *_: True)
    return lambda *args, **kwargs: FusedLAMB(*args, impl=request.param, **kwargs)


# ---- the oracle: algorithm 2 of the paper, with apex's options -------------------------------------------------------


class Oracle:
    """Plain LAMB, tensor by tensor, in one dtype; a group is a dict of its tensors and numbers."""

    def __init__(self, groups, dtype=torch.float64, max_grad_norm=1.0):
        self.dtype, self.max_grad_norm = dtype, max_grad_norm
        self.groups = [
            {**group, "params": [p.detach().to(dtype, copy=True) for p in group["params"]]} for group in groups
        ]
        self.m = [[torch.zeros_like(p) for p in group["params"]] for group in self.groups]
        self.v = [[torch.zeros_like(p) for p in group["params"]] for group in self.groups]
        self.t = [[0 for _ in group["params"]] for group in self.groups]

    def step(self, gradients, scale=1.0):
        """`gradients`: a list a group, None where a tensor has none."""
        gradients = [[None if g is None else g.to(self.dtype) / scale for g in group] for group in gradients]
        squares = [g.square().sum() for group in gradients for g in group if g is not None]
        norm = torch.stack(squares).sum().sqrt()
        if not torch.isfinite(norm):
            return norm
        clip = 1.0
        if self.max_grad_norm and norm > self.max_grad_norm:
            clip = norm / self.max_grad_norm
        for index, group in enumerate(self.groups):
            beta1, beta2 = group.get("betas", (0.9, 0.999))
            decay, lr, eps = group.get("weight_decay", 0.01), group.get("lr", 1e-3), group.get("eps", 1e-6)
            decoupled = group.get("adam_w_mode", True)
            for k, (x, g) in enumerate(zip(group["params"], gradients[index])):
                if g is None:
                    continue
                self.t[index][k] += 1
                t = self.t[index][k]
                g = g / clip
                if not decoupled:
                    g = g + decay * x
                m = beta1 * self.m[index][k] + (1 - beta1 if group.get("grad_averaging", True) else 1) * g
                v = beta2 * self.v[index][k] + (1 - beta2) * g * g
                self.m[index][k], self.v[index][k] = m, v
                if group.get("bias_correction", True):
                    m, v = m / (1 - beta1**t), v / (1 - beta2**t)
                r = m / (v.sqrt() + eps)
                if decoupled:
                    r = r + decay * x
                phi, length = x.norm(), r.norm()
                trust = 1.0
                if (decay != 0 or group.get("use_nvlamb", False)) and phi > 0 and length > 0:
                    trust = phi / length
                x -= lr * trust * r
        return norm


def make_tensors(shapes, seed=0, scale=0.02, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(device) for shape in shapes]


def make_gradients(shapes, step, size=3e-3, device="cpu"):
    """Outlier rows, as in embeddings of frequent tokens."""
    gradients = make_tensors(shapes, seed=1000 + step, scale=size, device=device)
    for gradient in gradients:
        if gradient.dim() > 1 and gradient.numel():
            gradient[0] *= 30
    return gradients


# One element; a prime; exactly one chunk; several chunks with a ragged end; a scalar; an empty tensor; rank 3.
SHAPES = [(1,), (31,), (64,), (13, 29), (), (0, 5), (3, 4, 50)]


def run_both(make, device, groups, steps=4, size=3e-3, max_grad_norm=1.0, dtype=torch.float32, **kwargs):
    """Our optimizer, the oracle in fp64 and the oracle in fp32, after the same steps."""
    parameters = [
        [torch.nn.Parameter(p.to(device, dtype)) for p in make_tensors(group["shapes"], seed=index)]
        for index, group in enumerate(groups)
    ]
    options = [{k: v for k, v in group.items() if k != "shapes"} for group in groups]
    initial = [{**option, **kwargs, "params": params} for option, params in zip(options, parameters)]
    exact = Oracle(initial, max_grad_norm=max_grad_norm)
    plain = Oracle(initial, dtype=torch.float32, max_grad_norm=max_grad_norm)
    optimizer = make(
        [{**option, "params": params} for option, params in zip(options, parameters)],
        max_grad_norm=max_grad_norm,
        **kwargs,
    )
    for step in range(steps):
        gradients = [make_gradients(group["shapes"], step, size, device) for group in groups]
        for params, group in zip(parameters, gradients):
            for p, g in zip(params, group):
                p.grad = g.to(dtype)
        exact.step([[p.grad for p in params] for params in parameters])
        plain.step([[p.grad for p in params] for params in parameters])
        optimizer.step()
    return optimizer, exact, plain


def assert_same(optimizer, exact, plain):
    for g, group in enumerate(optimizer.param_groups):
        states = [optimizer.state[p] for p in group["params"]]
        assert [state["step"].item() for state in states] == exact.t[g]
        masters = [state.get("master", p.detach()) for p, state in zip(group["params"], states)]
        for part, ours, theirs, truth in (
            ("p", masters, plain.groups[g]["params"], exact.groups[g]["params"]),
            ("m", [state["exp_avg"] for state in states], plain.m[g], exact.m[g]),
            ("v", [state["exp_avg_sq"] for state in states], plain.v[g], exact.v[g]),
        ):
            for k, (x, y) in enumerate(zip(ours, truth)):
                error = (x.double() - y).norm() / y.norm().clamp(min=1e-30)
                assert error < 2e-5, f"group {g} tensor {k} {tuple(x.shape)} {part}: relative error {error:.1e}"
            # Rounding of a single element is luck: how exact it is can be measured over all tensors of a group.
            ours, theirs, truth = (torch.cat([t.flatten() for t in tensors]) for tensors in (ours, theirs, truth))
            assert_as_exact_as_torch(ours, theirs, truth, f"group {g} {part}")


FLAGS = ("bias_correction", "adam_w_mode", "grad_averaging", "use_nvlamb")


@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=4)), ids=str)
def test_every_flag_combination(make, device, flags):
    """With and without weight decay: without it the trust ratio depends on use_nvlamb."""
    groups = [{"shapes": SHAPES, "weight_decay": 0.01}, {"shapes": SHAPES[1:4], "weight_decay": 0.0}]
    assert_same(*run_both(make, device, groups, **dict(zip(FLAGS, flags))))


def test_groups_with_their_own_settings(make, device):
    groups = [
        {"shapes": SHAPES, "lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "use_nvlamb": True},
        {"shapes": [(7, 11)], "lr": 3e-4, "weight_decay": 0.0, "eps": 1e-3},
        {"shapes": [(5,), (200,)], "lr": 0.0},
        {"shapes": [(40, 3)], "betas": (0.0, 0.5), "adam_w_mode": False, "bias_correction": False},
    ]
    assert_same(*run_both(make, device, groups))


@pytest.mark.parametrize("max_grad_norm", [0, None, 1e-3, 0.5, 1e6])
def test_clipping_and_none(make, device, max_grad_norm):
    optimizer, exact, plain = run_both(make, device, [{"shapes": SHAPES}], max_grad_norm=max_grad_norm, size=0.1)
    assert_same(optimizer, exact, plain)
    moved = [p for p in optimizer.param_groups[0]["params"] if p.numel()]
    initial = [p for p in make_tensors(SHAPES, device=device) if p.numel()]
    assert all((p != q).all() for p, q in zip(moved, initial))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_fp32_masters(make, device, dtype):
    optimizer, exact, plain = run_both(make, device, [{"shapes": SHAPES}], steps=6, dtype=dtype)
    assert_same(optimizer, exact, plain)
    for p in optimizer.param_groups[0]["params"]:
        assert p.dtype == dtype
        assert torch.equal(p, optimizer.state[p]["master"].to(dtype))


def test_rounding_of_16_bit_copies(make, device):
    """lr=0 without decay leaves the masters alone: the copy is their rounding, at every edge of the formats."""
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.nn.Parameter(torch.zeros(4096, dtype=dtype, device=device))
        optimizer = make([p], lr=0.0, weight_decay=0.0)
        bits = torch.randint(0, 2**31 - 2**24, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        edges = [65519.996, 65520.0, 65504.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 1 + 2.0**-11]
        edges += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-9, 1 + 3 * 2.0**-11, 2.0**-14 - 2.0**-26, 0.0, 1e-40, 3.38e38]
        value = bits.view(torch.float32)
        normal = torch.randn(2048, generator=torch.Generator().manual_seed(1))
        value[::2] = normal * 2.0 ** -(torch.arange(2048) / 80)
        value[: len(edges)] = torch.tensor(edges)
        value[len(edges) : 2 * len(edges)] = -torch.tensor(edges)
        optimizer.state[p]["master"].copy_(value)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.equal(p.cpu(), value.to(dtype))


def test_mixed_dtypes_in_one_optimizer(make, device):
    """The 16-bit parameters come first in the buffers, whatever the order of the groups."""
    a, b, c = (torch.nn.Parameter(t.to(device)) for t in make_tensors([(70,), (9, 9), (130,)]))
    b.data, c.data = b.data.bfloat16(), c.data.half()
    exact = Oracle([{"params": [a, b]}, {"params": [c], "lr": 1e-2}])
    optimizer = make([{"params": [a, b]}, {"params": [c], "lr": 1e-2}])
    for step in range(3):
        for p, g in zip((a, b, c), make_gradients([(70,), (9, 9), (130,)], step, device=device)):
            p.grad = g.to(p.dtype)
        exact.step([[a.grad, b.grad], [c.grad]])
        optimizer.step()
    assert optimizer.low.numel() == 128 + 192  # (9, 9) and (130,) at multiples of 64; nothing for the fp32 one
    for p, truth in zip((a, b, c), exact.groups[0]["params"] + exact.groups[1]["params"]):
        torch.testing.assert_close(optimizer.state[p].get("master", p).double(), truth, rtol=2e-6, atol=1e-8)


def test_zero_norms(make, device):
    """Zero parameters, zero gradients and both: the ratio is 1 and nothing becomes NaN, even with eps=0."""
    for eps in (1e-6, 0.0):
        zero, still, both = (torch.nn.Parameter(t) for t in (torch.zeros(70), torch.ones(70), torch.zeros(70)))
        params = [torch.nn.Parameter(p.detach().to(device)) for p in (zero, still, both)]
        optimizer = make(params, lr=0.1, eps=eps or 1e-30, weight_decay=0.1, max_grad_norm=None)
        for p, g in zip(params, (1.0, 0.0, 0.0)):
            p.grad = torch.full_like(p, g)
        optimizer.step()
        torch.testing.assert_close(params[0], torch.full_like(params[0], -0.1))  # u = 1, |p| = 0: ratio 1
        torch.testing.assert_close(params[1], torch.full_like(params[1], 0.9))  # u = 0.1 p: ratio 10
        assert torch.equal(params[2], torch.zeros_like(params[2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_skips_the_step_before_anything_is_written(make, device, bad):
    params = [torch.nn.Parameter(t.to(device)) for t in make_tensors(SHAPES)]
    params[3].data = params[3].data.bfloat16()
    optimizer = make(params)
    for step in range(2):
        for p, g in zip(params, make_gradients(SHAPES, step, device=device)):
            p.grad = g.to(p.dtype)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"]), [p.clone() for p in params]
    params[5 - 2].grad.flatten()[-1] = bad  # the last element: in the ragged end of the last chunk
    optimizer.step()
    assert optimizer.num_skipped.item() == 1 and not math.isfinite(optimizer.last_grad_norm.item())
    for k, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[0][k][name]) for name, value in state.items())
    assert all(torch.equal(p, q) for p, q in zip(params, before[1]))
    params[3].grad.zero_()
    optimizer.step()  # and it goes on
    assert optimizer.num_skipped.item() == 1 and optimizer.state[params[0]]["step"].item() == 3
    assert not torch.equal(params[3], before[1][3])


def test_gradients_stay_intact_and_the_norm_is_told(make, device):
    params = [torch.nn.Parameter(t.to(device)) for t in make_tensors(SHAPES)]
    optimizer = make(params, max_grad_norm=0.01, adam_w_mode=False)
    optimizer.zero_grad()
    gradients = make_gradients(SHAPES, 0, device=device)
    for p, g in zip(params, gradients):
        p.grad.copy_(g)
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients))
    norm = torch.cat([g.double().flatten() for g in gradients]).norm()
    torch.testing.assert_close(optimizer.last_grad_norm.double(), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["argument", "attribute"])
def test_grad_scale_divides_without_writing(make, device, how):
    shapes = SHAPES[:4]
    params = [torch.nn.Parameter(t.to(device)) for t in make_tensors(shapes)]
    exact = Oracle([{"params": params}], max_grad_norm=0.05)
    plain = Oracle([{"params": params}], max_grad_norm=0.05, dtype=torch.float32)
    optimizer = make(params, max_grad_norm=0.05)
    scale = torch.tensor(1536.0, device=device)
    for step in range(3):
        gradients = [g * 1536 for g in make_gradients(shapes, step, device=device)]
        for p, g in zip(params, gradients):
            p.grad = g.clone()
        norm = exact.step([gradients], scale=1536)
        plain.step([gradients], scale=1536)
        if how == "argument":
            optimizer.step(grad_scale=scale)
        else:
            optimizer.grad_scale = scale
            optimizer.step()
        torch.testing.assert_close(optimizer.last_grad_norm.double(), norm, rtol=1e-6, atol=0)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients))
    assert_same(optimizer, exact, plain)


def test_grad_scaler_drives_it(make, device):
    """torch.amp.GradScaler hands its scale over, and halves it when the step was not finite."""
    p = torch.nn.Parameter(torch.ones(70, device=device))
    optimizer = make([p])
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for factor, skipped in ((1.0, 0), (math.inf, 1), (1.0, 1)):
        optimizer.zero_grad()
        before = p.detach().clone()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.num_skipped.item() == skipped
        assert torch.equal(p, before) == math.isinf(factor)
    assert scaler.get_scale() == 512.0
    torch.testing.assert_close(optimizer.last_grad_norm.item(), math.sqrt(70))


def test_parameters_without_gradient_are_skipped(make, device):
    shapes = [(70,), (5, 6), (100,)]
    params = [torch.nn.Parameter(t.to(device)) for t in make_tensors(shapes)]
    exact = Oracle([{"params": params}], max_grad_norm=1e-3)
    plain = Oracle([{"params": params}], max_grad_norm=1e-3, dtype=torch.float32)
    optimizer = make(params, max_grad_norm=1e-3)  # the norm counts only gradients that are there
    for step, missing in enumerate([1, 1, 0, None, 2]):
        gradients = make_gradients(shapes, step, device=device)
        gradients = [None if k == missing else g for k, g in enumerate(gradients)]
        optimizer.zero_grad(set_to_none=True)
        for p, g in zip(params, gradients):
            p.grad = g
        exact.step([gradients])
        plain.step([gradients])
        optimizer.step()
    assert_same(optimizer, exact, plain)
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 3, 4]


def test_no_gradient_at_all(make, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = make([p])
    optimizer.step()
    assert torch.equal(p, torch.ones_like(p)) and optimizer.state[p]["step"].item() == 0


def test_zero_grad_hands_out_views_that_autograd_fills(make, device):
    w = torch.nn.Parameter(torch.ones(3, 5, device=device))
    low = torch.nn.Parameter(torch.ones(7, device=device, dtype=torch.bfloat16))
    wide = torch.nn.Parameter(torch.ones(7, device=device, dtype=torch.bfloat16))
    frozen = torch.nn.Parameter(torch.ones(2, device=device), requires_grad=False)
    wide.grad_dtype = torch.float32
    optimizer = make([w, low, wide, frozen], max_grad_norm=None)
    for _ in range(2):
        optimizer.zero_grad()
        assert w.grad.untyped_storage().data_ptr() == optimizer.gradient.data_ptr()
        assert wide.grad.dtype == torch.float32 and low.grad is None and frozen.grad is None
        for _ in range(3):  # micro-batches
            ((w * 2).sum() + (wide * 3).sum() + low.sum()).backward()
        assert w.grad.untyped_storage().data_ptr() == optimizer.gradient.data_ptr()
        assert torch.equal(w.grad, torch.full_like(w, 6)) and torch.equal(wide.grad, torch.full_like(wide.grad, 9))
        assert optimizer.gradient.sum().item() == 6 * 15 + 9 * 7
        optimizer.step()
        torch.testing.assert_close(optimizer.last_grad_norm.item(), math.sqrt(36 * 15 + 81 * 7 + 9 * 7))
        assert torch.equal(frozen, torch.ones_like(frozen))
        optimizer.gradient.zero_()
    optimizer.zero_grad(set_to_none=True)
    assert w.grad is None


def test_gradients_elsewhere_are_gathered(make, device):
    """The same step from views of the buffer, from own tensors, and from transposed ones."""
    results = []
    for how in ("views", "own", "transposed"):
        p = torch.nn.Parameter(make_tensors([(13, 29)])[0].to(device))
        optimizer = make([p])
        for step in range(3):
            g = make_gradients([(13, 29)], step, device=device)[0]
            if how == "views":
                optimizer.zero_grad()
                p.grad.copy_(g)
            else:
                p.grad = g if how == "own" else g.t().contiguous().t()
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_memory_formats_are_kept(make, device):
    weight = torch.nn.Parameter(torch.randn(6, 5, 3, 3, device=device).to(memory_format=torch.channels_last))
    expanded = torch.nn.Parameter(torch.randn(5, 1, device=device).expand(5, 4))
    values = weight.detach().clone(), expanded.detach().clone()
    optimizer = make([weight, expanded], lr=0.0)
    assert weight.is_contiguous(memory_format=torch.channels_last) and expanded.is_contiguous()
    optimizer.zero_grad()
    assert weight.grad.stride() == weight.stride()
    optimizer.step()
    assert torch.equal(weight, values[0]) and torch.equal(expanded, values[1])


def test_a_group_added_later(make, device):
    shapes = [(70,), (5, 6), (100,)]
    first = [torch.nn.Parameter(t.to(device)) for t in make_tensors(shapes)]
    late = [torch.nn.Parameter(t.to(device).bfloat16()) for t in make_tensors(shapes, seed=5)]
    groups = [{"params": first}, {"params": late, "lr": 1e-2, "weight_decay": 0.0}]
    exact, plain = Oracle(groups), Oracle(groups, dtype=torch.float32)
    optimizer = make(first)
    for step in range(4):
        gradients = [make_gradients(shapes, 10 * step + k, device=device) for k in range(2)]
        if step == 0:
            gradients[1] = [None] * 3
        optimizer.zero_grad()
        for p, g in zip(first, gradients[0]):
            p.grad.copy_(g)
        if step == 1:
            optimizer.add_param_group(dict(groups[1]))  # gradients that are already there still count
        for p, g in zip(late, gradients[1]):
            p.grad = g if g is None else g.bfloat16()
        if step:
            gradients[1] = [p.grad for p in late]
        exact.step(gradients)
        plain.step(gradients)
        optimizer.step()
    assert_same(optimizer, exact, plain)
    assert [optimizer.state[p]["step"].item() for p in first + late] == [4] * 3 + [3] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_first", [True, False])
def test_state_dict_continues_bit_for_bit(make, device, dtype, model_first):
    def train(params, optimizer, steps):
        for step in steps:
            for p, g in zip(params, make_gradients(SHAPES, step, device=device)):
                p.grad = g.to(dtype)
            optimizer.step()

    def start(seed):
        params = [torch.nn.Parameter(t.to(device, dtype)) for t in make_tensors(SHAPES, seed=seed)]
        return params, make([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}])

    params, optimizer = start(0)
    train(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only: tensors and numbers, nothing else
    assert set(saved["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"} | (
        {"master"} if dtype == torch.bfloat16 else set()
    )
    assert all(v.dtype == torch.float32 for v in saved["optimizer"]["state"][3].values())
    train(params, optimizer, range(3, 6))

    again, resumed = start(1)
    train(again, resumed, range(1))

    def load_model():
        with torch.no_grad():
            for p, q in zip(again, saved["model"]):
                p.copy_(q)

    if model_first:
        load_model()
    addresses = resumed.exp_avg.data_ptr()
    resumed.load_state_dict(saved["optimizer"])
    if not model_first:
        load_model()
    assert resumed.exp_avg.data_ptr() == addresses and resumed.param_groups[1]["lr"] == 1e-2
    train(again, resumed, range(3, 6))
    for p, q in zip(params, again):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][name]), name


def test_state_dict_of_another_model_is_refused(make, device):
    saved = make([torch.nn.Parameter(torch.ones(3, device=device))]).state_dict()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(3,\).*\(4,\)"):
        make([torch.nn.Parameter(torch.ones(4, device=device))]).load_state_dict(saved)


def test_load_state_dict_hooks_run_in_order(make, device):
    p, q = (torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer, other = make([p]), make([q])
    p.grad = torch.ones_like(p)
    optimizer.step()
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[q]["step"].item()))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [1, 1.0]


def test_deep_copies_are_independent(make, device):
    p = torch.nn.Parameter(torch.ones(70, device=device, dtype=torch.bfloat16))
    optimizer = make([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    assert q is not p and all(torch.equal(v, twin.state[q][name]) for name, v in optimizer.state[p].items())
    q.grad = torch.ones_like(q)
    twin.step()
    assert twin.state[q]["step"].item() == 2 and optimizer.state[p]["step"].item() == 1
    assert not torch.equal(twin.state[q]["master"], optimizer.state[p]["master"])


def test_masters_follow_parameters_written_by_others(make, device):
    """Loading a checkpoint into the model: the new values count, and untouched ones keep the master's digits."""
    p = torch.nn.Parameter(torch.linspace(1, 2, 70, device=device).bfloat16())
    q = torch.nn.Parameter(torch.linspace(1, 2, 70, device=device))
    optimizer = make([p, q], lr=1e-4)
    for t in (p, q):
        t.grad = torch.ones_like(t)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    master = optimizer.state[p]["master"].clone()
    with torch.no_grad():
        p[3] = 5.0
        q[3] = 5.0
    q.data = q.data.clone()
    optimizer.step()
    assert p[3] == 5 and q[3] == 5 and optimizer.state[p]["master"][3] == 5
    master[3] = 5
    assert torch.equal(optimizer.state[p]["master"], master)
    assert q.data_ptr() != 0 and q.untyped_storage().data_ptr() == optimizer.master.data_ptr()
    q.data = q.data.double()
    with pytest.raises(RuntimeError, match=r"became torch\.float64"):
        optimizer.step()


def test_lr_tensor_and_scheduler_equal_floats(make, device):
    results = []
    for as_tensor in (False, True):
        p = torch.nn.Parameter(make_tensors([(13, 29)])[0].to(device))
        lr = torch.tensor(1e-2, device=device) if as_tensor else 1e-2
        optimizer = make([p], lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 4))
        exact = Oracle([{"params": [p]}])
        for step in range(6):
            exact.groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 4)
            p.grad = make_gradients([(13, 29)], step, device=device)[0]
            exact.step([[p.grad]])
            optimizer.step()
            scheduler.step()
        torch.testing.assert_close(p.double(), exact.groups[0]["params"][0], rtol=2e-6, atol=1e-8)
        results.append(p.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


# ---- shards ----------------------------------------------------------------------------------------------------------


def run_processes(world_size, train):
    """What `train(rank, all_reduce)` returns, from a thread a process; all_reduce sums in the order of ranks."""
    barrier = threading.Barrier(world_size, timeout=60)
    parts = [None] * world_size

    def call(rank):
        def all_reduce(tensor):
            parts[rank] = tensor.clone()
            barrier.wait()
            assert {(part.shape, part.dtype, part.device) for part in parts} == {
                (tensor.shape, tensor.dtype, tensor.device)
            }
            total = torch.stack(parts).sum(0)
            barrier.wait()  # all have read before anyone writes the next parts
            tensor.copy_(total)

        try:
            return train(rank, all_reduce)
        except BaseException:
            barrier.abort()  # the others do not wait for this one
            raise

    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(call, rank) for rank in range(world_size)]
    errors = [future.exception() for future in futures if future.exception()]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the cause first, not those whom it woke up
    return [future.result() for future in futures]


def split_evenly(tensor, world_size):
    """Flat contiguous pieces, the later ones empty where there are more processes than elements."""
    return torch.tensor_split(tensor.flatten(), world_size)


def give_all_to_the_last(tensor, world_size):
    """No other process owns a single element, hence no chunk."""
    return [tensor.flatten()[: tensor.numel() * (rank == world_size - 1)] for rank in range(world_size)]


# Three tensors with settings of their own: no weight decay (no trust ratio), or one added to the gradient.
SHARD_GROUPS = [
    {"shapes": SHAPES, "lr": 1e-2},
    {"shapes": [(7, 11)], "lr": 1e-2, "weight_decay": 0.0},
    {"shapes": [(3,), (200,)], "lr": 3e-3, "adam_w_mode": False, "use_nvlamb": True},
]


def train_pieces(make, device, cut, steps=4, size=3e-3, bad=None, dtype=torch.float32, **kwargs):
    """Four steps with pieces `cut(tensor)` of the tensors of SHARD_GROUPS. One tensor has no gradient in step 1.

    `bad`: in step 2, the last element of tensor 3 (all of it, before it is cut) has this gradient.
    Returns the optimizer and, for every step, the grad norm and the parameters after it.
    """
    groups = [
        {
            **{k: v for k, v in group.items() if k != "shapes"},
            "params": [
                torch.nn.Parameter(cut(t.to(device, dtype)).clone()) for t in make_tensors(group["shapes"], seed=index)
            ],
        }
        for index, group in enumerate(SHARD_GROUPS)
    ]
    params = [p for group in groups for p in group["params"]]
    shapes = [shape for group in SHARD_GROUPS for shape in group["shapes"]]
    optimizer = make(groups, **kwargs)
    history = []
    for step in range(steps):
        gradients = make_gradients(shapes, step, size, device)
        if bad is not None and step == 2:
            gradients[3][-1, -1] = bad
        optimizer.zero_grad(set_to_none=step == 1)
        for k, (p, g) in enumerate(zip(params, gradients)):
            if step == 1:
                p.grad = None if k == 2 else cut(g).to(dtype)
            elif p.grad is None:
                p.grad = cut(g).to(dtype)
            else:
                p.grad.copy_(cut(g))
        optimizer.step(grad_scale=torch.tensor(0.5, device=device))
        history.append((optimizer.last_grad_norm.item(), [p.detach().clone() for p in params]))
    return optimizer, history


def assert_shards_equal_whole(shards, whole):
    """`shards`, of one process each, and `whole` are what train_pieces returned."""
    for step, (norm, params) in enumerate(whole[1]):
        norms = [history[step][0] for _, history in shards]
        assert len(set(map(str, norms))) == 1, "not the same bits everywhere"
        torch.testing.assert_close(norms[0], norm, rtol=1e-6, atol=0, equal_nan=True)
        for k, p in enumerate(params):
            joined = torch.cat([history[step][1][k].flatten() for _, history in shards])
            assert (joined - p.flatten()).norm() <= 1e-6 * p.norm(), f"step {step} tensor {k}"
    counts = whole[0]._step_counts.tolist()
    for optimizer, _ in shards:
        assert optimizer._step_counts.tolist() == counts
        assert optimizer.num_skipped.item() == whole[0].num_skipped.item()


@pytest.mark.parametrize("split", [split_evenly, give_all_to_the_last], ids=lambda split: split.__name__)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_equal_whole_tensors(make, device, world_size, split):
    whole = train_pieces(make, device, lambda t: t)
    shards = run_processes(
        world_size,
        lambda rank, all_reduce: train_pieces(
            make, device, lambda t: split(t, world_size)[rank], all_reduce=all_reduce
        ),
    )
    assert_shards_equal_whole(shards, whole)
    assert whole[0]._step_counts.tolist().count(3) == 1  # the one without a gradient in one step
    if world_size == 4 and split is split_evenly:
        assert shards[3][0].param_groups[0]["params"][0].numel() == 0


@pytest.mark.parametrize("max_grad_norm", [0.1, None])
def test_shards_are_clipped_by_the_global_norm(make, device, max_grad_norm):
    """Gradients whose norm is above the bound, while it is below on at least one process."""
    arguments = {"size": 2e-4, "max_grad_norm": max_grad_norm}
    whole = train_pieces(make, device, lambda t: t, **arguments)
    shards = run_processes(
        3,
        lambda rank, all_reduce: train_pieces(
            make, device, lambda t: split_evenly(t, 3)[rank], all_reduce=all_reduce, **arguments
        ),
    )
    assert_shards_equal_whole(shards, whole)
    assert whole[1][-1][0] > 0.1
    assert (2 * shards[2][0].gradient).norm() < 0.1  # 2: the gradients are divided by 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_all_processes_skip_a_step_that_one_cannot_do(make, device, bad):
    whole = train_pieces(make, device, lambda t: t, bad=bad)
    shards = run_processes(
        3,
        lambda rank, all_reduce: train_pieces(
            make, device, lambda t: split_evenly(t, 3)[rank], bad=bad, all_reduce=all_reduce
        ),
    )
    assert_shards_equal_whole(shards, whole)
    for rank, (optimizer, history) in enumerate(shards):
        assert optimizer.num_skipped.item() == 1
        assert all(torch.equal(p, q) for p, q in zip(history[1][1], history[2][1])), f"rank {rank}"
        assert all(not torch.equal(p, q) for p, q in zip(history[2][1], history[3][1]) if p.numel())


def test_16_bit_shards(make, device):
    whole = train_pieces(make, device, lambda t: t, dtype=torch.bfloat16)
    shards = run_processes(
        2,
        lambda rank, all_reduce: train_pieces(
            make, device, lambda t: split_evenly(t, 2)[rank], dtype=torch.bfloat16, all_reduce=all_reduce
        ),
    )
    for k, states in enumerate(zip(*(optimizer.state.values() for optimizer, _ in (whole, *shards)))):
        master, *pieces = (state["master"].flatten() for state in states)
        assert (torch.cat(pieces) - master).norm() <= 1e-6 * master.norm(), f"tensor {k}"


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_two_reductions_a_step_also_where_nothing_is_owned(make, device, bad):
    """This process owns no element: its part of both sums is zero, and it follows what comes from the others."""
    seen = []

    def all_reduce(tensor):
        seen.append(tensor.clone())
        tensor.add_(9.0 + bad)

    params = [torch.nn.Parameter(torch.empty(0, device=device)) for _ in range(3)]
    optimizer = make(params, all_reduce=all_reduce)
    optimizer.zero_grad()
    params[1].grad = None
    for _ in range(2):
        optimizer.step()
    assert [(part.shape, part.dtype) for part in seen] == 2 * [((), torch.float64), ((3, 2), torch.float64)]
    assert not any(part.any() for part in seen)
    if bad:
        assert optimizer.num_skipped.item() == 2 and math.isnan(optimizer.last_grad_norm.item())
        assert [optimizer.state[p]["step"].item() for p in params] == [0, 0, 0]
    else:
        assert optimizer.num_skipped.item() == 0 and optimizer.last_grad_norm.item() == 3
        assert [optimizer.state[p]["step"].item() for p in params] == [2, 0, 2]


def test_reductions_carry_sums_of_squares(make, device):
    """Of the gradients first, then of p and u of each tensor; zeros where a tensor has no gradient or a step is off."""
    seen = []
    params = [torch.nn.Parameter(torch.full((count,), value, device=device)) for count, value in ((70, 2.0), (5, 3.0))]
    optimizer = make(params, lr=0.0, weight_decay=0.5, max_grad_norm=None, all_reduce=lambda t: seen.append(t.clone()))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    params[0].grad[69] = math.nan
    optimizer.step()
    # u = 1 + 0.5 p
    expected = [75, [[280, 280], [45, 31.25]], 70, [[280, 280], [0, 0]], math.nan, [[0, 0], [0, 0]]]
    for part, value in zip(seen, expected, strict=True):
        value = torch.tensor(value, dtype=torch.float64, device=device)
        torch.testing.assert_close(part, value, rtol=1e-5, atol=0, equal_nan=True)


def test_processes_may_differ_in_implementation(emulated_launch, monkeypatch):
    """The kernels could not be compiled on one machine: all make the same calls, a skipped step included."""
    monkeypatch.setattr(_cuda, "launch", emulated_launch)
    monkeypatch.setattr(_cuda, "use_cuda", lambda *arguments: arguments[3] == "cuda")
    device = torch.device("cpu")
    whole = train_pieces(FusedLAMB, device, lambda t: t, bad=math.inf, impl="torch")
    shards = run_processes(
        2,
        lambda rank, all_reduce: train_pieces(
            FusedLAMB, device, lambda t: split_evenly(t, 2)[rank], bad=math.inf,
            impl=("torch", "cuda")[rank], all_reduce=all_reduce,
        ),
    )  # fmt: skip
    assert_shards_equal_whole(shards, whole)


def test_whole_tensors_need_no_more_launches(emulated_launch, monkeypatch):
    """Without all_reduce every kernel is launched once a step; with it where there is something to do."""
    launched = []

    def launch(source, kernel, grid, *arguments):
        launched.append((kernel, grid))
        emulated_launch(source, kernel, grid, *arguments)

    monkeypatch.setattr(_cuda, "launch", launch)
    monkeypatch.setattr(_cuda, "use_cuda", lambda *_: True)
    for count, chunks, all_reduce in ((10000, 2, None), (10000, 2, lambda t: None), (0, 0, lambda t: None)):
        p = torch.nn.Parameter(torch.ones(count))
        optimizer = FusedLAMB([p, torch.nn.Parameter(torch.ones(0))], all_reduce=all_reduce)
        optimizer.zero_grad()
        launched.clear()
        optimizer.step()
        assert launched == list(zip(lamb.KERNELS, (chunks, 1, chunks, 2, chunks)))


def double(tensor):
    """Another process with the same squares."""
    tensor.mul_(2)


def test_copies_keep_the_reduction_and_the_state_dict_does_not(make, device):
    p = torch.nn.Parameter(torch.ones(70, device=device))
    optimizer = make([p], all_reduce=double)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(optimizer.last_grad_norm.item(), math.sqrt(140))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.all_reduce is double
        (q,) = twin.param_groups[0]["params"]
        q.grad = torch.ones_like(q)
        twin.step()
        assert twin.last_grad_norm.item() == optimizer.last_grad_norm.item() and twin.state[q]["step"].item() == 2
    whole = make([torch.nn.Parameter(torch.ones(70, device=device))])
    whole.load_state_dict(optimizer.state_dict())
    assert whole.all_reduce is None and optimizer.all_reduce is double
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(make([torch.nn.Parameter(torch.ones(3, device=device))], all_reduce=lambda t: None))


def test_repeats_bit_for_bit(make, device):
    results = []
    for _ in range(2):
        optimizer, _, _ = run_both(make, device, [{"shapes": SHAPES}])
        results.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
    assert all(torch.equal(p, q) for p, q in zip(*results))


def test_closure_is_called_with_gradients_enabled(make, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = make([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (p < 1).all()


def test_autograd_notices_the_step(make, device):
    """A graph that saved a parameter must not be used after the step changed it."""
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = make([p])
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_trains_a_convolutional_network(make, device):
    """Any model: here one that tells vertical from horizontal stripes; batch norm has tensors of one dimension."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 2),
    ).to(device)
    optimizer = make(model.parameters(), lr=0.03)
    label = torch.arange(32, device=device) % 2
    stripes = (torch.arange(8, device=device) % 2).float().expand(8, 8)
    images = torch.stack([stripes if k else stripes.t() for k in label])[:, None]
    images = images + 0.3 * torch.randn(32, 1, 8, 8).to(device)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def test_wrong_arguments_are_explained():
    p = torch.nn.Parameter(torch.ones(3))
    for arguments, message in (
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": torch.ones(2)}, "single element"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": -1e-6}, "eps"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"impl": "triton"}, "impl='triton' is unknown"),
        ({"impl": "cuda"}, "need CUDA tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedLAMB([p], **arguments)
    with pytest.raises(ValueError, match="float64"):
        FusedLAMB([torch.nn.Parameter(torch.ones(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="one optimizer per device"):
        FusedLAMB([p, torch.nn.Parameter(torch.ones(3, device="meta"))])
    with pytest.raises(ValueError, match="share memory"):
        FusedLAMB([p, torch.nn.Parameter(p.detach())])
    optimizer = FusedLAMB([p])
    with pytest.raises(ValueError, match="lr=-2"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": -2})
    assert len(optimizer.param_groups) == 1


def test_sizes_are_64_bit(make, device):
    """No table of the kernels can overflow at 2**31 elements."""
    optimizer = make([torch.nn.Parameter(torch.ones(200, device=device))])
    if not hasattr(optimizer, "_chunks"):
        pytest.skip("tables belong to the kernels")
    for name in ("_chunks", "_first_chunk", "_segment_group"):
        assert getattr(optimizer, name).dtype == torch.int64
    source = _cuda.read_source("fused_lamb.cu")
    assert "for (int " not in source and "for (unsigned int i" not in source


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_on_a_gpu(device, dtype):
    """A RoBERTa layer and its embedding, whole chunks and real blocks; a hundred equal repeats."""
    shapes = [(50304, 768), (3072, 768), (768, 3072), (768,), (768, 768)]
    initial = [t.to(device, dtype) for t in make_tensors(shapes)]
    gradients = [g.to(dtype) for g in make_gradients(shapes, 0, device=device)]
    exact = Oracle([{"params": initial}])
    plain = Oracle([{"params": initial}], dtype=torch.float32)
    for _ in range(2):
        exact.step([gradients])
        plain.step([gradients])
    masters = []
    for _ in range(100):
        params = [torch.nn.Parameter(p.clone()) for p in initial]
        optimizer = FusedLAMB(params, impl="cuda")
        for _ in range(2):
            for p, g in zip(params, gradients):
                p.grad = g
            optimizer.step()
        if not masters:
            assert_same(optimizer, exact, plain)
            masters.append(optimizer.master)
        assert torch.equal(optimizer.master, masters[0])


def record_cuda_graph(work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def test_a_graph_follows_learning_rate_gradients_steps_and_overflow(device, monkeypatch, request):
    """All that changes between steps is read from the device's memory. Without a GPU, a tape and the emulated kernels."""
    record = record_cuda_graph
    if device.type == "cpu":
        record, emulated_launch = Tape.record, request.getfixturevalue("emulated_launch")

        def launch(*arguments):
            if Tape.running is None:
                emulated_launch(*arguments)
            else:
                Tape.running.launch(emulated_launch, *arguments)

        monkeypatch.setattr(_cuda, "launch", launch)
        monkeypatch.setattr(_cuda, "use_cuda", lambda *_: True)
    shapes = [(300, 70), (70,)]
    gradients = [make_gradients(shapes, k, device=device) for k in range(6)]

    def train(use_graph):
        params = [torch.nn.Parameter(t.to(device)) for t in make_tensors(shapes)]
        rates = [torch.tensor(1e-2, device=device) for _ in params]
        scale = torch.ones((), device=device)
        groups = [{"params": [p], "lr": lr, "weight_decay": wd} for p, lr, wd in zip(params, rates, (0.01, 0.0))]
        optimizer = FusedLAMB(groups, impl="cuda")
        optimizer.zero_grad()

        def fill(k):
            for p, g in zip(params, gradients[k]):
                p.grad.copy_(g)

        def advance():
            optimizer.step(grad_scale=scale)

        fill(0)
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            advance()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        if use_graph:
            advance = record(advance)
        for k in range(1, 6):
            fill(k)
            if k == 3:
                params[0].grad[0, 0] = math.nan
            for number, rate in enumerate(rates):
                rate.fill_(1e-2 / (k + number))
            scale.fill_(2.0**k)
            advance()
        assert optimizer.num_skipped.item() == 1 and optimizer.state[params[0]]["step"].item() == 5
        return optimizer.master

    assert torch.equal(train(False), train(True))


@pytest.mark.gpu
def test_no_host_synchronisation_on_a_gpu(device):
    params = [torch.nn.Parameter(t.to(device)) for t in make_tensors(SHAPES)]
    optimizer = FusedLAMB(params, lr=torch.tensor(1e-3, device=device), impl="cuda")
    scale = torch.tensor(2.0, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_2_to_the_31_elements(device):
    """48 GB: one parameter past the reach of 32-bit offsets, checked at its very end."""
    count = 2**31 + 5
    if torch.cuda.get_device_properties(device).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    p = torch.nn.Parameter(torch.empty(0, device=device))
    p.data = torch.ones(count, device=device)
    optimizer = FusedLAMB([p], lr=0.1, weight_decay=0.0, max_grad_norm=None, impl="cuda")
    optimizer.zero_grad()
    p.grad.fill_(1.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.last_grad_norm.item(), math.sqrt(count), rtol=1e-6, atol=0)
    torch.testing.assert_close(p[-7:].detach().cpu(), torch.full((7,), 0.9))
    torch.testing.assert_close(p[:7].detach().cpu(), torch.full((7,), 0.9))


def test_a_model_cast_after_construction_is_named():
    model = torch.nn.Linear(4, 4)
    optimizer = FusedLAMB(model.parameters(), lr=0.1)
    model.to(torch.bfloat16)(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(RuntimeError, match=r"became torch.bfloat16 on cpu after the optimizer was made; move and cast"):
        optimizer.step()


def test_dtensors_are_named(tmp_path):
    """FSDP2's parameters all have a data_ptr of zero, which looked like shared memory."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = fully_shard(torch.nn.Linear(4, 4), mesh=mesh)
        with pytest.raises(ValueError, match=r"is a DTensor, as FSDP2 makes them; pass pieces .* all_reduce="):
            FusedLAMB(model.parameters(), lr=0.1)
    finally:
        torch.distributed.destroy_process_group()
