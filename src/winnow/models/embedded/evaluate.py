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
from typing import TYPE_CHECKING, Any

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
            turns=20 if hops == 2 else 30,
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


class _Context:
    """Tokens that a model has read, and their entries: full attention by Winnow's own kernel.

    Hugging Face's attention would take most of the time that an evaluation at 8K takes.
    """

    def __init__(self, model: LlamaForCausalLM, capacity: int) -> None:
        config = model.config
        size = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.model, self.tokens = model, list[int]()
        self.k, self.v = (torch.empty(size, dtype=model.dtype, device=model.device) for _ in range(2))

    def read(self, ids: Sequence[int]) -> int:
        """Keep what ``ids`` begins with, forget the rest, read what is new; the likeliest next token."""
        common = min(_common(self.tokens, ids), len(ids) - 1)
        self.tokens = list(ids)
        self.positions = torch.arange(common, len(ids), dtype=torch.int32)
        fresh = torch.tensor([ids[common:]], device=self.model.device)
        with attending(self._attend):
            logits = self.model(
                fresh,
                position_ids=self.positions.to(self.model.device, torch.long)[None],
                use_cache=False,
                logits_to_keep=1,
            ).logits
        return int(logits[0, -1].argmax())

    def _attend(self, layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec) -> Tensor:
        start, end = len(self.tokens) - len(self.positions), len(self.tokens)
        self.k[layer, :, start:end] = k_THD.transpose(0, 1)
        self.v[layer, :, start:end] = v_THD.transpose(0, 1)
        lengths = torch.full((self.k.shape[1],), end, dtype=torch.int32)
        segment = Segment(k=self.k[layer], v=self.v[layer], lengths=lengths)
        return prefill(q_THD, segment, spec=spec, query_positions=self.positions).out


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
        for index, turn in enumerate(document.turns):
            ids += tokenizer(f"Q: {turn.question} A:", add_special_tokens=False)["input_ids"]
            answer: list[int] = []
            while len(answer) < most_new and newline not in answer:
                answer.append(context.read([*ids, *answer]))
            reply = tokenizer.decode(answer).strip().split("\n")[0]
            ids += tokenizer(f" {reply}\n", add_special_tokens=False)["input_ids"]
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
