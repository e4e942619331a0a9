"""Models of transformers, with the head that their config.json names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from ..checkpoint import verify_directory
from ..corpus.tokenizer import load_tokenizer
from ..errors import CheckpointError, ConfigurationError
from ..hf import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# End of a class name of transformers -> what people call it.
HEADS = {
    "MaskedLM": "masked LM",
    "SequenceClassification": "sequence classification",
    "TokenClassification": "token classification",
    "QuestionAnswering": "question answering",
    "MultipleChoice": "multiple choice",
}


def load_with_head(
    directory: Path, *, heads: Sequence[str], extra: str, attention: str = "sdpa"
) -> tuple[PreTrainedModel, str, Tokenizer]:
    """A model in fp32 and eval mode on the CPU, its head (a key of `HEADS`), and its tokenizer.

    Args:
        directory: checkpoint of this trainer, or what `save_pretrained` of a model with a head wrote.
        heads: those that the caller can use. extra: of this package, which brings transformers.
        attention: transformers' implementation; only "eager" returns attention weights.
    Raises:
        CheckpointError: no model that transformers loads, another head, or a head without weights.
        ConfigurationError: no tokenizer, or transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(f"this needs transformers; pip install 'fastroberta[{extra}]'") from error
    verify_directory(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: has no config.json; give the directory of a checkpoint")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        name = (config.architectures or ["none"])[0]
        head = next((head for head in heads if name.endswith(f"For{head}")), None)
        if config.model_type not in FAMILIES:
            raise CheckpointError(
                f"{directory}/config.json: model_type is {config.model_type}; this works for {', '.join(FAMILIES)}"
            )
        if head is None:
            known = ", ".join(HEADS[head] for head in heads)
            raise CheckpointError(f"{directory}/config.json: its architecture is {name}; this works for {known}")
        model, loading = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            directory,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{directory}: transformers cannot load it ({reason}); give another") from error
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"{directory}: {name} has no weights for {', '.join(missing)}; train it first")
    return model.eval(), head, load_tokenizer(directory)
