"""Load on an OpenAI-compatible server: conversations that arrive at random, timed token by token."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from winnow.bench.serve_model import words

__all__ = ["WORKLOADS", "Conversation", "Exchange", "ask", "drive", "goodput", "summary", "workload"]

Message = dict[str, str]
WORKLOADS = ("multi-turn", "shared-prefix", "mixed")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What one client says.

    Attributes
    ----------
    arrival : float
        Seconds after the start.
    system : str
        First message; empty sends none.
    questions : tuple of str
        One per turn; each is sent when the answer to the one before is complete.
    answer : int
        Tokens of every answer.
    """

    arrival: float
    system: str
    questions: tuple[str, ...]
    answer: int


@dataclass(kw_only=True)
class Exchange:
    """One request as its client saw it; times in seconds.

    Attributes
    ----------
    conversation, turn : int
    begin : float
        Since the start of the load.
    first : float
        Until the first token.
    total : float
        Until the last one.
    tokens : int
        Tokens of the answer, counted in its text.
    prompt_tokens, cached_tokens : int or None
        As the server tells; None where it does not.
    error : str
        Empty where the answer is complete.
    """

    conversation: int
    turn: int
    begin: float
    first: float = 0.0
    total: float = 0.0
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""
    text: str = ""

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.total - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


def workload(
    kind: str,
    *,
    clients: int,
    turns: int,
    prefix: int,
    question: int,
    answer: int,
    rate: float,
    vocabulary: int,
    seed: int = 0,
) -> list[Conversation]:
    """Conversations of one kind; equal seeds give equal ones.

    Parameters
    ----------
    kind : {"multi-turn", "shared-prefix", "mixed"}
        Conversations over one shared prefix; single questions over it; or half of the former and a
        quarter each of long prompts that share nothing and of short ones.
    clients, turns : int
    prefix, question, answer : int
        Tokens.
    rate : float
        Arrivals per second (exponential gaps); 0 lets all arrive at once.
    vocabulary : int
    seed : int

    Raises
    ------
    ValueError
        Unknown kind.
    """
    if kind not in WORKLOADS:
        raise ValueError(f"unknown workload {kind!r}; choose {', '.join(WORKLOADS)}")
    dice = random.Random(seed)
    shared = words(prefix, vocabulary, dice)
    made, at = [], 0.0
    for _ in range(clients):
        at += dice.expovariate(rate) if rate > 0 else 0.0
        system, count = shared, turns if kind == "multi-turn" else 1
        if kind == "mixed":
            lot = dice.random()
            count = turns if lot < 0.5 else 1
            if lot >= 0.5:
                system = words(prefix, vocabulary, dice) if lot < 0.75 else ""
        questions = tuple(words(question, vocabulary, dice) for _ in range(count))
        made.append(Conversation(arrival=at, system=system, questions=questions, answer=answer))
    return made


def ask(
    port: int, model: str, messages: Sequence[Message], answer: int, exchange: Exchange, timeout: float
) -> None:
    """Send one streaming chat request and fill in ``exchange``."""
    body = {
        "model": model,
        "messages": list(messages),
        "max_tokens": answer,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        if reply.status != 200:
            exchange.error = f"{reply.status}: {reply.read(300).decode(errors='replace')}"
            return
        for line in reply:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            _take(json.loads(data), exchange, time.perf_counter() - begin)
        if not exchange.tokens:
            exchange.error = exchange.error or "no token came"
    except (OSError, http.client.HTTPException, ValueError) as error:
        exchange.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
        exchange.tokens = len(exchange.text.split())


def _take(chunk: dict[str, Any], exchange: Exchange, now: float) -> None:
    if "error" in chunk:
        exchange.error = str(chunk["error"])
    if used := chunk.get("usage"):
        exchange.prompt_tokens = used.get("prompt_tokens")
        exchange.cached_tokens = (used.get("prompt_tokens_details") or {}).get("cached_tokens")
    for choice in chunk.get("choices") or ():
        if text := choice.get("delta", {}).get("content"):
            exchange.first = exchange.first or now
            exchange.total = now
            exchange.text += text
            exchange.tokens += 1


def drive(
    port: int, model: str, conversations: Sequence[Conversation], *, timeout: float = 3600.0
) -> tuple[list[Exchange], float]:
    """Run every conversation in a thread of its own.

    Returns
    -------
    list of Exchange
    float
        Seconds from the start to the last token.
    """
    start = time.perf_counter()
    found: list[Exchange] = []

    def converse(number: int, one: Conversation) -> None:
        time.sleep(max(one.arrival - (time.perf_counter() - start), 0.0))
        messages: list[Message] = [{"role": "system", "content": one.system}] if one.system else []
        for turn, question in enumerate(one.questions):
            messages.append({"role": "user", "content": question})
            exchange = Exchange(conversation=number, turn=turn, begin=time.perf_counter() - start)
            ask(port, model, messages, one.answer, exchange, timeout)
            found.append(exchange)
            if exchange.error:
                return
            messages.append({"role": "assistant", "content": exchange.text})

    threads = [
        threading.Thread(target=converse, args=(number, one)) for number, one in enumerate(conversations)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - start


def goodput(
    exchanges: Iterable[Exchange], seconds: float, first_deadline: float, token_deadline: float
) -> float:
    """Complete answers per second whose first token and whose time per token both met their deadline."""
    good = [
        one
        for one in exchanges
        if not one.error and one.first <= first_deadline and one.per_token <= token_deadline
    ]
    return len(good) / seconds


def summary(
    exchanges: Sequence[Exchange], seconds: float, *, first_deadline: float, token_deadline: float
) -> dict[str, Any]:
    """What a load came to, with its samples; see :func:`goodput`."""
    whole = [one for one in exchanges if not one.error]
    told = [one for one in whole if one.prompt_tokens and one.cached_tokens is not None]
    asked = sum(one.prompt_tokens or 0 for one in told)
    return {
        "seconds": seconds,
        "requests": len(exchanges),
        "failed": len(exchanges) - len(whole),
        "goodput_per_second": goodput(exchanges, seconds, first_deadline, token_deadline),
        "answers_per_second": len(whole) / seconds,
        "tokens_per_second": sum(one.tokens for one in whole) / seconds,
        "first_token": _spread([one.first for one in whole]),
        "per_token": _spread([one.per_token for one in whole if one.tokens > 1]),
        "hit_rate": sum(one.cached_tokens or 0 for one in told) / asked if asked else None,
        "samples": [{k: v for k, v in asdict(one).items() if k != "text"} for one in exchanges],
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    tail = quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"median": median(values), "p95": tail, "max": max(values)}
