"""The command line: thin, no algorithm; errors are one line with a remedy and exit code 2."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``winnow`` command."""
    from winnow.cli.app import app

    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("WINNOW_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"winnow: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("winnow: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
