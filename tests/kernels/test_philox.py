"""The generator: published vectors, Triton and PyTorch equal bit for bit, and the statistics that dropout rests on."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from fastroberta_kernels import philox as generator
from fastroberta_kernels._dispatch import jit, launch, tl
from fastroberta_kernels.philox import (
    as_seed,
    dropout_keep_torch,
    dropout_scale,
    dropout_threshold,
    fold_seed,
    philox_torch,
)
from torch.utils.flop_counter import FlopCounterMode

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)

# The known-answer vectors that the authors of Philox publish with Random123: rounds, counter, key, words.
KNOWN_ANSWERS = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def philox_integers(counter, key, rounds=10):
    """Philox4x32 in plain integers, a third implementation to hold the other two against."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & ONES, (a >> 32) ^ c3 ^ k1, a & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def invert_philox_integers(words, key, rounds=10):
    """The counter that `philox_integers` maps to `words`: the odd multipliers have inverses modulo 2^32."""
    inverse_a, inverse_b = pow(0xD2511F53, -1, 1 << 32), pow(0xCD9E8D57, -1, 1 << 32)
    w0, w1, w2, w3 = words
    for index in reversed(range(rounds)):
        k0, k1 = (key[0] + index * 0x9E3779B9) & ONES, (key[1] + index * 0xBB67AE85) & ONES
        c0, c2 = (w3 * inverse_a) & ONES, (w1 * inverse_b) & ONES
        w1, w3 = w0 ^ k0 ^ (c2 * 0xCD9E8D57 >> 32), w2 ^ k1 ^ (c0 * 0xD2511F53 >> 32)
        w0, w2 = c0, c2
    return w0, w1, w2, w3


def as_tensors(words):
    return tuple(torch.tensor(word) for word in words)


def random_words(count, num_words, seed):
    source = random.Random(seed)
    edge = (0, 1, 2**31 - 1, 2**31, ONES)  # where signed and unsigned arithmetic part
    return [
        tuple(source.choice(edge) if source.random() < 0.3 else source.getrandbits(32) for _ in range(num_words))
        for _ in range(count)
    ]


