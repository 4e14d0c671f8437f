"""Episodes: a long conversation as one small cache per topic (EpiCache).

Source: EpiCache (arXiv 2509.17396), ``utils/cluster.py`` and ``model/wrapper.py`` of apple/ml-epicache.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from winnow.api import LLM, TextSession
    from winnow.engine.request import Result

__all__ = ["Embed", "Episode", "Episodes", "cluster", "hashed_ngrams"]

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to ``[n, E]`` vectors; they are normalised here."""

_INSTRUCTION = "Relevant parts of the conversation:\n"
_FEATURES = 4096


def hashed_ngrams(texts: Sequence[str]) -> Tensor:
    """``[n, 4096]`` counts of character 3- to 5-grams of words, damped, each hashed to a feature.

    Needs no model and no download; a sentence embedder (MiniLM, Qwen3-Embedding) finds topics that share no
    words, which this cannot.
    """
    rows = torch.zeros(len(texts), _FEATURES)
    for row, text in zip(rows, texts, strict=True):
        counts: Counter[int] = Counter()
        for word in text.lower().split():
            padded = f" {word} "
            for n in (3, 4, 5):
                for i in range(len(padded) - n + 1):
                    counts[zlib.crc32(padded[i : i + n].encode()) % _FEATURES] += 1
        for feature, count in counts.items():
            row[feature] = 1 + math.log(count)
    return rows


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One topic.

    Attributes
    ----------
    centre : Tensor
        ``[E]`` unit vector.
    segments : tuple of int
        Segments of the conversation that belong to it.
    medoids : tuple of int
        Those nearest to the centre, in the order of the conversation: the text of the probe.
    """

    centre: Tensor
    segments: tuple[int, ...]
    medoids: tuple[int, ...]


def cluster(
    vectors_nE: Tensor, episodes: int, *, medoids: int = 8, restarts: int = 10, seed: int = 42
) -> list[Episode]:
    """k-means on unit vectors, the best of several starts.

    Parameters
    ----------
    vectors_nE : Tensor
        One per segment; not zero.
    episodes : int
        Clusters, at most the number of segments.
    medoids : int
        Segments of each that make its probe.
    restarts : int
        Starts, of which the one with the smallest sum of squared distances is taken.
    seed : int
    """
    unit_nE = torch.nn.functional.normalize(vectors_nE.float(), dim=1)
    n = unit_nE.shape[0]
    episodes = min(episodes, n)
    dice = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(restarts):
        centres_KE = _spread_out(unit_nE, episodes, dice)
        for _ in range(100):
            label_n = torch.cdist(unit_nE, centres_KE).argmin(1)
            moved_KE = centres_KE.clone()
            for k in range(episodes):
                if bool((label_n == k).any()):
                    moved_KE[k] = unit_nE[label_n == k].mean(0)
            if torch.equal(moved_KE, centres_KE):
                break
            centres_KE = moved_KE
        label_n = torch.cdist(unit_nE, centres_KE).argmin(1)
        cost = float((unit_nE - centres_KE[label_n]).square().sum())
        if best is None or cost < best[0]:
            best = (cost, centres_KE, label_n)
    assert best is not None
    _, centres_KE, label_n = best
    found = []
    for k in range(episodes):
        mine = (label_n == k).nonzero().flatten()
        if mine.numel() == 0:
            continue
        near = torch.cdist(unit_nE[mine], centres_KE[k][None]).flatten().argsort()[:medoids]
        found.append(
            Episode(
                centre=torch.nn.functional.normalize(centres_KE[k], dim=0),
                segments=tuple(mine.tolist()),
                medoids=tuple(sorted(mine[near].tolist())),
            )
        )
    return found


def _spread_out(unit_nE: Tensor, count: int, dice: torch.Generator) -> Tensor:
    """Starting centres, each drawn in proportion to its squared distance from those before it."""
    first = int(torch.randint(unit_nE.shape[0], (1,), generator=dice))
    chosen = [first]
    for _ in range(count - 1):
        away_n = torch.cdist(unit_nE, unit_nE[chosen]).amin(1).square()
        if float(away_n.sum()) <= 0:
            away_n = torch.ones_like(away_n)
        chosen.append(int(torch.multinomial(away_n, 1, generator=dice)))
    return unit_nE[chosen].clone()


class Episodes:
    """A conversation of which every topic has a compressed cache. Made by ``LLM.episodes``.

    Attributes
    ----------
    episodes : list of Episode
    """

    def __init__(
        self,
        llm: LLM,
        history: Sequence[str],
        *,
        count: int = 4,
        utterances: int = 4,
        medoids: int = 8,
        embed: Embed = hashed_ngrams,
        instruction: str = _INSTRUCTION,
    ) -> None:
        if not history:
            raise ValueError("the conversation is empty; give at least one utterance")
        if not llm.recipe.needs.probe:
            raise ValueError(
                "episodes need a recipe that reads a probe text, such as 'epicache'; load the model with one"
            )
        if count < 1 or utterances < 1 or medoids < 1:
            raise ValueError("count, utterances and medoids are numbers of things; give at least 1")
        segments = ["".join(history[i : i + utterances]) for i in range(0, len(history), utterances)]
        self._llm = llm
        self._embed = embed
        self.episodes = cluster(embed(segments), count, medoids=medoids)
        text = "".join(history)
        self._sessions: list[TextSession] = []
        try:
            for one in self.episodes:
                patch = instruction + "".join(segments[i] for i in one.medoids)
                self._sessions.append(llm.read(text, probe=patch))
        except BaseException:
            self.close()
            raise

    def nearest(self, question: str) -> int:
        """Number of the episode whose centre is nearest to a question."""
        vector = torch.nn.functional.normalize(self._embed([question])[0].float(), dim=0)
        return max(range(len(self.episodes)), key=lambda i: float(vector @ self.episodes[i].centre))

    def ask(self, question: str, **options: Any) -> Result:
        """Answer a question from the cache of the nearest episode; the cache stays as it is."""
        with self._sessions[self.nearest(question)].fork() as session:
            return session.generate(question, **options)

    def bytes_stored(self) -> dict[str, int]:
        """Measured KV bytes of all episodes, by ``tier/codec``."""
        total: Counter[str] = Counter()
        for session in self._sessions:
            total.update(session.bytes_stored())
        return dict(total)

    def close(self) -> None:
        """Free the entries of all episodes."""
        for session in self._sessions:
            session.close()

    def __enter__(self) -> Episodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
