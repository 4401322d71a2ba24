"""What routers of whole inputs share: scores to mixes, when to abstain, and why.

A router gives every input a score for each name. It abstains (None, which `live.use` takes for the
base) where the best score is below a threshold, which is calibrated: of the held-out examples that
are routed, no more than a given share may go to a wrong name, and as many as possible are routed.
One more wrong one is counted than there is, as the threshold is the best of many on these examples
and other inputs are not so kind; where none is wrong they say nothing against routing.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import FileError
from ..words import one_line, warn
from .encoders import Encoder, encoder_of, vectors_of
from .examples import Examples, checked_count, checked_error
from .store import Fields

Mix: TypeAlias = "dict[str, float] | None"


@dataclass(frozen=True)
class Calibration:
    """How a threshold was found.

    Args:
        error: the share of wrong among the routed that was asked for.
        threshold: scores below it abstain; infinite where no score was good enough.
        heldout: how many examples it was found on.
        routed: the share of these that is routed. wrong: the share of the routed that is wrong.
    """

    error: float
    threshold: float
    heldout: int
    routed: float
    wrong: float

    @classmethod
    def of(cls, score: Tensor, right: Tensor, error: float) -> Calibration:
        """The lowest threshold at which none of the routed is wrong, or no more than `error`.

        Of the wrong, one more is counted than there is.

        Args:
            score: (n,) of the best name of each held-out example. right: (n,) whether it is its.
        """
        order = score.argsort(descending=True)
        score, right = score[order].double(), right[order]
        count = torch.arange(1, len(score) + 1, device=score.device)
        wrong = (~right).cumsum(0).double()
        ends = score.isfinite()
        ends[:-1] &= score[1:] < score[:-1]  # equal scores go together
        fine = (ends & ((wrong == 0) | ((wrong + 1) / (count + 1) <= error))).nonzero()
        if not len(fine):
            return cls(error, math.inf, len(score), 0.0, 0.0)
        last = int(fine[-1])
        routed = last + 1
        wrong_share = float(wrong[last]) / routed
        return cls(error, float(score[last]), len(score), routed / len(score), wrong_share)

    def record(self) -> dict[str, Any]:
        """The same as JSON has it, where no number is infinite."""
        finite = self.threshold if self.routed else None
        return {**dataclasses.asdict(self), "threshold": finite}

    @classmethod
    def read(cls, f: Fields) -> Calibration | None:
        """The calibration in a router's record.

        Raises:
            FileError: it is none.
        """
        own = f.inner("calibration")
        if own is None:
            return None
        threshold, routed = own.get("threshold", float, int, type(None)), own.number("routed")
        if (threshold is None) != (routed == 0):
            raise FileError(f"{f.where}: 'threshold' is missing where some are routed, or is there")
        return cls(
            own.number("error"),
            math.inf if threshold is None else own.number("threshold"),
            own.get("heldout", int),
            routed,
            own.number("wrong"),
        )


@dataclass(frozen=True)
class Explanation:
    """Why an input is routed as it is.

    Args:
        mix: {name: weight}, or None where the router abstains.
        score: of the best name. threshold: that it had to reach.
        nearest: the best names with their scores, best first.
    """

    mix: Mix
    score: float
    threshold: float
    nearest: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        near = ", ".join(f"{one_line(name)} {score:.3f}" for name, score in self.nearest)
        if self.mix is None:
            return f"none: {self.score:.3f} is below {self.threshold:.3f} (nearest: {near})"
        return f"{', '.join(map(one_line, self.mix))} (nearest: {near})"


class Router(ABC):
    """A router of whole inputs; see the two final classes.

    Attributes:
        names: that it chooses among. width: D, numbers of a vector.
        top_k: names of a mix at most; None for all.
        encoder_name: of the encoder, where it has one. calibration: of the threshold, or None.
    """

    names: tuple[str, ...]
    width: int
    top_k: int | None
    encoder_name: str | None
    calibration: Calibration | None

    @abstractmethod
    def scores(self, vectors: Tensor) -> Tensor:
        """The score (B, N) of every name for vectors (B, D)."""

    @property
    def threshold(self) -> float:
        """Scores below it abstain; -inf where the router never does."""
        return -math.inf if self.calibration is None else self.calibration.threshold

    @property
    def encoder(self) -> Encoder | None:
        """From texts to vectors; None where there is none."""
        return self._encoder[0]

    def encode_with(self, encoder: Any) -> None:
        """Turn texts into vectors with this from now on: a function, or the name of one."""
        found, self.encoder_name = encoder_of(encoder)
        self._encoder = (found,)  # in a tuple, or a module would become a part of this one

    def calibrate(self, examples: Any, error: float | None = 0.05) -> Calibration | None:
        """Find the threshold on examples that the router has not seen.

        Args:
            examples: {name: texts or vectors}; under None, examples of nothing here.
            error: of those that are routed, the share that may have a wrong name on top; None
                never abstains.

        Returns:
            What was found; the router's own from now on.
        """
        error = checked_error(error)
        own = Examples.of(examples, self.encoder, self.names, self.width)
        return self.calibrate_on(*self.judged(own), error)

    def calibrate_on(self, score: Tensor, right: Tensor, error: float | None) -> Calibration | None:
        """The same, from the examples' best scores (n,) and whether they are right (n,)."""
        self.calibration = None if error is None else Calibration.of(score, right, error)
        if self.calibration is not None and not self.calibration.routed:
            warn(
                f"at no threshold are at most {error:g} of {len(right)} held-out examples routed "
                "wrongly, so the router abstains from everything: give more examples, another "
                "encoder, or allow a larger error"
            )
        return self.calibration

    @torch.no_grad()
    def judged(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """The best score (n,) of each example, and whether its name is the right one (n,)."""
        best, chosen = self.scores(examples.vectors).max(1)
        return best, chosen == examples.labels.to(chosen.device)

    def __call__(self, batch: Any) -> list[Mix]:
        """Which adapters each input of a batch wants: what `live.use` takes.

        Args:
            batch: texts, or vectors (B, D).

        Returns:
            {name: weight} for each, or None where the router abstains.

        Raises:
            MismatchError: texts without an encoder, vectors of another length or not finite.
        """
        scores = self._scored(batch)
        return self._mixes(scores) if len(scores) else []

    def explain(self, batch: Any, most: int = 3) -> list[Explanation]:
        """The same with the scores that it comes from.

        Args:
            batch: texts, or vectors (B, D). most: names to tell of each.
        """
        most, scores = checked_count(most, "most"), self._scored(batch)
        if not len(scores):
            return []
        best, index = scores.topk(min(most, len(self.names)), dim=1)
        near = [
            tuple((self.names[i], s) for i, s in zip(own, values, strict=True))
            for own, values in zip(index.tolist(), best.tolist(), strict=True)
        ]
        top = scores.amax(1).tolist()
        return [
            Explanation(mix, score, self.threshold, nearest)
            for mix, score, nearest in zip(self._mixes(scores), top, near, strict=True)
        ]

    def common_record(self, kind: str) -> dict[str, Any]:
        """What is saved of a router of any kind."""
        return {
            "kind": kind,
            "names": list(self.names),
            "encoder": self.encoder_name,
            "calibration": None if self.calibration is None else self.calibration.record(),
        }

    @torch.no_grad()
    def _scored(self, batch: Any) -> Tensor:
        return self.scores(vectors_of(batch, self.encoder, self.width))

    def _mixes(self, scores: Tensor) -> list[Mix]:
        k = len(self.names) if self.top_k is None else min(self.top_k, len(self.names))
        best, index = scores.topk(k, dim=1)
        weights = torch.ones_like(best) if k == 1 else best / best.sum(1, keepdim=True)
        routed = self.routed(scores).tolist()
        return [
            {self.names[i]: w for i, w in zip(own, values, strict=True)} if on else None
            for on, own, values in zip(routed, index.tolist(), weights.tolist(), strict=True)
        ]

    def routed(self, scores: Tensor) -> Tensor:
        """Of which scores (B, N) something is routed, (B,) bool."""
        top = scores.amax(1).double()
        return top.isfinite() & (top >= self.threshold)