@jit
def philox_kernel(counter_ptr, key_ptr, output_ptr, ROUNDS: tl.constexpr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    c0 = tl.load(counter_ptr + index * 4).to(tl.uint32)
    c1 = tl.load(counter_ptr + index * 4 + 1).to(tl.uint32)
    c2 = tl.load(counter_ptr + index * 4 + 2).to(tl.uint32)
    c3 = tl.load(counter_ptr + index * 4 + 3).to(tl.uint32)
    k0 = tl.load(key_ptr + index * 2).to(tl.uint32)
    k1 = tl.load(key_ptr + index * 2 + 1).to(tl.uint32)
    w0, w1, w2, w3 = generator.philox(c0, c1, c2, c3, k0, k1, ROUNDS)
    tl.store(output_ptr + index * 4, w0.to(tl.int64))
    tl.store(output_ptr + index * 4 + 1, w1.to(tl.int64))
    tl.store(output_ptr + index * 4 + 2, w2.to(tl.int64))
    tl.store(output_ptr + index * 4 + 3, w3.to(tl.int64))


@jit
def keep_kernel(
    seed_ptr, output_ptr, num_rows, num_columns, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the keep mask of a grid (rows, heads, columns from first_column), tile by tile."""
    k0, k1, first_row = generator.load_seed(seed_ptr)
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(2) * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    keep = generator.dropout_keep(
        k0, k1, first_row + rows.to(tl.int64), head, first_column + start, threshold, ROWS, COLUMNS
    )
    offsets = (rows[:, None] * tl.num_programs(1) + head) * num_columns + columns[None, :]
    tl.store(output_ptr + offsets, keep.to(tl.int8), mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


def keep_by_triton(seed, p, num_rows, num_heads, num_columns, first_column=0, tile=(8, 32)):
    output = torch.full((num_rows, num_heads, num_columns), -1, dtype=torch.int8, device=seed.device)
    grid = (-(-num_rows // tile[0]), num_heads, -(-num_columns // tile[1]))
    launch(
        keep_kernel,
        grid,
        seed,
        output,
        num_rows,
        num_columns,
        first_column,
        dropout_threshold(p),
        ROWS=tile[0],
        COLUMNS=tile[1],
    )
    assert (output >= 0).all()
    return output.bool()


@pytest.mark.parametrize("traced", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("rounds, counter, key, words", KNOWN_ANSWERS)
def test_torch_gives_the_published_words(rounds, counter, key, words, traced):
    with (
        FlopCounterMode(display=False) if traced else nullcontext()
    ):  # what follows PyTorch's operations keeps NumPy out
        ours = philox_torch(as_tensors(counter), as_tensors(key), rounds)
    assert tuple(word.item() for word in ours) == words
    assert philox_integers(counter, key, rounds) == words


@pytest.mark.parametrize("rounds", [7, 10])
def test_triton_gives_the_published_words(rounds, device):
    answers = [answer for answer in KNOWN_ANSWERS if answer[0] == rounds]
    counters = [answer[1] for answer in answers] + random_words(13, 4, seed=0)
    keys = [answer[2] for answer in answers] + random_words(13, 2, seed=1)
    output = torch.zeros((16, 4), dtype=torch.int64, device=device)
    launch(
        philox_kernel,
        (1,),
        torch.tensor(counters, device=device),
        torch.tensor(keys, device=device),
        output,
        ROUNDS=rounds,
        COUNT=16,
    )
    assert output[:3].tolist() == [list(answer[3]) for answer in answers]
    expected = [list(philox_integers(counter, key, rounds)) for counter, key in zip(counters, keys)]
    assert output.tolist() == expected


def test_torch_equals_plain_integers_on_edges_and_random_words():
    counters, keys = random_words(500, 4, seed=2), random_words(500, 2, seed=3)
    ours = philox_torch(tuple(torch.tensor(counters).T), tuple(torch.tensor(keys).T))
    expected = [philox_integers(counter, key) for counter, key in zip(counters, keys)]
    assert torch.stack(ours, dim=1).tolist() == [list(words) for words in expected]


def test_distinct_counters_never_collide():
    """Philox under one key is a bijection on counters, shown by its inverse: no two (position, sample) draw alike."""
    for counter, key in zip(random_words(200, 4, seed=4), random_words(200, 2, seed=5)):
        words = tuple(word.item() for word in philox_torch(as_tensors(counter), as_tensors(key)))
        assert invert_philox_integers(words, key) == counter


def test_ten_million_derived_keys_are_distinct():
    """64 random bits collide among 10^7 keys with probability 3e-6; a fault in the words' use would show."""
    pieces = [fold_seed(1234, torch.arange(start, start + 50_000)) for start in range(0, 10_000_000, 50_000)]
    keys = torch.cat(pieces).sort().values
    assert keys.numel() == 10_000_000
    assert (keys[1:] != keys[:-1]).all()


def test_fold_seed_keeps_the_parts_of_a_path_apart():
    steps, layers, sites = torch.arange(20)[:, None, None], torch.arange(20)[:, None], torch.arange(20)
    keys = fold_seed(7, steps, layers, sites)
    assert keys.shape == (20, 20, 20) and keys.dtype == torch.int64
    assert keys.unique().numel() == keys.numel()  # (1, 2, 3) and (3, 2, 1) among them
    assert fold_seed(7, 3, 4, 5) == keys[3, 4, 5]
    assert fold_seed(7, 3) == keys[3, 0, 0]
    assert fold_seed(torch.tensor([7, 99]), 3, 4, 5) == keys[3, 4, 5], "the first row is no part of the key"
    assert not torch.isin(fold_seed(8, steps, layers, sites), keys).any()
    with pytest.raises(ValueError, match="at most three"):
        fold_seed(7, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "seed, key",
    [
        (0, 0),
        (5, 5),
        (-1, -1),
        (2**63 - 1, 2**63 - 1),
        (2**63, -(2**63)),
        (2**64 - 1, -1),
        (2**64 + 5, 5),
        (-(2**70) + 3, 3),
    ],
)
def test_as_seed_takes_integers_modulo_two_to_64(seed, key):
    assert as_seed(seed, torch.device("cpu")).tolist() == [key, 0]


def test_as_seed_takes_tensors():
    cpu = torch.device("cpu")
    assert as_seed(torch.tensor(3), cpu).tolist() == [3, 0]
    assert as_seed(torch.tensor([3]), cpu).tolist() == [3, 0]
    pair = torch.tensor([3, 2**40])
    assert as_seed(pair, cpu).data_ptr() == pair.data_ptr(), "a pair must be used in place: graphs replay on its memory"
    for wrong in (torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="seed: expected an int"):
            as_seed(wrong, cpu)
    with pytest.raises(ValueError, match="seed: expected an int"):
        as_seed(pair, torch.device("meta"))


@pytest.mark.parametrize("key", [0, -1, 123456789012345, -(2**62) - 12345])
@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 3, 2**40 + 1])  # 2^32 - 3: the high word changes inside the tile
def test_triton_keeps_what_torch_keeps(key, first_row, device):
    seed = torch.tensor([key, first_row], device=device)
    ours = keep_by_triton(seed, 0.1, num_rows=11, num_heads=3, num_columns=50)
    assert torch.equal(ours, dropout_keep_torch(seed, 0.1, 11, 50, num_heads=3))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_triton_and_torch_agree_at_the_ends_of_p(p, device):
    seed = torch.tensor([9, 0], device=device)
    assert torch.equal(keep_by_triton(seed, p, 4, 1, 64), dropout_keep_torch(seed, p, 4, 64, num_heads=1))


