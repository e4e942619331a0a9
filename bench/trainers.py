"""The trainers that are compared, each in its own process: ours, and transformers in several configurations.

All train the same model from the same weights on the same blocks in the same order, with 15% of the tokens masked, the
same dropout, the same precision (fp32 weights and moments, matrix products in bf16 where the device is fast at it) and
fused AdamW on all parameters. Ours masks exactly 15% of each sequence and runs the head on those tokens alone.
transformers' collator draws each token independently, and its head computes the logits of all tokens. What is learned is
the same; `python -m bench learn` shows it.

transformers is run as an expert would run it: a plain loop without the overhead of its Trainer, full blocks without an
attention mask, special-token masks computed beforehand, and on a GPU a loader with worker processes and pinned memory.
On a CPU our trainer makes the C library keep freed memory (`keep_freed_memory`), which transformers does not do; one
configuration shows what transformers would gain from it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fastroberta_kernels.masking import mask_tokens
from torch.profiler import record_function

from fastroberta.config import LRSchedulerConfig, ModelConfig, OptimizerConfig, TrainConfig
from fastroberta.corpus.manifest import load_manifest
from fastroberta.data import masking_arguments, open_split, permute, training_batches
from fastroberta.gpu_monitor import open_gpu_monitor
from fastroberta.hf import to_huggingface
from fastroberta.model import RobertaForMaskedLM
from fastroberta.parallel.processes import keep_freed_memory
from fastroberta.training.trainer import Trainer

from .case import Absent, need_package
from .trace import record_trace, sum_regions

SEED, MLM_PROBABILITY, LEARNING_RATE = 1, 0.15, 1e-4
SAMPLES = 200_000  # of the training order that are laid out in advance


class Task(NamedTuple):
    """What is trained; the same for all."""

    data: str  # prepared directory
    layers: int
    hidden: int
    heads: int
    intermediate: int
    length: int
    sequences: int  # of a step, all at once
    precision: str
    dropout: float = 0.1
    vocabulary: int = 50265  # rows of the head, whichever tokenizer made the ids: the work is roberta-base's


class Way(NamedTuple):
    """How it is trained."""

    ours: bool = False
    attention: str = "sdpa"
    compiled: bool = False
    graph: bool = False  # ours, replayed as CUDA graphs
    kernels: bool = False  # our kernels inside transformers' model
    keep_memory: bool = False  # transformers with `keep_freed_memory`
    precision: str | None = None  # instead of the task's


WAYS = {
    "fastroberta": Way(ours=True),
    "fastroberta, torch.compile": Way(ours=True, compiled=True),
    "fastroberta, CUDA graph": Way(ours=True, graph=True),
    "transformers eager": Way(attention="eager"),
    "transformers eager, memory kept": Way(attention="eager", keep_memory=True),
    "transformers sdpa": Way(),
    "transformers sdpa, fp32": Way(precision="fp32"),
    "transformers sdpa, torch.compile": Way(compiled=True),
    "transformers flash_attention_2": Way(attention="flash_attention_2"),
    "transformers, our kernels": Way(kernels=True),
}
EXACT = "exact"  # transformers in fp64, for checking


def build_config(task: Task, output_dir: str, *, compiled: bool = False, graph: bool = False) -> TrainConfig:
    """The settings of our trainer for a task."""
    model = ModelConfig(
        vocab_size=task.vocabulary, hidden_size=task.hidden, num_hidden_layers=task.layers, num_attention_heads=task.heads,
        intermediate_size=task.intermediate, max_position_embeddings=task.length + 2,
        hidden_dropout_prob=task.dropout, attention_probs_dropout_prob=task.dropout,
    )  # fmt: skip
    return TrainConfig(
        data=[task.data], output_dir=output_dir, seed=SEED, precision=task.precision,
        max_seq_length=task.length, packing="contiguous", mlm_probability=MLM_PROBABILITY, train_batch_size=task.sequences,
        micro_batch_size=task.sequences, torch_compile=compiled, cuda_graph=graph, model=model,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        lr_scheduler=LRSchedulerConfig(name="constant", warmup_steps=0),
    )  # fmt: skip


class Data:
    """The blocks of a task, cut and masked as our trainer does it."""

    def __init__(self, task: Task):
        self.manifest = load_manifest(task.data)
        self.masking = masking_arguments(self.manifest, MLM_PROBABILITY)
        self.blocks = open_split(
            self.manifest, "train", max_seq_length=task.length, packing="contiguous", attention_scope="block"
        )

    def mask_one_sequence(self) -> tuple[Any, int]:
        """A masked sequence to check with, the same for every way, and how many of its tokens are masked."""
        batch = next(training_batches(self.blocks, [0], 1, seed=SEED))
        masked = mask_tokens(batch.input_ids, seed=SEED, sample_ids=batch.sample_ids, **self.masking)
        return masked, int((masked.labels >= 0).sum())


class Ours:
    """Our trainer, whose own step is timed."""

    def __init__(self, task: Task, way: Way):
        self.folder = tempfile.TemporaryDirectory()
        if not torch.cuda.is_available():
            if way.graph:
                raise Absent("needs a GPU")
            keep_freed_memory()  # as `fastroberta.train` does
        self.trainer = Trainer(build_config(task, self.folder.name, compiled=way.compiled, graph=way.graph))
        self.device = self.trainer.device
        self.masked, self.count = Data(task).mask_one_sequence()
        self.tokens = task.sequences * task.length
        self.last_loss: Any = None

    def add(self, totals: Any, *_: Any) -> None:
        """In place of a meter, which the trainer tells its sums after a step: keep the loss, on the device."""
        self.last_loss = totals[0] / totals[2]

    def check(self) -> dict[str, float]:
        """Loss and gradient norm of one sequence without dropout."""
        self.trainer.optimizer.zero_grad()
        result = self.trainer.model.eval().loss(*(value.to(self.device) for value in self.masked))
        self.trainer.model.train()
        (result.loss / self.count).backward()
        norm = torch.cat([p.grad.flatten() for p in self.trainer.model.parameters()]).double().norm()
        return {"loss": result.loss.item() / self.count, "gradient_norm": norm.item()}

    def step(self) -> None:
        self.trainer.train_step(self)
        self.trainer.step += 1


class Transformers:
    """`RobertaForMaskedLM` and `DataCollatorForLanguageModeling` in a plain loop."""

    def __init__(self, task: Task, way: Way):
        need_package("transformers", gpu=False, device=torch.device("cpu"))
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if way.attention == "flash_attention_2":
            need_package("flash-attn", gpu=True, device=self.device)
        self.way, self.precision = way, way.precision or task.precision
        data = Data(task)
        # The same initial weights: ours, under their names.
        model_config = build_config(task, "").model
        ours = RobertaForMaskedLM(model_config, data.manifest.special_token_ids["pad_token_id"])
        ours.init_weights(SEED)
        if way.keep_memory:
            if self.device.type == "cuda":
                raise Absent("a matter of the CPU's memory")
            keep_freed_memory()
        weights = to_huggingface(dict(ours.named_parameters()), model_config)
        config = transformers.RobertaConfig(
            vocab_size=task.vocabulary, hidden_size=task.hidden, num_hidden_layers=task.layers,
            num_attention_heads=task.heads, intermediate_size=task.intermediate,
            max_position_embeddings=task.length + 2, type_vocab_size=1, layer_norm_eps=1e-5,
            hidden_dropout_prob=task.dropout, attention_probs_dropout_prob=task.dropout,
            attn_implementation=way.attention,
        )  # fmt: skip
        self.model = transformers.RobertaForMaskedLM(config)
        missing = self.model.load_state_dict(weights, strict=False).missing_keys
        assert all("decoder" in name or "position_ids" in name for name in missing), missing
        self.model.tie_weights()
        self.model.to(self.device).train()
        self.masked, self.count = data.mask_one_sequence()
        self.tokens = task.sequences * task.length
        on_gpu = self.device.type == "cuda"
        self.loader = load_batches(data, task, workers=min(4, (os.cpu_count() or 2) - 1) if on_gpu else 0)
        del ours, weights
        if self.precision == "fp64":
            self.model.double()
            return
        if way.kernels:
            try:
                from fastroberta_kernels import huggingface
            except ImportError as error:
                raise Absent("fastroberta_kernels.huggingface is not there") from error
            huggingface.apply(self.model)
        self.run_model = torch.compile(self.model) if way.compiled else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )
        self.last_loss: Any = None

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def check(self) -> dict[str, float]:
        ids, positions, labels = self.masked
        spread_labels = torch.full_like(ids, -100).scatter_(1, positions, labels)
        probabilities = {module: module.p for module in self.model.modules() if isinstance(module, torch.nn.Dropout)}
        for module in probabilities:
            module.p = 0.0
        with self._autocast():
            loss = self.model(input_ids=ids.to(self.device), labels=spread_labels.to(self.device)).loss
        loss.backward()
        norm = torch.stack([p.grad.double().norm() for p in self.model.parameters() if p.grad is not None]).norm()
        self.model.zero_grad(set_to_none=True)
        for module, probability in probabilities.items():
            module.p = probability
        return {"loss": loss.item(), "gradient_norm": norm.item()}

    def step(self) -> None:
        with record_function("data"):
            batch = next(self.loader)
            batch = {name: batch[name].to(self.device, non_blocking=True) for name in ("input_ids", "labels")}
        with record_function("forward"), self._autocast():
            loss = self.run_model(**batch).loss
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.last_loss = loss.detach()


def load_batches(data: Data, task: Task, *, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of transformers' collator: our trainer's blocks in our trainer's order.

    All blocks and their special-token masks are in memory beforehand, as a user's data set would not be.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(data.manifest.directory))
    blocks = data.blocks
    special = torch.tensor(sorted(set(data.manifest.special_token_ids.values())))
    examples = []
    for number in np.arange(len(blocks)):
        ids = blocks.read(number[None], number[None], int(number)).input_ids[0]
        examples.append({"input_ids": ids, "special_tokens_mask": torch.isin(ids, special).long()})
    epochs = range(-(-min(SAMPLES, 50 * len(blocks)) // len(blocks)))
    order = [int(index) for epoch in epochs for index in permute(np.arange(len(blocks)), len(blocks), SEED, epoch)]
    steps = [order[at : at + task.sequences] for at in range(0, len(order) - task.sequences + 1, task.sequences)]
    loader = torch.utils.data.DataLoader(
        examples,
        batch_sampler=steps,
        collate_fn=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _serve(connection: Any, name: str) -> None:
    """What a worker runs: it answers commands until its pipe is closed."""
    trainer: Any = None
    while True:
        try:
            command, argument = connection.recv()
        except EOFError:
            return
        try:
            if command == "build":
                trainer = None
                gc.collect()  # a trainer and the generator of its batches hold each other
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                torch.manual_seed(SEED)
                way = Way(precision="fp64", attention="eager") if name == EXACT else WAYS[name]
                trainer = Ours(argument, way) if way.ours else Transformers(argument, way)
                answer: Any = None
            elif command == "check":
                answer = trainer.check()
            elif command == "steps":
                answer = run_steps(trainer, argument)
            else:
                answer = sum_regions(record_trace(trainer.step, trainer.device))
            connection.send(("done", answer))
        except Absent as absence:
            connection.send(("absent", str(absence)))
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            connection.send(("failed", f"{type(error).__name__}: {reason}\n{traceback.format_exc()}"))


def run_steps(trainer: Ours | Transformers, count: int) -> dict[str, float]:
    """Run so many steps; returns their seconds, how many of those the host needed to launch the work, loss and memory."""
    on_gpu = trainer.device.type == "cuda"
    monitor = None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        monitor = open_gpu_monitor(str(torch.cuda.get_device_properties(0).uuid))
    else:
        forget_peak_bytes()
    started = time.perf_counter()
    for _ in range(count):
        trainer.step()
    launched = time.perf_counter() - started
    if on_gpu:
        torch.cuda.synchronize()
    result = {"seconds": time.perf_counter() - started, "host_seconds": launched, "steps": count}
    result["loss"] = float(trainer.last_loss)
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else read_peak_bytes()
    if monitor is not None:
        result |= monitor.sample(count * trainer.tokens)
        monitor.close()
    return result


def forget_peak_bytes() -> None:
    """Reset this process's peak memory, where the system allows it (Linux: proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_peak_bytes() -> int:
    """The most memory that this process has had in use, since `forget_peak_bytes` on Linux, elsewhere since it began."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Failure(Exception):
    """A worker could not carry out a command; `status` is "absent", "failed" or "skipped"."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


