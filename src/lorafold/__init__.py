"""lorafold: everything you do with low-rank adapters after (and while) you train them.

The public names are loaded on first use, so that `import lorafold` costs nothing and does not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapter",
    "Layout": "parts",
    "LowRank": "lowrank",
    "load": "files",
    "save": "files",
    "attach": "attach",
    "LoRA": "attach",
    "Loadings": "attach",
    "PiSSA": "attach",
    "Live": "attach",
    "calibrate": "attach",
    "quantize_base": "quantize",
    "dequantize": "quantize",
    "merge": "merge",
    "merge_into_weights": "merge",
    "extract": "merge",
    "similarity": "compare",
    "Similarity": "compare",
    "overlap": "compare",
    "Overlap": "compare",
    "anatomy": "compare",
    "Anatomy": "compare",
    "shared_spectrum": "compare",
    "align": "transfer",
    "Alignment": "transfer",
    "transfer": "transfer",
    "transfer_report": "transfer",
    "ArrowRouter": "route",
    "CentroidRouter": "route",
    "LearnedRouter": "route",
    "fold": "fold",
    "Library": "fold",
    "Projection": "fold",
    "roles": "roles",
    "report": "report",
    "train": "train",
    "OrbitalController": "train.orbital.controller",
    "calibrate_c": "train.steering.calibrate",
    "plot": "report.plot",
    "LorafoldError": "errors",
}

# The leaves of the tree of errors: found here, listed in `lorafold.errors`.
_ERRORS = (
    *("FileError", "MismatchError", "MissingExtraError", "RefusedError"),
    *("ToleranceError", "UnknownNameError"),
)

if TYPE_CHECKING:
    from . import errors as errors
    from . import train as train
    from .adapter import Adapter as Adapter
    from .attach import Live as Live
    from .attach import Loadings as Loadings
    from .attach import LoRA as LoRA
    from .attach import PiSSA as PiSSA
    from .attach import attach as attach
    from .attach import calibrate as calibrate
    from .compare import Anatomy as Anatomy
    from .compare import Overlap as Overlap
    from .compare import Similarity as Similarity
    from .compare import anatomy as anatomy
    from .compare import overlap as overlap
    from .compare import shared_spectrum as shared_spectrum
    from .compare import similarity as similarity
    from .errors import FileError as FileError
    from .errors import LorafoldError as LorafoldError
    from .errors import MismatchError as MismatchError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import RefusedError as RefusedError
    from .errors import ToleranceError as ToleranceError
    from .errors import UnknownNameError as UnknownNameError
    from .files import load as load
    from .files import save as save
    from .fold import Library as Library
    from .fold import Projection as Projection
    from .fold import fold as fold
    from .lowrank import LowRank as LowRank
    from .merge import extract as extract
    from .merge import merge as merge
    from .merge import merge_into_weights as merge_into_weights
    from .parts import Layout as Layout
    from .quantize import dequantize as dequantize
    from .quantize import quantize_base as quantize_base
    from .report import plot as plot
    from .report import report as report
    from .roles import roles as roles
    from .route import ArrowRouter as ArrowRouter
    from .route import CentroidRouter as CentroidRouter
    from .route import LearnedRouter as LearnedRouter
    from .train.orbital.controller import OrbitalController as OrbitalController
    from .train.steering.calibrate import calibrate_c as calibrate_c
    from .transfer import Alignment as Alignment
    from .transfer import align as align
    from .transfer import transfer as transfer
    from .transfer import transfer_report as transfer_report

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (all of them are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _ERRORS and name != "errors":
        raise AttributeError(f"module 'lorafold' has no attribute {name!r}")
    home = _HOME.get(name, "errors")
    module = importlib.import_module(f".{home}", __name__)
    # A package of that name is its verb (`_verb.py`), whatever has been imported before.
    value = module if home.rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
