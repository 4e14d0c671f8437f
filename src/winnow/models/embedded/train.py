"""Training of the embedded model, from its constructed start, on documents generated from seeds.

Only what follows the last attention learns: the last MLP, the last norms and the head.

Everything follows from `Schedule`: the step decides the stage, the stage and the seed decide the
documents, so that a run that was stopped and resumed goes through the same numbers as one that was
not.  No document of `documents.HELD_OUT` is ever made here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.models.embedded import documents, init
from winnow.models.embedded import language as lang
from winnow.models.training import Loss, Training, has_checkpoint

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["SCHEDULE", "Batch", "Run", "Schedule", "Stage", "batch", "training_seed"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps at one length.

    ``facts`` are the fewest and the most facts of a document, ``slack`` the most positions that
    are skipped between the lines of a sequence, so that short sequences teach long distances.
    """

    steps: int
    tokens: int
    rows: int
    facts: tuple[int, int]
    slack: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All that decides the weights.

    The rate rises over ``warmup`` steps and falls linearly; it would be 0 at step ``horizon``.
    """

    seed: int = 0
    stages: tuple[Stage, ...]
    horizon: int
    rate: float = 4e-4
    warmup: int = 20
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    document_weight: float = 0.05  #: loss weight of the document's tokens; that of replies is 1
    ending_weight: float = 0.5  #: loss weight of the newline that ends a reply

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all stages, padding included."""
        return sum(stage.steps * stage.rows * stage.tokens for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"the schedule ends {step} steps earlier")

    def factor(self, step: int) -> float:
        """Share of ``rate`` at a step."""
        return min((step + 1) / self.warmup, 1.0) * (1.0 - step / self.horizon)


#: Small, because the start already answers: 0.12 M tokens, which teach the form of the text.
SCHEDULE = Schedule(
    stages=(
        Stage(steps=40, tokens=256, rows=8, facts=(4, 10), slack=12000),
        Stage(steps=20, tokens=512, rows=4, facts=(8, 32), slack=12000),
    ),
    horizon=60,
    rate=3e-4,
    warmup=10,
)


@dataclass(frozen=True)
class Batch:
    """One step's sequences: tokens, positions and the weight of predicting the *next* token."""

    ids: Tensor  # [B, T] int64
    positions: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] float32, 0 in the last column and in padding


def training_seed(seed: int, index: int) -> int:
    """Seed of the ``index``-th training document of a schedule; never one of `documents.HELD_OUT`."""
    found = documents.HELD_OUT.stop + seed * 1_000_000_000 + index
    assert found not in documents.HELD_OUT
    return found


#: tokens of a line that states a fact, and of a turn, both at most; a turn about a variable takes
#: three more for every hop
_FACT = {
    "key-value": 7,
    "needles": 10,
    "variables": 7,
    "labels": 5,
    "prefix-suffix": 6,
    "extrema": 3,
    "joint-recall": 7,
}
_TURN = {
    "key-value": 8,
    "needles": 10,
    "variables": 8,
    "labels": 6,
    "prefix-suffix": 11,
    "extrema": 6,
    "joint-recall": 10,
}


