"""Quality rules in the manner of Gopher and C4: measures of a document, each with a bound.

    gopher  Rae et al., arXiv 2112.11446, A1.1: quality filtering, and repetition removal without its duplicate 5- to
            10-grams
    c4      Raffel et al., arXiv 1910.10683, section 2.2. C4 cuts lines out; here a document is kept whole or left out,
            by the share of such lines (0.12 is that of FineWeb, Penedo et al., arXiv 2406.17557)

Words are what white space separates, so rules about words suit neither Chinese, Japanese nor Thai, and min_stop_words
English only; a bound of 0 (min_) switches a rule of a group off.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..config import setting
from ..errors import ConfigurationError


@dataclass(frozen=True)
class Thresholds:
    """Bounds of the quality rules. Shares are between 0 and 1."""

    min_words: int = setting(50, "fewest words", valid="[0, inf)")
    max_words: int = setting(100_000, "most words", valid="[0, inf)")
    min_word_length: float = setting(3, "least mean length of words", valid="[0, inf)")
    max_word_length: float = setting(10, "greatest mean length of words", valid="[0, inf)")
    max_symbols: float = setting(0.1, "most hash signs and ellipses a word", valid="[0, inf)")
    max_bullet_lines: float = setting(0.9, "greatest share of lines that begin with a bullet", valid="[0, 1]")
    max_ellipsis_lines: float = setting(0.3, "greatest share of lines that end with an ellipsis", valid="[0, 1]")
    min_alphabetic_words: float = setting(0.8, "least share of words that hold a letter", valid="[0, 1]")
    min_stop_words: int = setting(2, "fewest of the, be, to, of, and, that, have, with", valid="[0, 8]")
    max_repeated_lines: float = setting(0.3, "greatest share of lines that repeat an earlier one", valid="[0, 1]")
    max_repeated_paragraphs: float = setting(0.3, "greatest share of such paragraphs", valid="[0, 1]")
    max_repeated_line_characters: float = setting(0.2, "greatest share of characters in such lines", valid="[0, 1]")
    max_repeated_paragraph_characters: float = setting(
        0.2, "greatest share of characters in such paragraphs", valid="[0, 1]"
    )
    max_top_2_gram: float = setting(0.2, "greatest share of characters in the commonest word pair", valid="[0, 1]")
    max_top_3_gram: float = setting(0.18, "the same of three words", valid="[0, 1]")
    max_top_4_gram: float = setting(0.16, "the same of four words", valid="[0, 1]")
    min_sentences: int = setting(3, "fewest sentences", valid="[0, inf)")
    min_punctuated_lines: float = setting(0.12, "least share of lines that end with punctuation", valid="[0, 1]")
    max_notice_lines: float = setting(
        0.1, "greatest share of lines about JavaScript, cookies or terms of use", valid="[0, 1]"
    )
    max_curly_brackets: int = setting(0, "most curly brackets", valid="[0, inf)")
    max_lorem_ipsum: int = setting(0, "most mentions of lorem ipsum", valid="[0, inf)")
    min_letters: float = setting(
        0.6, "least share of letters among all but white space (in neither group)", valid="[0, 1]"
    )


RULES = tuple(field.name for field in dataclasses.fields(Thresholds))
GROUPS = {
    "gopher": RULES[: RULES.index("min_sentences")],
    "c4": RULES[RULES.index("min_sentences") : RULES.index("min_letters")],
}
_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_SENTENCE_ENDS = re.compile("[.!?…。！？؟۔।]+")  # noqa: RUF001
_LINE_ENDS = (*".!?…\"'”’»。！？؟۔।", *"」』）")  # noqa: RUF001
_ELLIPSES = ("...", "…")
_BULLETS = ("•", "‣", "▪", "●", "○", "-", "*", "–")  # noqa: RUF001
_NOTICES = re.compile(
    "javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.IGNORECASE
)


def list_rules(names: str) -> tuple[str, ...]:
    """The rules that a comma-separated list of groups and rules means, in a fixed order.

    Raises:
        ConfigurationError: a name that is neither.
    """
    chosen: set[str] = set()
    for name in (name.strip() for name in names.split(",")):
        if name not in GROUPS and name not in RULES:
            raise ConfigurationError(
                f"quality: {name!r} is not a rule; choose from {', '.join(GROUPS)}, {', '.join(RULES)}"
            )
        chosen |= set(GROUPS.get(name, (name,)))
    return tuple(rule for rule in RULES if rule in chosen)


def find_fault(text: str, rules: Iterable[str], thresholds: Thresholds) -> tuple[str, float] | None:
    """The first rule that the text breaks and the value found, or None."""
    document = _Document(text)
    for rule in rules:
        direction, _, measure = rule.partition("_")
        value, bound = _MEASURES[measure](document), getattr(thresholds, rule)
        if value < bound if direction == "min" else value > bound:
            return rule, value
    return None


class _Document:
    """What several measures need, computed once."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part and not part.isspace()]

    def share_of_lines(self, holds: Callable[[str], object]) -> float:
        return sum(1 for line in self.lines if holds(line)) / max(len(self.lines), 1)

    def share_of_words(self, holds: Callable[[str], object]) -> float:
        return sum(1 for word in self.words if holds(word)) / max(len(self.words), 1)

    def repeated_characters(self, parts: Sequence[str]) -> float:
        return (sum(map(len, parts)) - sum(map(len, set(parts)))) / max(len(self.text), 1)

    def top_n_gram(self, n: int) -> float:
        """The share of the characters of all words that lies in the commonest run of n words, where it recurs."""
        counts = Counter(zip(*(self.words[start:] for start in range(n))))
        if not counts:
            return 0.0
        most = max(counts.values())
        if most == 1:
            return 0.0
        longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
        return min(1.0, most * longest / max(sum(map(len, self.words)), 1))


