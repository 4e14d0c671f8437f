"""Where the native kernels are missing or cannot be loaded: said once, and answered all the same."""

import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest

from winnow.kernels import backend

# Every case needs a fresh interpreter: a process loads an extension once.
CALLS = """
import sys
import torch
import winnow
{before}
from winnow.kernels import backend
from winnow.kernels.top_k import top_k

x, lengths = torch.tensor([[0.5, 3.0, -1.0, 2.0]]), torch.tensor([4], dtype=torch.int32)
for _ in range(2):
    print(sorted(top_k(x, lengths, 2)[0][0].tolist()))
print(backend.isas())
for demand in (lambda: top_k(x, lengths, 2, backend="native"), lambda: backend.force_isa("generic")):
    try:
        demand()
    except ValueError as error:
        print(error)
"""


def run(before: str) -> tuple[list[str], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", CALLS.format(before=before)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if "kernels" in line]


def expect(found: tuple[list[str], list[str]], why: str) -> None:
    said, warned = found
    assert said[:3] == ["[1, 3]", "[1, 3]", "[]"]
    assert len(said) == 5
    assert all(why in line for line in said[3:])
    assert len(warned) == 1
    assert "reference" in warned[0]
    assert why in warned[0]


def test_without_native_kernels() -> None:
    expect(run('sys.modules["winnow._native"] = None'), "install a C++ compiler")


def test_native_kernels_that_the_loader_refuses(tmp_path: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"built for another machine")
    # An editable install finds the extension before any path is looked at.
    hide = "sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in type(one).__module__]"
    found = run(f"{hide}; winnow.__path__.insert(0, {str(tmp_path)!r})")
    expect(found, "cannot be loaded")
    assert str(tmp_path) in found[1][0]
    assert "compiler" not in found[1][0]


@pytest.mark.skipif(not backend.isas(), reason="the native kernels were not built")
def test_generic_is_there_on_every_machine_and_an_unknown_set_is_refused() -> None:
    assert backend.isas()[-1] == "generic"
    with pytest.raises(ValueError, match="'sse9' is not available"):
        backend.force_isa("sse9")
