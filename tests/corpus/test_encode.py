"""The tokens in the shards are the tokenizer's for the whole document; bounds of sentences never change one."""
# ruff: noqa: RUF001 (characters that look alike are the point)

from __future__ import annotations

import itertools
import json
import random
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import AWKWARD, TOPICS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

import fastroberta.corpus.encode
from fastroberta.corpus.encode import TERMINATORS, UNSPACED, DocumentEncoder, find_sentence_starts
from fastroberta.corpus.tokenizer import (
    ROBERTA_TOKENS,
    is_roberta_bpe,
    load_tokenizer,
    special_token_ids,
    train_tokenizer,
)

SAMPLES = {
    "article": "Harbour seals\n\nHarbour seals are found along temperate coasts. They weigh up to 168\u00a0kg (370\u2009lb)."
    "\n\nDiet\nFish, squid and crustaceans; pups are born in June.  Dr. Noë's survey (1998) counted 4,200.\n",
    "python": 'def area(r):\n\t"""Square.\n\n\tUnits: m²."""\n    if r < 0:\n        raise ValueError(f"{r!r}")\n\n\n'
    "\treturn 3.14159 * r ** 2   # approximately\r\n",
    "chat": "<ana> hi!! 😀😀\n<bo>   hey... what's up?\n<ana> nm, u?  👩‍👩‍👧‍👦 🏳️‍🌈\n\n\n* bo has left (</s> <mask>)",
    "verse": "  The tide goes out,\n      the tide comes in —\n  we've counted waves\n\n      since we'll begin.\n",
    "chinese": "港口很安静。「他们来了吗？」她问。2019年，他走了！Apple公司。\n\n　　第二段开始：３．１４是数字。",
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか？とんと見当がつかぬ！\n『何でも』薄暗い所。",
    "arabic": "هل وصل القطار؟ نعم، وصل. ثم غادر المدينة۔ انتهى.\nسطر جديد",
    "hindi": "नदी शांत थी। नाव आई॥ क्या तुम आओगे? हाँ।वह चला गया।\nनई पंक्ति",
    "armenian and thai": "Բարեւ։ Ինչպես ես։\nสวัสดีครับ เราไปทะเลกัน",
    "spaces": "a  b   c    d \t e \u00a0 f\u2003\u2003g\u3000\u3000h \u3000i\u3000 j\n \n  \n\t\n k\x0b\x0cl",
    "separators": "one\u2028two\u2029three\x85four\rfive\r\nsix\x1cseven \x1d eight\u200bnine\ufefften",
    "decomposed": "e\u0301te\u0301 \u0301 नि ก็ \u202eabc\u202c ﬁ ½ Ⅷ",
    "specials": "<s>a</s> <mask> b<pad> <unk>\n</s>\n<mask>\n",
}
TEXTS = [text.strip() for text in SAMPLES.values()] + AWKWARD


def byte_level(prefix_space: bool = False, added: bool = False) -> Tokenizer:
    tokenizer = train_tokenizer(TOPICS + TEXTS, 1500)
    if prefix_space:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if added:
        tokenizer.add_tokens(["tide", AddedToken("\n\n", normalized=False), AddedToken("ha", single_word=True)])
        tokenizer.add_special_tokens(["<ana>", AddedToken("。", lstrip=True, rstrip=True)])
    return tokenizer


def trained(tokenizer: Tokenizer, trainer) -> Tokenizer:
    tokenizer.train_from_iterator(TOPICS[:10] + TEXTS, trainer)
    tokenizer.add_special_tokens(ROBERTA_TOKENS)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(
        tokenizer, trainers.WordPieceTrainer(vocab_size=800, special_tokens=ROBERTA_TOKENS, show_progress=False)
    )


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=ROBERTA_TOKENS, unk_token="<unk>", show_progress=False
    )
    return trained(tokenizer, trainer)


def byte_fallback() -> Tokenizer:
    """As LLaMA's: no pre-tokens, the whole text is one word."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TOPICS[:5], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in [*ROBERTA_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary[token] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(ROBERTA_TOKENS)
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, prefix space": lambda: byte_level(prefix_space=True),
    "byte-level, added tokens": lambda: byte_level(added=True),
    "wordpiece": word_piece,
    "unigram": unigram,
    "byte fallback": byte_fallback,
}


@pytest.fixture(scope="module")
def roberta():
    return byte_level()


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def expect(tokenizer: Tokenizer, text: str) -> list[int]:
    """The rule, word for word."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return [*plain.encode(text, add_special_tokens=False).ids, special_token_ids(tokenizer).eos]


