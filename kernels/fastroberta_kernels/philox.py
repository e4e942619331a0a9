"""Counter-based random numbers for dropout and masking, equal bit for bit in Triton, PyTorch and NumPy.

Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11, section 3) is a keyed bijection on
128-bit counters: four 32-bit words in, four random words out, no state. With key (k0, k1) and constants M0, M1, a
round maps

    (c0, c1, c2, c3) -> (hi(M1*c2) ^ c1 ^ k0,  lo(M1*c2),  hi(M0*c0) ^ c3 ^ k1,  lo(M0*c0))

and the Weyl constants W0, W1 are added to the key between rounds. Philox4x32-10 is the published default. Seven rounds
already pass BigCrush (same paper, table 2), and dropout uses those.

Since the output is a function of the counter, a random decision can depend on what it is about (row, column, head,
sample) and not on where it is computed (program id, block size, rank, call order).

Seeds
    A seed is an int, or an int64 tensor on the device: `(key,)` or `(key, first_row)`. `first_row` is added to row
    numbers, so that a slice of a batch draws what the whole batch would have drawn there. A tensor can be updated
    between replays of a CUDA graph. The key may be any 64-bit value.

Dropout decisions
    One Philox call makes sixteen 8-bit decisions. The decision of (row, head, column) is byte `column % 16` of the call
    with counter (column // 16, head, row low, row high), counting bytes through the four words in little-endian order.
    An element is kept if its byte is >= threshold, and the threshold is p rounded to a multiple of 1/256. For p=0.1 the
    actual probability is 26/256 and kept values are scaled by 256/230, so the mean is exact.

On a CPU
    A draw is a hundred operations on integers, each so short in a small draw that only the call counts. NumPy's calls take
    a third of the time of PyTorch's, so small draws are made in NumPy, where it is installed, and so is every draw of a
    single thread. The arithmetic is the same lines of code.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ._dispatch import is_traced, jit, tl

try:
    import numpy as np
except ImportError:  # PyTorch works without it
    np = None  # type: ignore[assignment]

WORD = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57  # M0, M1
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85  # W0, W1: golden ratio and sqrt(3) - 1
DROPOUT_ROUNDS = 7
BYTE_ONES = 0x0101010101010101
CALLS_AT_ONCE = 65_536  # Philox calls of a piece in PyTorch, whose intermediate tensors stay in cache
CALLS_OF_A_THREAD = 32_768  # PyTorch divides no smaller tensors among threads


def philox_torch(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
    rounds: int = 10,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32 on int64 tensors that hold 32-bit words. Counters and keys broadcast."""
    if key[0].numel() > 1 or not can_use_numpy(*counter, *key):
        return run_rounds(counter, key, rounds)
    arrays = [word.numpy() for word in counter]
    if not is_for_one_thread(np.broadcast(*arrays).size):
        return run_rounds(counter, key, rounds)
    with np.errstate(over="ignore"):  # NumPy warns where a product of scalars overflows
        w0, w1, w2, w3 = run_rounds(arrays, [word.item() for word in key], rounds)
    return torch.as_tensor(w0), torch.as_tensor(w1), torch.as_tensor(w2), torch.as_tensor(w3)


def run_rounds(counter: Any, key: Any, rounds: int) -> Any:
    """Philox4x32 on int64 tensors or NumPy arrays alike. The words of the key may also be ints."""
    c0, c1, c2, c3 = counter
    for step in range(rounds):
        k0, k1 = (key[0] + step * WEYL_A) & WORD, (key[1] + step * WEYL_B) & WORD
        # A product of two 32-bit words overflows int64 only into its sign, so all 64 bits are right. Its low word is cut
        # out late, by the mask on what it was xored into.
        product_a, product_b = c0 * ROUND_A, c2 * ROUND_B
        c0, c2 = (product_b >> 32) ^ (c1 ^ k0), (product_a >> 32) ^ (c3 ^ k1)
        c0 &= WORD
        c2 &= WORD
        c1, c3 = product_b, product_a
    return c0, c1 & WORD, c2, c3 & WORD


