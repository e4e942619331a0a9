"""Fine-tuning held against a loop in plain PyTorch and transformers, on the same batches: losses, and tokens per second.

    python tests/tasks/plain_finetuning.py CHECKPOINT GLUE_DIRECTORY cola [--seed 3 --learning_rate 1e-4 ...]

trains on the first 800 examples, which is 50 steps of 16. The checkpoint needs dropout probabilities of zero, as the
kernels draw other random numbers than PyTorch.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from fastroberta_kernels import huggingface

from fastroberta.cli.arguments import parse_arguments
from fastroberta.corpus.tokenizer import special_token_ids
from fastroberta.tasks.examples import Examples, make_collate
from fastroberta.tasks.finetune_runs import read_data
from fastroberta.tasks.finetune_settings import FinetuneConfig
from fastroberta.tasks.finetune_train import Place, load_model, make_trainer

CPU = Place(torch.device("cpu"), "fp32")


class StepTimer(transformers.TrainerCallback):
    seconds = 0.0

    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds += time.perf_counter() - self.started


def train_here(config, examples, directory):
    """Losses of the steps by the program's own path, seconds, the micro-batches that it saw, and the model."""
    data = read_data(config)
    train = Examples(data.examples["train"].features[:examples], 0)
    collate = make_collate(special_token_ids(data.tokenizer).pad)
    batches = []

    def record(features):
        batch = collate(features)
        batches.append(batch)
        return batch

    transformers.set_seed(config.seed)
    model = load_model(config.checkpoint, data.task.kind, data.labels)
    if config.kernels:
        huggingface.apply(model)
    dev = Examples(data.examples["dev"].features[:8], 0)
    trainer = make_trainer(
        model, train, dev, data.task, data.labels, config, CPU, record, config.seed, Path(directory)
    )  # fmt: skip
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    micro = config.micro_batch_size or config.train_batch_size
    count = config.epochs * -(-len(train.features) // micro)
    return losses, timer.seconds, [batch for batch in batches if len(batch["input_ids"]) <= micro][:count], model, data


def train_plainly(config, batches, data):
    """Losses, and seconds, of a loop without Trainer and kernels over the same batches, with the same recipe."""
    transformers.set_seed(config.seed)
    model = load_model(config.checkpoint, data.task.kind, data.labels).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)
    warmup = -(-len(batches) * round(100 * config.warmup) // 100)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    losses, seconds = [], 0.0
    for batch in batches:
        started = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - started
    return losses, seconds


if __name__ == "__main__":
    checkpoint, glue, task, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        arguments = [checkpoint, "--task", task, "--data", glue, "--out", directory, "--epochs", "1", *more]
        config = parse_arguments(arguments, FinetuneConfig, description="")
        ours, our_seconds, batches, _, data = train_here(config, 800, directory)
    theirs, their_seconds = train_plainly(config, batches, data)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(
        f"{task}: {len(ours)} steps, losses from {ours[0]:.4f} to {ours[-1]:.4f}, largest difference {difference:.1e}"
    )
    print(f"tokens/s: {tokens / our_seconds:,.0f} here, {tokens / their_seconds:,.0f} plainly: "
          f"{their_seconds / our_seconds:.2f} times")  # fmt: skip
