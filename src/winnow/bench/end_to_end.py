"""Whole models side by side in one run: decode deep in a context, prefill, resident memory.

All contenders that are PyTorch share one set of random weights of a real shape. Decoding is
timed with the cache filled beforehand with random entries (what attention costs does not depend
on what they hold), in interleaved rounds, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor, nn

from winnow import api
from winnow.bench import llama_cpp
from winnow.bench.machine import describe, read_seconds
from winnow.engine.request import SamplingParams
from winnow.engine.session import Session
from winnow.generation.a_shape import AShape
from winnow.kernels.backend import extension
from winnow.loading.sketch import Sketch
from winnow.models.peers import hf_cache
from winnow.models.random import random_model
from winnow.recipe import Recipe

__all__ = ["CONTENDERS", "markdown", "run", "tables"]

Progress = Callable[[str, int, int], None]

# Share of the entries that the searching recipes read, and of the scores a sparse prefill computes.
_READ = 20
_DENSITY = 10


class Contender(Protocol):
    """Something that can decode deep in a context and prefill a prompt."""

    def fill(self, entries: int, room: int) -> None:
        """Hold ``entries`` random entries, with room for as many more tokens."""
        ...

    def decode(self, tokens: int) -> float:
        """Decode so many tokens; seconds per token."""
        ...

    def prefill(self, ids: list[int]) -> float:
        """Seconds until the first token of a fresh prompt."""
        ...

    def drop(self) -> None:
        """Free the cache."""
        ...


class _HuggingFace:
    """`transformers` alone, with one of its caches; attention as it ships (SDPA)."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        self._module: Any = module
        self._kind = kind
        self._cache: Any = None
        self._at = 0

    def _new_cache(self, room: int) -> Any:
        return hf_cache(self._module, self._kind, room)

    def fill(self, entries: int, room: int) -> None:
        config = self._module.config
        self._cache, self._at = self._new_cache(entries + room), entries
        shape = (1, config.num_key_value_heads, entries, config.head_dim)
        for layer in range(config.num_hidden_layers):
            k, v = (_random(shape, layer, i) for i in range(2))
            self._cache.update(k, v, layer, {"cache_position": torch.arange(entries)})

    @torch.inference_mode()
    def decode(self, tokens: int) -> float:
        token = torch.tensor([[1]])
        start = time.perf_counter()
        for _ in range(tokens):
            position = torch.tensor([self._at])
            logits = self._module(
                token,
                past_key_values=self._cache,
                cache_position=position,
                position_ids=position[None],
                use_cache=True,
            ).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            self._at += 1
        return (time.perf_counter() - start) / tokens

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> float:
        cache = self._new_cache(len(ids) + 1)
        start = time.perf_counter()
        self._module(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    def drop(self) -> None:
        self._cache = None


class _Winnow:
    """The same weights under a recipe."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self._llm = api.load(module, recipe=recipe)
        self._session: Session | None = None

    def fill(self, entries: int, room: int) -> None:
        model, engine = self._llm.model, self._llm.engine
        sequence = engine.new_sequence()
        positions = torch.arange(entries, dtype=torch.int32)
        for layer in range(model.layers):
            k, v = (
                _random((1, model.kv_heads, entries, model.head_dim), layer, i)[0].transpose(0, 1)
                for i in range(2)
            )
            sequence.store.append(layer, k, v, positions)
        sequence.store.advance(entries)
        sequence.tokens = [1] * entries
        sequence.turns = 1
        self._session = Session(engine, sequence)

    def decode(self, tokens: int) -> float:
        assert self._session is not None
        params = SamplingParams(max_new_tokens=tokens + 1, ignore_eos=True)
        stats = self._session.run([1], params).stats
        return stats.decode_seconds / stats.decode_steps

    def prefill(self, ids: list[int]) -> float:
        result = self._llm.generate(ids, max_new_tokens=1, ignore_eos=True)
        assert not isinstance(result, list)
        return result.stats.time_to_first_token

    def drop(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


class _Limit:
    """What no exact decoder can beat: reading every weight and every entry once."""

    def __init__(self, module: nn.Module) -> None:
        self._config: Any = module.config
        # Tied weights are one tensor, fused ones are views of one storage: read each byte once.
        self._weights = list({p.data_ptr(): p.detach() for p in module.parameters()}.values())
        self._entries: Tensor | None = None

    def fill(self, entries: int, room: int) -> None:
        c = self._config
        values = 2 * c.num_hidden_layers * c.num_key_value_heads * entries * c.head_dim
        self._entries = torch.ones(values, dtype=torch.bfloat16)

    def decode(self, tokens: int) -> float:
        assert self._entries is not None
        return sum(read_seconds(*self._weights, self._entries) for _ in range(tokens)) / tokens

    def prefill(self, ids: list[int]) -> float:
        raise NotImplementedError("a prefill is bound by products, not by reading")

    def drop(self) -> None:
        self._entries = None


def _random(shape: tuple[int, ...], layer: int, which: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * layer + which)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(torch.bfloat16)


def _recipes(decode_at: int, prefill: int) -> dict[str, Recipe]:
    # Below a few thousand entries the forced ones (sinks, recent) would leave nothing to search.
    keep = max(decode_at // _READ, 128)
    return {
        "winnow full": Recipe(),
        "winnow search": Recipe(loading=Sketch(keep=keep, every=1)),
        "winnow search, reused over layers": Recipe(loading=Sketch(keep=keep, every=4)),
        "winnow sparse prefill": Recipe(
            generation=AShape(init=64, local=max(prefill // (2 * _DENSITY) - 64, 64))
        ),
    }


# Which contenders take part in which measurement; the first is the fair baseline.
CONTENDERS: dict[str, tuple[str, ...]] = {
    "decode": (
        "hf static",
        "hf dynamic",
        "winnow full",
        "winnow search",
        "winnow search, reused over layers",
        "llama.cpp",
        "reading it all once",
    ),
    "prefill": ("hf dynamic", "winnow full", "winnow sparse prefill", "llama.cpp"),
}


def run(
    *,
    contenders: list[str] | None = None,
    decode_at: int = 32768,
    prefill: int = 16384,
    preset: str = "1b",
    prefill_rounds: int = 1,
    rounds: int = 5,
    tokens: int = 4,
    memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time every contender in one process, interleaved.

    Parameters
    ----------
    contenders : list of str or None
        Names from :data:`CONTENDERS`; None takes all.
    decode_at : int
        Entries in the cache while decoding; 0 skips decoding.
    prefill : int
        Tokens of the prompt; 0 skips the prefill.
    preset : {"1b", "tiny"}
    prefill_rounds : int
        Interleaved rounds of the prefill; one of 16K tokens takes seven minutes on two cores.
    rounds, tokens : int
        Interleaved rounds of decoding, and tokens decoded per round and contender.
    memory : bool
        Also measure resident memory while decoding, in a fresh process.
    progress : callable or None

    Returns
    -------
    dict
        Configuration, machine, raw samples and medians; JSON-ready.
    """
    known = {name for names in CONTENDERS.values() for name in names}
    for name in contenders or ():
        if name not in known:
            raise ValueError(f"unknown contender {name!r}; there are {', '.join(sorted(known))}")

    missing = {"llama.cpp": why} if (why := llama_cpp.available()) else {}
    if extension() is None:
        missing["reading it all once"] = "the native kernels were not built; install a C++ compiler"
    for name in contenders or ():
        if name in missing:
            raise ValueError(missing[name])

    def chosen(what: str) -> list[str]:
        wanted = [name for name in CONTENDERS[what] if contenders is None or name in contenders]
        return [name for name in wanted if name not in missing]

    module = random_model(preset, seed=0, dtype=torch.bfloat16)
    recipes = _recipes(decode_at, prefill)
    made: dict[str, Contender] = {}

    def contender(name: str) -> Contender:
        if name not in made:
            if name.startswith("hf "):
                made[name] = _HuggingFace(module, name.removeprefix("hf "))
            elif name == "reading it all once":
                made[name] = _Limit(module)
            elif name == "llama.cpp":
                made[name] = llama_cpp.LlamaCpp(module, torch.get_num_threads())
            else:
                made[name] = _Winnow(module, recipes[name])
        return made[name]

    report: dict[str, Any] = {
        "command": "winnow bench end-to-end",
        "config": {
            "preset": preset,
            "decode_at": decode_at,
            "prefill": prefill,
            "rounds": rounds,
            "tokens": tokens,
        },
        "machine": describe(),
        "missing": missing,
    }
    if decode_at:
        report["decode"] = _decode(chosen("decode"), contender, decode_at, rounds, tokens, progress)
    if prefill:
        report["prefill"] = _prefill(
            chosen("prefill"), contender, prefill, prefill_rounds, module.config.vocab_size, progress
        )
    if memory and decode_at:
        report["memory"] = _memory(preset, decode_at)
    return report


def _decode(
    names: list[str],
    contender: Callable[[str], Contender],
    entries: int,
    rounds: int,
    tokens: int,
    progress: Progress | None,
) -> dict[str, Any]:
    samples: dict[str, list[float]] = {name: [] for name in names}
    total = len(names) * (rounds + 1)
    for name in names:
        contender(name).fill(entries, (rounds + 1) * (tokens + 2))
        contender(name).decode(1)
        if progress is not None:
            progress(f"decode: {name}", len(samples), total)
    for r in range(rounds):
        for i, name in enumerate(names):
            samples[name].append(contender(name).decode(tokens))
            if progress is not None:
                progress(f"decode: {name}", (r + 1) * len(names) + i + 1, total)
    for name in names:
        contender(name).drop()
    gc.collect()
    return _rows(samples)


def _prefill(
    names: list[str],
    contender: Callable[[str], Contender],
    tokens: int,
    rounds: int,
    vocabulary: int,
    progress: Progress | None,
) -> dict[str, Any]:
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i, name in enumerate(names * rounds):
        if progress is not None:
            progress(f"prefill: {name}", i, len(names) * rounds)
        samples[name].append(contender(name).prefill(ids))
        gc.collect()
    return _rows(samples)


def _rows(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios over the fair baseline (the first) and over our own full attention."""
    medians = {name: statistics.median(values) for name, values in samples.items()}
    base = next(iter(medians.values()))
    own = medians.get("winnow full")
    return {
        name: {
            "seconds": seconds,
            "samples": samples[name],
            "over_baseline": base / seconds,
            "over_own_full": None if own is None else own / seconds,
        }
        for name, seconds in medians.items()
    }


def _memory(preset: str, decode_at: int) -> dict[str, Any]:
    """Resident memory of a fresh process that decodes, beside weights plus entries."""
    command = [sys.executable, "-m", "winnow.bench.end_to_end", preset, str(decode_at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed"}
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measure_memory(preset: str, decode_at: int) -> dict[str, Any]:
    before = _resident()
    module = random_model(preset, seed=0, dtype=torch.bfloat16)
    weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in module.parameters()}.values())
    contender = _Winnow(module, Recipe())
    contender.fill(decode_at, 64)
    contender.decode(8)
    assert contender._session is not None
    entries = sum(contender._session.bytes_stored().values())
    held = _resident() - before
    return {
        "resident": held,
        "weights": weights,
        "entries": entries,
        "over": held / (weights + entries) - 1.0,
    }


def tables(report: dict[str, Any]) -> list[Table]:
    """The report as tables; ratios against the fair baseline come first."""
    out = []
    config = report["config"]
    titles = {
        "decode": f"Decode with {config['decode_at']} entries in the cache, seconds per token",
        "prefill": f"Prefill of {config['prefill']} tokens, seconds to the first token",
    }
    for what, title in titles.items():
        if what not in report:
            continue
        base = next(iter(report[what]))
        table = Table("contender", "median", f"x {base}", "x winnow full", title=title)
        for name, row in report[what].items():
            own = "" if row["over_own_full"] is None else f"{row['over_own_full']:.2f}"
            table.add_row(name, f"{row['seconds']:.3f}", f"{row['over_baseline']:.2f}", own)
        out.append(table)
    if "over" in report.get("memory", {}):
        memory = report["memory"]
        table = Table("resident", "weights", "KV entries", "over their sum", title="Memory while decoding")
        sizes = (f"{memory[key] / 2**20:.0f} MiB" for key in ("resident", "weights", "entries"))
        table.add_row(*sizes, f"{memory['over']:+.1%}")
        out.append(table)
    return out


def markdown(report: dict[str, Any], source: str) -> str:
    """The report as Markdown: a table per phase and a line on memory."""
    config, machine, lines = report["config"], report["machine"], []
    for what, unit, scale in (("decode", "ms per token", 1e3), ("prefill", "seconds", 1.0)):
        if what not in report:
            continue
        base = next(iter(report[what]))
        lines += [f"| contender | {unit} | times `{base}` | times `winnow full` |", "|---|---:|---:|---:|"]
        for name, row in report[what].items():
            own = "" if row["over_own_full"] is None else f"{row['over_own_full']:.2f}"
            lines.append(f"| `{name}` | {scale * row['seconds']:.0f} | {row['over_baseline']:.2f} | {own} |")
        lines.append("")
    if "over" in report.get("memory", {}):
        mebibytes = {key: report["memory"][key] / 2**20 for key in ("resident", "weights", "entries")}
        lines += [
            "Memory while decoding, in a process of its own: {resident:.0f} MiB resident beside "
            "{weights:.0f} MiB of weights and {entries:.0f} MiB of entries,".format(**mebibytes),
            f"{report['memory']['over']:.1%} over their sum (the interpreter and its libraries were resident "
            "before and are not counted).",
            "",
        ]
    samples = len(next(iter((report.get("decode") or report["prefill"]).values()))["samples"])
    lines.append(
        f"Shape {config['preset']}, medians of {samples} interleaved rounds in one process; "
        f"{machine['cpu']['name']}, {machine['cores']} cores; raw samples in `{source}`."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(_measure_memory(sys.argv[1], int(sys.argv[2]))))
