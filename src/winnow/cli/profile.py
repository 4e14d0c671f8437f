"""``winnow profile``: learn offline what some methods need to know of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from winnow import api
from winnow.cli.show import console, emit_json, progress_bar
from winnow.profiles import save_profile
from winnow.tune.layer_sensitivity import layer_sensitivity
from winnow.tune.retrieval_heads import retrieval_heads

__all__ = ["profile_app"]

profile_app = typer.Typer(
    help="Learn offline what some methods need to know of a model.", no_args_is_help=True
)


@profile_app.command("retrieval-heads")
def heads(
    model: Annotated[str, typer.Argument(help="A directory, a hub name, or 'embedded'.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("retrieval-heads.safetensors"),
    tokens: Annotated[int, typer.Option(help="Length of the random sequence.")] = 2500,
    repeats: Annotated[int, typer.Option(help="Times it occurs.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the random sequence.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score every KV head by its attention to earlier occurrences of what it reads (RazorAttention)."""
    language_model = api.load(model).engine.model
    with progress_bar(as_json) as bar:
        task = bar.add_task("reading a repeated sequence", total=None)
        profile = retrieval_heads(
            language_model,
            tokens=tokens,
            repeats=repeats,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    save_profile(profile, out)
    scores = {name: tensor.tolist() for name, tensor in profile.tensors.items()}
    if as_json:
        emit_json({"kind": profile.kind, "model": profile.model, "file": str(out), **scores})
        return
    table = Table(
        "layer", "KV head", "induction", "echo", title=f"{language_model.name}: strongest heads first"
    )
    ranked = sorted(
        ((layer, head) for layer, row in enumerate(scores["induction"]) for head in range(len(row))),
        key=lambda at: -scores["induction"][at[0]][at[1]],
    )
    for layer, head in ranked[:16]:
        values = (f"{scores[name][layer][head]:.4f}" for name in ("induction", "echo"))
        table.add_row(str(layer), str(head), *values)
    console.print(table)
    console.print(f"written to {out}")


@profile_app.command("layer-sensitivity")
def layers(
    model: Annotated[str, typer.Argument(help="A directory, a hub name, or 'embedded'.")],
    text: Annotated[Path, typer.Option(help="A long text of the kind that the model will read.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("layer-sensitivity.safetensors"),
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read.")] = 16384,
    window: Annotated[int, typer.Option(help="Of block-local attention.")] = 4096,
    sinks: Annotated[int, typer.Option(help="First tokens that block-local attention sees.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cosines as JSON.")] = False,
) -> None:
    """Compare every layer's keys under full and under block-local attention (EpiCache)."""
    llm = api.load(model)
    ids = llm.tokens(text.read_text(encoding="utf-8"))[: min(tokens, llm.model.max_length)]
    with progress_bar(as_json) as bar:
        task = bar.add_task("reading the text twice", total=None)
        profile = layer_sensitivity(
            llm.model,
            ids,
            window=window,
            sinks=sinks,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    save_profile(profile, out)
    cosine = profile.tensors["cosine"].tolist()
    if as_json:
        emit_json({"kind": profile.kind, "model": profile.model, "file": str(out), "cosine": cosine})
        return
    table = Table("layer", "cosine", title=f"{llm.model.name}: keys under full and block-local attention")
    for number, value in enumerate(cosine):
        table.add_row(str(number), f"{value:.4f}")
    console.print(table)
    console.print(f"written to {out}")
