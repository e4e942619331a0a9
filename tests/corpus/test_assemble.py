"""What is held out: by a hash of the text, and enough of a small corpus."""

from __future__ import annotations

import numpy as np
import pytest

from fastroberta.corpus.assemble import HELDOUT_TOKENS, find_heldout_limit, warn_of_small_heldout


@pytest.fixture
def choose(tmp_path):
    def run(hashes, tokens, fraction, dropped=None, pieces=3):
        """Flags of the documents held out, of one sentence each, spread over several pieces."""
        paths = []
        for number, (part, sizes) in enumerate(zip(np.array_split(hashes, pieces), np.array_split(tokens, pieces))):
            paths.append(tmp_path / f"{number}.npz")
            table = np.stack([part, part], axis=1).astype(np.uint64)
            np.savez(
                paths[-1],
                hashes=table,
                sentence_lengths=sizes.astype(np.uint32),
                document_sentences=np.ones(len(part), np.uint32),
            )
        limit = find_heldout_limit(
            paths, {} if dropped is None else {"exact_duplicates": dropped}, fraction, lambda: None
        )
        return np.asarray(hashes, np.uint64) < np.uint64(limit)

    return run


def random_hashes(count):
    return np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)


def test_a_large_corpus_is_split_by_each_document_s_hash_alone(choose):
    hashes = random_hashes(20_000)
    assert (choose(hashes, np.full(20_000, 5000), 0.005) == (hashes < np.uint64(int(0.005 * 2**64)))).all()


def test_a_small_corpus_gives_128_sequences(choose):
    tokens = np.full(3000, 400)
    chosen = choose(random_hashes(3000), tokens, 0.005)
    assert HELDOUT_TOKENS <= tokens[chosen].sum() < HELDOUT_TOKENS + 400


def test_of_a_very_small_one_a_tenth_is_held_out_but_one_document_at_least(choose):
    assert choose(random_hashes(200), np.full(200, 50), 0.005).sum() == 20
    assert choose(random_hashes(3), np.full(3, 50), 0.005).sum() == 1
    assert choose(random_hashes(1), np.full(1, 50), 0.005).sum() == 0


def test_equal_documents_are_never_all_held_out(choose):
    hashes = np.repeat(np.uint64(2**63), 300)
    assert choose(hashes, np.full(300, 5000), 0.005).sum() == 0
    mixed = np.append(hashes, np.uint64(2**62))
    assert choose(mixed, np.full(301, 50), 0.005).tolist() == [False] * 300 + [True]


def test_dropped_documents_do_not_count(choose):
    dropped = np.arange(200) >= 100
    chosen = choose(random_hashes(200), np.full(200, 50), 0.005, dropped)
    assert chosen[:100].sum() == 10


def test_zero_holds_nothing_out(choose):
    assert not choose(random_hashes(100), np.full(100, 50), 0.0).any()


def test_too_little_text_is_said_before_the_work():
    assert "fewer than the 128" in warn_of_small_heldout(100_000, 0.005)
    assert warn_of_small_heldout(100_000, 0.0) is None
    assert warn_of_small_heldout(4_000_000, 0.005) is None
