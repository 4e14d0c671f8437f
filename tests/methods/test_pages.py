"""Generated pages are up to date, guide pages run, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from winnow.methods import METHODS, from_text
from winnow.methods.pages import main, pages

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide"
MINE = ["recipes.md", "generation.md", "compression.md", "loading.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", pages())
def test_page_is_up_to_date(name):
    text = (ROOT / "docs" / "methods" / name).read_text(encoding="utf-8")
    assert text == pages()[name], "run: python -m winnow.methods.pages docs/methods"


def test_no_page_without_a_method():
    assert main([str(ROOT / "docs" / "methods"), "--check"]) == 0


def test_check_says_what_differs_and_writes_nothing(tmp_path, capsys):
    assert main([str(tmp_path), "--check"]) == 1
    assert not list(tmp_path.iterdir())
    assert "snapkv.md: differs" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--check"]) == 0
    (tmp_path / "gone.md").write_text("old")
    assert main([str(tmp_path), "--check"]) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_yaml_of_a_page_is_the_method(name):
    by_method, by_parts = blocks(ROOT / "docs" / "methods" / f"{name}.md", "yaml")
    assert from_text(by_method) == from_text(by_parts) == METHODS[name].make()


@pytest.mark.parametrize("page", MINE)
def test_guide_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may write files
    """The Python of a page, top to bottom, in one namespace; text blocks are what it prints."""
    space: dict[str, object] = {}
    for block in blocks(GUIDE / page, "python"):
        exec(compile(block, page, "exec"), space)
    printed = capsys.readouterr().out
    for block in blocks(GUIDE / page, "text"):
        assert block in printed
    for block in blocks(GUIDE / page, "yaml"):
        from_text(block)


@pytest.mark.parametrize(
    "path",
    [*(GUIDE / page for page in MINE), ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / "methods").glob("*.md")],
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
