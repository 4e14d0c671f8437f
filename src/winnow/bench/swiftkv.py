"""What SwiftKV saves of a prefill: ``python -m winnow.bench.swiftkv --out FILE``.

A model of random weights with the shape of Llama 3.2 1B reads one prompt under full attention and under
SwiftKV with three quarters and half of its layers, whose weights are those of distillation's start: what is
timed does not depend on them. Beside the time stands what it could be: the share of multiplications left.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from winnow import api
from winnow.bench.machine import describe
from winnow.bench.output import save
from winnow.engine.scheduler import Limits
from winnow.methods.swiftkv import swiftkv
from winnow.models.load import load_model
from winnow.models.random import random_model
from winnow.models.swiftkv.model import transformed
from winnow.recipe import Recipe

__all__ = ["forms", "run"]

_DECODED = 5  # tokens of every answer, the first of which the prefill gives


def forms(layers: int) -> dict[str, tuple[int, int]]:
    """Layers that the prompt passes and how many later ones share entries, for a model of ``layers``."""
    later = ((layers - layers // 4, 1), (layers // 2, 1), (layers // 2, layers - layers // 2))
    return {"full": (layers, 1)} | {f"swiftkv:layers={n},group={group}": (n, group) for n, group in later}


def run(*, tokens: int = 2048, rounds: int = 3, preset: str = "1b") -> dict[str, Any]:
    """Prefill one prompt under every recipe, in interleaved rounds after one that is not counted.

    Parameters
    ----------
    tokens : int
        Of the prompt.
    rounds : int
    preset : str
        Of :func:`winnow.models.random.random_model`.

    Returns
    -------
    dict
        ``config``, ``machine`` and a row per recipe: seconds to the first token (raw, and the median of
        the rounds' ratios to ``full``) and of a decoded token, the share of ``full``'s multiplications
        that a prefill makes, scores computed, bytes stored and bytes read per decoded token; JSON-ready.
    """
    module = random_model(preset)
    model, _ = load_model(module)
    limits = Limits(max_num_batched_tokens=4096)
    contenders = forms(model.layers)
    llms: dict[str, api.LLM] = {}
    for name, (first, group) in contenders.items():
        recipe = swiftkv(layers=first, group=group) if first < model.layers else Recipe()
        # One set of weights under all recipes: loading the module again would join them anew.
        llms[name] = api.LLM(transformed(model, recipe.generation), None, recipe, limits, "auto")
    ids = torch.randint(module.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    samples: dict[str, list[Any]] = {name: [] for name in llms}
    for round_number in range(rounds + 1):
        for name, llm in llms.items():
            result = llm.generate(ids.tolist(), max_new_tokens=_DECODED, ignore_eos=True)
            if round_number:
                samples[name].append(result.stats)
    made = {
        name: _multiplications(module, *contenders[name], samples[name][0].score_entries, tokens)
        for name in contenders
    }
    rows = []
    for name, stats in samples.items():
        pairs = zip(stats, samples["full"], strict=True)
        last = stats[-1]
        rows.append(
            {
                "name": name,
                "first_token": [one.time_to_first_token for one in stats],
                "over_full": statistics.median(
                    one.time_to_first_token / full.time_to_first_token for one, full in pairs
                ),
                "multiplications": made[name] / made["full"],
                "decode": [one.decode_seconds / one.decode_steps for one in stats],
                "bytes_stored": sum(last.bytes_stored.values()),
                "bytes_read": sum(last.bytes_read.values()) / last.decode_steps,
                "score_entries": last.score_entries,
            }
        )
    config = {"preset": preset, "tokens": tokens, "rounds": rounds, "decoded": _DECODED}
    return {"what": __doc__, "config": config, "machine": describe(), "rows": rows}


def _multiplications(module: Any, first: int, group: int, score_entries: int, tokens: int) -> int:
    """Of a prompt's tokens in the layers that they pass, without the few rows that pass all."""
    config, block = module.config, module.base_model.layers[0]
    whole: int = sum(weight.numel() for weight in block.parameters() if weight.ndim == 2)
    entries: int = sum(f.weight.numel() for f in (block.self_attn.k_proj, block.self_attn.v_proj))
    # The rows that nobody reads skip the last layer of every model.
    first = min(first, int(config.num_hidden_layers) - 1)
    groups = (int(config.num_hidden_layers) - first) // group
    return tokens * (first * whole + groups * entries) + 2 * int(config.head_dim) * score_entries


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, print a table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m winnow.bench.swiftkv", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="1b", help="shape of the random model: 1b or tiny")
    parser.add_argument("--out", type=Path, help="JSON with configuration, machine and raw samples")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    report = run(**given)
    heads = ("first token", "x full", "products", "decode", "stored", "read")
    print(
        f"{'':28} {heads[0]:>12} {heads[1]:>7} {heads[2]:>9}" + "".join(f"{head:>11}" for head in heads[3:])
    )
    for row in report["rows"]:
        print(
            f"{row['name']:28} {statistics.median(row['first_token']):10.2f} s {row['over_full']:7.2f}"
            f" {row['multiplications']:9.0%} {statistics.median(row['decode']) * 1e3:7.0f} ms"
            f" {row['bytes_stored'] / 1e6:7.1f} MB {row['bytes_read'] / 1e6:7.1f} MB"
        )
    if out is not None:
        save(report, out, depth=3)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