def _document(stage: Stage, seed: int, dice: Random) -> documents.Document:
    """A document that leaves about a third of the stage's tokens to its turns."""
    task: documents.Task = dice.choice(documents.TASKS)
    kinds = documents.KINDS[task]
    hops, shots, contexts = dice.choice((1, 2)), dice.choice((1, 1, 2)), dice.choice((2, 3, 4))
    filler: documents.Filler = dice.choice(("sentences", "sentences", "sentences", "words", "noise"))
    # labels are counted apart; of every other kind enough lines for one question at least
    sharing = max(1, len(kinds) - ("labels" in kinds))
    facts = max(dice.randint(*stage.facts), sharing * max(hops + 1, contexts))
    share = facts // sharing
    lines = {kind: 8 * shots if kind == "labels" else share + facts % sharing for kind in kinds}
    askable = {
        "labels": 8 * (12 - shots),
        "variables": share // (hops + 1),
        "extrema": 2 * min(4, share // 2),
        "joint-recall": share // contexts * contexts,
    }
    least = sum(_FACT[kind] * lines[kind] for kind in kinds) + 2 + 3 * contexts
    tokens = min(max(least, int(stage.tokens * dice.uniform(0.5, 0.8))), stage.tokens)
    reply = max(_TURN[kind] + 3 * hops * (kind == "variables") for kind in kinds)
    most = len(kinds) * min(askable.get(kind, share) for kind in kinds)
    return documents.make(
        task,
        tokens=tokens,
        seed=seed,
        turns=max(1, min(most, (stage.tokens - tokens) // reply)),
        facts=facts,
        hops=hops,
        shots=shots,
        contexts=contexts,
        filler=filler,
    )


def batch(schedule: Schedule, step: int) -> Batch:
    """The sequences of one step; the same for the same arguments."""
    stage, ids = schedule.stage(step), lang.identifiers()
    size = (stage.rows, stage.tokens)
    tokens = torch.full(size, ids[lang.PAD])
    weights, gaps = torch.zeros(size), torch.ones(size, dtype=torch.long)
    for row in range(stage.rows):
        seed = training_seed(schedule.seed, step * 1000 + row)
        dice = Random(f"winnow/train/{seed}")
        document = _document(stage, seed, dice)
        pieces = [lang.BOS, *document.pieces]
        weight = [schedule.document_weight] * (len(pieces) - 1) + [0.0]
        for turn in document.turns:
            reply = turn.reply_pieces
            weight += [0.0] * (len(turn.question_pieces) - 1) + [1.0] * (len(reply) - 1)
            weight += [schedule.ending_weight, 0.0]
            pieces += (*turn.question_pieces, *reply)
        length = min(len(pieces), stage.tokens)
        tokens[row, :length] = torch.tensor([ids[piece] for piece in pieces[:length]])
        weights[row, : length - 1] = torch.tensor(weight[: length - 1])
        # The first token keeps its place; some lines begin later than they would.  Where there are
        # headings only these do, so that the section a line stands in remains the nearest by far.
        starts = [i + 1 for i, piece in enumerate(pieces[: length - 1]) if piece == lang.NEWLINE]
        if lang.CONTEXT in pieces:
            starts = [i for i in starts if pieces[i] in (lang.CONTEXT, lang.QUESTION)]
        if starts and dice.random() < 0.7:
            slack = dice.randint(0, stage.slack)
            for _ in range(dice.randint(1, 4)):
                gap = dice.randint(0, slack)
                gaps[row, dice.choice(starts)] += gap
                slack -= gap
    return Batch(tokens, gaps.cumsum(1) - 1, weights)


class Run(Training):
    """A training run in a directory: see :class:`winnow.models.training.Training`.

    Parameters
    ----------
    directory : Path
        Holds ``checkpoint.pt`` and ``log.jsonl``; a checkpoint that is there is resumed.
    schedule : Schedule
        Must be the one that the checkpoint was made with.
    device : str
        ``cpu`` or ``cuda``.

    Raises
    ------
    ValueError
        If the directory holds a run of another schedule.
    """

    def __init__(self, directory: Path, schedule: Schedule = SCHEDULE, device: str = "cpu") -> None:
        from transformers import LlamaForCausalLM

        self.schedule, self.device = schedule, torch.device(device)
        self.model: LlamaForCausalLM = LlamaForCausalLM(init.config())
        if not has_checkpoint(directory):
            init.construct(self.model, schedule.seed)
        self.model.to(self.device).train()
        # What stands before the last attention is written to a hundredth of a logit, which any noise
        # spoils (see docs/embedded-model.md): only what follows it learns.
        self.model.requires_grad_(False)
        learning = [
            *self.model.model.layers[-1].post_attention_layernorm.parameters(),
            *self.model.model.layers[-1].mlp.parameters(),
            *self.model.model.norm.parameters(),
            *self.model.lm_head.parameters(),
        ]
        for parameter in learning:
            parameter.requires_grad_(True)
        super().__init__(
            directory,
            self.model,
            learning,
            form=json.dumps(asdict(schedule)),
            steps=schedule.steps,
            betas=schedule.betas,
            clip=schedule.clip,
        )

    def rate(self, step: int) -> float:
        """See :meth:`Training.rate`."""
        return self.schedule.rate * self.schedule.factor(step)

    def loss(self, step: int) -> Loss:
        """See :meth:`Training.loss`."""
        made = batch(self.schedule, step)
        ids, positions, weights = (t.to(self.device) for t in (made.ids, made.positions, made.weights))
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            # An explicit mask: without one, skipped positions would be taken for packed sequences.
            states = self.model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
            ).last_hidden_state
            counted = weights > 0
            logits = self.model.lm_head(states[counted])
        targets = ids.roll(-1, 1)[counted]
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        shares = weights[counted]
        loss = (losses * shares).sum() / shares.sum()
        replied = shares == 1.0
        right = (logits.argmax(1) == targets)[replied]
        return Loss(
            value=loss,
            tokens=ids.numel(),
            log={
                "loss": float(loss.detach()),
                "reply_loss": float(losses[replied].mean().detach()),
                "reply_accuracy": float(right.float().mean()),
                "document_loss": float(losses[shares < self.schedule.ending_weight].mean().detach()),
            },
        )

    def export(self, directory: Path) -> None:
        """Write the model in bfloat16 and its tokenizer, as ``from_pretrained`` reads them."""
        from transformers import LlamaForCausalLM

        directory.mkdir(parents=True, exist_ok=True)
        model = LlamaForCausalLM(init.config())
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(directory)
        (directory / "model.safetensors").chmod(0o644)
        lang.save_tokenizer(directory)
        record = {"step": self.step, "tokens": self.schedule.tokens, "schedule": asdict(self.schedule)}
        (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
