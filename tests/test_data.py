"""Token shards become batches: nothing lost, order and masks a function of the step alone."""

import numpy as np
import pytest
import torch

from fastroberta.corpus.manifest import write_manifest
from fastroberta.corpus.shards import ShardReader, ShardWriter
from fastroberta.data import Blocks, heldout_batches, load_corpora, move_ahead, open_split, permute, training_batches
from fastroberta.errors import ConfigurationError, DataError

BOS, PAD, EOS = 0, 1, 2
OPTIONS = dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


@pytest.fixture
def corpus(tmp_path):
    """Two shards of random documents of 1 to 5 sentences, one of 90 tokens; every token's id tells its place."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(2):
        shard = []
        for _ in range(20):
            lengths = rng.integers(1, 14, size=rng.integers(1, 6)).tolist()
            shard.append([rng.integers(4, 1000, size=length) for length in lengths])
        shard[3].append(rng.integers(4, 1000, size=90))
        documents.append(shard)
    with ShardWriter(tmp_path, "train", np.dtype("<u2"), "00" * 32) as writer:
        for shard in documents:
            for document in shard:
                tokens = np.concatenate([*document, [EOS]])
                lengths = np.array([len(sentence) for sentence in document])
                lengths[-1] += 1
                writer.append(tokens, lengths, np.array([len(document)]))
            writer.close()
    paths = [tmp_path / entry["name"] for entry in writer.files]
    assert len(paths) == 2
    return paths, documents


def make_blocks(paths, packing="contiguous", scope="block", size=32):
    return Blocks(
        [ShardReader(path) for path in paths], block_size=size, packing=packing, attention_scope=scope, **OPTIONS
    )


def read_all(blocks):
    batch = blocks.read(np.arange(len(blocks)), np.arange(len(blocks)), 0)
    return [row[row != PAD] for row in batch.input_ids.numpy()], batch


@pytest.mark.parametrize("packing", ["full-sentences", "doc-sentences", "contiguous"])
def test_no_token_is_lost_or_moved(corpus, packing):
    paths, documents = corpus
    rows, _ = read_all(make_blocks(paths, packing))
    assert all(row[0] == BOS for row in rows)
    stream = np.concatenate([row[1:] for row in rows])
    expected = np.concatenate([np.concatenate([*doc, [EOS]]) for shard in documents for doc in shard])
    assert np.array_equal(stream, expected)


def pack_plainly(documents, packing, capacity):
    """Greedy packing as its definition says it, one sentence at a time: the lengths of the blocks of a shard."""
    blocks = [0]
    for document in documents:
        for index, sentence in enumerate(document):
            is_last = index == len(document) - 1
            length = len(sentence) + is_last  # with </s>
            while length:
                part = min(length, capacity)
                if blocks[-1] + part > capacity:
                    blocks.append(0)
                blocks[-1] += part
                length -= part
        if packing == "doc-sentences":
            blocks.append(0)
    return [length for length in blocks if length]


@pytest.mark.parametrize("window", [1, 3, 20, 2**16])
@pytest.mark.parametrize("packing", ["full-sentences", "doc-sentences"])
def test_blocks_do_not_depend_on_the_windows_in_which_sentences_are_read(corpus, monkeypatch, packing, window):
    monkeypatch.setattr("fastroberta.corpus.packing.WINDOW", window)
    paths, documents = corpus
    rows, batch = read_all(make_blocks(paths, packing))
    assert [len(row) - 1 for row in rows] == [one for shard in documents for one in pack_plainly(shard, packing, 31)]
    static = make_blocks(paths, packing, "document")
    _, batch = read_all(static)
    most = max(sum(token == EOS for token in row[:-1]) for row in rows)  # documents that begin inside a block, at least
    assert len(batch.cu_seqlens) - 1 >= len(rows) * (1 + most)


def test_a_flipped_bit_is_found_before_its_block_is_used(corpus):
    paths, _ = corpus
    data = bytearray(paths[1].read_bytes())
    data[200] ^= 4
    paths[1].write_bytes(data)
    blocks = make_blocks(paths)
    blocks.read(np.array([0]), np.array([0]), 0)
    assert blocks.describe_verified().startswith("verified 0.0 of 0.0 MB in shards")
    with pytest.raises(DataError, match=r"train-00001\.bin: bytes 0 to \d+ do not match their checksum"):
        list(move_ahead(heldout_batches(blocks, 10**6, 8), torch.device("cpu")))


def test_full_sentences_end_where_a_sentence_does(corpus):
    paths, documents = corpus
    rows, _ = read_all(make_blocks(paths, "full-sentences"))
    ends = set()  # stream offsets at which a sentence ends
    offset = 0
    for shard in documents:
        for document in shard:
            for sentence in document:
                offset += len(sentence)
                ends.add(offset)
            ends.remove(offset)
            offset += 1
            ends.add(offset)
    position, cut_inside = 0, 0
    for row in rows:
        position += len(row) - 1
        cut_inside += position not in ends
    assert cut_inside == 2 * 2  # only the two sentences of 90 tokens, in three pieces each
    # Greedy: the next sentence would not have fitted.
    assert np.mean([len(row) for row in rows]) > 24


def test_doc_sentences_hold_one_document_each(corpus):
    paths, _ = corpus
    rows, _ = read_all(make_blocks(paths, "doc-sentences"))
    assert all(EOS not in row[1:-1] for row in rows)


def test_contiguous_blocks_are_full_but_the_last_of_each_shard(corpus):
    paths, _ = corpus
    rows, batch = read_all(make_blocks(paths))
    assert sum(len(row) < 32 for row in rows) <= 2
    assert batch.num_tokens == sum(map(len, rows))


def test_key_lengths_and_squared_lengths(corpus):
    paths, _ = corpus
    rows, batch = read_all(make_blocks(paths, "full-sentences"))
    assert batch.key_lengths.dtype == torch.int32
    assert batch.key_lengths.tolist() == [len(row) for row in rows]
    assert batch.sum_squared_lengths == sum(len(row) ** 2 for row in rows)


def test_document_bounds(corpus):
    paths, _ = corpus
    blocks = make_blocks(paths, "full-sentences", "document")
    rows, batch = read_all(blocks)
    expected = {0}
    for index, row in enumerate(rows):
        start = index * 32
        expected |= {start, start + len(row)} | {start + i + 1 for i in range(1, len(row)) if row[i] == EOS}
    expected.add(len(rows) * 32)
    bounds = batch.cu_seqlens
    assert bounds.dtype == torch.int32 and batch.key_lengths is None
    assert sorted(set(bounds.tolist())) == sorted(expected)
    assert (bounds.diff() >= 0).all() and bounds[-1] == len(rows) * 32
    ends = [np.flatnonzero(np.append(row[1:-1] == EOS, True)) for row in rows]  # of documents, without padding
    assert batch.sum_squared_lengths == sum((np.diff(one + 2, prepend=0) ** 2).sum() for one in ends)
    # The number of bounds is static.
    sizes = {len(blocks.read(np.array([i]), np.array([i]), i).cu_seqlens) for i in range(len(blocks))}
    assert len(sizes) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 1000, 4096])
def test_permute_is_a_bijection(size):
    images = permute(np.arange(size), size, seed=3, epoch=0)
    assert np.array_equal(np.sort(images), np.arange(size))


def test_permute_mixes_and_differs_by_seed_and_epoch():
    size = 10_007
    images = [permute(np.arange(size), size, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for i, image in enumerate(images):
        assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
        assert all((image != other).mean() > 0.99 for other in images[:i])
    big = permute(np.arange(1000), 10**12, 1, 0)
    assert big.max() < 10**12 and big.min() >= 0 and len(set(big.tolist())) == 1000


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_do_not_depend_on_the_micro_batch(corpus, size):
    paths, _ = corpus
    blocks = make_blocks(paths)
    count = 24 // size * size
    assert count == 24

    def gather(step):
        batches = list(training_batches(blocks, range(0, 24, step), step, seed=7))
        return [torch.cat([getattr(b, name) for b in batches]) for name in ("input_ids", "sample_ids")]

    for got, expected in zip(gather(size), gather(24)):
        assert torch.equal(got, expected)


def test_an_epoch_sees_each_block_once_and_the_next_in_another_order(corpus):
    paths, _ = corpus
    blocks = make_blocks(paths)
    size = len(blocks)
    batches = list(training_batches(blocks, range(0, 2 * size, size), size, seed=7))
    first, second = (batch.sample_ids.tolist() for batch in batches)
    assert sorted(first) == list(range(size))
    assert sorted(second) == list(range(size, 2 * size)), "masks of a new epoch are drawn for new numbers"
    assert [i - size for i in second] != first
    static = list(training_batches(blocks, range(0, 2 * size, size), size, seed=7, static_masking=True))
    assert sorted(static[1].sample_ids.tolist()) == list(range(size))
    across = next(training_batches(blocks, [size - 2], 4, seed=7))
    assert across.sample_ids.tolist() == first[-2:] + second[:2]


def test_heldout_batches_are_spread_and_bounded(corpus):
    paths, _ = corpus
    blocks = make_blocks(paths)
    ids = torch.cat([batch.sample_ids for batch in heldout_batches(blocks, 6, 4)])
    assert len(ids) == 6 and ids[-1] > len(blocks) // 2
    assert sum(len(batch.sample_ids) for batch in heldout_batches(blocks, 10**6, 16)) == len(blocks)


def test_move_ahead_keeps_order_and_passes_errors_on(corpus):
    paths, _ = corpus
    blocks = make_blocks(paths)
    moved = [b.first_sample.item() for b in move_ahead(heldout_batches(blocks, 9, 2), torch.device("cpu"))]
    assert moved == [0, 2, 4, 6, 8]

    def broken():
        yield from heldout_batches(blocks, 2, 2)
        raise DataError("shard: gone")

    with pytest.raises(DataError, match="gone"):
        list(move_ahead(broken(), torch.device("cpu")))


@pytest.fixture
def mixture(corpus):
    """Each shard as a corpus of its own: three quarters of the samples come from the second."""
    shards = [ShardReader(path) for path in corpus[0]]
    return Blocks(
        shards,
        block_size=32,
        packing="contiguous",
        attention_scope="block",
        shards_of=[1, 1],
        weights=[0.5, 1.5],
        **OPTIONS,
    )


def test_a_mixture_has_its_weights_and_epochs_of_each_corpus(corpus, mixture):
    sizes = [len(make_blocks([path])) for path in corpus[0]]
    assert len(mixture) == sum(sizes)
    samples = np.arange(6 * len(mixture))
    blocks, epochs = mixture.order(samples, seed=3)
    is_second = blocks >= sizes[0]
    assert abs(is_second.mean() - 0.75) < 0.01
    assert abs(np.cumsum(is_second) - 0.75 * (samples + 1)).max() <= 1  # evenly, not in runs
    for is_there, size, first in ((~is_second, sizes[0], 0), (is_second, sizes[1], sizes[0])):
        own = blocks[is_there]
        for epoch in range(len(own) // size):
            part = own[epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(first, first + size))
            assert (epochs[is_there][epoch * size : (epoch + 1) * size] == epoch).all()
    counts = [(~is_second).sum() / sizes[0], is_second.sum() / sizes[1]]
    assert mixture.count_epochs(len(samples)) == pytest.approx(counts)
    # A function of the sample's number, across periods of the pattern too.
    for chosen in (samples[::7], np.array([2500, 0, 999, 1000])):
        again = np.arange(3000)
        assert np.array_equal(mixture.order(chosen, 3)[0], mixture.order(again, 3)[0][chosen])


def test_the_masks_of_a_mixture_are_drawn_for_new_numbers(mixture):
    batches = training_batches(mixture, range(0, 3000, 1000), 1000, seed=1)
    ids = np.concatenate([batch.sample_ids.numpy() for batch in batches])
    assert len(set(ids.tolist())) == 3000


def test_heldout_sequences_come_from_each_corpus_by_its_weight(corpus, mixture):
    first = len(make_blocks(corpus[0][:1]))
    chosen = np.concatenate(mixture.spread_evenly(12))
    assert len(chosen) == 12 and (chosen >= first).sum() == 9 and len(set(chosen.tolist())) == 12
    alone = make_blocks(corpus[0])
    assert alone.spread_evenly(7)[0].tolist() == [i * len(alone) // 7 for i in range(7)]


def test_a_single_corpus_is_ordered_as_ever(corpus):
    blocks = make_blocks(corpus[0])
    samples = np.arange(3 * len(blocks))
    expected = [permute(samples[:1] * 0 + s % len(blocks), len(blocks), 5, s // len(blocks))[0] for s in samples]
    found, epochs = blocks.order(samples, 5)
    assert found.tolist() == expected and epochs.tolist() == [s // len(blocks) for s in samples]


def prepared(directory, tokenizer="00"):
    directory.mkdir()
    files = []
    for split in ("train", "heldout"):
        with ShardWriter(directory, split, np.dtype("<u2"), tokenizer * 32) as writer:
            writer.append(np.array([4, 5, 6, EOS]), np.array([4]), np.array([1]))
        files += writer.files
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    contents = {"tokenizer_sha256": tokenizer * 32, "vocab_size": 9, "special_token_ids": ids}
    write_manifest(directory, {**contents, "shards": files, "tokenizer_files": []})
    return str(directory)


def test_corpora_are_named_with_weights(tmp_path):
    one, two = prepared(tmp_path / "one"), prepared(tmp_path / "two,too:2")
    for data, weights in (
        ([one], [1]), ([f"{one}:3"], [3]), ([two], [1]), ([one, f"{two}:0.3"], [1, 0.3]),
    ):  # fmt: skip
        corpora = load_corpora(data)
        assert [corpus.weight for corpus in corpora] == weights
        blocks = open_split(corpora, "train", max_seq_length=8, packing="contiguous", attention_scope="block")
        assert len(blocks) == len(weights)
    for weight in ("x", "0", "-1", "nan", "inf"):
        with pytest.raises(ConfigurationError, match=f"data: .*one:{weight}: '{weight}' is not a positive weight"):
            load_corpora([f"{one}:{weight}"])
    other = prepared(tmp_path / "other", "11")
    with pytest.raises(
        ConfigurationError, match=r"other has another tokenizer than .*one; prepare it with --tokenizer"
    ):
        load_corpora([one, other])
    with pytest.raises(ConfigurationError, match="a weight is less than 1/1000"):
        open_split(
            load_corpora([one, f"{two}:1e-5"]), "train", max_seq_length=8, packing="contiguous", attention_scope="block"
        )


def test_unigram_entropy_of_known_frequencies(tmp_path):
    with ShardWriter(tmp_path, "heldout", np.dtype("<u2"), "00" * 32) as writer:
        writer.append(np.array([4, 4, 5, 6, EOS]), np.array([5]), np.array([1]))
    blocks = make_blocks([tmp_path / "heldout-00000.bin"])
    assert blocks.unigram_entropy() == pytest.approx(1.5 * np.log(2))
    assert blocks.sentences(3, 1, 10) == [[4, 4, 5, 6]]


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_sentences_of_a_length_are_spread_evenly(corpus, count):
    paths, documents = corpus
    lengths = [(one, len(one) + (place + 1 == len(doc))) for shard in documents for doc in shard
               for place, one in enumerate(doc)]  # fmt: skip
    fitting = [sentence.tolist() for sentence, length in lengths if 5 <= length <= 9]
    count_found = min(count, len(fitting))
    expected = [fitting[index * len(fitting) // count_found] for index in range(count_found)]
    assert make_blocks(paths).sentences(count, 5, 9) == expected
    assert make_blocks(paths).sentences(count, 1000, 2000) == []


def test_document_bounds_come_from_the_shard_not_from_eos(tmp_path):
    """Prepared with --newlines separator, every line ends with `</s>`."""
    lines = [[[5, 6, EOS], [7, EOS], [EOS]], [[8, EOS], [9, 10, 11, EOS], [EOS]]]
    with ShardWriter(tmp_path, "train", np.dtype("<u2"), "00" * 32) as writer:
        for document in lines:
            tokens = np.array([token for line in document for token in line])
            writer.append(tokens, np.array([len(line) for line in document]), np.array([len(document)]))
    blocks = make_blocks([tmp_path / "train-00000.bin"], "full-sentences", "document")
    batch = blocks.read(np.array([0]), np.array([0]), 0)
    assert sorted(set(batch.cu_seqlens.tolist())) == [0, 7, 14, 32]
