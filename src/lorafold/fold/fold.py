"""The verb itself: sources and options in, a library out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..collection.sources import Broken, named_handles
from ..errors import LorafoldError
from ..files.replacing import check_apart
from ..words import warn
from .library import Library
from .one_pass import check_work, folded, readable
from .options import Folding, Options, with_options
from .retention import fold_by_retention
from .store.store import Store
from .store.turns import TIMEOUT

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's, from Python 3.11 on


@with_options
def fold(
    sources: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    keep_going: bool | Broken = False,
    timeout: float = TIMEOUT,
    alpha: float | None = None,
    base_model: str | None = None,
    **options: Unpack[Folding],
) -> Library:
    """Fold adapters into one library.

    Args:
        sources: paths, globs, folders of adapters, "LIB:name", libraries, `Adapter`s, {name: any of
            these}, or a list of them. A path's name is its last component; an unnamed `Adapter`
            becomes task_0, ….
        path: the folder to write, of this machine or a URL; None keeps the library in memory.
        tolerance: bound on ‖ΔŴ − ΔW‖ / ‖ΔW‖ of every adapter, measured on what is written; 0
            stores every tensor bit for bit. 0.1 when none of tolerance, rank, energy, bits and
            retention is given.
        form: "auto", "svd", "input", "output", "shared", "flat" or "exact".
        rank: instead of a tolerance: directions kept per module (of each adapter for "svd", of a
            shared side, of a flattened side); more than there are keeps all of them.
        energy: instead of a tolerance: share of ‖ΔW‖² kept per module and side, in (0, 1].
        bits: with a rank, an energy or alone: 32, 16, or an average in (0, 8] of packed bits per
            number stored, shared bases included. Floats of 32 bits when only rank or energy is
            given.
        retention: share of each adapter's lift to keep, by `score`; finds each one's loosest
            tolerance by bisection.
        score: fn(name, adapter, or None for the base) → higher is better; run at most 8 times an
            adapter.
        memory: limit for what is held of the collection at once, by each worker.
        device: where the algebra runs.
        executor: who does the work: a `concurrent.futures.Executor` such as Dask's
            `client.get_executor()`, "ray" for a Ray on this machine, or "ray://host:port". The
            library is the same, byte for byte, whoever does it. Adapters in memory travel to it.
        workers: instead of an executor, so many processes on this machine, of which this is
            one if they are several.
        work: a directory for finished pieces of work, on storage that all workers have at the same
            path: a run that was ended goes on from there when it is started again. Delete it when
            the library is there. Without it a temporary one of this machine is used.
        keep_going: leave out adapters that can't be read, after a pass over all files that finds
            them; each is warned of, or given to a function of its name and the error.
        overwrite: replace the library at `path`; other files in its folder stay.
        timeout: seconds to wait for others who change a library that is to be replaced.
        alpha: α of sources that do not say theirs, such as a vLoRA folder.
        base_model: what the base is called, where the sources spell it differently.
        progress: called with (done, total, stage).

    Returns:
        The `Library`, opened.

    Raises:
        MismatchError: options that exclude each other or are out of range; adapters that disagree.
        FileError: a source that can't be read; something at `path` already that is no library,
            or may not be replaced; or `path` is, holds or lies in a source.
        ToleranceError: a bound that can't be met.

    Examples:
        >>> import torch, lorafold as lf
        >>> u = lf.LowRank(torch.randn(4, 64), torch.randn(32, 4))
        >>> lib = lf.fold([lf.Adapter({"q_proj": u})], tolerance=0.1)
        >>> lib.names
        ['task_0']
    """
    settings = Options.of(**options)
    broken = _told if keep_going is True else (keep_going or None)
    handles = named_handles(sources, alpha=alpha, base_model=base_model, broken=broken)
    if broken is not None:
        handles = readable(handles, settings, broken)
    if path is not None:
        check_apart(path, (handle.path for handle in handles.values()))
        check_work(path, settings.crew.work)
    if settings.retention is not None:
        return Library(fold_by_retention(handles, settings, path, overwrite, timeout))
    with Store.create(path, overwrite=overwrite, timeout=timeout) as t:
        store = t.commit(folded(handles, settings, t))
    return Library(store)


def _told(name: str, why: LorafoldError) -> None:
    warn(f"{name} is left out: {why}")
