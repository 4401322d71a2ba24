"""An adapter from two checkpoints: the best low-rank update for tuned − base, weight by weight.

D = W_tuned − W_base is decomposed (whole, or for large weights by a seeded randomised SVD) and cut
to a rank or to a tolerance. Its error is measured on the cut itself. Both weights were rounded to
their dtype, which bounds what D can say: that floor is told beside the error. A tensor that changed
and is no matrix (a norm, a bias) is kept whole, as a module that is saved beside the factors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..adapter import ORIGIN, Adapter
from ..errors import MismatchError, RefusedError
from ..files.base import Weights, read_base
from ..lowrank import LowRank
from ..parts import LINEAR, PREFIX, Layout
from ..words import some_of, warn
from .algebra.spaces import cut
from .checkpoint import FLOATS, same

Progress = Callable[[int, int, str], object]

KEY = "lorafold_extract"
_FIRST = 16  # the rank that a tolerance is tried with first
_EMBEDDINGS = {
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"),
    *("wpe", "embed_positions", "position_embeddings", "token_type_embeddings"),
}
# Models of Conv1D, and the layers of it: their weights are (in, out).
_TURNED = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer"}
_TURNED_EXPERTS = {"gpt_oss", "llama4", "llama4_text"}
_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
_DIGITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float64: 52}


@dataclass
class _Sums:
    """Over all weights: ‖D − D̂‖², ‖D‖², and what rounding of both may be, ‖e‖²."""

    lost: float = 0.0
    size: float = 0.0
    floor: float = 0.0
    whole: dict[str, Tensor] = field(default_factory=dict)


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """The adapter that turns one checkpoint into another, as well as its rank allows.

    Args:
        base, tuned: folders, or safetensors files; of the same names and shapes.
        rank: of every update. tolerance: instead, a bound on every module's ‖D − ΔW‖ / ‖D‖.
        base_model: the base's name in the config; the path where None.
        progress: called with done, total and the tensor.

    Returns:
        An `Adapter` with an update for every matrix that changed; where an output layer shares the
        embedding's weight, one for either, as merging the embedding's alone parts them. Its config
        tells the error and the rounding floor, relative to all of D, under `lorafold_origin`;
        `facts` reads them.

    Raises:
        FileError: no safetensors there.
        MismatchError: not exactly one of rank and tolerance; names or shapes that differ; nothing
            changed.
        RefusedError: a checkpoint is quantised.

    Not for: an adapter's own size (`Adapter.resize`).
    """
    _check(rank, tolerance)
    before, after = (Weights(read_base(path)) for path in (base, tuned))
    _check_same(before, after)
    model = str(before.files.config.get("model_type"))
    modules: dict[str, LowRank] = {}
    layouts: dict[str, Layout] = {}
    sums = _Sums()
    keys = [key for key in before.keys if key in after]
    for k, key in enumerate(keys):
        if progress is not None:
            progress(k, len(keys), key)
        W, W1 = before.read(key), after.read(key)
        if same(W, W1):
            continue
        codes = next((t.dtype for t in (W, W1) if t.dtype not in FLOATS), None)
        if codes is not None:
            raise RefusedError(f"{key!r} is {codes}: quantised weights have no difference")
        D = (W1.double() - W.double()).float()
        found = list(_updates(key, D, model))
        if not found:
            sums.whole[key] = W1.clone()
            continue
        if not torch.isfinite(D).all():
            raise MismatchError(f"{key!r} holds numbers that are not finite: there is no update")
        for path, layout, flat in found:
            try:
                modules[path] = _within(flat, rank, tolerance, sums)
            except MismatchError as e:
                said = f"{key!r}: its difference is beyond float32's range ({e})"
                raise MismatchError(said) from e
            if layout != LINEAR:
                layouts[path] = layout
        sums.floor += _rounding(W) + _rounding(W1)
    if not modules and not sums.whole:
        raise MismatchError(f"{tuned} is {base}: no tensor differs")
    turned = model in _TURNED
    return _adapter(modules, layouts, sums, turned, base_model or os.fspath(base), str(tuned))


def facts(adapter: Adapter) -> dict[str, Any] | None:
    """`error`, `floor` and more of an extracted adapter; None of any other."""
    found = adapter.config.get(ORIGIN, {}).get("metadata", {}).get(KEY)
    return None if found is None else json.loads(found)


def _check(rank: int | None, tolerance: float | None) -> None:
    if (rank is None) == (tolerance is None):
        raise MismatchError("give exactly one of rank and tolerance")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise MismatchError(f"rank must be a whole number of at least 1, found {rank!r}")
    if tolerance is not None and not (isinstance(tolerance, Real) and 0 <= tolerance < 1):
        raise MismatchError(f"tolerance must lie in [0, 1), found {tolerance!r}")


def _check_same(before: Weights, after: Weights) -> None:
    """Refuse checkpoints of other names or shapes."""
    one = {*before.keys} ^ {*after.keys}
    if one:
        raise MismatchError(
            f"{len(one)} tensors are in one checkpoint only, e.g. {min(one)!r}: extract needs two "
            "of the same model"
        )
    for key in before.keys:
        if key in after:
            a, b = (w.shape(key) for w in (before, after))
            if a != b:
                grown = len(a) == 2 and a[1:] == b[1:]
                raise MismatchError(
                    f"{key!r} is {a} in the base and {b} in the tuned checkpoint"
                    + (
                        f": for a vocabulary that was resized, save the base resized, with "
                        f"transformers' resize_token_embeddings({b[0]}), and give that"
                        if grown
                        else ""
                    )
                )


def _updates(key: str, D: Tensor, model: str) -> Iterator[tuple[str, Layout, Tensor]]:
    """Path, layout and (out, in) of every update that a weight's difference is; none of a vector.

    Args:
        model: its type, by which some weights are known to be stored (in, out).
    """
    path = key.removesuffix(".weight")
    owner, _, name = path.rpartition(".")
    if path == key:
        if D.ndim == 3 and owner.rpartition(".")[2] == "experts":
            turned = model in _TURNED_EXPERTS
            for e in (e for e in range(len(D)) if bool(D[e].any())):
                layout = Layout("expert", parameter=name, expert=(e, len(D)), transposed=turned)
                yield f"{key}[{e}]" if len(D) > 1 else key, layout, D[e].T if turned else D[e]
    elif D.ndim == 2 and name in _EMBEDDINGS:
        yield path, Layout("embedding"), D.T
    elif D.ndim == 2:
        yield path, LINEAR, D.T if model in _TURNED and name in _CONV1D else D
    elif D.ndim in (3, 4, 5):
        yield path, Layout("conv", kernel=tuple(D.shape[1:])), D.flatten(1)


def _within(D: Tensor, rank: int | None, tolerance: float | None, sums: _Sums) -> LowRank:
    """The cut of D, its loss added up."""
    if rank is not None:
        found = cut(D, min(rank, *D.shape))
    else:
        assert tolerance is not None
        k, found = _FIRST, cut(D, min(_FIRST, *D.shape))
        while found.lost > tolerance**2 * found.size and k < min(D.shape):
            k *= 2
            found = cut(D, min(k, *D.shape))
        allowed = tolerance**2 * found.size - found.lost
        S = found.update.spectrum().double().square()
        tail = S.flip(0).cumsum(0).flip(0)  # what goes with the last directions
        keep = max(1, int((tail > max(allowed, 0.0)).sum()))
        found = cut(D, keep) if keep < len(S) else found
    sums.lost, sums.size = sums.lost + found.lost, sums.size + found.size
    return found.update


def _rounding(W: Tensor) -> float:
    """‖e‖² of rounding to W's dtype: a twelfth of the square of each number's last digit."""
    exponent = torch.frexp(W.float())[1]
    last = torch.exp2((exponent - 1 - _DIGITS[W.dtype]).double())
    return float((last.square() / 12)[W != 0].sum())


def _adapter(
    modules: dict[str, LowRank],
    layouts: dict[str, Layout],
    sums: _Sums,
    turned: bool,
    base: str,
    tuned: str,
) -> Adapter:
    owners = {layouts.get(p, LINEAR).owner(p) for p in modules}
    whole = {_key(key, owners): t for key, t in sums.whole.items()}
    saved, beside = _saved(sums.whole, owners)
    if whole:
        warn(
            f"{len(whole)} tensors that changed are no matrices and are kept whole: "
            + some_of(list(sums.whole))
        )
    if beside:
        warn(f"PEFT has no way to load {some_of(beside)}: what is kept whole beside an update")
    size = math.sqrt(sums.size) or 1.0
    told = {
        "lorafold": __version__,
        "base": base,
        "tuned": tuned,
        "error": math.sqrt(sums.lost) / size,
        "floor": math.sqrt(sums.floor) / size,
        "whole": list(sums.whole),
    }
    config: dict[str, Any] = {ORIGIN: {"metadata": {KEY: json.dumps(told)}}}
    if turned:
        config["fan_in_fan_out"] = True
    if saved:
        config["modules_to_save"] = saved
    return Adapter(modules, whole, config, base, layouts)


def _key(name: str, owners: Set[str]) -> str:
    """What PEFT calls a tensor that is kept whole: a module with an update is wrapped."""
    module, _, parameter = name.rpartition(".")
    return PREFIX + (f"{module}.base_layer.{parameter}" if module in owners else name)


def _saved(whole: Iterable[str], owners: Set[str]) -> tuple[list[str], list[str]]:
    """Modules for PEFT to load whole; and tensors for which none will do: it holds updates."""
    saved, beside = set(), []
    for name in whole:
        module, _, parameter = name.rpartition(".")
        if any(owner.startswith(f"{module}.") for owner in owners) or not module:
            beside.append(name)
        elif module not in owners:
            saved.add(module)
        elif parameter != "bias":  # of experts: their wrappers nest
            beside.append(name)
    return sorted(saved), beside
