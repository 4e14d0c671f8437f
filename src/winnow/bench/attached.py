"""``winnow bench attached``: what a method costs and gives while decoding, beside full attention.

The model has the layers and heads of Llama 3.2 1B around a hidden size of 64: next to no weights are read,
so that what is timed is attention and whatever the method attaches to it. Caches are filled with random
entries; a short prompt then lets the method act as it does at the end of a prefill, and rounds of decoded
tokens are interleaved over the contenders. A round is as long as a method's pause between two cuts, so
that each contains one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from winnow import api
from winnow.bench.machine import describe, read_seconds
from winnow.engine.request import SamplingParams
from winnow.engine.session import Session
from winnow.kernels.backend import extension
from winnow.methods.adakv import adakv
from winnow.methods.d2o import d2o
from winnow.methods.epicache import epicache
from winnow.methods.gear import gear
from winnow.methods.h2o import h2o
from winnow.methods.lazy_eviction import lazy_eviction
from winnow.methods.mustafar import mustafar
from winnow.methods.quest import quest
from winnow.methods.razor_attention import razor_attention
from winnow.methods.shadowkv import shadowkv
from winnow.methods.snapkv import snapkv
from winnow.methods.streaming_llm import streaming_llm
from winnow.methods.think import think
from winnow.methods.zipcache import zipcache
from winnow.models.random import random_model
from winnow.profiles import save_profile
from winnow.recipe import Recipe
from winnow.types import Profile

__all__ = ["CONTENDERS", "markdown", "run", "table"]

Progress = Callable[[str, int, int], None]

_EVERY = 32  # decoded tokens between two cuts, and of a round
_KEEP = 1024

CONTENDERS: dict[str, Recipe] = {
    "full": Recipe(),
    "h2o": h2o(heavy=_KEEP // 2, recent=_KEEP // 2, every=_EVERY),
    "d2o": d2o(heavy=_KEEP // 2, recent=_KEEP // 2, every=_EVERY),
    "lazy-eviction": lazy_eviction(keep=_KEEP, window=_EVERY),
    "streaming-llm": streaming_llm(sinks=4, recent=_KEEP - 4, every=_EVERY),
    "snapkv": snapkv(keep=_KEEP),
    "adakv": adakv(keep=_KEEP),
    "think": think(),
    "mustafar": mustafar(),
    "gear": gear(),
    "zipcache": zipcache(),
    "quest": quest(keep=_KEEP),
    "shadowkv": shadowkv(keep=_KEEP),
    "razor-attention": razor_attention(buffer=_KEEP, every=_EVERY),
    "epicache": epicache(keep=_KEEP),
}


def _with_profile(recipe: Recipe, module: torch.nn.Module, directory: Path) -> Recipe:
    """The recipe; the profile that it reads, if any, is written for this model, with arbitrary scores."""
    if recipe.profile is None:
        return recipe
    model, path = api.load(module).model, directory / recipe.profile
    shape = (2, model.layers, model.kv_heads)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tensors = {
        "retrieval-heads": {"induction": scores[0], "echo": scores[1]},
        "layer-sensitivity": {"cosine": scores[0, :, 0]},
    }
    save_profile(Profile(kind=path.stem, model=model.fingerprint, tensors=tensors[path.stem]), path)
    return replace(recipe, profile=str(path))


class _Attached:
    """A recipe on a cache of random entries."""

    def __init__(
        self, module: torch.nn.Module, recipe: Recipe, k_THD: Tensor, v_THD: Tensor, prompt: int
    ) -> None:
        llm = api.load(module, recipe=recipe)
        model, sequence = llm.model, llm.engine.new_sequence()
        filled = k_THD.shape[0]
        positions = torch.arange(filled, dtype=torch.int32)
        for layer in range(model.layers):
            sequence.store.append(layer, k_THD, v_THD, positions)
        sequence.store.advance(filled)
        sequence.tokens = [1] * filled
        self._session = Session(llm.engine, sequence)
        first = self._session.run([1] * prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
        self.prefill_seconds = first.stats.time_to_first_token

    def held(self) -> int:
        """Entries of all layers and heads."""
        return sum(map(sum, self._session.head_entries()))

    def decode(self) -> float:
        """Seconds per token of one round."""
        params = SamplingParams(max_new_tokens=_EVERY + 1, ignore_eos=True)
        stats = self._session.run([1], params).stats
        return stats.decode_seconds / stats.decode_steps

    def bytes(self) -> int:
        return sum(self._session.bytes_stored().values())


def run(
    *,
    contenders: list[str] | None = None,
    entries: int = 8192,
    prompt: int = 64,
    rounds: int = 4,
    preset: str = "1b-attention",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time full attention and recipes in one process, interleaved.

    Parameters
    ----------
    contenders : list of str or None
        Names of :data:`CONTENDERS` beside ``full``; None takes all.
    entries : int
        Entries of every head when decoding begins, before a method acts.
    prompt : int
        How many of them are computed; the others are random.
    rounds : int
    preset : str
        Of :func:`winnow.models.random.random_model`.
    progress : callable or None

    Returns
    -------
    dict
        Configuration, machine, the limit (seconds to read full attention's entries once) and a row per
        contender: raw samples with the entries held when each round began, medians, and the ratio to
        ``full``; JSON-ready.
    """
    chosen = list(CONTENDERS) if contenders is None else ["full", *contenders]
    for name in chosen:
        if name not in CONTENDERS:
            raise ValueError(f"unknown contender {name!r}; there are {', '.join(CONTENDERS)}")
    if not 0 < prompt < entries:
        raise ValueError(f"a prompt of {prompt} tokens does not fit {entries} entries; make it shorter")
    if extension() is None:
        raise ValueError("there are no native kernels to measure; install a C++ compiler and reinstall")
    tell = progress or (lambda what, done, total: None)
    module = random_model(preset, seed=0)
    c = module.config
    shape, generator = (entries - prompt, c.num_key_value_heads, c.head_dim), torch.Generator().manual_seed(0)
    # The same in every layer: what is timed does not depend on it.
    k_THD, v_THD = (torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2))
    made: dict[str, _Attached] = {}
    total = len(chosen) * (rounds + 1)
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as directory:
        for i, name in enumerate(chosen):
            tell(f"{name}: prefill", i, total)
            recipe = _with_profile(CONTENDERS[name], module, Path(directory))
            made[name] = _Attached(module, recipe, k_THD, v_THD, prompt)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for r in range(rounds):
        for i, name in enumerate(chosen):
            tell(f"{name}: decode", (r + 1) * len(chosen) + i, total)
            held = made[name].held()
            samples[name].append({"entries": held, "seconds": made[name].decode()})
    size = 2 * c.num_hidden_layers * c.num_key_value_heads * entries * c.head_dim
    memory = torch.ones(size, dtype=torch.bfloat16)
    limit = [read_seconds(memory) for _ in range(4)][1:]
    all_entries = c.num_hidden_layers * c.num_key_value_heads * entries
    return {
        "command": "winnow bench attached",
        "config": {
            "preset": preset,
            "entries": entries,
            "prompt": prompt,
            "rounds": rounds,
            "tokens": _EVERY,
            "recipes": {name: CONTENDERS[name].to_yaml() for name in chosen},
        },
        "machine": describe(),
        "limit": {"bytes": memory.nbytes, "seconds": statistics.median(limit), "samples": limit},
        "rows": _rows(made, samples, all_entries),
    }


