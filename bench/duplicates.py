"""Near duplicates: how many of known pairs are found, by `fastroberta.prepare`, datasketch and datatrove.

Each pair is of two texts of random words with a common beginning, so long that the Jaccard similarity of their shingles
of five words is a given number. All texts are judged at once. Above the threshold the share found is the recall; below
it, and among texts without a counterpart, what is found is false. Ours compares whole signatures after a band was
equal; datasketch's index is asked as its documentation shows; datatrove takes every equal bucket for a duplicate and
has 14 buckets of 8 hashes, its defaults, whatever the threshold. It splits words with spacy, and is absent without.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

SIMILARITIES = (0.95, 0.85, 0.75, 0.5)
SHINGLE_WORDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench duplicates", description=__doc__)
    parser.add_argument("--pairs", type=int, default=500, help="of each similarity (default 500)")
    parser.add_argument("--threshold", type=float, default=0.8, help="of a near duplicate (default 0.8)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    texts = list(make_texts(arguments.pairs, random.Random(arguments.seed)))
    print(f"{len(texts):,} texts, {arguments.pairs} pairs of each similarity, threshold {arguments.threshold}")
    print(f"{'':<14}" + "".join(f"{similarity:>9}" for similarity in SIMILARITIES) + f"{'none':>9}{'texts/s':>10}")
    finders: dict[str, Callable[[list[str], float], np.ndarray]] = {
        "fastroberta": find_ours, "datasketch": find_datasketch, "datatrove": find_datatrove,
    }  # fmt: skip
    for name, find in finders.items():
        start = time.perf_counter()
        try:
            found = find(texts, arguments.threshold)
        except ImportError as error:
            print(f"{name:<14}absent: {' '.join(str(error).split())[:80]}")
            continue
        seconds = time.perf_counter() - start
        # The second halves of the pairs come last, in the order of SIMILARITIES.
        shares = found[-len(SIMILARITIES) * arguments.pairs :].reshape(len(SIMILARITIES), -1).mean(axis=1)
        alone = found[: -len(SIMILARITIES) * arguments.pairs].mean()
        print(
            f"{name:<14}" + "".join(f"{share:>9.1%}" for share in (*shares, alone)) + f"{len(texts) / seconds:>10,.0f}"
        )
    return 0


def make_texts(pairs: int, draw: random.Random) -> Iterator[str]:
    """First halves of all pairs and as many texts without a counterpart, then the second halves."""
    digits = str.maketrans("0123456789", "abcdefghij")  # datatrove takes all numbers for equal
    vocabulary = [f"{number:05}".translate(digits) for number in range(20_000)]
    count = 400  # shingles of a text
    seconds = []
    for similarity in SIMILARITIES:
        shared = round(2 * count * similarity / (1 + similarity))
        for _ in range(pairs):
            first = draw.choices(vocabulary, k=count + SHINGLE_WORDS - 1)
            common = first[: shared + SHINGLE_WORDS - 1]
            seconds.append(" ".join([*common, *draw.choices(vocabulary, k=count - shared)]))
            yield " ".join(first)
            yield " ".join(draw.choices(vocabulary, k=count + SHINGLE_WORDS - 1))
    yield from seconds


def find_ours(texts: list[str], threshold: float) -> np.ndarray:
    """Flags of the texts that resemble an earlier one: bool, (len(texts),)."""
    from fastroberta.corpus.deduplicate import Signer, find_near_duplicates

    signer = Signer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "signatures")
        np.stack([signer.sign(text) for text in texts]).tofile(path)
        return find_near_duplicates(path, len(texts), threshold)


def find_datasketch(texts: list[str], threshold: float) -> np.ndarray:
    """The same by its MinHash and MinHashLSH with 128 permutations."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=128)
    found = np.zeros(len(texts), dtype=bool)
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=128, seed=1)
        sketch.update_batch([shingle.encode() for shingle in list_shingles(text.split())])
        found[number] = bool(index.query(sketch))
        if not found[number]:
            index.insert(number, sketch)
    return found


def find_datatrove(texts: list[str], threshold: float) -> np.ndarray:
    """The same by the signatures of its first stage; an equal bucket is a duplicate, as in its second."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(n_grams=SHINGLE_WORDS, hash_config=HashConfig(hash_fc="sha1"))  # its xxhash needs an old one

    with tempfile.TemporaryDirectory() as folder:
        signer = MinhashDedupSignature(folder, config)
        seen: set[tuple[int, ...]] = set()
        found = np.zeros(len(texts), dtype=bool)
        for number, text in enumerate(texts):
            signature = signer.get_signature(signer.get_shingles(text))
            keys = {(bucket, *hashes) for bucket, hashes in enumerate(signature)}
            found[number] = not seen.isdisjoint(keys)
            seen |= keys
    return found


def list_shingles(words: Sequence[str]) -> set[str]:
    return {" ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1)}


if __name__ == "__main__":
    sys.exit(main())
