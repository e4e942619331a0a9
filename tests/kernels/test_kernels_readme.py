"""The examples of the kernels' README run as they stand there, and are as short as they claim to be."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import fastroberta_kernels
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
def test_example_is_short(example):
    """Five lines, or a page that makes a layer of several kernels."""
    lines = [line for line in example.splitlines() if line]
    assert len(lines) <= (30 if "class " in example else 5)
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


class Attention(nn.Module):
    """Attention as timm's vision transformers have it, whose package is no dependency of the tests."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block as timm's vision transformers have it."""

    def __init__(self, width=32, num_heads=4):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 48), act=nn.GELU(), fc2=nn.Linear(48, width)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_a_block_of_a_vision_transformer():
    """The example's block computes what the block it was made of computes."""
    (example,) = [example for example in EXAMPLES if "ViTBlock" in example]
    names = {}
    exec(compile(example, "kernels/README.md", "exec"), names)
    torch.manual_seed(0)
    block = Block()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    results = []
    for module in (block, names["ViTBlock"](block)):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
