"""The report of a run: one HTML file that shows everything, needs no network and runs no script."""

from alignjax.report.page import render

__all__ = ["render"]
