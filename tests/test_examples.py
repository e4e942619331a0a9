"""The examples, as they are but for smaller settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TINY = (
    "--max_seq_length 32 --model.hidden_size 32 --model.num_hidden_layers 2"
    " --model.num_attention_heads 2 --model.intermediate_size 64 --train_batch_size 8 --max_steps 4"
    " --lr_scheduler.warmup_steps 1 --device cpu"
)
MORE = "--max_steps 20 --optimizer.learning_rate 1e-3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def run(script, *arguments, **environment):
    """The output of a script that runs in the environment of these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": python_path, **environment}
    command = [str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def write_text(path, what):
    path.write_text("\n\n".join(f"Number {i} comes before {i + 1}, says {what}." for i in range(400)))
    return path


@pytest.fixture(scope="module")
def pretrained(folder):
    text = write_text(folder / "text.txt", "Anna")
    run("pretrain.sh", folder / "out", text, VOCABULARY="400", TRAIN=TINY)
    return folder / "out" / "model"


def test_pretrain(pretrained):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in pretrained.iterdir()}


@pytest.mark.slow(reason="10 seconds")
def test_continue(pretrained, folder):
    text = write_text(folder / "other.txt", "Ben")
    out = run("continue.sh", pretrained, folder / "further", text, TRAIN=f"{TINY} {MORE}")
    before, after = (json.loads(line)["eval/loss"] for line in out.splitlines() if line.startswith("{"))
    assert after < before
    assert (folder / "further" / "model" / "config.json").exists()


@pytest.mark.slow(reason="20 seconds")
def test_finetune(pretrained, folder):
    pytest.importorskip("accelerate")
    pytest.importorskip("onnxruntime")
    glue = folder / "SST-2"
    glue.mkdir()
    for name in ("train", "dev"):
        (glue / f"{name}.tsv").write_text("sentence\tlabel\n" + "good\t1\nbad\t0\n" * 8)
    out = run("finetune.sh", pretrained, folder, folder / "tuned", FINETUNE="--epochs 1 --device cpu")
    assert out.splitlines()[-2].endswith("A film that never bores.")


@pytest.mark.slow(reason="20 seconds")
def test_notebook(folder, monkeypatch):
    pytest.importorskip("captum")
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.setenv("QUICKSTART_RUN", str(folder / "notebook"))
    monkeypatch.setenv("QUICKSTART_SETTINGS", "--max_steps 20 --lr_scheduler.warmup_ratio 0.1 --logging_steps 10")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "committed without outputs"
            exec("".join(cell["source"]), namespace)
    assert any(path.suffix == ".html" for path in (folder / "notebook" / "explained").iterdir())
