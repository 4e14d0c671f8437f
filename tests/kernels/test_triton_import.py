"""Triton is an extra: nothing imports it before a Triton kernel is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SRC = Path(__file__).parents[2] / "src"


def python(code: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(SRC)!r}); {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


OPS = ["prefill", "decode", "matvec", "quantize", "key_scan", "top_k"]


def test_importing_the_kernels_leaves_triton_alone() -> None:
    imports = ", ".join(f"winnow.kernels.{op}" for op in OPS)
    assert python(f"import {imports}; print('triton' in sys.modules)").split() == ["False"]


def test_a_missing_triton_names_the_remedy() -> None:
    shown = python(
        "sys.modules['triton'] = None\n"  # as if it were not installed
        "import importlib\n"
        f"for op in {OPS}:\n"
        "    try:\n        importlib.import_module(f'winnow.kernels.{op}.triton')\n"
        "    except ImportError as error:\n        print(error)"
    )
    assert shown.count('pip install "winnow-llm[triton]"') == len(OPS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_benchmark_names_its_remedy(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "winnow.bench.gpu", "--out", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "no CUDA device was found; run this on a machine with an NVIDIA GPU"
    ]
    assert not (tmp_path / "results").exists()
