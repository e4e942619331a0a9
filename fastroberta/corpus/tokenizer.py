"""RoBERTa's byte-level BPE: load, train, identify and save a `tokenizers.Tokenizer`.

Special tokens are found by name (RoBERTa's `<s>` or BERT's `[CLS]`); their ids are never assumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..errors import ConfigurationError

# Role -> names that a token of that role may have. The first is RoBERTa's, which a tokenizer trained here uses.
SPECIAL_TOKENS = {
    "bos": ("<s>", "[CLS]"),
    "pad": ("<pad>", "[PAD]"),
    "eos": ("</s>", "[SEP]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
ROBERTA_TOKENS = [names[0] for names in SPECIAL_TOKENS.values()]
SMALLEST_VOCABULARY = 256 + len(ROBERTA_TOKENS)  # every byte and every special token
LARGEST_VOCABULARY = 1_000_000  # several times any in use; training reserves memory for the whole vocabulary
_TRAINING_CHARACTERS = 1 << 16  # approximate length of the pieces in which a text reaches the trainer
_CUT = re.compile(r"[ \n](?=\S)")


class SpecialTokenIds(NamedTuple):
    """Ids of the five special tokens: start of a sequence, padding, end of a document, unknown, mask."""

    bos: int
    pad: int
    eos: int
    unk: int
    mask: int


def special_token_ids(tokenizer: Tokenizer) -> SpecialTokenIds:
    """The ids of a tokenizer's special tokens, found by their names.

    Raises:
        ConfigurationError: one is missing.
    """
    return SpecialTokenIds(*(tokenizer.token_to_id(name) or 0 for name in special_token_names(tokenizer)))


def special_token_names(tokenizer: Tokenizer) -> list[str]:
    """The names of a tokenizer's special tokens, in the order of `SpecialTokenIds`."""
    found = []
    for role, names in SPECIAL_TOKENS.items():
        name = next((name for name in names if tokenizer.token_to_id(name) is not None), None)
        if name is None:
            raise ConfigurationError(
                f"tokenizer: no {role} token, looked for {' and '.join(names)}; add it to the vocabulary, or train a "
                "tokenizer with prepare --train-tokenizer"
            )
        found.append(name)
    return found


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def is_roberta_bpe(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer splits and merges text as RoBERTa's does, with any vocabulary."""
    content = json.loads(tokenizer.to_str())
    split, model = content["pre_tokenizer"] or {}, content["model"]
    return (
        content["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split["add_prefix_space"]
        and model["type"] == "BPE"
        and not model["dropout"]
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and all(token["special"] for token in content["added_tokens"])
    )


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a directory: that of its tokenizer.json, or else RoBERTa's with its vocab.json and merges.txt.

    Raises:
        ConfigurationError: a file is missing or unreadable, or a special token is missing.
    """
    directory = Path(directory)
    whole, vocabulary, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.is_file() and not (vocabulary.is_file() and merges.is_file()):
        raise ConfigurationError(
            f"{directory}: no tokenizer.json, and not both of vocab.json and merges.txt; give the directory of a "
            "tokenizer"
        )
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        else:
            model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # tokenizers raises nothing more specific
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{directory}: not a tokenizer that can be read ({reason}); copy it again") from error
    if not whole.is_file():
        tokenizer = _assemble(model)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special_token_ids(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE like RoBERTa's; the same texts give the same tokenizer.

    Ids: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the 256 bytes, the merges, `<mask>` last. Pairs that occur once are not
    merged, so that a short text gives a smaller vocabulary than asked for.

    Args:
        texts: documents as they will be encoded, line breaks and indentation included.
    Raises:
        ConfigurationError: vocab_size is below SMALLEST_VOCABULARY or above LARGEST_VOCABULARY.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigurationError(
            f"vocabulary of {vocab_size}: too small for 256 bytes and {len(ROBERTA_TOKENS)} special tokens; "
            f"{SMALLEST_VOCABULARY} is the smallest"
        )
    if vocab_size > LARGEST_VOCABULARY:  # the trainer aborts the process when memory runs out
        raise ConfigurationError(f"vocabulary of {vocab_size}: {LARGEST_VOCABULARY} is the largest; RoBERTa has 50265")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        special_tokens=ROBERTA_TOKENS[:-1],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator((part for text in texts for part in _split_text(text)), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {**learned["vocab"], ROBERTA_TOKENS[-1]: len(learned["vocab"])}
    return _assemble(models.BPE(vocabulary, [tuple(pair) for pair in learned["merges"]]))


def _split_text(text: str) -> Iterator[str]:
    """Cut a long text where no pre-token changes, because the trainer holds 256 texts at a time, of any length.

    A cut before the last white space in front of a word is safe: that character always begins a pre-token.
    """
    start = 0
    while len(text) - start > _TRAINING_CHARACTERS and (cut := _CUT.search(text, start + _TRAINING_CHARACTERS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _assemble(model: models.BPE) -> Tokenizer:
    """RoBERTa's tokenizer around a model: pre-tokens, special tokens, post-processing."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    ids = special_token_ids(tokenizer)
    names = special_token_names(tokenizer)
    # `<mask>` takes the space before it, so that "a <mask>" asks for a word that begins with a space.
    tokenizer.add_special_tokens([AddedToken(name, lstrip=name == names[-1], normalized=False) for name in names])
    tokenizer.post_processor = processors.RobertaProcessing(
        (names[2], ids.eos), (names[0], ids.bos), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256, in hexadecimal digits, of exactly what decides the ids of a text.

    The tokenizer.json of a tokenizer has the same hash as its vocab.json and merges.txt.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    split = content["pre_tokenizer"]
    decisive = {
        "normalizer": content["normalizer"],
        "pre_tokenizer": {key: value for key, value in (split or {}).items() if key != "trim_offsets"},
        "added_tokens": sorted(
            [token["id"], token["content"], token["lstrip"], token["rstrip"], token["single_word"]]
            for token in content["added_tokens"]
        ),
        # None and "" both mean that there is no prefix, suffix or dropout.
        "model": {key: value for key, value in model.items() if value},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def save_tokenizer(
    tokenizer: Tokenizer, directory: str | os.PathLike[str], *, model_max_length: int = 512
) -> list[str]:
    """Write the files from which transformers' AutoTokenizer loads the same tokenizer; return their names.

    Args:
        directory: created if missing.
        model_max_length: tokens of the longest sequence, `<s>` and `</s>` included.
    Raises:
        OSError: a file cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    bos, pad, eos, unk, mask = special_token_names(tokenizer)
    roles = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "sep_token": eos, "pad_token": pad, "cls_token": bos}
    mask_token = {"content": mask, "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    is_roberta = is_roberta_bpe(tokenizer)
    settings = {
        "tokenizer_class": "RobertaTokenizer" if is_roberta else "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        **roles,
        "mask_token": {"__type": "AddedToken", **mask_token},
    }
    if is_roberta:
        settings.update({"add_prefix_space": False, "trim_offsets": True, "errors": "replace"})
    files = {"tokenizer.json": tokenizer.to_str()}
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", {**roles, "mask_token": mask_token})):
        files[f"{name}.json"] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    if not isinstance(tokenizer.model, models.BPE):
        return list(files)
    try:
        return [*files, *(Path(path).name for path in tokenizer.model.save(str(directory)))]
    except Exception as error:  # tokenizers raises nothing more specific
        raise OSError(f"{directory}: vocab.json or merges.txt: {error}") from error
