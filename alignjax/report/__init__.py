"""The report of a run: one HTML file that shows everything, needs no network and runs no script.

A figure or a table of what is on disk comes in here.
It may import `evaluation` and the rooms below; it computes nothing that the run has not measured.
"""

from alignjax.report.page import render

__all__ = ["render"]
