"""What people read about a run: its description, its progress, its result."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from tokenizers import Tokenizer

from ..cli.arguments import to_dict
from ..config import TrainConfig
from ..costs import num_parameters
from ..data import Blocks, Corpus
from ..log import MetricsWriter, Progress, format_seconds, print_line
from ..model import RobertaForMaskedLM
from ..parallel.processes import Processes
from .meter import Meter
from .run_settings import write_run_settings
from .score import Scores


class RunLog:
    """The metrics of a run. All processes measure; the first one writes and shows. Use as a context manager.

    Args:
        step: after which the run begins or continues.
    """

    def __init__(self, config: TrainConfig, processes: Processes, meter: Meter, step: int):
        self.meter = meter
        self._is_writing, self._is_on_gpu = processes.is_first, processes.device.type == "cuda"
        self._config, self._step = config, step
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunLog:
        if self._is_writing:
            config = self._config
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            write_run_settings(config, self._step)
            writer = MetricsWriter(
                config.output_dir,
                resumed_step=self._step or None,
                report_to=config.report_to,
                settings=to_dict(config),
            )
            self._writer = self._stack.enter_context(writer)
            self._progress = self._stack.enter_context(Progress(config.max_steps, self._step))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write_training(self, step: int) -> None:
        """Write and show the training metrics since the last time."""
        metrics = self.meter.read(step)
        if self._is_writing:
            self._writer.write(step, metrics)
            # The peak of a CPU is measured, and comes out too low on a busy machine: MFU could exceed 100%.
            shown = {name: value for name, value in metrics.items() if self._is_on_gpu or name != "throughput/mfu"}
            if self.meter.warmed_up is not None:
                self._progress.leave_out(self._step + 1, self.meter.warmed_up)
            self._progress.update(step, shown)

    def write_scores(self, step: int, scores: Scores, corpora: Sequence[Corpus]) -> None:
        """Write and show held-out scores, over all corpora and, if there are several, of each."""
        if self._is_writing:
            metrics = {"eval/loss": scores.loss, "eval/accuracy": scores.accuracy, "eval/perplexity": scores.perplexity}
            parts = {str(corpus.manifest.directory): one.loss for corpus, one in zip(corpora, scores.by_corpus)}
            self._writer.write(step, metrics | {f"eval/loss/{name}": loss for name, loss in parts.items()})
            note = ", ".join(f"{name} {loss:.4f}" for name, loss in parts.items())
            self._progress.print(
                f"step {step}: held-out loss {scores.loss:.4f}, accuracy {scores.accuracy:.1%}"
                + f" ({note})" * bool(note)
            )


def say(processes: Processes, text: str, file: TextIO | None = None) -> None:
    """Print a line, in the first process only."""
    if processes.is_first:
        print_line(text, file)


def describe_model(config: TrainConfig, processes: Processes, blocks: Blocks, micro_batch_size: int) -> str:
    """One line on the model, its data and its steps."""
    return (
        f"{num_parameters(config.model):,} parameters, vocabulary {config.model.vocab_size:,}, {config.precision} on "
        f"{processes.device}; {blocks.num_tokens:,} tokens in {len(blocks):,} sequences of "
        f"{config.max_seq_length}; {config.max_steps:,} steps of {config.train_batch_size:,} sequences, "
        f"{micro_batch_size} at once" + (f" on each of {processes.size}" if processes.size > 1 else "")
    )


def describe_data(corpora: Sequence[Corpus], blocks: Blocks, num_samples: int) -> list[str]:
    """Lines on the directories that a run reads, and on how often it sees each of several."""
    lines = [f"{', '.join(str(corpus.manifest.directory) for corpus in corpora)}: {blocks.describe_verified()}"]
    if len(corpora) > 1:
        epochs = blocks.count_epochs(num_samples)
        lines += [
            f"  {manifest.directory}, weight {weight:g}: {size:,} sequences, {count:.2f} epochs in all"
            for (manifest, weight), size, count in zip(corpora, blocks.corpus_sizes, epochs)
        ]
    return lines


def describe_result(
    seconds: float, before: Scores | None, after: Scores, entropy: float, sentences: list[str], checkpoint: Path
) -> str:
    """The result of a run: scores before and after it, and sentences with a token filled in."""
    lines = [f"\ntrained in {format_seconds(seconds)}; held-out unigram entropy {entropy:.3f} nats"]
    for name, scores in (("before:", before), ("after:", after)):
        if scores is not None:
            lines.append(f"  {name:8} held-out loss {scores.loss:.3f} nats, accuracy {scores.accuracy:.1%}")
    lines.append("one token of a held-out sentence masked and filled in:")
    lines += [f"  {sentence}" for sentence in sentences]
    return "\n".join([*lines, f"checkpoint: {checkpoint}"])


@torch.no_grad()
def fill_in(
    model: RobertaForMaskedLM, heldout: Blocks, tokenizer: Tokenizer, special_ids: dict[str, int], count: int
) -> list[str]:
    """Held-out sentences with one token masked: what the model predicts, and what was written."""
    model.eval()
    lines = []
    found = heldout.sentences(8 * count, at_least=12, at_most=min(48, heldout.block_size - 2))
    prose = [tokens for tokens in found if _is_prose(tokenizer.decode(tokens))] or found
    for sentence in prose[:: max(1, len(prose) // count)][:count]:
        tokens = [special_ids["bos_token_id"], *sentence, special_ids["eos_token_id"]]
        place = len(tokens) // 2
        original, tokens[place] = tokens[place], special_ids["mask_token_id"]
        logits = model(torch.tensor([tokens], device=next(model.parameters()).device))[0, place]
        logits[list(set(special_ids.values()))] = -torch.inf
        before, filled, was, after = (
            tokenizer.decode(part)
            for part in (tokens[1:place], [int(logits.argmax())], [original], tokens[place + 1 : -1])
        )
        verdict = "as written" if filled == was else f"was {was!r}"
        text = f"{before.lstrip()}[{filled}]{after.rstrip()}".replace("\n", "\\n")
        lines.append(f"{text}  ({verdict})")
    model.train()
    return lines


def _is_prose(text: str) -> bool:
    return sum(character.isalpha() for character in text) > 0.75 * len(text.strip())
