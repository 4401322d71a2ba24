"""The run through the texts: batch by batch, from what both bases see to sums, and on from a state.

What the sums take is known before the first batch and refused above the limit. A state is an
unfinished `Alignment` on the disk, with the number of batches in it: sums add up, so going on from
it is the same run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError, MismatchError
from ..alignment import Alignment, Join, finished, read, write
from .bases import Base, Part
from .batches import Batch, Input
from .covariances import Moments, moments_of
from .recording import Site, recording, run, tracing

Progress = Callable[[int, int, str], object]

SECONDS = 60.0  # between two states written


@dataclass(frozen=True, eq=False)
class Sum:
    """One of the sums: of what passes at two sites.

    Args:
        name: of it. sites: of the source and the target. parts: whose rows of an output they are;
            None for all of them.
    """

    name: str
    sites: tuple[Site, Site]
    parts: tuple[Part, Part] | None = None


def sums_of(
    joins: Mapping[Any, Join], sharing: tuple[Mapping[str, str], Mapping[str, str]]
) -> tuple[list[Sum], dict[Any, Join]]:
    """The sums that joins need, each once, and the joins with the names of theirs.

    Args:
        sharing: of either base, {module path: the first that reads the same input}.
    """
    found: dict[str, Sum] = {}
    named = {}
    for key, join in joins.items():
        s, t = join.source, join.target
        read_s, read_t = sharing[0][s.path], sharing[1][t.path]
        inner = f"{read_t}<{read_s}:in"
        outer = (
            f"{t.path}{'.' if t.word else ''}{t.word}<{s.path}{'.' if s.word else ''}{s.word}:out"
        )
        found.setdefault(inner, Sum(inner, ((read_s, "in"), (read_t, "in"))))
        found.setdefault(outer, Sum(outer, ((s.path, "out"), (t.path, "out")), (s, t)))
        named[key] = replace(join, input=inner, output=outer)
    return list(found.values()), named


@dataclass(frozen=True, eq=False)
class Runner:
    """Both bases and what is summed of them.

    Args:
        bases: source, target. sums: which. gradients: whether outputs stand for the gradients of
            the loss of the next tokens. stop: whether a forward ends where all of them were seen.
    """

    bases: tuple[Base, Base]
    sums: Sequence[Sum]
    gradients: bool = False
    stop: bool = False

    def of(self, batch: Batch) -> dict[str, Moments]:
        """The sums of one batch.

        Raises:
            MismatchError: an activation that is NaN or infinite.
        """
        seen = [
            self._seen(side, base, given)
            for side, (base, given) in enumerate(
                zip(self.bases, (batch.source, batch.target), strict=True)
            )
        ]
        found = {}
        for one in self.sums:
            rows = [seen[side][one.sites[side]] for side in (0, 1)]
            if one.parts is not None:
                rows = [_own(x, part) for x, part in zip(rows, one.parts, strict=True)]
            found[one.name] = moments_of(*rows)
            if not found[one.name].is_finite:
                _name_bad(one, rows, self.bases)
        return found

    def _seen(self, side: int, base: Base, given: Input) -> dict[Site, Tensor]:
        sites = dict.fromkeys(one.sites[side] for one in self.sums)
        ids, mask, rows = (x.to(base.device) for x in (given.ids, given.mask, given.rows))
        if not self.gradients:
            with torch.no_grad(), recording(base.model, sites, rows, self.stop) as found:
                run(base.model, ids, mask, sites)
            return found
        with torch.enable_grad(), recording(base.model, sites, None) as found, tracing(base.model):
            scores = run(base.model, ids, mask).logits
            outs = [site for site in sites if site[1] == "out"]
            loss = _next_loss(scores, ids, mask)
            slopes = torch.autograd.grad(loss, [found[site] for site in outs])
        found |= dict(zip(outs, slopes, strict=True))
        return {site: x.detach().reshape(-1, x.shape[-1])[rows] for site, x in found.items()}


def _next_loss(scores: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The summed cross-entropy of every token that is followed by one."""
    counted = (mask[:, 1:] * mask[:, :-1]).flatten().bool()
    given = scores[:, :-1].flatten(0, 1)[counted].float()
    return torch.nn.functional.cross_entropy(given, ids[:, 1:].flatten()[counted], reduction="sum")


def check_memory(runner: Runner, batches: Sequence[Batch], limit: int) -> None:
    """Refuse sums that will take more than `limit` bytes, before the run.

    Raises:
        MismatchError: they do.
    """
    one = [min(batches, key=lambda batch: batch.count)]
    numbers = sum(
        getattr(m, f).numel() for m in runner.of(one[0]).values() for f in ("ss", "st", "tt")
    )
    needed = 8 * numbers * (1 + any(batch.held for batch in batches))
    if needed > limit:
        raise MismatchError(
            f"the sums would take {needed / 2**30:.2f} GiB, more than memory= allows "
            f"({limit / 2**30:.2f} GiB): take fewer kinds with modules=, or allow more"
        )


def _own(x: Tensor, part: Part) -> Tensor:
    rows = part.rows(x.shape[-1])
    return x if rows is None else x[:, rows.to(x.device)]


def _name_bad(one: Sum, rows: Sequence[Tensor], bases: tuple[Base, Base]) -> None:
    for base, x, (path, end) in zip(bases, rows, one.sites, strict=True):
        if not bool(x.isfinite().all()):
            what = "input" if end == "in" else "output"
            raise MismatchError(
                f"the {what} of {path!r} in the {base.side} is NaN or infinite on these texts: run "
                "that base in a type of larger range (bfloat16 or float32)"
            )
    raise MismatchError(f"the sums of {one.name!r} overflow; scale of the activations?")


def summed(
    start: Alignment,
    runner: Runner,
    batches: Sequence[Batch],
    resume: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Alignment:
    """The alignment with the sums of all batches.

    Args:
        start: it without any; its `settings["run"]` tells whether a state is of this run.
        resume: where the state lies, if anywhere.
    """
    state, done = start, 0
    if resume is not None and os.path.exists(resume):
        state, done = _resumed(start, Path(resume))
    sums = {"fitted": dict(state.fitted), "held": dict(state.held)}
    tokens, last = state.tokens, time.monotonic()
    for k, batch in enumerate(batches[done:], done):
        if progress is not None:
            progress(k, len(batches), "aligning")
        into = sums["held" if batch.held else "fitted"]
        for name, m in runner.of(batch).items():
            into[name] = into[name] + m if name in into else m
        tokens += batch.count
        state = replace(start, fitted=sums["fitted"], held=sums["held"], tokens=tokens)
        if resume is not None and k + 1 < len(batches) and time.monotonic() - last > SECONDS:
            unfinished = replace(state, settings={**state.settings, "batches": k + 1})
            write(unfinished, resume, torch.float64, overwrite=True)
            last = time.monotonic()
    if progress is not None:
        progress(len(batches), len(batches), "aligning")
    if resume is not None:
        write(state, resume, torch.float64, overwrite=True)
    return finished(state)


def _resumed(start: Alignment, path: Path) -> tuple[Alignment, int]:
    state = read(path)
    same = (state.digests, state.settings.get("run")) == (start.digests, start.settings["run"])
    if not same:
        raise FileError(
            f"{path} is the state of another run (other bases, texts or options); give another "
            "file in resume="
        )
    done = state.settings.get("batches")
    return state, 10**9 if done is None else int(done)
