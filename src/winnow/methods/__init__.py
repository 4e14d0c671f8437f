"""Published methods, each a function that returns a recipe, and recipes that combine them.

The table is explicit: a method is here because :data:`METHODS` lists it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from winnow.methods.a_shape import a_shape
from winnow.methods.adakv import adakv
from winnow.methods.anchor_attention import anchor_attention
from winnow.methods.cacheblend import cacheblend
from winnow.methods.d2o import d2o
from winnow.methods.epicache import epicache
from winnow.methods.gear import gear
from winnow.methods.h2o import h2o
from winnow.methods.lazy_eviction import lazy_eviction
from winnow.methods.mustafar import mustafar
from winnow.methods.pbs_attn import pbs_attn
from winnow.methods.prefix_reuse import prefix_reuse
from winnow.methods.quest import quest
from winnow.methods.razor_attention import razor_attention
from winnow.methods.shadowkv import shadowkv
from winnow.methods.snapkv import snapkv
from winnow.methods.streaming_llm import streaming_llm
from winnow.methods.swiftkv import swiftkv
from winnow.methods.think import think
from winnow.methods.tidal_decode import tidal_decode
from winnow.methods.tri_shape import tri_shape
from winnow.methods.zipcache import zipcache
from winnow.recipe import Recipe, Slot, nearest, parse_yaml, read_value

__all__ = ["METHODS", "Method", "from_text", "load", "packaged", "rows"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table.

    Attributes
    ----------
    name : str
        As written on the command line and in YAML.
    make : callable
        The function that returns the recipe; its docstring is the method's page.
    stage : str
    paper : str
    needs : str
        What it asks of the user beyond a model.
    saves : str
        Which cost it cuts, measured how.
    """

    name: str
    make: Callable[..., Recipe]
    stage: Slot
    paper: str
    needs: str
    saves: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="a-shape",
            make=a_shape,
            stage="generation",
            paper="arXiv 2309.17453, 2407.02490",
            needs="nothing",
            saves="score entries of the prefill: linear in the length",
        ),
        Method(
            name="tri-shape",
            make=tri_shape,
            stage="generation",
            paper="arXiv 2412.10319",
            needs="nothing",
            saves="score entries of the prefill: linear in the length, but for the last tokens",
        ),
        Method(
            name="anchor-attention",
            make=anchor_attention,
            stage="generation",
            paper="arXiv 2505.23520",
            needs="nothing (theta)",
            saves="score entries of the prefill, by content",
        ),
        Method(
            name="pbs-attn",
            make=pbs_attn,
            stage="generation",
            paper="arXiv 2510.21270",
            needs="nothing (share)",
            saves="score entries of the prefill, by content",
        ),
        Method(
            name="swiftkv",
            make=swiftkv,
            stage="generation",
            paper="arXiv 2410.03960",
            needs="distillation; a Llama-shaped model",
            saves="prefill of the later layers; bytes stored where groups share entries",
        ),
        Method(
            name="snapkv",
            make=snapkv,
            stage="compression",
            paper="arXiv 2404.14469",
            needs="queries of the last prompt tokens",
            saves="bytes stored and read: keep entries per KV head",
        ),
        Method(
            name="adakv",
            make=adakv,
            stage="compression",
            paper="arXiv 2407.11550",
            needs="queries of the last prompt tokens",
            saves="bytes stored and read: keep entries per KV head on average, shared by need",
        ),
        Method(
            name="streaming-llm",
            make=streaming_llm,
            stage="compression",
            paper="arXiv 2309.17453",
            needs="rotary positions",
            saves="bytes stored and read: sinks and a window, from the first token on",
        ),
        Method(
            name="h2o",
            make=h2o,
            stage="compression",
            paper="arXiv 2306.14048",
            needs="attention mass (half of the prefill's attention more)",
            saves="bytes stored and read, bounded while decoding",
        ),
        Method(
            name="d2o",
            make=d2o,
            stage="compression",
            paper="arXiv 2406.13035",
            needs="attention mass (half of the prefill's attention more)",
            saves="bytes stored and read, by layer; what goes is merged",
        ),
        Method(
            name="lazy-eviction",
            make=lazy_eviction,
            stage="compression",
            paper="arXiv 2506.15969",
            needs="attention of every decode step",
            saves="bytes stored and read of long outputs",
        ),
        Method(
            name="think",
            make=think,
            stage="compression",
            paper="arXiv 2407.21018",
            needs="queries of the last prompt tokens",
            saves="bytes of old keys: percent of a hundred channels",
        ),
        Method(
            name="zipcache",
            make=zipcache,
            stage="compression",
            paper="arXiv 2405.14256",
            needs="queries of some prompt tokens; time to decode what is read",
            saves="bytes stored and read: 4 or 2 bits by importance",
        ),
        Method(
            name="razor-attention",
            make=razor_attention,
            stage="compression",
            paper="arXiv 2407.15891",
            needs="a profile: winnow profile retrieval-heads",
            saves="bytes stored and read: windows for all heads but those that retrieve",
        ),
        Method(
            name="epicache",
            make=epicache,
            stage="compression",
            paper="arXiv 2509.17396",
            needs="a profile: winnow profile layer-sensitivity; llm.episodes",
            saves="bytes stored and read, and the peak while a long history is read",
        ),
        Method(
            name="gear",
            make=gear,
            stage="compression",
            paper="arXiv 2403.05527",
            needs="time to decode what is read",
            saves="bytes stored and read: a third to a quarter, nearly without loss",
        ),
        Method(
            name="mustafar",
            make=mustafar,
            stage="compression",
            paper="arXiv 2505.22913",
            needs="nothing",
            saves="bytes stored and read: the smallest elements of every key and value",
        ),
        Method(
            name="prefix-reuse",
            make=prefix_reuse,
            stage="retrieval",
            paper="arXiv 2312.07104",
            needs="memory for the pool",
            saves="prefill of prompts that begin alike, exactly",
        ),
        Method(
            name="cacheblend",
            make=cacheblend,
            stage="retrieval",
            paper="arXiv 2405.16444",
            needs="prompts in chunks, memory for the pool",
            saves="prefill of chunks that were seen before, anywhere in a prompt, approximately",
        ),
        Method(
            name="tidal-decode",
            make=tidal_decode,
            stage="loading",
            paper="arXiv 2410.05076",
            needs="nothing (layers)",
            saves="bytes read per decode step",
        ),
        Method(
            name="quest",
            make=quest,
            stage="loading",
            paper="arXiv 2406.10774",
            needs="nothing; keeps two vectors per page",
            saves="bytes read per decode step",
        ),
        Method(
            name="shadowkv",
            make=shadowkv,
            stage="loading",
            paper="arXiv 2410.21465",
            needs="rotary positions; a disk; time to rebuild keys",
            saves="bytes in memory (keys at low rank, values on disk) and read per decode step",
        ),
    )
}
"""Every published method, in the order of the stages."""

