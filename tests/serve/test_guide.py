"""The tutorial's programs do what the tutorial says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.serve.conftest import running
from winnow.cli import app as command_line
from winnow.models.load import load_model
from winnow.serve.run import named_recipes

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "serving.md"


@pytest.mark.slow
def test_programs_of_the_tutorial(capsys):
    programs = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    shown = re.findall(r"```python\n.*?```\n\n```\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(programs) == len(shown) == 2
    recipes = named_recipes(("full", "snapkv"))
    with running(
        *load_model("embedded"), served_model_name="embedded", recipes=recipes, max_model_len=16384
    ) as server:
        names: dict = {}
        exec(programs[0].replace("http://localhost:8000", server.url), names)
        said = capsys.readouterr().out
        assert said == shown[0]
        exec(programs[1].replace("http://localhost:8000", server.url), names)
        # How far a sequence has come when it is looked at differs; a page of memory is what it grows by.
        printed, expected = (
            [eval(line) for line in text.splitlines()] for text in (capsys.readouterr().out, shown[1])
        )
        for got, want in zip(printed, expected, strict=True):
            assert got == pytest.approx(want, rel=0.05)
        full, small = printed
        assert small["host/raw"] < 0.5 * full["host/raw"]
        server.idle()


def test_every_option_of_the_command_is_explained_or_known():
    """The guide names no option that is not there."""
    from typer.main import get_command

    options = {
        name
        for parameter in get_command(command_line.app).commands["serve"].params
        for name in [*parameter.opts, *parameter.secondary_opts]
    }
    named = set(re.findall(r"`(--[a-z-]+)`", GUIDE.read_text()))
    assert named <= options | {"--recipe"}
    vllms = {
        "--host",
        "--port",
        "--max-model-len",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--served-model-name",
        "--api-key",
        "--kv-memory",
    }
    assert vllms <= options
