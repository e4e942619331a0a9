"""A checkpoint continued in another run: what is kept, what may change, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import prepare_text

from fastroberta.cli.arguments import from_dict
from fastroberta.config import TrainConfig
from fastroberta.errors import CheckpointError, ConfigurationError
from fastroberta.training.trainer import Trainer

SETTINGS = {
    "precision": "fp32", "max_seq_length": 32, "packing": "contiguous", "train_batch_size": 8, "max_steps": 8,
    "logging_steps": 4, "eval_steps": 8, "eval_sequences": 4, "save_steps": 4, "device": "cpu",
    # The second matrix of an untied decoder is saved and continued like every other.
    "model": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32,
        "max_position_embeddings": 34, "tie_word_embeddings": False, "type_vocab_size": 2, "hidden_act": "gelu_new",
    },
    "optimizer": {"learning_rate": 5e-3},
    "lr_scheduler": {"warmup_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lines = [f"{a} gives {b} a book.\n" for a in ("anna", "ben", "clara") for b in ("david", "emma", "felix")]
    return prepare_text(tmp_path_factory.mktemp("data"), "\n".join(lines * 8), 280)


def configure(data, output_dir, **changes):
    return from_dict(TrainConfig, {**SETTINGS, "data": str(data), "output_dir": str(output_dir), **changes})


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finished")
    Trainer(configure(data, output_dir)).train()
    return output_dir


@pytest.fixture(scope="module")
def halfway(finished):
    return finished / "checkpoint-00000004"


def read_last(output_dir, step=8):
    checkpoint = output_dir / f"checkpoint-{step:08d}"
    return {
        key: tensor
        for name in ("model", "optimizer")
        for key, tensor in load_file(checkpoint / f"{name}.safetensors").items()
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_the_same_settings_give_the_same_bits_elsewhere(data, finished, halfway, tmp_path, capsys):
    # The sizes come from the checkpoint, as with init_from.
    Trainer(configure(data, tmp_path, resume_from=str(halfway), model={"num_hidden_layers": 2})).train()
    assert_same(read_last(tmp_path), read_last(finished))
    shown = capsys.readouterr().out
    assert f"{tmp_path}: continuing after step 4" in shown and "continued with" not in shown
    first, *_ = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["step"] == 8


def test_optimizer_schedule_batch_and_length_may_change(data, halfway, tmp_path, capsys):
    changes = {
        "resume_from": str(halfway), "train_batch_size": 4, "max_steps": 10, "save_steps": 3, "save_total_limit": 9,
        "optimizer": {"name": "lamb", "learning_rate": 1e-3}, "lr_scheduler": {"name": "cosine", "warmup_steps": 2},
    }  # fmt: skip
    trainer = Trainer(configure(data, tmp_path / "run", **changes))
    # 4 steps of 8 sequences have been seen; from there on, 4 a step.
    assert [trainer.batches.num_sequences_until(step) for step in (4, 5, 10)] == [32, 36, 56]
    trainer.train()
    assert (
        f"{halfway}: continued with train_batch_size 4, was 8; max_steps 10, was 8; optimizer.name 'lamb', was 'adamw'; "
        "optimizer.learning_rate 0.001, was 0.005; lr_scheduler.name 'cosine', was 'linear'\n"
    ) in capsys.readouterr().out

    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-00000010")
    again = Trainer(configure(data, tmp_path / "stopped", **changes))
    assert again.step == 9 and again.batches.num_sequences_until(9) == 52
    again.train()
    assert_same(read_last(tmp_path / "stopped", 10), read_last(tmp_path / "run", 10))


def test_a_run_that_has_ended_goes_on_with_more_steps(data, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    Trainer(configure(data, run, max_steps=10)).train()
    assert f"{run / 'checkpoint-00000008'}: continued with max_steps 10, was 8\n" in capsys.readouterr().out
    assert (run / "checkpoint-00000010").is_dir()
    with pytest.raises(
        ConfigurationError,
        match=r"max_steps: 8, but .* was trained with 10; keep .* --resume_from .*checkpoint-00000010",
    ):
        Trainer(configure(data, run))


def test_a_loss_scale_belongs_to_its_precision(data, halfway, tmp_path):
    trainer = Trainer(configure(data, tmp_path, resume_from=str(halfway), precision="fp16"))
    assert trainer.step == 4 and trainer.scaler.scale == 2.0**16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 2}, r"seed: 2, but .* was trained with 1; keep that value, .* and --init_from .*checkpoint-00000004"),
        ({"packing": "full-sentences"}, "packing: 'full-sentences', but .* was trained with 'contiguous'; keep"),
        ({"max_steps": 4}, "max_steps = 4, but .* has been trained for 4 already; raise --max_steps"),
        ({"resume_from": "{run}"}, "{run}: the directory of a run, not a checkpoint; give .*checkpoint-00000008"),
        ({"resume_from": "{data}"}, "{data}/manifest.json: not part of a checkpoint; give the directory of one"),
        ({"resume_from": "{data}/.."}, "{data}/..: has no trainer_state.json, so it is not a checkpoint of a run"),
        ({"output_dir": "{run}"}, "resume_from: .* lies in output_dir; give the new run another --output_dir"),
    ],
)
def test_what_cannot_be_continued_is_one_line(data, finished, halfway, tmp_path, changes, message):
    places = {"run": finished, "data": data}
    changes = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    settings = {"output_dir": str(tmp_path), "resume_from": str(halfway), **changes}
    with pytest.raises((ConfigurationError, CheckpointError), match=message.format(**places)):
        Trainer(configure(data, **settings))
