"""The training run: the loop, and the step inside it.

Everything random is a function of the seed and of a sample's number in training order, so the whole state of a run is
its weights, its optimizer's moments and its step.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fastroberta_kernels.cross_entropy import LinearCrossEntropyOutput
from fastroberta_kernels.masking import mask_tokens
from fastroberta_kernels.philox import fold_seed
from torch import Tensor
from torch.profiler import record_function

from ..checkpoint import (
    get_path,
    list_checkpoints,
    load_optimizer_tensors,
    read_state,
    remove_old_checkpoints,
    remove_partial_checkpoints,
    save_checkpoint,
)
from ..cli.arguments import validate
from ..cli.program import StopRequest
from ..config import TrainConfig
from ..corpus.tokenizer import load_tokenizer
from ..data import Batch, Blocks, heldout_batches, load_corpora, masking_arguments, move_ahead, open_split
from ..errors import DeviceMemoryError, Stopped
from ..hf import save_huggingface
from ..model import AttentionScope
from ..optim import LossScaler, learning_rate, settle_epochs
from ..parallel.distribute import DistributedOptimizer, distribute
from ..parallel.processes import Processes, add_bits, select_device
from ..parallel.votes import StopVotes
from ..precision import settle_precision
from .distillation import describe_teacher, prepare_distillation
from .graph import Replayed, choose_graphs, make_graphs, make_room, set_learning_rate
from .initial_model import build_model
from .meter import Meter
from .micro_batches import MicroBatches
from .picture import show_losses
from .profile import profile_steps
from .report import RunLog, describe_data, describe_model, describe_result, fill_in, say
from .resume import describe_run, find_checkpoint, flatten, load_weights
from .score import Scores, evaluate_model

MASK_STREAM, DROPOUT_STREAM = 1, 2  # keys derived from the seed
STOP_SECONDS = 20  # from noticing a signal to the end, of the 30 that most schedulers grant


class Trainer:
    """One run: data, model and optimizer as the configuration and the latest checkpoint give them.

    Args:
        make_blocks: makes the training data's blocks, as `Blocks` does.
    Raises:
        ConfigurationError, DataError, CheckpointError: something does not fit; nothing has been written.
    """

    build_model = staticmethod(build_model)

    def __init__(
        self, config: TrainConfig, processes: Processes | None = None, make_blocks: Callable[..., Blocks] = Blocks
    ):
        assert config.data is not None
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.processes = processes or Processes(select_device(config.device))
        self.device = self.processes.device

        self.corpora = load_corpora(config.data)
        self.manifest = self.corpora[0].manifest  # for the tokenizer, which all corpora share
        self.tokenizer = load_tokenizer(self.manifest.directory)
        self.masking = masking_arguments(self.manifest, config.mlm_probability)
        self.blocks, self.heldout = (
            open_split(
                self.corpora,
                split,
                max_seq_length=config.max_seq_length,
                packing=config.packing,
                attention_scope=config.attention_scope,
                make_blocks=make,
            )
            for split, make in (("train", make_blocks), ("heldout", Blocks))
        )

        epochs_note = settle_epochs(config, len(self.blocks))
        checkpoint = find_checkpoint(config)
        before = read_state(checkpoint)["config"].get("precision") if checkpoint else None
        # The first process decides: the others may have measured on a busier CPU.
        chosen = self.processes.collect(settle_precision(config.precision, self.device, before))[0]
        config.precision, reason = chosen
        self.model, self.notes = self.build_model(config, self.manifest, checkpoint)
        precision_note = "" if reason == "as asked" else f"precision {config.precision}: {reason}"
        self.notes += filter(None, (epochs_note, precision_note))
        self.model.train()
        self.model.set_precision(config.precision)
        self.distillation = prepare_distillation(self.model, config, self.manifest, self.device)
        if self.distillation is not None:
            self.notes.append(describe_teacher(config))
        validate(config)  # again, now that the sizes of the data and of the initial model are known
        self.step, self.start = 0, (0, 0)  # for `start` see BatchSchedule
        self.eval_loss: dict[int, float] = {}  # of the last step that was scored
        self.score_seconds = float("inf")  # of that; unknown before
        if self.processes.is_first and not config.dry_run:
            remove_partial_checkpoints(self.output_dir)
        if checkpoint:
            run, is_mixture = self._describe_run(), len(self.corpora) > 1
            self.step, self.start, note = load_weights(checkpoint, self.model, run, config, is_mixture)
            self.notes += [note] if note else []
        self._check_processes()
        self.optimizer: DistributedOptimizer = distribute(self.model, config, self.processes)
        self.loss: Callable[..., LinearCrossEntropyOutput] = (self.distillation or self.model).loss
        if config.torch_compile:
            self.loss = torch.compile(self.loss)
        self.scaler = LossScaler(self.device, enabled=config.precision == "fp16")
        if checkpoint:
            self._load_optimizer(checkpoint, before)

        self.mask_seed = fold_seed(config.seed, MASK_STREAM, device=self.device)
        dropout_seed = fold_seed(config.seed, DROPOUT_STREAM, device=self.device)
        self.dropout_keys = self.model.dropout_keys(dropout_seed, self.device)
        self.batches = MicroBatches(config, self.blocks, self.processes, self.start)
        # Of the step under way, in tensors that stay where they are, as a CUDA graph needs it. The totals are the loss, the
        # correct and the masked tokens, and the processes that were asked to stop.
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.expected_masked = torch.ones((), device=self.device)
        self.found_inf = torch.zeros((), device=self.device)
        self._add_gradients: Callable[[Batch], None] = self.add_gradients
        self._update: Callable[[], None] = self.update
        self.graphs: tuple[Replayed, ...] = ()  # of the two
        may_replay, note = choose_graphs(config, self.processes)
        self.notes += filter(None, [note])
        if may_replay:
            self.replay_steps()
        self.stop = StopRequest()
        self.votes = StopVotes(self.processes, lambda: self.stop.number is not None)

    # The run

    def train(self) -> None:
        """Train to the last step, or until a signal asks to stop.

        Raises:
            Stopped: by a signal; a checkpoint is saved.
        """
        config, last_step = self.config, self.config.max_steps
        if self.step >= last_step:
            checkpoint = list_checkpoints(self.output_dir)[-1]
            say(self.processes, f"{self.output_dir}: finished after {self.step} steps; the checkpoint is {checkpoint}")
            return
        self.describe()
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stop)
            stack.enter_context(self.processes.explain_failures())
            log = stack.enter_context(RunLog(config, self.processes, self.make_meter(), self.step))
            count = config.profile if self.processes.is_first else 0
            profile = profile_steps(count, last_step - self.step, self.output_dir / "profile", self.device)
            note_step = stack.enter_context(profile)
            before = self.score(log) if self.step == 0 else None
            while self.step < last_step:
                self.train_step(log.meter)
                note_step()
                self.step += 1
                if self._is_due(config.logging_steps):
                    self._check_replicas()
                    log.write_training(self.step)
                is_stopping = self.votes.agreed() and self.step < last_step
                if self._is_due(config.eval_steps) and not is_stopping:  # the checkpoint comes first
                    after = self.score(log)
                    is_stopping = self.votes.agreed() and self.step < last_step
                noticed = time.monotonic()
                if self._is_due(config.save_steps) or is_stopping:
                    checkpoint = self.save(log)
                if is_stopping:
                    self._score_in_time(log, noticed)
                    cause = self.stop.name or "a signal"  # that another process got
                    raise Stopped(f"{cause} at step {self.step}; {checkpoint} is saved, the same command continues")
        seconds = time.monotonic() - started
        sentences = fill_in(self.model, self.heldout, self.tokenizer, self.manifest.special_token_ids, 5)
        entropy = self.heldout.unigram_entropy()
        say(self.processes, describe_result(seconds, before, after, entropy, sentences, checkpoint))
        if self.processes.is_first:
            say(self.processes, show_losses(config, self.device.type == "cuda", entropy))

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.max_steps

    def make_meter(self) -> Meter:
        """A meter of this run; measuring the peak of a CPU takes a third of a second."""
        return Meter(self.config, self.processes, self.model.compute_dtype, self.scaler)

    def describe(self) -> None:
        """Say what is trained on what."""
        num_samples = self.batches.num_sequences_until(self.config.max_steps)
        say(self.processes, describe_model(self.config, self.processes, self.blocks, self.batches.size))
        for line in [*describe_data(self.corpora, self.blocks, num_samples), *self.notes]:
            say(self.processes, line)
        if self.step:
            say(self.processes, f"{self.output_dir}: continuing after step {self.step}")

    # A step

    def train_step(self, meter: Meter | None = None) -> None:
        """One optimizer step: the gradient of the global batch, summed over micro-batches and processes, then one update.

        Nothing here asks the device for a number. Where a process runs out of memory, all of them repeat the step with
        half the micro-batch.

        Raises:
            DeviceMemoryError: out of memory, and the micro-batch cannot be halved.
        """
        self.processes.note_progress(f"step {self.step + 1}")
        while (sizes := self._accumulate_gradients()) is None:
            pass  # some process ran out of memory; now with half the micro-batch
        with record_function("reduce"):
            self.processes.add_up(self.totals)
        self.processes.note_progress(f"the end of step {self.step + 1}")
        set_learning_rate(self.optimizer.param_groups, learning_rate(self.step, self.config))
        with record_function("optimizer"):
            self._update()
        self.votes.cast(self.totals[3])
        if meter is not None:
            meter.add(self.totals[:3], self.optimizer.last_grad_norm, self.found_inf, sizes)

    def _accumulate_gradients(self) -> list[tuple[int, int]] | None:
        """The gradient of this step's batch, before it is scaled; None if it is to be done again with less memory.

        Returns:
            tokens, and the sum of squared lengths, of each micro-batch.
        """
        # The loss of a step is the sum over its masked tokens divided by their number, which is known only when the last
        # micro-batch is masked. Until then it is divided by the expected number, to keep fp16 gradients in range.
        num_sequences = self.batches.num_sequences(self.step)
        self.expected_masked.fill_(num_sequences * self.config.max_seq_length * self.config.mlm_probability)
        self.totals.zero_()
        sizes = []
        self.optimizer.zero_grad()
        # A graph casts for itself, and FSDP2 frees weights between uses.
        is_eager = all(graph.has_given_up for graph in self.graphs[:1])
        casts_once = is_eager and (self.config.sharding != "full" or self.processes.size == 1)
        is_last = is_short = False
        try:
            with self.model.cast_once() if casts_once else contextlib.nullcontext():
                for batch, is_last in self.batches.of_step(self.step):
                    # Around the forward too: if memory runs out in it, the other processes still wait for gradients.
                    with self.optimizer.last_backward() if is_last else contextlib.nullcontext():
                        self._add_gradients(batch)
                    sizes.append((batch.num_tokens, batch.sum_squared_lengths))
                    self.processes.note_progress(f"micro-batch {len(sizes) + 1} of step {self.step + 1}")
        except torch.OutOfMemoryError as error:
            if not self.batches.may_halve:
                raise DeviceMemoryError(
                    f"step {self.step + 1}: {self.device} has too little memory for {self.batches.size} sequences at once; "
                    "with a lower --micro_batch_size, or with --gradient_checkpointing, the same command continues from "
                    "the last checkpoint"
                ) from error
            is_short = True
        if self.batches.may_halve:
            if is_short and not is_last:  # the others wait for these gradients, though nobody will use them
                with self.optimizer.last_backward():
                    pass
            if short := self.processes.find_ranks(is_short):
                say(self.processes, self.batches.halve(self.step, short), sys.stderr)
                torch.cuda.empty_cache()
                return None
        self.totals[3] += self.stop.number is not None
        return sizes

    def replay_steps(self, **options: Any) -> None:
        """Replay micro-batches and updates as CUDA graphs once each has run a few times. `options`: of `Replayed`."""
        self.graphs = make_graphs(
            self.add_gradients, self.update, self.optimizer, self.totals, inputs=[self.expected_masked, self.scaler.scale],
            state=[*self.scaler.state().values(), self.found_inf],
            explain=lambda line: say(self.processes, f"step {self.step + 1}: {line}", sys.stderr), **options,
        )  # fmt: skip
        self._add_gradients, self._update = self.graphs

    def add_gradients(self, batch: Batch) -> None:
        """Forward and backward of a micro-batch. Its gradient and its totals are added to those of the step."""
        result = self.forward(batch)
        with record_function("backward"):
            (result.loss * (self.scaler.scale / self.expected_masked)).backward()
        self.totals[:3] += torch.stack((result.loss.detach().double(), result.num_correct, result.num_targets))

    def update(self) -> None:
        """New weights from the gradient of the whole batch."""
        num_masked = self.totals[2].float().clamp(min=1)  # a batch of nothing but special tokens has none
        self.optimizer.step(grad_scale=self.scaler.scale * num_masked / self.expected_masked)
        self.found_inf.copy_(~torch.isfinite(self.optimizer.last_grad_norm))
        self.scaler.update(self.found_inf)

    def forward(self, batch: Batch) -> LinearCrossEntropyOutput:
        """The summed loss of a micro-batch, under its masks and its dropout."""
        with record_function("masking"):
            masked = mask_tokens(batch.input_ids, seed=self.mask_seed, sample_ids=batch.sample_ids, **self.masking)
        scope = AttentionScope(batch.key_lengths, batch.cu_seqlens)
        with record_function("forward"):
            return self.loss(*masked, scope, self.dropout_keys, batch.first_sample)

    # Scores and checkpoints

    def score(self, log: RunLog | None = None) -> Scores:
        """Held-out scores at this step; written to the log, if there is one."""
        began = time.monotonic()
        with log.meter.pause() if log else contextlib.nullcontext():
            scores = make_room(self._evaluate, self.graphs)
            if log is not None:
                log.write_scores(self.step, scores, self.corpora)
        self.eval_loss = {self.step: scores.loss}
        self.score_seconds = time.monotonic() - began
        return scores

    def _evaluate(self) -> Scores:
        size = max(1, min(64, self.batches.size))
        batches = heldout_batches(self.heldout, self.config.eval_sequences, size)
        processes = None if self.config.sharding == "full" else self.processes
        if processes is not None:  # FSDP2 needs all processes in every forward
            batches = itertools.islice(batches, processes.rank, None, processes.size)
        batches = self._note_each(batches)
        return evaluate_model(self.model, batches, self.masking, processes, len(self.corpora), self.device)

    def _score_in_time(self, log: RunLog, noticed: float) -> None:
        """Score the last step before a stop, if that should end within STOP_SECONDS of noticing the signal."""
        expected = time.monotonic() - noticed + self.score_seconds
        if self.step not in self.eval_loss and max(self.processes.collect(expected)) <= STOP_SECONDS:
            self.score(log)

    def _note_each(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in move_ahead(batches, self.device):
            self.processes.note_progress(f"the evaluation after step {self.step}")
            yield batch

    def save(self, log: RunLog) -> Path:
        """Write a checkpoint of this step, and remove older ones beyond the limit."""
        with log.meter.pause():
            self._check_replicas()
            self.processes.be_patient()  # all of them wait while the first one writes
            weights = self.optimizer.weights()
            tensors = self.optimizer.tensors() | self.scaler.state()
            if self.processes.is_first:
                write = functools.partial(self.write_model, weights=weights)
                save_checkpoint(self.output_dir, self.step, write, tensors, self._describe_run())
                remove_old_checkpoints(self.output_dir, self.config.save_total_limit)
            self.processes.wait_for_all()
        return get_path(self.output_dir, self.step)

    def write_model(self, path: Path, weights: dict[str, Tensor]) -> None:
        """Write the model's part of a checkpoint, with these weights by parameter name."""
        save_huggingface(self.model, self.tokenizer, path, weights)

    def _describe_run(self) -> dict[str, Any]:
        run = describe_run(
            self.step, self.start, self.eval_loss.get(self.step), self.manifest, self.blocks.num_tokens, self.config
        )
        return run if self.distillation is None else {**run, "teacher": self.distillation.sha256}

    def _load_optimizer(self, checkpoint: Path, precision: str | None) -> None:
        tensors = load_optimizer_tensors(checkpoint)
        if precision == self.config.precision:  # a loss scale is that of a precision
            for name, tensor in self.scaler.state().items():
                tensor.copy_(tensors[name])
        self.optimizer.load_tensors(tensors, str(checkpoint))

    # Several processes

    def _check_processes(self) -> None:
        """Refuse to start if the processes are not about to do the same."""
        self.config.check_processes(self.processes.size)
        if self.processes.size == 1:
            return
        run = self._describe_run()
        settings = {
            name: value for name, value in flatten(run.pop("config")).items() if name not in ("output_dir", "data")
        }
        weights = int(add_bits([parameter.detach() for parameter in self.model.parameters()]))
        self.processes.compare(
            {**run, "sum of the weights": weights, "torch": torch.__version__, **settings},
            "all need the same versions, settings, data, checkpoints and initial model; output_dir must be on a disk that "
            "all machines share",
        )

    def _check_replicas(self) -> None:
        if self.config.sharding != "full":
            self.processes.check_replicas([parameter.detach() for parameter in self.model.parameters()], self.step)
