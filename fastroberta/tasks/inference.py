"""Running a trained encoder over texts: load it, tokenize, and batch texts of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..checkpoint import verify_directory
from ..corpus.tokenizer import load_tokenizer
from ..hf import load_huggingface, longest_sequence
from ..model import AttentionScope, RobertaForMaskedLM
from ..parallel.processes import select_device
from ..precision import settle_precision


def load_encoder(checkpoint: str, device: str, precision: str) -> tuple[RobertaForMaskedLM, Tokenizer]:
    """A model in eval mode on its device, and its tokenizer, which truncates to the model's longest sequence.

    Args:
        checkpoint: of this trainer, or a Hugging Face RoBERTa directory.
    Raises:
        CheckpointError: missing or damaged. ConfigurationError: no tokenizer, or no such device.
    """
    directory = Path(checkpoint)
    verify_directory(directory)
    on = select_device(device)
    model = load_huggingface(directory).to(on)
    model.set_precision(settle_precision(precision, on)[0])
    tokenizer = load_tokenizer(directory)
    tokenizer.enable_truncation(longest_sequence(model.config.max_position_embeddings, model.pad_token_id))
    return model, tokenizer


def batch_by_length(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """The numbers of all sequences, the longest first, in batches that hold at most `max_tokens` with their padding.

    A sequence longer than that is a batch of its own. The longest first, so that too little memory shows at once.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    start = 0
    while start < len(order):
        count = max(1, max_tokens // max(1, len(sequences[order[start]])))
        yield order[start : start + count]
        start += count


def pad_batch(
    sequences: Iterable[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, AttentionScope]:
    """Token ids (b, l) with padding at the end, int64, and the scope that leaves it out."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    key_lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return input_ids.to(device), AttentionScope(key_lengths=key_lengths.to(device))


@torch.no_grad()
def predict_masks(model: RobertaForMaskedLM, sequences: list[list[int]], mask_token_id: int) -> list[Tensor]:
    """Probabilities (masks, vocab_size), fp32 on the CPU, for the masked tokens of each sequence of a batch.

    Only masked rows pass through the last layer's MLP and through the head. Every sequence needs at least one mask.
    """
    device = next(model.parameters()).device
    input_ids, scope = pad_batch(sequences, model.pad_token_id, device)
    places = [[at for at, token in enumerate(sequence) if token == mask_token_id] for sequence in sequences]
    most = max(map(len, places))
    positions = torch.tensor([found + found[-1:] * (most - len(found)) for found in places], device=device)
    hidden = model.encode(input_ids, scope, positions=positions)
    probabilities = (
        model.lm_head.logits(hidden, model.decoder_weight, model.config.vocab_size).float().softmax(dim=-1).cpu()
    )
    return [rows[: len(found)] for rows, found in zip(probabilities, places)]


@torch.no_grad()
def pool_batch(model: RobertaForMaskedLM, sequences: list[list[int]], pooling: str) -> Tensor:
    """One vector (b, d) per sequence, fp32 on the CPU: the mean over its tokens, special ones included, or its first."""
    device = next(model.parameters()).device
    input_ids, scope = pad_batch(sequences, model.pad_token_id, device)
    hidden = model.encode(input_ids, scope).float()
    if pooling == "first":
        return hidden[:, 0].cpu()
    assert scope.key_lengths is not None
    is_token = (torch.arange(input_ids.shape[1], device=device) < scope.key_lengths[:, None]).unsqueeze(-1)
    return ((hidden * is_token).sum(dim=1) / scope.key_lengths[:, None]).cpu()
