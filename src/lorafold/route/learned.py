"""A small trained head: from vectors to a mix of adapters.

What a threshold is calibrated on the head has never seen, nor was it stopped on it. Of the other
examples a share says after how many epochs a head gets no better; then a new one is trained as long
on all of them, so that stopping costs no example.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FileError, MismatchError
from . import store
from .encoders import Encoder, check_width, encoder_of
from .examples import (
    NOWHERE,
    Examples,
    checked_count,
    checked_error,
    checked_names,
    checked_number,
    checked_seed,
    checked_temperature,
)
from .router import Calibration, Router

KIND = "learned"
_BATCH = 256  # examples of a step
_STOP = 0.2  # the share that training is stopped on, where held-out examples are given

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Training:
    """How a fit went.

    Args:
        epochs: that were run until it stopped. best: as many as the head was then trained for.
        loss: cross-entropy after these, in nats, on the examples that it was stopped on, which it
            had not seen by then. accuracy: on the same.
    """

    epochs: int
    best: int
    loss: float
    accuracy: float


class LearnedRouter(Router, nn.Module):
    """Blends adapters by a trained head: softmax(head(vector) / temperature).

    As it is made it is untrained, and a module like any other: an optimiser takes
    `router.parameters()`, and `router.weights(vectors)` is differentiable. `fit` trains it.

    Args:
        names: of the adapters: a Library, {name: …}, or a list.
        input_dim: D, numbers of a vector.
        hidden: width of the head's one hidden layer; None for a linear head.
        temperature: of the softmax. top_k: adapters of a mix at most; None for all of them.
        encoder: from texts to vectors: a function, or the name of one.
        seed: of the weights; torch's own random state stays as it is.

    Not for: few examples and many names, where `CentroidRouter` needs no training; nor a choice
    token by token (`ArrowRouter`).

    Attributes:
        training_run: how `fit` went; None where the head was trained elsewhere.

    Examples:
        >>> import torch, lorafold as lf
        >>> router = lf.LearnedRouter(["sql", "law"], input_dim=8, hidden=16)
        >>> vectors, labels = torch.randn(64, 8), torch.randint(2, (64,))
        >>> optimizer = torch.optim.AdamW(router.parameters())
        >>> for _ in range(3):
        ...     loss = torch.nn.functional.nll_loss(router.weights(vectors).log(), labels)
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> sorted(router(vectors[:1])[0])
        ['law', 'sql']
    """

    shift: Tensor
    spread: Tensor

    def __init__(
        self,
        names: Any,
        input_dim: int,
        hidden: int | None = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        encoder: Any = None,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        self.names = checked_names(names)
        self.width = checked_count(input_dim, "input_dim")
        self.hidden = None if hidden is None else checked_count(hidden, "hidden")
        self.temperature = checked_temperature(temperature)
        self.top_k = None if top_k is None else checked_count(top_k, "top_k")
        self.calibration: Calibration | None = None
        self.training_run: Training | None = None
        self.encode_with(encoder)
        self.register_buffer("shift", torch.zeros(self.width, dtype=torch.float32))
        self.register_buffer("spread", torch.ones((), dtype=torch.float32))
        seed = checked_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # that of the other devices stays
            self.head = _head(self.width, self.hidden, len(self.names))

    def __repr__(self) -> str:
        return f"LearnedRouter({len(self.names)} adapters, {self.num_parameters:,} parameters)"

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters())

    def logits(self, vectors: Tensor) -> Tensor:
        """What the softmax is taken of, (B, N), temperature included."""
        check_width(vectors, self.width)
        x = (vectors.to(self.shift) - self.shift) / self.spread
        found: Tensor = self.head(x) / self.temperature
        return found

    def weights(self, vectors: Tensor) -> Tensor:
        """The weights (B, N) of all names for vectors (B, D): each row sums to 1.

        Raises:
            MismatchError: no tensor, or of another D.
        """
        return self.logits(vectors).softmax(-1)

    def scores(self, vectors: Tensor) -> Tensor:
        return self.weights(vectors)

    forward = Router.__call__

    @torch.no_grad()
    def blend(self, batch: Any) -> dict[str, float]:
        """One mix for a whole batch: {name: its mean weight}, of all names.

        Inputs that the router abstains from are the base's share: with them it sums to less than 1.

        Args:
            batch: texts, or vectors (B, D).
        """
        weights = self._scored(batch)
        if not len(weights):
            raise MismatchError("blend needs a batch of at least one input")
        weights = torch.where(self.routed(weights)[:, None], weights, 0.0)
        return dict(zip(self.names, weights.mean(0).tolist(), strict=True))

    @classmethod
    @torch.inference_mode(False)  # and with gradients, whatever the caller's mode is
    def fit(
        cls,
        examples: Mapping[str | None, Any],
        encoder: Any = None,
        hidden: int | None = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        error: float | None = None,
        heldout: float | Mapping[str | None, Any] = 0.2,
        epochs: int = 300,
        patience: int = 20,
        lr: float = 3e-3,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> LearnedRouter:
        """Train a head on examples, for as long as others get better.

        A head is trained on some examples and stopped when the others get no better; then a new
        one is trained on all of them for as many epochs. What the threshold is calibrated on is
        in neither.

        Args:
            examples: {name: texts or vectors (n, D)}; under None, examples of nothing here, which
                only a threshold is calibrated on.
            encoder, hidden, temperature, top_k: of the router.
            error: of the held-out examples that are routed, the share that may have a wrong name
                on top; None never abstains.
            heldout: the share of every name's examples that the threshold is calibrated on, and
                of the rest that training is stopped on; or examples: to calibrate on, or to stop
                on where `error` is None.
            epochs: at most. patience: epochs without a better loss on what it is stopped on.
            lr: of AdamW. seed: of weights, order and what is held out.
            progress: called with epochs done, epochs at most, and what is done.

        Raises:
            MismatchError: no examples, vectors of different lengths or not finite, options out of
                range, nothing held out where `error` needs it.
        """
        error = checked_error(error)
        epochs, patience = checked_count(epochs, "epochs"), checked_count(patience, "patience")
        lr, seed = checked_number(lr, "lr"), checked_seed(seed)
        parts = _Parts.of(examples, heldout, encoder_of(encoder)[0], error is not None, seed)
        known = parts.known
        router = cls(
            known.names, known.vectors.shape[1], hidden, temperature, top_k, encoder=encoder,
            seed=seed,
        ).to(known.vectors.device)  # fmt: skip
        router.center_on(known.vectors)
        untrained = copy.deepcopy(router.state_dict())
        steps = _epochs(router, parts.train, lr, seed)
        run = _stopped(router, steps, parts.judged, epochs, patience, progress)
        router.load_state_dict(untrained)
        for epoch in islice(_epochs(router, known, lr, seed), run.best):
            if progress is not None:
                progress(epoch, run.best, "training on all")
        router.training_run = run
        if error is not None:
            router.calibrate_on(*router.judged(parts.held), error)
        return router

    @torch.no_grad()
    def center_on(self, vectors: Tensor) -> None:
        """Have the head see vectors less the mean of these, at their mean square of 1.

        Raises:
            MismatchError: they are larger than the head's dtype holds.
        """
        x = vectors.double()  # in which no square of a float32 overflows
        self.shift.copy_(x.mean(0))
        spread = (x - x.mean(0)).square().mean().sqrt().to(self.spread)
        if not bool(vectors.to(self.shift).isfinite().all() & spread.isfinite()):
            raise MismatchError(f"vectors are larger than {self.shift.dtype} holds: scale them")
        self.spread.copy_(torch.where(spread > 0, spread, 1.0))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the router as a directory; an encoder that is a function is not part of it.

        Raises:
            FileError: something is at `path`, and `overwrite` is False or it is no router.
        """
        record = {
            **self.common_record(KIND),
            "input_dim": self.width,
            "hidden": self.hidden,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "training": None if self.training_run is None else asdict(self.training_run),
        }
        store.write(path, record, self.state_dict(), overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], encoder: Any = None) -> LearnedRouter:
        """A router that `save` wrote.

        Args:
            encoder: a function, or the name of one; the one that was saved by name when None.

        Raises:
            FileError: no router of this kind, or a damaged one.
        """
        f, tensors = store.read(path, KIND)
        none = type(None)
        try:
            with torch.device("meta"):  # nothing of a size that the file merely claims
                router = cls(
                    f.names(),
                    f.get("input_dim", int),
                    f.get("hidden", int, none),
                    f.number("temperature"),
                    f.get("top_k", int, none),
                )
            router.load_state_dict(tensors, assign=True)  # in the dtypes that were saved
        except (MismatchError, RuntimeError, TypeError, ValueError, OverflowError) as e:
            raise FileError(f"{f.where}: {' '.join(str(e).split())}") from e
        router.encode_with(f.get("encoder", str, none) if encoder is None else encoder)
        router.calibration = Calibration.read(f)
        run = f.inner("training")
        if run is not None:
            counts = run.get("epochs", int), run.get("best", int)
            router.training_run = Training(*counts, run.number("loss"), run.number("accuracy"))
        return router


