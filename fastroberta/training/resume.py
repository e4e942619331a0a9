"""Continuing from a checkpoint: what must stay the same, what may change, and where in the data the run goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import (
    STATE,
    get_step,
    list_checkpoints,
    read_state,
    verify_checkpoint,
    verify_directory,
)
from ..cli.arguments import to_dict
from ..config import BatchRampConfig, TrainConfig
from ..corpus.manifest import Manifest
from ..errors import CheckpointError, ConfigurationError
from ..hf import copy_from_huggingface, read_tensors
from ..model import RobertaForMaskedLM
from ..optim import BatchSchedule

# Any run may be continued with other values of these: they change neither the order of the data nor the result of a step,
# beyond the rounding of sums taken in another order.
MAY_CHANGE = (
    "device", "micro_batch_size", "gradient_checkpointing", "torch_compile", "cuda_graph", "logging_steps", "eval_steps",
    "eval_sequences", "save_steps", "save_total_limit", "report_to", "dry_run", "data", "output_dir", "init_from",
    "distill_from", "resize_vocabulary", "resume_from", "sharding", "hang_timeout", "profile", "cpu_offload",
)  # fmt: skip
# These stay also with --resume_from: the shapes of the weights and the order of the data depend on them.
MUST_STAY = ("seed", "data", "max_seq_length", "packing", "model")
DROPOUT = ("model.hidden_dropout_prob", "model.attention_probs_dropout_prob")


class Resumed(NamedTuple):
    """Where a continued run stands.

    Attributes:
        step: of the checkpoint. start: what `BatchSchedule` takes: a step and its first sample.
        note: the settings that differ from those of the checkpoint, in a line; empty if none does.
    """

    step: int
    start: tuple[int, int]
    note: str


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that a run goes on from: the last one in its directory, or else `resume_from`; None for a new run.

    Raises:
        CheckpointError: `resume_from` is no checkpoint of this trainer.
        ConfigurationError: it is one of the run's own.
    """
    own = list_checkpoints(Path(config.output_dir))
    if config.resume_from is None:
        return own[-1] if own else None
    given = Path(config.resume_from)
    if given.resolve().parent == Path(config.output_dir).resolve():
        raise ConfigurationError(f"resume_from: {given} lies in output_dir; give the new run another --output_dir")
    if own:
        return own[-1]
    if not given.is_dir():
        raise CheckpointError(f"{given}: no such directory; give a checkpoint of a run")
    verify_directory(given)
    if not (given / STATE).is_file():
        raise CheckpointError(
            f"{given}: has no {STATE}, so it is not a checkpoint of a run; start from its weights with --init_from"
        )
    return given


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def describe_run(
    step: int, start: tuple[int, int], eval_loss: float | None, manifest: Manifest, num_tokens: int, config: TrainConfig
) -> Any:
    """What `trainer_state.json` says of a run; `load_weights` compares a continued run with it."""
    return {
        "step": step,
        "start": list(start),
        "eval_loss": eval_loss,
        "data": manifest.tokenizer_sha256,
        "train_tokens": num_tokens,
        "config": to_dict(config),
    }


def load_weights(
    checkpoint: Path, model: RobertaForMaskedLM, run: dict[str, Any], config: TrainConfig, is_mixture: bool
) -> Resumed:
    """Copy the weights of a checkpoint into the model, and find where the run goes on.

    Args:
        checkpoint: from `find_checkpoint`. run: this run, from `describe_run`, with the settings in `config`.
        is_mixture: whether its data are several corpora, on whose weights the order depends.
    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigurationError: it was trained with settings that may not change, or on other data.
    """
    verify_checkpoint(checkpoint)
    state = read_state(checkpoint)
    is_own = checkpoint.parent == Path(config.output_dir)
    before, now = flatten(state["config"]), flatten(run["config"])
    step, start = state["step"], tuple(state.get("start", (0, 0)))
    grows = now["max_steps"] > before["max_steps"]
    changes = []
    for name, value in now.items():
        old, group = before.get(name, value), name.split(".")[0]
        if old == value or (group in MAY_CHANGE and not (name == "data" and is_mixture)):
            continue
        is_free = group not in MUST_STAY or name in DROPOUT
        # A run may become longer in place, and its warm-up with it, if that is over.
        is_length = name == "max_steps" or (name == "lr_scheduler.warmup_steps" and max(value, old) <= step)
        if not (grows and is_length if is_own else is_free):
            other = f"--resume_from {checkpoint}" if is_free else f"--init_from {checkpoint}"
            raise ConfigurationError(
                f"{name}: {value!r}, but {checkpoint} was trained with {old!r}; keep that value, or give another "
                f"--output_dir and {other}"
            )
        changes.append(f"{name} {value!r}, was {old!r}")
    if any(state[name] != run[name] for name in ("data", "train_tokens")):
        raise ConfigurationError(
            f"{', '.join(run['config']['data'])}: not the data that {checkpoint} was trained on; give that data, or another "
            "--output_dir"
        )
    if state.get("teacher") != run.get("teacher"):
        raise ConfigurationError(
            f"distill_from: {now['distill_from']!r} is not the teacher that {checkpoint} was trained with "
            f"({before.get('distill_from')!r}, with weights of its own); give that one, or another --output_dir"
        )
    if not is_own:
        if step >= config.max_steps:
            raise ConfigurationError(
                f"max_steps = {config.max_steps}, but {checkpoint} has been trained for {step} already; raise --max_steps"
            )
        batch = {"train_batch_size": state["config"]["train_batch_size"]}
        ramp = BatchRampConfig(**state["config"]["batch_ramp"])
        schedule = BatchSchedule(dataclasses.replace(config, **batch, batch_ramp=ramp), start)
        start = (step, schedule.samples(step).start)
    copy_from_huggingface(read_tensors(checkpoint), dict(model.named_parameters()), model.config, str(checkpoint))
    return Resumed(step, start, f"{checkpoint}: continued with {'; '.join(changes)}" if changes else "")


def advise_on_divergence(config: TrainConfig, step: int) -> str:
    """How to go on after a loss or gradient in `step` that was not finite; the same settings would lead there again."""
    checkpoints = [path for path in list_checkpoints(Path(config.output_dir)) if get_step(path) < step]
    if not checkpoints and config.resume_from is not None:
        checkpoints = [Path(config.resume_from)]
    changes = [f"--optimizer.learning_rate below {config.optimizer.learning_rate:g}"]
    if not config.optimizer.max_grad_norm:
        changes.append("--optimizer.max_grad_norm 1")
    if config.precision != "fp32":
        changes.append("--precision fp32" if config.precision == "bf16" else "--precision bf16")
    advice = "try " + " or ".join(changes)
    if not checkpoints:
        return f"no checkpoint was saved before that step; {advice}, with another --output_dir"
    return (
        f"the last checkpoint before that step is {checkpoints[-1]}; to continue from it, give the same command with "
        f"--resume_from {checkpoints[-1]} and another --output_dir, and {advice}"
    )
