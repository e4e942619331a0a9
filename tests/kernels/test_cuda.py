"""csrc without a GPU: it compiles for every architecture without spilling, and the cache is private and whole."""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from fastroberta_kernels import _cuda, lamb

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100 and H200, B200
SOURCES = {"fused_lamb.cu": lamb.KERNELS}


def find_nvrtc() -> str:
    """The library of the package nvidia-cuda-nvrtc."""
    try:
        import nvidia
    except ImportError:
        pytest.skip("needs the package nvidia-cuda-nvrtc")
    for folder in nvidia.__path__:
        for file in sorted(glob.glob(os.path.join(folder, "*", "lib", "libnvrtc.so*"))):
            return file
    pytest.skip("needs the package nvidia-cuda-nvrtc")


def compile_with_nvrtc(text: str, arch: str) -> bytes:
    """NVRTC through its C interface, so that this needs neither cuda-core nor a driver."""
    nvrtc = ctypes.CDLL(find_nvrtc())
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"source.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={arch}".encode(), f"--std={_cuda.DIALECT}".encode()]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert result == 0, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def find_cuobjdump() -> str:
    """From the toolkit, or the one that Triton brings along."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        bundled = Path("cuobjdump")
    found = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    return found or pytest.skip("needs cuobjdump (package triton, or the CUDA toolkit)")


def assert_no_spills(cubin: Path, kernels: tuple[str, ...]) -> None:
    report = subprocess.run([find_cuobjdump(), "-res-usage", cubin], capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    usage = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text))
    assert set(usage) == set(kernels), text
    for kernel, line in usage.items():
        assert "STACK:0 " in line and "LOCAL:0 " in line, f"{kernel} spills: {line}"
        registers = int(re.search(r"REG:(\d+)", line)[1])
        # 64 registers let 1024 threads, half of the most, live on a multiprocessor: enough to keep memory busy.
        assert registers <= 64, f"{kernel}: {registers} registers"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_nvrtc_compiles_without_spills(source, arch, tmp_path):
    cubin = tmp_path / "code.cubin"
    cubin.write_bytes(compile_with_nvrtc(_cuda.read_source(source), arch))
    assert_no_spills(cubin, SOURCES[source])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_nvcc_compiles_the_same_source_without_spills(source, arch, tmp_path):
    file, cubin = tmp_path / source, tmp_path / "code.cubin"
    file.write_text(_cuda.read_source(source))
    command = ["nvcc", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin", f"-arch={arch}", f"-std={_cuda.DIALECT}"]
    result = subprocess.run([*command, "-o", cubin, file], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) >= len(SOURCES[source]) and set(spills) == {("0", "0", "0")}, result.stderr
    assert_no_spills(cubin, SOURCES[source])


def test_cuda_core_compiles():
    pytest.importorskip("cuda.bindings", reason="needs the package cuda-bindings")
    cubin = _cuda.compile_source(_cuda.read_source("fused_lamb.cu"), "fused_lamb.cu", "sm_90")
    assert cubin[:4] == b"\x7fELF"


def test_source_is_found_in_an_installed_package_and_in_a_checkout(tmp_path, monkeypatch):
    assert "lamb_apply" in _cuda.read_source("fused_lamb.cu")
    with pytest.raises(FileNotFoundError, match=r"csrc/missing\.cu is neither at"):
        _cuda.read_source("missing.cu")
    package = tmp_path / "copied_kernels"  # as a wheel lays it out: csrc inside the package
    (package / "csrc").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "csrc" / "here.cu").write_text("// here")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_cuda, "__package__", "copied_kernels")
    assert _cuda.read_source("here.cu") == "// here"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a compiler that counts its calls."""
    calls = []

    def compile_source(text, name, arch):
        calls.append(arch)
        return f"code {len(calls)} for {arch}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_cuda, "compile_source", compile_source)
    monkeypatch.setattr(_cuda, "nvrtc_version", lambda: "13.0")
    _cuda.warn_once.cache_clear()
    yield tmp_path / "fastroberta", calls
    _cuda.warn_once.cache_clear()


