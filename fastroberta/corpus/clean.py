"""Cleaning a document: what is changed in it, and why it is left out. Each step is counted, with examples.

The order: Unicode form, boilerplate, length, word list, quality, language. Duplicates are found later, over the whole
corpus.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigurationError
from .boilerplate import remove_lines
from .quality import RULES, Thresholds, find_fault, list_rules

# Reasons to leave a document out, as they are counted.
REASONS = ("empty", "too_short", "too_long", "blocked_words", *(f"quality_{rule}" for rule in RULES), "other_languages")
MAX_EXAMPLES = 3  # of each reason, the first in the order of the corpus
_EXCERPT = 400  # characters
_LANGUAGE_SAMPLE = 2000  # characters that tell the language; the time grows with them
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")

Examples = dict[str, list[tuple[str, str]]]  # by reason: what was found, and an excerpt


@dataclass(frozen=True)
class CleaningSettings:
    """The names are those of prepare's options."""

    nfc: bool = False
    min_characters: int = 0
    max_characters: int | None = None
    blocklist: tuple[str, ...] = ()  # the words themselves
    quality: str | None = None
    thresholds: Thresholds = Thresholds()
    languages: str | None = None
    language_confidence: float = 0.5
    boilerplate: str | None = None  # a file (npy) of what `boilerplate.find_recurring` found


class Cleaner:
    """Applies the settings to documents.

    Raises:
        ConfigurationError: an unknown rule or language, a bound without its rule, or a package is missing.
    """

    def __init__(self, settings: CleaningSettings):
        self._settings = settings
        self._rules = list_rules(settings.quality) if settings.quality else ()
        for rule in RULES:
            if rule not in self._rules and (bound := getattr(settings.thresholds, rule)) != getattr(Thresholds(), rule):
                raise ConfigurationError(
                    f"thresholds.{rule} = {bound}: has no effect, as quality does not name that rule; add --quality {rule}"
                )
        self._find_blocked = Blocklist(settings.blocklist).find if settings.blocklist else None
        self._languages = LanguageFilter(settings.languages) if settings.languages else None
        path = settings.boilerplate
        self._recurring = np.load(path, mmap_mode="r") if path else np.zeros(0, dtype=np.uint64)

    def clean(self, documents: Iterable[str], counts: Counter[str], examples: Examples) -> Iterator[str]:
        """The documents that the settings keep, ready to be tokenized."""
        for text in documents:
            counts["read"] += 1
            text, is_changed = normalize(text, self._settings.nfc)
            counts.update(normalized=1) if is_changed else None
            text, removed = remove_lines(text, self._recurring)
            if removed:
                counts["boilerplate"] += len(removed)
                for line in removed:
                    add_example(examples, "boilerplate", "", line)
            text = text.strip()
            if fault := self._find_fault(text):
                counts[fault[0]] += 1
                add_example(examples, *fault, text)
            else:
                yield text

    def _find_fault(self, text: str) -> tuple[str, str] | None:
        """Why the text is left out: one of REASONS, and what was found."""
        settings = self._settings
        if not text:
            return "empty", ""
        if len(text) < settings.min_characters:
            return "too_short", f"{len(text)} characters"
        if settings.max_characters is not None and len(text) > settings.max_characters:
            return "too_long", f"{len(text)} characters"
        if self._find_blocked and (word := self._find_blocked(text)) is not None:
            return "blocked_words", word
        if self._rules and (broken := find_fault(text, self._rules, settings.thresholds)):
            return f"quality_{broken[0]}", f"{broken[1]:.4g}"
        if self._languages and (found := self._languages.find_other(text, settings.language_confidence)):
            return "other_languages", found
        return None


def normalize(text: str, nfc: bool) -> tuple[str, bool]:
    """The text in Unicode normal form C where that is asked for, and whether this changed it."""
    if nfc and not unicodedata.is_normalized("NFC", text):
        return unicodedata.normalize("NFC", text), True
    return text, False


def add_example(examples: Examples, reason: str, found: str, text: str) -> None:
    """Keep the first MAX_EXAMPLES, shortened."""
    if text and len(kept := examples.setdefault(reason, [])) < MAX_EXAMPLES:
        kept.append((found, text if len(text) <= _EXCERPT else text[:_EXCERPT] + " …"))


def read_blocklist(path: str) -> tuple[str, ...]:
    """The words and phrases of a file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ConfigurationError: the file cannot be read or holds nothing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigurationError(f"blocklist = {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"blocklist = {path}: is not UTF-8 (byte {error.start})") from error
    words = tuple(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if not words:
        raise ConfigurationError(f"blocklist = {path}: contains no words; write one per line")
    return words


class Blocklist:
    """Whole words and phrases whatever their case; in scripts without spaces between words, wherever they stand."""

    def __init__(self, entries: Iterable[str]):
        self._by_first_word: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
        self._anywhere = []
        for entry in entries:
            folded = entry.casefold()
            first = _WORD.search(folded)
            if first is None or _UNSPACED.search(folded):
                self._anywhere.append((entry, folded))
                continue
            phrase = r"\s+".join(map(re.escape, folded.split()))
            pattern = re.compile(rf"(?<!\w){phrase}(?!\w)")
            self._by_first_word.setdefault(first.group(), []).append((entry, pattern))

    def find(self, text: str) -> str | None:
        """An entry that the text holds, or None."""
        text = text.casefold()
        for entry, folded in self._anywhere:
            if folded in text:
                return entry
        # One pass over the words tells which few entries are worth a search.
        for word in sorted(self._by_first_word.keys() & set(_WORD.findall(text))):
            for entry, pattern in self._by_first_word[word]:
                if pattern.search(text):
                    return entry
        return None


class LanguageFilter:
    """Tells languages with py3langid, whose model comes with the package (Lui and Baldwin, ACL 2012).

    Raises:
        ConfigurationError: py3langid is not installed or does not know a language.
    """

    def __init__(self, languages: str):
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise ConfigurationError("languages needs py3langid; pip install 'fastroberta[data]'") from error
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._languages = {name.strip() for name in languages.split(",")}
        known = sorted(set(self._identifier.labels))
        if unknown := sorted(self._languages - set(known)):
            raise ConfigurationError(f"languages: {unknown[0]!r} is not known; choose from {', '.join(known)}")

    def find_other(self, text: str, confidence: float) -> str | None:
        """The language and its probability, where it is none of ours or less probable than `confidence`."""
        language, probability = self._identifier.classify(text[:_LANGUAGE_SAMPLE])
        if language in self._languages and probability >= confidence:
            return None
        return f"{language}, {probability:.2f}"
