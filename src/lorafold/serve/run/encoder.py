"""The encoder engine: prompts become vectors, each under adapters of its own.

Waiting requests are run together, filled up behind their ends; what is filled up counts nowhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import FileError, RefusedError
from ..adapters import Attachments
from ..engine import Limits, Piece, Request
from .families import ENCODERS
from .loop import Looping
from .sampling import UnscoredError

POOLINGS = ("mean", "cls", "max")
_TOKENS = 8192  # of a step, padding included


class EncoderEngine(Looping):
    """Prompts to vectors.

    Args:
        model: an encoder of transformers. attachments: on it. limits: what there is room for.
        pooling: ("mean", "cls" or "max", whether vectors are brought to length 1).

    Raises:
        RefusedError: an architecture that isn't known.
    """

    name = "encoder"

    def __init__(
        self,
        model: Any,
        attachments: Attachments,
        limits: Limits,
        pooling: tuple[str, bool] = ("mean", False),
    ) -> None:
        if model.config.model_type not in ENCODERS:
            raise RefusedError(
                f"encoders of the type {model.config.model_type!r} are not served; those that are: "
                f"{', '.join(ENCODERS)}"
            )
        super().__init__(limits)
        self.model, self.attachments = model, attachments
        self._pooling, self._unit = pooling
        self._device = model.get_input_embeddings().weight.device
        self._running: list[Request] = []

    def begin(self) -> None:
        self._running = []
        self.attachments.live.use(None)

    def running(self) -> list[Request]:
        return list(self._running)

    def leave(self, request: Request) -> None:
        self._running = [r for r in self._running if r is not request]

    def check(self, request: Request) -> None:
        super().check(request)
        self.attachments.check(request)

    def trial(self) -> None:
        """Run two prompts of three tokens with what is in use."""
        self._hidden([[0] * 3, [0] * 2])

    def step(self) -> None:
        group = self._next()
        if not group:
            return
        mixes = [dict(r.mix) or None for r in group]
        if any(mixes):
            cs, ranks = [r.c for r in group], [r.rank for r in group]
            self.attachments.live.use(mixes, c=cs, rank=ranks)
        else:
            self.attachments.live.use(None)
        vectors = self._pooled(*self._hidden([list(r.prompt) for r in group]))
        self.tokens += sum(len(r.prompt) for r in group)
        self._running = []
        finite = vectors.isfinite().all(1).tolist()
        for request, vector, fine in zip(group, vectors.tolist(), finite, strict=True):
            end = Piece(reason="stop", vector=vector)
            request.told(end if fine else Piece(reason="error", error=UnscoredError()))

    def _next(self) -> list[Request]:
        group, names, longest = self._running, set[str](), 0
        while len(group) < self.limits.rows and (request := self.next_waiting()) is not None:
            names |= set(request.mix)
            longest = max(longest, len(request.prompt))
            crowded = group and longest * (len(group) + 1) > _TOKENS
            if crowded or len(names) > self.limits.adapters:
                break
            if self.take(request):
                group.append(request)
        return list(group)

    def _hidden(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """What the model makes of prompts, (n, longest, size), and which are theirs."""
        pad = self.model.config.pad_token_id or 0
        longest = max(map(len, prompts))
        ids = [[*p, *[pad] * (longest - len(p))] for p in prompts]
        seen = [[1] * len(p) + [0] * (longest - len(p)) for p in prompts]
        mask = torch.tensor(seen, device=self._device)
        found = self.model(torch.tensor(ids, device=self._device), attention_mask=mask)
        return found.last_hidden_state.float(), mask

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        seen = mask[..., None]
        if self._pooling == "cls":
            found = hidden[:, 0]
        elif self._pooling == "max":
            found = hidden.masked_fill(seen == 0, -torch.inf).amax(1)
        else:
            found = (hidden * seen).sum(1) / seen.sum(1)
        return F.normalize(found, dim=1) if self._unit else found


def pooling_of(folder: Path) -> tuple[str, bool]:
    """How sentence-transformers' files beside a base make vectors; the mean where there are none.

    Raises:
        FileError: they say what isn't known here.
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "mean", False
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules]
    odd = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if odd:
        raise FileError(f"{folder}/modules.json has {sorted(odd)}, which are not run here")
    own = next((m for m in modules if str(m.get("type", "")).endswith("Pooling")), None)
    if own is None:
        return "mean", "Normalize" in kinds
    told = json.loads((folder / own["path"] / "config.json").read_text(encoding="utf-8"))
    ways = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    ways["pooling_mode_mean_tokens"] = "mean"
    on = [k for k, v in told.items() if k.startswith("pooling_mode_") and v is True]
    if len(on) != 1 or on[0] not in ways:
        raise FileError(f"{folder}: pooling by {on} is not known here")
    return ways[on[0]], "Normalize" in kinds
