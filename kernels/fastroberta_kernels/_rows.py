"""What the kernels that work on rows of a matrix share: dtypes, the register limit, and sums over all rows.

A backward that sums over rows (the gradients of a bias or of LayerNorm's weight) starts `count_programs` programs. Each
walks over rows at a fixed stride, keeps fp32 sums in registers, and writes them out as one row of partial sums;
`sum_partials` adds those rows in a fixed order. No atomics, so repeated runs give the same bits.
"""

from __future__ import annotations

import functools

import torch

from ._dispatch import jit, launch, tl

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Registers a thread may use: two blocks of eight warps then fit on a multiprocessor. Given no limit, ptxas may spill a
# few registers to local memory in order to fit one more block; `maxnreg=REGISTER_LIMIT` stops it.
REGISTER_LIMIT = 128


@jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(
    partials_ptr, out_0_ptr, out_1_ptr, out_2_ptr,  # fp32 (sums, partials, N); (N,) each, absent ones None
    num_partials, num_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    partials_ptr += which.to(tl.int64) * num_partials * num_columns
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, num_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < num_partials)[:, None] & column_mask[None, :]
        total += tl.load(partials_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], mask=mask, other=0)
    total = tl.sum(total, axis=0)
    tl.store(out_0_ptr + columns, total.to(out_0_ptr.dtype.element_ty), mask=column_mask & (which == 0))
    if out_1_ptr is not None:
        tl.store(out_1_ptr + columns, total.to(out_1_ptr.dtype.element_ty), mask=column_mask & (which == 1))
    if out_2_ptr is not None:
        tl.store(out_2_ptr + columns, total.to(out_2_ptr.dtype.element_ty), mask=column_mask & (which == 2))


@functools.cache
def count_programs(device: torch.device) -> int:
    """How many programs of eight warps to start in one wave: two per multiprocessor, which fit at REGISTER_LIMIT."""
    if device.type != "cuda":
        return 3  # in Triton's interpreter: enough for several programs to take several tiles each
    return torch.cuda.get_device_properties(device).multi_processor_count * 2


def sum_partials(partials: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> None:
    """Sum fp32 `partials` (sums, programs, N) over programs into one to three `outputs` (N,), in a fixed order."""
    _, num_partials, num_columns = partials.shape
    absent = (None,) * (3 - len(outputs))
    launch(
        _sum_partials_kernel, (-(-num_columns // 32), len(outputs)),
        partials, *outputs, *absent, num_partials, num_columns,
        ROWS=128, BLOCK=32, num_warps=4, maxnreg=REGISTER_LIMIT,
    )  # fmt: skip


def unify_dtypes(x: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in a common dtype, that of x if all have it and else fp32, so that Triton compiles few kernels.

    Kernels compute in fp32 anyway, and autograd rounds the gradients of cast tensors just as a kernel would.
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if dtypes == {x.dtype}:
        return list(tensors)
    return [None if tensor is None else tensor.float() for tensor in tensors]
