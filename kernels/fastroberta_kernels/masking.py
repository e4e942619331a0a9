"""Token selection and corruption for masked language modelling, on the device, as a function of seed and sample number.

    k        = round(mlm_probability * n), n the number of tokens of the sequence that are not special
    chosen   = the k positions with the smallest keys, among those that are not special
    output   = <mask> (80%), a uniform ordinary token (10%), or the token itself (10%) at the chosen positions

Every sequence masks exactly k tokens (BERT and Hugging Face draw each token independently, fairseq also masks special
tokens), so shapes are static and a batch carries no surplus rows. The rounding is exact and the same on every device: the
probability is taken in millionths and k = floor((2 * n * millionths + 1,000,000) / 2,000,000), which rounds half up; k is
at least 1 if the probability and n are positive.

Random numbers
    Position t of sample s draws one Philox4x32-10 call with counter (t, 0x6D61736B, s low, s high) under the seed's
    key. Word 0 is the selection key (ties go to the smaller position). Word 1 is the action: below floor(0.8 * 2^32 + 1/2)
    `<mask>`, below floor(0.9 * 2^32 + 1/2) a random token, otherwise the token stays. Word 2 is the random token:
    floor(word * ordinary / 2^32) indexes the ids of [0, vocab_size) that are not special. The bias of this map is below
    ordinary / 2^32, 1.2e-5 relative at 50,000 ids. The result depends on nothing else: not on the place in the batch, the
    batch size, the device or the number of processes.

Shapes: input_ids int64 (B, L), sample_ids int64 (B,) -> input_ids int64 (B, L), positions and labels int64 (B, K), where
K is the k of a sequence of L ordinary tokens. There is no backward: everything is an integer. Bytes moved: 16 L + 16 K
per sequence. The kernel runs one program per sequence. It finds the k-th smallest key by bisection over its 32 bits,
which is exact, needs no sort, and costs 32 block sums. No atomics: repeated runs give the same bits.

Source: Devlin et al., "BERT" (arXiv 1810.04805), section 3.1 and appendix A.1; Liu et al., "RoBERTa" (arXiv
1907.11692), section 4.1 (dynamic masking).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ._dispatch import align, jit, launch, operator, tl, use_triton
from .philox import as_seed, load_seed, philox, philox_torch, split_words

IGNORED_LABEL = -100  # the default ignore_index of torch.nn.functional.cross_entropy
MILLION = 1_000_000
MASKING_TAG = 0x6D61736B  # "mask" in ASCII: separates these draws from all others under the same key
MASK_BELOW = 3_435_973_837  # 0.8 * 2^32
RANDOM_BELOW = 3_865_470_566  # 0.9 * 2^32
LONGEST_SEQUENCE = 4096  # a program keeps its sequence in registers; 8192 tokens spill


class MaskedTokens(NamedTuple):
    """A masked batch (B, L). Each sequence has K slots and uses one for each masked token."""

    input_ids: torch.Tensor  # int64 (B, L): the corrupted tokens
    positions: torch.Tensor  # int64 (B, K): masked positions, ascending; unused slots come last and hold L - 1
    labels: torch.Tensor  # int64 (B, K): the original tokens there; -100 in unused slots


def count_chosen(num_maskable: int, mlm_probability: float) -> int:
    """How many of `num_maskable` ordinary tokens are masked: rounded half up, at least 1 if possible.

    Raises:
        ValueError: mlm_probability outside [0, 1].
    """
    millionths = _as_millionths(mlm_probability)
    return max((2 * num_maskable * millionths + MILLION) // (2 * MILLION), min(num_maskable, millionths, 1))


def _as_millionths(mlm_probability: float) -> int:
    if not 0.0 <= mlm_probability <= 1.0:
        raise ValueError(f"mask_tokens: expected 0 <= mlm_probability <= 1, got {mlm_probability}")
    return max(round(mlm_probability * MILLION), 1) if mlm_probability > 0 else 0


def mask_tokens_torch(
    input_ids: torch.Tensor,
    sample_ids: torch.Tensor,
    seed: torch.Tensor,
    special_token_ids: torch.Tensor,
    mask_token_id: int,
    vocab_size: int,
    mlm_probability: float,
) -> MaskedTokens:
    """Masking in PyTorch operations. Equals the kernel bit for bit.

    Args:
        input_ids: int64 (B, L). sample_ids: int64 (B,). seed: int64 (2,), as `as_seed` returns it.
        special_token_ids: int64 (S,), strictly ascending.
    """
    length, device = input_ids.shape[1], input_ids.device
    millionths = _as_millionths(mlm_probability)
    num_slots = count_chosen(length, mlm_probability)
    slots = torch.arange(num_slots, device=device)

    maskable = torch.isin(input_ids, special_token_ids, invert=True)
    num_maskable = maskable.sum(dim=1, keepdim=True)
    num_chosen = torch.maximum(
        (2 * num_maskable * millionths + MILLION) // (2 * MILLION), num_maskable.clamp(max=min(millionths, 1))
    )
    used = slots < num_chosen  # (B, K)

    columns = torch.arange(length, device=device)
    tag = torch.full((), MASKING_TAG, device=device)
    selection, action, replacement, _ = philox_torch(
        (columns, tag, *split_words(sample_ids[:, None])), split_words(seed[0])
    )

    # Position below, 32 random bits above: distinct, positive, and ordered by key first. Special tokens come last.
    order = torch.where(maskable, (selection << 31) | columns, torch.iinfo(torch.int64).max)
    smallest = order.topk(num_slots, dim=1, largest=False).values & 0x7FFFFFFF
    chosen = torch.where(used, smallest, length).sort(dim=1).values  # unused slots come last
    positions = chosen.clamp(max=length - 1)

    original = input_ids.gather(1, positions)
    action, replacement = action.gather(1, positions), replacement.gather(1, positions)
    ordinary = (replacement * (vocab_size - special_token_ids.numel())) >> 32
    # special_token_ids[i] - i ordinary ids lie below the i-th special one.
    first_after = special_token_ids - torch.arange(special_token_ids.numel(), device=device)
    ordinary = ordinary + torch.searchsorted(first_after, ordinary, right=True)
    corrupted = torch.where(action < RANDOM_BELOW, ordinary, original)
    corrupted = torch.where(action < MASK_BELOW, mask_token_id, corrupted)
    # Unused slots write to an extra column, which is then cut off.
    output = torch.nn.functional.pad(input_ids, (0, 1)).scatter(1, chosen, corrupted)[:, :length].contiguous()
    return MaskedTokens(output, positions, torch.where(used, original, IGNORED_LABEL))


# Only the length affects how memory is read. Specialising on the others would compile a kernel per vocabulary.
@jit(do_not_specialize=["num_slots", "num_ordinary", "mask_token_id", "millionths", "num_special"])
def _mask_tokens_kernel(
    input_ptr,  # int64 (B, L)
    sample_ptr,  # int64 (B,)
    seed_ptr,  # int64 (2,)
    special_ptr,  # int64 (S,)
    output_ptr,  # int64 (B, L)
    positions_ptr,  # int64 (B, K)
    labels_ptr,  # int64 (B, K)
    length,
    num_slots,
    num_ordinary,
    mask_token_id,
    millionths,
    num_special,
    BLOCK: tl.constexpr,  # a power of two >= L
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < length
    tokens = tl.load(input_ptr + row * length + columns, mask=inside, other=0)
    maskable = inside
    for index in range(num_special):
        maskable = maskable & (tokens != tl.load(special_ptr + index))
    num_maskable = tl.sum(maskable.to(tl.int32))
    num_chosen = ((2 * num_maskable.to(tl.int64) * millionths + 1000000) // 2000000).to(tl.int32)
    num_chosen = tl.maximum(num_chosen, tl.minimum(tl.minimum(num_maskable, millionths), 1))

    k0, k1, _ = load_seed(seed_ptr)
    sample = tl.load(sample_ptr + row)
    zeros = tl.zeros((BLOCK,), dtype=tl.uint32)
    sample_low = zeros + (sample & 0xFFFFFFFF).to(tl.uint32)
    sample_high = zeros + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key, action, draw, _ = philox(columns.to(tl.uint32), zeros + 0x6D61736B, sample_low, sample_high, k0, k1, 10)

    # Find, bit by bit, the largest threshold with fewer than num_chosen keys below it: the num_chosen-th smallest key.
    threshold = tl.zeros((), dtype=tl.uint32)
    bit = threshold + 0x80000000
    for _ in range(32):
        candidate = threshold | bit
        below = tl.sum((maskable & (key < candidate)).to(tl.int32))
        threshold = tl.where(below < num_chosen, candidate, threshold)
        bit = bit >> 1
    chosen = maskable & (key < threshold)
    num_ties = num_chosen - tl.sum(chosen.to(tl.int32))
    tie = maskable & (key == threshold)
    chosen = chosen | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= num_ties))

    ordinary = tl.umulhi(draw, zeros + num_ordinary).to(tl.int64)
    for index in range(num_special):  # ascending: each special id at or below the draw moves it up by one
        ordinary += (ordinary >= tl.load(special_ptr + index)).to(tl.int64)
    corrupted = tl.where(action < 3865470566, ordinary, tokens)
    corrupted = tl.where(action < 3435973837, mask_token_id, corrupted)
    tl.store(output_ptr + row * length + columns, tl.where(chosen, corrupted, tokens), mask=inside)

    slot = row * num_slots + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(positions_ptr + slot, columns.to(tl.int64), mask=chosen)
    tl.store(labels_ptr + slot, tokens, mask=chosen)
    unused = (columns >= num_chosen) & (columns < num_slots)
    slot = row * num_slots + columns
    tl.store(positions_ptr + slot, zeros.to(tl.int64) + (length - 1), mask=unused)
    tl.store(labels_ptr + slot, zeros.to(tl.int64) - 100, mask=unused)


@operator("mask_tokens")
def _mask_tokens_op(
    input_ids: torch.Tensor,
    sample_ids: torch.Tensor,
    seed: torch.Tensor,
    special_token_ids: torch.Tensor,
    mask_token_id: int,
    vocab_size: int,
    mlm_probability: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    input_ids, sample_ids = align(input_ids), align(sample_ids)
    output, positions, labels = _mask_tokens_fake(
        input_ids, sample_ids, seed, special_token_ids, mask_token_id, vocab_size, mlm_probability
    )
    batch, length = input_ids.shape
    if length == 0:
        return output, positions, labels
    # Few block sizes mean few compilations. Idle lanes of short sequences hardly matter in a kernel this fast.
    block = max(512, 1 << (length - 1).bit_length())
    launch(
        _mask_tokens_kernel,
        (batch,),
        input_ids,
        sample_ids,
        align(seed),
        align(special_token_ids),
        output,
        positions,
        labels,
        length,
        positions.shape[1],
        vocab_size - special_token_ids.numel(),
        mask_token_id,
        _as_millionths(mlm_probability),
        special_token_ids.numel(),
        BLOCK=block,
        num_warps=8 if block > 1024 else 4,
        maxnreg=255 if block > 512 else None,  # with fewer registers per thread, long sequences spill
    )
    return output, positions, labels


@_mask_tokens_op.register_fake
def _mask_tokens_fake(input_ids, sample_ids, seed, special_token_ids, mask_token_id, vocab_size, mlm_probability):
    batch, length = input_ids.shape
    num_slots = count_chosen(length, mlm_probability)
    return (
        input_ids.new_empty((batch, length)),
        input_ids.new_empty((batch, num_slots)),
        input_ids.new_empty((batch, num_slots)),
    )


@lru_cache
def _cached_ids(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _check_vocabulary(mask_token_id: int, vocab_size: int, special_token_ids: tuple[int, ...] | torch.Tensor) -> None:
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_tokens: mask_token_id={mask_token_id} lies outside the vocabulary [0, {vocab_size})")
    if isinstance(special_token_ids, torch.Tensor):
        if special_token_ids.dtype != torch.int64 or special_token_ids.dim() != 1:
            raise ValueError(
                "mask_tokens: special_token_ids must be ints or one int64 vector, "
                f"got {tuple(special_token_ids.shape)} {special_token_ids.dtype}"
            )
        num_special = special_token_ids.numel()
    else:
        num_special = len(special_token_ids)
        if list(special_token_ids) != sorted(set(special_token_ids)):
            raise ValueError(f"mask_tokens: special_token_ids must ascend without repeats, got {special_token_ids}")
        if special_token_ids and not (special_token_ids[0] >= 0 and special_token_ids[-1] < vocab_size):
            raise ValueError(
                f"mask_tokens: special_token_ids {special_token_ids} lie outside the vocabulary [0, {vocab_size})"
            )
    if num_special >= vocab_size:
        raise ValueError(
            f"mask_tokens: vocab_size={vocab_size} with {num_special} special tokens leaves no token to draw as a "
            "replacement"
        )


def _check_batch(input_ids: torch.Tensor, sample_ids: torch.Tensor) -> None:
    if input_ids.dtype != torch.int64 or input_ids.dim() != 2:
        raise ValueError(
            f"mask_tokens: input_ids must be int64 (batch, length), got {tuple(input_ids.shape)} {input_ids.dtype}"
        )
    if sample_ids.dtype != torch.int64 or sample_ids.shape != input_ids.shape[:1]:
        raise ValueError(
            f"mask_tokens: sample_ids must be int64 ({input_ids.shape[0]},), one per sequence, "
            f"got {tuple(sample_ids.shape)} {sample_ids.dtype}"
        )
    if input_ids.shape[1] > LONGEST_SEQUENCE:
        raise ValueError(
            f"mask_tokens: sequences of {input_ids.shape[1]} tokens are longer than {LONGEST_SEQUENCE}; split them"
        )


def mask_tokens(
    input_ids: torch.Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_token_ids: tuple[int, ...] | torch.Tensor,
    mlm_probability: float = 0.15,
    seed: int | torch.Tensor,
    sample_ids: torch.Tensor,
    impl: str | None = None,
) -> MaskedTokens:
    """Mask a batch for language modelling: exactly k tokens per sequence, 80/10/10, never special ones.

    Args:
        input_ids: int64 (B, L), L up to 4096.
        mask_token_id: replaces 80% of the chosen tokens.
        vocab_size: random replacements are drawn from [0, vocab_size), special ids excluded.
        special_token_ids: ids that are neither masked nor drawn, ascending; usually includes `<mask>`. A tuple is checked.
            An int64 tensor is trusted, since checking it would wait for the device.
        mlm_probability: the fraction of ordinary tokens to mask, in millionths.
        seed: int or int64 tensor (see `philox`); its first row is not used.
        sample_ids: int64 (B,), the number of each sequence in the whole run. Equal numbers draw the same random numbers,
            so no number should occur twice under one seed.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".

    Returns:
        MaskedTokens with K = `count_chosen(L, mlm_probability)` slots per sequence.

    Raises:
        ValueError: wrong shapes, dtypes or devices, mlm_probability outside [0, 1], ids outside the vocabulary, or a
            vocabulary without ordinary tokens.
    """
    _check_vocabulary(mask_token_id, vocab_size, special_token_ids)
    _check_batch(input_ids, sample_ids)
    if not isinstance(special_token_ids, torch.Tensor):
        if torch.compiler.is_compiling() or type(input_ids) is not torch.Tensor:
            # A traced or fake tensor must not outlive its trace in the cache.
            special_token_ids = torch.tensor(special_token_ids, dtype=torch.int64, device=input_ids.device)
        else:
            special_token_ids = _cached_ids(tuple(special_token_ids), input_ids.device)
    seed = as_seed(seed, input_ids.device)
    arguments = (input_ids, sample_ids, seed, special_token_ids, mask_token_id, vocab_size, float(mlm_probability))
    if use_triton("mask_tokens", impl, input_ids, sample_ids, seed, special_token_ids):
        return MaskedTokens(*_mask_tokens_op(*arguments))
    return mask_tokens_torch(*arguments)


class TokenMasker(torch.nn.Module):
    """`mask_tokens` as a module that holds the tokenizer's constants. It has no parameters and an empty state_dict.

    Special ids are kept in a buffer, so a training step copies nothing to the device.
    """

    def __init__(
        self, mask_token_id: int, vocab_size: int, special_token_ids: tuple[int, ...], mlm_probability: float = 0.15
    ):
        super().__init__()
        _check_vocabulary(mask_token_id, vocab_size, special_token_ids)
        _as_millionths(mlm_probability)
        self.mask_token_id = mask_token_id
        self.vocab_size = vocab_size
        self.mlm_probability = mlm_probability
        self.special_token_ids: torch.Tensor
        self.register_buffer("special_token_ids", torch.tensor(special_token_ids, dtype=torch.int64), persistent=False)

    def forward(self, input_ids: torch.Tensor, sample_ids: torch.Tensor, seed: int | torch.Tensor) -> MaskedTokens:
        """Mask `input_ids` int64 (B, L) of samples `sample_ids` int64 (B,)."""
        return mask_tokens(
            input_ids,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            special_token_ids=self.special_token_ids,
            mlm_probability=self.mlm_probability,
            seed=seed,
            sample_ids=sample_ids,
        )

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, mlm_probability={self.mlm_probability}"
