"""A recipe: what to do at each of the four stages, checked when it is made.

``None`` at a stage is the exact default: dense prefill, keep everything, reuse nothing, read
everything. Parts are nested in YAML by their names in :data:`PARTS`::

    generation:
      anchor: {theta: 12.0}
    compression:
      compress:
        score: {window-attention: {window: 32}}
        budget: {uniform: {keep: 1024}}
        act: drop
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from winnow.compression.actions.compensate import Compensate
from winnow.compression.actions.demote import Demote
from winnow.compression.actions.drop import Drop
from winnow.compression.actions.factor_keys import FactorKeys
from winnow.compression.actions.grade import Grade
from winnow.compression.actions.merge_similar import MergeSimilar
from winnow.compression.actions.slide import Slide
from winnow.compression.actions.thin_keys import ThinKeys
from winnow.compression.budgets.adaptive import Adaptive
from winnow.compression.budgets.density import Density
from winnow.compression.budgets.everything import Everything
from winnow.compression.budgets.retrieval_heads import RetrievalHeads
from winnow.compression.budgets.sensitivity import Sensitivity
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Action, BudgetRule, Compress, Scorer
from winnow.compression.scorers.accumulated import Accumulated
from winnow.compression.scorers.peak_attention import PeakAttention
from winnow.compression.scorers.probe_attention import ProbeAttention
from winnow.compression.scorers.recency import Recency
from winnow.compression.scorers.recurrence import Recurrence
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.generation.a_shape import AShape
from winnow.generation.anchor import Anchor
from winnow.generation.permuted_blocks import PermutedBlocks
from winnow.generation.protocol import Generation
from winnow.generation.swiftkv import SwiftKV
from winnow.generation.tri_shape import TriShape
from winnow.loading.landmarks import Landmarks
from winnow.loading.page_bounds import PageBounds
from winnow.loading.protocol import Selector
from winnow.loading.sketch import Sketch
from winnow.loading.tidal import Tidal
from winnow.retrieval.blend import Blend
from winnow.retrieval.protocol import PoolPart
from winnow.retrieval.radix import Radix
from winnow.types import Needs

__all__ = ["PARTS", "STAGES", "Recipe", "Slot", "nearest", "parse_yaml", "read_value"]

Slot = Literal["generation", "compression", "retrieval", "loading", "scorer", "budget", "action"]

STAGES: tuple[Slot, ...] = ("generation", "compression", "retrieval", "loading")
"""The four stages, in the order in which they are printed."""

PARTS: dict[Slot, dict[str, type]] = {
    "generation": {
        "a-shape": AShape,
        "anchor": Anchor,
        "tri-shape": TriShape,
        "permuted-blocks": PermutedBlocks,
        "swiftkv": SwiftKV,
    },
    "compression": {"compress": Compress},
    "scorer": {
        "window-attention": WindowAttention,
        "recency": Recency,
        "accumulated": Accumulated,
        "recurrence": Recurrence,
        "peak-attention": PeakAttention,
        "probe-attention": ProbeAttention,
    },
    "budget": {
        "uniform": Uniform,
        "everything": Everything,
        "adaptive": Adaptive,
        "density": Density,
        "retrieval-heads": RetrievalHeads,
        "sensitivity": Sensitivity,
    },
    "action": {
        "drop": Drop,
        "demote": Demote,
        "slide": Slide,
        "merge-similar": MergeSimilar,
        "compensate": Compensate,
        "thin-keys": ThinKeys,
        "grade": Grade,
        "factor-keys": FactorKeys,
    },
    "retrieval": {"blend": Blend, "radix": Radix},
    "loading": {"tidal": Tidal, "sketch": Sketch, "page-bounds": PageBounds, "landmarks": Landmarks},
}
"""Every part that YAML can name, by slot."""

_PROTOCOLS: dict[Any, Slot] = {
    Generation: "generation",
    Compress: "compression",
    PoolPart: "retrieval",
    Selector: "loading",
    Scorer: "scorer",
    BudgetRule: "budget",
    Action: "action",
}

# What tells an object of one stage from one of another, for a clear message.
_MARKS: dict[Slot, str] = {
    "generation": "patterns",
    "compression": "budget",
    "retrieval": "pool",
    "loading": "select",
}

_NAMES: dict[type, str] = {cls: name for table in PARTS.values() for name, cls in table.items()}

_FORMAT = 1
"""Part of every fingerprint; raise it when the meaning of a written recipe changes."""


def nearest(name: object, known: Iterable[str]) -> str:
    """A clause that names the nearest known name, or lists what there is."""
    choices = sorted(known)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there is {', '.join(choices)}" if choices else "there is none"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do at each of the four stages.

    Attributes
    ----------
    name : str
        For people; not part of the fingerprint.
    generation : Generation or None
        Which scores a prefill computes; None computes all.
    compression : Compress or None
        What stays of the entries, and in which form; None keeps all.
    retrieval : PoolPart or None
        Pool of reusable entries; None reuses nothing.
    loading : Selector or None
        Which entries a decode step reads; None reads all.
    profile : str or None
        Path of the offline profile that the parts read.

    Raises
    ------
    ValueError
        Where the combination is impossible, saying why and what would work.

    Examples
    --------
    >>> from winnow.generation.a_shape import AShape
    >>> from winnow.loading.tidal import Tidal
    >>> both = Recipe(generation=AShape(init=4, local=1024)) | Recipe(loading=Tidal(keep=64))
    >>> both == Recipe.from_yaml(both.to_yaml())
    True
    """

    name: str = ""
    generation: Generation | None = None
    compression: Compress | None = None
    retrieval: PoolPart | None = None
    loading: Selector | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        for stage in STAGES:
            self._check_stage(stage)
        if self.needs.profile and self.profile is None:
            hungry = [s for s, needs in self._stage_needs() if needs.profile]
            raise ValueError(
                f"recipe{self._called()}: {' and '.join(hungry)} reads an offline profile but the recipe "
                f"names none; make one for your model and give its path as profile=..."
            )
        if self.retrieval is not None and self.generation is not None and self.generation.tail is None:
            raise ValueError(
                f"recipe{self._called()}: what its generation computes for a token depends on the tokens "
                f"behind it, so no entry is reusable under another prompt; leave retrieval out"
            )
        if self.needs.mass == "all" and self.retrieval is not None:
            raise ValueError(
                f"recipe{self._called()}: its compression sums the attention of every prompt token, and "
                f"tokens whose entries come from a pool have none; leave retrieval out, or score by the "
                f"last queries (window-attention)"
            )
        if self.needs.random_queries and self.retrieval is not None:
            raise ValueError(
                f"recipe{self._called()}: its compression asks random prompt tokens for their queries, and "
                f"tokens whose entries come from a pool have none; leave retrieval out, or give random=0"
            )
        if self.profile is not None and not self.needs.profile:
            raise ValueError(
                f"recipe{self._called()}: it names the profile {self.profile!r} but none of its parts "
                f"reads one; leave profile out"
            )

    def _called(self) -> str:
        return f" {self.name!r}" if self.name else ""

    def _check_stage(self, stage: Slot) -> None:
        part = getattr(self, stage)
        if part is None or (hasattr(part, _MARKS[stage]) and not isinstance(part, type)):
            return
        fits = [other for other, mark in _MARKS.items() if hasattr(part, mark)]
        hint = f"give it as {fits[0]}=..." if fits else f"give one of {', '.join(sorted(PARTS[stage]))}"
        raise ValueError(f"recipe{self._called()}: {part!r} is no {stage} part; {hint}")

    def _stage_needs(self) -> list[tuple[str, Needs]]:
        parts = [(stage, getattr(self, stage)) for stage in STAGES]
        return [(stage, part.needs) for stage, part in parts if part is not None and hasattr(part, "needs")]

    @property
    def needs(self) -> Needs:
        """What all parts together ask of the engine."""
        total = Needs()
        for _, needs in self._stage_needs():
            total = total | needs
        return total

    def check(self, *, layers: int) -> None:
        """Raise ``ValueError`` where the recipe cannot serve a model of ``layers`` layers."""
        if self.loading is not None:
            self.loading.check(layers)

    def __or__(self, other: Recipe) -> Recipe:
        """Combine recipes of different stages.

        Raises
        ------
        ValueError
            If both decide the same stage.
        """
        both: dict[str, Any] = {"name": " + ".join(n for n in (self.name, other.name) if n)}
        for key in (*STAGES, "profile"):
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine is not None and theirs is not None and mine != theirs:
                raise ValueError(
                    f"{self.name or mine!r} and {other.name or theirs!r} both decide {key}; "
                    f"a recipe has one {key}, take one of them"
                )
            both[key] = mine if mine is not None else theirs
        return Recipe(**both)

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for recipes that do the same whatever their names."""
        return _digest({stage: _encode(getattr(self, stage)) for stage in STAGES} | {"profile": self.profile})

    def generation_fingerprint(self) -> str:
        """``"exact"`` for dense prefill, else digits that name the pattern and its parameters.

        The name space of reusable entries includes it: approximate entries never meet exact ones.
        """
        if self.generation is None:
            return "exact"
        return _digest({"generation": _encode(self.generation), "profile": self.profile})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` takes back; stages that are None are left out.

        Raises
        ------
        ValueError
            If a part is not in :data:`PARTS`, so that nothing could read the result.
        """
        out: dict[str, Any] = {"name": self.name} if self.name else {}
        for stage in STAGES:
            part = getattr(self, stage)
            if part is not None:
                out[stage] = _encode(part, strict=True)
        if self.profile is not None:
            out["profile"] = self.profile
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        ValueError
            On an unknown stage, part or field (with the nearest name) or a value that will not do.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a recipe is a mapping of stages to parts, not {_kind(data)}")
        if "methods" in data:
            raise ValueError("a recipe that names methods is read by winnow.methods.load, not by Recipe")
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"recipe: unknown key {key!r}; {nearest(key, known)}")
        hints = get_type_hints(cls)
        return cls(**{key: read_value(hints[key], value, key) for key, value in data.items()})

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read YAML text (not a path; see :func:`winnow.methods.load`)."""
        return cls.from_dict(parse_yaml(text))


def parse_yaml(text: str) -> dict[str, Any]:
    """YAML text as a mapping; an empty text is the empty mapping.

    Raises
    ------
    ValueError
        Where the text is no YAML (one line, with its place) or no mapping.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ValueError(
            f"recipe: not valid YAML{place}: {getattr(error, 'problem', error)}; check the indentation there"
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"recipe: the text is {_kind(data)}, not a mapping of stages to parts")
    return data