def encode(tokenizer, documents, split_sentences=True, **options):
    """The encoder's tokens, a list for each document, each of which is a list of sentences."""
    encoder = tokenizer if isinstance(tokenizer, DocumentEncoder) else None
    encoder = encoder or DocumentEncoder(tokenizer, split_sentences=split_sentences, **options)
    encoded = encoder.encode(documents)
    assert encoded.sentence_lengths.sum() == len(encoded.tokens)
    assert encoded.document_sentences.sum() == len(encoded.sentence_lengths)
    assert not len(encoded.tokens) or encoded.sentence_lengths.min() > 0
    tokens, lengths = iter(encoded.tokens.tolist()), iter(encoded.sentence_lengths.tolist())
    return [
        [[next(tokens) for _ in range(next(lengths))] for _ in range(count)]
        for count in encoded.document_sentences.tolist()
    ]


def flat(sentences):
    return list(itertools.chain.from_iterable(sentences))


def hold(tokenizer, documents, **options):
    found = [flat(sentences) for sentences in encode(tokenizer, documents, **options)]
    assert len(found) == len(documents)
    for document, tokens in zip(documents, found):
        assert tokens == expect(tokenizer, document), repr(document[:200])


def test_only_roberta_s_own_kind_takes_the_fast_path():
    assert [is_roberta_bpe(make()) for make in TOKENIZERS.values()] == [True] + [False] * 5


@pytest.mark.parametrize("split_sentences", [False, True])
def test_the_tokens_are_those_of_the_whole_document(tokenizer, split_sentences):
    padded = ["\n\n a", "a \n", " ", "\n", "", "a\u3000"]  # prepare strips, the encoder takes them as they are
    hold(tokenizer, [*TEXTS, "\n".join(TEXTS), *padded], split_sentences=split_sentences)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return DocumentEncoder(tokenizer, split_sentences=True), plain


NASTY = "ab Z.!?'\"()_-19²½Ⅷé\t\n\r\0\x0b\x1c\x1f\x85\xa0\u2028\u3000\u200b\u200d\ufeff’”日я。」！।क\u0301्👩🏽ไ؟م։<s>/"
PIECES = [
    "  ",
    "\n\n",
    "\n    ",
    ". ",
    ".\n",
    "'s",
    "'ll",
    " 're",
    "</s>",
    "<mask>",
    "。\u3000",
    "？」",
    "\u00a0 ",
    "tide",
    "ha",
]


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.one_of(st.sampled_from([*NASTY, *PIECES]), st.text(max_size=3)), max_size=30))
def test_random_text(pairs, parts):
    encoder, plain = pairs
    text = "".join(parts)
    [sentences] = encode(encoder, [text])
    tokens = flat(sentences)
    assert tokens[:-1] == plain.encode(text, add_special_tokens=False).ids


def test_random_runs_of_space_and_punctuation(roberta):
    """Many short texts at once, for the fast path."""
    letters = random.Random(0)
    documents = [
        *("".join(letters.choices(NASTY.replace("\0", ""), k=letters.randrange(1, 60))) for _ in range(2000)),
        *("".join(letters.choices("ab A.' \n\t", k=40)) for _ in range(2000)),
        *("".join(letters.choices(" \n\u3000\u00a0a日。.A", k=20)) for _ in range(2000)),
        *("".join(letters.choices("a1'éstrevldm S\n", k=20)) for _ in range(2000)),
    ]
    plain = Tokenizer.from_str(roberta.to_str())
    plain.encode_special_tokens = True
    expected = [one.ids for one in plain.encode_batch_fast(documents, add_special_tokens=False)]
    for document, sentences, tokens in zip(documents, encode(roberta, documents), expected):
        assert flat(sentences) == [*tokens, 2], repr(document)


def test_byte_level_decodes_to_the_document(roberta):
    for text, sentences in zip(TEXTS, encode(roberta, TEXTS)):
        assert roberta.decode(flat(sentences)[:-1], skip_special_tokens=False) == text


