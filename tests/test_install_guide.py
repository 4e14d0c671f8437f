"""The page about installing names the versions that the package asks for, and its Python runs."""

import re
import tomllib
from pathlib import Path

import pytest

from winnow.kernels import backend

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guide" / "install.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement(name: str) -> str:
    if name == "python":
        return str(PROJECT["requires-python"])
    return next(line for line in PROJECT["dependencies"] if line.startswith(name)).removeprefix(name)


@pytest.mark.parametrize(
    ("name", "shown"), [("python", "Python"), ("torch", "PyTorch"), ("transformers", "transformers")]
)
def test_versions_are_those_of_the_package(name: str, shown: str) -> None:
    first, last = re.search(rf"{shown} (\d+\.\d+) to (\d+\.\d+)", PAGE).groups()  # type: ignore[union-attr]
    major, minor = last.split(".")
    assert requirement(name) == f">={first},<{major}.{int(minor) + 1}"


def test_its_python_runs_and_leaves_the_fastest_instruction_set() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "install.md", "exec"), {})
    native = backend.extension()
    assert native is None or native.current_isa() == backend.isas()[0]
