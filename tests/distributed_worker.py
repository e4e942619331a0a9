"""What torchrun starts for test_distributed.py: `train` is the program itself; `tasks` runs several trainings in a row,
because meeting takes longer than training, and writes what came of each."""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from fastroberta.arguments import from_dict, run
from fastroberta.config import TrainConfig
from fastroberta.distributed import join_processes
from fastroberta.errors import FastRobertaError
from fastroberta.train import Trainer, main


def run_task(task, processes):
    config = from_dict(TrainConfig, task["config"])
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
    trainer.train()
    return {"micro_batch_size": trainer.micro_batch_size}


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
        if os.environ.get("SLEEPING_RANK") == rank:
            forward, calls = Trainer._forward, itertools.count()
            Trainer._forward = lambda *arguments: time.sleep(1e6 if next(calls) > 50 else 0) or forward(*arguments)
        code = run(lambda: main(arguments))
        (Path(directory) / f"exit.{rank}").write_text(str(code))
        sys.exit(code)
