"""An adapter of one base model to another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._verb import make_face

if TYPE_CHECKING:
    from .job import Transfer as Transfer
    from .report import ModuleReport as ModuleReport
    from .report import TransferReport as TransferReport
    from .report import transfer_report as transfer_report
    from .transfer import transfer as transfer

__all__ = ["ModuleReport", "Transfer", "TransferReport", "transfer", "transfer_report"]

make_face(
    __name__,
    {
        "transfer": "transfer",
        "Transfer": "job",
        "ModuleReport": "report",
        "TransferReport": "report",
        "transfer_report": "report",
    },
)
