"""What a lifecycle run is asked for: tasks, lengths, recipes, modes, seeds, examples, peers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import yaml

from winnow import methods
from winnow.bench.lifecycle.modes import MODES, REQUESTS
from winnow.bench.published import READERS
from winnow.bench.tasks import TASKS, Example, Form
from winnow.bench.tasks.task import Count
from winnow.recipe import STAGES, Recipe, nearest

__all__ = ["BASELINE", "RECIPES", "Config", "Unit", "default", "kind", "recipe", "units"]

BASELINE = "full"
"""Everything computed, kept and read: the uncompressed baseline, which always runs."""

RECIPES = (
    "a-shape:init=64,local=448",
    "tri-shape:init=64,local=448,last=64",
    "sparse-prefill",
    "pbs-attn:block=32,segment=64,share=0.5",
    "streaming-llm:sinks=4,recent=508",
    "snapkv:keep=512",
    "gear",
    "tidal-decode:keep=256",
    "quest:keep=256",
    "sparse-read",
    "four-stages",
)
"""What runs by default beside the baseline: sparse prefill by static and by dynamic patterns, dropping by
static and by dynamic rules, a smaller codec, sparse reading, and all stages at once; 512 entries where a
recipe keeps or computes fewer, 256 where it only reads fewer."""

KINDS = {
    BASELINE: "baseline",
    "a-shape:init=64,local=448": "static pattern",
    "tri-shape:init=64,local=448,last=64": "static pattern",
    "sparse-prefill": "dynamic pattern",
    "pbs-attn:block=32,segment=64,share=0.5": "dynamic pattern",
    "streaming-llm:sinks=4,recent=508": "static dropping",
    "snapkv:keep=512": "dynamic dropping",
    "gear": "smaller codec",
}
"""What the stages of a recipe do not tell by themselves."""

_STAGE_KINDS = {
    "generation": "cheaper prefill",
    "compression": "compression",
    "retrieval": "reuse",
    "loading": "sparse reading",
}
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's configuration; :attr:`fingerprint` names it.

    Attributes
    ----------
    model : str
        ``embedded``, a directory or a hub name.
    form : str
        ``embedded`` for that model, ``text`` for any other.
    tasks : tuple of str
        Keys of `winnow.bench.tasks.TASKS`.
    lengths : tuple of int
        Tokens of the contexts.
    recipes : tuple of str
        See :func:`recipe`. :data:`BASELINE` runs whether it is listed or not.
    modes : tuple of str
        Keys of `winnow.bench.lifecycle.modes.MODES`.
    peers : tuple of str
        See `winnow.bench.lifecycle.peers`.
    data : tuple of str
        Published data beside or instead of the tasks: ``scbench:FILE``, ``ruler:FILE``, ``longbench:FILE``;
        ``scbench-published:FILE`` scores as SCBench does.
    examples, turns : int
        Examples for each task and length (and of each file), and questions for each example.
    seed : int
        Of the examples.

    Raises
    ------
    ValueError
        Unknown or repeated names, or counts below one.
    """

    model: str = "embedded"
    form: Form = "embedded"
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    recipes: tuple[str, ...] = RECIPES
    modes: tuple[str, ...] = ("multi-turn", REQUESTS)
    peers: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    examples: int
    turns: int
    seed: int = 1

    def __post_init__(self) -> None:
        for what, given, known in (("task", self.tasks, TASKS), ("mode", self.modes, MODES)):
            for name in given:
                if name not in known:
                    raise ValueError(f"unknown {what} {name!r}; {nearest(name, known)}")
        for name in self.tasks:
            if self.form not in TASKS[name].forms:
                raise ValueError(
                    f"task {name} has no {self.form} form, which the model {self.model!r} needs; "
                    f"choose from {', '.join(t.name for t in TASKS.values() if self.form in t.forms)}"
                )
        for source in self.data:
            reader, _, path = source.partition(":")
            if reader not in READERS or not path:
                raise ValueError(f"cannot read {source!r}; write {' or '.join(f'{r}:FILE' for r in READERS)}")
        for what in ("tasks", "lengths", "recipes", "modes", "peers", "data"):
            values = getattr(self, what)
            if len(set(values)) < len(values):
                raise ValueError(f"{what} names one thing twice; name each once")
            if not values and (what in ("lengths", "modes") or (what == "tasks" and not self.data)):
                raise ValueError(f"no {what} given; give at least one")
        if min(self.examples, self.turns, *self.lengths) < 1:
            raise ValueError("examples, turns and lengths must be at least 1")

    @property
    def systems(self) -> tuple[str, ...]:
        """Names of the baseline and the recipes, the baseline first."""
        return (BASELINE, *(name for name in self.recipes if name != BASELINE))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits; equal for runs that ask the same of the same recipes."""
        told = {
            "format": _FORMAT,
            **asdict(self),
            "recipes": {name: recipe(name).fingerprint() for name in self.systems},
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Read what :meth:`to_dict` wrote."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def default(model: str = "embedded", **changes: Any) -> Config:
    """The configuration that a model is measured with unless told otherwise.

    Parameters
    ----------
    model : str
    **changes
        Fields of :class:`Config`; None leaves the default.
    """
    form: Form = "embedded" if model == "embedded" else "text"
    config: dict[str, Any] = {
        "model": model,
        "form": form,
        "tasks": () if changes.get("data") else tuple(t.name for t in TASKS.values() if form in t.forms),
        "lengths": (1024, 2048, 4096) if form == "embedded" else (4096, 16384),
        "examples": 3,
        "turns": 4,
    }
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items() if v is not None}
    return Config(**{**config, **given})


def recipe(source: str) -> Recipe:
    """A recipe by :data:`BASELINE`, name, file, or ``name:parameter=value,parameter=value``.

    Raises
    ------
    ValueError
        Unknown name or parameter, saying what there is.
    """
    if source == BASELINE:
        return Recipe(name=BASELINE)
    name, colon, listed = source.partition(":")
    params: dict[str, Any] = {}
    for item in listed.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise ValueError(
                f"cannot read {item!r} of {source!r}; write name:parameter=value,parameter=value"
            )
        params[key.strip()] = yaml.safe_load(value)
    return methods.load(name, **params)


def kind(source: str, made: Recipe) -> str:
    """What sort of recipe it is, for grouping and colours."""
    stages = [stage for stage in STAGES if getattr(made, stage) is not None]
    if source in KINDS or not stages:
        return KINDS.get(source, KINDS[BASELINE])
    return _STAGE_KINDS[stages[0]] if len(stages) == 1 else "several stages"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One example in one mode: what every system is asked in turn.

    Attributes
    ----------
    task, length, number : str, int, int
        What identifies the example in a run.
    mode : str
    given : Example or None
        The example of a file; None makes one.
    """

    task: str
    length: int
    number: int
    mode: str
    given: Example | None = None

    def example(self, config: Config, count: Count) -> Example:
        """The example; the same configuration and files give the same bytes."""
        if self.given is not None:
            return self.given
        return TASKS[self.task].make(
            form=config.form,
            length=self.length,
            seed=config.seed,
            number=self.number,
            turns=config.turns,
            count=count,
        )


def units(config: Config, count: Count) -> list[Unit]:
    """Everything that is asked, short contexts first; files are read here.

    The lengths of files' examples are rounded up to powers of two, under which they are reported.
    """
    made = [
        Unit(task=task, length=length, number=number, mode=mode)
        for length in config.lengths
        for number in range(config.examples)
        for task in config.tasks
        for mode in config.modes
    ]
    for source in config.data:
        reader, _, path = source.partition(":")
        for example in islice(READERS[reader](path, count=count), config.examples):
            length = 1 << (example.length - 1).bit_length()
            given = replace(example, length=length)
            made += [
                Unit(task=given.task, length=length, number=given.number, mode=mode, given=given)
                for mode in config.modes
            ]
    return sorted(made, key=lambda unit: unit.length)
