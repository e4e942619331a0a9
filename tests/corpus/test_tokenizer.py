"""The tokenizer: RoBERTa's special ids and splitting, the same for transformers, the same when trained twice."""
# ruff: noqa: RUF001 (characters that look alike are the point)

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import fastroberta.corpus.encode
from fastroberta.corpus.encode import SENTENCE_END, DocumentEncoder
from fastroberta.corpus.tokenizer import (
    LARGEST_VOCABULARY,
    SMALLEST_VOCABULARY,
    is_roberta_bpe,
    load_tokenizer,
    save_tokenizer,
    special_token_ids,
    special_token_names,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from fastroberta.errors import ConfigurationError

TOPICS = [topics[name] for name in sorted(topics)][:40]  # of the language reference, 500 kB
# Space of every kind, contractions, numerals that are no digits, letters of many scripts, specials written out.
AWKWARD = [
    "Hello world",
    " two  spaces,   three and a trailing one ",
    "tab\tin \t side",
    "It's what they'd've said: I'll, we're, I'm, don't, rock 'n' roll, 's",
    "x² + ½ ≠ Ⅷ, 10³ m², ①",
    "naïve café, Ærøskøbing, Straße",
    "Ελληνικά και Русский текст; Ёлка",
    "日本語のテキスト。中文文本!",
    "emoji 👩‍👩‍👧 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 e\u0301 combining",
    "no\u00a0break\u2009thin\u3000wide\u200bzero\x1cseparator\x85next",
    "</s> <s>x<mask> <pad><unk>",
    "snake_case __init__ a_1 _ -- ... !!! 3.14 1,000 v2.0a",
    "“Quoted.” ‘Single!’ He said: «Oui.» (See this.) [And 2.] Then 3 more? Yes! no. 4th",
    "ends with apostrophe' 'starts",
    "'ségolène 'tis l'été 'réel",
    "nul\0inside",
    "עברית العربية हिन्दी ไทย",
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer([line for text in TOPICS for line in text.split("\n")] + AWKWARD, 2000)


def test_ids_are_as_roberta_has_them(trained):
    assert special_token_names(trained) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert special_token_ids(trained) == (0, 1, 2, 3, 1999)
    assert vocabulary_size(trained) == 2000
    # The byte alphabet comes next: nothing is unknown.
    assert {trained.id_to_token(i) for i in range(4, 260)} == set(pre_tokenizers.ByteLevel.alphabet())
    everything = "".join(map(chr, range(0x300))) + "👩"
    assert trained.decode(trained.encode(everything, add_special_tokens=False).ids) == everything


def test_a_sequence_is_closed_as_roberta_does(trained):
    assert trained.encode("x", "y").tokens == ["<s>", "x", "</s>", "</s>", "y", "</s>"]
    # <mask> takes the space before it.
    assert "Ġ" not in trained.encode("the <mask> of").tokens


def test_training_is_deterministic_over_processes(trained):
    code = (
        "from test_tokenizer import *;"
        "print(tokenizer_hash(train_tokenizer([l for t in TOPICS for l in t.split('\\n')] + AWKWARD, 2000)))"
    )
    for seed in "12":  # of Python's hashes
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == tokenizer_hash(trained)


def test_the_smallest_vocabulary_is_bytes_and_specials():
    assert SMALLEST_VOCABULARY == 261
    tokenizer = train_tokenizer(["aaa aaa"], 261)
    assert vocabulary_size(tokenizer) == 261 and special_token_ids(tokenizer).mask == 260
    with pytest.raises(ConfigurationError, match="261 is the least"):
        train_tokenizer(["aaa"], 260)
    with pytest.raises(ConfigurationError, match="vocabulary of 1000000000: 1000000 is the most"):
        train_tokenizer(["aaa"], 10**9)


def test_little_text_gives_a_smaller_vocabulary():
    tokenizer = train_tokenizer(["ab ab"], LARGEST_VOCABULARY)
    assert vocabulary_size(tokenizer) == special_token_ids(tokenizer).mask + 1 < 300


@pytest.mark.parametrize("from_vocab_and_merges", [False, True])
def test_transformers_gives_the_same_ids(trained, tmp_path, from_vocab_and_merges):
    transformers = pytest.importorskip("transformers")
    names = save_tokenizer(trained, tmp_path, model_max_length=77)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    if from_vocab_and_merges:
        (tmp_path / "tokenizer.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.RobertaTokenizer) and theirs.model_max_length == 77
    assert (theirs.bos_token_id, theirs.cls_token_id, theirs.sep_token_id) == (0, 0, 2)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.mask_token_id) == (1, 2, 1999)
    for text in [*AWKWARD, "the <mask> of <mask>."]:
        assert theirs(text)["input_ids"] == trained.encode(text).ids, text
    assert theirs("a", "b")["input_ids"] == trained.encode("a", "b").ids
    assert tokenizer_hash(theirs.backend_tokenizer) == tokenizer_hash(trained)


def test_the_hash_is_the_tokenizer_not_its_files(trained, tmp_path):
    save_tokenizer(trained, tmp_path / "both")
    (tmp_path / "parts").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tmp_path / "both" / name, tmp_path / "parts")
    from_json, from_parts = load_tokenizer(tmp_path / "both"), load_tokenizer(tmp_path / "parts")
    assert tokenizer_hash(from_json) == tokenizer_hash(from_parts) == tokenizer_hash(trained)
    for text in AWKWARD:
        assert from_parts.encode(text).ids == trained.encode(text).ids


@pytest.mark.parametrize("change", ["vocab", "merges", "prefix space", "added token"])
def test_the_hash_changes_with_what_decides_ids(trained, change):
    content = json.loads(trained.to_str())
    if change == "vocab":
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    elif change == "merges":
        content["model"]["merges"].reverse()
    elif change == "prefix space":
        content["pre_tokenizer"]["add_prefix_space"] = True
    else:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 2000, "content": "<new>"})
    other = Tokenizer.from_str(json.dumps(content))
    assert tokenizer_hash(other) != tokenizer_hash(trained)
    assert is_roberta_bpe(other) == (change != "prefix space")


