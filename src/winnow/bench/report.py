"""Tables and figures of ``winnow bench kernels``, drawn from its JSON.

``python -m winnow.bench.report benchmarks/results/RESULT.json``, in a checkout, puts the table into
docs/guide/kernels.md and draws docs/images/kernels.svg.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from winnow.bench import output

__all__ = ["draw", "draw_beside", "insert", "markdown", "table"]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _rate(row: dict[str, Any]) -> str:
    rate = row["work"] / row["seconds"]
    return f"{rate / 1e12:.3f} TFLOP/s" if row["unit"] == "operations" else f"{rate / 1e9:.1f} GB/s"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} x"


def _floor(floor: dict[str, Any]) -> str:
    if floor["versus"] == "limit":
        wanted = f"{floor['wanted']:.0%}"
    else:
        wanted = f"{floor['wanted']:g} x {'PyTorch' if floor['versus'] == 'pytorch' else 'dense'}"
    return f"{wanted} {'met' if floor['met'] else 'missed'}"


def table(result: dict[str, Any]) -> Table:
    """Everything that was measured, PyTorch's forms in dim type."""
    limits, cpu = result["limits"], result["machine"]["cpu"]["name"]
    drawn = Table(
        title=(
            f"{cpu}, {result['machine']['cores']} cores: bf16 matrix product "
            f"{limits['bf16_matrix_product_flops'] / 1e12:.2f} TFLOP/s "
            f"(arithmetic alone {limits['bf16_multiply_flops'] / 1e12:.2f}), "
            f"reading {limits['read_bytes_per_second'] / 1e9:.1f} GB/s"
        ),
        caption="of limit: of the matrix product or of reading, measured in turn with each kernel",
    )
    drawn.add_column("kernel")
    for name in ("time", "rate", "of limit", "vs PyTorch", "vs own dense"):
        drawn.add_column(name, justify="right")
    drawn.add_column("floor")
    group = None
    for row in result["rows"]:
        if row["group"] != group:
            group = row["group"]
            drawn.add_section()
            drawn.add_row(f"[bold]{group}")
        floors = ", ".join(f"[{'green' if f['met'] else 'red'}]{_floor(f)}[/]" for f in row["floors"])
        drawn.add_row(
            f"  {row['name']}",
            _time(row["seconds"]),
            _rate(row),
            f"{row['of_limit']:.0%}",
            _times(row["versus_pytorch"]),
            _times(row["versus_dense"]),
            floors,
            style=None if row["ours"] else "dim",
        )
    return drawn


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw each kernel's share of the limit, its floor, and PyTorch's share, as horizontal bars.

    Raises
    ------
    ImportError
        Without Matplotlib (the extra ``plot``).
    """
    from matplotlib.figure import Figure

    by_name = {(row["group"], row["name"]): row for row in result["rows"]}
    ours = [row for row in result["rows"] if row["ours"]]
    figure = Figure(
        figsize=(9, 0.8 + 0.2 * len(ours) + 0.25 * len({r["group"] for r in ours})), layout="tight"
    )
    axes = figure.add_subplot()
    y, group = 0.0, None
    ticks: list[float] = []
    labels: list[str] = []
    for row in ours:
        if row["group"] != group:
            group, y = row["group"], y + 1
            axes.text(0, y, group, weight="bold", va="center", size=8)
            y += 1
        axes.barh(y, 100 * row["of_limit"], color="#3b6ea5", height=0.72, label=None if ticks else "Winnow")
        baseline = by_name.get((row["group"], row["pytorch"]))
        # Only where both do the same work is a share of the limit a comparison.
        if baseline is not None and abs(baseline["work"] / row["work"] - 1) < 0.05:
            axes.plot(100 * baseline["of_limit"], y, "o", color="#d1761b", markersize=4)
        for floor in row["floors"]:
            if floor["versus"] == "limit":
                axes.plot([100 * floor["wanted"]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.5)
        if row["versus_pytorch"] is not None:
            axes.text(
                100 * row["of_limit"] + 1,
                y,
                f"{row['versus_pytorch']:.1f} x",
                va="center",
                size=6,
                color="#555555",
            )
        ticks.append(y)
        labels.append(row["name"])
        y += 1
    axes.set_yticks(ticks, labels, size=7)
    axes.set_ylim(y, 0)
    axes.set_xlim(0, max(115.0, *(100 * row["of_limit"] + 12 for row in ours)))
    axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(
        "% of the machine's limit (bf16 matrix product or reading). Black: the floor.\n"
        "Orange: PyTorch's best form on the same work. Grey: times as fast as PyTorch",
        size=7,
    )
    machine = result["machine"]
    axes.set_title(
        f"{machine['cpu']['name']}, {machine['cores']} cores, torch {machine['versions']['torch']}", size=9
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_beside(path: Path) -> Path | None:
    """Draw the figure of a JSON file beside it; None without Matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    figure = path.with_suffix(".svg")
    draw(json.loads(path.read_text()), figure)
    return figure


def markdown(result: dict[str, Any]) -> str:
    """What we measured of our own kernels, as a Markdown table."""
    lines = [
        "| kernel | time | of the limit | against PyTorch | against own dense | floor |",
        "|---|---:|---:|---:|---:|---|",
    ]
    group = None
    for row in result["rows"]:
        if not row["ours"]:
            continue
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** | | | | | |")
        cells = (
            row["name"],
            _time(row["seconds"]),
            f"{row['of_limit']:.0%}",
            _times(row["versus_pytorch"]),
            _times(row["versus_dense"]),
            ", ".join(_floor(f) for f in row["floors"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    limits, machine = result["limits"], result["machine"]
    lines += [
        "",
        f"{machine['cpu']['name']}, {machine['cores']} cores, PyTorch {machine['versions']['torch']}, "
        f"commit {machine['commit']}. Limits by themselves: bf16 matrix product "
        f"{limits['bf16_matrix_product_flops'] / 1e12:.2f} TFLOP/s (products on operands in the first-level "
        f"cache: {limits['bf16_multiply_flops'] / 1e12:.2f}), reading "
        f"{limits['read_bytes_per_second'] / 1e9:.1f} GB/s (`torch.sum`: "
        f"{limits['torch_sum_bytes_per_second'] / 1e9:.1f}).",
    ]
    return "\n".join(lines)


def insert(page: str, result: dict[str, Any]) -> str:
    """The page with the table of this result between its markers."""
    return output.insert(page, "kernels", markdown(result))


def main(source: Path, repository: Path) -> None:
    """Put a result into the guide: its table and its figure."""
    result = json.loads(source.read_text())
    page = repository / "docs" / "guide" / "kernels.md"
    page.write_text(insert(page.read_text(), result))
    draw(result, repository / "docs" / "images" / "kernels.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path.cwd())
