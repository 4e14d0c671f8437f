"""``winnow run`` and ``winnow chat``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli import show

__all__ = ["chat", "run"]

Model = Annotated[str, typer.Argument(help="'embedded', a directory, or a hub name.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", help="A YAML file, a method, or a packaged recipe; none is full attention."
    ),
]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to write.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")]
TopK = Annotated[int, typer.Option(help="Keep so many likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Keep tokens this likely relative to the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
BackendOption = Annotated[str, typer.Option(help="auto, native, triton or reference.")]


def run(
    model: Model,
    recipe: RecipeOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt itself.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after an end-of-sequence token.")] = False,
    backend: BackendOption = "auto",
    as_json: Json = False,
) -> None:
    """Answer one prompt: from --prompt, a file, or standard input; with both, the file comes first."""
    import winnow

    text = _prompt(prompt, file)
    llm = winnow.load(model, recipe=recipe, backend=backend)  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or (),
        "ignore_eos": ignore_eos,
    }
    if as_json:
        with show.token_progress() as progress:
            result = llm.generate(text, progress=progress, **options)
        show.emit_json({"model": model, "recipe": llm.recipe.to_dict(), **result.to_dict()})
        return
    last = None
    with show.token_progress() as progress:
        for event in llm.stream(text, progress=progress, **options):
            print(event.text, end="", flush=True)
            last = event
    print(flush=True)
    if last is not None:
        show.notes.print(show.stats_line(last.result.stats), style="dim")


def _prompt(prompt: str | None, file: Path | None) -> str:
    parts = []
    if file is not None:
        if not file.is_file():
            raise ValueError(f"there is no file {str(file)!r}; give a path to a text file")
        parts.append(file.read_text(encoding="utf-8"))
    if prompt is not None:
        parts.append(prompt)
    if not parts:
        if sys.stdin.isatty():
            raise ValueError("no prompt; give --prompt, --file, or text on standard input")
        parts.append(sys.stdin.read())
    text = "".join(parts)
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def chat(
    model: Model,
    recipe: RecipeOption = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A document to talk about: it precedes the first message."),
    ] = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    backend: BackendOption = "auto",
    as_json: Json = False,
) -> None:
    """Talk with a model over several turns; each turn computes only what is new. Ctrl-D ends."""
    import winnow
    from winnow.api import ChatSession

    llm = winnow.load(model, recipe=recipe, backend=backend)  # type: ignore[arg-type]
    document = _prompt(None, file) if file is not None else ""
    session = ChatSession(llm)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
    }
    try:
        for line in _messages():
            with show.token_progress(quiet=as_json) as progress:
                for event in session.stream(document + line, progress=progress, **options):
                    if not as_json:
                        print(event.text, end="", flush=True)
            document = ""
            if as_json:
                show.emit_json({"message": line, **event.result.to_dict()})
            else:
                print(flush=True)
                show.notes.print(show.stats_line(event.result.stats), style="dim")
    finally:
        session.close()


def _messages() -> Any:
    """Lines of the user, with a prompt sign where a person types."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line
