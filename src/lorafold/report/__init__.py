"""A collection as one page of pictures, and pictures for notebooks and papers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .report import Report as Report
    from .report import report as report

__all__ = ["Report", "report"]

make_face(__name__, {"report": "report", "Report": "report"})
