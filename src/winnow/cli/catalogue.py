"""``winnow methods`` and ``winnow recipe``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from winnow.cli import show

__all__ = ["methods", "recipe_app"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="A YAML file, a method, or a packaged recipe.")]


def methods(as_json: Json = False) -> None:
    """List the published methods that are implemented."""
    from winnow.methods import rows

    entries = rows()
    if as_json:
        show.emit_json(entries)
        return
    table = Table("method", "stage", "paper", "needs", "saves")
    for entry in entries:
        table.add_row(*(str(entry[key]) for key in ("name", "stage", "paper", "needs", "saves")))
    show.console.print(table)


recipe_app = typer.Typer(help="Show and check recipes.", no_args_is_help=True)


@recipe_app.command("show")
def recipe_show(recipe: Name, as_json: Json = False) -> None:
    """Print a recipe in full, defaults included, as YAML."""
    from winnow.methods import load

    found = load(recipe)
    if as_json:
        show.emit_json(found.to_dict())
    else:
        print(found.to_yaml(), end="")


@recipe_app.command("check")
def recipe_check(
    recipe: Name,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also check that this model can be served.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether a recipe can be made (and served by a model); exit code 2 with the reason if not."""
    from winnow.methods import load

    found = load(recipe)
    if model is not None:
        from winnow.models.load import load_model

        found.check(layers=load_model(model)[0].layers)
    if as_json:
        show.emit_json({"ok": True, "fingerprint": found.fingerprint(), "recipe": found.to_dict()})
    else:
        print(f"{recipe}: good; fingerprint {found.fingerprint()}")
