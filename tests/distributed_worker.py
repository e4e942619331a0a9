"""What torchrun starts for test_distributed.py: `train` is the program itself; `tasks` runs several trainings in a row,
because meeting takes longer than training, and writes what came of each."""

import json
import os
import sys
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
    trainer.train()
    return {"micro_batch_size": trainer.micro_batch_size}


def run_tasks(path):
    processes = join_processes("cpu", 60)
    results = []
    for task in json.loads(path.read_text()):
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
        code = run(lambda: main(arguments))
        (Path(directory) / f"exit.{rank}").write_text(str(code))
        sys.exit(code)
