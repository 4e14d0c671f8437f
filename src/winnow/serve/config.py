"""What an operator sets; checked once, when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from winnow.recipe import Recipe

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and names of one server.

    Attributes
    ----------
    served_model_name : str
        The name that clients use; also what ``/v1/models`` lists.
    recipes : mapping of str to Recipe
        Recipes that a request may name; the first is the default.
    max_model_len : int
        Prompt and answer of one request together, in tokens.
    max_num_seqs : int
        Sequences that run at a time.
    max_num_batched_tokens : int or None
        New tokens of one engine step; None for :meth:`step_tokens` to choose.
    kv_memory : int
        Most bytes that all entries in memory may take: running sequences and pools together.
    kv_dir : Path or None
        Where finished sequences outlive the process; None keeps none.
    kv_dir_bytes : int
        Most bytes of files there.
    swap_space : int
        Bytes of host memory, beside ``kv_memory``, in which preempted sequences wait; 0 is none.
    swap_dir : Path or None
        Where preempted sequences wait that find no room there; None is the system's temporary directory.
    api_keys : tuple of str
        Any of these opens the interface; empty leaves it open to everybody.
    max_body : int
        Bytes of a request body.
    max_queue : int
        Requests that may wait, of all clients together.
    max_n, max_stop, max_logprobs : int
        Samples per request, stop strings, and alternatives per token.
    request_timeout : float
        Seconds after which a request ends, waiting included.
    tool_parser : {"auto", "hermes", "json", "none"}
        Form in which the model writes a tool call of its own accord.
    """

    served_model_name: str
    recipes: Mapping[str, Recipe]
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    kv_memory: int = 4 << 30
    kv_dir: Path | None = None
    kv_dir_bytes: int = 16 << 30
    swap_space: int = 0
    swap_dir: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body: int = 8 << 20
    max_queue: int = 256
    max_n: int = 16
    max_stop: int = 16
    max_logprobs: int = 20
    request_timeout: float = 600.0
    tool_parser: str = "auto"

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ValueError("a server needs at least one recipe; give Recipe() for full attention")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "kv_memory",
            "kv_dir_bytes",
            "max_body",
            "max_queue",
            "max_n",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise ValueError(f"max_num_batched_tokens must be at least 1, not {self.max_num_batched_tokens}")
        for name in ("max_stop", "max_logprobs", "swap_space"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.request_timeout <= 0:
            raise ValueError("request_timeout must be above 0 seconds")
        if any(not key for key in self.api_keys):
            raise ValueError("an API key must not be empty")
        if self.tool_parser not in ("auto", "hermes", "json", "none"):
            raise ValueError(f"unknown tool parser {self.tool_parser!r}; choose auto, hermes, json or none")

    @property
    def default_recipe(self) -> str:
        """Name of the recipe of requests that name none."""
        return next(iter(self.recipes))

    def step_tokens(self, device: torch.device, recipe: Recipe) -> int:
        """New tokens of one engine step.

        While a prompt is computed, everybody waits for the end of the step. On a CPU, steps of 512 tokens
        take a quarter of the time of 2048 and lose 1 to 3 % (measured on two cores). Patterns of a prompt
        are chosen per step, so recipes that have one keep the longer.
        """
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return 512 if device.type == "cpu" and recipe.generation is None else 2048
