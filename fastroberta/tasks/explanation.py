"""Which tokens a prediction rests on, by integrated gradients (Sundararajan et al., arXiv 1703.01365).

The integral runs from a text whose words are all hidden by the mask token to the text itself. A token's share is what it
adds to the log-probability of the target, in nats; the shares add up to the whole difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from ..corpus.tokenizer import special_token_ids, special_token_names
from ..errors import ConfigurationError, DataError
from ..hf import longest_sequence
from .heads import load_with_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Explanation:
    """A prediction, and each token's share in it.

    Attributes:
        tokens: as they stand in the text, with the space before them; special ones by name.
        shares: of each token, in nats (a regression: in its own unit).
        output, baseline: log-probability of the target (a regression's output) for the text, and with its words hidden.
        predictions: the most probable tokens or labels with their probabilities (a regression's output).
    """

    checkpoint: str
    tokens: list[str]
    shares: list[float]
    target: str
    output: float
    baseline: float
    predictions: list[tuple[str, float]]

    @property
    def remainder(self) -> float:
        """What the shares miss of the difference that they should add up to; more steps make it smaller."""
        return self.output - self.baseline - sum(self.shares)

    @property
    def is_regression(self) -> bool:
        """Whether the model gives one number and no probabilities."""
        return len(self.predictions) == 1

    def as_table(self) -> str:
        """The shares in lines for a person."""
        what = "output" if self.is_regression else "log-probability"
        lines = [f"{self.target!r}: {what} {self.output:.3f}, and {self.baseline:.3f} with all words hidden"]
        lines += [f"  {share:+8.3f}  {show_token(token)}" for token, share in zip(self.tokens, self.shares)]
        return "\n".join([*lines, f"  {self.remainder:+8.3f}  not accounted for (numerical integral)"])


def show_token(token: str) -> str:
    """A token without the space before it, and visible where it is nothing else."""
    return token.strip() or "␣"


def explain(
    checkpoint: Path, text: str, *, pair: str | None = None, target: str | None = None, steps: int = 50
) -> tuple[Explanation, list[Tensor]]:
    """The explanation of a prediction, and the attention of each layer: (heads, length, length), a row sums to 1.

    Args:
        pair: second text, for a classifier of pairs. target: token or label (its name or number); None: the most probable.
    Raises:
        ConfigurationError: captum is missing, or the target is unknown. DataError: a text that is too long, or a masked
            LM's without exactly one mask. CheckpointError: no masked LM, and no classifier of texts.
    """
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise ConfigurationError("explain needs captum; pip install 'fastroberta[explain]'") from error
    heads = ["MaskedLM", "SequenceClassification"]
    model, head, tokenizer = load_with_head(checkpoint, heads=heads, extra="explain", attention="eager")
    model.requires_grad_(False)
    if pair is not None and head == "MaskedLM":
        raise ConfigurationError("pair: a masked LM takes one text; leave --pair out")
    encoding = tokenizer.encode(text, pair)
    special = special_token_ids(tokenizer)
    longest = longest_sequence(model.config.max_position_embeddings, special.pad)
    if len(encoding.ids) > longest:
        raise DataError(f"text: {len(encoding.ids)} tokens, the model takes {longest}; shorten it")
    place = 0
    if head == "MaskedLM":
        if encoding.ids.count(special.mask) != 1:
            name = special_token_names(tokenizer)[-1]
            raise DataError(
                f"text: contains {name} {encoding.ids.count(special.mask)} times; put it once, where to predict"
            )
        place = encoding.ids.index(special.mask)

    input_ids = torch.tensor([encoding.ids])
    baseline_ids = torch.where(torch.isin(input_ids, torch.tensor(special)), input_ids, special.mask)
    # Given, because the model would count them from the ids, which captum replaces.
    position_ids = torch.arange(input_ids.shape[1])[None] + model.config.pad_token_id + 1

    def compute_scores(ids: Tensor, positions: Tensor) -> Tensor:
        logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
        logits = logits[:, place] if head == "MaskedLM" else logits
        return logits if logits.shape[-1] == 1 else logits.log_softmax(dim=-1)

    with torch.no_grad():
        scores = compute_scores(input_ids, position_ids)[0]
        baseline_scores = compute_scores(baseline_ids, position_ids)[0]
        attentions = model(input_ids, position_ids=position_ids, output_attentions=True).attentions
    index = int(scores.argmax()) if target is None else _find_target(target, head, model, tokenizer)
    method = LayerIntegratedGradients(compute_scores, model.get_input_embeddings())
    shares = method.attribute(
        input_ids,
        baselines=baseline_ids,
        target=index,
        additional_forward_args=(position_ids,),
        n_steps=steps,
        internal_batch_size=max(1, 4096 // input_ids.shape[1]),
    )
    values = scores if len(scores) == 1 else scores.exp()
    best = values.topk(min(5, len(values)))
    explanation = Explanation(
        checkpoint=str(checkpoint),
        tokens=_show_tokens(encoding, text, pair),
        shares=shares.sum(dim=-1)[0].tolist(),
        target=_name_target(index, head, model, tokenizer),
        output=float(scores[index]),
        baseline=float(baseline_scores[index]),
        predictions=[
            (_name_target(i, head, model, tokenizer), p) for i, p in zip(best.indices.tolist(), best.values.tolist())
        ],
    )
    return explanation, [layer[0] for layer in attentions]


def _find_target(target: str, head: str, model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """Number of a label, by its name or as it is; or id of a token, which usually begins with a space."""
    if head == "SequenceClassification":
        labels = _list_labels(model)
        numbers = [*map(str, range(len(labels)))]
        for names in (labels, numbers):  # a label's own name counts first: it may itself be a number
            if target in names:
                return names.index(target)
        raise ConfigurationError(f"target = {target}: no label of this model; it has {', '.join(labels)}")
    for text in (f" {target}", target):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) == 1:
            return ids[0]
    raise ConfigurationError(f"target = {target}: not one token of this model's vocabulary; give a shorter word")


def _list_labels(model: PreTrainedModel) -> list[str]:
    names: dict[Any, str] = model.config.id2label or {}
    return [names[index] for index in sorted(names)]


def _name_target(index: int, head: str, model: PreTrainedModel, tokenizer: Tokenizer) -> str:
    if head == "SequenceClassification":
        return _list_labels(model)[index]
    return tokenizer.decode([index], skip_special_tokens=False)


def _show_tokens(encoding: Encoding, text: str, pair: str | None) -> list[str]:
    """Each token as it stands in its text, with the space before it.

    A byte-level token may be a part of a character, which then stands for the first; the others are "⋯".
    """
    texts, ends, shown = (text, pair or ""), [0, 0], []
    for token, number, (start, end) in zip(encoding.tokens, encoding.sequence_ids, encoding.offsets):
        if number is None:
            shown.append(token)
            continue
        before = ends[number]
        if texts[number][before:start].isspace():
            start = before
        shown.append("⋯" if start < before else texts[number][start:end] or token)
        ends[number] = end
    return shown
