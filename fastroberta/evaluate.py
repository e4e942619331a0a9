"""`python -m fastroberta.evaluate CHECKPOINT --data DIR`: held-out loss, perplexity and accuracy under fixed masks.

CHECKPOINT is a checkpoint of this trainer, or the Hugging Face directory of a RoBERTa, XLM-R, CamemBERT or BERT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .cli.arguments import parse_arguments
from .cli.program import run
from .config import setting

# A checkpoint is scored as it was trained, unless asked for otherwise; these hold where it does not say.
USUAL = {"packing": "full-sentences", "attention_scope": "block", "mlm_probability": 0.15}


@dataclass
class EvaluateConfig:
    """One evaluation."""

    checkpoint: str = setting(
        help="checkpoint of this trainer, or a Hugging Face directory", positional=True, path="model"
    )
    data: list[str] = setting(
        help="directory written by fastroberta.prepare, whose held-out documents are scored; several: --data DIR --data "
        "DIR:0.3, with the weights of training",
        path="data",
    )
    max_seq_length: int | None = setting(
        None, "number of tokens per sequence; null: as in training, or the model's most if unknown", valid="[8, inf)"
    )
    packing: Literal["full-sentences", "doc-sentences", "contiguous"] | None = setting(
        None, "how sequences are filled; null: as in training, or full-sentences if unknown"
    )
    attention_scope: Literal["block", "document"] | None = setting(
        None, "what a token attends to; null: as in training, or block if unknown"
    )
    mlm_probability: float | None = setting(
        None, "fraction of tokens to predict; null: as in training, or 0.15 if unknown", valid="(0, 1)"
    )
    eval_sequences: int = setting(
        1024, "number of held-out sequences, spread evenly over all there are", valid="[1, inf)"
    )
    micro_batch_size: int = setting(16, "number of sequences processed at once", valid="[1, inf)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute; auto: on a GPU if there is one")
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = setting(
        "auto", "precision of the matrix products; auto: as in training, or what the device is fast in if unknown"
    )


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, EvaluateConfig, description=__doc__)
    # After the arguments: importing torch takes a second, and --help should not.
    from .checkpoint import STATE, read_state, verify_directory
    from .corpus.tokenizer import load_tokenizer, tokenizer_hash
    from .data import heldout_batches, load_corpora, masking_arguments, move_ahead, open_split
    from .errors import ConfigurationError
    from .hf import longest_sequence, read_pretrained
    from .parallel.processes import select_device
    from .precision import settle_precision
    from .training.score import evaluate_model

    checkpoint = Path(config.checkpoint)
    verify_directory(checkpoint)
    trained = read_state(checkpoint)["config"] if (checkpoint / STATE).exists() else {}
    pretrained = read_pretrained(checkpoint)
    for note in pretrained.notes:
        print(f"{checkpoint}: {note}", file=sys.stderr)
    model = pretrained.build().eval()
    longest = longest_sequence(model.config.max_position_embeddings, model.pad_token_id)
    settings: dict[str, Any] = {}
    for name, usual in {"max_seq_length": longest, **USUAL}.items():
        given = getattr(config, name)
        settings[name] = trained.get(name, usual) if given is None else given
    corpora = load_corpora(config.data)
    manifest = corpora[0].manifest
    has_tokenizer = (checkpoint / "tokenizer.json").is_file() or (checkpoint / "vocab.json").is_file()
    if has_tokenizer and tokenizer_hash(load_tokenizer(checkpoint)) != manifest.tokenizer_sha256:
        raise ConfigurationError(
            f"{manifest.directory}: was prepared with another tokenizer than that of {checkpoint}; run prepare with "
            f"--tokenizer {checkpoint}"
        )
    assert model.config.vocab_size is not None
    if manifest.vocab_size > model.config.vocab_size:
        raise ConfigurationError(
            f"{manifest.directory}: has a vocabulary of {manifest.vocab_size}, but the model has "
            f"{model.config.vocab_size}; run prepare with the model's tokenizer"
        )
    if settings["max_seq_length"] > longest:
        raise ConfigurationError(
            f"max_seq_length = {settings['max_seq_length']}, but the model has positions for {longest} tokens; lower it"
        )
    device = select_device(config.device)
    model.to(device)
    precision, _ = settle_precision(config.precision, device, trained.get("precision"))
    model.set_precision(precision)
    cut = {name: value for name, value in settings.items() if name != "mlm_probability"}
    blocks = open_split(corpora, "heldout", **cut)
    batches = move_ahead(heldout_batches(blocks, config.eval_sequences, config.micro_batch_size), device)
    scores = evaluate_model(
        model, batches, masking_arguments(manifest, settings["mlm_probability"]), num_corpora=len(corpora)
    )
    by_corpus = {str(corpus.manifest.directory): one.loss for corpus, one in zip(corpora, scores.by_corpus)}
    print(
        json.dumps(
            {
                "eval/loss": scores.loss,
                "eval/perplexity": scores.perplexity,
                "eval/accuracy": scores.accuracy,
                **{f"eval/loss/{name}": loss for name, loss in by_corpus.items()},
                "masked_tokens": scores.num_masked,
                **settings,
                "precision": precision,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
