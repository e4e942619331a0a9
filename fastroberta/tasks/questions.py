"""Question answering by a span of a text, as in SQuAD: windows over long texts, the best span, exact match and F1.

Rajpurkar et al. 2016 and 2018 (arXiv 1606.05250, 1806.03822). Where the training data have questions without an answer,
none is given if the score of "no answer", that of the token <s>, exceeds the best span's by more than a threshold, which is
chosen on the dev data.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..errors import ConfigurationError, DataError
from .examples import HINT, Examples, Question
from .tables import Table
from .task import Task, list_columns

NUM_CANDIDATES = 20  # starts and ends that are combined
LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Answer:
    """The best span of a text, and how much better than it "no answer" is (a difference of logits)."""

    text: str
    doubt: float


def encode_questions(
    table: Table, task: Task, tokenizer: Tokenizer, max_length: int, stride: int | None, *, with_label: bool = True
) -> Examples:
    """Windows over each text, each with its question before it.

    A feature has `input_ids`; `labels`, the first and the last token of the first answer, or [0, 0] where the window does
    not hold it; `question`, the question's number; and `offsets`, for each token (start, end) in the text or None.

    Args:
        stride: tokens that consecutive windows share; None: a quarter of max_length.
    Raises:
        DataError: a column is missing, or an answer is not where it is said to be. ConfigurationError: the stride leaves
            no room to move on.
    """
    table.require(list_columns(task, with_label=False), HINT)
    if with_label:
        table.require([task.label], "a file that is scored needs answers; --predict takes one without")
    longest_question = max_length // 4
    stride = max_length // 4 if stride is None else stride
    if stride >= max_length - longest_question - 4:
        raise ConfigurationError(f"stride = {stride}: too much for {max_length} tokens; give {max_length // 4} or less")
    tokenizer.no_truncation()
    pairs, questions, places = [], [], []
    for index, record in enumerate(table.records):
        question, context = record[task.pair or "question"], record[task.text]
        if not isinstance(question, str) or not isinstance(context, str) or not context.strip():
            raise DataError(f"{table.place(index)}: {task.pair} or {task.text} holds no text; fill it in")
        answers = _read_answers(record[task.label], context, table.place(index)) if with_label else []
        ends = tokenizer.encode(question, add_special_tokens=False).offsets[:longest_question]
        pairs.append((question[: ends[-1][1]] if ends else "", context))
        questions.append(Question(str(record.get("id", index)), context, [text for text, _ in answers]))
        places.append(answers[0] if answers else None)
    tokenizer.enable_truncation(max_length, stride=stride, strategy="only_second")
    encodings = tokenizer.encode_batch(pairs)
    features = []
    for index, encoding in enumerate(encodings):
        for window in (encoding, *encoding.overflowing):
            offsets = [
                span if part == 1 and span[1] > span[0] else None
                for part, span in zip(window.sequence_ids, window.offsets)
            ]
            feature: dict[str, Any] = {"input_ids": window.ids, "question": index, "offsets": offsets}
            if with_label:
                feature["labels"] = _find_span(offsets, places[index])
            features.append(feature)
    return Examples(features, 0, questions)


def choose_answers(part: Examples, logits: np.ndarray) -> list[Answer]:
    """The best span for each question over all its windows.

    Args:
        logits: (windows, 2, l): of each token as the first, and as the last, of the answer.
    """
    best = [(-np.inf, "")] * len(part.questions)
    no_answer = [np.inf] * len(part.questions)
    for feature, (starts, ends) in zip(part.features, logits):
        index, offsets = feature["question"], feature["offsets"]
        no_answer[index] = min(no_answer[index], float(starts[0] + ends[0]))
        is_text = np.array([span is not None for span in offsets])
        starts, ends = (np.where(is_text, values[: len(offsets)], -np.inf) for values in (starts, ends))
        first, last = (np.argsort(-values)[:NUM_CANDIDATES] for values in (starts, ends))
        scores = starts[first][:, None] + ends[last][None, :]
        length = last[None, :] - first[:, None]
        scores = np.where((length >= 0) & (length < LONGEST_ANSWER), scores, -np.inf)
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        if scores[row, column] > best[index][0]:
            begin, end = offsets[first[row]][0], offsets[last[column]][1]
            best[index] = (float(scores[row, column]), part.questions[index].context[begin:end])
    return [Answer(text, null - score) for (score, text), null in zip(best, no_answer)]


def choose_threshold(part: Examples, answers: Sequence[Answer]) -> float:
    """The doubt above which no answer is given, for the best F1; infinite where every question has an answer."""
    if all(question.answers for question in part.questions):
        return math.inf
    pairs = sorted(zip(answers, part.questions), key=lambda pair: pair[0].doubt)
    total = best = float(sum(not question.answers for question in part.questions))  # no question is answered
    threshold = pairs[0][0].doubt - 1.0
    for place, (answer, question) in enumerate(pairs):
        total += _score_f1(answer.text, question.answers) - (not question.answers)
        is_last = place + 1 == len(pairs) or pairs[place + 1][0].doubt > answer.doubt  # of those with the same doubt
        if is_last and total > best:
            best, threshold = total, answer.doubt
    return threshold


def score_answers(part: Examples, answers: Sequence[Answer], threshold: float) -> dict[str, float]:
    """Exact match and F1, between 0 and 1, by SQuAD's rules: the best over all answers of a question counts."""
    texts = [settle_answer(answer, threshold) for answer in answers]
    exact = [
        float(_normalize(text) in [_normalize(one) for one in question.answers or [""]])
        for text, question in zip(texts, part.questions)
    ]
    f1 = [_score_f1(text, question.answers) for text, question in zip(texts, part.questions)]
    return {"exact": float(np.mean(exact)), "f1": float(np.mean(f1))}


