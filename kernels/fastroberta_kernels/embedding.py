"""The embeddings of RoBERTa and BERT in one operation: three table lookups, LayerNorm, dropout; it also counts positions.

For token i of a sequence, with id w, position q and token type t, keep bits m (0 or 1) and scale s = 1 / P(keep):

    x      = word[w] + position[q] + token_type[t]
    x_hat  = (x - mean(x)) / sqrt(var(x) + eps)
    y      = s * m * (x_hat * weight + bias)

    g      = s * m * dy
    dx     = rstd * (g * weight - mean(g * weight) - x_hat * mean(g * weight * x_hat))
    dword[w] = sum of dx over the tokens with id w; likewise for positions and token types
    dweight  = sum of g * x_hat,  dbias = sum of g

Positions: RoBERTa gives padding the position `padding_idx`, and any other token `padding_idx` + 1 + the number of tokens
before it that are not padding (Liu et al., arXiv 1907.11692, as counted by fairseq and Hugging Face). BERT counts
0, 1, 2, ... The table rows `padding_idx` get no gradient, as in torch.nn.Embedding.

Shapes: input_ids (B, L) int64; tables (rows, d); weight, bias (d,); output (B, L, d).
Dtypes: tables, weight and bias fp32, bf16 or fp16. The sum, the statistics and all gradients are computed in fp32 and
rounded once: the output to `dtype`, each gradient to the dtype of its tensor. PyTorch also takes fp64, and computes in it.

Saved for the backward: the inputs, and positions (4 bytes per token). The sum and its statistics are recomputed from the
tables, which reads no more than a saved sum would.
Bytes moved for N tokens and elements of b bytes: forward N d (b word row + b output), while the tables of positions and
token types stay in cache. Backward: N d (b dy + b word row + 4 dx written + 8 dx read for words and for positions), and
V d b to zero the word gradient.

Determinism: no atomics. Ids are sorted (a stable sort), and each program sums the gradients of 32 neighbours in sorted
order. Where the tokens of one id extend over several such blocks, a second kernel adds up one partial sum per block. Even
a very frequent token is thus summed by many programs, in an order that depends on the ids alone.

Random numbers: the dropout decisions of `philox` for head 0, row b * L + l. The backward draws them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from . import philox
from ._dispatch import align, jit, launch, operator, tl, use_triton
from ._rows import KERNEL_DTYPES, REGISTER_LIMIT, unify_dtypes

MAX_COLUMNS = 4096  # the width of XLM-R XXL. Rows stay in registers, and the backward of longer ones spills


def create_positions_torch(input_ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    """Positions (B, L) int64 by RoBERTa's rule, or (1, L) by BERT's if `padding_idx` is None."""
    if padding_idx is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    is_token = input_ids != padding_idx
    return is_token.cumsum(1) * is_token + padding_idx


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in fp64 if it is fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _look_up(table: torch.Tensor, ids: torch.Tensor, padding_idx: int | None, what: str) -> torch.Tensor:
    try:
        return _widen(F.embedding(ids, table, padding_idx))
    except IndexError:
        bad = ids[(ids < 0) | (ids >= table.shape[0])][0].item()
        raise ValueError(f"embedding_layer_norm: {what} {bad} is outside the table of {table.shape[0]} rows") from None


def embedding_layer_norm_torch(
    input_ids: torch.Tensor,
    word_weight: torch.Tensor,
    position_weight: torch.Tensor,
    token_type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    *,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    padding_idx: int | None = None,
    padding_positions: bool = True,
    p: float = 0.0,
    eps: float = 1e-5,
    seed: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`embedding_layer_norm` in PyTorch operations; `seed` is as `philox.as_seed` returns it."""
    position_padding_idx = padding_idx if padding_positions else None
    if position_ids is None:
        position_ids = create_positions_torch(input_ids, position_padding_idx)
    x = _look_up(word_weight, input_ids, padding_idx, "token id")
    x = x + _look_up(position_weight, position_ids, position_padding_idx, "position")
    if token_type_ids is not None:
        x = x + _look_up(token_type_weight, token_type_ids, None, "token type")
    elif token_type_weight is not None:
        x = x + token_type_weight[0]
    norm_bias = None if norm_bias is None else norm_bias.to(x.dtype)
    y = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias, eps)
    if p > 0:
        keep = philox.dropout_keep_torch(seed, p, input_ids.numel(), y.shape[-1]).view(y.shape)
        y = y * keep.view(torch.uint8).to(y.dtype).mul_(philox.dropout_scale(p))
    return y.to(dtype or word_weight.dtype)


