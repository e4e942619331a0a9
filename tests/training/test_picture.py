"""The loss curve as text and as a picture."""

import json
import sys

import pytest

from fastroberta.config import TrainConfig
from fastroberta.training import picture
from fastroberta.training.picture import draw_losses, draw_sparkline, read_losses, show_losses


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": 0, "eval/loss": 6.0},
        {"step": 1, "train/loss": 5.5},
        {"step": 2, "train/loss": None},
        {"step": 3, "train/loss": 5.0, "eval/loss": 5.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_losses_are_read_without_gaps(run):
    assert read_losses(run, "train/loss") == ([1, 3], [5.5, 5.0])
    assert read_losses(run, "eval/loss") == ([0, 3], [6.0, 5.2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([3.0], "▁"), ([1.0, 1.0], "▁▁"), ([8.0, 1.0], "█▁"), ([7.0, 6, 5, 4, 3, 2, 1, 0], "█▇▆▅▄▃▂▁")],
)
def test_sparkline(values, expected):
    assert draw_sparkline(values) == expected


def test_long_curves_keep_their_ends():
    line = draw_sparkline([float(value) for value in range(1000, 0, -1)], width=10)
    assert len(line) == 10 and (line[0], line[-1]) == ("█", "▁")


def test_picture_is_written_where_matplotlib_is(run, monkeypatch):
    pytest.importorskip("matplotlib")
    assert draw_losses(run, "a run", 5.3).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_losses(run, "a run", 5.3) is None


def test_the_line_of_text_is_there_without_the_picture_whose_title_says_what_ran(run, monkeypatch):
    titles = []
    monkeypatch.setattr(picture, "draw_losses", lambda directory, title, entropy: titles.append(title))
    config = TrainConfig(output_dir=str(run), precision="fp32")
    assert show_losses(config, False, 5.3) == "loss: █▁"
    assert titles[0].startswith(f"{run.name}: 12 layers of 768, 256 x 512 tokens per step, CPU, fp32, 20")
    monkeypatch.setattr(picture, "draw_losses", lambda *_: run / "loss.png")
    assert show_losses(config, True, 5.3) == f"loss: █▁  ({run}/loss.png)"
