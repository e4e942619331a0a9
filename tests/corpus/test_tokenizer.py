"""The tokenizer: RoBERTa's special ids and splitting, the same for transformers, the same when trained twice."""
# ruff: noqa: RUF001 (characters that look alike are the point)

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
from pretrained import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

import fastroberta.corpus.tokenizer
from fastroberta.cli.program import run
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
from fastroberta.prepare import main as prepare

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
    return train_tokenizer(TOPICS + AWKWARD, 2000)


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
    code = "from test_tokenizer import *;print(tokenizer_hash(train_tokenizer(TOPICS + AWKWARD, 2000)))"
    for seed in "12":  # of Python's hashes
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == tokenizer_hash(trained)


def test_the_smallest_vocabulary_is_bytes_and_specials():
    assert SMALLEST_VOCABULARY == 261
    tokenizer = train_tokenizer(["aaa aaa"], 261)
    assert vocabulary_size(tokenizer) == 261 and special_token_ids(tokenizer).mask == 260
    with pytest.raises(ConfigurationError, match="261 is the smallest"):
        train_tokenizer(["aaa"], 260)
    with pytest.raises(ConfigurationError, match="vocabulary of 1000000000: 1000000 is the largest"):
        train_tokenizer(["aaa"], 10**9)


def test_little_text_gives_a_smaller_vocabulary():
    tokenizer = train_tokenizer(["ab ab"], LARGEST_VOCABULARY)
    assert vocabulary_size(tokenizer) == special_token_ids(tokenizer).mask + 1 < 300


def test_line_breaks_and_indentation_are_learned():
    tokenizer = train_tokenizer(["def f():\n        return 1\n\n\ndef g():\n        return 2"] * 2, 400)
    assert tokenizer.encode("\n        return", add_special_tokens=False).tokens == ["ĊĠĠĠĠĠĠĠ", "Ġreturn"]


def test_a_long_text_is_cut_for_training_where_no_pre_token_changes(monkeypatch):
    """The trainer takes 256 texts at a time: whole documents of 16 MB would not fit in memory."""
    texts = ["a  b\n\nc \n  d\te.\n" * 50, *TOPICS[:10]]
    whole = train_tokenizer(texts, 600)
    monkeypatch.setattr(fastroberta.corpus.tokenizer, "_TRAINING_CHARACTERS", 7)
    assert tokenizer_hash(train_tokenizer(texts, 600)) == tokenizer_hash(whole)


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


def test_a_pair_has_no_token_types(tmp_path):
    """BERT's tokenizer would number the second text 1, in a model that has learned 0 alone."""
    transformers = pytest.importorskip("transformers")
    save_tokenizer(make_tokenizer("bert"), tmp_path)
    encoded = transformers.AutoTokenizer.from_pretrained(tmp_path)("one text", "another")
    assert set(encoded) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("most, code, where", [(0, 2, "--out "), (5_000, 3, "out: ")])
def test_a_full_disk_is_one_line(tmp_path, capsys, most, code, where):
    """Files that may not grow stand for a disk without room; tokenizer.json would have 20 kB."""
    (tmp_path / "text.txt").write_text("\n\n".join(TOPICS[:6]))
    arguments = [str(tmp_path / "text.txt"), f"--out={tmp_path / 'out'}", "--train-tokenizer=400", "--workers=1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        assert run(lambda: prepare(arguments)) == code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and where in message and "File too large" in message
    assert run(lambda: prepare(arguments)) == 0


def test_what_the_tokenizers_library_cannot_write_is_an_os_error(trained, tmp_path):
    (tmp_path / "vocab.json").mkdir()
    with pytest.raises(OSError, match=r"vocab.json or merges.txt: "):
        save_tokenizer(trained, tmp_path)


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
