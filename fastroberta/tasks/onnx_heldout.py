"""What int8 changes on held-out data: the metrics of fine-tuning before and after, and how many predictions stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from ..corpus.tokenizer import SpecialTokenIds
from ..hf import longest_sequence
from .choices import LETTERS
from .encoding import encode_examples
from .examples import Examples, count_tokens, make_collate
from .inference import batch_by_length
from .metrics import list_predictions, score_examples
from .tables import Table, read_table
from .task import COLUMNS, GLUE, METRICS, SavedTask, list_columns, load_task

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import PreTrainedModel

KINDS = {
    "TokenClassification": "tokens",
    "QuestionAnswering": "question-answering",
    "MultipleChoice": "multiple-choice",
}
PROBLEM_TYPES = {"regression": "regression", "multi_label_classification": "multi-label"}
MASKED = 0.15  # of the ordinary tokens of a text, and at least one
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class HeldOut:
    """Examples of a fine-tuned model's task; `is_scored`: whether they have labels."""

    task: SavedTask
    labels: Sequence[str]
    part: Examples
    is_scored: bool


def read_held_out(file: Path, directory: Path, model: PreTrainedModel, head: str, tokenizer: Tokenizer) -> HeldOut:
    """A file of examples, read as in fine-tuning; of a model from elsewhere, its columns are told by their names.

    Args:
        directory: of the model, where `task.json` may be. tokenizer: its truncation is changed.
    Raises:
        DataError: the file cannot be read, lacks a column, or has a label that the model does not have.
    """
    names: dict[Any, str] = model.config.id2label or {}
    labels = [names[number].removeprefix("LABEL_") for number in sorted(names)]
    task = load_task(directory)
    table = read_table(file, task.header if task else None, bool(task and task.of_glue))
    if task is None:
        task = _guess_task(table, head, model)
    table.require(
        list_columns(task.of_file(file), with_label=False), "name its columns so, or give a file like the dev data"
    )
    longest = longest_sequence(model.config.max_position_embeddings, model.config.pad_token_id)
    is_scored = task.label in table.records[0]
    part = encode_examples(
        table, task.of_file(file), tokenizer, labels, min(longest, task.max_length or longest), task.stride,
        with_label=is_scored,
    )  # fmt: skip
    return HeldOut(task, LETTERS if task.kind == "multiple-choice" else labels, part, is_scored)


def _guess_task(table: Table, head: str, model: PreTrainedModel) -> SavedTask:
    """The task of a model without task.json: its kind by the head, its columns the usual ones or those of GLUE."""
    kind = KINDS.get(head) or PROBLEM_TYPES.get(model.config.problem_type or "", "classification")
    if head == "SequenceClassification" and model.config.num_labels == 1:
        kind = "regression"
    found = set(table.records[0])
    usual = COLUMNS.get(kind, ("text", None, "label"))
    known = sorted((columns[1:4] for columns in GLUE.values()), key=lambda columns: columns[1] is None)  # pairs first
    ranked = sorted([usual, *known], key=lambda columns: columns[2] not in found)  # with labels first
    fits = (columns for columns in ranked if found >= {*filter(None, columns[:2])})
    return SavedTask(kind, *next(fits, usual), metric=METRICS[kind][0])


def compare_examples(
    sessions: dict[str, InferenceSession], outputs: Sequence[str], held_out: HeldOut, pad_token_id: int
) -> dict[str, Any]:
    """Metrics of several sessions on the same examples.

    Args:
        sessions: name -> session. outputs: names of the model's.
    Returns:
        `examples`: how many. `agreement`, but for regression: the fraction with the same prediction in all sessions. If
        there are labels, `metric`, the one to look at, and `scores`: session -> all metrics of fine-tuning.
    """
    task, part = held_out.task, held_out.part
    threshold = task.no_answer_threshold
    scores: dict[str, dict[str, float]] = {}
    predictions: list[list[str]] = []
    for name, session in sessions.items():
        logits = compute_logits(session, outputs, part.features, pad_token_id)
        if held_out.is_scored:
            scores[name] = score_examples(task.kind, held_out.labels, part, logits, threshold)
            threshold = scores[name].get("no_answer_threshold", threshold)  # chosen by the first session for all
        predictions.append(list_predictions(task.kind, held_out.labels, part, logits, threshold))
    same = [len(set(of_one)) == 1 for of_one in zip(*predictions)]
    agreement = {} if task.kind == "regression" else {"agreement": sum(same) / len(same)}
    measured = {"metric": task.metric, "scores": scores} if scores else {}
    return {"examples": len(same), **agreement, **measured}


def compute_logits(
    session: InferenceSession, outputs: Sequence[str], features: Sequence[dict[str, Any]], pad_token_id: int
) -> np.ndarray:
    """Logits of all features in their order, padded to the longest; (n, 2, l) of the starts and the ends of spans."""
    collate = make_collate(pad_token_id)
    logits = np.empty(0)
    for indices in batch_by_length([range(count_tokens(feature)) for feature in features], BATCH_TOKENS):
        batch: dict[str, Tensor] = collate([{"input_ids": features[index]["input_ids"]} for index in indices])
        found = session.run(outputs, {name: tensor.numpy() for name, tensor in batch.items()})
        found = np.stack(found, axis=1) if len(outputs) > 1 else found[0]
        if not logits.size:  # the longest come first
            logits = np.zeros((len(features), *found.shape[1:]), found.dtype)
        place: Any = (indices, *map(slice, found.shape[1:]))
        logits[place] = found
    return logits


def compare_masks(
    sessions: dict[str, InferenceSession], sequences: list[list[int]], special: SpecialTokenIds
) -> dict[str, Any]:
    """Accuracy of several masked LMs on the same masked tokens.

    Args:
        sequences: token ids of each text, special ones included.
    Returns:
        As `compare_examples`; `examples` are the masked tokens.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in sessions}
    truth = []
    for input_ids, attention_mask, chosen in _mask(sequences, special):
        truth.append(input_ids[chosen])
        inputs = {"input_ids": np.where(chosen, special.mask, input_ids), "attention_mask": attention_mask}
        for name, session in sessions.items():
            found[name].append(session.run(["logits"], inputs)[0][chosen].argmax(axis=-1))
    expected = np.concatenate(truth)
    predictions = {name: np.concatenate(parts) for name, parts in found.items()}
    first, *others = predictions.values()
    same = np.all([other == first for other in others], axis=0)
    scores = {name: {"accuracy": float((best == expected).mean())} for name, best in predictions.items()}
    return {"examples": len(expected), "agreement": float(same.mean()), "metric": "accuracy", "scores": scores}


def _mask(sequences: list[list[int]], special: SpecialTokenIds) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of token ids, padded, their attention mask, and which tokens are to be masked; each (b, l)."""
    rng = np.random.default_rng(0)
    for indices in batch_by_length(sequences, BATCH_TOKENS):
        length = max(len(sequences[index]) for index in indices)
        input_ids = np.array([sequences[index] + [special.pad] * (length - len(sequences[index])) for index in indices])
        attention_mask = (np.arange(length) < [[len(sequences[index])] for index in indices]).astype(np.int64)
        chosen = (attention_mask == 1) & ~np.isin(input_ids, special)
        ranks = np.where(chosen, rng.random(input_ids.shape), 2).argsort(axis=1).argsort(axis=1)
        chosen &= ranks < np.maximum(1, np.round(MASKED * chosen.sum(axis=1, keepdims=True)))
        yield input_ids, attention_mask, chosen
