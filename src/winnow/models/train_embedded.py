"""Rebuild or evaluate the embedded model: ``python -m winnow.models.train_embedded``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from winnow.models.embedded import documents, evaluate, heads, path
from winnow.models.embedded.train import SCHEDULE, Run


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train (the default) or evaluate."""
    parser = argparse.ArgumentParser(prog="python -m winnow.models.train_embedded", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/embedded"), help="checkpoint and log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--until", type=int, help="stop at this step; run again to go on")
    parser.add_argument("--export", type=Path, help="write the weights here at the end")
    parser.add_argument("--evaluate", action="store_true", help="evaluate weights instead of training")
    parser.add_argument("--weights", type=Path, default=path(), help="what --evaluate loads")
    parser.add_argument(
        "--out", type=Path, help="JSON that --evaluate writes, and goes on with if it is stopped"
    )
    parser.add_argument("--figure", type=Path, help="picture of the heads that --evaluate draws")
    parser.add_argument("--questions", type=int, default=300, help="per cell")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(evaluate.LENGTHS))
    parser.add_argument("--cells", nargs="+", choices=[name for name, *_ in evaluate.CELLS])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        if given.evaluate:
            report = evaluate.report(
                given.weights,
                evaluate.cells(given.lengths, given.cells),
                questions=given.questions,
                device=given.device,
                dtype=given.dtype,
                out=given.out,
            )
            if given.figure:
                heads.draw(report["heads"], given.figure)
            return 0
        run = Run(given.run, SCHEDULE, given.device)
        print(
            f"{run.schedule.steps} steps, {run.schedule.tokens} tokens, at step {run.step};"
            f" {documents.HELD_OUT} held out"
        )
        run.train(until=given.until)
        if given.export:
            run.export(given.export)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
