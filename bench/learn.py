"""Held-out loss against tokens and against time: our trainer beside transformers' Trainer.

Both start from the same weights, which `save_huggingface` writes and `AutoModelForMaskedLM` loads, and follow the same
recipe (AdamW, schedule, dropout, precision) on the same blocks in the same order. They differ in which tokens they mask
and drop: we mask exactly 15% of a sequence, `DataCollatorForLanguageModeling` draws each token independently.

The two run in processes of their own and take turns, a segment of steps each. A clock counts only its own segments, so
other work on the machine slows both alike. After each segment the same code scores both models, outside the clock, on
the same held-out blocks under the same masks. The Trainer gets the faster of eager and sdpa attention, measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastroberta.config import LRSchedulerConfig, ModelConfig, OptimizerConfig, TrainConfig
from fastroberta.corpus.manifest import load_manifest
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.data import heldout_batches, masking_arguments, move_ahead, open_split, training_batches
from fastroberta.hf import copy_from_huggingface, save_huggingface
from fastroberta.model import COMPUTE_DTYPES, RobertaForMaskedLM
from fastroberta.optim import learning_rate
from fastroberta.parallel.processes import keep_freed_memory
from fastroberta.precision import settle_precision
from fastroberta.training.score import evaluate_model
from fastroberta.training.trainer import Trainer

from .record import Run, default_path, read_lines
from .report import OURS, colour_of, title_of
from .train import prepare_python_texts
from .trainers import MLM_PROBABILITY, Worker

ATTENTIONS = {f"transformers Trainer, {name}": name for name in ("eager", "sdpa")}
POINTS = 16  # segments of a run, after each of which the loss is taken
PROBE_STEPS = 8  # of a segment whose time tells how many steps fit


class Plan(NamedTuple):
    """What both train: sizes, recipe and length of a run."""

    data: str  # prepared directory
    precision: str
    seed: int = 1
    steps: int = 0
    layers: int = 6
    hidden: int = 384
    heads: int = 6
    length: int = 128
    sequences: int = 8  # of a step
    heldout: int = 256  # sequences that are scored
    learning_rate: float = 1e-3
    dropout: float = 0.1
    every: int = 0  # steps of a segment

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.length


class Point(NamedTuple):
    """Where a run stands after a segment."""

    step: int
    seconds: float  # of training
    processor_seconds: float
    loss: float  # held-out, nats per masked token
    accuracy: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench learn", description=__doc__)
    parser.add_argument("--data", help="directory written by fastroberta.prepare; without: the texts inside Python")
    parser.add_argument("--minutes", type=float, default=35, help="for all seeds together; default: 35")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trainer; default: 3")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps and one seed")
    parser.add_argument("--out", type=Path, help="file of JSON lines; the chart gets its name, ending in .png")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = default_path(device)
    path = arguments.out or default.with_name(f"{default.stem}-learn.jsonl")
    precision, reason = settle_precision("auto", device)
    print(f"precision {precision}: {reason}")
    plan = Plan(arguments.data or prepare_python_texts(), precision)
    if arguments.quick:
        ways = (OURS, next(iter(ATTENTIONS)))
        plan = plan._replace(layers=1, hidden=64, heads=2, length=32, sequences=4, heldout=8, steps=4, every=2)
    else:
        theirs, plan = choose_steps(plan, arguments.seeds, end)
        ways = (OURS, theirs)
    run = Run("learn", path, device, plan._asdict() | {"data": Path(plan.data).name})
    lines = []
    for seed in range(1, 2 if arguments.quick else arguments.seeds + 1):
        for way, point in train_in_turn(ways, plan._replace(seed=seed)):
            values = point._asdict() | {"tokens": point.step * plan.tokens}
            lines.append(run.add("learn", implementation=way, seed=seed, **values))
            print(
                f"seed {seed}, {way:28} step {point.step:6,}, {values['tokens']:10,} tokens, {point.seconds:7.1f} s: "
                f"loss {point.loss:.4f}",
                flush=True,
            )
    print("\n".join(describe(lines)))
    machine = next(line for line in read_lines(path) if line["run"] == run.id)
    chart = draw(path, machine, plan, lines, open_blocks(plan, "heldout").unigram_entropy())
    print(f"results: {path}; chart: {chart}")
    return 0


def choose_steps(plan: Plan, seeds: int, end: float) -> tuple[str, Plan]:
    """The faster of the Trainer's attentions, and as many steps as fit into the time until `end`."""
    probe = plan._replace(steps=2 * PROBE_STEPS, every=PROBE_STEPS)
    points: dict[str, list[tuple[float, Point]]] = {}
    before = time.monotonic()
    for way, point in train_in_turn((OURS, *ATTENTIONS), probe):
        now = time.monotonic()
        points.setdefault(way, []).append((now - before, point))
        before = now
    starting = sum(found[0][0] for found in points.values())
    # Of the last segment: in the first one memory is new, and kernels are built.
    training = {way: found[2][1].seconds - found[1][1].seconds for way, found in points.items()}
    scoring = {way: found[2][0] - training[way] for way, found in points.items()}
    print(", ".join(f"{way}: {1e3 * one / PROBE_STEPS:.0f} ms a step" for way, one in training.items()))
    theirs = min(ATTENTIONS, key=lambda way: training[way])
    available = (end - before) / seeds - starting - (POINTS + 1) * (scoring[OURS] + scoring[theirs])
    every = max(1, int(available / (training[OURS] + training[theirs]) * PROBE_STEPS / POINTS))
    return theirs, plan._replace(steps=every * POINTS, every=every)


