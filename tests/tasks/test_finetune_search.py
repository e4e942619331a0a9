"""The search over learning rates and batch sizes: what it tries, what it keeps, and how it continues."""

import json

import pytest

pytest.importorskip("optuna")
from fastroberta.cli.arguments import parse_arguments
from fastroberta.errors import ConfigurationError, DataError
from fastroberta.finetune import main
from fastroberta.tasks.finetune_search import search_settings
from fastroberta.tasks.finetune_settings import FinetuneConfig


def settle(*words):
    return parse_arguments(
        ["./checkpoint", "--train", "t.csv", "--dev", "d.csv", "--out", "out", *words], FinetuneConfig, description=""
    )


class Training:
    """Stands for a training: the higher the learning rate up to 1e-3, the better. Stops with an error at a call."""

    def __init__(self, stop_at=None):
        self.tried, self.stop_at = [], stop_at

    def __call__(self, config, directory):
        if len(self.tried) == self.stop_at:
            raise KeyboardInterrupt
        self.tried.append((config.learning_rate, config.train_batch_size))
        (directory / "model").mkdir(parents=True)
        value = -abs(config.learning_rate - 1e-3) + config.train_batch_size * 1e-6
        return {"dev": {"accuracy": value}, "seconds": 1.0}


GRID = ["--search", "grid", "--search_learning_rates", "[1e-4, 1e-3, 1e-2]", "--search_batch_sizes", "[4, 8]"]


def test_grid_tries_all_pairs_and_keeps_the_best_model(tmp_path):
    training = Training()
    best = search_settings(settle(*GRID), "accuracy", tmp_path, training)
    assert training.tried == [(rate, size) for rate in (1e-4, 1e-3, 1e-2) for size in (4, 8)]
    assert (best.learning_rate, best.train_batch_size) == (1e-3, 8)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["trial"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[3]["dev"] == {"accuracy": lines[3]["value"]}
    assert [path.parent.name for path in tmp_path.glob("*/model")] == ["seed-1"]
    # Started again, nothing is left to try, and the choice is the same.
    again = Training()
    assert search_settings(settle(*GRID), "accuracy", tmp_path, again) == best
    assert again.tried == []


def test_the_defaults_are_those_of_the_paper(tmp_path):
    training = Training()
    search_settings(settle("--search", "grid", "--trials", "5"), "accuracy", tmp_path, training)
    assert training.tried == [(rate, size) for rate in (1e-5, 2e-5, 3e-5) for size in (16, 32)][:5]


def test_an_interrupted_search_continues_as_if_it_had_not_been(tmp_path):
    words = ["--search", "optuna", "--trials", "9", *GRID[2:]]
    whole = Training()
    best = search_settings(settle(*words), "accuracy", tmp_path / "whole", whole)
    assert len(whole.tried) == len(set(whole.tried)) == 9
    assert all(1e-4 <= rate <= 1e-2 and size in (4, 8) for rate, size in whole.tried)
    first, second = Training(stop_at=6), Training()
    with pytest.raises(KeyboardInterrupt):
        search_settings(settle(*words), "accuracy", tmp_path / "parts", first)
    with (tmp_path / "parts" / "trials.jsonl").open("a") as file:
        file.write('{"trial": 7, "learn')  # cut off while it was written
    assert search_settings(settle(*words), "accuracy", tmp_path / "parts", second) == best
    assert first.tried + second.tried == whole.tried
    text = (tmp_path / "whole" / "trials.jsonl").read_text()
    assert (tmp_path / "parts" / "trials.jsonl").read_text() == text
    (tmp_path / "parts" / "trials.jsonl").write_text(text.replace('"trial": 2', '"trial": 3'))
    with pytest.raises(DataError, match=r"trials.jsonl:2: not a trial"):
        search_settings(settle(*words), "accuracy", tmp_path / "parts", Training())


def test_optuna_looks_where_it_was_good(tmp_path):
    training = Training()
    search_settings(settle("--search", "optuna", "--trials", "20", *GRID[2:]), "accuracy", tmp_path, training)

    def miss(tried):
        return sum(abs(rate - 1e-3) for rate, _ in tried) / len(tried)

    assert miss(training.tried[10:]) < miss(training.tried[:5])


def test_the_best_trial_is_the_first_seed_of_the_result(checkpoint, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "Paris,place\nAnna thanks Ben,person\n" * 8)
    file = str(tmp_path / "train.csv")
    arguments = [str(checkpoint), "--train", file, "--dev", file, "--out", str(tmp_path / "out"), "--epochs", "1",
                 "--precision", "fp32", "--seeds", "2", *GRID[:2], "--search_learning_rates", "[1e-6, 5e-3]",
                 "--search_batch_sizes", "[4]"]  # fmt: skip
    assert main(arguments) == 0
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    best = max(trials, key=lambda trial: trial["value"])
    assert result["runs"][0]["dev"] == best["dev"]
    assert [run["seed"] for run in result["runs"]] == [1, 2]
    assert result["trials"] == trials
    assert result["settings"]["learning_rate"] == best["learning_rate"]
    assert (out / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "3"], "trials = 3: needs --search"),
        (["--search", "grid", "--micro_batch_size", "5"], "must divide search_batch_sizes = 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ConfigurationError, match=message):
        settle(*words)