class Worker:
    """A process that trains one way. It waits, and uses no processor, until it is asked.

    Args:
        name: of the way. serve: what the process runs, given its end of the pipe, the name and `arguments`. It answers
            with pairs: "done" and a result, or "absent" or "failed" and the reason.
    """

    def __init__(self, name: str, serve: Callable[..., None] = _serve, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        # Not a daemon: a loader's worker processes are its children.
        self._process = context.Process(target=serve, args=(other, name, *arguments))
        self._process.start()
        other.close()

    def ask(self, command: str, argument: Any = None) -> Any:
        """Send a command and wait for its answer; raises what `hear` raises."""
        self.tell(command, argument)
        return self.hear()

    def tell(self, command: str, argument: Any = None) -> None:
        """Send a command without waiting for its answer, which `hear` returns."""
        with contextlib.suppress(OSError):  # a dead worker is noticed by `hear`
            self._connection.send((command, argument))

    def hear(self, deadline: float = float("inf")) -> Any:
        """The answer to the last command.

        Raises:
            Failure: the worker could not do it, died, or was ended because it had not answered at `deadline`, a value of
                time.monotonic().
        """
        try:
            # A day at most: the system takes no longer time.
            if not self._connection.poll(min(max(0.0, deadline - time.monotonic()), 86_400.0)):
                self._process.kill()
                raise Failure("skipped", "not ready in time")
            status, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Failure("failed", "the process ended, perhaps for lack of memory") from error
        if status != "done":
            raise Failure(status, answer)
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