def train_in_turn(ways: Sequence[str], plan: Plan) -> Iterator[tuple[str, Point]]:
    """Train each way in a process of its own, a segment at a time.

    Yields:
        A way and where it stands: first as it begins, then after each of its segments.
    Raises:
        Failure: a process could not train.
    """
    with contextlib.ExitStack() as stack:
        workers = {way: stack.enter_context(Worker(way, work, plan)) for way in ways}
        for turn in range(plan.steps // plan.every + 1):
            for way, worker in workers.items():
                yield way, worker.ask("segment") if turn else worker.hear()


def work(connection: Connection, way: str, plan: Plan) -> None:
    """What the process of a way does."""
    torch.manual_seed(plan.seed)
    try:
        if way == OURS:
            train_ours(connection, plan)
        else:
            train_theirs(connection, plan, ATTENTIONS[way])
    except Exception as error:
        connection.send(("failed", f"{way}: {error}\n{traceback.format_exc()}"))


class Segments:
    """Interrupts a training loop after every segment: stops its clock, sends where it stands, and waits to go on.

    Args:
        score: returns held-out loss and accuracy.
    """

    def __init__(self, connection: Connection, plan: Plan, score: Callable[[], tuple[float, float]]):
        self._connection, self._plan, self._score = connection, plan, score
        self._step, self._seconds, self._processor_seconds = 0, 0.0, 0.0
        self._started = (0.0, 0.0)

    def begin(self) -> None:
        """Before the first step."""
        self._send_and_wait()

    def after_step(self) -> None:
        self._step += 1
        if self._step % self._plan.every == 0:
            now = self._read_clocks()
            self._seconds += now[0] - self._started[0]
            self._processor_seconds += now[1] - self._started[1]
            self._send_and_wait()

    def _send_and_wait(self) -> None:
        point = Point(self._step, self._seconds, self._processor_seconds, *self._score())
        self._connection.send(("done", point))
        if self._step < self._plan.steps:
            self._connection.recv()
            self._started = self._read_clocks()

    def _read_clocks(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def build_config(plan: Plan, output_dir: str) -> TrainConfig:
    """The settings of our trainer, and the one place where the recipe of both stands."""
    model = ModelConfig(
        hidden_size=plan.hidden, num_hidden_layers=plan.layers, num_attention_heads=plan.heads,
        intermediate_size=4 * plan.hidden, max_position_embeddings=plan.length + 2,
        hidden_dropout_prob=plan.dropout, attention_probs_dropout_prob=plan.dropout,
    )  # fmt: skip
    return TrainConfig(
        data=[plan.data], output_dir=output_dir, seed=plan.seed, precision=plan.precision, max_seq_length=plan.length,
        packing="contiguous", mlm_probability=MLM_PROBABILITY, train_batch_size=plan.sequences, max_steps=plan.steps,
        model=model, optimizer=OptimizerConfig(learning_rate=plan.learning_rate),
        lr_scheduler=LRSchedulerConfig(warmup_steps=plan.steps // 10),
    )  # fmt: skip


def open_blocks(plan: Plan, split: str) -> Any:
    return open_split(
        load_manifest(plan.data), split, max_seq_length=plan.length, packing="contiguous", attention_scope="block"
    )


def score_model(model: RobertaForMaskedLM, plan: Plan) -> tuple[float, float]:
    """Held-out loss and accuracy, under the same masks every time."""
    batches = heldout_batches(open_blocks(plan, "heldout"), plan.heldout, min(plan.heldout, 32))
    device = next(model.parameters()).device
    scores = evaluate_model(
        model, move_ahead(batches, device), masking_arguments(load_manifest(plan.data), MLM_PROBABILITY)
    )
    return scores.loss, scores.accuracy


def train_ours(connection: Connection, plan: Plan) -> None:
    """Train with our trainer's own step."""
    with tempfile.TemporaryDirectory() as folder:
        if not torch.cuda.is_available():
            keep_freed_memory()  # as `fastroberta.train` does
        trainer = Trainer(build_config(plan, folder))
        segments = Segments(connection, plan, lambda: score_model(trainer.model, plan))
        segments.begin()
        while trainer.step < plan.steps:
            trainer.train_step()
            trainer.step += 1
            segments.after_step()


def list_examples(plan: Plan) -> list[dict[str, torch.Tensor]]:
    """The sequences of all steps in our trainer's order, as transformers' collator takes them."""
    special = torch.tensor(sorted(set(load_manifest(plan.data).special_token_ids.values())))
    examples = []
    steps = range(0, plan.steps * plan.sequences, plan.sequences)
    for batch in training_batches(open_blocks(plan, "train"), steps, plan.sequences, seed=plan.seed):
        masks = torch.isin(batch.input_ids, special).long()
        examples += [{"input_ids": ids, "special_tokens_mask": mask} for ids, mask in zip(batch.input_ids, masks)]
    return examples


def train_theirs(connection: Connection, plan: Plan, attention: str) -> None:
    """Train with transformers' Trainer, from our initial weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    manifest = load_manifest(plan.data)
    config = build_config(plan, "")
    config.model.vocab_size = manifest.vocab_size
    ours = RobertaForMaskedLM(config.model, manifest.special_token_ids["pad_token_id"])
    ours.init_weights(plan.seed)
    ours.compute_dtype = COMPUTE_DTYPES[plan.precision]
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(ours, load_tokenizer(manifest.directory), folder)
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation=attention)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        on_gpu = torch.cuda.is_available()

        def score_theirs() -> tuple[float, float]:
            copy_from_huggingface(model.state_dict(), dict(ours.named_parameters()), config.model, "transformers")
            return score_model(ours.to(model.device), plan)

        segments = Segments(connection, plan, score_theirs)

        class Interruption(transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                segments.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                segments.after_step()

        recipe = config.optimizer
        optimizer = torch.optim.AdamW(
            model.to("cuda" if on_gpu else "cpu").parameters(), lr=recipe.learning_rate, betas=recipe.betas,
            eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip
        factor = functools.partial(learning_rate, config=config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step) / recipe.learning_rate)
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=plan.steps, per_device_train_batch_size=plan.sequences, max_grad_norm=0.0,
            seed=plan.seed, bf16=plan.precision == "bf16", fp16=plan.precision == "fp16", use_cpu=not on_gpu,
            train_sampling_strategy="sequential", remove_unused_columns=False, dataloader_pin_memory=on_gpu,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=list_examples(plan), optimizers=(optimizer, schedule),
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY),
            callbacks=[Interruption()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def collect(lines: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """For each way, (seeds, points, 3): tokens, seconds and loss."""
    runs: dict[str, dict[int, list[list[float]]]] = {}
    for line in lines:
        point = [line["tokens"], line["seconds"], line["loss"]]
        runs.setdefault(line["implementation"], {}).setdefault(line["seed"], []).append(point)
    return {way: np.array(list(of_seed.values())) for way, of_seed in runs.items()}


def describe(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What the lines show: the last loss of each seed, and the time of one over that of the other."""
    runs = collect(lines)
    said = []
    for way, run in runs.items():
        losses, seconds = run[:, -1, 2], run[:, -1, 1]
        spread = f", standard deviation {losses.std(ddof=1):.4f}" if len(losses) > 1 else ""
        said.append(
            f"{way}: {run[0, -1, 0]:,.0f} tokens in {', '.join(f'{one:.0f}' for one in seconds)} s; "
            f"held-out loss {', '.join(f'{one:.4f}' for one in losses)}, mean {losses.mean():.4f}{spread}"
        )
    ours, theirs = (runs[way] for way in sorted(runs, key=lambda way: way != OURS))
    ratios = theirs[:, -1, 1] / ours[:, -1, 1]
    gaps = theirs[:, -1, 2] - ours[:, -1, 2]
    # What they have reached by the time that we are done.
    behind = [
        float(np.interp(mine[-1, 1], its[:, 1], its[:, 2])) - mine[-1, 2]
        for mine, its in zip(ours, theirs, strict=True)
    ]
    said.append(
        f"theirs over ours: time {statistics.mean(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}); loss after the "
        f"same tokens {statistics.mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f}), after the same time "
        f"{statistics.mean(behind):+.4f}"
    )
    return said


def draw(path: Path, machine: dict[str, Any], plan: Plan, lines: Sequence[dict[str, Any]], entropy: float) -> Path:
    """Write the chart beside the results: each seed thin, their mean thick.

    Args:
        machine: the line that says what ran where.
        entropy: of the held-out tokens' frequencies, in nats: the loss of a model that knows nothing else.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for way, points in collect(lines).items():
        for panel, column, unit in zip(panels, (0, 1), (1e6, 60.0)):
            x, loss = points[..., column] / unit, points[..., 2]
            for one in range(len(points)):
                panel.plot(x[one], loss[one], color=colour_of(way), linewidth=0.6, alpha=0.6)
            panel.plot(x.mean(0), loss.mean(0), "o-", color=colour_of(way), linewidth=2, markersize=3, label=way)
    for panel, label in zip(panels, ("million tokens", "minutes of training")):
        panel.axhline(entropy, color="#999999", linewidth=1, linestyle="--", label="token frequencies alone")
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss, nats per masked token")
    panels[1].legend(frameon=False)
    sizes = (
        f"{plan.layers} layers of {plan.hidden}, {plan.sequences} x {plan.length} tokens a step, dropout {plan.dropout}, "
        f"{len({line['seed'] for line in lines})} seeds"
    )
    title = title_of({"run": machine, "task": {"precision": plan.precision}}, sizes)
    figure.suptitle(title, fontsize=9)
    chart = path.with_suffix(".png")
    figure.savefig(chart, dpi=150)
    return chart