def test_triton_starts_at_any_multiple_of_sixteen_columns(device):
    seed = torch.tensor([77, 2], device=device)
    whole = dropout_keep_torch(seed, 0.3, 6, 160, num_heads=2)
    for first_column in (16, 48, 128):
        ours = keep_by_triton(seed, 0.3, 6, 2, 160 - first_column, first_column)
        assert torch.equal(ours, whole[..., first_column:])


@pytest.mark.parametrize("tile", [(1, 16), (2, 128), (16, 16), (4, 64)])
def test_masks_do_not_depend_on_the_tile(tile, device):
    seed = torch.tensor([31, 2**33], device=device)
    assert torch.equal(keep_by_triton(seed, 0.2, 5, 2, 70, tile=tile), keep_by_triton(seed, 0.2, 5, 2, 70))


def test_a_slice_of_the_rows_draws_what_the_whole_draws_there():
    whole = dropout_keep_torch(torch.tensor([4, 1000]), 0.1, 50, 70, num_heads=2)
    assert torch.equal(dropout_keep_torch(torch.tensor([4, 1020]), 0.1, 30, 70, num_heads=2), whole[20:])
    assert torch.equal(dropout_keep_torch(torch.tensor([4, 1000]), 0.1, 50, 33, num_heads=2), whole[..., :33])
    assert torch.equal(dropout_keep_torch(torch.tensor([4, 1000]), 0.1, 50, 70), whole[:, 0]), "no head is head 0"


def test_the_pieces_of_the_twin_fit_together():
    """The twin works in pieces of 98,304 calls; a mask over many pieces equals its rows drawn one at a time."""
    seed = torch.tensor([5, 0])
    whole = dropout_keep_torch(seed, 0.1, 100, 40_000)
    assert whole.shape == (100, 40_000)
    for row in (0, 38, 39, 40, 99):
        assert torch.equal(dropout_keep_torch(seed + torch.tensor([0, row]), 0.1, 1, 40_000)[0], whole[row])


def test_empty_masks():
    assert dropout_keep_torch(torch.tensor([5, 0]), 0.1, 0, 10, num_heads=2).shape == (0, 2, 10)
    assert dropout_keep_torch(torch.tensor([5, 0]), 0.1, 3, 0).shape == (3, 0)


@pytest.mark.parametrize(
    "p, threshold", [(0.0, 0), (1e-9, 1), (0.001, 1), (0.1, 26), (0.25, 64), (0.5, 128), (0.999, 255), (1.0, 256)]
)
def test_dropout_threshold(p, threshold):
    assert dropout_threshold(p) == threshold
    assert dropout_scale(p) == (256 / (256 - threshold) if p < 1 else 0.0)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_threshold_refuses(p):
    with pytest.raises(ValueError, match="expected 0 <= p <= 1"):
        dropout_threshold(p)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_keep_rate_is_binomial(p):
    keep = dropout_keep_torch(torch.tensor([2024, 0]), p, 1000, 1000)
    rate = 1 - dropout_threshold(p) / 256
    bound = 5 * (keep.numel() * rate * (1 - rate)) ** 0.5  # five standard deviations: 6e-7
    assert abs(keep.sum().item() - keep.numel() * rate) <= bound
    # Scaling by dropout_scale makes the mean exact.
    assert p == 1 or abs(rate * dropout_scale(p) - 1) < 1e-12