def test_compiled_code_is_kept_privately(cache, monkeypatch):
    folder, calls = cache
    first = _cuda.get_cubin("fused_lamb.cu", "sm_90")
    assert _cuda.get_cubin("fused_lamb.cu", "sm_90") == first and calls == ["sm_90"]
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()  # no temporary file stays behind
    assert file.stat().st_mode & 0o777 == 0o600

    # Whatever the code depends on leads to another file.
    assert _cuda.get_cubin("fused_lamb.cu", "sm_80") != first
    monkeypatch.setattr(_cuda, "nvrtc_version", lambda: "13.1")
    assert _cuda.get_cubin("fused_lamb.cu", "sm_90") != first
    monkeypatch.setattr(_cuda, "read_source", lambda source: "changed")
    assert _cuda.get_cubin("fused_lamb.cu", "sm_90") != first
    assert len(calls) == 4 and len(list(folder.iterdir())) == 4


def test_damaged_code_is_compiled_again(cache):
    folder, calls = cache
    first = _cuda.get_cubin("fused_lamb.cu", "sm_90")
    (file,) = folder.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = _cuda.get_cubin("fused_lamb.cu", "sm_90")
    assert again != first and len(calls) == 2
    assert _cuda.get_cubin("fused_lamb.cu", "sm_90") == again and len(calls) == 2
    file.write_bytes(b"")
    _cuda.get_cubin("fused_lamb.cu", "sm_90")
    assert len(calls) == 3


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX file modes")
def test_a_folder_open_to_others_is_not_used(cache):
    folder, calls = cache
    folder.mkdir(mode=0o700)
    folder.chmod(0o770)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            _cuda.get_cubin("fused_lamb.cu", "sm_90")
    assert len(calls) == 2 and not list(folder.iterdir()) and not seen  # the second call says nothing any more


def test_a_link_in_place_of_the_folder_is_not_used(cache, tmp_path):
    folder, calls = cache
    (tmp_path / "planted").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "planted")
    with pytest.warns(RuntimeWarning, match="belongs to this user alone"):
        _cuda.get_cubin("fused_lamb.cu", "sm_90")
    assert calls == ["sm_90"] and not list((tmp_path / "planted").iterdir())


def test_folder_that_cannot_be_made_costs_only_the_cache(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="are not kept"):
        assert _cuda.get_cubin("fused_lamb.cu", "sm_90") == b"code 1 for sm_90"


def test_a_failed_compilation_says_so_once_and_falls_back(monkeypatch):
    def fail(*_):
        raise ImportError("No module named 'cuda.bindings'")

    monkeypatch.setattr(_cuda, "load_kernel", fail)
    monkeypatch.setattr(_cuda, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())  # any context
    _cuda.warn_once.cache_clear()
    arguments = ("FusedLAMB", "fused_lamb.cu", lamb.KERNELS)
    with pytest.warns(RuntimeWarning, match=r"cuda\.bindings.*pip install.*PyTorch implementation runs instead"):
        assert not _cuda.use_cuda(*arguments, None, torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _cuda.use_cuda(*arguments, None, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="could not be compiled for this GPU"):
        _cuda.use_cuda(*arguments, "cuda", torch.device("cuda"))
    _cuda.warn_once.cache_clear()


def test_implementation_is_obeyed_or_refused():
    arguments = ("FusedLAMB", "fused_lamb.cu", lamb.KERNELS)
    assert not _cuda.use_cuda(*arguments, None, torch.device("cpu"))
    assert not _cuda.use_cuda(*arguments, "torch", torch.device("cuda"))
    with pytest.raises(ValueError, match="need CUDA tensors"):
        _cuda.use_cuda(*arguments, "cuda", torch.device("cpu"))
    with pytest.raises(ValueError, match="impl='triton' is unknown"):
        _cuda.use_cuda(*arguments, "triton", torch.device("cpu"))


def test_an_empty_grid_is_not_launched():
    """A process may own no chunk of any tensor."""
    _cuda.launch("fused_lamb.cu", "no_such_kernel", 0, 256, torch.device("cpu"))  # a launch on a CPU would fail


@pytest.mark.gpu
def test_cached_kernels_load_and_start(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _cuda.load_code.cache_clear()
    _cuda.load_kernel.cache_clear()
    device = torch.device("cuda")
    assert _cuda.use_cuda("FusedLAMB", "fused_lamb.cu", lamb.KERNELS, "cuda", device)
    assert len(list((tmp_path / "fastroberta").iterdir())) == 1
    gradient = torch.arange(1.0, 6.0, device=device)
    chunks = torch.tensor([[0, 5, 0]], device=device)
    partial = torch.zeros(1, dtype=torch.float64, device=device)
    active = torch.ones(1, dtype=torch.int32, device=device)
    _cuda.launch("fused_lamb.cu", "lamb_square_gradients", 1, 256, device, gradient, chunks, active, partial)
    assert partial.item() == 55
