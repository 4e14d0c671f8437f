"""Write the README's tables and picture from the JSON of committed runs.

``winnow demo --out benchmarks/results/demo.json`` and ``winnow bench lifecycle --out benchmarks/results``
make the JSON, ``python -m winnow.bench.readme`` puts it into README.md and draws docs/images/demo.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from winnow.bench.output import insert

__all__ = ["TABLES", "draw", "lifecycle", "markdown"]


def markdown(report: dict[str, Any]) -> str:
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
        "Made by `winnow demo`; raw samples in `benchmarks/results/demo.json`."
    )
    return "\n".join(lines)


def lifecycle(summary: dict[str, Any]) -> str:
    """A lifecycle run as a Markdown table: turns of a conversation, and separate requests beside them."""
    config, machine = summary["config"], summary["machine"]
    rows = {(row["system"], row["mode"]): row for row in summary["rows"]}
    lines = [
        "| recipe | kind | turn 1 | later turns | separate requests | first token | scores computed "
        "| KV stored | KV read per token |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
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
            _right(requests["scores"]["all"] if requests else None),
            f"{turns['cost']['first_token_seconds']:.2f} s",
            *(_share(beside[key]) for key in ("score_entries", "bytes_stored", "bytes_read_per_token")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lengths = ", ".join(str(length) for length in config["lengths"])
    lines += [
        "",
        f"Right answers, 95 % bootstrap intervals over examples: {len(config['tasks'])} tasks at {lengths} "
        f"tokens, {config['examples']} examples each with {config['turns']} questions, on the model "
        f"`{config['model']}`; costs in per cent of full attention, in a conversation of all turns; "
        f"{machine['cpu']['name']}, {machine['cores']} cores. Made by `winnow bench lifecycle`; "
        "raw samples in `benchmarks/results/lifecycle.json`.",
    ]
    return "\n".join(lines)


def _right(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    return f"{score['mean']:.0%} ({100 * score['low']:.0f} to {100 * score['high']:.0f})"


def _share(share: float | None) -> str:
    return "not known" if share is None else f"{share:.0%}"


TABLES = (
    ("demo", "benchmarks/results/demo.json", markdown),
    ("lifecycle", "benchmarks/results/lifecycle.json", lifecycle),
)
"""Mark in the README, the run that stands there, and how it is written."""


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
    """Rewrite the tables and the picture under a checkout's root."""
    readme = root / "README.md"
    page = readme.read_text(encoding="utf-8")
    for mark, source, written in TABLES:
        if (root / source).exists():
            page = insert(page, mark, written(json.loads((root / source).read_text(encoding="utf-8"))))
    readme.write_text(page, encoding="utf-8")
    draw(json.loads((root / TABLES[0][1]).read_text(encoding="utf-8")), root / "docs/images/demo.png")


if __name__ == "__main__":
    main(Path.cwd())
