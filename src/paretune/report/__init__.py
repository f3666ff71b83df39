"""`paretune report`: what a run directory holds, as one page, as CSV files and in the terminal."""

from __future__ import annotations

from pathlib import Path

from paretune.report.data import load
from paretune.report.page import write_page

__all__ = ["write_report"]


def write_report(root: str | Path, *, suite: str | None = None, out: str | Path | None = None) -> Path:
    """Write index.html and tables/*.csv to `out` (default: ROOT/reports/<suite>); returns the page's path.

    Raises ConfigError where there is no run directory, no such suite, or nothing finished.
    """
    results = load(root, suite=suite)
    return write_page(results, Path(out) if out is not None else Path(root) / "reports" / results.name)
