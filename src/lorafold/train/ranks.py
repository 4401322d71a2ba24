"""A random rank prefix a step: DyLoRA's way to an adapter that runs at any rank.

Source: Valipour et al., DyLoRA: parameter-efficient tuning of pretrained models using dynamic
search-free low-rank adaptation (2022), arXiv:2210.07558.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from numbers import Integral

from ..attach import Live
from ..errors import MismatchError
from .many import the_trained


class RandomRank:
    """Draws the rank prefix that a training step runs.

    The draw is a function of seed and step alone, so that a run that was resumed goes on with the
    ranks that it would have had, and processes of one run agree.

    Not for: adapters with `nested=` ranks, which train all of them in one step.

    Args:
        live: the handle. ranks: to draw from; 1 … r when None. name: of the adapter; the only
            trained one when None. seed: of the draws.

    Raises:
        MismatchError: ranks that are none, or above the adapter's.

    Examples:
        >>> import torch, lorafold as lf
        >>> live = lf.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), lf.LoRA(rank=4))
        >>> ranks = lf.train.RandomRank(live, seed=1)
        >>> with live.use("default", rank=ranks.at(0)):
        ...     loss = live.model(torch.ones(1, 8)).sum()
    """

    def __init__(
        self,
        live: Live,
        ranks: Sequence[int] | None = None,
        *,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        self.live, self.seed = live, seed
        self.name = the_trained(live) if name is None else name
        most = live.adapter(self.name).rank
        self.ranks = tuple(range(1, most + 1)) if ranks is None else tuple(ranks)
        for k in self.ranks:
            if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= most:
                raise MismatchError(f"ranks must lie in 1 … {most}, the adapter's; found {k!r}")
        if not self.ranks:
            raise MismatchError("there is no rank to draw from")

    def at(self, step: int) -> int:
        """The rank of a step."""
        return random.Random(f"{self.seed}:{step}").choice(self.ranks)
