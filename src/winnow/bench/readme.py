"""Write the tables of the README and of the guide, and the README's picture, from the JSON of committed runs.

:data:`TABLES` names the pages and the runs; below each table stands the command that made it.
``python -m winnow.bench.readme`` writes all tables whose runs are there, and draws docs/images/demo.png.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from winnow.bench import attached, end_to_end, files, serve_report
from winnow.bench.output import insert

__all__ = [
    "TABLES",
    "Place",
    "chunks",
    "draw",
    "lifecycle",
    "main",
    "markdown",
    "prefill",
    "tasks",
    "workers",
    "workers_answers",
]

RESULTS = "benchmarks/results"


def markdown(report: dict[str, Any], source: str) -> str:
    """The demo's rows as a Markdown table."""
    config, machine = report["config"], report["machine"]
    lines = [
        "| recipe | answers right | turn 1 | later turns | first token | tokens/s | scores computed "
        "| KV stored | KV read per token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = report["rows"][0]
    for row in report["rows"]:
        rights = ("{} of {}".format(*row[key]) for key in ("right", "right_first_turn", "right_later_turns"))
        shares = (
            f"{row[key] / 1e6:.2f} {unit} ({row[key] / base[key]:.0%})"
            for key, unit in (("score_entries", "M"), ("bytes_stored", "MB"), ("bytes_read_per_token", "MB"))
        )
        cells = (
            row["name"],
            *rights,
            f"{row['time_to_first_token'] * 1e3:.0f} ms",
            f"{row['decode_tokens_per_second']:.0f}",
            *shares,
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"Documents of {config['tokens']} tokens, {config['turns']} questions each, one after the other in a "
        f"session; exact match over free generation by the embedded model; {machine['cpu']['name']}, "
        f"{machine['cores']} cores. "
        f"Made by `winnow demo`; raw samples in `{source}`."
    )
    return "\n".join(lines)


def lifecycle(summary: dict[str, Any], source: str) -> str:
    """A lifecycle run as a Markdown table: turns of a conversation, and separate requests if it had any."""
    config, machine = summary["config"], summary["machine"]
    rows = {(row["system"], row["mode"]): row for row in summary["rows"]}
    separate = any(mode == "multi-request" for _, mode in rows)
    heads = ["turn 1", "later turns", *(["separate requests"] if separate else []), "first token"]
    heads += ["scores computed", "KV stored", "KV read per token"]
    lines = [f"| recipe | kind | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for system in summary["systems"]:
        name = system["name"]
        turns, requests = rows.get((name, "multi-turn")), rows.get((name, "multi-request"))
        if turns is None:
            continue
        scores, beside = turns["scores"]["part"], turns["beside_baseline"]
        cells = (
            f"`{name}`",
            system["kind"],
            *(_right(scores.get(part)) for part in ("first", "later")),
            *([_right(requests["scores"]["all"] if requests else None)] if separate else []),
            f"{turns['cost']['first_token_seconds']:.2f} s",
            *(_share(beside[key]) for key in ("score_entries", "bytes_stored", "bytes_read_per_token")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lengths = ", ".join(str(length) for length in config["lengths"])
    took = f" in {summary['seconds'] / 60:.1f} minutes" if summary.get("seconds") else ""
    lines += [
        "",
        f"Right answers, 95 % bootstrap intervals over examples: {len(config['tasks'])} tasks at {lengths} "
        f"tokens, {config['examples']} examples each with {config['turns']} questions, on the model "
        f"`{config['model']}`; costs in per cent of full attention, in a conversation of all turns; "
        f"{machine['cpu']['name']}, {machine['cores']} cores. Made by `winnow bench lifecycle`{took}; "
        f"raw samples in `{source}`.",
    ]
    return "\n".join(lines)


def _right(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    return f"{score['mean']:.0%} ({100 * score['low']:.0f} to {100 * score['high']:.0f})"


def tasks(summary: dict[str, Any], source: str) -> str:
    """Right answers of a lifecycle run, task by task, as a Markdown table."""
    config, rows = summary["config"], summary["rows"]
    lines = [f"| recipe | {' | '.join(config['tasks'])} |", "|---|" + "---:|" * len(config["tasks"])]
    for row in rows:
        means = (row["scores"]["task"][task]["mean"] for task in config["tasks"])
        lines.append(f"| `{row['system']}` | {' | '.join(f'{mean:.0%}' for mean in means)} |")
    questions = rows[0]["scores"]["all"]["turns"] // len(config["tasks"])
    lengths = ", ".join(map(str, config["lengths"]))
    told = f"{questions} questions in each cell; contexts of {lengths} tokens; raw samples in `{source}`."
    lines += ["", told]
    return "\n".join(lines)


def prefill(report: dict[str, Any], source: str) -> str:
    """A run of ``python -m winnow.bench.swiftkv`` as a Markdown table."""
    config, machine = report["config"], report["machine"]
    heads = ("first token", "of full", "multiplications", "KV stored", "KV read per token", "decoded token")
    lines = [f"| recipe | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    base = report["rows"][0]
    for row in report["rows"]:
        cells = (
            f"`{row['name']}`",
            f"{median(row['first_token']):.2f} s",
            f"{row['over_full']:.0%}",
            f"{row['multiplications']:.0%}",
            *(f"{row[key] / base[key]:.0%}" for key in ("bytes_stored", "bytes_read")),
            f"{median(row['decode']) * 1e3:.0f} ms",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"A prompt of {config['tokens']} tokens on random weights of the shape `{config['preset']}`, "
        f"{config['rounds']} interleaved rounds; {machine['cpu']['name']}, {machine['cores']} cores. Made by "
        f"`python -m winnow.bench.swiftkv`; raw samples in `{source}`.",
    ]
    return "\n".join(lines)


def _share(share: float | None) -> str:
    return "not known" if share is None else f"{share:.0%}"


def chunks(report: dict[str, Any], source: str) -> str:
    """A run of ``winnow bench chunks`` as a Markdown table."""
    config, machine = report["config"], report["machine"]
    groups = list(report["rows"][0]["right"])
    heads = [*groups, "first token", "of full", "tokens computed", "of them repair", "scores"]
    heads += ["KV read per token", "pool per chunk token"]
    lines = [f"| contender | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in report["rows"]:
        cells = (
            row["name"],
            *(_right(row["right"][group]) for group in groups),
            f"{row['median_seconds']:.3f} s",
            f"{row['over_full']:.0%}",
            f"{row['tokens_computed'] + row['tokens_repaired']:.0f}",
            f"{row['tokens_repaired']:.0f}",
            f"{row['score_entries'] / 1e6:.2f} M",
            f"{row['bytes_read_per_token'] / 1e6:.2f} MB",
            f"{row['bytes_pool'] / report['chunk_tokens'] / 1e3:.1f} kB" if row["bytes_pool"] else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    asked = len(report["rows"][0]["samples"]["seconds"])
    lines += [
        "",
        f"Model `{config['model']}`: {asked} prompts of {config['pieces']} chunks, {config['tokens']} tokens "
        "together, in an order of their own each, all chunks met before; median time to the first token, and "
        "the median of its share of the full recompute's for the same prompt. "
        + ("Right answers with 95 % bootstrap intervals over documents. " if groups else "")
        + f"{machine['cpu']['name']}, {machine['cores']} cores. Made by `{_command(report)}`; "
        f"raw samples in `{source}`.",
    ]
    return "\n".join(lines)


def workers(report: dict[str, Any], source: str) -> str:
    """The times of a run of ``winnow bench workers`` as a Markdown table."""
    config, machine = report["config"], report["machine"]
    heads = ["tokens/s", "per reader", "beside one sequence", "KV stored", "KV read per token"]
    lines = [f"| readers | what they read | {' | '.join(heads)} |", "|---:|---|" + "---:|" * len(heads)]
    for row in report["rows"]:
        cells = (
            str(row["readers"]),
            row["name"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second'] / row['readers']:.1f}",
            f"{row['over_one']:.2f}",
            f"{row['bytes_stored'] / 1e6:.1f} MB",
            f"{row['bytes_read_per_token'] / 1e6:.1f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    limit = report["limit"]
    lines += [
        "",
        f"Model `{config['model']}`, {config['entries']} tokens that all readers share, medians of "
        f"{config['rounds']} interleaved rounds of {config['steps']} tokens per reader. "
        + (f"Reading weights and text once: {limit['seconds'] * 1e3:.0f} ms. " if limit else "")
        + f"{machine['cpu']['name']}, {machine['cores']} cores. Made by `{_command(report)}`; "
        f"raw samples in `{source}`.",
    ]
    return "\n".join(lines)


def workers_answers(report: dict[str, Any], source: str) -> str:
    """The answers of a run of ``winnow bench workers`` on the embedded model as a Markdown table."""
    config = report["config"]
    lines = ["| asked | workers | right |", "|---|---:|---:|"]
    lines += [f"| {row['kind']} | {row['workers']} | {_right(row['right'])} |" for row in report["quality"]]
    lines += [
        "",
        f"{report['quality'][0]['right']['turns']} questions about {config['documents']} documents of "
        f"{config['tokens']} tokens in each row, 95 % bootstrap intervals over documents; "
        f"the same run (`{source}`).",
    ]
    return "\n".join(lines)


def _command(report: dict[str, Any]) -> str:
    """The command of a report with all that its configuration says."""
    words = []
    for key, value in report["config"].items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{key}", str(one)]
    return f"{report['command']} {shlex.join(words)}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run is shown.

    Attributes
    ----------
    page : str
        With the marks ``<!-- mark: begin -->`` and ``<!-- mark: end -->``.
    mark : str
    source : str
        JSON of the run.
    written : callable
        Makes Markdown of the run and its source.
    """

    page: str
    mark: str
    source: str
    written: Callable[[dict[str, Any], str], str]

    def on(self, root: Path, page: str) -> str:
        """The page, with the run's table if the run is there."""
        source = root / self.source
        if not source.exists():
            return page
        return insert(page, self.mark, self.written(json.loads(source.read_text("utf-8")), self.source))


_METHODS, _GENERATION = "docs/guide/methods.md", "docs/guide/generation.md"
_COMPRESSION, _END_TO_END = "docs/guide/compression.md", "docs/guide/end-to-end.md"
TABLES = (
    Place(page="README.md", mark="demo", source=f"{RESULTS}/demo.json", written=markdown),
    Place(page="README.md", mark="lifecycle", source=f"{RESULTS}/lifecycle.json", written=lifecycle),
    Place(page=_METHODS, mark="methods", source=f"{RESULTS}/methods.json", written=lifecycle),
    Place(
        page="docs/decisions/0006-packed-pools.md",
        mark="files",
        source=f"{RESULTS}/files.json",
        written=files.markdown,
    ),
    Place(
        page="docs/guide/serving.md",
        mark="serve-load",
        source=f"{RESULTS}/serve-load.json",
        written=serve_report.markdown,
    ),
    Place(
        page=_COMPRESSION,
        mark="attached",
        source=f"{RESULTS}/attached-methods.json",
        written=attached.markdown,
    ),
    Place(
        page=_COMPRESSION,
        mark="attached-32k",
        source=f"{RESULTS}/attached-methods-32k.json",
        written=attached.markdown,
    ),
    Place(
        page=_END_TO_END,
        mark="decode",
        source=f"{RESULTS}/end-to-end-decode.json",
        written=end_to_end.markdown,
    ),
    Place(
        page=_END_TO_END,
        mark="prefill",
        source=f"{RESULTS}/end-to-end-prefill.json",
        written=end_to_end.markdown,
    ),
    Place(page=_METHODS, mark="chunks", source=f"{RESULTS}/chunks.json", written=chunks),
    Place(page=_METHODS, mark="chunks-1b", source=f"{RESULTS}/chunks-1b.json", written=chunks),
    Place(page=_METHODS, mark="workers", source=f"{RESULTS}/workers.json", written=workers),
    Place(page=_METHODS, mark="workers-answers", source=f"{RESULTS}/workers.json", written=workers_answers),
    Place(page=_METHODS, mark="workers-1b", source=f"{RESULTS}/workers-1b.json", written=workers),
    Place(page=_METHODS, mark="swiftkv", source=f"{RESULTS}/swiftkv.json", written=lifecycle),
    Place(page=_GENERATION, mark="swiftkv-forms", source=f"{RESULTS}/swiftkv-forms.json", written=tasks),
    Place(page=_GENERATION, mark="swiftkv-1b", source=f"{RESULTS}/swiftkv-prefill.json", written=prefill),
)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of quality and cost beside full attention (needs the extra ``plot``)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["rows"]
    base = rows[0]
    panels = (
        ("answers right, turn 1", [r["right_first_turn"][0] / r["right_first_turn"][1] for r in rows]),
        ("answers right, later turns", [r["right_later_turns"][0] / r["right_later_turns"][1] for r in rows]),
        ("scores computed", [r["score_entries"] / base["score_entries"] for r in rows]),
        ("KV stored", [r["bytes_stored"] / base["bytes_stored"] for r in rows]),
        ("KV read per token", [r["bytes_read_per_token"] / base["bytes_read_per_token"] for r in rows]),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 0.5 * len(rows) + 1.2), sharey=True)
    colours = ["#6b7280", "#2f6f9f", "#b0643c", "#3f8f5f", "#8a5fa0", "#a08f3f"]
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.barh([r["name"] for r in rows], values, color=colours[: len(rows)], height=0.62)
        axis.bar_label(bars, labels=[f"{v:.0%}" for v in values], padding=3, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.3 * max(1.0, *values))
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(root: Path) -> None:
    """Rewrite the tables and the picture under a checkout's root; a table without its run stays as it is."""
    for place in TABLES:
        path = root / place.page
        path.write_text(place.on(root, path.read_text("utf-8")), "utf-8")
    draw(json.loads((root / RESULTS / "demo.json").read_text("utf-8")), root / "docs/images/demo.png")


if __name__ == "__main__":
    main(Path.cwd())
