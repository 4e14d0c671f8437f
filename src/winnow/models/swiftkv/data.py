"""What a distillation reads: documents of the embedded model, text files, or what the teacher writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from winnow.models.embedded.train import Schedule, Stage, batch
from winnow.models.swiftkv.distill import Batch, Batches

__all__ = ["documents", "generated", "texts"]


def documents(*, steps: int, rows: int, tokens: int, seed: int) -> Batches:
    """Training documents of the embedded model; replies and their ends count."""
    most = max(8, tokens // 16)
    stage = Stage(steps=steps, tokens=tokens, rows=rows, facts=(4, min(32, most)), slack=12000)
    schedule = Schedule(seed=seed, stages=(stage,), horizon=steps)

    def made(step: int) -> Batch:
        one = batch(schedule, step)
        return Batch(ids=one.ids, positions=one.positions, counted=one.weights >= schedule.ending_weight)

    return made


def texts(files: Sequence[Path], tokenizer: Any, *, rows: int, tokens: int, seed: int) -> Batches:
    """Random windows of text files; every token counts.

    Raises
    ------
    ValueError
        If the files have fewer than ``tokens`` tokens.
    """
    ids = torch.tensor(
        [i for file in files for i in tokenizer(file.read_text(encoding="utf-8"))["input_ids"]]
    )
    if len(ids) < tokens:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {tokens}; give more text")

    def made(step: int) -> Batch:
        dice = Random(f"winnow/swiftkv/{seed}/{step}")
        starts = [dice.randint(0, len(ids) - tokens) for _ in range(rows)]
        return _whole(torch.stack([ids[s : s + tokens] for s in starts]))

    return made


def generated(model: Any, *, rows: int, tokens: int, seed: int) -> Batches:
    """What the teacher writes at temperature 1 behind a token that is drawn; every token counts."""
    first = model.config.bos_token_id

    @torch.no_grad()
    def made(step: int) -> Batch:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        ids = torch.randint(model.config.vocab_size, (rows, 1), generator=generator)
        if first is not None:
            ids = torch.cat([torch.full((rows, 1), first), ids], 1)
        cache = None
        new = ids
        while ids.shape[1] < tokens:
            out = model(new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            new = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, new], 1)
        return _whole(ids)

    return made


def _whole(ids: Tensor) -> Batch:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids=ids, positions=positions, counted=torch.ones_like(ids, dtype=torch.bool))
