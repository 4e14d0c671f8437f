"""What each head of the embedded model does: retrieve, rest on the first token, or look nearby."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.models.embedded import documents

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["NEARBY", "draw", "profile"]

#: how many tokens, the query's own among them, count as nearby
NEARBY = 8
#: positions before this one are left out: there, everything is nearby
_SETTLED = 64


@torch.inference_mode()
def profile(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = 1024,
    seeds: range = range(600_000, 600_004),
) -> dict[str, Any]:
    """Where the heads of every KV head put their attention, on average over its query heads.

    Returns
    -------
    dict
        ``source``, ``sink`` and ``nearby``, each a list per layer of a share per KV head.
        *Source* is the attention that goes to the token about to be written, where the document
        states it, from the positions that write a value or a label.  *Sink* is what goes to the
        first token, and *nearby* what goes to the last `NEARBY` tokens, from all positions of
        the document (after the 64th).
    """
    tasks: tuple[documents.Task, ...] = ("key-value", "needles", "variables", "labels")
    settings = [(task, seed) for task in tasks for seed in seeds]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        sums = [_measure(model, tokenizer, task, tokens, seed) for task, seed in settings]
    finally:
        model.set_attn_implementation(implementation)
    source, sink, nearby = (torch.stack(part).mean(0) for part in zip(*sums, strict=True))
    return {
        "tokens": tokens,
        "documents": len(settings),
        "source": source.tolist(),
        "sink": sink.tolist(),
        "nearby": nearby.tolist(),
    }


def _measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: documents.Task, tokens: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One document with four turns: three tensors ``[L, H]``."""
    document = documents.make(task, tokens=tokens, seed=seed, turns=4)
    prompt = documents.prompt(document, 3) + f" {document.turns[3].reply}\n"
    coded = tokenizer(prompt, return_offsets_mapping=True)
    ids, offsets = coded["input_ids"], coded["offset_mapping"]
    pairs = _written_from(document, ids, offsets)
    masses = model(torch.tensor([ids], device=model.device), output_attentions=True).attentions
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in masses:
        # query heads of a KV head are adjacent
        mass = layer[0].float().unflatten(0, (-1, groups)).mean(1)  # [H, T, S]
        source = torch.stack([mass[:, query, keys].sum(-1) for query, keys in pairs]).mean(0)
        rows = mass[:, _SETTLED : document.tokens]
        positions = torch.arange(_SETTLED, document.tokens, device=mass.device)
        window = positions[:, None] - torch.arange(NEARBY, device=mass.device)
        nearby = rows.gather(2, window.expand(rows.shape[0], -1, -1)).sum(2).mean(1)
        found.append((source.cpu(), rows[:, :, 0].mean(1).cpu(), nearby.cpu()))
    source, sink, nearby = (torch.stack(part) for part in zip(*found, strict=True))
    return source, sink, nearby


def _written_from(
    document: documents.Document, ids: list[int], offsets: list[tuple[int, int]]
) -> list[tuple[int, list[int]]]:
    """For every token of a value or a label that a reply writes: its query, and where it is stated."""
    pairs: list[tuple[int, list[int]]] = []
    start = len(document.text)
    for turn in document.turns:
        written = start + len(f"Q: {turn.question} A:")
        start = written + len(f" {turn.reply}\n")
        value = [
            i for i, (a, b) in enumerate(offsets) if b > a and start - 2 - len(turn.answer) <= a < start - 1
        ]
        low_high = turn.sources if document.task == "labels" else turn.sources[-1:]
        for token in value:
            stated = [
                i
                for low, high in low_high
                for i, (a, b) in enumerate(offsets)
                if low <= a and b <= high and ids[i] == ids[token]
            ]
            pairs.append((token - 1, stated))
    return pairs


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draw a profile as three maps of layers and KV heads.  Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "source": "retrieval: share on the\nstated answer while writing it",
        "sink": "sink: share on the\nfirst token",
        "nearby": f"local: share on the\nlast {NEARBY} tokens",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(8.4, 4.2), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        shares = found[name]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("KV head")
        axis.set_xticks(range(len(shares[0])))
        axis.set_yticks(range(len(shares)))
        for layer, row in enumerate(shares):
            for head, share in enumerate(row):
                colour = "white" if share < 0.6 else "black"
                axis.text(head, layer, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, shrink=0.8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