def _head(width: int, hidden: int | None, out: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


@dataclass(frozen=True)
class _Parts:
    """Examples by what they are for.

    Args:
        train: to train on until judged, which are of others, get no better.
        known: to train on then. held: to calibrate on.
    """

    train: Examples
    judged: Examples
    known: Examples
    held: Examples

    @classmethod
    def of(
        cls, examples: Any, heldout: Any, encoder: Encoder | None, calibrated: bool, seed: int
    ) -> _Parts:
        """Those of `fit`."""
        found = Examples.of(examples, encoder)
        share, given = heldout, isinstance(heldout, Mapping)
        if given:
            share = _STOP
            held = Examples.of(heldout, encoder, found.names, found.vectors.shape[1])
        elif isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise MismatchError(f"heldout must be a share in [0, 1) or examples, found {share!r}")
        else:
            found, held = _split(found, share if calibrated else 0.0, seed)
        if calibrated and not len(held):
            raise MismatchError(
                "a threshold is calibrated on held-out examples, and there are none: give two "
                "examples of a name, or more"
            )
        known = found.take(found.labels != NOWHERE)
        if given and not calibrated:
            train, judged = known, held.take(held.labels != NOWHERE)
        else:
            train, judged = _split(known, share, seed)
        return cls(train, judged if len(judged) else train, known, held)


def _split(found: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """All but a share of every label's examples, and these; those of nothing are among these."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found), generator=g).to(found.labels.device)
    labels = found.labels[order]
    order = order[labels.argsort(stable=True)]
    labels, sizes = found.labels[order], torch.unique(found.labels, return_counts=True)[1]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    sizes = sizes.repeat_interleave(sizes)
    # At least one of a name that has two, and never all.
    wanted = (sizes * share).ceil().clamp_max(sizes - 1)
    held = torch.arange(len(order), device=order.device) - starts < wanted
    held |= labels == NOWHERE
    return found.take(order[~held]), found.take(order[held])


def _epochs(router: LearnedRouter, train: Examples, lr: float, seed: int) -> Iterator[int]:
    """Train a router's head, an epoch each time that one is asked for; how many there were."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr)
    for epoch in count(1):
        order = torch.randperm(len(train), generator=g).to(train.labels.device)
        for k in range(0, len(train), _BATCH):
            part = train.take(order[k : k + _BATCH])
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(router.logits(part.vectors), part.labels))
            optimizer.step()
        yield epoch


def _stopped(
    router: LearnedRouter,
    steps: Iterator[int],
    judged: Examples,
    epochs: int,
    patience: int,
    progress: Progress | None,
) -> Training:
    """Train until other examples get no better: when that was."""
    run = Training(0, 0, *_judged(router, judged))
    for epoch in islice(steps, epochs):
        loss, accuracy = _judged(router, judged)
        better = loss < run.loss
        run = Training(epoch, epoch, loss, accuracy) if better else replace(run, epochs=epoch)
        if progress is not None:
            progress(epoch, epochs, f"held-out loss {loss:.4f}")
        if epoch - run.best >= patience:
            break
    return run


@torch.no_grad()
def _judged(router: LearnedRouter, examples: Examples) -> tuple[float, float]:
    """Loss and accuracy."""
    logits = router.logits(examples.vectors)
    right = logits.argmax(1) == examples.labels
    return float(F.cross_entropy(logits, examples.labels)), float(right.double().mean())
