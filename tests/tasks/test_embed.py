"""Texts as vectors: those of transformers' hidden states, in each format."""

import json

import numpy as np
import pytest
import torch

from fastroberta.embed import main
from fastroberta.errors import ConfigurationError, DataError

TEXTS = ["Anna gives Ben a book.", "Paris", "Ben thanks Anna for the book and the capital of France."]


def embed(checkpoint, path, *arguments):
    assert main([str(checkpoint), *TEXTS, "--out", str(path), "--precision", "fp32", *arguments]) == 0
    return np.load(path)


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_vectors_are_those_of_transformers(checkpoint, tmp_path, layer):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(checkpoint).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    for pooling in ("mean", "first"):
        ours = embed(checkpoint, tmp_path / "v.npy", "--layer", str(layer), "--pooling", pooling)
        assert ours.dtype == np.float32
        for text, vector in zip(TEXTS, ours):
            with torch.no_grad():
                hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][
                    0
                ]
            expected = hidden.mean(dim=0) if pooling == "mean" else hidden[0]
            torch.testing.assert_close(torch.from_numpy(vector), expected, atol=1e-5, rtol=1e-5)


def test_formats_hold_the_same_vectors(checkpoint, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    vectors = embed(checkpoint, tmp_path / "v.npy", "--batch_tokens", "1")
    for suffix in ("jsonl", "parquet"):
        assert main([str(checkpoint), *TEXTS, "--out", str(tmp_path / f"v.{suffix}"), "--precision", "fp32"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    table = parquet.read_table(tmp_path / "v.parquet").to_pylist()
    for rows in (lines, table):
        assert [row["text"] for row in rows] == TEXTS
        np.testing.assert_allclose(np.array([row["vector"] for row in rows]), vectors, atol=1e-5)


def test_texts_of_a_file_in_bf16(checkpoint, tmp_path):
    expected = embed(checkpoint, tmp_path / "v.npy")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = ["--file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "w.npy"), "--precision", "bf16"]
    assert main([str(checkpoint), *arguments]) == 0
    vectors = np.load(tmp_path / "w.npy")
    np.testing.assert_allclose(vectors, expected, atol=0.1)
    assert np.abs(vectors - expected).max() > 1e-4


def test_long_texts_are_cut_and_counted(checkpoint, tmp_path, capsys):
    long = "Anna gives Ben a book. " * 20
    assert main([str(checkpoint), long, "--out", str(tmp_path / "v.npy")]) == 0
    assert "1 texts were longer than the model's 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--out", "v.csv"], ConfigurationError, r"out = v.csv: must end in .npy, .parquet or .jsonl"),
        (["--out", "v.npy", "--layer", "3"], ConfigurationError, "layer = 3: the model has 2 layers"),
        (["--out", "missing/v.npy"], DataError, "missing/v.npy: cannot be written"),
    ],
)
def test_wrong_input_is_refused(checkpoint, tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        main([str(checkpoint), TEXTS[0], *arguments])