@pytest.mark.parametrize("size", [300_000, pytest.param(5_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", ["The tide goes out. Dr. Noë counts 42 waves!  ", "海は静か。名前は無い", "x"])
def test_one_long_line(tokenizer, unit, size):
    if unit == "x" and size > 300_000:
        pytest.skip("one word of 5 MB is no text")
    document = (unit * (size // len(unit.encode()))).strip()
    hold(tokenizer, [document])


def test_every_character_is_split_from_its_neighbours_as_it_should(tmp_path):
    """Python's classes of characters and the tokenizer's differ; no plain word may be split by the wrong ones.

    This vocabulary merges whatever is not split: letters, digits and spaces with the bytes of any other character.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    outer = [letter for letter in letters if ord(letter) > 126]
    merges = [pair for letter in outer for inner in "ab1'" for pair in ((inner, letter), (letter, inner))]
    merges += [pair for c in "strevlmdxS" for pair in (("'", c), ("e", c), ("l", c), (c, "x"), (c, "'"))]
    merges = list(dict.fromkeys(merges))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *map("".join, merges), "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = load_tokenizer(tmp_path)
    assert is_roberta_bpe(tokenizer)
    characters = [chr(c) for c in [*range(1, 0x3100), *range(0xFE00, 0xFE70), *range(0xFF00, 0x10000)]]
    documents = [f"a{c}b {c}1{c} {c}'s {c}a'{c}.\n {c}\n{c} a{c}{c}b{c} {c} a.{c}A。{c}x" for c in characters]
    shortened = [a + b for a in "strevlmdxS" for b in ["", *"strevlmdxS"]]
    documents += [template.format(c) for c in shortened for template in ("'{}", "x'{}x", "x''{}", "x '{}", "1'{}'x")]
    documents += ["l'élan", "'sé", "'reé", "é's", "\n's", "\u3000's", " 's"]
    plain = Tokenizer.from_str(tokenizer.to_str())
    expected = [one.ids for one in plain.encode_batch_fast(documents, add_special_tokens=False)]
    for document, sentences, ids in zip(documents, encode(tokenizer, documents), expected):
        assert flat(sentences) == [*ids, 2], repr(document)


def test_long_words_are_told_apart(roberta):
    """Their hash would be the same: it repeats after 32 bytes."""
    words = [a + "c" * 31 + b for a, b in ("ab", "ba")]
    hold(roberta, [" ".join(words), " ".join(words[::-1])])


# ---- sentences


def cut(text):
    starts = [0, *find_sentence_starts(text), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize(
    "sentences",
    [
        ["One. ", "Two! ", '"Three?" ', "(Four.) ", "5 is five. not six... ", "Seven"],
        ["港口很安静。", "他们来了吗？", "2019年，他走了！", "Apple公司。」", "好"],
        ["吾輩は猫である。", "名前はまだ無い。\u3000", "どこで"],
        ["هل وصل القطار؟ ", "نعم، وصل. ", "ثم غادر۔ ", "انتهى."],
        ["नदी शांत थी। ", "नाव आई॥ ", "हाँ।", "वह चला गया।"],
        ["Բարեւ։ ", "Ինչպես ես։"],
        ["ሰላም። ", "ደህና ነህ፧ ", "አዎ።"],
        ["See example.com?a=1 or v2.0a, 3.14, U.S.A. e.g. this!"],
    ],
)
def test_sentences_end_where_they_seem_to(sentences):
    assert cut("".join(sentences)) == sentences


def test_the_terminators_are_unicode_s():
    regex = pytest.importorskip("regex")
    property_, ours = regex.compile(r"\p{Sentence_Terminal}"), regex.compile(f"[.!?{TERMINATORS}]")
    newer = set("\u2e60\u2e61")  # Unicode 17
    assert {chr(c) for c in range(0x10000) if property_.match(chr(c))} - newer == {
        chr(c) for c in range(0x10000) if ours.match(chr(c))
    }


def test_a_pre_token_begins_where_a_sentence_starts_without_a_space():
    regex = pytest.importorskip("regex")
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    terminators, letters = (
        [chr(c) for c in range(0x10000) if regex.match(f"[{kind}]", chr(c))] for kind in (TERMINATORS, UNSPACED)
    )
    for one in terminators:
        assert [place for _, place in split.pre_tokenize_str(f"{one}」a")] == [(0, 2), (2, 3)], hex(ord(one))
    text = "".join(f"。{letter}" for letter in letters)
    assert [place for _, place in split.pre_tokenize_str(text)] == [(i, i + 1) for i in range(len(text))]


def test_sentences_hold_the_space_that_follows_them(roberta):
    text = 'One.  Two! "Three?"\n\n    indented, not cut\n\n\nEnd。日本。』 X'
    [sentences] = encode(roberta, [text])
    assert [roberta.decode(one) for one in sentences] == [
        "One. ", " Two!", ' "Three?"\n\n   ', " indented, not cut\n\n\n", "End。", "日本。』", " X",
    ]  # fmt: skip
    [lines] = encode(roberta, [text], split_sentences=False)
    assert len(lines) == 3 and flat(lines) == flat(sentences)


def test_the_fast_and_the_slow_path_cut_the_same_sentences(roberta):
    slow = byte_level()
    slow.add_tokens(["\U000f0000"])  # which no text has
    assert not is_roberta_bpe(slow)
    # Where a blank is a token of its own, before a letter that was never merged, they may differ by that token.
    texts = [*TOPICS, SAMPLES["article"].strip(), SAMPLES["python"].strip(), "One.  Two spaces. Three.\n\n Four "]
    a, b = encode(slow, texts), encode(roberta, texts)
    for text, one, other in zip(texts, a, b):
        assert one == other, repr(text)


def test_other_tokenizers_are_cut_at_lines_and_sentences(tokenizer):
    [sentences] = encode(tokenizer, ["The tide is out. The sea is calm!\nThe wave\n\nThe end"])
    assert len(sentences) >= 2


# ---- the rest


def test_a_text_cannot_forge_the_end_of_a_document(tokenizer):
    if isinstance(tokenizer.model, models.Unigram):
        pytest.skip("its model has </s> among its own pieces; documents are told apart by the shard's starts")
    ids = special_token_ids(tokenizer)
    [sentences] = encode(tokenizer, ["a </s> <mask>\t</s>\n<s><pad>"])
    assert [i for i in flat(sentences) if i in set(ids) - {ids.unk}] == [ids.eos]


def test_separator_closes_each_line_as_fairseq_does(tokenizer):
    documents = ["One. Two\n\n  three ", "four", "a\u3000"]
    lines = [["One. Two", "", "three", ""], ["four", ""], ["a", ""]]
    found = encode(tokenizer, documents, newlines="separator")
    assert [flat(one) for one in found] == [
        [token for line in document for token in expect(tokenizer, line)] for document in lines
    ]
    by_line = encode(tokenizer, documents, newlines="separator", split_sentences=False)
    assert by_line == [[expect(tokenizer, line) for line in document] for document in lines]


@pytest.mark.parametrize("newlines", ["keep", "separator"])
def test_no_documents(roberta, newlines):
    assert encode(roberta, [], newlines=newlines) == []


@pytest.mark.parametrize("setting, value", [("_MOST_ENTRIES", 100), ("_LONGEST", 4), ("_TABLE_BITS", 14)])
def test_what_is_remembered_changes_nothing(roberta, monkeypatch, setting, value):
    """A table forgotten after each batch, pre-tokens too long for it, and slots that collide."""
    texts = [TOPIC + " 日本語 naïve" for TOPIC in TOPICS]
    expected = encode(roberta, texts)
    monkeypatch.setattr(fastroberta.corpus.encode, "_BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(fastroberta.corpus.encode, setting, value)
    assert encode(roberta, texts) == expected


def test_a_document_may_have_more_words_than_are_remembered(roberta, monkeypatch):
    """16 MB without a word twice, such as a list of words, would fill the table of two million; here it is a small one."""
    for name, value in (("_TABLE_BITS", 8), ("_FULL", 192), ("_MOST_ENTRIES", 128)):
        monkeypatch.setattr(fastroberta.corpus.encode, name, value)
    document = " ".join(map("".join, itertools.product("abcdefg", repeat=3)))
    encoder = DocumentEncoder(roberta, split_sentences=True)

    def give_up(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        for text in (document, TEXTS[0], document):
            expected = roberta.encode(text, add_special_tokens=False).ids
            assert encoder.encode([text]).tokens.tolist() == [*expected, special_token_ids(roberta).eos]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
