"""`python -m fastroberta.train`: pretrain RoBERTa from prepared text to a checkpoint that transformers loads.

Without arguments a small model learns the texts that every Python brings, in minutes on a CPU. With `--config
roberta-base --data DIR` the paper's recipe runs on a directory written by `python -m fastroberta.prepare`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .cli.arguments import parse_arguments, to_dict, validate
from .cli.program import run
from .config import BatchRampConfig, TrainConfig
from .errors import ConfigurationError, DeviceMemoryError, NonFiniteError, Stopped

if TYPE_CHECKING:
    from torch import Tensor

    from .parallel.processes import Processes

# A run may be continued with other values of these: they change neither the data order nor the result of a step, beyond
# the rounding of another summation order.
MAY_CHANGE_ON_RESUME = (
    "device", "micro_batch_size", "gradient_checkpointing", "torch_compile", "logging_steps", "eval_steps",
    "eval_sequences", "save_steps", "save_total_limit", "tensorboard", "dry_run", "data", "output_dir", "init_from",
    "sharding", "hang_timeout", "plan",
)  # fmt: skip
QUICKSTART_VOCABULARY = 512
MASK_STREAM, DROPOUT_STREAM = 1, 2  # keys derived from the seed


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = None
    if not asks_for_plan(argv):
        config = parse_arguments(argv, TrainConfig, description=__doc__, default_preset="quickstart")
    if config is None or config.plan:  # a file can ask for it too
        from .plan import main as plan

        return plan(argv)
    from .cli.directories import check_directory, own_directory
    from .parallel.processes import join_processes, keep_freed_memory

    processes = join_processes(config.device, config.hang_timeout)
    if processes.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        output_dir = Path(config.output_dir)
        if processes.is_first:
            if config.dry_run:
                check_directory(output_dir, "--output_dir")
            else:
                stack.enter_context(own_directory(output_dir, ".lock", "--output_dir"))
        if config.data is None:
            if config.dry_run and not (output_dir / "data" / "manifest.json").exists():
                # What is written goes to a place that disappears.
                output_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastroberta-")))
            config.data = str(output_dir / "data")
            if processes.is_first or config.dry_run:
                prepare_python_texts(Path(config.data))
            processes.wait_for_all()
        trainer = Trainer(config, processes)
        if config.dry_run:
            trainer.rehearse()
        else:
            trainer.train()
    processes.leave()
    return 0


def asks_for_plan(argv: Sequence[str]) -> bool:
    """Whether the command line says --plan. Known before the settings are read, because it brings settings of its own."""
    is_plan = False
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name == "--plan":
            is_plan = (value if equals else following).lower() not in ("false", "no")
    return is_plan


def prepare_python_texts(directory: Path) -> None:
    """Tokenize the texts inside Python into `directory`, once, with a tokenizer trained on them."""
    from .corpus.python_texts import write_python_texts
    from .prepare import main as prepare

    if not (directory / "manifest.json").exists():
        source = directory.parent / "python-texts.jsonl"
        write_python_texts(source)
        arguments = [str(source), "--out", str(directory), "--train-tokenizer", str(QUICKSTART_VOCABULARY)]
        status = prepare([*arguments, "--heldout-fraction", "0.05"])
        if status:
            raise SystemExit(status)


class Trainer:
    """One run: data, model and optimizer as the configuration and the latest checkpoint give them.

    Everything random is a function of the seed and of a sample's number in training order, so the state of a run is
    its weights, its moments and its step.
    """

    def __init__(self, config: TrainConfig, processes: Processes | None = None):
        import torch
        from fastroberta_kernels.philox import fold_seed

        from .checkpoint import list_checkpoints, remove_partial_checkpoints
        from .corpus.tokenizer import load_tokenizer
        from .data import load_corpora, masking_arguments, open_split
        from .model import COMPUTE_DTYPES, RobertaForMaskedLM
        from .optim import BatchSchedule, LossScaler
        from .parallel.distribute import distribute
        from .parallel.processes import Processes, select_device

        self.config = config
        self.output_dir = Path(config.output_dir)
        self.processes = processes or Processes(select_device(config.device))
        self.device = self.processes.device
        assert config.data is not None
        self.corpora = load_corpora(config.data)
        self.manifest = self.corpora[0].manifest  # for the tokenizer, which all share
        self.tokenizer = load_tokenizer(self.manifest.directory)
        self.masking = masking_arguments(self.manifest, config.mlm_probability)
        cut: dict[str, Any] = dict(
            max_seq_length=config.max_seq_length, packing=config.packing, attention_scope=config.attention_scope
        )
        self.blocks = open_split(self.corpora, "train", **cut)
        self.heldout = open_split(self.corpora, "heldout", **cut)

        pad_token_id = self.manifest.special_token_ids["pad_token_id"]
        if config.init_from is None:
            self._settle_vocabulary()
            model = RobertaForMaskedLM(config.model, pad_token_id, config.gradient_checkpointing)
            model.init_weights(config.seed)
        else:
            model = self._load_initial_model()
        validate(config)  # again, now that the sizes are those of the data and of the initial model
        model.compute_dtype = COMPUTE_DTYPES[config.precision]
        self.model = model.train()
        self.step = 0
        self.eval_loss: float | None = None
        if self.processes.is_first and not config.dry_run:
            remove_partial_checkpoints(self.output_dir)
        checkpoints = list_checkpoints(self.output_dir)
        if checkpoints:
            self._load_weights(checkpoints[-1])
        self._check_processes()
        self.optimizer = distribute(model, config, self.processes)
        self.loss = torch.compile(model.loss) if config.torch_compile else model.loss
        self.scaler = LossScaler(self.device, enabled=config.precision == "fp16")
        if checkpoints:
            self._load_optimizer(checkpoints[-1])

        self.mask_seed = fold_seed(config.seed, MASK_STREAM, device=self.device)
        self.dropout_keys = model.dropout_keys(fold_seed(config.seed, DROPOUT_STREAM, device=self.device), self.device)
        self.batch_schedule = BatchSchedule(config)
        self.micro_batch_size = self._choose_micro_batch_size()
        self.stop_signal: int | None = None
        self.stop_votes: list[Any] = []

    # Training

    def train(self) -> None:
        """Train to the last step, or to a signal that asks to stop."""
        from .log import MetricsWriter, Progress

        config = self.config
        if self.step >= config.max_steps:
            self._say(f"{self.output_dir}: finished, {self.step} steps are done; {self._where_to_go_on()}")
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._describe()
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._catch_signals())
            stack.enter_context(self.processes.explain_failures())
            writer = progress = None
            if self.processes.is_first:
                resumed_step = self.step if self.step else None
                writer = stack.enter_context(
                    MetricsWriter(self.output_dir, resumed_step=resumed_step, tensorboard=config.tensorboard)
                )
                progress = stack.enter_context(Progress(config.max_steps, self.step))
            before = self.evaluate(writer, progress) if self.step == 0 else None
            meter = Meter(self)
            batches = self._read_batches()
            while self.step < config.max_steps:
                batches = self._run_step(batches, meter)
                self.step += 1
                if self.step % config.logging_steps == 0 or self.step == config.max_steps:
                    metrics = meter.read()
                    self._check_replicas()
                    if writer is not None and progress is not None:
                        writer.write(self.step, metrics)
                        progress.update(self.step, metrics)
                last = self.step == config.max_steps
                if self.step % config.eval_steps == 0 or last:
                    with meter.pause():
                        after = self.evaluate(writer, progress)
                is_stopping = self._agree_to_stop()
                if self.step % config.save_steps == 0 or last or is_stopping:
                    with meter.pause():
                        checkpoint = self.save()
                if is_stopping and not last:
                    name = "a signal" if self.stop_signal is None else signal.Signals(self.stop_signal).name
                    raise Stopped(f"{name} at step {self.step}; {checkpoint} is saved, the same command continues")
                self.eval_loss = None
        self._report(before, after, checkpoint, time.monotonic() - started)

    def train_step(self, batches: Iterator[Any], meter: Meter | None = None) -> list[int]:
        """One optimizer step: gradients summed over the micro-batches of all processes, then one update.

        Nothing here asks the device for a number.

        Returns:
            The ranks that have too little memory for a micro-batch, in all processes the same. If there are any, the step
            was not taken: weights, moments, loss scale and meter are as they were.
        Raises:
            torch.OutOfMemoryError: in this process alone, where the micro-batch cannot be halved.
        """
        import torch

        from .optim import learning_rate

        samples = len(self.batch_schedule.samples(self.step))
        num_micro_batches = samples // (self.processes.size * self.micro_batch_size)
        # The loss of a step is a sum over all masked tokens divided by their number, which is known when the last
        # micro-batch is masked. Until then sums are divided by this expectation, to keep fp16 gradients in range.
        expected_masked = self.expect_masked(samples)
        self.processes.note_progress(f"step {self.step + 1}")
        self.optimizer.zero_grad()
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, correct, masked; who wants to stop
        sizes = []
        is_last = is_short = False
        try:
            for index, batch in enumerate(itertools.islice(batches, num_micro_batches)):
                is_last = index == num_micro_batches - 1
                with self.optimizer.last_backward() if is_last else contextlib.nullcontext():
                    result = self._forward(batch)
                    (result.loss * (self.scaler.scale / expected_masked)).backward()
                totals[:3] += torch.stack((result.loss.detach().double(), result.num_correct, result.num_targets))
                sizes.append((batch.num_tokens, batch.sum_squared_lengths))
                self.processes.note_progress(f"micro-batch {index + 2} of step {self.step + 1}")
        except torch.OutOfMemoryError:
            if not self._may_halve:
                raise
            is_short = True
        if self._may_halve:
            if is_short and not is_last:  # the others wait for these gradients, though nobody will use them
                with self.optimizer.last_backward():
                    pass
            short = self.processes.find_ranks(is_short)
            if short:
                return short
        totals[3] += self.stop_signal is not None
        self.processes.add_up(totals)
        self.processes.note_progress(f"the end of step {self.step + 1}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step(grad_scale=self.scaler.scale * totals[2].float() / expected_masked)
        found_inf = (~torch.isfinite(self.optimizer.last_grad_norm)).float()
        self.scaler.update(found_inf)
        if self.processes.size > 1:
            self._send_votes(totals[3])
        if meter is not None:
            meter.add(totals[:3], self.optimizer.last_grad_norm, found_inf, sizes)
        return []

    def _forward(self, batch: Any) -> Any:
        """The loss of a micro-batch, under its masks and its dropout."""
        from fastroberta_kernels.masking import mask_tokens

        from .model import AttentionScope

        masked = mask_tokens(batch.input_ids, seed=self.mask_seed, sample_ids=batch.sample_ids, **self.masking)
        scope = AttentionScope(batch.key_lengths, batch.cu_seqlens)
        return self.loss(*masked, scope, self.dropout_keys, batch.first_sample)

    def expect_masked(self, num_sequences: int) -> float:
        """About how many tokens of so many sequences are masked."""
        return num_sequences * self.config.max_seq_length * self.config.mlm_probability

    @property
    def _may_halve(self) -> bool:
        """Whether a micro-batch that does not fit is halved: where its size was left open, and not inside FSDP2, where
        every layer of the other processes would wait for this one's."""
        return self.config.micro_batch_size == "auto" and (self.config.sharding != "full" or self.processes.size == 1)

    def _run_step(self, batches: Iterator[Any], meter: Meter | None = None) -> Iterator[Any]:
        """`train_step`; where a process has too little memory, the step is done again by all with half the micro-batch.

        Raises:
            DeviceMemoryError: it cannot be halved, or a single sequence is too much.
        """
        import torch

        while True:
            try:
                short = self.train_step(batches, meter)
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(
                    f"step {self.step + 1}: {self.device} has too little memory for {self.micro_batch_size} sequences at "
                    "once; with a lower micro_batch_size, or gradient_checkpointing, the same command continues from the "
                    "last checkpoint"
                ) from error
            if not short:
                return batches
            where = "" if self.processes.size == 1 else f" on rank {', '.join(map(str, short))}"
            if self.micro_batch_size == 1:
                raise DeviceMemoryError(
                    f"step {self.step + 1}: out of memory{where} with a single sequence; with gradient_checkpointing the "
                    "same command continues from the last checkpoint"
                )
            self.micro_batch_size = self._next_smaller_micro_batch_size()
            self._say(f"out of memory{where}: going on with {self.micro_batch_size} sequences at once", file=sys.stderr)
            torch.cuda.empty_cache()
            batches = self._read_batches()

    def _send_votes(self, votes: Tensor) -> None:
        """How many processes had a signal when this step was reduced: on its way to the host, without waiting for it."""
        import torch

        if self.device.type == "cpu":
            self.stop_votes = [(votes, None)]
            return
        on_host = torch.empty_like(votes, device="cpu", pin_memory=True)
        on_host.copy_(votes, non_blocking=True)
        is_there = torch.cuda.Event()
        is_there.record()
        # On a GPU the step before is asked, so that this one need not be done for the next to be prepared.
        self.stop_votes = [*self.stop_votes[-1:], (on_host, is_there)]

    def _agree_to_stop(self) -> bool:
        """Whether a process was asked to stop, as all of them know it after the same step."""
        if self.processes.size == 1:
            return self.stop_signal is not None
        if self.device.type == "cuda" and len(self.stop_votes) < 2:
            return False
        votes, is_there = self.stop_votes[0]
        if is_there is not None:
            is_there.synchronize()
        return bool(votes)

    def _check_replicas(self) -> None:
        if self.config.sharding != "full":
            self.processes.check_replicas([parameter.detach() for parameter in self.model.parameters()], self.step)

    def evaluate(self, writer: Any = None, progress: Any = None) -> Any:
        """Held-out scores at this step, written down and shown."""
        from .data import heldout_batches, move_ahead
        from .evaluate import evaluate_model

        size = max(1, min(64, self.micro_batch_size))
        batches = heldout_batches(self.heldout, self.config.eval_sequences, size)
        processes = None if self.config.sharding == "full" else self.processes
        if processes is not None:  # FSDP2 needs all processes in every forward
            batches = itertools.islice(batches, processes.rank, None, processes.size)
        batches = self._note_each(move_ahead(batches, self.device), f"the evaluation after step {self.step}")
        scores = evaluate_model(self.model, batches, self.masking, processes)
        self.eval_loss = scores.loss
        if writer is not None:
            metrics = {"eval/loss": scores.loss, "eval/accuracy": scores.accuracy, "eval/perplexity": scores.perplexity}
            writer.write(self.step, metrics)
            progress.print(f"step {self.step}: held-out loss {scores.loss:.4f}, accuracy {scores.accuracy:.1%}")
        return scores

    def _note_each(self, batches: Iterator[Any], where: str) -> Iterator[Any]:
        for batch in batches:
            self.processes.note_progress(where)
            yield batch

    def rehearse(self) -> None:
        """`--dry-run`: say what the run would be, do two small steps of it, leave nothing."""
        import torch

        from .costs import estimate_memory
        from .log import format_seconds
        from .optim import BatchSchedule

        self._describe()
        self.step = 0  # the two steps are to measure by, also where the run has few left or is finished
        for name, size in estimate_memory(self.config, self.micro_batch_size, self.processes.size).items():
            self._say(f"  memory, {name}: {size / 2**20:,.0f} MiB (estimate)")
        # One micro-batch is enough to measure by; a step of thousands of sequences could take hours on a CPU.
        whole = self.batch_schedule
        samples = self.processes.size * self.micro_batch_size
        one = dataclasses.replace(self.config, train_batch_size=samples, batch_ramp=BatchRampConfig())
        self.batch_schedule = BatchSchedule(one)
        batches = self._run_step(self._read_batches())  # the first is slower than those that follow
        meter, started = Meter(self), time.monotonic()
        self._run_step(batches, meter)
        loss = meter.read()["train/loss"]
        seconds_a_sample = (time.monotonic() - started) / samples
        if self.device.type == "cuda":
            self._say(f"  memory, measured: {torch.cuda.max_memory_allocated(self.device) / 2**20:,.0f} MiB")
        one_step = seconds_a_sample * self.config.train_batch_size
        all_steps = seconds_a_sample * whole.samples(self.config.max_steps - 1).stop
        self._say(
            f"  one micro-batch done: loss {loss:.3f}; a step takes about {format_seconds(one_step)}, all of them "
            f"{format_seconds(all_steps)}"
        )

    # State

    def save(self) -> Path:
        """A checkpoint of this step; older ones beyond the limit are removed."""
        from .checkpoint import get_path, remove_old_checkpoints, save_checkpoint
        from .hf import save_huggingface

        self._check_replicas()
        self.processes.be_patient()  # while the first one writes, all wait for a disk
        state = {
            "step": self.step,
            "eval_loss": self.eval_loss,
            "data": self.manifest.tokenizer_sha256,
            "train_tokens": self.blocks.num_tokens,
            "config": to_dict(self.config),
        }
        weights = self.optimizer.weights()
        tensors = self.optimizer.tensors() | self.scaler.state()
        if self.processes.is_first:
            save_checkpoint(
                self.output_dir,
                self.step,
                lambda path: save_huggingface(self.model, self.tokenizer, path, weights),
                tensors,
                state,
            )
            remove_old_checkpoints(self.output_dir, self.config.save_total_limit)
        self.processes.wait_for_all()
        return get_path(self.output_dir, self.step)

    def _load_weights(self, checkpoint: Path) -> None:
        """Weights and step of a checkpoint, which must be of the same run."""
        from .checkpoint import read_state, verify_checkpoint
        from .hf import copy_from_huggingface, read_tensors

        verify_checkpoint(checkpoint)
        state = read_state(checkpoint)
        before, now = _flatten(state["config"]), _flatten(to_dict(self.config))
        for name, value in now.items():
            may_change = name.split(".")[0] in MAY_CHANGE_ON_RESUME
            if name == "data" and len(self.corpora) > 1:  # the weights decide the order
                may_change = False
            if not may_change and before.get(name, value) != value:
                raise ConfigurationError(
                    f"{name}: {value!r}, but {checkpoint} was trained with {before[name]!r}; keep it, or give another "
                    "--output_dir"
                )
        if (state["data"], state["train_tokens"]) != (self.manifest.tokenizer_sha256, self.blocks.num_tokens):
            raise ConfigurationError(
                f"{self.config.data}: not the data that {checkpoint} was trained on; give that, or another --output_dir"
            )
        path = checkpoint / "model.safetensors"
        copy_from_huggingface(read_tensors(path), dict(self.model.named_parameters()), self.model.config, str(path))
        self.step = state["step"]

    def _load_optimizer(self, checkpoint: Path) -> None:
        from .checkpoint import load_optimizer_tensors

        tensors = load_optimizer_tensors(checkpoint)
        for name, tensor in self.scaler.state().items():
            tensor.copy_(tensors[name])
        self.optimizer.load_tensors(tensors, str(checkpoint))

    # Several processes

    def _check_processes(self) -> None:
        """All of them must be about to do the same."""
        import torch

        from .parallel.processes import add_bits

        config, size = self.config, self.processes.size
        config.check_processes(size)
        if size == 1:
            return
        settings = {key: value for key, value in _flatten(to_dict(config)).items() if key not in ("output_dir", "data")}
        facts = {
            "step": self.step,
            "data": self.manifest.tokenizer_sha256,
            "train tokens": self.blocks.num_tokens,
            "sum of the weights": int(add_bits([parameter.detach() for parameter in self.model.parameters()])),
        }
        self.processes.compare(
            {**facts, "torch": torch.__version__, **settings},
            "all need the same versions, settings, data, checkpoints and initial model; output_dir must be on a disk that "
            "all machines share",
        )

    # Settling what the configuration leaves open

    def _settle_vocabulary(self) -> None:
        if self.config.model.vocab_size not in (None, self.manifest.vocab_size):
            raise ConfigurationError(
                f"model.vocab_size: {self.config.model.vocab_size}, but the tokenizer of {self.config.data} has "
                f"{self.manifest.vocab_size} ids; leave it null"
            )
        self.config.model.vocab_size = self.manifest.vocab_size

    def _load_initial_model(self) -> Any:
        from .checkpoint import verify_directory
        from .corpus.tokenizer import load_tokenizer, tokenizer_hash
        from .hf import load_huggingface

        directory = Path(str(self.config.init_from))
        verify_directory(directory)
        model = load_huggingface(directory)
        if tokenizer_hash(load_tokenizer(directory)) != self.manifest.tokenizer_sha256:
            raise ConfigurationError(
                f"init_from: {directory} has another tokenizer than {self.config.data}; prepare the data with "
                f"--tokenizer {directory}"
            )
        longest = model.config.max_position_embeddings - 2
        if self.config.max_seq_length > longest:
            raise ConfigurationError(
                f"max_seq_length = {self.config.max_seq_length}, but the {longest + 2} positions of {directory} are enough "
                f"for {longest} tokens (positions start at 2): lower max_seq_length to {longest}, or start from a model "
                "with more positions"
            )
        # Sizes come from the checkpoint; dropout is a choice of this run.
        sizes = dataclasses.asdict(model.config)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            sizes[name] = getattr(self.config.model, name)
        self.config.model = type(model.config)(**sizes)
        weights = model.state_dict()
        model = type(model)(self.config.model, model.pad_token_id, self.config.gradient_checkpointing)
        model.load_state_dict(weights)
        return model

    def _choose_micro_batch_size(self) -> int:
        """The configured size; for `auto` the largest divisor of a process's batch that should fit."""
        import torch

        from .costs import estimate_memory

        if self.config.micro_batch_size != "auto":
            return self.config.micro_batch_size
        batch = self.config.smallest_batch_size // self.processes.size
        if self.device.type == "cpu":  # a CPU gains nothing from more tokens at once than keep its cores busy
            return max(size for size in _divisors(batch) if size == 1 or size * self.config.max_seq_length <= 4096)
        # What is free, and what this process has taken already for weights and gradients.
        budget = 0.9 * (torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_allocated(self.device))
        size = self.processes.size
        fitting = [one for one in _divisors(batch) if estimate_memory(self.config, one, size)["total"] <= budget]
        return min(self.processes.collect(max(fitting, default=1)))

    def _next_smaller_micro_batch_size(self) -> int:
        batch = self.config.smallest_batch_size // self.processes.size
        return max(size for size in _divisors(batch) if size <= self.micro_batch_size // 2)

    def _read_batches(self) -> Iterator[Any]:
        from .data import move_ahead, training_batches

        batches = training_batches(
            self.blocks,
            self._list_first_samples(),
            self.micro_batch_size,
            seed=self.config.seed,
            static_masking=self.config.masking == "static",
        )
        return move_ahead(batches, self.device)

    def _list_first_samples(self) -> Iterator[int]:
        """Where each of this process's micro-batches begins, in training order, from the current step to the last."""
        for step in range(self.step, self.config.max_steps):
            samples = self.batch_schedule.samples(step)
            share = len(samples) // self.processes.size
            first = samples.start + self.processes.rank * share
            yield from range(first, first + share, self.micro_batch_size)

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP are noted and heeded after the step in progress; a second SIGINT acts at once.

        Not a second SIGTERM: schedulers send it to all processes, and torchrun sends it to its own again.
        """

        def note(number: int, _: Any) -> None:
            self.stop_signal = number
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # What a person reads

    def _say(self, text: str, file: TextIO | None = None) -> None:
        from .log import print_line

        if self.processes.is_first:
            print_line(text, file)

    def _describe(self) -> None:
        from .costs import num_parameters

        config = self.config
        self._say(
            f"{num_parameters(config.model):,} parameters, vocabulary {config.model.vocab_size:,}, {config.precision} on "
            f"{self.device}; {self.blocks.num_tokens:,} tokens in {len(self.blocks):,} sequences of "
            f"{config.max_seq_length}; {config.max_steps:,} steps of {config.train_batch_size:,} sequences, "
            f"{self.micro_batch_size} at once"
            + (f" on each of {self.processes.size}" if self.processes.size > 1 else "")
        )
        self._say(f"{config.data}: {self.blocks.describe_verified()}")
        if len(self.corpora) > 1:
            epochs = self.blocks.count_epochs(self.batch_schedule.samples(config.max_steps - 1).stop)
            for (manifest, weight), size, count in zip(self.corpora, self.blocks.corpus_sizes, epochs):
                self._say(f"  {manifest.directory}, weight {weight:g}: {size:,} sequences, {count:.2f} epochs in all")
        if self.step:
            self._say(f"{self.output_dir}: continuing after step {self.step}")

    def advise_on_divergence(self, step: int) -> str:
        """Where to go on after a loss that was not finite in `step`, and with what; the same settings would lead there."""
        from .checkpoint import get_step, list_checkpoints

        config = self.config
        checkpoints = [path for path in list_checkpoints(self.output_dir) if get_step(path) < step]
        changes = [f"--optimizer.learning_rate below {config.optimizer.learning_rate:g}"]
        if not config.optimizer.max_grad_norm:
            changes.append("--optimizer.max_grad_norm 1")
        if config.precision != "fp32":
            changes.append("--precision fp32" if config.precision == "bf16" else "--precision bf16")
        advice = "try " + " or ".join(changes)
        if not checkpoints:
            return f"no checkpoint was saved before; {advice}, with another --output_dir"
        # A run keeps its settings, so that others make another run.
        return (
            f"the last checkpoint before is {checkpoints[-1]}; {advice}, in a new run from its weights: --init_from "
            f"{checkpoints[-1]} with another --output_dir"
        )

    def _where_to_go_on(self) -> str:
        from .checkpoint import list_checkpoints

        return f"the checkpoint is {list_checkpoints(self.output_dir)[-1]}"

    def _report(self, before: Any, after: Any, checkpoint: Path, seconds: float) -> None:
        """How it went: scores before and after, and five filled-in sentences."""
        from .log import format_seconds

        self._say(
            f"\ntrained in {format_seconds(seconds)}; held-out unigram entropy {self.heldout.unigram_entropy():.3f} nats"
        )
        for name, scores in (("before", before), ("after", after)):
            if scores is not None:
                self._say(f"  {name + ':':8} held-out loss {scores.loss:.3f} nats, accuracy {scores.accuracy:.1%}")
        self._say("one token of a held-out sentence masked and filled in:")
        for text in self.fill_in(5):
            self._say(f"  {text}")
        self._say(f"checkpoint: {checkpoint}")

    def fill_in(self, count: int) -> list[str]:
        """Held-out sentences with one token masked: what the model puts there, and what stood there."""
        import torch

        ids = self.manifest.special_token_ids
        self.model.eval()
        lines = []
        for sentence in self.heldout.sentences(count, at_least=12, at_most=min(48, self.config.max_seq_length - 2)):
            tokens = [ids["bos_token_id"], *sentence, ids["eos_token_id"]]
            place = len(tokens) // 2
            original, tokens[place] = tokens[place], ids["mask_token_id"]
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens], device=self.device))[0, place]
            logits[list(set(ids.values()))] = -torch.inf
            before, filled, was, after = (
                self.tokenizer.decode(part)
                for part in (tokens[1:place], [int(logits.argmax())], [original], tokens[place + 1 : -1])
            )
            verdict = "as written" if filled == was else f"was {was!r}"
            lines.append(f"{before}[{filled}]{after}  ({verdict})")
        self.model.train()
        return lines


class Meter:
    """Sums over a logging interval: on the device what the device knows, on the host what the host knows."""

    def __init__(self, trainer: Trainer):
        import torch

        from .costs import measure_matmul_flops, peak_flops
        from .gpu_monitor import open_gpu_monitor

        self.trainer = trainer
        device = trainer.device
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.peak = peak_flops(properties.name) or measure_matmul_flops(device, trainer.model.compute_dtype)
            self.monitor = open_gpu_monitor(str(properties.uuid))
        else:
            self.peak = measure_matmul_flops(device, trainer.model.compute_dtype)
            self.monitor = None
        self._reset()

    def _reset(self) -> None:
        self.totals: Any = None
        self.skipped: Any = 0.0
        self.is_finite: Any = 1.0  # 0 from the first step on that is not
        self.finite_steps: Any = 0.0  # before that one
        self.norm: Any = None
        self.tokens = 0
        self.flops = 0.0
        self.started = time.monotonic()
        self.first_step = self.trainer.step

    def add(self, totals: Any, norm: Any, found_inf: Any, sizes: list[tuple[int, int]]) -> None:
        """Take note of a step: its sums, tensors on the device; tokens and sum of squared lengths of each micro-batch."""
        from .costs import model_flops_per_step

        for tokens, squares in sizes:
            self.tokens += tokens
            masked = int(tokens * self.trainer.config.mlm_probability)
            self.flops += model_flops_per_step(self.trainer.config.model, tokens, masked, squares)
        self.totals = totals if self.totals is None else self.totals + totals
        self.norm = norm
        self.skipped = self.skipped + found_inf
        self.is_finite = self.is_finite * (1 - found_inf)
        self.finite_steps = self.finite_steps + self.is_finite

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the block's time out of the throughput: evaluation, saving."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def read(self) -> dict[str, float]:
        """The interval's metrics, and begin the next interval. The one place where the host waits for the device.

        Raises:
            NonFiniteError: a loss that is not finite, or gradients that are not, other than fp16's.
        """
        import torch

        from .optim import learning_rate

        trainer = self.trainer
        loss, correct, masked = self.totals.tolist()
        norm, skipped = float(self.norm), int(self.skipped)
        seconds = time.monotonic() - self.started
        counted = torch.tensor([self.tokens, self.flops], dtype=torch.float64, device=trainer.device)
        tokens, flops = trainer.processes.add_up(counted).tolist()
        overflow_is_normal = trainer.config.precision == "fp16" and float(trainer.scaler.scale) >= 1.0
        if skipped and not overflow_is_normal:
            first, step = self.first_step + 1, self.first_step + 1 + int(self.finite_steps)
            raise NonFiniteError(
                f"step {step}: loss or gradient not finite, in {skipped} of steps {first} to {trainer.step}; nothing of it "
                f"reached the weights; {trainer.advise_on_divergence(step)}"
            )
        metrics = {
            "train/loss": loss / max(masked, 1),
            "train/accuracy": correct / max(masked, 1),
            "train/learning_rate": learning_rate(max(trainer.step - 1, 0), trainer.config),
            "train/grad_norm": norm,
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/mfu": flops / seconds / (self.peak * trainer.processes.size),
        }
        if trainer.scaler.enabled:
            metrics |= {"train/loss_scale": float(trainer.scaler.scale), "train/skipped_steps": float(skipped)}
        if self.monitor is not None:
            metrics |= self.monitor.sample(self.tokens)
        self._reset()
        return metrics


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, with tuples and lists alike."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


if __name__ == "__main__":
    sys.exit(run(main))