def test_a_tokenizer_with_other_names_states_its_ids(tmp_path):
    words = ["a", "[MASK]", "[SEP]", "[CLS]", "[UNK]", "[PAD]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(tokenizer, tmp_path)
    assert special_token_ids(load_tokenizer(tmp_path)) == (3, 5, 2, 4, 1)
    assert not is_roberta_bpe(tokenizer)
    encoded = DocumentEncoder(tokenizer, split_sentences=True).encode(["a a b. A a"])
    assert encoded.tokens.tolist() == [0, 0, 4, 4, 4, 0, 2] and encoded.sentence_lengths.tolist() == [4, 3]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer.json"),
        ({"vocab.json": "{}"}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "can be read"),
        ({"vocab.json": "{", "merges.txt": ""}, "can be read"),
        ({"vocab.json": '{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}', "merges.txt": ""}, "no mask token"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# ---- sentences.py: documents to tokens


@pytest.fixture(scope="module")
def encode_plainly(trained):
    """What the encoder must give: each stripped line whole, through the tokenizer, then the end token."""
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.encode_special_tokens = True

    def encode(document):
        lines = [line.strip() for line in document.split("\n")]
        return [i for line in lines if line for i in tokenizer.encode(line, add_special_tokens=False).ids] + [2]

    return encode


@pytest.mark.parametrize("split_sentences", [False, True])
def test_words_and_sentences_have_the_tokens_of_their_line(trained, encode_plainly, split_sentences):
    letters = random.Random(0)
    alphabet = "ab Z.!? '\"()_-1²½é\t\u00a0\u3000’”日я\u0301👩\x1c"
    documents = [
        *AWKWARD,
        "\n".join(AWKWARD),
        *("".join(letters.choices(alphabet, k=letters.randrange(1, 60))) for _ in range(2000)),
        *("".join(letters.choices("ab A.' \n", k=40)) for _ in range(2000)),
        *("".join(letters.choices("a. \u00a0\t\n", (1, 1, 4, 2, 1, 1), k=30)) for _ in range(2000)),
        *("".join(letters.choices("a1'éstrevldm S", k=20)) for _ in range(2000)),
    ]
    documents = [document for document in documents if document.strip()]
    encoder = DocumentEncoder(trained, split_sentences=split_sentences)
    encoded = encoder.encode(documents)
    bounds = [0, *encoded.sentence_lengths.cumsum()[encoded.document_sentences.cumsum() - 1]]
    for document, start, end in zip(documents, bounds, bounds[1:]):
        assert encoded.tokens[start:end].tolist() == encode_plainly(document), repr(document)
    assert encoded.sentence_lengths.min() > 0


def test_every_character_is_split_from_its_neighbours_as_it_should(tmp_path):
    """Python's classes of characters and the tokenizer's differ; no plain word may be split by the wrong ones.

    This vocabulary merges whatever is not split: letters and digits with the bytes of any other character.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    outer = [letter for letter in letters if ord(letter) > 126]
    merges = [pair for letter in outer for inner in "ab1'" for pair in ((inner, letter), (letter, inner))]
    merges += [pair for c in "strevlmdxS" for pair in (("'", c), ("e", c), ("l", c), (c, "x"), (c, "'"))]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *map("".join, merges), "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = load_tokenizer(tmp_path)
    plain = Tokenizer.from_str(tokenizer.to_str())
    characters = [chr(c) for c in range(32, 0x2100) if not chr(c).isspace()]
    documents = [f"a{c}b {c}1{c} {c}'s {c}a'{c}" for c in characters]
    shortened = [a + b for a in "strevlmdxS" for b in ["", *"strevlmdxS"]]
    documents += [template.format(c) for c in shortened for template in ("'{}", "x'{}x", "x''{}", "x '{}", "1'{}'x")]
    documents += ["l'élan", "'sé", "'reé", "é's"]
    encoded = DocumentEncoder(tokenizer, split_sentences=False).encode(documents)
    expected = [[*plain.encode(text.strip(), add_special_tokens=False).ids, 2] for text in documents]
    assert encoded.tokens.tolist() == [token for ids in expected for token in ids]


def test_long_words_are_told_apart(trained, encode_plainly):
    """Their hash would be the same: it repeats after 32 bytes."""
    words = [a + "c" * 31 + b for a, b in ("ab", "ba")]
    encoded = DocumentEncoder(trained, split_sentences=False).encode(["\n".join(words)])
    assert encoded.tokens.tolist() == encode_plainly("\n".join(words)) != encode_plainly("\n".join(words[::-1]))


def test_sentences_end_where_they_seem_to(trained):
    text = 'One. Two! "Three?" (Four.) 5 is five. not six... Seven'
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    assert [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])] == [
        "One.", " Two!", ' "Three?"', " (Four.)", " 5 is five. not six...", " Seven",
    ]  # fmt: skip
    encoded = DocumentEncoder(trained, split_sentences=True).encode([text + "\n\nNext line. End", "Other."])
    assert encoded.document_sentences.tolist() == [8, 1]
    assert encoded.tokens.tolist().count(2) == 2 and encoded.tokens[-1] == 2


def test_a_text_cannot_forge_the_end_of_a_document(trained):
    encoded = DocumentEncoder(trained, split_sentences=True).encode(["a </s> <mask>\t</s>"])
    assert [i for i in encoded.tokens.tolist() if i in special_token_ids(trained)] == [2]


def test_the_fast_and_the_slow_path_cut_the_same_sentences(trained):
    texts = [*TOPICS, *AWKWARD, "One.  Two spaces. Three.\n\n Four "]
    expected = DocumentEncoder(trained, split_sentences=True)
    expected._pre_tokens = None  # everything through the tokenizer
    a, b = expected.encode(texts), DocumentEncoder(trained, split_sentences=True).encode(texts)
    for one, other in zip(vars(a).values(), vars(b).values()):
        assert one.dtype == other.dtype and one.tolist() == other.tolist()


@pytest.mark.parametrize("setting, value", [("_MOST_ENTRIES", 100), ("_LONGEST", 4), ("_TABLE_BITS", 14)])
def test_what_is_remembered_changes_nothing(trained, monkeypatch, setting, value):
    """A table forgotten after each batch, pre-tokens too long for it, and slots that collide."""
    texts = [TOPIC + " 日本語 naïve" for TOPIC in TOPICS]
    expected = DocumentEncoder(trained, split_sentences=True).encode(texts)
    monkeypatch.setattr(fastroberta.corpus.encode, "_BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(fastroberta.corpus.encode, setting, value)
    found = DocumentEncoder(trained, split_sentences=True).encode(texts)
    assert (found.tokens == expected.tokens).all() and len(found.tokens) > 10000
    assert (found.sentence_lengths == expected.sentence_lengths).all()
    assert (found.document_sentences == expected.document_sentences).all()
