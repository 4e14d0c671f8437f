"""Distil an adapter: ``python -m winnow.models.swiftkv distill MODEL --layers N --group G --out DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from winnow.models.fused import FusedModel
from winnow.models.load import load_model
from winnow.models.swiftkv import data
from winnow.models.swiftkv.adapter import FILE, start
from winnow.models.swiftkv.distill import Batches, Distillation, Plan
from winnow.profiles import save_profile


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and distil."""
    parser = argparse.ArgumentParser(prog="python -m winnow.models.swiftkv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    distil = commands.add_parser("distill", help="train an adapter; run again to go on")
    distil.add_argument("model", help="a directory, a hub name or 'embedded'")
    distil.add_argument("--layers", type=int, help="layers that prompts pass; half of them by default")
    distil.add_argument("--group", type=int, default=1, help="later layers that share keys and values")
    distil.add_argument("--out", type=Path, required=True, help="adapter, checkpoint and log")
    distil.add_argument("--steps", type=int, default=200)
    distil.add_argument("--rows", type=int, default=4, help="sequences of a step")
    distil.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    distil.add_argument("--rate", type=float, default=2e-4)
    distil.add_argument("--seed", type=int, default=0)
    distil.add_argument("--text", type=Path, nargs="+", help="text files; else the teacher writes")
    distil.add_argument("--threads", type=int, default=torch.get_num_threads())
    distil.add_argument("--until", type=int, help="stop at this step; run again to go on")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        _distil(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _distil(given: argparse.Namespace) -> None:
    own, text = load_model(given.model)
    if not isinstance(own, FusedModel):
        raise ValueError(f"swiftkv transforms Llama-shaped models only, {own.name} is none")
    layers = max(own.layers // 2, 1) if given.layers is None else given.layers
    if not 1 <= layers < own.layers or (own.layers - layers) % max(given.group, 1):
        raise ValueError(
            f"the model has {own.layers} layers; give --layers so that a multiple of --group is left"
        )
    # The teacher trains in float32; the adapter is for the model as it is stored.
    teacher_own, _ = load_model(given.model, dtype=torch.float32, device="cpu")
    assert isinstance(teacher_own, FusedModel)
    teacher: Any = teacher_own.general.module
    teacher.set_attn_implementation("sdpa")
    plan = Plan(steps=given.steps, rate=given.rate, data=f"{given.model} {given.text} {given.seed}")
    run = Distillation(
        given.out, teacher, start(teacher_own, layers, given.group), plan, _batches(given, teacher, text)
    )
    print(f"{sum(p.numel() for p in run.student.parameters())} weights, at step {run.step}")
    run.train(until=given.until)
    path = given.out / FILE
    save_profile(run.student.adapter.to(own.dtype).profile(own.fingerprint), path)
    print(f"wrote {path}")


def _batches(given: argparse.Namespace, teacher: Any, text: Any) -> Batches:
    size = {"rows": given.rows, "tokens": given.tokens, "seed": given.seed}
    if given.text:
        if text is None:
            raise ValueError("this model came without a tokenizer; leave --text out")
        return data.texts(given.text, text.tokenizer, **size)
    if given.model == "embedded":
        return data.documents(steps=given.steps, **size)
    return data.generated(teacher, **size)


if __name__ == "__main__":
    raise SystemExit(main())
