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
from ..data import Batch, heldout_batches, load_corpora, masking_arguments, move_ahead, open_split
from ..errors import DeviceMemoryError, Stopped
from ..hf import save_huggingface
from ..model import COMPUTE_DTYPES, AttentionScope
from ..optim import LossScaler, learning_rate
from ..parallel.distribute import DistributedOptimizer, distribute
from ..parallel.processes import Processes, add_bits, select_device
from ..parallel.votes import StopVotes
from ..precision import settle_precision
from .graph import Replayed, keep_on_device, set_learning_rate
from .initial_model import build_model
from .meter import Meter
from .micro_batches import MicroBatches
from .picture import draw_losses, draw_sparkline, read_losses
from .report import RunLog, describe_model, describe_result, fill_in, say
from .resume import describe_run, flatten, load_weights
from .score import Scores, evaluate_model

MASK_STREAM, DROPOUT_STREAM = 1, 2  # keys derived from the seed


class Trainer:
    """One run: data, model and optimizer as the configuration and the latest checkpoint give them.

    Raises:
        ConfigurationError, DataError, CheckpointError: something does not fit; nothing has been written.
    """

    def __init__(self, config: TrainConfig, processes: Processes | None = None):
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
            )
            for split in ("train", "heldout")
        )

        checkpoints = list_checkpoints(self.output_dir)
        before = read_state(checkpoints[-1])["config"].get("precision") if checkpoints else None
        # The first process decides: the others may have measured on a busier CPU.
        chosen = self.processes.collect(settle_precision(config.precision, self.device, before))[0]
        config.precision, self.precision_reason = chosen
        self.model = build_model(config, self.manifest).train()
        self.model.compute_dtype = COMPUTE_DTYPES[config.precision]
        validate(config)  # again, now that the sizes of the data and of the initial model are known
        self.step = 0
        self.eval_loss: dict[int, float] = {}  # of the last step that was scored
        if self.processes.is_first and not config.dry_run:
            remove_partial_checkpoints(self.output_dir)
        if checkpoints:
            self.step = load_weights(checkpoints[-1], self.model, self._describe_run(), len(self.corpora) > 1)
        self._check_processes()
        self.optimizer: DistributedOptimizer = distribute(self.model, config, self.processes)
        self.loss: Callable[..., LinearCrossEntropyOutput] = self.model.loss
        if config.torch_compile:
            self.loss = torch.compile(self.model.loss)
        self.scaler = LossScaler(self.device, enabled=config.precision == "fp16")
        if checkpoints:
            self._load_optimizer(checkpoints[-1])

        self.mask_seed = fold_seed(config.seed, MASK_STREAM, device=self.device)
        dropout_seed = fold_seed(config.seed, DROPOUT_STREAM, device=self.device)
        self.dropout_keys = self.model.dropout_keys(dropout_seed, self.device)
        self.batches = MicroBatches(config, self.blocks, self.processes)
        # Of the step under way, in tensors that stay where they are, as a CUDA graph needs it. The totals are the loss, the
        # correct and the masked tokens, and the processes that were asked to stop.
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.expected_masked = torch.ones((), device=self.device)
        self.found_inf = torch.zeros((), device=self.device)
        self._add_gradients: Callable[[Batch], None] = self.add_gradients
        self._update: Callable[[], None] = self.update
        self.is_replayed = False
        if config.cuda_graph and self.device.type == "cuda" and self.processes.size == 1:
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
            before = self.score(log) if self.step == 0 else None
            while self.step < last_step:
                self.train_step(log.meter)
                self.step += 1
                if self._is_due(config.logging_steps):
                    self._check_replicas()
                    log.write_training(self.step)
                if self._is_due(config.eval_steps):
                    after = self.score(log)
                is_stopping = self.votes.agreed()
                if self._is_due(config.save_steps) or is_stopping:
                    checkpoint = self.save(log)
                if is_stopping and self.step < last_step:
                    cause = self.stop.name or "a signal"  # that another process got
                    raise Stopped(f"{cause} at step {self.step}; {checkpoint} is saved, the same command continues")
        seconds = time.monotonic() - started
        sentences = fill_in(self.model, self.heldout, self.tokenizer, self.manifest.special_token_ids, 5)
        entropy = self.heldout.unigram_entropy()
        say(self.processes, describe_result(seconds, before, after, entropy, sentences, checkpoint))
        if self.processes.is_first:
            _, losses = read_losses(self.output_dir, "train/loss")
            picture = draw_losses(
                self.output_dir, f"{self.output_dir.name}: {config.precision} on {self.device}", entropy
            )
            say(self.processes, f"loss: {draw_sparkline(losses)}" + (f"  ({picture})" if picture else ""))

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.max_steps

    def make_meter(self) -> Meter:
        """A meter of this run; measuring the peak of a CPU takes a third of a second."""
        return Meter(self.config, self.processes, self.model.compute_dtype, self.scaler)

    def describe(self) -> None:
        """Say what is trained on what."""
        say(self.processes, describe_model(self.config, self.processes, self.blocks, self.batches.size))
        say(self.processes, f"{self.config.data}: {self.blocks.describe_verified()}")
        if len(self.corpora) > 1:
            epochs = self.blocks.count_epochs(self.batches.num_sequences_until(self.config.max_steps))
            for (manifest, weight), size, count in zip(self.corpora, self.blocks.corpus_sizes, epochs):
                say(
                    self.processes,
                    f"  {manifest.directory}, weight {weight:g}: {size:,} sequences, {count:.2f} epochs in all",
                )
        if self.precision_reason != "as asked":
            say(self.processes, f"precision {self.config.precision}: {self.precision_reason}")
        if self.config.cuda_graph and not self.is_replayed:
            say(self.processes, "cuda_graph: not used, since it needs a GPU and a single process")
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
        casts_once = not self.is_replayed and (self.config.sharding != "full" or self.processes.size == 1)
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
        """From now on, replay micro-batches and updates as CUDA graphs, once each has run a few times.

        Args:
            options: of `Replayed`.
        """
        self.is_replayed = True
        keep_on_device(self.optimizer.param_groups, self.device)
        self._add_gradients = Replayed(self.add_gradients, functools.partial(self._explain, "micro-batches"), **options)
        self._update = Replayed(self.update, functools.partial(self._explain, "updates"), **options)

    def _explain(self, what: str, reason: str) -> None:
        say(self.processes, f"step {self.step + 1}: {what} go on without a CUDA graph: {reason}", sys.stderr)

    def add_gradients(self, batch: Batch) -> None:
        """Forward and backward of a micro-batch. Its gradient and its totals are added to those of the step."""
        result = self.forward(batch)
        with record_function("backward"):
            (result.loss * (self.scaler.scale / self.expected_masked)).backward()
        self.totals[:3] += torch.stack((result.loss.detach().double(), result.num_correct, result.num_targets))

    def update(self) -> None:
        """New weights from the gradient of the whole batch."""
        self.optimizer.step(grad_scale=self.scaler.scale * self.totals[2].float() / self.expected_masked)
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
        with log.meter.pause() if log else contextlib.nullcontext():
            size = max(1, min(64, self.batches.size))
            batches = heldout_batches(self.heldout, self.config.eval_sequences, size)
            processes = None if self.config.sharding == "full" else self.processes
            if processes is not None:  # FSDP2 needs all processes in every forward
                batches = itertools.islice(batches, processes.rank, None, processes.size)
            scores = evaluate_model(self.model, self._note_each(batches), self.masking, processes)
            if log is not None:
                log.write_scores(self.step, scores)
        self.eval_loss = {self.step: scores.loss}
        return scores

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
                save_checkpoint(
                    self.output_dir,
                    self.step,
                    lambda path: save_huggingface(self.model, self.tokenizer, path, weights),
                    tensors,
                    self._describe_run(),
                )
                remove_old_checkpoints(self.output_dir, self.config.save_total_limit)
            self.processes.wait_for_all()
        return get_path(self.output_dir, self.step)

    def _describe_run(self) -> dict[str, Any]:
        return describe_run(
            self.step, self.eval_loss.get(self.step), self.manifest, self.blocks.num_tokens, self.config
        )

    def _load_optimizer(self, checkpoint: Path) -> None:
        tensors = load_optimizer_tensors(checkpoint)
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
