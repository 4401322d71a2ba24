"""What the programs that run adapters do with a file: `check_for(path, reader)`.

A file that loads is not yet one that does what it was trained to do: a scale is read another way, a
part is left out, names match nothing. For each program there is a file here, a function from what a
file holds to findings, by that program's published rules and by what was measured with it.
"""

from .check_for import READERS, check_for
from .finding import Finding, Verdict

__all__ = ["READERS", "Finding", "Verdict", "check_for"]
