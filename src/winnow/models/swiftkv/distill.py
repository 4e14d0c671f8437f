"""Distillation: the transformed model learns to give the logits and hidden states of the original.

Loss and defaults are those of snowflakedb/ArcticTraining, ``projects/swiftkv/train.py``: the divergence of
logits at temperature 2 over the tokens that count, and the mean square of hidden states before the last layer
over all tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from winnow.models.swiftkv.adapter import Adapter
from winnow.models.swiftkv.student import Student, teach
from winnow.models.training import Loss, Training

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
    betas : tuple of float
        Of AdamW.
    temperature, hidden_weight : float
    data : str
        Where the sequences come from, so that a checkpoint is resumed on the same.
    """

    steps: int
    rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    temperature: float = 2.0
    hidden_weight: float = 1.0
    data: str = ""

    def factor(self, step: int) -> float:
        """Share of ``rate`` at a step."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))


class Distillation(Training):
    """A distillation in a directory: see :class:`winnow.models.training.Training`.

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
        self.plan, self.student = plan, Student(model, adapter)
        self._model, self._batches = model.eval(), batches
        super().__init__(
            directory,
            self.student,
            list(self.student.parameters()),
            form=json.dumps({**asdict(plan), "layers": adapter.layers, "group": adapter.group}),
            steps=plan.steps,
            betas=plan.betas,
            clip=1.0,
        )

    def rate(self, step: int) -> float:
        """See :meth:`Training.rate`."""
        return self.plan.rate * self.plan.factor(step)

    def loss(self, step: int) -> Loss:
        """See :meth:`Training.loss`."""
        batch, plan = self._batches(step), self.plan
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
        return Loss(
            value=divergence + plan.hidden_weight * distance,
            tokens=batch.ids.numel(),
            log={
                "divergence": float(divergence.detach()),
                "hidden": float(distance.detach()),
                "agreement": float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()),
            },
        )
