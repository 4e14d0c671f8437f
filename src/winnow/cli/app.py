"""The commands and their options."""

from __future__ import annotations

from typing import Annotated

import typer

from winnow import __version__
from winnow.cli import bench, bench_files, bench_serve, catalogue, profile, run, serve

__all__ = ["app"]

app = typer.Typer(
    name="winnow",
    help="Long-context transformers made affordable: compute, keep, reuse and load only what matters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"winnow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("run")(run.run)
app.command("chat")(run.chat)
app.command("demo")(bench.demo)
app.command("serve")(serve.serve)
app.command("methods")(catalogue.methods)
app.add_typer(catalogue.recipe_app, name="recipe")
app.add_typer(profile.profile_app, name="profile")
app.add_typer(bench.bench_app, name="bench")
bench.bench_app.command("serve")(bench_serve.serve)
bench.bench_app.command("soak")(bench_serve.soak)
bench.bench_app.command("files")(bench_files.files)
