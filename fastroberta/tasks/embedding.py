"""Texts as vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..errors import ConfigurationError, DataError
from ..model import RobertaForMaskedLM
from .inference import batch_by_length, pool_batch


def keep_layers(model: RobertaForMaskedLM, layer: int) -> None:
    """Cut the model off behind a layer: 1 is the first, -1 the last, 0 keeps the embeddings only.

    Raises:
        ConfigurationError: there is no such layer.
    """
    count = len(model.layer)
    if not -count - 1 <= layer <= count:
        raise ConfigurationError(
            f"layer = {layer}: the model has {count} layers; give 0 to {count}, or -1 for the last"
        )
    model.layer = model.layer[: layer if layer >= 0 else count + 1 + layer]


def embed_texts(
    model: RobertaForMaskedLM, tokenizer: Tokenizer, texts: list[str], pooling: str, batch_tokens: int
) -> tuple[np.ndarray, int]:
    """Vectors of all texts, fp32 (texts, hidden_size), and how many texts were longer than the model takes.

    Args:
        pooling: `mean` over a text's tokens, or its `first`. batch_tokens: of a batch at most, padding included.
    """
    encodings = tokenizer.encode_batch_fast(texts)
    sequences = [encoding.ids for encoding in encodings]
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for batch in batch_by_length(sequences, batch_tokens):
        vectors[batch] = pool_batch(model, [sequences[index] for index in batch], pooling).numpy()
    return vectors, sum(bool(encoding.overflowing) for encoding in encodings)


def write_vectors(path: str, texts: list[str], vectors: np.ndarray) -> None:
    """Write vectors, in .jsonl and .parquet beside their texts.

    Raises:
        DataError: the file cannot be written. ConfigurationError: pyarrow is missing.
    """
    try:
        if path.endswith(".npy"):
            with Path(path).open("wb") as file:
                np.save(file, vectors)
        elif path.endswith(".jsonl"):
            with Path(path).open("w", encoding="utf-8") as lines:
                for text, vector in zip(texts, vectors):
                    lines.write(json.dumps({"text": text, "vector": vector.tolist()}, ensure_ascii=False) + "\n")
        else:
            try:
                import pyarrow
                from pyarrow import parquet
            except ImportError as error:
                raise ConfigurationError(f"{path}: parquet needs pyarrow; pip install 'fastroberta[data]'") from error
            flat = pyarrow.array(vectors.reshape(-1))
            column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            parquet.write_table(pyarrow.table({"text": texts, "vector": column}), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); give another --out") from error
