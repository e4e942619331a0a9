"""A pretrained model for another tokenizer: rows of known tokens are kept, new tokens get the mean of their parts."""

from __future__ import annotations

import dataclasses
import json

import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor

from ..corpus.tokenizer import special_token_ids, vocabulary_size
from ..hf import DECODER, HEAD_BIAS, POSITIONS, WORDS, Pretrained, lay_positions


def resize_vocabulary(pretrained: Pretrained, old: Tokenizer, new: Tokenizer) -> Pretrained:
    """The same model for the ids of another tokenizer.

    A token that both have keeps its rows of the word embeddings and of the head, and so do the special tokens, by the part
    they play. Any other token gets the mean of the rows of its parts, into which the old tokenizer cuts its text.

    Args:
        old: the model's tokenizer. new: the one to fit.
    """
    old_size, new_size = len(pretrained.tensors[WORDS]), vocabulary_size(new)
    sources = {
        token_id: [source] if source < old_size else []
        for token_id, source in zip(special_token_ids(new), special_token_ids(old))
    }
    old = _forget_tokens(old, old_size)
    old_ids = {text: token_id for text, token_id in _find_ids(old).items() if token_id < old_size}
    added: list[tuple[int, str]] = []
    for text, token_id in _find_ids(new).items():
        if text in old_ids:
            sources.setdefault(token_id, [old_ids[text]])
        elif token_id not in sources:
            added.append((token_id, text))
    num_kept = len({parts[0] for parts in sources.values() if parts})
    for (token_id, _), parts in zip(added, old.encode_batch([text for _, text in added], add_special_tokens=False)):
        sources[token_id] = [part for part in parts.ids if part < old_size]

    tensors = dict(pretrained.tensors)
    for name in (WORDS, DECODER, HEAD_BIAS):
        if name in tensors:
            tensors[name] = _average_rows(tensors[name], sources, new_size)
    first, pad = pretrained.pad_token_id + 1, special_token_ids(new).pad
    if pad + 1 != first:  # positions count from there
        count = len(tensors[POSITIONS]) - max(first, 2)
        tensors[POSITIONS] = lay_positions(tensors[POSITIONS][first : first + count], pad, count)
    note = (
        f"vocabulary of {old_size:,} fitted to {new_size:,} tokens: {num_kept:,} kept, {len(added):,} new with the mean of "
        f"their parts, {old_size - num_kept:,} dropped"
    )
    config = dataclasses.replace(
        pretrained.config, vocab_size=new_size, max_position_embeddings=len(tensors[POSITIONS])
    )
    return pretrained._replace(config=config, pad_token_id=pad, tensors=tensors, notes=[*pretrained.notes, note])


def _forget_tokens(tokenizer: Tokenizer, num_rows: int) -> Tokenizer:
    """The tokenizer without the tokens that were added to it and have no row in the model."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < num_rows]
    return Tokenizer.from_str(json.dumps(content))


def _find_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The text that each token stands for, with a space before it where it begins a word -> its id.

    Tokenizers mark that space, or its absence, in different ways. Tokens with part of a character have their own names.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    is_word_piece, is_byte_level = model["type"] == "WordPiece", '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
    added = {token["content"] for token in content["added_tokens"]}
    to_text = decoders.ByteLevel()
    ids: dict[str, int] = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        text = token
        if token in added:
            pass
        elif is_word_piece:
            prefix = model["continuing_subword_prefix"]
            text = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        elif is_byte_level:
            decoded = to_text.decode([token])
            text = token if "\ufffd" in decoded else decoded
        else:
            text = token.replace("▁", " ")
        ids[text] = token_id
    return ids


def _average_rows(table: Tensor, sources: dict[int, list[int]], num_rows: int) -> Tensor:
    """Each row the mean of its source rows; a single source is copied bit for bit, none gives the mean of all rows."""
    table = table.float()
    result = table.mean(dim=0).expand(num_rows, *table.shape[1:]).clone()
    single = {row: parts[0] for row, parts in sources.items() if len(parts) == 1}
    result[list(single)] = table[list(single.values())]
    rows = [row for row, parts in sources.items() if len(parts) > 1]
    parts = torch.tensor([part for row in rows for part in sources[row]], dtype=torch.long)
    counts = torch.tensor([len(sources[row]) for row in rows], dtype=torch.long)
    owners = torch.arange(len(rows)).repeat_interleave(counts)
    sums = table.new_zeros(len(rows), *table.shape[1:]).index_add_(0, owners, table[parts])
    result[rows] = sums / counts.view(-1, *[1] * (table.ndim - 1))
    return result
