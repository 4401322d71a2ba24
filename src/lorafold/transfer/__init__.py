"""An adapter of one base model to another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .align.align import align as align
    from .alignment import Alignment as Alignment
    from .job import Transfer as Transfer
    from .report import ModuleReport as ModuleReport
    from .report import TransferReport as TransferReport
    from .report import transfer_report as transfer_report
    from .transfer import transfer as transfer

__all__ = [
    "Alignment",
    "ModuleReport",
    "Transfer",
    "TransferReport",
    "align",
    "transfer",
    "transfer_report",
]

make_face(
    __name__,
    {
        "align": "align.align",
        "Alignment": "alignment",
        "transfer": "transfer",
        "Transfer": "job",
        "ModuleReport": "report",
        "TransferReport": "report",
        "transfer_report": "report",
    },
)
