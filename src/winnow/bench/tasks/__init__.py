"""The thirteen tasks of the lifecycle benchmark, generated offline from seeds."""

from __future__ import annotations

from winnow.bench.tasks.example import PLAIN, Category, Example, Form, Join, Turn, prompt
from winnow.bench.tasks.task import Task

__all__ = ["PLAIN", "TASKS", "Category", "Example", "Form", "Join", "Task", "Turn", "prompt"]

TASKS: dict[str, Task] = {}
