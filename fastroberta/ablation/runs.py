"""The runs of an ablation: one directory for each variant and seed, trained in sequence, each scored the same way.

OUT/runs/<variant>/seed-1/checkpoint-...    the run, as `train` leaves it
OUT/runs/<variant>/seed-1/task/             its fine-tuning, as `finetune` leaves it
OUT/runs/<variant>/seed-1/result.json       its scores; written last, it completes the run
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import get_path
from ..cli.arguments import from_dict, parse_arguments, to_dict
from ..cli.yaml_settings import PRESETS as TRAIN_PRESETS
from ..config import TrainConfig
from ..corpus.manifest import Manifest, load_manifest
from ..corpus.shards import write_atomically
from ..data import Blocks, heldout_batches, masking_arguments, move_ahead, open_split
from ..errors import ConfigurationError
from ..hf import load_huggingface
from ..log import print_line
from ..parallel.processes import select_device
from ..training.resume import MAY_CHANGE, flatten
from ..training.score import Scores, evaluate_model
from ..training.trainer import Trainer
from .blocks import PairBlocks, PartOfBlocks
from .experiments import BASELINE, BASELINE_SETTINGS, PRESETS, Variant
from .nsp import PairTrainer, score_pairs
from .settings import AblateConfig

RESULT = "result.json"
SHOWN_SEQUENCES = 64  # scored by the trainer itself, to show how it goes
# From a run's directory, its checkpoint and the preset's settings for fine-tuning: name, metric and score of the task.
ScoreTask = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]


class Ablation:
    """Data, model and budget that all variants share.

    Raises:
        ConfigurationError, DataError: a setting, the preset or the data cannot be used.
    """

    def __init__(self, config: AblateConfig):
        self.config, self.out = config, Path(config.out)
        self.device = select_device(config.device)
        self.preset = config.preset or ("small" if self.device.type == "cpu" else "paper")
        settings, self.task_settings = PRESETS.get(self.preset, ({}, {}))
        if self.preset not in PRESETS:
            if self.preset not in TRAIN_PRESETS and not Path(self.preset).is_file():
                known = ", ".join([*PRESETS, *TRAIN_PRESETS])
                raise ConfigurationError(f"preset = {self.preset}: no such file, and the presets are {known}")
            given = parse_arguments(["--config", self.preset], TrainConfig, description="", default_preset="quickstart")
            settings = to_dict(given)
        self.base = from_dict(TrainConfig, {**settings, **BASELINE_SETTINGS})
        self.base.data, self.base.device = [config.data], config.device
        self.manifest: Manifest = load_manifest(config.data)
        self.heldout = self._open("heldout", self.base)
        self.tokens_per_sequence = self.count_tokens(self.base, BASELINE)

    def _open(self, split: str, train: TrainConfig, make_blocks: Callable[..., Blocks] = Blocks) -> Blocks:
        return open_split(
            self.manifest,
            split,
            max_seq_length=train.max_seq_length,
            packing=train.packing,
            attention_scope=train.attention_scope,
            make_blocks=make_blocks,
        )

    def count_tokens(self, train: TrainConfig, variant: Variant) -> float:
        """The mean number of tokens in a training sequence, special ones included, padding not."""
        blocks = self._open("train", train, self.choose_blocks(variant, train.seed))
        return blocks.num_tokens / len(blocks)

    def configure(self, variant: Variant, seed: int) -> TrainConfig:
        """The settings with which `Trainer` trains a variant."""
        train: TrainConfig = copy.deepcopy(self.base)
        for name, value in variant.settings.items():
            setattr(train, name, value)
        train.seed, train.output_dir = seed, str(self.directory(variant, seed))
        train.eval_sequences = min(SHOWN_SEQUENCES, train.eval_sequences)
        factor = variant.batch_factor
        train.train_batch_size *= factor
        train.max_steps = max(1, train.max_steps // factor)
        train.lr_scheduler.warmup_steps //= factor
        train.optimizer.learning_rate *= variant.rate_factor
        if variant.keeps_tokens:
            growth = self.tokens_per_sequence / self.count_tokens(train, variant)
            train.train_batch_size = _round(train.train_batch_size * growth)
        train.eval_steps = train.max_steps
        return from_dict(TrainConfig, to_dict(train))  # once more, to check what has changed

    def choose_blocks(self, variant: Variant, seed: int) -> Callable[..., Blocks]:
        """What makes the training data of a variant."""
        if variant.pairs is not None:
            return functools.partial(PairBlocks, unit=variant.pairs, seed=seed)
        return functools.partial(PartOfBlocks, parts=variant.parts) if variant.parts > 1 else Blocks

    def _note_settings(self, train: TrainConfig) -> dict[str, Any]:
        """A run's settings, with the number of sequences on which its result rests."""
        return {**to_dict(train), "eval_sequences": self.base.eval_sequences}

    def directory(self, variant: Variant, seed: int) -> Path:
        """Where a variant is trained."""
        return self.out / "runs" / variant.name / f"seed-{seed}"

    def read_result(self, variant: Variant, seed: int) -> dict[str, Any] | None:
        """The result of a finished run; None if there is none.

        Raises:
            ConfigurationError: it was trained with other settings.
        """
        path = self.directory(variant, seed) / RESULT
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before, now = flatten(result["settings"]), flatten(self._note_settings(self.configure(variant, seed)))
        settled = {"precision", "model.vocab_size"}  # by the device and the data
        for name, value in now.items():
            matters = (name.split(".")[0] not in MAY_CHANGE and name not in settled) or name == "eval_sequences"
            if matters and before.get(name) != value:
                raise ConfigurationError(
                    f"out: {path.parent} holds a run with {name} = {before.get(name)}, not {value}; give another --out"
                )
        if result["data"] != self.manifest.contents["sha256"]:
            raise ConfigurationError(f"out: {path.parent} holds a run on other data; give another --out")
        return result

    def run(self, variant: Variant, seed: int, score_task: ScoreTask | None) -> dict[str, Any]:
        """Train and score a variant; what is already there is not done again."""
        result = self.read_result(variant, seed)
        directory = self.directory(variant, seed)
        if result is None:
            print_line(f"\n{variant.name}, seed {seed}: {directory}")
            result = self._train(variant, seed)
            _write(directory / RESULT, result)
        if score_task is not None and "task" not in result:
            checkpoint = get_path(directory, result["settings"]["max_steps"])
            result["task"] = score_task(directory / "task", checkpoint, self.task_settings)
            _write(directory / RESULT, result)
        return result

    def _train(self, variant: Variant, seed: int) -> dict[str, Any]:
        config = self.configure(variant, seed)
        trainer_class = PairTrainer if variant.pairs else Trainer
        make_blocks = self.choose_blocks(variant, seed)
        trainer = trainer_class(config, make_blocks=make_blocks)
        trainer.train()
        sequences = trainer.batches.num_sequences_until(config.max_steps)
        scores = self._score(
            get_path(Path(config.output_dir), config.max_steps), trainer.batches.size, config.precision
        )
        result: dict[str, Any] = {
            "variant": variant.name,
            "seed": seed,
            "data": self.manifest.contents["sha256"],
            "settings": self._note_settings(config),
            "tokens": round(sequences * trainer.blocks.num_tokens / len(trainer.blocks)),
            "passes": sequences / len(trainer.blocks),
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "accuracy": scores.accuracy,
            "masked_tokens": scores.num_masked,
        }
        if isinstance(trainer, PairTrainer):
            pairs = self._open("heldout", config, make_blocks)
            assert isinstance(pairs, PairBlocks)
            number = self.base.eval_sequences
            result["nsp_accuracy"] = score_pairs(trainer.model, pairs, number, trainer.batches.size)
        return result

    def _score(self, checkpoint: Path, batch_size: int, precision: str) -> Scores:
        """A checkpoint's scores on the baseline's held-out sequences, under the same masks for all variants."""
        model = load_huggingface(checkpoint).to(self.device)
        model.set_precision(precision)
        batches = move_ahead(heldout_batches(self.heldout, self.base.eval_sequences, batch_size), self.device)
        return evaluate_model(model, batches, masking_arguments(self.manifest, self.base.mlm_probability))


def list_runs(variants: Sequence[Variant], config: AblateConfig) -> list[tuple[Variant, int]]:
    """Variants and seeds to run, each once: all of the first seed, then all of the next; the baseline first."""
    names = {variant.name: variant for variant in [BASELINE, *variants] if variant in variants}
    return [(variant, seed) for seed in range(config.seed, config.seed + config.seeds) for variant in names.values()]


def _round(batch: float) -> int:
    """To the nearest multiple of a power of two, within 3%: a prime number of sequences cannot be divided."""
    unit = 2 ** max(0, int(batch).bit_length() - 5)
    return max(1, round(batch / unit) * unit)


def _write(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
