"""Continuing a run from its last checkpoint: what must be the same, and what may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import get_step, list_checkpoints, read_state, verify_checkpoint
from ..cli.arguments import to_dict
from ..config import TrainConfig
from ..corpus.manifest import Manifest
from ..errors import ConfigurationError
from ..hf import copy_from_huggingface, read_tensors
from ..model import RobertaForMaskedLM

# A run may be continued with other values of these: they change neither the order of the data nor the result of a step,
# beyond the rounding of sums taken in another order.
MAY_CHANGE = (
    "device", "micro_batch_size", "gradient_checkpointing", "torch_compile", "cuda_graph", "logging_steps", "eval_steps",
    "eval_sequences", "save_steps", "save_total_limit", "tensorboard", "dry_run", "data", "output_dir", "init_from",
    "sharding", "hang_timeout",
)  # fmt: skip


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def describe_run(step: int, eval_loss: float | None, manifest: Manifest, num_tokens: int, config: TrainConfig) -> Any:
    """What `trainer_state.json` says of a run; `load_weights` holds a continued run against it."""
    return {
        "step": step,
        "eval_loss": eval_loss,
        "data": manifest.tokenizer_sha256,
        "train_tokens": num_tokens,
        "config": to_dict(config),
    }


def load_weights(checkpoint: Path, model: RobertaForMaskedLM, run: dict[str, Any], is_mixture: bool) -> int:
    """Copy the weights of an earlier checkpoint of the same run into the model, and return the checkpoint's step.

    Args:
        run: this run, from `describe_run`. is_mixture: whether its data are several corpora.
    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigurationError: it belongs to a run with other settings or other data.
    """
    verify_checkpoint(checkpoint)
    state = read_state(checkpoint)
    before, now = flatten(state["config"]), flatten(run["config"])
    for name, value in now.items():
        # Several corpora have weights, on which the order depends.
        may_change = name.split(".")[0] in MAY_CHANGE and not (name == "data" and is_mixture)
        if not may_change and before.get(name, value) != value:
            raise ConfigurationError(
                f"{name}: {value!r}, but {checkpoint} was trained with {before[name]!r}; keep that value, or give another "
                "--output_dir"
            )
    if any(state[name] != run[name] for name in ("data", "train_tokens")):
        raise ConfigurationError(
            f"{now['data']}: not the data that {checkpoint} was trained on; give that data, or another --output_dir"
        )
    path = checkpoint / "model.safetensors"
    copy_from_huggingface(read_tensors(path), dict(model.named_parameters()), model.config, str(path))
    return state["step"]


def advise_on_divergence(config: TrainConfig, step: int) -> str:
    """How to go on after a loss or gradient in `step` that was not finite; the same settings would lead there again."""
    checkpoints = [path for path in list_checkpoints(Path(config.output_dir)) if get_step(path) < step]
    changes = [f"--optimizer.learning_rate below {config.optimizer.learning_rate:g}"]
    if not config.optimizer.max_grad_norm:
        changes.append("--optimizer.max_grad_norm 1")
    if config.precision != "fp32":
        changes.append("--precision fp32" if config.precision == "bf16" else "--precision bf16")
    advice = "try " + " or ".join(changes)
    if not checkpoints:
        return f"no checkpoint was saved before that step; {advice}, with another --output_dir"
    return (
        f"the last checkpoint before that step is {checkpoints[-1]}; {advice}, in a new run that starts from its weights: "
        f"--init_from {checkpoints[-1]} with another --output_dir"
    )
