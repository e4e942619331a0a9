"""Training on two corpora: resumed to the bit, with the same weights only."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import prepare_text

from fastroberta.cli.arguments import from_dict
from fastroberta.config import TrainConfig
from fastroberta.errors import ConfigurationError
from fastroberta.evaluate import main as evaluate
from fastroberta.prepare import main as prepare
from fastroberta.training.trainer import Trainer

SETTINGS = {
    "precision": "fp32", "max_seq_length": 32, "train_batch_size": 8, "logging_steps": 1, "eval_steps": 4,
    "eval_sequences": 8, "save_steps": 2, "max_steps": 4, "device": "cpu",
    "model": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32,
        "max_position_embeddings": 34,
    },
    "lr_scheduler": {"warmup_steps": 1},
}  # fmt: skip


def check_scores(output_dir, corpora, capsys):
    """The held-out loss of each corpus stands beside that of both, in the run's metrics and in `evaluate`."""
    metrics = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in metrics if "eval/loss" in line][-1]
    alone = [f"eval/loss/{directory}" for directory in corpora]
    assert min(logged[name] for name in alone) < logged["eval/loss"] < max(logged[name] for name in alone)
    capsys.readouterr()
    checkpoint = str(output_dir / "checkpoint-00000004")
    data = ["--data", str(corpora[0]), "--data", f"{corpora[1]}:0.5", "--eval_sequences", "8"]
    assert evaluate([checkpoint, *data]) == 0
    scored = json.loads(capsys.readouterr().out)
    for name in ("eval/loss", *alone):
        assert scored[name] == pytest.approx(logged[name], abs=1e-5)


def test_a_mixture_resumes_to_the_bit_and_keeps_its_weights(tmp_path, capsys):
    one = prepare_text(tmp_path, "\n\n".join(f"Number {i} comes before {i + 1}.\n" for i in range(200)), 280)
    two = tmp_path / "two"
    text = tmp_path / "other.txt"
    text.write_text("\n\n".join(f"Nobody knows why {i} does that.\n" for i in range(100)))
    arguments = ["--tokenizer", str(one), "--workers", "1", "--heldout-fraction", "0.1"]
    assert prepare([str(text), "--out", str(two), *arguments]) == 0

    def train(output_dir, data):
        trainer = Trainer(from_dict(TrainConfig, {**SETTINGS, "data": data, "output_dir": str(tmp_path / output_dir)}))
        trainer.train()
        return load_file(tmp_path / output_dir / "checkpoint-00000004" / "model.safetensors")

    mixture = [str(one), f"{two}:0.5"]
    straight = train("straight", mixture)
    assert f"{two}, weight 0.5: " in capsys.readouterr().out
    (tmp_path / "resumed").mkdir()
    (tmp_path / "straight" / "checkpoint-00000002").rename(tmp_path / "resumed" / "checkpoint-00000002")
    with pytest.raises(ConfigurationError, match=r"data: .*two:0\.6'\], but .* was trained with .*two:0\.5'\]"):
        train("resumed", [str(one), f"{two}:0.6"])
    resumed = train("resumed", mixture)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    check_scores(tmp_path / "straight", [one, two], capsys)
    other = train("other", [str(one), f"{two}:2"])
    assert not all(torch.equal(straight[name], other[name]) for name in straight)
