"""One loop for every training here: it steps, logs, saves, and goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["Loss", "Training", "has_checkpoint"]

_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What one step is to lower, and what its log says.

    Attributes
    ----------
    value : Tensor
        Scalar, with its gradient still to be taken.
    tokens : int
        Tokens of the step, padding included, for the speed in the log.
    log : mapping of str to float
        Figures of the step.
    """

    value: Tensor
    tokens: int
    log: Mapping[str, float]


class Training(ABC):
    """A training by AdamW without weight decay, in a directory: its state, its log and its checkpoint.

    What a step computes must follow from its number alone: then a training that was stopped and resumed
    goes through the same numbers as one that was not.  One that was killed repeats the steps since its
    last checkpoint, and the log holds them twice.

    Parameters
    ----------
    directory : Path
        Holds ``checkpoint.pt`` and ``log.jsonl``; a checkpoint that is there is resumed.
    module : nn.Module
        What is saved; on the device where it learns.
    learning : sequence of Parameter
        Its parameters that learn.
    form : str
        All that decides the numbers; a checkpoint of another form is refused.
    steps : int
        Where the training ends.
    betas : tuple of float
        Of AdamW.
    clip : float
        Longest gradient.

    Raises
    ------
    ValueError
        If the directory holds a training of another form.
    """

    def __init__(
        self,
        directory: Path,
        module: nn.Module,
        learning: Sequence[nn.Parameter],
        *,
        form: str,
        steps: int,
        betas: tuple[float, float],
        clip: float,
    ) -> None:
        self.directory, self.steps, self.step = directory, steps, 0
        self.optimizer = torch.optim.AdamW(learning, betas=betas, weight_decay=0.0)
        self._module, self._learning, self._form, self._clip = module, learning, form, clip
        directory.mkdir(parents=True, exist_ok=True)
        if has_checkpoint(directory):
            state = torch.load(directory / _CHECKPOINT, map_location=learning[0].device, weights_only=True)
            if state["form"] != form:
                raise ValueError(f"{directory} holds another training; choose another directory")
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    @abstractmethod
    def rate(self, step: int) -> float:
        """Learning rate of a step."""

    @abstractmethod
    def loss(self, step: int) -> Loss:
        """Loss of a step; the same for the same step and weights."""

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "form": self._form,
            "module": self._module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        checkpoint = self.directory / _CHECKPOINT
        partial = checkpoint.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(checkpoint)

    def advance(self) -> dict[str, float]:
        """One step; returns what is logged about it.

        Raises
        ------
        ValueError
            If the gradient is not finite.
        """
        begun, rate = time.perf_counter(), self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.value.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self._learning, self._clip))
        if not math.isfinite(norm):
            raise ValueError(f"step {self.step} has no finite gradient; lower the rate")
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            **loss.log,
            "gradient_norm": norm,
            "rate": rate,
            "tokens_per_second": loss.tokens / (time.perf_counter() - begun),
        }

    def train(self, *, until: int | None = None, save_every: float = 60.0) -> None:
        """Advance to the end, or to step ``until``, logging, and saving every so many seconds."""
        last = self.steps if until is None else min(until, self.steps)
        saved = time.perf_counter()
        with (self.directory / "log.jsonl").open("a") as log:
            while self.step < last:
                record = self.advance()
                log.write(json.dumps(record) + "\n")
                log.flush()
                if self.step % 10 == 0 or self.step == last:
                    shown = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in record.items())
                    print("  ".join(shown), flush=True)
                if time.perf_counter() - saved > save_every:
                    self.save()
                    saved = time.perf_counter()
        self.save()


def has_checkpoint(directory: Path) -> bool:
    """Whether a training was begun there."""
    return (directory / _CHECKPOINT).exists()
