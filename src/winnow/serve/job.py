"""One request on its way through the server, and what its listener hears."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from winnow.engine.engine import Engine
from winnow.engine.repair import Division
from winnow.engine.request import Result, SamplingParams
from winnow.engine.steer import Steer
from winnow.serve.errors import ApiError

__all__ = ["Ended", "Failed", "Job", "Piece", "Update"]

_arrivals = itertools.count()

# What an answer is expected to take where a request asks for "as much as fits"; settled at its end.
_EXPECTED_ANSWER = 256


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token of one sample.

    Attributes
    ----------
    index : int
        Which sample.
    token : int
    text : str
        Text that became final with it; may be empty.
    logprob : dict or None
        As :attr:`winnow.engine.request.Sample.logprobs` has it.
    finish_reason : str
        Empty but with the last token: ``"stop"`` or ``"length"``.
    """

    index: int
    token: int
    text: str
    logprob: dict[str, Any] | None
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Every sample has ended.

    Attributes
    ----------
    stats : dict
        :meth:`winnow.engine.request.Stats.to_dict` of the request.
    """

    stats: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The request ended without an answer."""

    error: ApiError


Update = Piece | Ended | Failed


@dataclass(kw_only=True, eq=False)
class Job:
    """A request.

    Attributes
    ----------
    name : str
        For logs and the live page.
    client : str
        Whose it is, for fairness.
    tokens : list of int
    params : SamplingParams
    recipe : str
        Name of one of the operator's recipes.
    salt : str
        Requests of different salts share no entries.
    steer : callable or None
        Makes what bends the logits of one sample.
    division : Division or None
        Chunks that the recipe may reuse.
    listen : callable
        Called from the worker's thread with every :data:`Update`; must not block.
    deadline : float
        Monotonic time at which it ends whatever its state.
    """

    name: str
    client: str
    tokens: list[int]
    params: SamplingParams
    recipe: str
    salt: str = ""
    priority: int = 0
    steer: Callable[[], Steer] | None = None
    division: Division | None = None
    listen: Callable[[Update], None]
    deadline: float
    arrival: int = field(default_factory=lambda: next(_arrivals))
    created: float = field(default_factory=time.monotonic)
    state: Literal["waiting", "running", "suspended", "ended"] = "waiting"
    cancelled: bool = False
    result: Result | None = None
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    ended_at: float = 0.0
    open_samples: int = 0
    preemptions: int = 0
    outcome: str = ""

    def __post_init__(self) -> None:
        self.array: npt.NDArray[np.int64] = np.asarray(self.tokens, dtype=np.int64)
        self.open_samples = self.params.n

    def submit(self, engine: Engine) -> Result:
        """Queue it in an engine of its recipe."""
        return engine.submit(
            self.tokens, self.params, salt=self.salt, steer=self.steer, division=self.division
        )

    @property
    def generated(self) -> int:
        """Tokens drawn so far, all samples together."""
        return 0 if self.result is None else self.result.stats.tokens_generated

    @property
    def prompting(self) -> bool:
        """Runs, and has no token yet."""
        return self.state == "running" and not self.first_token

    @property
    def cost(self) -> int:
        """Tokens that it is expected to take from now on."""
        answer = min(self.params.max_new_tokens, _EXPECTED_ANSWER) * self.params.n
        if self.state == "suspended":
            return max(answer - self.generated, 1)
        return len(self.tokens) + answer

    def common(self, other: Job) -> int:
        """Leading prompt tokens that both have."""
        n = min(len(self.array), len(other.array))
        differ = np.flatnonzero(self.array[:n] != other.array[:n])
        return int(differ[0]) if len(differ) else n
