"""What a measurement ran on: versions, processor, commit, and the limits that it stands beside."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.backend import extension, isas

__all__ = ["describe", "matrix_seconds", "multiply_rate", "read_seconds", "slug"]


def _cpu() -> dict[str, str]:
    """Name, family and model of the processor, as far as the system tells."""
    found = {"name": platform.processor() or platform.machine()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info.read_text(), re.M))
        found["name"] = fields.get("model name", found["name"])
        found |= {k.split()[-1]: fields[k] for k in ("cpu family", "model") if k in fields}
    return found


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str | None:
    """Commit of the checkout that the package runs from, ``+`` where its code was changed since."""
    here = Path(__file__).resolve().parents[3]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "csrc", "CMakeLists.txt")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None  # an installed package, or no git


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Processor, memory, instruction sets, threads, versions, commit and time, ready for JSON."""
    native = extension()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "instruction_sets": isas(),
        "instruction_set": native.current_isa() if native is not None else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # the wheel's metadata may lack the local part, such as +cu130
            **{name: _version(name) for name in ("winnow-llm", "transformers", "numpy")},
        },
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def slug(machine: dict[str, Any]) -> str:
    """Name of a machine, fit for a file name: processor, family and model numbers, cores."""
    cpu = machine["cpu"]
    words = [cpu["name"], cpu.get("family", ""), cpu.get("model", ""), f"{machine['cores']} cores"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def matrix_seconds(a: Tensor, b: Tensor) -> float:
    """Seconds of one matrix product by PyTorch."""
    start = time.perf_counter()
    torch.matmul(a, b)
    return time.perf_counter() - start


def multiply_rate(times: int) -> float:
    """Operations per second of bfloat16 products on operands in the first-level cache, on all threads."""
    native = extension()
    assert native is not None, "callers checked"
    start = time.perf_counter()
    operations: float = native.multiply_peak(times)
    return operations / (time.perf_counter() - start)


def read_seconds(*tensors: Tensor) -> float:
    """Seconds to read these contiguous tensors once, on all threads, doing nothing but sums."""
    native = extension()
    assert native is not None, "callers checked"
    start = time.perf_counter()
    for t in tensors:
        native.read_sum(t.data_ptr(), t.numel() * t.element_size())
    return time.perf_counter() - start
