"""The examples of the kernels' README run as they stand there, and are as short as they claim to be."""

from __future__ import annotations

import re
from pathlib import Path

import fastroberta_kernels
import pytest

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def name_of(example: str) -> str:
    """What it imports from the package."""
    module, name = re.search(r"from fastroberta_kernels(\S*) import (\w+)", example).groups()
    return f"{module.strip('.')}.{name}".strip(".")


@pytest.mark.parametrize("example", EXAMPLES, ids=[name_of(example) for example in EXAMPLES])
def test_example_runs(example, capsys):
    if "transformers" in example:
        pytest.importorskip("transformers")
    exec(compile(example, "kernels/README.md", "exec"), {})
    printed = capsys.readouterr().out
    if printed:
        assert f"```\n{printed}```" in README, "the README shows another output"


@pytest.mark.parametrize("example", EXAMPLES, ids=[name_of(example) for example in EXAMPLES])
def test_example_has_five_lines(example):
    lines = [line for line in example.splitlines() if line]
    assert len(lines) <= 5
    assert max(map(len, lines)) <= 120


def test_every_module_has_an_example():
    assert {name_of(example).split(".")[0] for example in EXAMPLES} == set(fastroberta_kernels.__all__)


def test_every_public_name_of_the_table_exists():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE)
    assert {module for module, _ in rows} == set(fastroberta_kernels.__all__)
    for module, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(getattr(fastroberta_kernels, module), name), f"{module}.{name}"


def test_every_operation_has_an_example():
    rows = re.findall(r"^\| `\w+` \| (.*?) \|", README, re.MULTILINE)
    for operation in re.findall(r"`(\w+)`", " ".join(rows)):
        used = operation if operation != "layer_norm" else "LayerNorm"
        assert any(re.search(rf"\b{used}\(", example) for example in EXAMPLES), operation