@jit
def _load_normalized(
    word_ptr, position_ptr, type_ptr, ids, positions, types, num_words, num_positions, num_types, num_columns,
    columns, row_mask, eps,
):  # fmt: skip
    """x_hat (rows, columns) and rstd (rows,) of the summed table rows. NaN if an id is outside its table."""
    column_mask = columns < num_columns
    inside = row_mask & (ids >= 0) & (ids < num_words) & (positions >= 0) & (positions < num_positions)
    if type_ptr is not None:
        inside = inside & (types >= 0) & (types < num_types)
    mask = inside[:, None] & column_mask[None, :]
    word_ptr += columns[None, :]
    position_ptr += columns[None, :]
    x = tl.load(word_ptr + ids[:, None] * num_columns, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(position_ptr + positions[:, None] * num_columns, mask=mask, other=0.0).to(tl.float32)
    if type_ptr is not None:
        type_ptr += columns[None, :]
        x += tl.load(type_ptr + types[:, None] * num_columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / num_columns
    x = tl.where(column_mask[None, :], x - mean[:, None], 0.0)
    # Subtract what rounding the mean left over, before the second pass over centred values.
    x = tl.where(column_mask[None, :], x - (tl.sum(x, axis=1) / num_columns)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / num_columns + eps)
    rstd = tl.where(inside | (row_mask == 0), rstd, float("nan"))
    return x * rstd[:, None], rstd


# Of the sizes, only the number of columns affects how rows are read.
@jit(do_not_specialize=["length", "num_words", "num_positions", "num_types", "padding_idx", "threshold"])
def _embedding_forward_kernel(
    ids_ptr, position_ids_ptr, type_ids_ptr,  # (B, L) int64; the last two may be None
    word_ptr, position_ptr, type_ptr, weight_ptr, bias_ptr, seed_ptr,  # tables (rows, d), (d,), (2,)
    y_ptr, positions_ptr,  # (B, L, d), (B, L) int32
    length, num_words, num_positions, num_types, num_columns, padding_idx, threshold, scale, eps,
    COUNT_TOKENS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, ROWS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * ROWS
    local = first + tl.arange(0, ROWS)
    row_mask = local < length
    rows = sequence * length + local
    columns = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + rows, mask=row_mask, other=0)
    if position_ids_ptr is not None:
        positions = tl.load(position_ids_ptr + rows, mask=row_mask, other=0)
    elif COUNT_TOKENS:
        before = tl.zeros((SPAN,), dtype=tl.int32)
        for start in range(0, first, SPAN):
            earlier = start + tl.arange(0, SPAN)
            others = tl.load(ids_ptr + sequence * length + earlier, mask=earlier < first, other=padding_idx)
            before += (others != padding_idx).to(tl.int32)
        is_token = (ids != padding_idx).to(tl.int32)
        positions = (tl.sum(before, axis=0) + tl.cumsum(is_token, axis=0)) * is_token + padding_idx
    else:
        positions = local
    positions = positions.to(tl.int64)
    types = ids * 0
    if type_ids_ptr is not None:
        types = tl.load(type_ids_ptr + rows, mask=row_mask, other=0)
    x_hat, _ = _load_normalized(
        word_ptr, position_ptr, type_ptr, ids, positions, types, num_words, num_positions, num_types, num_columns,
        columns, row_mask, eps,
    )  # fmt: skip
    column_mask = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    y = x_hat * weight[None, :] + bias[None, :]
    if HAS_DROPOUT:
        k0, k1, first_row = philox.load_seed(seed_ptr)
        head = tl.program_id(0) * 0
        keep = philox.dropout_keep(k0, k1, rows + first_row, head, 0, threshold, ROWS, BLOCK)
        y = tl.where(keep, y, 0.0) * scale
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(y_ptr + rows[:, None] * num_columns + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(positions_ptr + rows, positions.to(tl.int32), mask=row_mask)


@jit(do_not_specialize=["num_rows", "num_words", "num_positions", "num_types", "threshold"])
def _embedding_backward_kernel(
    dy_ptr, ids_ptr, positions_ptr, type_ids_ptr,  # (N, d); (N,) int64, int32, int64 or None
    word_ptr, position_ptr, type_ptr, weight_ptr, seed_ptr,  # tables (rows, d), (d,), (2,)
    dx_ptr, partials_ptr,  # fp32 (N, d), fp32 (2, programs, d): dweight, dbias
    num_rows, num_words, num_positions, num_types, num_columns, threshold, scale, eps,
    HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if HAS_DROPOUT:
        k0, k1, first_row = philox.load_seed(seed_ptr)
        head = tl.program_id(0) * 0
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & column_mask[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        ids = tl.load(ids_ptr + rows, mask=row_mask, other=0)
        positions = tl.load(positions_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        types = ids * 0
        if type_ids_ptr is not None:
            types = tl.load(type_ids_ptr + rows, mask=row_mask, other=0)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x_hat, rstd = _load_normalized(
            word_ptr, position_ptr, type_ptr, ids, positions, types, num_words, num_positions, num_types, num_columns,
            columns, row_mask, eps,
        )  # fmt: skip
        if HAS_DROPOUT:
            keep = philox.dropout_keep(k0, k1, rows + first_row, head, 0, threshold, ROWS, BLOCK)
            dy = tl.where(keep, dy, 0.0) * scale
        dweight += tl.where(mask, dy * x_hat, 0.0)
        dbias += dy
        g = dy * weight[None, :]
        mean_g = tl.sum(g, axis=1) / num_columns
        mean_gx = tl.sum(g * x_hat, axis=1) / num_columns
        dx = (g - mean_g[:, None] - x_hat * mean_gx[:, None]) * rstd[:, None]
        tl.store(dx_ptr + offsets, dx, mask=mask)
    partials_ptr += tl.program_id(0).to(tl.int64) * num_columns + columns
    tl.store(partials_ptr, tl.sum(dweight, axis=0), mask=column_mask)
    tl.store(partials_ptr + tl.num_programs(0).to(tl.int64) * num_columns, tl.sum(dbias, axis=0), mask=column_mask)


@jit(do_not_specialize=["num_rows", "num_table_rows"])
def _sum_blocks_kernel(
    sorted_ptr, order_ptr,  # (N,): ids in ascending order, and their original places
    rows_ptr, table_ptr, partials_ptr,  # fp32 (N, d); (table rows, d) filled with zeros; fp32 (blocks, 2, d)
    num_rows, num_table_rows, num_columns,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows of equal ids among COUNT sorted neighbours.

    The sum of a run of equal ids that lies inside the block goes to the table. The part of a run that began earlier goes
    to the block's partial 0, the part of a run that begins here and goes on to partial 1.
    """
    block = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    first = block * COUNT
    end = tl.minimum(first + COUNT, num_rows)
    run = tl.load(sorted_ptr + first)
    begins_here = (first == 0) | (tl.load(sorted_ptr + tl.maximum(first - 1, 0)) != run)
    goes_on = (end < num_rows) & (tl.load(sorted_ptr + tl.minimum(end, num_rows - 1)) == tl.load(sorted_ptr + end - 1))
    partials_ptr += block * 2 * num_columns + columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(COUNT):
        entry = tl.minimum(first + step, end - 1)
        next_run = tl.load(sorted_ptr + entry)
        row = tl.load(order_ptr + entry)
        is_entry = first + step < end
        x = tl.load(rows_ptr + row * num_columns + columns, mask=column_mask & is_entry, other=0.0)
        ended = next_run != run
        in_table = (run >= 0) & (run < num_table_rows)
        target = table_ptr + run.to(tl.int64) * num_columns + columns
        tl.store(target, total.to(table_ptr.dtype.element_ty), mask=column_mask & ended & begins_here & in_table)
        tl.store(partials_ptr, total, mask=column_mask & ended & (begins_here == 0))
        total = tl.where(ended, 0.0, total) + x
        begins_here = begins_here | ended
        run = next_run
    in_table = (run >= 0) & (run < num_table_rows)
    target = table_ptr + run.to(tl.int64) * num_columns + columns
    whole = begins_here & (goes_on == 0) & in_table
    tl.store(target, total.to(table_ptr.dtype.element_ty), mask=column_mask & whole)
    tl.store(partials_ptr, total, mask=column_mask & (begins_here == 0))
    tl.store(partials_ptr + num_columns, total, mask=column_mask & begins_here & goes_on)


@jit(do_not_specialize=["num_rows", "num_table_rows"])
def _join_blocks_kernel(
    sorted_ptr, run_ends_ptr,  # (N,), (N // COUNT,): where the run of a full block's last id ends
    table_ptr, partials_ptr,  # (table rows, d), fp32 (blocks, 2, d)
    num_rows, num_table_rows, num_columns,
    COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the partials of the run that begins in this block and goes on into later ones, if any."""
    block = tl.program_id(0).to(tl.int64)
    first = block * COUNT
    last = tl.minimum(first + COUNT, num_rows) - 1
    run = tl.load(sorted_ptr + last)
    goes_on = (last + 1 < num_rows) & (tl.load(sorted_ptr + tl.minimum(last + 1, num_rows - 1)) == run)
    begins_here = (first == 0) | (tl.load(sorted_ptr + tl.maximum(first - 1, 0)) != run)
    if goes_on & begins_here & (run >= 0) & (run < num_table_rows):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column_mask = columns < num_columns
        last_block = (tl.load(run_ends_ptr + block) - 1) // COUNT
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(block + 1, last_block + 1, ROWS):
            blocks = start + tl.arange(0, ROWS)
            mask = (blocks <= last_block)[:, None] & column_mask[None, :]
            total += tl.load(partials_ptr + blocks[:, None] * 2 * num_columns + columns[None, :], mask=mask, other=0.0)
        begin = tl.load(partials_ptr + (block * 2 + 1) * num_columns + columns, mask=column_mask, other=0.0)
        sums = begin + tl.sum(total, axis=0)
        target = table_ptr + run.to(tl.int64) * num_columns + columns
        tl.store(target, sums.to(table_ptr.dtype.element_ty), mask=column_mask)


_BLOCK_ENTRIES = 32
_MAX_PROGRAMS = 768  # of the backward, and partial sums of dweight and dbias. Fixed, so bits do not depend on the GPU


def _sum_by_id(rows: torch.Tensor, ids: torch.Tensor, num_table_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """A table (num_table_rows, d): the sums of `rows` (N, d) fp32 with equal `ids` (N,), zero for absent ids."""
    num_rows, num_columns = rows.shape
    table = rows.new_zeros((num_table_rows, num_columns), dtype=dtype)
    sorted_ids, order = torch.sort(ids.to(torch.int32), stable=True)  # half the bits to sort by
    # Only the last run of a full block can go on, so no other ends are read.
    last_ids = sorted_ids[_BLOCK_ENTRIES - 1 :: _BLOCK_ENTRIES].contiguous()
    run_ends = torch.searchsorted(sorted_ids, last_ids, right=True)
    num_blocks = -(-num_rows // _BLOCK_ENTRIES)
    partials = rows.new_empty(num_blocks, 2, num_columns)
    grid = (num_blocks, -(-num_columns // 256))
    sizes = (num_rows, num_table_rows, num_columns)
    launch(
        _sum_blocks_kernel,
        grid,
        sorted_ids,
        order,
        rows,
        table,
        partials,
        *sizes,
        COUNT=_BLOCK_ENTRIES,
        BLOCK=256,
        num_warps=2,
    )
    launch(
        _join_blocks_kernel,
        grid,
        sorted_ids,
        run_ends,
        table,
        partials,
        *sizes,
        COUNT=_BLOCK_ENTRIES,
        ROWS=8,
        BLOCK=256,
        num_warps=2,
    )
    return table


def _tile(num_columns: int, elements: int, widest_for_four: int) -> dict[str, int]:
    """ROWS, BLOCK and num_warps for a tile of about `elements`, with eight warps above `widest_for_four` columns.

    Other tiles spilled one or two registers with Triton 3.7.
    """
    block = max(64, 1 << (num_columns - 1).bit_length())
    num_warps = 2 if block == 64 else 4 if block <= widest_for_four else 8
    return {"ROWS": max(1, min(4, elements // block)), "BLOCK": block, "num_warps": num_warps}


def _empty_tables(word_weight, position_weight, token_type_weight, needs) -> list[torch.Tensor]:
    tables = (word_weight, position_weight, word_weight if token_type_weight is None else token_type_weight)
    return [table.new_empty(table.shape if need else 0) for table, need in zip(tables, needs)]


def _check_ids(ids: torch.Tensor | None, table: torch.Tensor | None, what: str) -> None:
    if ids is None or table is None or ids.device.type != "cpu":
        return
    bad = ids[(ids < 0) | (ids >= table.shape[0])]
    if bad.numel():
        raise ValueError(f"embedding_layer_norm: {what} {bad[0].item()} is outside the table of {table.shape[0]} rows")


@operator("embedding_layer_norm_forward")
def _forward_op(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    word_weight: torch.Tensor,
    position_weight: torch.Tensor,
    token_type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    seed: torch.Tensor | None,
    padding_idx: int,
    padding_positions: bool,
    p: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, L, d) and positions (B, L) int32. `padding_idx` is -1 for none."""
    _check_ids(input_ids, word_weight, "token id")
    _check_ids(position_ids, position_weight, "position")
    _check_ids(token_type_ids, token_type_weight, "token type")
    (batch, length), num_columns = input_ids.shape, word_weight.shape[1]
    y = word_weight.new_empty((batch, length, num_columns), dtype=dtype)
    positions = input_ids.new_empty((batch, length), dtype=torch.int32)
    tile = _tile(num_columns, 2048, 512)
    # Given no limit, ptxas spills for these in order to fit one more block.
    needs_limit = tile["BLOCK"] == 4096 or (tile["BLOCK"] == 1024 and dtype == torch.float32)
    registers = REGISTER_LIMIT if needs_limit else None
    launch(
        _embedding_forward_kernel,
        (batch * -(-length // tile["ROWS"]),),
        *map(align, (input_ids, position_ids, token_type_ids)),
        *map(align, (word_weight, position_weight, token_type_weight, norm_weight, norm_bias, seed)),
        y,
        positions,
        length,
        word_weight.shape[0],
        position_weight.shape[0],
        0 if token_type_weight is None else token_type_weight.shape[0],
        num_columns,
        padding_idx,
        philox.dropout_threshold(p),
        philox.dropout_scale(p),
        eps,
        COUNT_TOKENS=position_ids is None and padding_positions and padding_idx >= 0,
        HAS_DROPOUT=p > 0,
        SPAN=512,
        **tile,
        maxnreg=registers,
    )
    return y, positions


@_forward_op.register_fake
def _(
    input_ids, position_ids, token_type_ids, word_weight, position_weight, token_type_weight, norm_weight, norm_bias,
    seed, padding_idx, padding_positions, p, eps, dtype,
):  # fmt: skip
    y = word_weight.new_empty((*input_ids.shape, word_weight.shape[1]), dtype=dtype)
    return y, input_ids.new_empty(input_ids.shape, dtype=torch.int32)


@operator("embedding_layer_norm_backward")
def _backward_op(
    dy: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word_weight: torch.Tensor,
    position_weight: torch.Tensor,
    token_type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    seed: torch.Tensor | None,
    padding_idx: int,
    padding_positions: bool,
    p: float,
    eps: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the word, position and token type tables, weight and bias. Empty for tables that need none."""
    num_rows, num_columns = input_ids.numel(), word_weight.shape[1]
    needs_word, needs_position, needs_type = needs
    dx = dy.new_empty((num_rows, num_columns), dtype=torch.float32)
    tile = _tile(num_columns, 1024, 2048)
    needs_limit = p == 0 or word_weight.dtype != torch.float32
    registers = {512: REGISTER_LIMIT, 1024: REGISTER_LIMIT if needs_limit else None, 2048: 255}.get(tile["BLOCK"])
    programs = min(_MAX_PROGRAMS, -(-num_rows // tile["ROWS"]))
    partials = dx.new_empty(2, programs, num_columns)
    launch(
        _embedding_backward_kernel,
        (programs,),
        *map(align, (dy, input_ids, positions, token_type_ids)),
        *map(align, (word_weight, position_weight, token_type_weight, norm_weight, seed)),
        dx,
        partials,
        num_rows,
        word_weight.shape[0],
        position_weight.shape[0],
        0 if token_type_weight is None else token_type_weight.shape[0],
        num_columns,
        philox.dropout_threshold(p),
        philox.dropout_scale(p),
        eps,
        HAS_DROPOUT=p > 0,
        **tile,
        maxnreg=registers,
    )
    dweight, dbias = partials[0].sum(0), partials[1].sum(0)
    dword, dposition, dtype_ = _empty_tables(word_weight, position_weight, token_type_weight, (False,) * 3)
    if needs_word:
        dword = _sum_by_id(dx, input_ids.flatten(), word_weight.shape[0], word_weight.dtype)
        if padding_idx >= 0:
            dword[padding_idx].zero_()
    if needs_position or (needs_type and token_type_ids is None):
        by_position = _sum_by_id(dx, positions.flatten(), position_weight.shape[0], torch.float32)
    if needs_type and token_type_ids is None:
        # All tokens are of type 0, so its gradient is the sum over all positions.
        dtype_ = torch.zeros_like(token_type_weight, dtype=torch.float32)
        dtype_[0] = by_position.sum(0)
    elif needs_type:
        dtype_ = _sum_by_id(dx, token_type_ids.flatten(), token_type_weight.shape[0], torch.float32)
    if needs_position:
        dposition = by_position.to(position_weight.dtype)
        if padding_positions and padding_idx >= 0:
            dposition[padding_idx].zero_()
    if needs_type:
        dtype_ = dtype_.to(token_type_weight.dtype)
    return dword, dposition, dtype_, dweight.to(norm_weight.dtype), dbias.to(norm_bias.dtype)


@_backward_op.register_fake
def _(
    dy, input_ids, positions, token_type_ids, word_weight, position_weight, token_type_weight, norm_weight, norm_bias,
    seed, padding_idx, padding_positions, p, eps, needs,
):  # fmt: skip
    tables = _empty_tables(word_weight, position_weight, token_type_weight, needs)
    return *tables, torch.empty_like(norm_weight), torch.empty_like(norm_bias)


def _setup_context(ctx, inputs, output):
    input_ids, _, token_type_ids, *tensors, seed, ctx.padding_idx, ctx.padding_positions, ctx.p, ctx.eps, _ = inputs
    _, positions = output
    ctx.mark_non_differentiable(positions)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input_ids, positions, token_type_ids, *tensors, seed)


def _backward(ctx, dy, _):
    nothing = (None,) * 14
    if dy is None:
        return nothing
    needs = [bool(need) for need in ctx.needs_input_grad[3:6]]
    settings = (ctx.padding_idx, ctx.padding_positions, ctx.p, ctx.eps)
    *tables, dweight, dbias = _backward_op(dy, *ctx.saved_tensors, *settings, needs)
    tables = [table if need else None for table, need in zip(tables, needs)]
    return *nothing[:3], *tables, dweight, dbias, *nothing[8:]


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def embedding_layer_norm(
    input_ids: torch.Tensor,
    word_weight: torch.Tensor,
    position_weight: torch.Tensor,
    token_type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    *,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    padding_idx: int | None = None,
    padding_positions: bool = True,
    p: float = 0.0,
    eps: float = 1e-5,
    seed: int | torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """dropout(LayerNorm(word + position + token type)) of token ids.

    Args:
        input_ids: int64 (B, L). word_weight, position_weight: (rows, d). token_type_weight: (rows, d) or None.
        norm_weight, norm_bias: (d,), LayerNorm's. norm_bias may be None.
        token_type_ids: int64 (B, L). None means row 0 for every token.
        position_ids: int64, (B, L) or broadcastable to it. None means that positions are counted.
        padding_idx: the id of padding, whose row of word_weight gets no gradient. None if there is no padding.
        padding_positions: True for RoBERTa, whose row `padding_idx` of position_weight gets no gradient either. False for
            BERT, whose positions are 0 to L - 1, as they are without padding_idx.
        p: dropout probability. eps: LayerNorm's. seed: see `philox`; required if p > 0.
        dtype: dtype of the output; by default that of word_weight.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        (B, L, d).
    Raises:
        ValueError: mismatched shapes, dtypes or devices; sequences too long for the position table; p > 0 without a seed;
            Triton with more than 4096 columns; on a CPU an id outside its table. On CUDA, where checking would wait for
            the device, the output of such a token is NaN.
    """
    name = "embedding_layer_norm"
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"{name}: input_ids are {tuple(input_ids.shape)} {input_ids.dtype}, expected int64 (B, L)")
    num_columns = word_weight.shape[-1]
    for what, table in (("word", word_weight), ("position", position_weight), ("token_type", token_type_weight)):
        if table is not None and (table.dim() != 2 or table.shape[1] != num_columns or table.shape[0] == 0):
            raise ValueError(f"{name}: {what}_weight is {tuple(table.shape)}, expected (rows, {num_columns})")
    for what, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != (num_columns,):
            raise ValueError(f"{name}: {what} is {tuple(vector.shape)}, expected ({num_columns},)")
    if padding_idx is not None and not 0 <= padding_idx < word_weight.shape[0]:
        raise ValueError(f"{name}: padding_idx={padding_idx} is outside the {word_weight.shape[0]} rows of word_weight")
    batch, length = input_ids.shape
    counts_tokens = padding_idx is not None and padding_positions
    if position_ids is not None:
        shapes = ((length,), (1, length), (batch, length))
        if position_ids.dtype != torch.int64 or tuple(position_ids.shape) not in shapes:
            raise ValueError(
                f"{name}: position_ids are {tuple(position_ids.shape)} {position_ids.dtype}, expected int64 "
                f"{(batch, length)}"
            )
        position_ids = position_ids.expand(batch, length)
    else:
        first = padding_idx + 1 if counts_tokens else 0
        if first + length > position_weight.shape[0]:
            raise ValueError(
                f"{name}: {length} tokens are too many for {position_weight.shape[0]} positions, counted from {first}; "
                f"split or truncate the sequences to {position_weight.shape[0] - first} tokens"
            )
    if token_type_ids is not None:
        if token_type_weight is None:
            raise ValueError(f"{name}: token_type_ids need token_type_weight")
        if token_type_ids.dtype != torch.int64 or token_type_ids.shape != input_ids.shape:
            raise ValueError(
                f"{name}: token_type_ids are {tuple(token_type_ids.shape)} {token_type_ids.dtype}, expected int64 "
                f"{(batch, length)}"
            )
    if philox.dropout_threshold(p) and seed is None:
        raise ValueError(f"{name}: dropout with p={p} needs a seed; pass seed=, or p=0 outside training")
    tensors = (word_weight, position_weight, token_type_weight, norm_weight, norm_bias)
    use_kernel = use_triton(name, impl, input_ids, *tensors, token_type_ids, position_ids)
    seed = philox.as_seed(seed, input_ids.device) if p > 0 else None
    dtype = dtype or word_weight.dtype
    if not use_kernel:
        return embedding_layer_norm_torch(
            input_ids,
            *tensors,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            padding_idx=padding_idx,
            padding_positions=padding_positions,
            p=p,
            eps=eps,
            seed=seed,
            dtype=dtype,
        )
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(f"{name}: a weight is {tensor.dtype}; use float32, bfloat16 or float16, or impl='torch'")
    if num_columns > MAX_COLUMNS:
        raise ValueError(
            f"{name}: rows have {num_columns} columns, and the kernel takes at most {MAX_COLUMNS}; pass impl='torch'"
        )
    ids = [None if tensor is None else tensor.contiguous() for tensor in (input_ids, position_ids, token_type_ids)]
    # Triton compiles few kernels if tables share a dtype (see `unify_dtypes`).
    tables = list(tensors[:3])
    if any(table is not None and table.dtype != word_weight.dtype for table in tables):
        tables = [None if table is None else table.float() for table in tables]
    norm_bias = torch.zeros_like(norm_weight) if norm_bias is None else norm_bias
    vectors = unify_dtypes(tables[0], norm_weight, norm_bias)
    weights = [None if tensor is None else tensor.contiguous() for tensor in (*tables, *vectors)]
    padding = -1 if padding_idx is None else padding_idx
    return _forward_op(*ids, *weights, seed, padding, padding_positions, float(p), eps, dtype)[0]


class Embeddings(torch.nn.Module):
    """`embedding_layer_norm` as a module: RoBERTa's embeddings, or BERT's with padding_positions=False.

    Drops in training mode only. `bias` is whether LayerNorm has one. Parameters have Hugging Face's names:
    word_embeddings.weight, position_embeddings.weight, token_type_embeddings.weight, LayerNorm.weight, LayerNorm.bias.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.1,
        *,
        padding_positions: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.padding_idx = padding_idx
        self.padding_positions = padding_positions
        self.p = dropout
        position_padding_idx = padding_idx if padding_positions else None
        self.word_embeddings = torch.nn.Embedding(vocab_size, hidden_size, padding_idx, **options)
        self.position_embeddings = torch.nn.Embedding(
            max_position_embeddings, hidden_size, position_padding_idx, **options
        )
        self.token_type_embeddings = torch.nn.Embedding(type_vocab_size, hidden_size, **options)
        self.LayerNorm = torch.nn.LayerNorm(hidden_size, eps=layer_norm_eps, bias=bias, **options)

    def reset_parameters(self) -> None:
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            table.reset_parameters()
        self.LayerNorm.reset_parameters()

    def extra_repr(self) -> str:
        return f"padding_idx={self.padding_idx}, padding_positions={self.padding_positions}, p={self.p}"

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        seed: int | torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, L, hidden_size) in `dtype`. For the arguments see `embedding_layer_norm`."""
        return embedding_layer_norm(
            input_ids,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            padding_idx=self.padding_idx,
            padding_positions=self.padding_positions,
            p=self.p if self.training else 0.0,
            eps=self.LayerNorm.eps,
            seed=seed,
            dtype=dtype,
            impl=impl,
        )