def _rows(
    made: dict[str, _Attached], samples: dict[str, list[dict[str, float]]], all_entries: int
) -> dict[str, Any]:
    """Medians apart for rounds that began with everything still there, and for those after a cut."""
    full = statistics.median(one["seconds"] for one in samples["full"])
    rows: dict[str, Any] = {}
    for name, of_one in samples.items():
        row: dict[str, Any] = {
            "prefill_seconds": made[name].prefill_seconds,
            "bytes_stored": made[name].bytes(),
            "samples": of_one,
        }
        for key, whole in (("uncut", True), ("cut", False)):
            times = [one["seconds"] for one in of_one if (one["entries"] >= all_entries) == whole]
            median = statistics.median(times) if times else None
            row[key] = None if median is None else {"seconds": median, "over_full": median / full}
        rows[name] = row
    return rows


def table(report: dict[str, Any]) -> Table:
    """The report as a table."""
    config = report["config"]
    out = Table(
        "method",
        "uncut, ms/token",
        "x full",
        "cut, ms/token",
        "x full",
        "prefill, s",
        "MiB stored",
        title=f"Attention and what is attached to it, {config['entries']} entries",
    )
    for name, row in report["rows"].items():
        cells = [name]
        for key in ("uncut", "cut"):
            cells += (
                ["", ""]
                if row[key] is None
                else [f"{1e3 * row[key]['seconds']:.2f}", f"{row[key]['over_full']:.2f}"]
            )
        out.add_row(*cells, f"{row['prefill_seconds']:.2f}", f"{row['bytes_stored'] / 2**20:.0f}")
    out.add_row("reading the entries once", f"{1e3 * report['limit']['seconds']:.2f}", "", "", "", "", "")
    return out


def markdown(report: dict[str, Any], source: str) -> str:
    """The report as a Markdown table, the quickest first."""
    config, machine = report["config"], report["machine"]
    heads = (
        "method",
        "while everything is there",
        "once cut",
        f"prefill of {config['prompt']} tokens and the cut",
    )
    lines = [f"| {' | '.join(heads)} | stored |", "|---|---:|---:|---:|---:|"]

    def quickest(item: tuple[str, Any]) -> float:
        row = item[1]
        seconds: float = (row["cut"] or row["uncut"])["seconds"]
        return seconds

    for name, row in sorted(report["rows"].items(), key=quickest):
        cells = (
            f"`{name}`",
            *("" if row[key] is None else _milliseconds(row[key]) for key in ("uncut", "cut")),
            f"{row['prefill_seconds']:.2f} s",
            f"{row['bytes_stored'] / 2**20:.0f} MiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Milliseconds per token, in brackets the quotient to full attention in the same run; reading full "
        f"attention's entries once takes {1e3 * report['limit']['seconds']:.1f} ms. {config['entries']} "
        f"entries per head, medians of {config['rounds']} rounds of {config['tokens']} tokens; "
        f"{machine['cpu']['name']}, {machine['cores']} cores; raw samples in `{source}`.",
    ]
    return "\n".join(lines)


def _milliseconds(cell: dict[str, float]) -> str:
    return f"{1e3 * cell['seconds']:.1f} ({cell['over_full']:.2f})"
