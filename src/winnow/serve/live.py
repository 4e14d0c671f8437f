"""What the page at ``/`` shows, and the page."""

from __future__ import annotations

import functools
import time
from importlib import resources
from typing import Any

from winnow.serve.job import Job
from winnow.serve.worker import Worker

__all__ = ["POLICY", "page", "state"]

# Nothing from elsewhere, nothing sent elsewhere, whatever a client put into the names it shows.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:"
)


@functools.cache
def page() -> str:
    """HTML with its style and its script inside: it needs no network."""
    return resources.files("winnow.serve").joinpath("page.html").read_text(encoding="utf-8")


def state(worker: Worker) -> dict[str, Any]:
    """Numbers and timelines of ``now``, seconds on the server's clock; other times are seconds ago."""
    now, counters = time.monotonic(), worker.counters
    running, waiting, snapshot = worker.running(), worker.waiting(), worker.snapshot
    looked_up = counters.prompt_tokens
    return {
        "now": now,
        "running": len(running),
        "waiting": len(waiting),
        "counters": {**vars(counters), "ended": dict(counters.ended)},
        "hit_rate": counters.reused_tokens / looked_up if looked_up else 0.0,
        "kv_bytes": snapshot["kv_bytes"],
        "kv_elsewhere": snapshot["kv_elsewhere"],
        "kv_bytes_at_step": snapshot["steps"],
        "kv_limit": worker.memory.limit,
        "kv_peak": worker.memory.peak,
        "swapped": snapshot["swapped"],
        "swap_space": worker.swap.space,
        "swap_peak": worker.swap.peak,
        "requests": [_timeline(job, now) for job in [*waiting, *running, *worker.recent_jobs()]],
    }


def _timeline(job: Job, now: float) -> dict[str, Any]:
    def ago(moment: float) -> float | None:
        return round(now - moment, 3) if moment else None

    return {
        "name": job.name,
        "client": job.client,
        "recipe": job.recipe,
        "state": job.outcome if job.state == "ended" else job.state,
        "prompt_tokens": len(job.tokens),
        "cached_tokens": job.result.stats.tokens_reused if job.result else 0,
        "generated_tokens": job.generated,
        "preemptions": job.preemptions,
        "created": ago(job.created),
        "started": ago(job.started),
        "first_token": ago(job.first_token),
        "ended": ago(job.ended_at),
    }
