"""A small trained head: from vectors to a mix of adapters."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Training:
    """How a fit went.

    Args:
        epochs: that were run. best: the one whose weights were kept.
        loss: cross-entropy on the held-out examples, in nats. accuracy: on the same.
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

    Example:
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
        self.register_buffer("shift", torch.zeros(self.width))
        self.register_buffer("spread", torch.ones(()))
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
        """Train a head on examples, and stop when held-out ones get no better.

        Args:
            examples: {name: texts or vectors (n, D)}; under None, examples of nothing here, which
                only a threshold is calibrated on.
            encoder, hidden, temperature, top_k: of the router.
            error: of the held-out examples that are routed, the share that may have a wrong name
                on top; None never abstains.
            heldout: the share of every name's examples that are not trained on, or examples.
            epochs: at most. patience: epochs without a better held-out loss. lr: of AdamW.
            seed: of weights, order and held-out examples.
            progress: called with epochs done, epochs at most, and the held-out loss.

        Raises:
            MismatchError: no examples, vectors of different lengths or not finite, options out of
                range, nothing held out where `error` needs it.
        """
        error = checked_error(error)
        epochs, patience = checked_count(epochs, "epochs"), checked_count(patience, "patience")
        lr, seed = checked_number(lr, "lr"), checked_seed(seed)
        train, held = _split(examples, heldout, encoder_of(encoder)[0], seed)
        if error is not None and not len(held):
            raise MismatchError(
                "a threshold is calibrated on held-out examples, and there are none: give two "
                "examples of a name, or more"
            )
        router = cls(
            train.names, train.vectors.shape[1], hidden, temperature, top_k, encoder=encoder,
            seed=seed,
        ).to(train.vectors.device)  # fmt: skip
        router.center_on(train.vectors)
        known = train.take(train.labels != NOWHERE), held.take(held.labels != NOWHERE)
        router.training_run = _trained(router, *known, epochs, patience, lr, seed, progress)
        if error is not None:
            router.calibrate_on(*router.judged(held), error)
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


def _split(
    examples: Any, heldout: Any, encoder: Encoder | None, seed: int
) -> tuple[Examples, Examples]:
    """Examples to train on, and those that are held out: a share of every label's."""
    found = Examples.of(examples, encoder)
    if isinstance(heldout, Mapping):
        return found, Examples.of(heldout, encoder, found.names, found.vectors.shape[1])
    share = isinstance(heldout, int | float) and not isinstance(heldout, bool)
    if not share or not 0 <= heldout < 1:
        raise MismatchError(f"heldout must be a share in [0, 1) or examples, found {heldout!r}")
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(found), generator=g).to(found.labels.device)
    labels = found.labels[order]
    order = order[labels.argsort(stable=True)]
    labels, sizes = found.labels[order], torch.unique(found.labels, return_counts=True)[1]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    sizes = sizes.repeat_interleave(sizes)
    # At least one of a name that has two, and never all.
    wanted = (sizes * heldout).ceil().clamp_max(sizes - 1)
    held = torch.arange(len(order), device=order.device) - starts < wanted
    held |= labels == NOWHERE
    return found.take(order[~held]), found.take(order[held])


def _trained(
    router: LearnedRouter,
    train: Examples,
    held: Examples,
    epochs: int,
    patience: int,
    lr: float,
    seed: int,
    progress: Progress | None,
) -> Training:
    """Train a router's head; the weights of the best epoch stay."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr)
    judged = held if len(held) else train
    best, best_at, kept = math.inf, 0, copy.deepcopy(router.state_dict())
    epoch = 0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train), generator=g).to(train.labels.device)
        for k in range(0, len(train), _BATCH):
            part = train.take(order[k : k + _BATCH])
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(router.logits(part.vectors), part.labels))
            optimizer.step()
        loss = _loss(router, judged)
        if loss < best:
            best, best_at, kept = loss, epoch, copy.deepcopy(router.state_dict())
        if progress is not None:
            progress(epoch, epochs, f"held-out loss {loss:.4f}")
        if epoch - best_at >= patience:
            break
    router.load_state_dict(kept)
    with torch.no_grad():
        right = router.logits(judged.vectors).argmax(1) == judged.labels
    return Training(epoch, best_at, _loss(router, judged), float(right.double().mean()))


@torch.no_grad()
def _loss(router: LearnedRouter, examples: Examples) -> float:
    return float(F.cross_entropy(router.logits(examples.vectors), examples.labels))
