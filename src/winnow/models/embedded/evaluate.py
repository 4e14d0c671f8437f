"""Evaluation of the embedded model: exact match of greedy, free generation with full attention.

Every cell asks at least as many questions as it is told, over held-out documents, in turns
whose history holds the model's own answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from winnow.models.embedded import documents, heads

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["CELLS", "LENGTHS", "Cell", "Result", "cells", "measure", "report"]

LENGTHS = (1024, 2048, 4096, 8192)
#: seeds of evaluation documents start here, inside `documents.HELD_OUT`
FIRST_SEED = 500_000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One task at one length, and the share of right answers that the model is held to."""

    name: str
    task: documents.Task
    tokens: int
    floor: float
    hops: int = 1
    shots: int = 1
    facts: int = 32


@dataclass(frozen=True, kw_only=True)
class Result:
    """Right answers of one cell; ``first`` and ``later`` split them by turn."""

    cell: Cell
    questions: int
    right: int
    first: tuple[int, int]
    later: tuple[int, int]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of questions answered exactly."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `accuracy`."""
        z, n, p = 1.96, self.questions, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return centre - half, centre + half

    def record(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return {
            **asdict(self.cell),
            "questions": self.questions,
            "right": self.right,
            "accuracy": self.accuracy,
            "interval95": self.interval,
            "reached": self.accuracy >= self.cell.floor,
            "first_turn": self.first,
            "later_turns": self.later,
            "seconds": self.seconds,
        }


#: name, task, hops, shots
CELLS: tuple[tuple[str, documents.Task, int, int], ...] = (
    ("key-value", "key-value", 1, 1),
    ("needles", "needles", 1, 1),
    ("variables, one hop", "variables", 1, 1),
    ("variables, two hops", "variables", 2, 1),
    ("labels, one example", "labels", 1, 1),
    ("labels, two examples", "labels", 1, 2),
)


def cells(lengths: Sequence[int] = LENGTHS, names: Sequence[str] | None = None) -> list[Cell]:
    """The cells with the floors that the model has to reach."""
    return [
        Cell(
            name=name,
            task=task,
            tokens=tokens,
            hops=hops,
            shots=shots,
            # chains of two or three lines: as many questions as elsewhere need more lines
            facts=60 if task == "variables" else 32,
            floor=0.85 if hops == 2 else 0.90 if tokens > 4096 else 0.95,
        )
        for name, task, hops, shots in CELLS
        if names is None or name in names
        for tokens in lengths
    ]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    *,
    questions: int,
    turns: int = 20,
    most_new: int = 16,
    first_seed: int = FIRST_SEED,
    advance: Callable[[int], None] | None = None,
) -> Result:
    """Ask a cell's questions, greedily, with full attention over a growing cache.

    Parameters
    ----------
    model, tokenizer
        As loaded from `winnow.models.embedded.path`.
    cell : Cell
        What to ask.
    questions : int
        At least so many, rounded up to whole documents of ``turns`` turns.
    turns : int
        Turns for each document; the history holds the model's own answers.
    most_new : int
        Most tokens of an answer.
    first_seed : int
        The documents' seeds count up from here.
    advance : callable, optional
        Called with the number of questions done after each document.
    """
    from transformers import DynamicCache

    device = model.device
    newline = tokenizer.convert_tokens_to_ids("\n")
    hits: list[tuple[int, bool]] = []
    begun = time.perf_counter()
    for number in range(math.ceil(questions / turns)):
        document = documents.make(
            cell.task,
            tokens=cell.tokens,
            seed=first_seed + number,
            turns=turns,
            facts=cell.facts,
            hops=cell.hops,
            shots=cell.shots,
        )
        cache = DynamicCache(config=model.config)
        replies: list[str] = []
        cached: list[int] = []
        for index, turn in enumerate(document.turns):
            ids = tokenizer(documents.prompt(document, index, replies))["input_ids"]
            # An answer that is respelt in the history leaves entries that no longer hold.
            common = _common(cached, ids)
            if common < len(cached):
                cache.crop(common - len(cached))
            cached, answer = cached[:common], list[int]()
            fresh = ids[common:]
            while len(answer) < most_new and newline not in answer:
                fed = torch.tensor([fresh], device=device)
                logits = model(fed, past_key_values=cache, logits_to_keep=1).logits
                cached += fresh
                fresh = [int(logits[0, -1].argmax())]
                answer += fresh
            replies.append(tokenizer.decode(answer).strip().split("\n")[0])
            hits.append((index, documents.score(turn, replies[-1])))
        if advance:
            advance(turns)
    first = [hit for index, hit in hits if index == 0]
    later = [hit for index, hit in hits if index > 0]
    return Result(
        cell=cell,
        questions=len(hits),
        right=sum(hit for _, hit in hits),
        first=(sum(first), len(first)),
        later=(sum(later), len(later)),
        seconds=time.perf_counter() - begun,
    )


def report(
    weights: Path,
    wanted: Iterable[Cell],
    *,
    questions: int = 320,
    device: str = "cpu",
    dtype: str = "bfloat16",
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a directory of weights; what was found, and where and with what it ran.

    Parameters
    ----------
    weights : Path
        As written by the training command.
    wanted : iterable of Cell
        In the order in which they are measured; each prints a line.
    questions : int
        At least so many per cell.
    device, dtype : str
        Where and in which precision the model runs.
    out : Path, optional
        JSON that is written after every cell.  Cells that it already holds for the same weights,
        seeds and precision are kept and not measured again, so that a long evaluation can be stopped.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, dtype)).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    told: dict[str, Any] = {
        "what": "exact match of greedy free generation with full attention, in turns, on held-out seeds",
        "weights_sha256": hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest(),
        "first_seed": FIRST_SEED,
        "dtype": dtype,
        "device": device,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "commit": _commit(),
        "heads": heads.profile(model, tokenizer),
        "cells": [],
    }
    known: list[dict[str, Any]] = []
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    if out is not None and out.exists():
        earlier = json.loads(out.read_text())
        if all(earlier[key] == told[key] for key in ("weights_sha256", "first_seed", "dtype")):
            known = earlier["cells"]
    for cell in wanted:
        same = [record for record in known if asdict(cell).items() <= record.items()]
        enough = [record for record in same if record["questions"] >= questions]
        if enough:
            told["cells"].append(enough[0])
            known.remove(enough[0])
            continue
        result = measure(model, tokenizer, cell, questions=questions)
        low, high = result.interval
        print(
            f"{cell.name:22} {cell.tokens:5}  {result.right:4}/{result.questions}"
            f"  {100 * result.accuracy:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"
            f"  floor {100 * cell.floor:.0f}"
            f"  {'reached' if result.accuracy >= cell.floor else 'MISSED'}  {result.seconds:.0f} s",
            flush=True,
        )
        told["cells"].append(result.record())
        if out is not None:
            out.write_text(json.dumps({**told, "cells": told["cells"] + known}, indent=2) + "\n")
    if out is not None:
        out.write_text(json.dumps(told, indent=2) + "\n")
    return told


def _commit() -> str | None:
    """The checkout's commit, or None outside one."""
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or None
