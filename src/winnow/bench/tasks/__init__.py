"""The thirteen tasks of the lifecycle benchmark, generated offline from seeds."""

from __future__ import annotations

from winnow.bench.tasks import joint_recall, kv, many_shot, mf, prefix_suffix, qa, repoqa, summary, vt
from winnow.bench.tasks.example import PLAIN, Category, Example, Form, Join, Turn, prompt
from winnow.bench.tasks.task import Task

__all__ = ["PLAIN", "TASKS", "Category", "Example", "Form", "Join", "Task", "Turn", "prompt"]

#: by name, in SCBench's order of categories
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        kv.TASK,
        prefix_suffix.TASK,
        vt.TASK,
        joint_recall.TASK,
        repoqa.REPOQA,
        qa.QA_EN,
        qa.CHOICE_EN,
        qa.QA_ZH,
        mf.TASK,
        many_shot.TASK,
        summary.SUMMARY,
        summary.SUMMARY_NEEDLES,
        repoqa.REPOQA_KV,
    )
}
