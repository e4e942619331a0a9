"""The house keeps its shape: imports point one way, and the top level holds what it should."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each floor may import from the floors before it; programs also from programs before them.
FLOORS = [
    ["errors"],
    ["config", "tokenizer", "shards", "text", "deduplicate", "quickstart", "directories"],
    ["arguments", "data", "model", "optim", "distributed", "metrics", "sentences"],
    ["checkpoint", "sharding"],
    ["hf"],
    ["pieces", "assemble"],
    ["prepare"],
    ["evaluate", "plan"],
    ["export"],
    ["train", "torchrun"],
]
KERNEL_FLOORS = [
    ["_dispatch", "_cuda"],
    ["philox"],
    ["attention", "layer_norm", "masking", "lamb"],
    ["gelu", "embedding"],
    ["cross_entropy"],
    ["huggingface"],
]


def list_imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it; a relative import begins with its dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base + alias.name for alias in node.names} if base.strip(".") == "" else {base}
    return found


def hold_floors(directory: Path, floors: list[list[str]]) -> None:
    floor_of = {name: level for level, names in enumerate(floors) for name in names}
    for path in sorted(directory.glob("*.py")):
        if path.stem == "__init__":
            continue
        assert path.stem in floor_of, f"{path.name} has no floor; decide which and add it here"
        for name in list_imports(path):
            if name.startswith("."):
                target = name.strip(".").split(".")[0]
                assert floor_of[target] < floor_of[path.stem], f"{path.name} imports {target} from its floor or above"


def test_trainer_floors():
    hold_floors(ROOT / "fastroberta", FLOORS)


def test_kernel_floors():
    hold_floors(ROOT / "kernels" / "fastroberta_kernels", KERNEL_FLOORS)


def test_kernels_stand_alone():
    """They import torch, and Triton through one file; optional packages where they are used."""
    standard = sys.stdlib_module_names | {"torch"}
    for path in (ROOT / "kernels" / "fastroberta_kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in list_imports(path) if not name.startswith(".")}
        allowed = standard | {"triton"} if path.stem == "_dispatch" else standard
        if path.stem == "_cuda":
            allowed = standard | {"cuda"}
        if path.stem == "huggingface":
            allowed = standard | {"transformers"}
        assert roots <= allowed, f"{path.name} imports {roots - allowed}"


@pytest.mark.parametrize("package", ["fastroberta_kernels", "fastroberta_kernels.huggingface"])
def test_importing_the_kernels_imports_no_trainer_and_no_transformers(package):
    code = f"import {package}, sys; print([m for m in ('fastroberta', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_imports_no_torch():
    """Start-up: the programs parse their arguments before they import what takes a second."""
    for program in ("train", "evaluate", "export", "prepare"):
        code = (
            f"import sys, runpy; sys.argv = ['{program}', '--help']\n"
            f"try: runpy.run_module('fastroberta.{program}', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as stop: assert not stop.code\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_kernels_folder_is_no_package():
    """A package called `kernels` would shadow Hugging Face's, and transformers would no longer import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_apex_is_no_dependency():
    """The package index has another project under that name."""
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text()
    assert "apex" not in text


def test_constraints_leave_cuda_to_torch():
    """torch 2.13.0 requires cuda-toolkit==13.0.3: pinned to another version it cannot be installed beside a GPU."""
    names = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert len(names) > 50
    pinned = {name for name in names if name.startswith(("nvidia-", "cuda-"))}
    assert pinned <= {"nvidia-ml-py", "cuda-core"}  # neither belongs to a version of CUDA