def _repeated(parts: Sequence[str]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


_MEASURES: dict[str, Callable[[_Document], float]] = {
    "words": lambda document: len(document.words),
    "word_length": lambda document: sum(map(len, document.words)) / max(len(document.words), 1),
    "symbols": lambda document: sum(map(document.text.count, ("#", *_ELLIPSES))) / max(len(document.words), 1),
    "bullet_lines": lambda document: document.share_of_lines(lambda line: line.startswith(_BULLETS)),
    "ellipsis_lines": lambda document: document.share_of_lines(lambda line: line.endswith(_ELLIPSES)),
    "alphabetic_words": lambda document: document.share_of_words(
        lambda word: word.isalpha() or any(map(str.isalpha, word))
    ),
    "stop_words": lambda document: len(_STOP_WORDS.intersection(map(str.lower, document.words))),
    "repeated_lines": lambda document: _repeated(document.lines),
    "repeated_paragraphs": lambda document: _repeated(document.paragraphs),
    "repeated_line_characters": lambda document: document.repeated_characters(document.lines),
    "repeated_paragraph_characters": lambda document: document.repeated_characters(document.paragraphs),
    "top_2_gram": lambda document: document.top_n_gram(2),
    "top_3_gram": lambda document: document.top_n_gram(3),
    "top_4_gram": lambda document: document.top_n_gram(4),
    "sentences": lambda document: len(_SENTENCE_ENDS.findall(document.text)),
    "punctuated_lines": lambda document: document.share_of_lines(lambda line: line.endswith(_LINE_ENDS)),
    "notice_lines": lambda document: document.share_of_lines(_NOTICES.search),
    "curly_brackets": lambda document: document.text.count("{") + document.text.count("}"),
    "lorem_ipsum": lambda document: document.text.lower().count("lorem ipsum"),
    "letters": lambda document: sum(map(str.isalpha, document.text)) / max(sum(map(len, document.words)), 1),
}
