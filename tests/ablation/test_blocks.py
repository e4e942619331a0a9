"""Parts of the data, and pairs: which tokens they hold, and that they are a function of seed and sample."""

import functools
import itertools

import numpy as np
import pytest
from tiny import prepare_text

from fastroberta.ablation.blocks import PairBlocks, PartOfBlocks
from fastroberta.corpus.manifest import load_manifest
from fastroberta.corpus.packing import find_documents
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.data import open_split
from fastroberta.errors import DataError

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Documents of 2 to 5 sentences, each of which names its document and its place in it."""
    text = "\n\n".join(
        " ".join(f"{NAMES[place]} counts {document}, then {place}." for place in range(2 + document % 4))
        for document in range(60)
    )
    return load_manifest(prepare_text(tmp_path_factory.mktemp("data"), text, 290))


@pytest.fixture(scope="module")
def open_pairs(manifest):
    def open_pairs(unit, seed=1, block_size=32):
        make = functools.partial(PairBlocks, unit=unit, seed=seed)
        return open_split(
            manifest, "train", max_seq_length=block_size, packing="full-sentences", attention_scope="block",
            make_blocks=make,
        )  # fmt: skip

    return open_pairs


def read_pairs(blocks, manifest, first=0):
    """For each pair its two texts, whether the second follows the first, and the batch."""
    indices = np.arange(len(blocks))
    batch = blocks.read(indices, first + indices, first)
    ids = manifest.special_token_ids
    tokenizer = load_tokenizer(manifest.directory)
    pairs = []
    for row, length, is_next in zip(batch.input_ids.tolist(), batch.key_lengths.tolist(), batch.is_next.tolist()):
        assert row[0] == ids["bos_token_id"] and row[length - 1] == ids["eos_token_id"]
        assert set(row[length:]) <= {ids["pad_token_id"]} and ids["pad_token_id"] not in row[:length]
        middle = row.index(ids["eos_token_id"])
        assert row[:length].count(ids["eos_token_id"]) == 2
        pairs.append((tokenizer.decode(row[1:middle]), tokenizer.decode(row[middle + 1 : length - 1]), is_next))
    return pairs, batch


@pytest.mark.parametrize("unit, block_size", [("segments", 64), ("segments", 20), ("sentences", 64), ("sentences", 16)])
def test_half_of_the_pairs_follow_each_other_in_their_document(open_pairs, manifest, unit, block_size):
    """At 64 tokens whole documents fit; at 20 and 16 long parts are cut."""
    blocks = open_pairs(unit, block_size=block_size)
    pairs, batch = read_pairs(blocks, manifest)
    assert 0.3 < batch.is_next.double().mean() < 0.7
    assert batch.num_tokens == batch.key_lengths.sum() and batch.sum_squared_lengths == (batch.key_lengths**2).sum()
    documents = manifest.read_shards("train")
    tokenizer = load_tokenizer(manifest.directory)
    whole = []
    for shard in documents:
        starts = [*find_documents(shard).tolist(), shard.num_tokens]
        whole += [tokenizer.decode(shard.read_tokens(*bounds).tolist()) for bounds in itertools.pairwise(starts)]
    for first, second, is_next in pairs:
        assert first and second
        homes = [text for text in whole if first in text]
        if is_next:
            assert any(second in text[text.index(first) + len(first) :] for text in homes)
        elif block_size == 64:  # "counts 7, then 1." is of document 7
            assert not any(second in text for text in homes)
    if unit == "sentences" and block_size == 64:
        assert all(first.count("then") == second.count("then") == 1 for first, second, _ in pairs)
        assert len(pairs) == sum(text.count("then") - 1 for text in whole)


def test_pairs_are_a_function_of_seed_and_sample(open_pairs, manifest):
    blocks = open_pairs("segments")
    once, again = read_pairs(blocks, manifest)[0], read_pairs(blocks, manifest)[0]
    assert once == again
    other_pass, other_seed = (
        read_pairs(blocks, manifest, len(blocks))[0],
        read_pairs(open_pairs("segments", 2), manifest)[0],
    )
    assert once != other_pass and once != other_seed
    samples = np.arange(3 * len(blocks))
    indices, passes = blocks.order(samples, seed=1)
    assert all(sorted(indices[passes == number]) == list(range(len(blocks))) for number in range(3))


def test_pairs_need_two_documents(tmp_path):
    """The held-out split takes one of the two."""
    data = load_manifest(prepare_text(tmp_path, "Anna counts. Ben counts.\n\nClara counts. Emma counts.", 270, 0.5))
    with pytest.raises(DataError, match="pairs need two documents"):
        open_split(
            data, "train", max_seq_length=32, packing="full-sentences", attention_scope="block",
            make_blocks=functools.partial(PairBlocks, unit="sentences", seed=1),
        )  # fmt: skip


def test_a_part_of_the_blocks_is_what_it_says(manifest):
    cut = {"max_seq_length": 16, "packing": "full-sentences", "attention_scope": "block"}
    whole = open_split(manifest, "train", **cut)
    third = open_split(manifest, "train", **cut, make_blocks=functools.partial(PartOfBlocks, parts=3))
    assert len(third) == len(whole) // 3 > 5
    indices, passes = third.order(np.arange(2 * len(third)), seed=1)
    assert set(indices.tolist()) == set(range(len(third))) and set(passes.tolist()) == {0, 1}
    assert third.num_tokens == third.read(np.arange(len(third)), np.arange(len(third)), 0).num_tokens
