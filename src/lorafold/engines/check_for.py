"""The verb: a file and the name of a program, the verdict out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from ..errors import FileError, MismatchError
from ..words import did_you_mean
from . import diffusers, kohya, llama_cpp, mlx, peft, vllm
from .finding import Finding, Verdict, ordered
from .look import Look, look

_RULES: dict[str, Callable[[Look], Iterator[Finding]]] = {
    "vllm": vllm.findings,
    "llama.cpp": llama_cpp.findings,
    "mlx": mlx.findings,
    "peft": peft.findings,
    "diffusers": diffusers.findings,
    "kohya": kohya.findings,
}
READERS = tuple(_RULES)


def check_for(
    path: str | os.PathLike[str],
    reader: str,
    *,
    base: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    revision: str | None = None,
) -> Verdict:
    """What a program would do with an adapter's files, by its rules and by what was measured.

    Not for: whether it fits a base (`lorafold check --base`), nor what a running server has made
    of it.

    Args:
        path: a folder or a file, or an id on the Hub.
        reader: "vllm", "llama.cpp", "mlx", "peft", "diffusers" or "kohya".
        base: the base's folder, for what depends on it: one weight for embedding and output layer,
            the number of layers, the architecture.
        alpha: α, for a file that does not say its own.
        revision: a branch, tag or commit, for a Hub id.

    Raises:
        FileError: nothing there, no adapter's file, a library's, or a pickle; or what can't be
            read here, and is refused by no rule of the program's.
        MismatchError: no such program.

    Examples:
        >>> import tempfile, torch
        >>> import lorafold as lf
        >>> from lorafold.engines import check_for
        >>> u = lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> folder = tempfile.mkdtemp() + "/adapter"
        >>> lf.save(lf.Adapter({"layers.0.q_proj": u}, base_model="base"), folder)
        >>> check_for(folder, "vllm").outcome, check_for(folder, "mlx").outcome
        ('loads', 'refuses')
    """
    if reader not in _RULES:
        raise MismatchError(f"no rules of {reader!r} are known; {did_you_mean(reader, _RULES)}")
    file = look(path, base, alpha, revision)
    verdict = ordered(reader, _RULES[reader](file))
    if verdict.same and file.error is not None and file.form != "gguf":
        raise FileError(file.error)  # of what can't be read here it is not known
    return verdict
