"""Settings of a run that follow from its data, the file that records them, and the score of a run that is stopped."""

import json
import os
import signal

import pytest
import yaml
from tiny import prepare_text

from fastroberta.cli.arguments import from_dict, parse_arguments
from fastroberta.config import TrainConfig
from fastroberta.errors import Stopped
from fastroberta.export import main as export
from fastroberta.train import main
from fastroberta.training.run_settings import ROOT
from fastroberta.training.trainer import Trainer

SETTINGS = {
    "device": "cpu", "precision": "fp32", "max_seq_length": 32, "packing": "contiguous", "train_batch_size": 16,
    "num_train_epochs": 2, "logging_steps": 3, "eval_steps": 100, "eval_sequences": 8, "save_steps": 100,
    "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32},
    "lr_scheduler": {"warmup_ratio": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sentences = [f"Document {i} says that {i} and {i + 1} are numbers. It ends here." for i in range(160)]
    return prepare_text(tmp_path_factory.mktemp("data"), "\n\n".join(sentences), 290, heldout_fraction=0.2)


def stop_at(step, settings, *, score_seconds=None):
    """Train until SIGTERM arrives in the middle of a step; return the message."""
    trainer = Trainer(from_dict(TrainConfig, settings))
    train_step = trainer.train_step

    def stop_in_the_step(*arguments):
        train_step(*arguments)
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            if score_seconds is not None:
                trainer.score_seconds = score_seconds

    trainer.train_step = stop_in_the_step
    with pytest.raises(Stopped) as caught:
        trainer.train()
    return str(caught.value)


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run of two epochs, stopped at its third step."""
    out = tmp_path_factory.mktemp("run")
    stop_at(3, {**SETTINGS, "data": str(data), "output_dir": str(out)})
    return out


def test_a_stopped_run_is_scored_after_its_checkpoint(stopped, data, tmp_path):
    last = read_metrics(stopped)[-1]
    assert last["step"] == 3 and last["eval/loss"] > 0
    checkpoint = stopped / "checkpoint-00000003"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["eval_loss"] is None  # written before
    settings = {**SETTINGS, "data": str(data), "output_dir": str(tmp_path)}
    stop_at(3, settings, score_seconds=60)
    assert [line["step"] for line in read_metrics(tmp_path) if "eval/loss" in line] == [0]
    assert (tmp_path / "checkpoint-00000003").is_dir()


def test_the_file_of_a_run_reads_back_and_continues_it(stopped, data, tmp_path, capsys):
    path = stopped / "config.yaml"
    text = path.read_text()
    settings = yaml.safe_load(text)
    assert settings["num_train_epochs"] is None and settings["max_steps"] > 3
    assert settings["lr_scheduler"]["warmup_steps"] == round(settings["max_steps"] / 2)
    assert settings["model"]["max_position_embeddings"] == 34 and settings["model"]["vocab_size"] > 256
    assert "after step 0, on " in text and "torch " in text and "\n#   python " in text
    assert (", commit " in text) == (ROOT / ".git").exists()
    config = parse_arguments(["--config", str(path)], TrainConfig, description="", default_preset="quickstart")
    assert config.output_dir == str(stopped)

    assert main(["--config", str(path)]) == 0
    assert f"{stopped}: continuing after step 3" in capsys.readouterr().out
    assert path.read_text().count("# 20") == 2  # one line per start
    # The settings from which the first one resolved are those of the same run.
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({**SETTINGS, "data": str(data), "output_dir": str(stopped)}))
    assert main(["--config", str(tmp_path / "first.yaml")]) == 0
    assert f"finished after {config.max_steps} steps" in capsys.readouterr().out
    exported = tmp_path / "exported"
    assert export([str(stopped / f"checkpoint-{config.max_steps:08d}"), str(exported)]) == 0
    assert json.loads((exported / "config.json").read_text())["max_position_embeddings"] == 34
    assert json.loads((exported / "tokenizer_config.json").read_text())["model_max_length"] == 32
    assert "positions" not in capsys.readouterr().err


def test_a_file_of_the_user_is_kept_and_untrained_positions_are_told(data, tmp_path, capsys):
    settings = {**SETTINGS, "data": str(data), "output_dir": str(tmp_path / "run"), "num_train_epochs": 0.1}
    settings["model"] = {**SETTINGS["model"], "max_position_embeddings": 66}
    given = "# mine\n" + yaml.safe_dump(settings)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(given)
    assert main(["--config", str(tmp_path / "run" / "config.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "num_train_epochs = 0.1: " in shown
    assert "measuring two steps of 16 sequences in fp32 on cpu ..." in shown
    assert "learning rate 0.00025; in the paper, " in shown and "16 sequences of 32: scaled from 256, 6." in shown
    assert (tmp_path / "run" / "config.yaml").read_text() == given

    assert main(["--config", str(tmp_path / "run" / "config.yaml")]) == 0
    assert (tmp_path / "run" / "config-given.yaml").read_text() == given
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert export([str(checkpoint), str(tmp_path / "exported")]) == 0
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"{checkpoint}: takes texts of 64 tokens but was trained on sequences of 32;")
