"""Masked words filled in, as transformers' fill-mask pipeline does it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from ..corpus.tokenizer import special_token_ids, special_token_names
from ..errors import DataError
from ..hf import longest_sequence
from ..model import RobertaForMaskedLM
from .inference import batch_by_length, predict_masks


@dataclass(frozen=True)
class Prediction:
    """One token for one mask: its text, its id, its probability."""

    token: str
    token_id: int
    score: float


@dataclass(frozen=True)
class FilledText:
    """A text, and the best predictions for each of its masks, in order."""

    text: str
    masks: list[list[Prediction]]

    def as_table(self) -> str:
        """The predictions in lines for a person."""
        lines = [self.text]
        for number, predictions in enumerate(self.masks, 1):
            if len(self.masks) > 1:
                lines.append(f"  mask {number}")
            lines += [f"  {one.score:7.2%}  {one.token!r}" for one in predictions]
        return "\n".join(lines)


class MaskFiller:
    """Fills masks in.

    Attributes:
        num_tokens: tokens processed so far, padding left out.
    Args:
        batch_tokens: tokens of a batch at most, padding included.
    """

    def __init__(self, model: RobertaForMaskedLM, tokenizer: Tokenizer, batch_tokens: int):
        self._model, self._tokenizer, self._batch_tokens = model, tokenizer, batch_tokens
        self.mask_token = special_token_names(tokenizer)[-1]
        self._mask_token_id = special_token_ids(tokenizer).mask
        self.num_tokens = 0

    def fill(self, texts: list[str], top_k: int) -> list[FilledText]:
        """The `top_k` most probable tokens for each mask of each text.

        Raises:
            DataError: a text without a mask, or with a mask beyond the model's longest sequence.
        """
        sequences = []
        for number, (text, encoded) in enumerate(zip(texts, self._tokenizer.encode_batch_fast(texts)), 1):
            if encoded.ids.count(self._mask_token_id) != text.count(self.mask_token) or self.mask_token not in text:
                longest = longest_sequence(self._model.config.max_position_embeddings, self._model.pad_token_id)
                fault = f"no {self.mask_token}; write it where a word is to be predicted"
                if self.mask_token in text:
                    fault = f"a {self.mask_token} lies beyond the first {longest} tokens; shorten the text"
                start = text if len(text) <= 60 else f"{text[:57]}..."
                raise DataError(f"text {number} ({start!r}): {fault}")
            sequences.append(encoded.ids)
        filled: list[FilledText | None] = [None] * len(texts)
        for batch in batch_by_length(sequences, self._batch_tokens):
            self.num_tokens += sum(len(sequences[index]) for index in batch)
            for index, rows in zip(
                batch, predict_masks(self._model, [sequences[index] for index in batch], self._mask_token_id)
            ):
                best = rows.topk(min(top_k, rows.shape[1]))
                masks = [
                    [
                        Prediction(self._tokenizer.decode([i], skip_special_tokens=False), i, p)
                        for i, p in zip(ids, scores)
                    ]
                    for ids, scores in zip(best.indices.tolist(), best.values.tolist())
                ]
                filled[index] = FilledText(texts[index], masks)
        return [one for one in filled if one is not None]
