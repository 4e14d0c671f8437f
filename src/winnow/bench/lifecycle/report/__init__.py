"""The report of a lifecycle run: one self-contained HTML page."""

from winnow.bench.lifecycle.report.page import page

__all__ = ["page"]
