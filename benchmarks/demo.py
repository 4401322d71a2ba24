"""How small do trained adapters get, and how much of what they are good for is left?

`lorafold demo` as a benchmark: the packaged adapters folded at several tolerances and by retention,
the base model run with what comes back, truncated SVD of each adapter at the same error and at the
same bytes. The claims, at the default tolerance: at least 3.5 times fewer bytes than float16 files,
7 times fewer than float32, a mean retention of 0.99 and a worst of 0.97.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _common import arguments, report

from lorafold.demo.run import run_demo

QUESTION = "Trained adapters: bytes, error, and the share of each task's lift that is kept"
AT_LEAST = {"times_float16": 3.5, "times_float32": 7, "retention_mean": 0.99, "retention_min": 0.97}
FOLDER = "lorafold-demo"


@contextlib.contextmanager
def temporary_cwd() -> Iterator[None]:
    """Work in a temporary folder, so that the report has no path of this machine."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def main() -> None:
    args = arguments(QUESTION)
    start = time.perf_counter()
    with temporary_cwd():
        found = run_demo(Path(FOLDER))
    found["seconds"] = time.perf_counter() - start
    default = next(row for row in found["rows"] if row["library"] == "lib")
    found["met"] = {f"{key} ≥ {least}": default[key] >= least for key, least in AT_LEAST.items()}
    columns = ("by", "form", "bytes", *AT_LEAST, "error_max")
    report(
        QUESTION, [{key: row[key] for key in columns} for row in found["rows"]], found, args.save
    )


if __name__ == "__main__":
    main()
