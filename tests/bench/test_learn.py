"""The learning comparison: same start, same data, same score; steps that fit the time; a chart of what the lines say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import prepare_text

from bench import learn
from bench.learn import ATTENTIONS, OURS, Plan, Point
from bench.record import read_lines
from fastroberta.data import training_batches

EAGER = next(iter(ATTENTIONS))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    texts = [f"The number {n} is followed by {n + 1}. After that comes {n + 2}, and so on." for n in range(300)]
    data = prepare_text(tmp_path_factory.mktemp("learn"), "\n\n".join(texts), 300)
    return Plan(
        str(data),
        "fp32",
        steps=12,
        every=6,
        layers=1,
        hidden=32,
        heads=1,
        length=32,
        sequences=4,
        heldout=8,
        dropout=0.0,
    )


class Parent:
    """The other end of a trainer's pipe: it lets every segment begin, and keeps the points."""

    def __init__(self):
        self.points = []

    def send(self, answer):
        status, point = answer
        assert status == "done"
        self.points.append(point)

    def recv(self):
        return "segment"


def test_both_learn_the_same_from_the_same_start(plan):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    runs = []
    for train in (learn.train_ours, lambda *given: learn.train_theirs(*given, "eager")):
        parent = Parent()
        train(parent, plan)
        assert [point.step for point in parent.points] == [0, 6, 12]
        assert parent.points[0].seconds == 0 and np.all(np.diff([point.seconds for point in parent.points]) > 0)
        runs.append([point.loss for point in parent.points])
    ours, theirs = runs
    assert ours[0] == theirs[0]  # to the bit
    assert ours[2] < ours[0] - 0.2 and ours[2] == pytest.approx(theirs[2], abs=0.1)


def test_they_get_our_blocks_in_our_order(plan):
    examples = learn.list_examples(plan)
    assert len(examples) == plan.steps * plan.sequences
    batches = training_batches(
        learn.open_blocks(plan, "train"), range(0, len(examples), plan.sequences), plan.sequences, seed=plan.seed
    )
    for step, batch in enumerate(batches):
        mine = examples[step * plan.sequences : (step + 1) * plan.sequences]
        assert torch.equal(batch.input_ids, torch.stack([one["input_ids"] for one in mine]))
        assert all(one["special_tokens_mask"][0] == 1 for one in mine)  # <s>


def test_as_many_steps_as_fit(plan, monkeypatch):
    """One step of ours takes 1 s, of eager 3 and of sdpa 2; starting takes 30 s and a score 5, by a clock of ours."""
    clock = [1000.0]
    seconds = dict(zip((OURS, *ATTENTIONS), (1.0, 3.0, 2.0)))

    def train_in_turn(ways, given):
        for turn in range(3):
            for way in ways:
                clock[0] += (seconds[way] * given.every if turn else 5) + 5
                yield way, Point(turn * given.every, turn * given.every * seconds[way], 0.0, 1.0, 0.0)

    monkeypatch.setattr(learn, "train_in_turn", train_in_turn)
    monkeypatch.setattr(learn.time, "monotonic", lambda: clock[0])
    theirs, chosen = learn.choose_steps(plan, 2, 1000.0 + 3600)
    assert ATTENTIONS[theirs] == "sdpa"
    taken = clock[0] - 1000 + 2 * (30 + 10 * (learn.POINTS + 1) + chosen.steps * 3)
    assert chosen.steps == chosen.every * learn.POINTS and 3600 - 2 * 3 * learn.POINTS < taken <= 3600


def test_lines_become_words_and_a_chart(plan, tmp_path):
    pytest.importorskip("matplotlib")
    lines = [
        {
            "implementation": way,
            "seed": seed,
            "tokens": 100 * step,
            "seconds": pace * step,
            "loss": 9 - step + seed / 100,
        }
        for way, pace in ((OURS, 1.0), (EAGER, 2.0))
        for seed in (1, 2)
        for step in range(5)
    ]
    said = learn.describe(lines)
    assert (
        said[0] == f"{OURS}: 400 tokens in 4, 4 s; held-out loss 5.0100, 5.0200, mean 5.0150, standard deviation 0.0071"
    )
    assert said[2] == (
        "theirs over ours: time 2.00x (2.00 to 2.00); loss after the same tokens +0.0000 (+0.0000 to +0.0000), "
        "after the same time +2.0000"
    )
    machine = {"name": "EPYC", "device": "cpu", "cpu": {"cores": 2}, "time": "2026-01-02T03:04:05Z"}
    chart = learn.draw(tmp_path / "cpu-2026-01-02-learn.jsonl", machine, plan, lines, 6.0)
    assert chart.name == "cpu-2026-01-02-learn.png" and chart.stat().st_size > 10_000


@pytest.mark.slow  # 40 s: four processes import transformers
def test_quick_run(plan, tmp_path, capsys):
    out = tmp_path / "learn.jsonl"
    assert learn.main(["--quick", "--data", plan.data, "--out", str(out)]) == 0
    lines = [line for line in read_lines(out) if line["kind"] == "learn"]
    assert [(line["implementation"], line["step"]) for line in lines] == [
        (way, step) for step in (0, 2, 4) for way in (OURS, EAGER)
    ]
    assert lines[0]["loss"] == lines[1]["loss"] and out.with_suffix(".png").exists()
    assert "theirs over ours: time" in capsys.readouterr().out
