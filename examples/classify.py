"""Classify texts with an ONNX file that fastroberta.export wrote; needs onnxruntime, tokenizers and numpy.

python examples/classify.py DIRECTORY TEXT...
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

directory, texts = Path(sys.argv[1]), sys.argv[2:]
tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
labels = json.loads((directory / "config.json").read_text())["id2label"]
session = onnxruntime.InferenceSession(directory / "model.onnx")

encoded = [tokenizer.encode(text).ids for text in texts]
input_ids = np.full((len(texts), max(map(len, encoded))), tokenizer.token_to_id("<pad>"), dtype=np.int64)
attention_mask = np.zeros_like(input_ids)
for row, ids in enumerate(encoded):
    input_ids[row, : len(ids)] = ids
    attention_mask[row, : len(ids)] = 1
(logits,) = session.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
shares = np.exp(logits - logits.max(1, keepdims=True))
shares /= shares.sum(1, keepdims=True)
for text, row in zip(texts, shares):
    print(f"{labels[str(row.argmax())]}  {row.max():.1%}  {text}")
