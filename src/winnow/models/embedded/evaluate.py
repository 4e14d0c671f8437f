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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from winnow.kernels.prefill import prefill
from winnow.models.embedded import documents, heads
from winnow.models.interface import NAME, attending
from winnow.types import AttentionSpec, Segment

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["CELLS", "LENGTHS", "Cell", "Result", "cells", "measure", "report", "table"]

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
    turns: int = 30


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


class _Row(NamedTuple):
    """One task at all lengths; ``floors`` are those up to 2K, at 4K and, where it is measured, at 8K."""

    name: str
    task: documents.Task
    floors: tuple[float, ...]
    hops: int = 1
    shots: int = 1
    #: chains of two or three lines: as many questions as elsewhere need more lines
    facts: int = 32
    turns: int = 30


_FIRST, _LATER = (0.95, 0.95, 0.90), (0.95, 0.90)
CELLS: tuple[_Row, ...] = (
    _Row("key-value", "key-value", _FIRST),
    _Row("needles", "needles", _FIRST),
    _Row("variables, one hop", "variables", _FIRST, facts=60),
    _Row("variables, two hops", "variables", (0.85, 0.85, 0.85), hops=2, facts=60, turns=20),
    _Row("labels, one example", "labels", _FIRST),
    _Row("labels, two examples", "labels", _FIRST, shots=2),
    _Row("prefix-suffix", "prefix-suffix", _LATER),
    _Row("extrema", "extrema", _LATER, turns=8),
    _Row("joint recall", "joint-recall", _LATER),
    _Row("mixture of four", "mixed", _LATER, turns=20),
    _Row("needles and key-value", "needles+key-value", _LATER),
    _Row("labels and key-value", "labels+key-value", _LATER),
    _Row("joint recall and needles", "joint-recall+needles", _LATER),
)


def cells(lengths: Sequence[int] = LENGTHS, names: Sequence[str] | None = None) -> list[Cell]:
    """The cells with the floors that the model has to reach."""
    return [
        Cell(
            name=row.name,
            task=row.task,
            tokens=tokens,
            hops=row.hops,
            shots=row.shots,
            facts=row.facts,
            turns=row.turns,
            floor=row.floors[_long(tokens)],
        )
        for row in CELLS
        if names is None or row.name in names
        for tokens in lengths
        if _long(tokens) < len(row.floors)
    ]


def _long(tokens: int) -> int:
    """Which of a row's floors holds at a length."""
    return (tokens > 2048) + (tokens > 4096)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


class _Context:
    """Tokens that a model has read, and their entries: full attention by Winnow's own kernel.

    Hugging Face's attention would take most of the time that an evaluation at 8K takes.
    """

    def __init__(self, model: LlamaForCausalLM, capacity: int) -> None:
        config = model.config
        size = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.model, self.tokens, self.likeliest = model, list[int](), list[int]()
        self.k, self.v = (torch.empty(size, dtype=model.dtype, device=model.device) for _ in range(2))

    def read(self, ids: Sequence[int]) -> list[int]:
        """Keep what ``ids`` begins with, forget the rest, read the others; the likeliest token after each."""
        common = _common(self.tokens, ids)
        self.tokens, self.likeliest = list(ids), self.likeliest[:common]
        if common < len(ids):
            self.positions = torch.arange(common, len(ids), dtype=torch.int32)
            fresh = torch.tensor([ids[common:]], device=self.model.device)
            with attending(self._attend):
                logits = self.model(
                    fresh,
                    position_ids=self.positions.to(self.model.device, torch.long)[None],
                    use_cache=False,
                ).logits
            self.likeliest += logits[0].argmax(1).tolist()
        return self.likeliest

    def _attend(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec) -> Tensor:
        start, end = len(self.tokens) - len(self.positions), len(self.tokens)
        self.k[layer, :, start:end] = k_THD.transpose(0, 1)
        self.v[layer, :, start:end] = v_THD.transpose(0, 1)
        lengths = torch.full((self.k.shape[1],), end, dtype=torch.int32)
        segment = Segment(k=self.k[layer], v=self.v[layer], lengths=lengths)
        return prefill(q_THD, segment, spec=spec, query_positions=self.positions).out


def _line(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a part of a text that does not begin it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    *,
    questions: int,
    turns: int | None = None,
    most_new: int = 16,
    first_seed: int = FIRST_SEED,
    advance: Callable[[int], None] | None = None,
) -> Result:
    """Ask a cell's questions, greedily, with full attention; what was read is not read again.

    The turns still to come are read ahead in one pass, with the replies that would be right: as long
    as the likeliest tokens are these, they are what the model writes.  From the first other token on
    the reply is written token by token, and the history keeps it.

    Parameters
    ----------
    model, tokenizer
        As loaded from `winnow.models.embedded.path`.
    cell : Cell
        What to ask.
    questions : int
        At least so many, rounded up to whole documents of ``turns`` turns.
    turns : int, optional
        Turns for each document, by default those of the cell; the history holds the model's own answers.
    most_new : int
        Most tokens of an answer.
    first_seed : int
        The documents' seeds count up from here.
    advance : callable, optional
        Called with the number of questions done after each document.
    """
    turns = cell.turns if turns is None else turns
    newline = tokenizer.convert_tokens_to_ids("\n")
    hits: list[tuple[int, bool]] = []
    begun = time.perf_counter()
    implementation = model.config._attn_implementation
    model.set_attn_implementation(NAME)
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
        context = _Context(model, cell.tokens + turns * (most_new + 16))
        # No piece spans lines, so the pieces of a prompt are those of its lines (see `documents.prompt`).
        ids = list(tokenizer(document.text)["input_ids"])
        asked = [_line(tokenizer, f"Q: {turn.question} A:") for turn in document.turns]
        right = [_line(tokenizer, f" {turn.reply}\n") for turn in document.turns]
        for index, turn in enumerate(document.turns):
            ids += asked[index]
            ahead = [
                token
                for pair in zip(asked[index + 1 :], right[index + 1 :], strict=True)
                for line in pair
                for token in line
            ]
            wanted = right[index]
            answer = context.read([*ids, *wanted, *ahead])[len(ids) - 1 :][: len(wanted)]
            if answer != wanted:
                del answer[_common(answer, wanted) + 1 :]
                while len(answer) < most_new and newline not in answer:
                    answer.append(context.read([*ids, *answer])[-1])
            reply = tokenizer.decode(answer).strip().split("\n")[0]
            ids += _line(tokenizer, f" {reply}\n")
            hits.append((index, documents.score(turn, reply)))
        if advance:
            advance(turns)
    model.set_attn_implementation(implementation)
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
    questions: int = 300,
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
            f"{cell.name:24} {cell.tokens:5}  {result.right:4}/{result.questions}"
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


def table(told: Mapping[str, Any]) -> str:
    """The cells of a report as a Markdown table of right answers per cent; what misses is in brackets."""
    lengths = sorted({cell["tokens"] for cell in told["cells"]})
    shares = {
        (cell["name"], cell["tokens"]): f"{100 * cell['accuracy']:.1f}"
        if cell["reached"]
        else f"({100 * cell['accuracy']:.1f})"
        for cell in told["cells"]
    }
    names = dict.fromkeys(cell["name"] for cell in told["cells"])
    head = [
        "| task | " + " | ".join(f"{n // 1024}K" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    rows = [f"| {name} | " + " | ".join(shares.get((name, n), "") for n in lengths) + " |" for name in names]
    return "\n".join(head + rows) + "\n"


def _commit() -> str | None:
    """The checkout's commit, or None outside one."""
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or None