def test_rows_columns_and_heads_keep_their_share():
    """No row, head or column is favoured: chi-square over the sums along each axis, within five deviations."""
    keep = dropout_keep_torch(torch.tensor([11, 0]), 0.1, 600, 256, num_heads=12).double()
    rate = 230 / 256
    for axes in ((0, 1), (0, 2), (1, 2)):
        sums = keep.sum(axes)
        count = keep.numel() / sums.numel()
        chi_square = ((sums - count * rate).square() / (count * rate * (1 - rate))).sum().item()
        freedom = sums.numel()
        assert abs(chi_square - freedom) <= 5 * (2 * freedom) ** 0.5, f"sums over axes {axes}"


def test_neighbours_are_uncorrelated():
    """Columns 1 to 33 apart (within a word, a call, the next call), rows, heads, keys: correlation within 5 sigma."""
    keep = dropout_keep_torch(torch.tensor([42, 0]), 0.5, 400, 256, num_heads=4).double() * 2 - 1
    other = dropout_keep_torch(torch.tensor([43, 0]), 0.5, 400, 256, num_heads=4).double() * 2 - 1
    pairs = {f"columns {lag} apart": (keep[..., lag:], keep[..., :-lag]) for lag in (1, 2, 3, 4, 8, 15, 16, 17, 32, 33)}
    pairs |= {f"rows {lag} apart": (keep[lag:], keep[:-lag]) for lag in (1, 2, 16)}
    pairs |= {f"heads {lag} apart": (keep[:, lag:], keep[:, :-lag]) for lag in (1, 2, 3)}
    pairs["neighbouring keys"] = (keep, other)
    for what, (left, right) in pairs.items():
        assert abs((left * right).mean().item()) <= 5 / left.numel() ** 0.5, what


def test_bytes_are_uniform():
    """Each of the 256 byte values appears as often: the keep rates of all thresholds at once, by chi-square."""
    words = philox_torch((torch.arange(100_000), *as_tensors((0, 0, 0))), as_tensors((1, 2)), rounds=7)
    for word in words:
        for shift in (0, 8, 16, 24):
            counts = torch.bincount((word >> shift) & 0xFF, minlength=256).double()
            expected = 100_000 / 256
            chi_square = ((counts - expected).square() / expected).sum().item()
            assert abs(chi_square - 255) <= 5 * (2 * 255) ** 0.5


def test_counters_are_laid_out_as_documented():
    """Bits are pinned through plain integers: a change of the layout would change every run that is resumed."""
    words = philox_integers((2, 3, 4, 0x666F6C64), (1, 0))
    key = fold_seed(1, 2, 3, 4).item()
    assert key & (2**64 - 1) == (words[1] << 32) | words[0]
    # Row 2^35 + 6, head 1, columns 0 to 23: two groups of sixteen, bytes in little-endian order.
    keep = dropout_keep_torch(torch.tensor([-2, 2**35]), 0.5, 7, 24, num_heads=2)[6, 1]
    words = [philox_integers((group, 1, 6, 8), (ONES - 1, ONES), rounds=7) for group in (0, 1)]
    drawn = b"".join(word.to_bytes(4, "little") for group in words for word in group)
    assert keep.tolist() == [byte >= 128 for byte in drawn[:24]]


@pytest.mark.parametrize("seed", [(5, 0), (-77, 2**32 - 3), (2**62, -(2**40))])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_numpy_keeps_what_torch_keeps(seed, p):
    """A dispatch mode follows PyTorch's operations, so PyTorch draws inside of it."""
    ours = dropout_keep_torch(torch.tensor(seed), p, 9, 50, num_heads=3)
    with FlopCounterMode(display=False):
        assert torch.equal(dropout_keep_torch(torch.tensor(seed), p, 9, 50, num_heads=3), ours)
        key = fold_seed(seed[0], 3, torch.arange(4)[:, None], torch.arange(3))
    assert torch.equal(fold_seed(seed[0], 3, torch.arange(4)[:, None], torch.arange(3)), key)


@pytest.mark.gpu
def test_large_masks_on_the_device(device):
    seed = torch.tensor([-5, 2**32 - 1000], device=device)
    ours = keep_by_triton(seed, 0.1, 4096, 12, 512, tile=(64, 128))
    assert torch.equal(ours, dropout_keep_torch(seed, 0.1, 4096, 512, num_heads=12))
    assert torch.equal(ours.cpu(), dropout_keep_torch(seed.cpu(), 0.1, 4096, 512, num_heads=12))
