"""`python -m fastroberta.embed CHECKPOINT --file texts.txt --out vectors.npy`: one vector per text.

Texts come from the command line, from a file with one text per line, or from standard input.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .cli.arguments import parse_arguments
from .cli.program import run
from .config import setting
from .errors import ConfigurationError

FORMATS = (".npy", ".parquet", ".jsonl")


@dataclass
class EmbedConfig:
    """Vectors to compute."""

    checkpoint: str = setting(
        help="checkpoint of this trainer, or a Hugging Face RoBERTa directory", positional=True, path="model"
    )
    out: str = setting(help="file to write: .npy (float32), .parquet or .jsonl (text and vector)", path="output")
    texts: list[str] = setting(list, "texts; without any, lines of standard input", positional=True)
    file: str | None = setting(None, "file with one text per line; - for standard input")
    pooling: Literal["mean", "first"] = setting("mean", "mean over all tokens, or the vector of the first token, <s>")
    layer: int = setting(-1, "layer to take: 1 is the first, -1 the last, 0 the embeddings")
    batch_tokens: int = setting(16384, "number of tokens per batch, padding included", valid="[1, inf)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute; auto: on a GPU if there is one")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "precision of the matrix products; auto: the one that this device multiplies fastest in"
    )

    def check(self) -> None:
        """Refuse a file of an unknown kind before any work."""
        if not self.out.endswith(FORMATS):
            raise ConfigurationError(f"out = {self.out}: must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, EmbedConfig, description=__doc__ or "")

    from .hf import longest_sequence
    from .tasks.embedding import embed_texts, keep_layers, write_vectors
    from .tasks.inference import load_encoder
    from .tasks.texts import read_texts

    model, tokenizer = load_encoder(config.checkpoint, config.device, config.precision)
    keep_layers(model, config.layer)
    texts = read_texts(config.texts, config.file)
    started = time.perf_counter()
    vectors, num_truncated = embed_texts(model, tokenizer, texts, config.pooling, config.batch_tokens)
    seconds = time.perf_counter() - started
    write_vectors(config.out, texts, vectors)
    print(f"{config.out}: {len(texts):,} vectors of {vectors.shape[1]}; {len(texts) / seconds:,.0f} texts/s")
    if num_truncated:
        longest = longest_sequence(model.config.max_position_embeddings, model.pad_token_id)
        print(
            f"{num_truncated:,} texts were longer than the model's {longest} tokens and were cut there", file=sys.stderr
        )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
