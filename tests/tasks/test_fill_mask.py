"""Masked words filled in: the same answers as transformers' pipeline, from wherever the texts come."""

import importlib
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request

import pytest
import torch

from fastroberta.errors import ConfigurationError, DataError
from fastroberta.fill_mask import main
from fastroberta.tasks.inference import predict_masks

TEXTS = ["The capital of <mask> is Paris.", "<mask> gives Ben a <mask>.", "Ben thanks Anna for the<mask>"]


def fill(checkpoint, capsys, *arguments):
    assert main([str(checkpoint), "--format", "jsonl", "--precision", "fp32", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answers_are_those_of_the_pipeline(checkpoint, capsys):
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("fill-mask", model=str(checkpoint), device="cpu")
    ours = fill(checkpoint, capsys, *TEXTS, "--top_k", "7")
    for one, theirs in zip(ours, pipeline(TEXTS, top_k=7)):
        theirs = theirs if isinstance(theirs[0], list) else [theirs]
        assert len(one["masks"]) == len(theirs) == one["text"].count("<mask>")
        for predictions, expected in zip(one["masks"], theirs):
            assert [p["token_id"] for p in predictions] == [e["token"] for e in expected]
            assert [p["score"] for p in predictions] == pytest.approx([e["score"] for e in expected], abs=1e-5)
            assert [p["token"].strip() for p in predictions] == [e["token_str"].strip() for e in expected]


def test_batches_change_no_answer(checkpoint, capsys, monkeypatch):
    sizes = []

    def count(model, sequences, mask_token_id):
        sizes.append(len(sequences))
        return predict_masks(model, sequences, mask_token_id)

    monkeypatch.setattr("fastroberta.tasks.fill.predict_masks", count)
    together, alone = (fill(checkpoint, capsys, *TEXTS, "--batch_tokens", size) for size in ("1000", "1"))
    assert sizes == [3, 1, 1, 1]
    for one, other in zip(together, alone):
        scores = [[p["score"] for masks in each["masks"] for p in masks] for each in (one, other)]
        assert one["text"] == other["text"] and scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_texts_come_from_files_and_standard_input(checkpoint, capsys, monkeypatch, tmp_path):
    file = tmp_path / "texts.txt"
    odd = "A\f b\u2028 c<mask>"
    file.write_text("\n".join([*TEXTS, " ", odd]) + "\n\n", encoding="utf-8")
    assert main([str(checkpoint), "--file", str(file), "--format", "jsonl"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["text"] for line in shown.out.split("\n")[:-1]] == [*TEXTS, odd]
    assert "2 blank lines are left out" in shown.err
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXTS[0]))
    assert [one["text"] for one in fill(checkpoint, capsys)] == TEXTS[:1]
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    with pytest.raises(ConfigurationError, match="texts: there are none"):
        main([str(checkpoint)])
    with pytest.raises(DataError, match=r"missing\.txt: cannot be read"):
        main([str(checkpoint), "--file", str(tmp_path / "missing.txt")])


def test_bf16_is_less_exact(checkpoint, capsys):
    exact, rough = (
        [p["score"] for p in fill(checkpoint, capsys, TEXTS[0], "--precision", precision)[0]["masks"][0]]
        for precision in ("fp32", "bf16")
    )
    assert exact == pytest.approx(rough, rel=0.1) and exact != pytest.approx(rough, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("program", ["fill_mask", "embed", "finetune"])
def test_a_missing_gpu_is_named(checkpoint, tmp_path, program):
    needed = {
        "fill_mask": TEXTS[:1],
        "embed": ["--out", "v.npy"],
        "finetune": ["--train", "t", "--dev", "d", "--out", "o"],
    }
    run = importlib.import_module(f"fastroberta.{program}").main
    with pytest.raises(ConfigurationError, match="device: cuda was requested, but PyTorch sees no GPU"):
        run([str(checkpoint), *needed[program], "--device", "cuda"])


def test_a_port_in_use_is_named(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port = {port}: cannot be used"):
            main([str(checkpoint), "--demo", "--port", str(port)])


def test_table_shows_every_mask(checkpoint, capsys):
    assert main([str(checkpoint), TEXTS[1], "--top_k", "2"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == TEXTS[1] and [line for line in lines if "mask " in line] == ["  mask 1", "  mask 2"]
    assert len(lines) == 7 and all("%" in line for line in lines[2:4])
    assert "tokens/s" in captured.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no mask here", "text 2 .*no <mask>; write it"),
        ("word " * 60 + "<mask>", "text 2 .*lies beyond the first 32 tokens"),
    ],
)
def test_a_text_that_cannot_be_filled_in_is_named(checkpoint, text, message):
    with pytest.raises(DataError, match=message):
        main([str(checkpoint), TEXTS[0], text])


def test_texts_beside_the_page_are_refused(checkpoint):
    with pytest.raises(ConfigurationError, match="demo takes its texts from the browser"):
        main([str(checkpoint), TEXTS[0], "--demo"])


@pytest.fixture
def page(checkpoint):
    """The address of the demo page, served by the program itself."""
    command = [sys.executable, "-m", "fastroberta.fill_mask", str(checkpoint), "--demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        watchdog = threading.Timer(120, server.kill)
        watchdog.start()
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        yield line.split()[0]
        server.terminate()
        watchdog.cancel()


def test_demo_page(page):
    def get(path, **query):
        with urllib.request.urlopen(f"{page}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return answer.read().decode()

    assert "The capital of France is &lt;mask&gt;." in get("")
    filled = get("", text="<script>alert(1)</script> <mask>")
    assert filled.count("<tr>") == 5 and "<script>" not in filled
    assert len(json.loads(get("fill", text=TEXTS[0]))["masks"][0]) == 5
    assert "no &lt;mask&gt;; write it" in get("", text="none")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        get("fill", text="none")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page was fetched; there is no chromium to show it")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    address = f"{page}?{urllib.parse.urlencode({'text': TEXTS[0]})}"
    shown = subprocess.run([chromium, *flags, address], capture_output=True, text=True, timeout=120).stdout
    assert shown.count("<tr>") == 5
