"""Choosing and replacing tokens: our kernel on the device against the collator of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from fastroberta_kernels.masking import mask_tokens
from torch import Tensor

from .case import (
    EAGER,
    LENGTH,
    OURS,
    VOCABULARY,
    Build,
    Case,
    Setting,
    Verdict,
    Work,
    count_sequences,
    need_package,
)

PROBABILITY, MASK, SPECIAL = 0.15, VOCABULARY - 1, (0, 1, 2, 3, VOCABULARY - 1)
SETTINGS = [Setting("base")]


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    sequences = count_sequences(device) * 4  # a draw of its own for every token: shares are known better in many
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY - 1, (sequences, LENGTH), generator=generator)
    ids[:, 0], ids[:, -1] = 0, 2
    ids = ids.to(device)
    sample_ids = torch.arange(sequences, device=device)
    implementations: dict[str, Build] = {
        EAGER: lambda dropout: mask_eagerly,
        OURS: lambda dropout: functools.partial(mask_ours, seed=torch.tensor([1, 0], device=device)),
        "transformers' collator": build_collator(device),
    }
    # Ids are read and written; positions and labels of the masked ones are written.
    moved = ids.numel() * 16 + sequences * round(PROBABILITY * LENGTH) * 16
    return Case(
        "mask_tokens", setting, f"{sequences} x {LENGTH}", torch.int64, (ids, sample_ids), implementations,
        Work(0, moved), verify=lambda name, function: hold_to_shares(function, ids, sample_ids),
    )  # fmt: skip


def mask_ours(ids: Tensor, sample_ids: Tensor, *, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Our operation as training uses it: (b, l) ids, and which positions were chosen is known without a search."""
    masked = mask_tokens(
        ids, mask_token_id=MASK, vocab_size=VOCABULARY, special_token_ids=SPECIAL, mlm_probability=PROBABILITY,
        seed=seed, sample_ids=sample_ids,
    )  # fmt: skip
    return masked.input_ids, masked


def mask_eagerly(ids: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Independent draws in PyTorch, special tokens left out: (b, l) ids and labels with -100 at what was not chosen."""
    special = (ids < 4) | (ids == MASK)
    chosen = (torch.rand(ids.shape, device=ids.device) < PROBABILITY) & ~special
    action = torch.rand(ids.shape, device=ids.device)
    replacement = torch.randint(4, VOCABULARY - 1, ids.shape, device=ids.device)
    masked = torch.where(chosen & (action < 0.8), MASK, ids)
    masked = torch.where(chosen & (action >= 0.8) & (action < 0.9), replacement, masked)
    return masked, torch.where(chosen, ids, -100)


def build_collator(device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., tuple[Tensor, Tensor]]:
        need_package("transformers", gpu=False, device=device)
        from transformers import DataCollatorForLanguageModeling

        class Tokenizer:  # what the collator asks of one
            mask_token, mask_token_id, pad_token_id = "<mask>", MASK, 1

            def convert_tokens_to_ids(self, token: str) -> int:
                return MASK

            def __len__(self) -> int:
                return VOCABULARY

        collator = DataCollatorForLanguageModeling(Tokenizer(), mlm_probability=PROBABILITY)

        def mask(ids: Tensor, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
            # It draws on the CPU, where a data loader calls it; from there the batch goes to the device.
            where = ids.device
            ids = ids.to("cpu", copy=True)
            special = (ids < 4) | (ids == MASK)
            masked, labels = collator.torch_mask_tokens(ids, special_tokens_mask=special)
            return masked.to(where), labels.to(where)

        return mask

    return build


def hold_to_shares(function: Callable, ids: Tensor, sample_ids: Tensor) -> Verdict:
    """15% of the ordinary tokens chosen, of them 80% masked, 10% random; specials and all others as they were."""
    masked, rest = function(ids, sample_ids)
    if isinstance(rest, Tensor):
        labels = rest
    else:
        used = rest.labels >= 0
        labels = torch.full_like(ids, -100).scatter_(1, torch.where(used, rest.positions, 0), rest.labels)
    chosen = labels != -100
    special = torch.isin(ids, torch.tensor(SPECIAL, device=ids.device))
    if (chosen & special).any():
        return Verdict({}, "a special token is chosen")
    if (masked != ids)[~chosen].any() or (labels != ids)[chosen].any():
        return Verdict({}, "labels are not the tokens that were replaced")
    count, ordinary = int(chosen.sum()), int((~special).sum())
    error = {"chosen": count / ordinary - PROBABILITY}
    bounds = {"chosen": (PROBABILITY * (1 - PROBABILITY) / ordinary) ** 0.5}
    replaced = (masked == MASK) & chosen
    for name, share, found in (
        ("masked", 0.8, replaced),
        ("random", 0.1, (masked != ids) & chosen & ~replaced),
    ):
        error[name] = int(found.sum()) / count - share
        bounds[name] = (share * (1 - share) / count) ** 0.5
    for name, deviation in error.items():
        if abs(deviation) > 5 * bounds[name]:
            return Verdict(error, f"share of {name} tokens is off by {deviation:.4f}")
    return Verdict(error)
