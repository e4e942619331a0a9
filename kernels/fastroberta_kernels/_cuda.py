"""CUDA C++ without a toolkit: sources in csrc are compiled on first use by NVRTC, and cached for later runs.

NVRTC is a library that comes with every CUDA build of PyTorch; NVIDIA's package `cuda-core` drives it. No nvcc, host
compiler or build step at installation is needed. Importing this module does none of that.

Compiled code is cached in `$XDG_CACHE_HOME/fastroberta` (default `~/.cache/fastroberta`), which must belong to the user
alone (mode 0700), since the GPU executes what is there. A folder that others can write to is not used; sources are then
compiled again in every process. A file's name is a hash of all that its content depends on (source, options, NVRTC
version, architecture). It appears by one atomic rename and starts with a checksum of the rest.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

DIALECT = "c++17"


def use_cuda(operation: str, source: str, kernels: tuple[str, ...], impl: str | None, device: torch.device) -> bool:
    """Whether the CUDA `kernels` of `source` run on `device`. If so, compile and load them.

    `impl=None` uses them on CUDA devices, and falls back to PyTorch with one warning if they cannot be compiled.

    Raises:
        ValueError: unknown `impl`, or 'cuda' for tensors on another device. RuntimeError: 'cuda', but compilation fails.
    """
    if impl not in (None, "cuda", "torch"):
        raise ValueError(f"{operation}: impl={impl!r} is unknown; use None, 'cuda' or 'torch'")
    if impl == "cuda" and device.type != "cuda":
        raise ValueError(
            f"{operation}: the CUDA kernels need CUDA tensors, these are on {device}; move them to a CUDA device or "
            "pass impl='torch'"
        )
    if impl == "torch" or device.type != "cuda":
        return False
    try:
        with torch.cuda.device(device):
            for kernel in kernels:
                load_kernel(source, kernel, architecture(device))
    except Exception as error:  # a missing package, an NVRTC older than the GPU, a driver older than NVRTC...
        if impl == "cuda":
            raise RuntimeError(f"{operation}: {describe_failure(source, error)}") from error
        warn_once(f"{operation}: {describe_failure(source, error)} The slower PyTorch implementation runs instead.")
        return False
    return True


def describe_failure(source: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".strip()
    return (
        f"csrc/{source} could not be compiled for this GPU ({reason}). It needs the packages cuda-core and "
        "cuda-bindings of the CUDA version that PyTorch was built for: pip install 'cuda-core[cu13]' or "
        "'cuda-core[cu12]'."
    )


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def import_core() -> Any:
    """NVIDIA's cuda-core, which was called cuda.core.experimental before its version 0.5."""
    import cuda.core

    if hasattr(cuda.core, "Program"):
        return cuda.core
    import cuda.core.experimental

    return cuda.core.experimental


def read_source(source: str) -> str:
    """The text of a file in csrc: inside an installed package, beside the package in a checkout."""
    installed = importlib.resources.files(__package__) / "csrc" / source
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    checkout = Path(__file__).resolve().parents[2] / "csrc" / source
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    raise FileNotFoundError(f"csrc/{source} is neither at {installed} nor at {checkout}; reinstall the package")


def compile_source(text: str, name: str, arch: str) -> bytes:
    """Compile CUDA C++ to a cubin for `arch` ("sm_90"). Needs NVRTC, but neither GPU nor driver."""
    core = import_core()
    options = core.ProgramOptions(name=name, arch=arch, std=DIALECT)
    return bytes(core.Program(text, "c++", options).compile("cubin").code)


def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    return str(nvrtc.nvrtcVersion()[1:])


def get_cubin(source: str, arch: str) -> bytes:
    """The compiled code of csrc/`source`, from the cache if it is there and intact."""
    text = read_source(source)
    key = "\0".join([text, DIALECT, arch, nvrtc_version()])
    folder = private_cache_folder()
    if folder is None:
        return compile_source(text, source, arch)
    file = folder / f"{Path(source).stem}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    cubin = read_checked(file)
    if cubin is None:
        cubin = compile_source(text, source, arch)
        write_checked(file, cubin)
    return cubin


def private_cache_folder() -> Path | None:
    """The cache folder, created if missing. None, with a warning, if it cannot be created or others can write to it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory Specification says to ignore a relative path.
    try:
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastroberta"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        warn_once(f"compiled CUDA kernels are not kept: {error}")
        return None
    is_ours = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and status.st_mode & 0o077 == 0)
    if not stat.S_ISDIR(status.st_mode) or not is_ours:
        warn_once(
            f"compiled CUDA kernels are not kept: {folder} must be a folder that belongs to this user alone; delete it, "
            "or run chmod 700 on it if you trust its contents"
        )
        return None
    return folder


def read_checked(file: Path) -> bytes | None:
    """The content after the checksum. None if the file is missing or damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    checksum, content = data[:32], data[32:]
    return content if hashlib.sha256(content).digest() == checksum else None


def write_checked(file: Path, content: bytes) -> None:
    """Write checksum and content atomically. On a full or read-only disk nothing is cached."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)  # mode 0600
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, file)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warn_once(f"compiled CUDA kernels are not kept: {error}")


@functools.cache
def load_code(source: str, arch: str) -> Any:
    return import_core().ObjectCode.from_cubin(get_cubin(source, arch), name=source)


@functools.cache
def load_kernel(source: str, kernel: str, arch: str) -> Any:
    return load_code(source, arch).get_kernel(kernel)


def launch(source: str, kernel: str, grid: int, block: int, device: torch.device, *arguments: Any) -> None:
    """Launch a kernel on PyTorch's current stream of `device`. An empty grid is skipped.

    Arguments are passed as the kernels in csrc expect: tensors and None as pointers, int as `long long`, float as `double`.
    """
    if grid == 0:
        return
    core = import_core()
    values = [to_kernel_argument(argument) for argument in arguments]
    with torch.cuda.device(device):
        # PyTorch calls the default stream 0; 1 is CUDA's explicit name for the same stream.
        stream = core.Stream.from_handle(torch.cuda.current_stream(device).cuda_stream or 1)
        config = core.LaunchConfig(grid=grid, block=block)
        core.launch(stream, config, load_kernel(source, kernel, architecture(device)), *values)


def to_kernel_argument(argument: torch.Tensor | int | float | None) -> int | float:
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
