"""What torchrun starts for test_distributed.py: `train` is the program itself; `tasks` runs several trainings in a row,
because meeting takes longer than training, and writes what came of each."""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from fastroberta.cli.arguments import from_dict
from fastroberta.cli.program import run
from fastroberta.config import TrainConfig
from fastroberta.errors import FastRobertaError
from fastroberta.parallel import traffic
from fastroberta.parallel.processes import join_processes
from fastroberta.train import main
from fastroberta.training.meter import Meter
from fastroberta.training.trainer import Trainer


def run_task(task, processes):
    config = from_dict(TrainConfig, task["config"])
    traffic.BUCKET_BYTES = task.get("bucket_bytes", 25 * 2**20)
    if task.get("other_seed_on") == processes.rank:
        config.seed += 1
    trainer = Trainer(config, processes)
    if "memory_for" in task:  # sequences at once, by rank
        limit, loss = task["memory_for"][processes.rank], trainer.loss

        def loss_or_not(input_ids, *arguments):
            if len(input_ids) > limit:
                raise torch.OutOfMemoryError("no more")
            return loss(input_ids, *arguments)

        trainer.loss = loss_or_not
    if "start_with" in task:
        trainer.batches.size = task["start_with"]
    if task.get("short", {}).get("rank") == processes.rank:
        run_out_of_memory(trainer, **task["short"])
    if task.get("flip_a_bit_on") == processes.rank:
        step = trainer.train_step

        def step_and_flip(*arguments):
            step(*arguments)
            if trainer.step == 2:
                weight = next(trainer.model.parameters()).data.view(-1)
                weight.view(torch.int32)[7] ^= 1

        trainer.train_step = step_and_flip
    if "slow_save" in task and processes.is_first:
        weights = trainer.optimizer.weights
        trainer.optimizer.weights = lambda: time.sleep(task["slow_save"]) or weights()
    counted = []
    add, Meter.add = Meter.add, lambda *arguments: counted.extend(arguments[-1]) or add(*arguments)
    try:
        trainer.train()
    finally:
        Meter.add = add
    return {"micro_batch_size": trainer.batches.size, "tokens": sum(tokens for tokens, _ in counted)}


def run_out_of_memory(trainer, rank, step, micro_batch, where, limit):
    """Once a micro-batch of more than `limit` sequences is the so-many-th of a step: before the forward, or when the
    backward has reached the first layer."""
    forward, seen = trainer.forward, []

    def raise_it(*_):
        raise torch.OutOfMemoryError("no more")

    def forward_or_not(batch):
        seen.append(trainer.step)
        if trainer.step != step or seen.count(step) != micro_batch + 1 or len(batch.input_ids) <= limit:
            return forward(batch)
        if where == "forward":
            raise_it()
        hook = trainer.model.layer[0].query_key_value.weight.register_hook(lambda _: hook.remove() or raise_it())
        return forward(batch)

    trainer.forward = forward_or_not


def run_tasks(path):
    tasks = json.loads(path.read_text())
    processes = join_processes("cpu", min(task["config"].get("hang_timeout", 60) for task in tasks))
    results = []
    for task in tasks:
        try:
            results.append(run_task(task, processes))
        except FastRobertaError as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    path.with_suffix(f".{processes.rank}").write_text(json.dumps(results))
    processes.leave()


if __name__ == "__main__":
    mode, directory, *arguments = sys.argv[1:]
    if mode == "tasks":
        run_tasks(Path(directory) / "tasks.json")
    else:
        rank = os.environ["RANK"]
        (Path(directory) / f"pid.{rank}").write_text(str(os.getpid()))
        fault, where = os.environ.get("FAULT", "- -").split()
        if where == rank:
            forward, calls = Trainer.forward, itertools.count()

            def fail(*arguments):
                if next(calls) > 50:
                    if fault == "memory":
                        raise torch.OutOfMemoryError("no more")
                    time.sleep(1e6)
                return forward(*arguments)

            Trainer.forward = fail
        code = run(lambda: main(arguments))
        (Path(directory) / f"exit.{rank}").write_text(str(code))
        sys.exit(code)