_RECIPES = Path(__file__).parent / "recipes"


def packaged() -> tuple[str, ...]:
    """Names of the recipes that ship with the package."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def rows() -> list[dict[str, str]]:
    """The method table as plain data."""
    return [
        {"name": m.name, "stage": m.stage, "paper": m.paper, "needs": m.needs, "saves": m.saves}
        for m in METHODS.values()
    ]


def load(source: str | Path | Recipe, **params: Any) -> Recipe:
    """Find a recipe.

    Parameters
    ----------
    source : str, Path or Recipe
        A method (``"snapkv"``), a packaged recipe (``"four-stages"``), a YAML file, or a recipe,
        which is returned as it is.
    **params
        Parameters of a method; the others take none.

    Raises
    ------
    ValueError
        If nothing is called that (with the nearest name), or what is found cannot be made.
    """
    if isinstance(source, Recipe):
        found, called = source, "a recipe"
    elif isinstance(source, str) and source in METHODS:
        return _make(source, params)
    elif isinstance(source, str) and source in packaged():
        found, called = _read(_RECIPES / f"{source}.yaml"), f"the packaged recipe {source!r}"
    elif isinstance(source, Path) or source.endswith((".yaml", ".yml")):
        found, called = _read(Path(source)), f"the file {source}"
    else:
        raise ValueError(
            f"no method or packaged recipe is called {source!r}; {nearest(source, (*METHODS, *packaged()))} "
            f"A recipe file ends with .yaml"
        )
    if params:
        raise ValueError(f"{called} takes no parameters, {', '.join(params)} given; change the recipe itself")
    return found


def _make(name: str, params: Mapping[str, Any], where: str = "") -> Recipe:
    function = METHODS[name].make
    known = inspect.signature(function).parameters
    hints = get_type_hints(function)
    for key in params:
        if key not in known:
            raise ValueError(f"{where}{name}: unknown parameter {key!r}; {nearest(key, known)}")
    for key, parameter in known.items():
        if key not in params and parameter.default is parameter.empty:
            raise ValueError(f"{where}{name}: the parameter {key!r} is missing; give {key}: ...")
    return function(
        **{key: read_value(hints[key], value, f"{where}{name}.{key}") for key, value in params.items()}
    )


def _read(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no recipe file {path}; methods and packaged recipes go by name") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the recipe file {path} cannot be read: {error}; give a readable text file"
        ) from None
    try:
        return from_text(text)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def from_text(text: str) -> Recipe:
    """Read YAML text that may name methods as well as parts.

    ``methods`` maps names to parameters (or lists names); what they decide and what the other
    keys decide are combined, and two that decide the same stage are refused.
    """
    data = parse_yaml(text)
    named = data.pop("methods", {})
    if isinstance(named, list) and all(isinstance(name, str) for name in named):
        named = dict.fromkeys(named)
    if not isinstance(named, Mapping):
        raise ValueError("methods: give a mapping of names to parameters, such as 'snapkv: {keep: 1024}'")
    owner = dict.fromkeys(data, "the recipe itself")
    for name, params in named.items():
        if name not in METHODS:
            raise ValueError(f"methods: unknown method {name!r}; {nearest(name, METHODS)}")
        if not isinstance(params, Mapping | None):
            raise ValueError(f"methods.{name}: give its parameters as a mapping, not {params!r}")
        for key, part in _make(name, params or {}, "methods.").to_dict().items():
            if key == "name":
                continue
            if key in owner:
                raise ValueError(
                    f"{owner[key]} and {name} both decide {key}; a recipe has one {key}, take one of them"
                )
            owner[key], data[key] = name, part
    return Recipe.from_dict({"name": " + ".join(named), **data} if named else data)
