"""Cleaning: each step removes what it should, nothing else, and says so."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

import fastroberta.corpus.boilerplate
from bench.duplicates import SIMILARITIES, find_ours, list_shingles, make_texts
from fastroberta.corpus.boilerplate import find_recurring, remove_lines, write_line_hashes
from fastroberta.corpus.clean import REASONS, Cleaner, CleaningSettings, read_blocklist
from fastroberta.corpus.manifest import load_manifest
from fastroberta.corpus.quality import GROUPS, RULES, Thresholds, find_fault, list_rules
from fastroberta.corpus.report import write_report
from fastroberta.corpus.tokenizer import save_tokenizer, train_tokenizer
from fastroberta.errors import ConfigurationError
from fastroberta.prepare import main

GOOD = (
    "The committee met on Tuesday to discuss the new harbour and what it would cost. Most members have seen the plans "
    "before, and nobody was surprised.\n\nAn engineer explained that dredging must be finished with the old quay still "
    "in use.\nShips of every size call there in winter. The vote was postponed, to the relief of several members!"
)
GERMAN = "Der Ausschuss traf sich am Dienstag, um über den neuen Hafen und seine Kosten zu beraten. " * 3
JAPANESE = "委員会は火曜日に新しい港とその費用について話し合った。" * 3


def clean(documents, **settings):
    """What is kept, the counts without "read", and the examples."""
    counts, examples = Counter(), {}
    kept = list(Cleaner(CleaningSettings(**settings)).clean(documents, counts, examples))
    assert counts.pop("read") == len(documents)
    return kept, dict(counts), examples


def test_without_settings_only_empty_documents_go():
    assert clean([" a ", "a", "e\u0301", " \n "]) == (["a", "a", "e\u0301"], {"empty": 1}, {})


def test_form_and_length():
    documents = ["cafe\u0301", "x" * 11, "short", "café"]
    kept, counts, examples = clean(documents, nfc=True, min_characters=4, max_characters=10)
    assert kept == ["café", "short", "café"] and counts == {"normalized": 1, "too_long": 1}
    assert examples == {"too_long": [("11 characters", "x" * 11)]}
    # The length is that of the composed form.
    assert clean(documents, nfc=True, min_characters=5)[1] == {"normalized": 1, "too_short": 2}


# ---- word list


@pytest.mark.parametrize(
    "text, found",
    [
        ("Some darn word.", "darn"),
        ("DARN!", "darn"),
        ("darned", None),
        ("undarn", None),
        ("a bad\n phrase", "bad phrase"),
        ("bad, phrase", None),
        ("use C++ today", "c++"),
        ("use C today", None),
        ("c++11", None),
        ("前に禁句があった", "禁句"),
        ("STRASSE", "straße"),
        ("what a 💩", "💩"),
    ],
)
def test_the_blocklist_holds_whole_words_and_phrases(text, found):
    words = ("darn", "bad phrase", "c++", "禁句", "straße", "💩")
    kept, counts, examples = clean([text], blocklist=words)
    if found:
        assert (kept, counts, examples) == ([], {"blocked_words": 1}, {"blocked_words": [(found, text)]})
    else:
        assert (kept, counts, examples) == ([text], {}, {})


def test_a_blocklist_is_a_word_a_line(tmp_path):
    path = tmp_path / "words"
    path.write_text("\ufeff# comment\none\n\n two words \none\n")
    assert read_blocklist(str(path)) == ("one", "two words")
    for data, message in ((b"# none\n", "contains no words"), (b"\xff", "is not UTF-8")):
        path.write_bytes(data)
        with pytest.raises(ConfigurationError, match=message):
            read_blocklist(str(path))
    with pytest.raises(ConfigurationError, match="No such file"):
        read_blocklist(str(tmp_path / "missing"))


# ---- quality

WORDS = GOOD.replace("\n", " ").split()
# A document for each rule that breaks it, and would be kept with another bound.
BREAKS = {
    "min_words": (" ".join(WORDS[:30]), 30),
    "max_words": ("the harbour " * 50_001, 60_000_000),
    "min_word_length": ("a be to of it " * 20, 1),
    "max_word_length": ("harbourmaster and committeemembers " * 30, 20),
    "max_symbols": (GOOD + " # ... … ##" * 5, 5),
    "max_bullet_lines": ("\n".join("- " + line for line in WORDS), 1),
    "max_ellipsis_lines": ("...\n".join(GOOD.split(". ")), 1),
    "min_alphabetic_words": (GOOD + " 1 2 3 4 5" * 10, 0.1),
    "min_stop_words": ("Ships call there every winter. " * 20, 0),
    "max_repeated_lines": (GOOD + "\nThe same line.\n" * 4, 1),
    "max_repeated_paragraphs": (GOOD + "\n\nThe same paragraph." * 4, 1),
    "max_repeated_line_characters": (GOOD + ("\n" + GOOD.split("\n")[0]) * 2, 1),
    "max_repeated_paragraph_characters": (GOOD + ("\n\n" + GOOD.split("\n\n")[0]) * 2, 1),
    "max_top_2_gram": (GOOD + " harbour dredging," * 20, 1),
    "max_top_3_gram": (GOOD + " the harbour dredging," * 20, 1),
    "max_top_4_gram": (GOOD + " the old harbour dredging," * 20, 1),
    "min_sentences": (" ".join(WORDS).replace(".", ",").replace("!", "."), 1),
    "min_punctuated_lines": ("\n".join(WORDS), 0.01),
    "max_notice_lines": (GOOD + "\nPlease enable JavaScript.\nOur Privacy Policy", 1),
    "max_curly_brackets": (GOOD + " {}", 2),
    "max_lorem_ipsum": (GOOD + " Lorem ipsum.", 1),
    "min_letters": (GOOD + " 12345 67890" * 30, 0.3),
}


def test_every_rule_has_its_case():
    assert set(BREAKS) == set(RULES) == set(GROUPS["gopher"]) | set(GROUPS["c4"]) | {"min_letters"}
    assert {f"quality_{rule}" for rule in RULES} < set(REASONS)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_broken_by_its_case_alone(rule):
    text, bound = BREAKS[rule]
    assert find_fault(GOOD, RULES, Thresholds()) is None
    broken = find_fault(text, [rule], Thresholds())
    assert broken is not None and broken[0] == rule
    assert find_fault(text, [rule], Thresholds(**{rule: bound})) is None
    kept, counts, examples = clean([GOOD, text], quality=rule)
    assert kept == [GOOD] and counts == {f"quality_{rule}": 1}
    assert examples[f"quality_{rule}"][0][0] == f"{broken[1]:.4g}"


def test_rules_are_named_singly_or_by_their_group():
    assert list_rules("c4, gopher") == GROUPS["gopher"] + GROUPS["c4"]
    assert list_rules("max_symbols,min_words") == ("min_words", "max_symbols")
    with pytest.raises(ConfigurationError, match=r"quality: 'gofer' is not a rule; choose from gopher, c4, min_words"):
        list_rules("gofer")


def test_measures_are_what_they_say():
    find = lambda rule, text: find_fault(text, [rule], Thresholds(**{rule: 10**9 if rule[:3] == "min" else -1}))[1]  # noqa: E731
    assert find("max_top_2_gram", "ab cd ab cd xx yy") == pytest.approx(8 / 12)
    assert find("max_top_2_gram", "ab cd ef") == 0 == find("max_top_4_gram", "one")
    assert find("max_repeated_lines", "a\nb\n a\n\na") == pytest.approx(0.5)
    assert find("max_repeated_line_characters", "abc\nabc\nd") == pytest.approx(3 / 9)
    assert find("min_punctuated_lines", "One.\ntwo\n“Three.”\n四。") == 0.75
    assert find("min_letters", "ab 12") == 0.5
    assert find("min_words", "") == 0 == find("min_word_length", "")


# ---- languages


def test_languages_are_told_apart():
    pytest.importorskip("py3langid")
    kept, counts, examples = clean([GOOD, GERMAN, JAPANESE], languages="en, ja")
    assert kept == [GOOD, JAPANESE] and counts == {"other_languages": 1}
    assert examples["other_languages"][0][0].startswith("de, 0.") or examples["other_languages"][0][0] == "de, 1.00"
    assert clean(["The cat.", GOOD], languages="en", language_confidence=0.9)[0] == [GOOD]
    with pytest.raises(ConfigurationError, match="languages: 'english' is not known; choose from ace, af,"):
        clean([], languages="english")


# ---- boilerplate


def recurring(tmp_path, documents, minimum):
    table = tmp_path / "table"
    return find_recurring(table, write_line_hashes(documents, table), minimum)


def test_lines_that_recur_are_removed(tmp_path):
    notice, menu = "Accept all cookies now", "Home - About us - Contact"
    documents = [f"{menu}\n\nStory {n} begins here.\n\n  {notice}\n\nAnd ends here, {n}.\n}}" for n in range(5)]
    found = recurring(tmp_path, documents, 5)
    assert len(found) == 2
    text, removed = remove_lines(documents[3], found)
    assert text == "Story 3 begins here.\n\nAnd ends here, 3.\n}" and removed == [menu, notice]
    assert not len(recurring(tmp_path, documents, 6))
    assert remove_lines("\n\nx\n\n\n\ny", found) == ("\n\nx\n\n\n\ny", [])


def test_copies_of_a_document_are_no_boilerplate(tmp_path):
    documents = ["A line that stays here.\nAnother line that stays."] * 10
    assert not len(recurring(tmp_path, documents, 2))
    repeated = ["one line here again\n" * 10]
    assert not len(recurring(tmp_path, repeated, 2))


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_counting_in_parts_changes_nothing(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(fastroberta.corpus.boilerplate, "_PAIRS_AT_ONCE", at_once)
    monkeypatch.setattr(fastroberta.corpus.boilerplate, "_PAIRS_A_READ", 10)
    draw = random.Random(0)
    documents = ["\n".join(f"this is line {draw.randrange(40)}" for _ in range(6)) + f"\n{n}" for n in range(60)]
    counts = Counter(line for text in documents for line in set(text.split("\n")))
    found = recurring(tmp_path, documents, 9)
    expected = {line for line, count in counts.items() if count >= 9 and line.count(" ") > 1}
    assert len(found) == len(expected) > 5
    assert {line for text in documents for line in remove_lines(text, found)[1]} == expected
    assert (np.diff(found.astype(object)) > 0).all()


# ---- the report


EXAMPLES = {"blocked_words": [("`b|d`", "<b>bad</b> & `worse`\n# no heading")], "empty": [("", "x")]}


def test_the_report_shows_examples_as_they_are(tmp_path):
    figures = [("documents read", "3"), ("  left out: <x>", "1")]
    write_report(tmp_path / "r.html", "a & b", figures, EXAMPLES)
    page = (tmp_path / "r.html").read_text()
    assert (
        "<title>a &amp; b</title>" in page and "<pre>&lt;b&gt;bad&lt;/b&gt; &amp; `worse`\n# no heading</pre>" in page
    )
    assert "<td>left out: &lt;x&gt;</td><td>1</td>" in page
    write_report(tmp_path / "r.md", "a & b", figures, EXAMPLES)
    page = (tmp_path / "r.md").read_text()
    assert "\n    <b>bad</b> & `worse`\n    # no heading\n" in page and "| documents read | 3 |" in page


# ---- the whole program


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(
        train_tokenizer((line for name in sorted(topics)[:20] for line in topics[name].split("\n")), 600), directory
    )
    return str(directory)


def prepare(tmp_path, documents, *options):
    """Run the program over documents; its exit code."""
    source = tmp_path / "text.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return main([str(source), "--out", str(tmp_path / "out"), "--heldout-fraction", "0", *map(str, options)])


def test_the_program_counts_every_step_and_shows_examples(tmp_path, tokenizer_directory, capsys):
    pytest.importorskip("py3langid")
    pytest.importorskip("datasketch")
    (tmp_path / "words").write_text("darn\n")
    menu = "Home - About us - Contact"
    changed = GOOD.replace("Tuesday", "Monday")
    documents = [GOOD, GERMAN, "too short", GOOD + " Darn!", changed, GOOD + "\n{}"]
    documents = [f"{menu}\n{text}" for text in documents] + [GOOD]
    options = ["--blocklist", tmp_path / "words", "--languages", "en", "--quality", "c4", "--boilerplate", 6]
    options += ["--min-characters", 10, "--exact-duplicates", "--near-duplicates", 0.7, "--workers", 1]
    for number, ending in enumerate(("html", "md")):
        report = tmp_path / f"report.{ending}"
        assert prepare(tmp_path, documents, "--tokenizer", tokenizer_directory, *options, "--report", report) == 0
        page = report.read_text()
        for text in ("the first 3", menu, "Darn!", "Der Ausschuss", "too short", "met on Monday", "{}"):
            assert text in page
        output = capsys.readouterr().out
        assert ("already prepared" in output) == bool(number)  # a finished run can still be reported on
        for line in ("blocked words", "quality max curly brackets", "other languages", "too short", "near duplicates"):
            assert any(part.split() == ["left", "out:", *line.split(), "1"] for part in output.splitlines()), line
    counts = load_manifest(tmp_path / "out").contents["report"]["counts"]
    assert counts["boilerplate"] == 6 and counts["exact_duplicates"] == 1 and counts["near_duplicates"] == 1
    assert load_manifest(tmp_path / "out").count("train", "documents") == 1


def test_a_changed_blocklist_or_threshold_is_another_run(tmp_path, tokenizer_directory):
    (tmp_path / "words").write_text("darn\n")
    options = ["--tokenizer", tokenizer_directory, "--blocklist", tmp_path / "words", "--quality", "min_words"]
    assert prepare(tmp_path, [GOOD], *options, "--workers", 1) == 0
    assert prepare(tmp_path, [GOOD], *options, "--workers", 2) == 0
    with pytest.raises(ConfigurationError, match="finished corpus with thresholds"):
        prepare(tmp_path, [GOOD], *options, "--thresholds.min_words", 10)
    (tmp_path / "words").write_text("drat\n")
    with pytest.raises(ConfigurationError, match="finished corpus with blocklist"):
        prepare(tmp_path, [GOOD], *options)


def test_boilerplate_is_the_same_for_any_number_of_workers(tmp_path, tokenizer_directory):
    documents = [f"Home - About us - Contact\n{text[:900]}" for text in topics.values()]
    digests = []
    for workers in (1, 2):
        place = tmp_path / str(workers)
        place.mkdir()
        assert (
            prepare(place, documents, "--tokenizer", tokenizer_directory, "--boilerplate", 3, "--workers", workers) == 0
        )
        digests.append([entry["sha256"] for entry in load_manifest(place / "out").contents["shards"]])
        report = load_manifest(place / "out").contents["report"]
        assert report["counts"]["boilerplate"] >= len(documents)
        assert report["examples"]["boilerplate"] == [["", "Home - About us - Contact"]] * 3
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--quality", "gofer"], "quality: 'gofer' is not a rule"),
        (["--quality", "c4", "--thresholds.min_words", 9], "thresholds.min_words = 9: has no effect"),
        (["--languages", "xx"], "languages: 'xx' is not known"),
        (["--blocklist", "none"], "blocklist = none: No such file"),
        (["--report", "a.pdf"], "report = a.pdf: the ending decides the format"),
        (["--report", "none/a.md"], "report = none/a.md: is a folder, or its folder does not exist"),
        (["--boilerplate", "1"], "boilerplate = 1: must lie in"),
    ],
)
def test_mistakes_are_found_before_the_work(tmp_path, monkeypatch, tokenizer_directory, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as error:
        prepare(tmp_path, [GOOD], "--tokenizer", tokenizer_directory, *options)
    assert message in str(error.value) and not Path("out").exists()


# ---- near duplicates


def test_near_duplicates_above_the_threshold_are_found():
    """With bands chosen to err least around it, a third of the pairs at 0.85 were missed."""
    pytest.importorskip("datasketch")
    texts = list(make_texts(30, random.Random(0)))
    found = find_ours(texts, 0.8)
    shares = found[-30 * len(SIMILARITIES) :].reshape(len(SIMILARITIES), 30).mean(axis=1)
    assert shares[0] == 1 and shares[1] > 0.8 and shares[2] < 0.3 and shares[3] == 0
    assert not found[: -30 * len(SIMILARITIES)].any()


def test_the_texts_have_the_similarity_they_are_made_for():
    texts = list(make_texts(2, random.Random(0)))
    firsts, seconds = texts[: 4 * len(SIMILARITIES) : 2], texts[4 * len(SIMILARITIES) :]
    for similarity, first, second in zip(np.repeat(SIMILARITIES, 2), firsts, seconds):
        a, b = list_shingles(first.split()), list_shingles(second.split())
        assert len(a & b) / len(a | b) == pytest.approx(similarity, abs=0.005)
