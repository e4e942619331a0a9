"""evaluate and export as programs, on a checkpoint that never saw training."""

import json
import os
import shutil

import pytest
import torch
from tiny import prepare_text

from fastroberta.cli.program import run
from fastroberta.config import ModelConfig
from fastroberta.corpus.tokenizer import load_tokenizer, train_tokenizer
from fastroberta.evaluate import main as evaluate
from fastroberta.export import main as export
from fastroberta.hf import load_huggingface, save_huggingface
from fastroberta.model import RobertaForMaskedLM


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    documents = [f"Document {i} says that {i} and {i + 1} are numbers. It ends here." for i in range(200)]
    return prepare_text(tmp_path_factory.mktemp("prepared"), "\n\n".join(documents), 290, heldout_fraction=0.3)


@pytest.fixture(scope="module")
def checkpoint(prepared, tmp_path_factory):
    tokenizer = load_tokenizer(prepared)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=32, max_position_embeddings=34,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    model.init_weights(2)
    directory = tmp_path_factory.mktemp("checkpoint")
    save_huggingface(model, tokenizer, directory)
    return directory


def evaluate_arguments(checkpoint, data, *more):
    return [str(checkpoint), "--data", str(data), "--max_seq_length", "32", "--device", "cpu", *more]


def test_evaluate_gives_the_same_scores_every_time(checkpoint, prepared, capsys):
    scores = []
    for size in ("3", "16"):
        assert evaluate(evaluate_arguments(checkpoint, prepared, "--micro_batch_size", size)) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0]["masked_tokens"] == scores[1]["masked_tokens"] > 50
    assert scores[0]["eval/loss"] == pytest.approx(scores[1]["eval/loss"], abs=1e-6)
    assert scores[0]["eval/loss"] == pytest.approx(torch.tensor(290.0).log().item(), abs=0.3)  # an untrained model
    assert scores[0]["eval/perplexity"] == pytest.approx(torch.tensor(scores[0]["eval/loss"]).exp().item(), rel=1e-3)


def test_evaluate_refuses_what_does_not_fit(checkpoint, prepared, tmp_path, capsys):
    def fails(arguments, code, message):
        assert run(lambda: evaluate(arguments)) == code
        assert message in capsys.readouterr().err

    fails(evaluate_arguments(checkpoint, prepared, "--max_seq_length", "64"), 2, "positions for 32")
    fails(evaluate_arguments(checkpoint, tmp_path), 3, "has no manifest.json")
    fails(evaluate_arguments(tmp_path, prepared), 6, "config.json: no such file")
    other = tmp_path / "other"
    save_huggingface(load_huggingface(checkpoint), train_tokenizer(["other words entirely " * 9] * 9, 270), other)
    fails(evaluate_arguments(other, prepared), 2, "another tokenizer")


def test_export_is_what_transformers_loads(checkpoint, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert export([str(checkpoint), str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"optimizer.safetensors", "trainer_state.json", "manifest.json"}
    fill = transformers.pipeline("fill-mask", model=str(out))
    assert len(fill("Document 3 says that <mask> and 4 are numbers.")) == 5
    assert run(lambda: export([str(checkpoint), str(out)])) == 2
    assert "not an empty directory" in capsys.readouterr().err


def test_evaluate_refuses_a_state_without_settings(checkpoint, prepared, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "trainer_state.json").write_text("{}")
    assert run(lambda: evaluate(evaluate_arguments(tmp_path / "copy", prepared))) == 6
    message = capsys.readouterr().err
    assert "trainer_state.json: has no settings under config" in message and message.count("\n") == 1


def test_export_refuses_heads_that_do_not_divide_the_width(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": 5}))
    assert run(lambda: export([str(tmp_path / "copy"), str(tmp_path / "out")])) == 6
    message = capsys.readouterr().err
    assert "config.json: hidden_size = 32 must be a multiple of num_attention_heads = 5" in message
    assert not (tmp_path / "out").exists()


def test_an_export_can_be_read_by_whom_the_umask_lets(checkpoint, tmp_path):
    before = os.umask(0o022)
    try:
        assert export([str(checkpoint), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


def test_an_export_that_fails_leaves_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    def fill_the_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("fastroberta.hf.save_tokenizer", fill_the_disk)
        assert run(lambda: export([str(checkpoint), str(tmp_path / "out")])) == 6
    assert "out: cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert export([str(checkpoint), str(tmp_path / "out")]) == 0
