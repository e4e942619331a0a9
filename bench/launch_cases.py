"""Calls that together reach every configuration of every Triton kernel, for compilation ahead of time.

One function for each kernel module. It yields calls on tiny CPU tensors; made inside
`fastroberta_kernels._dispatch.record_launches()`, they record the launches a training step would make.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from fastroberta_kernels._dispatch import get_capability
from fastroberta_kernels.attention import HEAD_DIMS, attention, varlen_attention
from fastroberta_kernels.cross_entropy import linear_cross_entropy
from fastroberta_kernels.embedding import embedding_layer_norm
from fastroberta_kernels.fp8 import E5M2, cast, cast_weight
from fastroberta_kernels.fp8_mlp import cast_mlp, fp8_mlp
from fastroberta_kernels.gelu import bias_gelu, geglu
from fastroberta_kernels.layer_norm import dropout_add_layer_norm, layer_norm
from fastroberta_kernels.masking import LONGEST_SEQUENCE, mask_tokens
from fastroberta_kernels.rotary import apply_rotary, make_tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention_cases() -> Iterator[Callable[[], None]]:
    """Forward and backward in every configuration, on tiny batches of real widths.

    509 keys are no multiple of 16, which matters to Triton only if all sequences have the same number. 512 fill every
    tile, which spares the masks; 496 are a multiple of 16 that does not.
    """
    lengths = torch.tensor([512], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in HEAD_DIMS:
            for dropout_p in (0.0, 0.1):
                for length, key_lengths in ((512, None), (496, None), (509, None), (512, lengths)):
                    yield functools.partial(run_dense_case, dtype, head_dim, dropout_p, length, key_lengths)
                yield functools.partial(run_varlen_case, dtype, head_dim, dropout_p)
                yield functools.partial(run_dense_case, dtype, head_dim, dropout_p, 512, lengths, (64, 64))
                yield functools.partial(run_varlen_case, dtype, head_dim, dropout_p, (64, 64))


def run_dense_case(
    dtype: torch.dtype,
    head_dim: int,
    dropout_p: float,
    length: int,
    key_lengths: torch.Tensor | None,
    window: tuple[int, int] = (-1, -1),
) -> None:
    qkv = torch.zeros(1, length, 3, 2, head_dim, dtype=dtype, requires_grad=True)
    q, k, v = qkv.unbind(2)
    out = attention(q, k, v, dropout_p=dropout_p, seed=0, key_lengths=key_lengths, window_size=window, impl="triton")
    out.backward(torch.zeros_like(out))


def run_varlen_case(dtype: torch.dtype, head_dim: int, dropout_p: float, window: tuple[int, int] = (-1, -1)) -> None:
    qkv = torch.zeros(512, 3, 2, head_dim, dtype=dtype, requires_grad=True)
    bounds = torch.tensor([0, 512], dtype=torch.int32)
    q, k, v = qkv.unbind(1)
    out = varlen_attention(
        q, k, v, bounds, bounds, 512, 512, dropout_p=dropout_p, seed=0, window_size=window, impl="triton"
    )
    out.backward(torch.zeros_like(out))


def layer_norm_cases() -> Iterator[Callable[[], None]]:
    """Forward and backward with every width, every mixture of dtypes and every set of flags, but not their product."""

    def case(
        num_columns, dtype, parameter_dtype, residual_dtype=None, has_x_bias=False, p=0.0, num_rows=48, has_bias=True
    ):
        def run():
            def empty(*shape, dtype):
                return torch.zeros(shape, dtype=dtype, requires_grad=True)

            x = empty(num_rows, num_columns, dtype=dtype)
            weight = empty(num_columns, dtype=parameter_dtype)
            bias = empty(num_columns, dtype=parameter_dtype) if has_bias else None
            if residual_dtype is None:
                y = layer_norm(x, weight, bias, impl="triton")
            else:
                residual = empty(num_rows, num_columns, dtype=residual_dtype)
                x_bias = empty(num_columns, dtype=parameter_dtype) if has_x_bias else None
                y = dropout_add_layer_norm(
                    x, residual, weight, bias, p=p, x_bias=x_bias, seed=0 if p else None, impl="triton"
                )
            y.backward(torch.zeros_like(y))

        return run

    fp32, bf16, _ = DTYPES
    # Every width, unaligned and long ones included, with the fewest and the most inputs, in the narrowest and widest dtype.
    for num_columns in (128, 256, 512, 768, 2048, 4096, 1023, 8192):
        for dtype, parameter_dtype, residual_dtype in ((bf16, bf16, bf16), (bf16, fp32, bf16), (fp32, fp32, fp32)):
            yield case(num_columns, dtype, parameter_dtype)
            yield case(num_columns, dtype, parameter_dtype, residual_dtype, has_x_bias=True, p=0.1)
    for num_columns in (768, 1023):
        # Every mixture of dtypes with the fewest and the most inputs, then every set of flags.
        for dtype in DTYPES:
            for parameter_dtype in dict.fromkeys((dtype, fp32)):
                yield case(num_columns, dtype, parameter_dtype)
                for residual_dtype in dict.fromkeys((dtype, fp32)):
                    yield case(num_columns, dtype, parameter_dtype, residual_dtype, has_x_bias=True, p=0.1)
        for has_x_bias in (False, True):
            for p in (0.0, 0.1):
                yield case(num_columns, bf16, fp32, bf16, has_x_bias, p)
        yield case(num_columns, bf16, fp32, has_bias=False)
        yield case(num_columns, bf16, fp32, bf16, has_x_bias=True, p=0.1, has_bias=False)
    # Without a bias at every width, as ModernBERT has it.
    for num_columns in (128, 256, 512, 2048, 4096, 8192):
        yield case(num_columns, bf16, fp32, has_bias=False)
    yield case(1, bf16, fp32, bf16, has_x_bias=True, p=0.1, num_rows=1)  # Triton compiles a size of 1 in as a constant


def gelu_cases() -> Iterator[Callable[[], None]]:
    """Forward and backward in every configuration."""

    def case(operation, dtype, bias_dtype, approximate, num_columns=3072):
        def run():
            width = num_columns if operation is bias_gelu else 2 * num_columns
            x = torch.zeros((48, width), dtype=dtype, requires_grad=True)
            bias = None if bias_dtype is None else torch.zeros(width, dtype=bias_dtype, requires_grad=True)
            y = operation(x, bias, approximate=approximate, impl="triton")
            y.backward(torch.zeros_like(y))

        return run

    fp32 = torch.float32
    for operation in (bias_gelu, geglu):
        for approximate in ("none", "tanh"):
            for dtype in DTYPES:
                for bias_dtype in dict.fromkeys((None, fp32, dtype)):
                    for num_columns in (3072, 1023):  # aligned rows, and unaligned ones
                        yield case(operation, dtype, bias_dtype, approximate, num_columns)
        yield case(
            operation, torch.bfloat16, fp32, "none", num_columns=1
        )  # Triton compiles a size of 1 in as a constant


def embedding_cases() -> Iterator[Callable[[], None]]:
    """Forward and backward with every width, every mixture of dtypes and every set of flags, but not their product."""

    def case(num_columns, weight_dtype, norm_dtype, dtype, p=0.0, types="none", positions="counted"):
        def run():
            def empty(*shape, dtype=weight_dtype):
                return torch.zeros(shape, dtype=dtype, requires_grad=True)

            ids = torch.zeros((4, 32), dtype=torch.int64)
            y = embedding_layer_norm(
                ids,
                empty(64, num_columns),
                empty(48, num_columns),
                None if types == "none" else empty(2, num_columns),
                empty(num_columns, dtype=norm_dtype),
                empty(num_columns, dtype=norm_dtype),
                token_type_ids=ids if types == "given" else None,
                position_ids=ids if positions == "given" else None,
                padding_idx=None if positions == "running" else 1,
                p=p,
                seed=0 if p else None,
                dtype=dtype,
                impl="triton",
            )
            y.backward(torch.zeros_like(y))

        return run

    fp32, bf16, _ = DTYPES
    # Every width, aligned and unaligned, with all inputs. Triton compiles a size of 1 in as a constant.
    for num_columns in (64, 128, 256, 512, 768, 2048, 4096, 1, 37, 127, 255, 511, 1023, 2047, 4095):
        for weight_dtype, norm_dtype, dtype in ((fp32, fp32, bf16), (bf16, bf16, bf16), (fp32, fp32, fp32)):
            yield case(num_columns, weight_dtype, norm_dtype, dtype, p=0.1, types="given")
    # Every mixture of dtypes with the most and the fewest inputs.
    for weight_dtype in DTYPES:
        for norm_dtype in dict.fromkeys((weight_dtype, fp32)):
            for dtype in DTYPES:
                yield case(768, weight_dtype, norm_dtype, dtype, p=0.1, types="given")
                yield case(768, weight_dtype, norm_dtype, dtype)
    # Every set of flags.
    for types in ("none", "first", "given"):
        for positions in ("counted", "running", "given"):
            for p in (0.0, 0.1):
                yield case(768, fp32, fp32, bf16, p, types, positions)


def cross_entropy_cases() -> Iterator[Callable[[], None]]:
    """Forward and backward in every configuration. None depends on the width, the vocabulary or the number of rows."""

    def case(dtype, label_smoothing, needs_gradient):
        def run():
            hidden = torch.zeros((2, 16), dtype=dtype, requires_grad=needs_gradient)
            weight = torch.zeros((50304, 16), dtype=dtype)
            targets = torch.zeros(2, dtype=torch.int64)
            output = linear_cross_entropy(
                hidden,
                weight,
                None,
                targets,
                label_smoothing=label_smoothing,
                num_classes=50265,
                impl="triton",
            )
            if needs_gradient:
                output.loss.backward()

        return run

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for label_smoothing in (0.0, 0.1):
            for needs_gradient in (False, True):
                yield case(dtype, label_smoothing, needs_gradient)


def masking_cases() -> Iterator[Callable[[], None]]:
    """The kernel in every configuration."""

    def mask(length: int, vocab_size: int, special_token_ids: tuple[int, ...], mlm_probability: float) -> None:
        mask_tokens(
            torch.zeros((2, length), dtype=torch.int64),
            mask_token_id=vocab_size - 1,
            vocab_size=vocab_size,
            special_token_ids=special_token_ids,
            mlm_probability=mlm_probability,
            seed=1,
            sample_ids=torch.arange(2),
            impl="triton",
        )

    # Every block size, with lengths that are multiples of 16 and others. Triton compiles a length of 1 in as a constant.
    for length in (512, 509, 1024, 1023, 2048, 2047, LONGEST_SEQUENCE, LONGEST_SEQUENCE - 1, 1):
        yield functools.partial(mask, length, 50265, (0, 1, 2, 3, 50264), 0.15)


def rotary_cases() -> Iterator[Callable[[], None]]:
    """Forward and backward in every configuration: head sizes with and without vector loads, and of one pair."""

    def case(dtype, table_dtype, head_dim):
        def run():
            qkv = torch.zeros(1, 32, 3, 2, head_dim, dtype=dtype, requires_grad=True)
            q, k, _ = qkv.unbind(2)
            cos, sin = (table.to(table_dtype) for table in make_tables(32, head_dim))
            out = torch.stack(apply_rotary(q, k, cos, sin, impl="triton"))
            out.backward(torch.zeros_like(out))

        return run

    for dtype in DTYPES:
        for table_dtype in dict.fromkeys((torch.float32, dtype)):
            for head_dim in (32, 64, 128, 48, 24, 2):
                yield case(dtype, table_dtype, head_dim)


def fp8_cases() -> Iterator[Callable[[], None]]:
    """Casts in every configuration, and the kernels that write 8 bits beside 16; e4m3 exists from sm_89 on."""

    def cast_case(dtype, num_columns):
        def run():
            x = torch.zeros((48, num_columns), dtype=dtype)
            cast(x, True, dtype=E5M2)
            if has_e4m3():
                cast(x, True)
                cast(x, True, torch.ones(1))
                cast_weight(x, impl="triton")

        return run

    def norm_case(dtype, num_columns):
        def run():
            if has_e4m3():
                x, residual, *vectors = (
                    torch.zeros(shape, dtype=dtype) for shape in [(48, num_columns)] * 2 + [num_columns] * 3
                )
                dropout_add_layer_norm(
                    x, residual, *vectors[:2], p=0.1, x_bias=vectors[2], seed=0, bound=torch.ones(()), impl="triton"
                )

        return run

    def mlp_case(approximate):
        def run():
            if has_e4m3():
                x = torch.zeros((48, 768), dtype=torch.bfloat16, requires_grad=True)
                up, down = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((3072, 768), (768, 3072)))
                cast = cast_mlp(up, torch.zeros(3072), down, torch.ones(()), impl="triton")
                y = fp8_mlp(x, up, torch.zeros(3072), down, approximate=approximate, weights_8=cast, impl="triton")
                y.backward(torch.zeros_like(y))

        return run

    for dtype in DTYPES:
        for num_columns in (768, 1023):
            yield cast_case(dtype, num_columns)
    for num_columns in (128, 256, 512, 768, 2048, 4096, 8192, 1023):
        yield norm_case(torch.bfloat16, num_columns)
    for approximate in ("none", "tanh"):
        yield mlp_case(approximate)


def has_e4m3() -> bool:
    """Whether the chip to compile for has this format."""
    return get_capability(torch.device("cpu")) >= 89
