"""What `pip install .` installs: both packages, the CUDA sources and the presets, and nothing called `kernels`."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
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
