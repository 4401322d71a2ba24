"""What forms cost, in bytes: the components that may be coded, and what a bound makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...collection.batch import Block, Factors, squared_residuals
from ...collection.stack import Stack
from ..coding.flat_part import code_parts, part_nbytes
from ..coding.record import Coded, predicted_nbytes
from ..options import Options
from .plan import FlatBases, ModulePlan, Shared

_WORSE = 4.0  # times ‖ΔW‖²: a flat part that misses more is left out


@dataclass(frozen=True)
class Costs:
    """Plans priced under one set of options.

    Args:
        options: how to fold. budgets: (N_all,) allowed relative squared error of each adapter.
    """

    options: Options
    budgets: np.ndarray

    def used(self, S: np.ndarray) -> np.ndarray:
        """True for the own directions that a rank or an energy leaves in."""
        o = self.options
        if o.rank is not None:
            return np.arange(S.shape[1]) < np.full((len(S), 1), o.rank)
        if o.energy is not None:
            before = np.cumsum(S**2, 1) - S**2
            used: np.ndarray = before < o.energy * (S**2).sum(1, keepdims=True)
            return used
        return np.ones(S.shape, bool)

    @property
    def cuts(self) -> bool:
        """Whether a rank or an energy drops directions of an adapter's own."""
        o = self.options
        return o.form in ("svd", "auto") and (o.rank is not None or o.energy is not None)

    def cut(self, block: Block) -> Block:
        """The block without the directions that a rank or an energy drops."""
        if not self.cuts:
            return block
        keep = torch.as_tensor(self.used(block.S.cpu().numpy()), device=block.S.device)
        return Block(block.members, block.U, torch.where(keep, block.S, 0.0), block.V)

    def allowed(self, stack: Stack, S: np.ndarray) -> np.ndarray:
        """(N,) squared error that each row may have at this module alone."""
        allowed: np.ndarray = self.budgets[stack.members] * (S**2).sum(1)
        return allowed

    def record_sizes(
        self,
        energy: np.ndarray,
        widths: np.ndarray,
        budget: np.ndarray,
        rate: float | None = None,
    ) -> np.ndarray:
        """(n,) bytes of records with these components (n, k) of these widths (k,).

        Args:
            budget: (n,) squared error of each; not looked at where a size is asked for.
            rate: average bits, where these are not the options'.
        """
        o = self.options
        if o.tolerance is None:
            bits = (32.0 if o.bits is None else o.bits) if rate is None else rate
            size: np.ndarray = ((energy > 0) * widths).sum(1) * bits / 8
            return size
        return predicted_nbytes(energy, widths, budget)

    def components(
        self, S: np.ndarray, tails: np.ndarray, width: float, full: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """What may be coded of updates on shared sides: energies (n, k or 2k) and their widths.

        Args:
            S: (n, k) singular values. tails: (n,) squared norm that the sides miss.
            width: numbers a component on the sides. full: numbers of one on sides of its own.
        """
        norms = (S**2).sum(1, keepdims=True)
        share = np.divide(tails[:, None], norms, out=np.zeros_like(norms), where=norms > 0)
        share = share.clip(0, 1)
        core, rest = S**2 * (1 - share), S**2 * share
        widths = np.full(S.shape[1], width)
        if self.options.tolerance is None:
            return core, widths
        return (
            np.concatenate([core, rest], 1),
            np.concatenate([widths, np.full(S.shape[1], full)]),
        )

    # Plans on sides that are there

    def on_own_sides(self, stack: Stack, S: np.ndarray) -> ModulePlan:
        """The plan that is always there."""
        energy = S**2 * self.used(S)
        widths = np.full(S.shape[1], float(sum(stack.shape)))
        nbytes = float(self.record_sizes(energy, widths, self.allowed(stack, S)).sum())
        return ModulePlan("svd", energy, widths, nbytes)

    def on_shared_sides(
        self,
        form: str,
        stack: Stack,
        S: np.ndarray,
        tails: np.ndarray,
        U: Shared | None,
        V: Shared | None,
        certificate: dict[str, float] | None = None,
        rate: float | None = None,
    ) -> ModulePlan:
        """Cores, and where the sides miss an update residuals.

        Args:
            tails: (N,) squared norm that the sides miss of each update. rate: see `ModulePlan`.
        """
        width = np.zeros(len(stack))
        nbytes = 0.0
        for shared, d in zip((U, V), stack.shape, strict=True):
            if shared is None:
                width += d
                continue
            width += np.array(
                [shared.bases[g].rank if g >= 0 else d for g in shared.groups.tolist()]
            )
            nbytes += sum(len(b.record) for b in shared.bases.values())
        energy, widths = self.components(S, tails, float(width.mean()), float(sum(stack.shape)))
        if self.options.coded:
            energy = energy * _in_cores(energy, U, V)
        nbytes += float(self.record_sizes(energy, widths, self.allowed(stack, S), rate).sum())
        return ModulePlan(form, energy, widths, nbytes, U, V, certificate=certificate, rate=rate)

    def on_flat_sides(self, stack: Stack, S: np.ndarray, bases: FlatBases) -> ModulePlan:
        """Loadings, and where the flat sides miss an update residuals."""
        nbytes = len(bases.A.record) + len(bases.B.record)
        nbytes += len(stack) * part_nbytes(bases.A, bases.B, bases.wide)
        squares = (S**2).sum(1)
        widths = np.full(S.shape[1], float(sum(stack.shape)))
        if self.options.tolerance is None:
            nothing = np.zeros_like(S)
            return ModulePlan("flat", nothing, widths, nbytes, flat=bases, squares=squares)
        coded = []
        for f, rows in zip(stack.factors(), stack.blocks, strict=True):
            coded.append(flat_parts(f, bases, squares[rows], rows))
        parts = Coded.joined(coded)
        missed = np.minimum(parts.squared_error, squares)
        return ModulePlan(
            "flat",
            _spread(missed, S.shape[1]),
            widths,
            nbytes + self.of_residuals(stack, S, missed),
            flat=bases,
            squares=squares,
            parts=parts if stack.stays else None,  # of many adapters they would be large
        )

    def of_residuals(self, stack: Stack, S: np.ndarray, missed: np.ndarray) -> float:
        """Bytes of residuals where flat sides miss (N,) squared norms."""
        allowed = self.allowed(stack, S)
        missed = np.minimum(missed, (S**2).sum(1))  # at worst a part is left out
        over = missed > allowed
        if not over.any():
            return 0.0
        widths = np.full(S.shape[1], float(sum(stack.shape)))
        return float(
            predicted_nbytes(_spread(missed[over], S.shape[1]), widths, allowed[over]).sum()
        )


def flat_parts(f: Factors, bases: FlatBases, squares: np.ndarray, rows: np.ndarray) -> Coded:
    """Flat parts of a block, measured; what is tiny beside the mean comes out far worse than as
    nothing, and is nothing.

    Args:
        squares: (n,) squared norms. rows: (n,) which rows of the stack they are.
    """
    parts = code_parts(f, bases.A, bases.B, 0, bases.wide, rows)
    error = squared_residuals(f.B, f.A, parts.B, parts.A).cpu().numpy()
    held = error <= _WORSE * squares
    records = [record if good else b"" for record, good in zip(parts.records, held, strict=True)]
    size = part_nbytes(bases.A, bases.B, bases.wide)
    payload = np.array([float(size if record else 0) for record in records])
    return Coded(records, np.where(held, error, squares), payload)


def _spread(missed: np.ndarray, count: int) -> np.ndarray:
    """(n, count) components that carry (n,) squared norms evenly."""
    return np.repeat(missed[:, None] / count, count, 1)


def _in_cores(energy: np.ndarray, U: Shared | None, V: Shared | None) -> np.ndarray:
    """(N, k) True for the components that cores have: no more than either side has columns."""
    most = np.full(len(energy), energy.shape[1])
    for shared in (U, V):
        if shared is not None:
            for g, basis in shared.bases.items():
                most[shared.groups == g] = np.minimum(most[shared.groups == g], basis.rank)
    inside: np.ndarray = np.arange(energy.shape[1]) < most[:, None]
    return inside


def reaching(energies: np.ndarray, share: float) -> int:
    """How many directions, strongest first, it takes to hold a share of their energy."""
    before = np.cumsum(energies) - energies
    return int((before < share * energies.sum()).sum())
