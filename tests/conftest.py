"""What several folders of tests need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def kvpress_python() -> str:
    """An interpreter that imports kvpress: the one that is named, or this one; without it a test is skipped.

    kvpress wants an older ``transformers``, so it lives in an environment of its own.
    """
    python = os.environ.get("WINNOW_KVPRESS_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import kvpress"], capture_output=True, text=True, check=False)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        pytest.skip(f"{python} cannot import kvpress ({reason}); name one in WINNOW_KVPRESS_PYTHON")
    return python
