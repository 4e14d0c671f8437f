"""Make the corpus of `source_code`: functions of the standard library, their docstrings set apart.

``python -m winnow.bench.tasks.text.extract`` rewrites ``functions.jsonl`` from the interpreter that
runs it.  The file is shipped, so that examples do not depend on the user's interpreter.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from winnow.bench.scorers import similarity
from winnow.bench.tasks.text.source_code import CORPUS, Function

#: characters of the source; functions outside are too small to describe or too large to repeat
SIZES = range(160, 1400)
#: characters of a description's first paragraph
DESCRIPTIONS = range(50, 400)
#: every module gives at most that many, so that no style dominates
PER_MODULE = 8
#: of two functions as similar as that only the first is kept: a description could mean either
TWINS = 0.75


def _functions(path: Path) -> Iterator[Function]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        described = ast.get_docstring(node)
        if described is None or len(node.body) < 2:
            continue
        docstring, first = node.body[0], node.body[1]
        assert docstring.end_lineno is not None
        assert node.end_lineno is not None
        if first.lineno == docstring.end_lineno:
            continue
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        kept = lines[start : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
        code = re.sub(r"\n\s*\n+", "\n", textwrap.dedent("".join(kept))).strip("\n")
        description = " ".join(described.split("\n\n")[0].split())
        yield Function(module=path.stem, name=node.name, description=description, code=code)


def _wanted(function: Function) -> bool:
    words = re.findall(r"\w+", function.description.lower())
    return (
        len(function.code) in SIZES
        and len(function.description) in DESCRIPTIONS
        and function.code.isascii()
        and function.description.isascii()
        and function.name.lower().strip("_") not in words
        and not function.description.startswith((">>>", "usage", "Usage"))
    )


def main() -> None:
    """Write the corpus in the order of module names and lines."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.glob("*.py"))
    found = [function for path in paths for function in _functions(path)]
    names = Counter(function.name for function in found)
    texts = Counter(function.description for function in found)
    kept: list[Function] = []
    taken: Counter[str] = Counter()
    for function in found:
        alone = names[function.name] == 1 and texts[function.description] == 1
        if not (alone and _wanted(function) and taken[function.module] < PER_MODULE):
            continue
        if all(similarity(function.code, other.code) < TWINS for other in kept):
            taken[function.module] += 1
            kept.append(function)
    CORPUS.write_text("".join(json.dumps(vars(function)) + "\n" for function in kept), encoding="ascii")
    print(f"{len(kept)} functions of {len(taken)} modules, {CORPUS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