def can_use_numpy(*tensors: torch.Tensor) -> bool:
    """Whether NumPy is there, and the tensors are what it can read: on a CPU, and plain."""
    if np is None or torch.compiler.is_compiling() or is_traced():
        return False
    return all(type(tensor) is torch.Tensor and tensor.is_cpu for tensor in tensors)


def is_for_one_thread(num_calls: int) -> bool:
    """Whether PyTorch would draw in one thread, which NumPy does in less time."""
    return num_calls <= CALLS_OF_A_THREAD or torch.get_num_threads() == 1


def split_words(value: Any) -> tuple[Any, Any]:
    """The low and the high 32-bit word of an int64 tensor, array or int, each in one of its kind."""
    return value & WORD, (value >> 32) & WORD


def as_seed(seed: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The seed as an int64 tensor (key, first_row) on `device`. Ints are taken modulo 2**64.

    Raises:
        ValueError: a tensor of the wrong dtype, shape or device.
    """
    if isinstance(seed, int):
        key = seed & ((1 << 64) - 1)
        return torch.tensor([key - (1 << 64) if key >> 63 else key, 0], dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() not in (1, 2) or seed.device != device:
        raise ValueError(
            f"seed: expected an int, or one or two int64 on {device} (key, first_row); "
            f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    seed = seed.reshape(-1)
    return seed if seed.numel() == 2 else torch.cat((seed, seed.new_zeros(1)))


def fold_seed(seed: int | torch.Tensor, *path: int | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Derive independent keys from `seed`, one per element of the broadcast `path` of up to three 32-bit numbers.

    Returns:
        int64 keys in the broadcast shape of `path`. The first row of `seed` is dropped.
    """
    if len(path) > 3:
        raise ValueError(f"fold_seed: a path has at most three numbers, got {len(path)}")
    device = seed.device if isinstance(seed, torch.Tensor) else device or torch.device("cpu")
    words = [torch.as_tensor(part, dtype=torch.int64, device=device) & WORD for part in path]
    words += [torch.zeros((), dtype=torch.int64, device=device)] * (3 - len(words))
    # The last counter word separates derived keys from all dropout and masking draws under the same key.
    tag = torch.full((), 0x666F6C64, dtype=torch.int64, device=device)
    low, high, _, _ = philox_torch((words[0], words[1], words[2], tag), split_words(as_seed(seed, device)[0]))
    return (high << 32) | low


def dropout_threshold(p: float) -> int:
    """How many of the 256 byte values drop an element: at least 1 if p > 0, at most 255 if p < 1.

    Raises:
        ValueError: p outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability: expected 0 <= p <= 1, got {p}")
    return min(max(round(p * 256), 1), 255) if 0 < p < 1 else 256 * int(p)


def dropout_scale(p: float) -> float:
    """The factor of kept elements: the inverse of the actual probability of keeping one."""
    threshold = dropout_threshold(p)
    return 256 / (256 - threshold) if threshold < 256 else 0.0


def dropout_keep_torch(
    seed: torch.Tensor, p: float, num_rows: int, num_columns: int, num_heads: int | None = None
) -> torch.Tensor:
    """Which elements dropout keeps, on the device of `seed`.

    Args:
        seed: int64 (2,): key and first row, as `as_seed` returns it.
    Returns:
        bool (num_rows, num_columns), or (num_rows, num_heads, num_columns) if `num_heads` is given.
    """
    num_groups, heads_or_one = -(-num_columns // 16), 1 if num_heads is None else num_heads
    threshold = dropout_threshold(p)
    if threshold in (0, 256):
        heads = () if num_heads is None else (num_heads,)
        return torch.full((num_rows, *heads, num_columns), threshold == 0, device=seed.device)
    shape = num_rows, heads_or_one, num_groups, 2
    arange: Any
    keep: Any
    in_numpy = can_use_numpy(seed) and is_for_one_thread(num_rows * heads_or_one * num_groups)
    if in_numpy:
        arange, keep = functools.partial(np.arange, dtype=np.int64), np.empty(shape, np.int64)
    else:
        arange, keep = functools.partial(torch.arange, device=seed.device), seed.new_empty(shape)
    key, first_row = seed.tolist() if in_numpy else seed.unbind()
    groups, each_head = arange(num_groups), arange(heads_or_one)[:, None]
    rows = arange(num_rows)[:, None, None] + first_row
    starts, rows_at_once = range(1), num_rows
    if not torch.compiler.is_compiling():  # while it compiles, one piece, whose size may be symbolic
        pieces = max(1, round(num_rows * num_groups * heads_or_one / CALLS_AT_ONCE))
        rows_at_once = max(1, -(-num_rows // pieces))
        starts = range(0, num_rows, rows_at_once)
    for start in starts:
        piece = slice(start, start + rows_at_once)
        words = run_rounds((groups, each_head, *split_words(rows[piece])), split_words(key), DROPOUT_ROUNDS)
        for half in (0, 1):
            keep[piece, ..., half] = compare_bytes((words[2 * half + 1] << 32) | words[2 * half], threshold)
    # In memory the bytes of an int64 lie in the order given at the top: little-endian.
    keep = keep.view(np.bool_ if in_numpy else torch.bool).reshape(num_rows, heads_or_one, num_groups * 16)
    keep = keep[:, 0, :num_columns] if num_heads is None else keep[..., :num_columns]
    return torch.from_numpy(keep) if in_numpy else keep


def compare_bytes(eight: Any, threshold: int) -> Any:
    """Compare the eight bytes of each int64 word with `threshold` (1 to 255): byte >= threshold, as a word of 1s and 0s.

    This is eight comparisons for the price of one, as PyTorch compares bytes no faster than words. Bit 7 of each byte of
    the sum says whether the lower seven bits reach those of the threshold, without a carry into the next byte; together
    with bit 7 of the byte itself it decides.
    """
    result = eight & (0x7F * BYTE_ONES)
    result += ((128 if threshold <= 128 else 256) - threshold) * BYTE_ONES
    if threshold <= 128:
        result |= eight
    else:
        result &= eight
    result >>= 7
    result &= BYTE_ONES
    return result


@jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr):
    """Philox4x32 on uint32 blocks or scalars, which broadcast."""
    for _ in tl.static_range(ROUNDS):
        high_a = tl.umulhi(c0, c0 * 0 + 0xD2511F53)
        low_a = c0 * 0xD2511F53
        high_b = tl.umulhi(c2, c2 * 0 + 0xCD9E8D57)
        low_b = c2 * 0xCD9E8D57
        c0 = high_b ^ c1 ^ k0
        c1 = low_b
        c2 = high_a ^ c3 ^ k1
        c3 = low_a
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def load_seed(seed_ptr):
    """The key words (uint32, uint32) and first row (int64) of a seed tensor as `as_seed` returns it."""
    key = tl.load(seed_ptr)
    first_row = tl.load(seed_ptr + 1)
    return (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32), first_row


@jit
def dropout_keep(k0, k1, rows, head, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The keep mask (ROWS, COLUMNS) of a tile. `rows` is int64 (ROWS,), the seed's first row added; columns start at
    `first_column`. Both `first_column` and COLUMNS are multiples of 16."""
    GROUPS: tl.constexpr = COLUMNS // 16
    zeros = tl.zeros((ROWS, GROUPS), dtype=tl.uint32)
    c0 = zeros + (first_column // 16 + tl.arange(0, GROUPS)).to(tl.uint32)[None, :]
    c1 = (zeros + head).to(tl.uint32)  # head may be a constant
    c2 = zeros + (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c3 = zeros + ((rows >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1, 7)
    # join appends a last dimension, so this nesting lays the words out as 0, 1, 2, 3.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, GROUPS * 4))
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)
    keep = ((words[:, :, None] >> shifts[None, None, :]) & 0xFF) >= threshold
    return tl.reshape(keep, (ROWS, COLUMNS))
