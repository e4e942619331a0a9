"""The house keeps its shape: imports point one way, and the top level holds what it should."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms are folders, and the single files beside them. Each may import itself and what lies on the floors before its own.
FLOORS = [
    ["errors"],
    ["config"],
    ["cli", "costs", "learning_rates", "log", "gpu_monitor"],
    ["corpus"],
    ["data", "model", "optim", "checkpoint"],
    ["parallel", "hf", "precision"],
    ["training"],
    ["tasks"],
    ["ablation"],
    ["prepare", "evaluate", "export", "plan", "torchrun", "fill_mask", "embed", "explain", "finetune", "ablate"],
    ["train"],
    ["__main__"],
]
KERNEL_FLOORS = [
    ["_dispatch", "_cuda"],
    ["philox", "_rows"],
    ["fp8"],
    ["_attention_cpu", "layer_norm", "gelu", "embedding", "masking", "lamb", "rotary"],
    ["_attention_window_cpu"],
    ["attention", "cross_entropy", "fp8_mlp"],
    ["_exchange"],
    ["_hf_attention", "_masked_lm"],
    ["_bert"],
    ["_distilbert", "_mpnet", "_esm", "_modernbert"],
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


def find_room(path: Path, directory: Path) -> str:
    """The first part of a path below the directory, without its ending."""
    return path.relative_to(directory).parts[0].removesuffix(".py")


def hold_floors(directory: Path, floors: list[list[str]]) -> None:
    floor_of = {name: level for level, names in enumerate(floors) for name in names}
    for path in sorted(directory.rglob("*.py")):
        room = find_room(path, directory)
        if path.name == "__init__.py" and path.parent in (directory, directory / "presets"):
            continue
        assert room in floor_of, f"{room} has no floor; decide which and add it here"
        for name in list_imports(path):
            dots = len(name) - len(name.lstrip("."))
            if dots == 0:
                continue
            target = path.parents[dots - 1] / name.lstrip(".").replace(".", "/")
            if (other := find_room(target, directory)) != room:
                assert floor_of[other] < floor_of[room], (
                    f"{path.relative_to(ROOT)} imports {other} from its floor or above"
                )


def test_trainer_floors():
    hold_floors(ROOT / "fastroberta", FLOORS)


def test_kernel_floors():
    hold_floors(ROOT / "kernels" / "fastroberta_kernels", KERNEL_FLOORS)


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; empty if there is no circle."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for other in sorted(imports.get(module, ())):
            if circle := walk(other, [*way, module]):
                return circle
        done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in sorted(imports))), [])


def test_no_circles_inside_rooms():
    directory = ROOT / "fastroberta"
    imports: dict[str, set[str]] = {}
    for path in directory.rglob("*.py"):
        found = set()
        for name in list_imports(path):
            if dots := len(name) - len(name.lstrip(".")):
                target = path.parents[dots - 1] / name.lstrip(".").replace(".", "/")
                found.add(str(target.relative_to(directory)))
        imports[str(path.relative_to(directory).with_suffix(""))] = found
    assert find_circle(imports) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_no_long_files():
    """Beyond 400 lines a file is more than one idea. Kernels may be longer: each is to be copied as one file."""
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "fastroberta").rglob("*.py")}
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}


def test_kernels_stand_alone():
    """They import torch, and Triton through one file; optional packages where they are used."""
    standard = sys.stdlib_module_names | {"torch"}
    for path in (ROOT / "kernels" / "fastroberta_kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in list_imports(path) if not name.startswith(".")}
        allowed = standard | {"triton"} if path.stem == "_dispatch" else standard
        if path.stem == "_cuda":
            allowed = standard | {"cuda"}
        if path.stem in ("philox", "masking"):  # where it is installed
            allowed = standard | {"numpy"}
        if path.stem in ("huggingface", "_hf_attention", "_masked_lm", "_modernbert"):
            allowed = standard | {"transformers"}
        assert roots <= allowed, f"{path.name} imports {roots - allowed}"


@pytest.mark.parametrize("package", ["fastroberta_kernels", "fastroberta_kernels.huggingface"])
def test_importing_the_kernels_imports_no_trainer_and_no_transformers(package):
    code = f"import {package}, sys; print([m for m in ('fastroberta', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_imports_no_torch():
    """Start-up: the programs parse their arguments before they import what takes a second."""
    for program in ("train", "evaluate", "explain", "export", "plan", "prepare", "finetune", "ablate"):
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