def _digest(data: object) -> str:
    text = json.dumps({"format": _FORMAT, "recipe": data}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kind(value: object) -> str:
    for kind, name in ((Mapping, "a mapping"), (list, "a list"), (str, f"the text {value!r}")):
        if isinstance(value, kind):
            return name
    return repr(value)


def _encode(value: Any, *, strict: bool = False) -> Any:
    """A part as ``{name: {field: value}}``, anything else as plain data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_encode(one, strict=strict) for one in value]
    cls = type(value)
    name = _NAMES.get(cls)
    if name is None:
        if strict:
            raise ValueError(
                f"{cls.__qualname__} is not in winnow.recipe.PARTS, so YAML cannot name it; "
                f"keep the recipe in Python"
            )
        name = f"{cls.__module__}:{cls.__qualname__}"
    return {name: {f.name: _encode(getattr(value, f.name), strict=strict) for f in fields(value)}}


def read_value(hint: Any, value: Any, where: str) -> Any:
    """Plain data as what the annotation ``hint`` of a field or parameter asks for.

    Raises
    ------
    ValueError
        Where it will not do, beginning with ``where``.
    """
    slot = _PROTOCOLS.get(hint)
    if slot is not None:
        return _decode_part(slot, value, where)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        (inner,) = (one for one in args if one is not NoneType)
        return read_value(inner, value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: unknown value {value!r}; {nearest(value, map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: give a list, such as [1, 2], not {_kind(value)}")
        return tuple(read_value(args[0], one, where) for one in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kinds = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
        raise ValueError(f"{where}: give {kinds.get(hint, hint)}, not {_kind(value)}")
    return value


def _decode_part(slot: Slot, value: Any, where: str) -> Any:
    """``name``, or ``{name: {field: value}}``, as the part."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        if isinstance(value, Mapping) and len(value) > 1:
            listed = " and ".join(repr(one) for one in value)
            raise ValueError(f"{where}: {listed} are two parts for one place; take one of them")
        raise ValueError(f"{where}: give a part as 'name: {{field: value}}', not {_kind(value)}")
    ((name, params),) = value.items()
    cls = PARTS[slot].get(name)
    if cls is None:
        homes = [other for other, table in PARTS.items() if name in table]
        hint = f"it is a {homes[0]} part" if homes else nearest(name, PARTS[slot])
        raise ValueError(f"{where}: unknown {slot} part {name!r}; {hint}")
    params = {} if params is None else params
    here = f"{where}.{name}"
    if not isinstance(params, Mapping):
        raise ValueError(f"{here}: give its fields as a mapping, not {_kind(params)}")
    known = {f.name: f for f in fields(cls)}
    for key in params:
        if key not in known:
            raise ValueError(f"{here}: unknown field {key!r}; {nearest(key, known)}")
    for key, field in known.items():
        if key not in params and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{here}: the field {key!r} is missing; give {key}: ...")
    hints = get_type_hints(cls)
    return cls(**{key: read_value(hints[key], one, f"{here}.{key}") for key, one in params.items()})
