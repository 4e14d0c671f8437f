"""The methods' pages, generated from their docstrings, signatures and the table.

``python -m winnow.methods.pages DIRECTORY`` writes them; with ``--check`` it only says which differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from winnow.methods import METHODS, Method, load, packaged
from winnow.recipe import PARTS, STAGES, Recipe

__all__ = ["main", "pages"]

_HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
_ITEM = re.compile(r"^(\w[\w, ]*) : (.+)$")


def pages() -> dict[str, str]:
    """Every page by file name, the index included."""
    out = {f"{name}.md": _page(method) for name, method in METHODS.items()}
    out["index.md"] = _index()
    out["parts.md"] = _all_parts()
    return out


def _index() -> str:
    lines = [
        "# Methods",
        "",
        "Each is one published system as a function that returns a recipe; see how to",
        "[add one](../../CONTRIBUTING.md#add-a-method). What they are made of: [parts](parts.md).",
        "",
        "| method | stage | paper | needs | saves |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS.values():
        name = f"[{method.name}]({method.name}.md)"
        lines.append(f"| {name} | {method.stage} | {method.paper} | {method.needs} | {method.saves} |")
    lines += ["", "## Packaged recipes", "", "Combinations that ship with the package, by name:", ""]
    for name in packaged():
        recipe = load(name)
        stages = ", ".join(stage for stage in STAGES if getattr(recipe, stage) is not None)
        lines += [f"### {name}", "", f"Decides: {stages}.", "", *_yaml(recipe), ""]
    return "\n".join(lines).rstrip() + "\n"


def _all_parts() -> str:
    lines = [
        "# Parts",
        "",
        "What a recipe is made of, by the place that a part fills and by its name in YAML. See the",
        "[recipes guide](../guide/recipes.md).",
    ]
    for slot, table in PARTS.items():
        lines += ["", f"## {slot.capitalize()}"]
        for name, cls in table.items():
            lines += ["", f"### {name}", "", f"`{cls.__module__}.{cls.__name__}`", ""]
            lines.append(_body(inspect.getdoc(cls) or "", below=4))
    return "\n".join(lines).rstrip() + "\n"


def _page(method: Method) -> str:
    doc = inspect.getdoc(method.make) or ""
    function = f"winnow.methods.{method.make.__name__}"
    lines = [
        f"# {method.name}",
        "",
        f"Stage: **{method.stage}** · paper: {method.paper} · needs: {method.needs} · saves: {method.saves}",
        "",
        _body(doc),
        "",
        "## Use",
        "",
        "```python",
        "import winnow",
        "from winnow.methods import load",
        "",
        f'llm = winnow.load("embedded", recipe=load("{method.name}"))',
        "```",
        "",
        "or, on the command line and in a YAML file,",
        "",
        "```bash",
        f"winnow run embedded --recipe {method.name} -f document.txt",
        "```",
        "",
        "```yaml",
        "methods:",
        f"  {method.name}: {_defaults(method)}",
        "```",
        "",
        "## The recipe it makes",
        "",
        *_yaml(method.make()),
        "",
        "## Its parts",
        "",
    ]
    for part in _parts(method.make()):
        lines += [f"### {type(part).__name__}", "", f"`{type(part).__module__}`", ""]
        lines += [_body(inspect.getdoc(type(part)) or "", below=4), ""]
    lines += [f"*Generated from `{function}` by `python -m winnow.methods.pages docs/methods`.*"]
    return "\n".join(lines).rstrip() + "\n"


def _defaults(method: Method) -> str:
    known = inspect.signature(method.make).parameters.values()
    defaults = {p.name: p.default for p in known}
    return yaml.safe_dump(defaults, default_flow_style=True, sort_keys=False, width=1000).strip()


def _yaml(recipe: Recipe) -> list[str]:
    return ["```yaml", recipe.to_yaml().rstrip(), "```"]


def _parts(recipe: Recipe) -> list[Any]:
    """The parts of a recipe, nested ones after what holds them."""
    found: list[Any] = []

    def visit(part: Any) -> None:
        found.append(part)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                visit(value)

    for stage in STAGES:
        if getattr(recipe, stage) is not None:
            visit(getattr(recipe, stage))
    return found


def _body(doc: str, below: int = 2) -> str:
    """A numpydoc text as Markdown: sections as headings, parameters as a list, code marks single."""
    text = _HEADING.sub(lambda m: "#" * below + " " + m[1], doc.replace("``", "`"))
    lines: list[str] = []
    listed = False
    for line, following in pairwise([*text.splitlines(), ""]):
        item = _ITEM.match(line)
        if line.startswith("#"):
            listed = line.lstrip("# ") in ("Parameters", "Attributes", "Raises")
            lines += [line, ""]
        elif listed and item:
            described = ":" if following.startswith("    ") else ""
            lines.append(f"- `{item[1]}` ({item[2]}){described}")
        elif listed and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(prog="python -m winnow.methods.pages", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a page differs"
    )
    options = parser.parse_args(arguments)
    stale = []
    for name, text in pages().items():
        path = options.directory / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not options.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    known = set(pages())
    extra = sorted(p.name for p in options.directory.glob("*.md") if p.name not in known)
    for name in stale:
        print(f"{name}: {'differs' if options.check else 'written'}")
    for name in extra:
        print(f"{name}: belongs to no method; remove it")
    return 1 if extra or (options.check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
