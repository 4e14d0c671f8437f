"""Triton is an extra: nothing imports it before a Triton kernel is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"


def python(code: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(SRC)!r}); {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["winnow.kernels.prefill", "winnow.kernels.decode"])
def test_importing_the_kernels_leaves_triton_alone(module: str) -> None:
    assert python(f"import {module}; print('triton' in sys.modules)").split() == ["False"]


@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_a_missing_triton_names_the_remedy(op: str) -> None:
    shown = python(
        "sys.modules['triton'] = None\n"  # as if it were not installed
        f"try:\n    import winnow.kernels.{op}.triton\nexcept ImportError as error:\n    print(error)"
    )
    assert 'pip install "winnow-llm[triton]"' in shown
