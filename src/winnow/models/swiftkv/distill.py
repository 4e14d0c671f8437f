"""Distillation: the transformed model learns to give the logits and hidden states of the original.

Loss and defaults are those of snowflakedb/ArcticTraining, ``projects/swiftkv/train.py``: the divergence of
logits at temperature 2 over the tokens that count, and the mean square of hidden states before the last layer
over all tokens.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from winnow.models.swiftkv.adapter import Adapter
from winnow.models.swiftkv.student import Student, teach

__all__ = ["Batch", "Distillation", "Plan"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one step.

    Attributes
    ----------
    ids, positions : Tensor
        ``[B, T]`` int64; padding stands at the end and its tokens see what is before them only.
    counted : Tensor
        ``[B, T]`` bool: where the next token's distribution is learnt.
    """

    ids: Tensor
    positions: Tensor
    counted: Tensor


Batches = Callable[[int], Batch]
"""The sequences of a step; the same for the same step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides a distillation beside its data.

    Attributes
    ----------
    steps : int
    rate : float
        Of AdamW without weight decay; it rises over the first 5 % of the steps, then falls as a cosine.
    temperature, hidden_weight : float
    data : str
        Where the sequences come from, so that a checkpoint is resumed on the same.
    """

    steps: int
    rate: float = 2e-4
    temperature: float = 2.0
    hidden_weight: float = 1.0
    data: str = ""

    def factor(self, step: int) -> float:
        """Share of ``rate`` at a step."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))


class Distillation:
    """A distillation in a directory: its state, its log and its checkpoint.

    Parameters
    ----------
    directory : Path
        Holds ``checkpoint.pt`` and ``log.jsonl``; a checkpoint that is there is resumed.
    model : transformers.PreTrainedModel
        The teacher, in float32.
    adapter : Adapter
        Where a new distillation starts.
    plan : Plan
    batches : callable

    Raises
    ------
    ValueError
        If the directory holds a distillation of another plan or form.
    """

    def __init__(self, directory: Path, model: Any, adapter: Adapter, plan: Plan, batches: Batches) -> None:
        self.directory, self.plan, self.step = directory, plan, 0
        self._model, self._batches = model.eval(), batches
        self.student = Student(model, adapter)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._form = json.dumps({**asdict(plan), "layers": adapter.layers, "group": adapter.group})
        directory.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            if state["form"] != self._form:
                raise ValueError(f"{directory} holds another distillation; choose another directory")
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    @property
    def checkpoint(self) -> Path:
        """Where the state is saved."""
        return self.directory / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "form": self._form,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        partial = self.checkpoint.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.checkpoint)

    def advance(self) -> dict[str, float]:
        """One step; what is logged about it."""
        begun = time.perf_counter()
        batch, plan = self._batches(self.step), self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate * plan.factor(self.step)
        arguments = (batch.ids, batch.positions, batch.counted)
        wanted, wanted_hidden = teach(self._model, *arguments)
        logits, hidden = self.student(*arguments)
        divergence = plan.temperature**2 * functional.kl_div(
            functional.log_softmax(logits.float() / plan.temperature, -1),
            functional.log_softmax(wanted.float() / plan.temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        distance = functional.mse_loss(hidden.float(), wanted_hidden.float())
        loss = divergence + plan.hidden_weight * distance
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise ValueError(f"step {self.step} has no finite gradient; lower the rate")
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            "divergence": float(divergence.detach()),
            "hidden": float(distance.detach()),
            "agreement": float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()),
            "gradient_norm": float(norm),
            "rate": float(self.optimizer.param_groups[0]["lr"]),
            "tokens_per_second": batch.ids.numel() / (time.perf_counter() - begun),
        }

    def train(self, *, until: int | None = None, save_every: float = 60.0) -> None:
        """Advance to the end of the plan, or to step ``until``, logging and saving."""
        last = self.plan.steps if until is None else min(until, self.plan.steps)
        saved = time.perf_counter()
        with (self.directory / "log.jsonl").open("a") as log:
            while self.step < last:
                record = self.advance()
                log.write(json.dumps(record) + "\n")
                log.flush()
                if self.step % 10 == 0 or self.step == last:
                    print(
                        f"step {self.step}/{last}  divergence {record['divergence']:.5f}"
                        f"  hidden {record['hidden']:.5f}  agreement {record['agreement']:.4f}"
                        f"  {record['tokens_per_second']:.0f} tokens/s",
                        flush=True,
                    )
                if time.perf_counter() - saved > save_every:
                    self.save()
                    saved = time.perf_counter()
        self.save()