def settle_answer(answer: Answer, threshold: float) -> str:
    """Its text, or none where the doubt exceeds the threshold."""
    return "" if answer.doubt > threshold else answer.text


def _score_f1(text: str, answers: Sequence[str]) -> float:
    found = _normalize(text).split()

    def score(answer: str) -> float:
        right = _normalize(answer).split()
        if not found or not right:
            return float(found == right)
        common = sum((Counter(found) & Counter(right)).values())
        return 2 * common / (len(found) + len(right))

    return max(score(answer) for answer in answers or [""])


def _normalize(text: str) -> str:
    """Lower case, without punctuation and English articles, one space between words."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _read_answers(value: Any, context: str, place: str) -> list[tuple[str, int]]:
    """Texts and places of a record's answers: {"text": [...], "answer_start": [...]}."""
    if not isinstance(value, dict) or not {"text", "answer_start"} <= set(value):
        raise DataError(f'{place}: answers are no {{"text": [...], "answer_start": [...]}}; fix the record')
    answers = list(zip(value["text"], value["answer_start"]))
    for text, start in answers:
        if not isinstance(text, str) or not isinstance(start, int) or context[start : start + len(text)] != text:
            raise DataError(f"{place}: answer {text!r} does not stand at character {start} of the text; fix the record")
    return [(text.strip(), start + len(text) - len(text.lstrip())) for text, start in answers if text.strip()]


def _find_span(offsets: list[tuple[int, int] | None], answer: tuple[str, int] | None) -> list[int]:
    """The tokens of an answer in a window, [0, 0] if not all of it lies there."""
    if answer is None:
        return [0, 0]
    text, start = answer
    end = start + len(text)
    inside = [token for token, span in enumerate(offsets) if span is not None and span[0] < end and span[1] > start]
    if not inside:
        return [0, 0]
    first, last = offsets[inside[0]], offsets[inside[-1]]
    assert first is not None and last is not None
    return [inside[0], inside[-1]] if first[0] <= start and last[1] >= end else [0, 0]
