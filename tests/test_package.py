"""What `pip install .` installs: both packages, the CUDA sources and the presets, nothing called `kernels`, and with each
extra all that its programs need."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CARRIED = (
    "fastroberta/train.py",
    "fastroberta/presets/roberta-base.yaml",
    "fastroberta_kernels/attention.py",
    "fastroberta_kernels/csrc/fused_lamb.cu",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy to build in: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("fastroberta", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(source, kind):
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    return source / "dist" / result.stdout.split()[-1]


def test_wheel(source):
    names = zipfile.ZipFile(build(source, "wheel")).namelist()
    assert set(CARRIED) <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]


def test_sdist(source):
    with tarfile.open(build(source, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/fused_lamb.cu", "fastroberta/presets/quickstart.yaml", "pyproject.toml"} <= names
    assert "kernels/fastroberta_kernels/attention.py" in names


@pytest.fixture(scope="module")
def without_extras(source, tmp_path_factory):
    """An environment with the package alone. PyTorch comes first: its wheel may lie on this machine only."""
    environment = tmp_path_factory.mktemp("environments") / "alone"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    torch = install(environment, f"torch=={version('torch').partition('+')[0]}")
    if torch.returncode:
        pytest.skip(f"no package index is within reach: {torch.stderr.strip().splitlines()[-1]}")
    installed = install(environment, str(source))
    assert installed.returncode == 0, installed.stderr
    return environment


def install(environment, what):
    command = [environment / "bin" / "python", "-m", "pip", "install", "--constraint", ROOT / "constraints.txt", what]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True)


def clean_environment():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint, the same with a classifier, and labelled texts."""
    transformers = pytest.importorskip("transformers")
    from fastroberta.config import ModelConfig
    from fastroberta.corpus.tokenizer import train_tokenizer, vocabulary_size
    from fastroberta.hf import save_huggingface
    from fastroberta.model import RobertaForMaskedLM

    directory = tmp_path_factory.mktemp("models")
    texts = ["Anna gives Ben a book.", "Paris is the capital."]
    tokenizer = train_tokenizer(texts * 3, 300)
    config = ModelConfig(
        vocab_size=vocabulary_size(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=32, max_position_embeddings=34,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    model.init_weights(1)
    save_huggingface(model, tokenizer, directory / "masked")
    shutil.copytree(directory / "masked", directory / "classifier")
    names = {"id2label": {0: "person", 1: "place"}, "label2id": {"person": 0, "place": 1}}
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(directory / "masked", **names)
    classifier.save_pretrained(directory / "classifier")
    rows = [f"{text},{label}" for text, label in zip(texts, ("person", "place"))]
    (directory / "data.csv").write_text("\n".join(["text,label", *rows * 8]))
    return directory


@pytest.mark.slow(reason="28 minutes for all three on a busy machine, nearly all of it to install packages")
@pytest.mark.parametrize(
    ("extra", "arguments", "written"),
    [
        ("finetune", ["finetune", "masked", "--train", "data.csv", "--dev", "data.csv", "--epochs", "1"], "predictions.tsv"),
        (
            "onnx",
            ["export", "classifier", "out", "--format", "onnx", "--quantize", "int8", "--file", "data.csv"],
            "model.onnx",
        ),
        ("explain", ["explain", "classifier", "Anna gives Ben a book.", "--steps", "2"], "index.html"),
    ],
)  # fmt: skip
def test_an_extra_brings_what_its_program_needs(source, without_extras, models, tmp_path, extra, arguments, written):
    environment = tmp_path / "environment"
    shutil.copytree(without_extras, environment, symlinks=True, copy_function=os.link)
    for place in ("masked", "classifier", "data.csv"):
        (tmp_path / place).symlink_to(models / place)
    command = [environment / "bin" / "python", "-m", f"fastroberta.{arguments[0]}", *arguments[1:]]
    command += [] if "out" in arguments else ["--out", "out"]
    run = {"cwd": tmp_path, "env": clean_environment(), "capture_output": True, "text": True}
    bare = subprocess.run(command, **run)
    assert bare.returncode == 2 and f"pip install 'fastroberta[{extra}]'" in bare.stderr, bare.stderr
    installed = install(environment, f"{source}[{extra}]")
    assert installed.returncode == 0, installed.stderr
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / written).exists()
